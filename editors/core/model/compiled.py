"""Models that `torch.compile` has compiled: the ledger reaches them, and editors work on what was compiled.

A compiled forward calls the hooks that a module had when it was compiled, without a look at those that it has now. So
whatever changes hooks calls `forget_compiled_forwards`. Changes of weights need nothing: a compiled forward reads the
parameters themselves, and the ledger writes in place.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import nn


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` was called on, if `model` is its result; else `model`."""
    # `torch.compile` has imported this. To import it here would take seconds.
    dynamo: Any = sys.modules.get("torch._dynamo")
    while dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        model = cast(Any, model)._orig_mod
    return model


def forget_compiled_forwards() -> None:
    """Make every compiled forward of this process compile again when it is next called.

    There is no way to do this for one model, as a compiled function may call it, or it may call compiled modules.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


def without_compiled_forwards() -> AbstractContextManager[object]:
    """Return a context manager: inside, compiled forwards run as if they had never been compiled.

    Code that reads activations by hooks needs this.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
