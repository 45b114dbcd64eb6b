"""The model's own forward pass: its head reads hidden states, and a trial of a few tokens proves that ours agrees.

Models differ in what they do after the decoder: they scale the logits, cap them, or put a module before the head. None
of that is written here again. `OwnHead` calls the forward of the model's own class. It gives it copies of the modules
on the way to the decoder that share every weight, and the copy of the decoder returns the hidden states in question.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from errata.editors.core.errors import ArchitectureError
from errata.editors.core.model.compiled import without_compiled_forwards

# Where the model keeps which of its parts have passed the trial.
CHECKED = "_errata_checked"
# Tokens of a row of the trial; and what a linear map may be given for two of them.
ROW = 3
LAYOUTS = ((2, ROW), (2 * ROW,))
# What a model that does not fit raises when it is called in a way that it does not know.
MISFIT = (
    AssertionError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode inside the `with`, and restore the flag of each module afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Turn off the gradients of all parameters inside the `with`, so that autograd keeps nothing for them."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    """Remove the hooks with these handles when the `with` ends. Inside, forwards run uncompiled, so that hooks act."""
    try:
        with without_compiled_forwards():
            yield
    finally:
        for handle in handles:
            handle.remove()


class OwnHead:
    """What the model itself computes from the decoder's output.

    Args:
        model: The model.
        base_path: The name of the decoder in it.
        head: The language-model head.
    """

    def __init__(self, model: nn.Module, base_path: str, head: nn.Module) -> None:
        owner_path = _owner(model, base_path, head)
        self.owner = model.get_submodule(owner_path)
        inner = base_path.removeprefix(owner_path).removeprefix(".")
        self._given: list[Tensor] = []
        self._shadow = _shadow(self.owner, inner.split("."), self._decoder_output)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of the decoder's output (..., d), which has passed the final norm already."""
        rows = hidden if hidden.ndim == 3 else hidden.reshape(1, -1, hidden.shape[-1])
        ids = torch.zeros(rows.shape[:2], dtype=torch.int64, device=rows.device)
        self._given = [rows]
        try:
            # Not through __call__: hooks on the whole model are not asked about hidden states.
            output = type(self.owner).forward(self._shadow, input_ids=ids, use_cache=False)
        finally:
            self._given = []
        return output.logits.reshape(*hidden.shape[:-1], -1)

    def _decoder_output(self, *_args: Any, **_kwargs: Any) -> Any:
        return _Output(self._given[0])


class _Output(tuple):
    """What a decoder returns, the hidden states alone: all else that a model may look for is None."""

    __slots__ = ()

    def __new__(cls, hidden: Tensor) -> _Output:
        return super().__new__(cls, (hidden,))

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[0] if name == "last_hidden_state" else default


def _owner(model: nn.Module, base_path: str, head: nn.Module) -> str:
    """Return the name of the smallest module that holds both the decoder and the head."""
    parts = base_path.split(".")
    for end in range(len(parts) - 1, -1, -1):
        path = ".".join(parts[:end])
        if any(module is head for module in model.get_submodule(path).modules()):
            return path
    return ""


def _shadow(module: nn.Module, path: list[str], forward: Callable[..., Any]) -> nn.Module:
    """Return a copy that shares all weights and has `forward` in the place of the forward of the module at `path`."""
    shadow = copy.copy(module)
    shadow.__dict__ = {**module.__dict__, "_modules": dict(module._modules), "_compiled_call_impl": None}
    shadow.__dict__ |= {name: OrderedDict() for name in _HOOKS}
    shadow.__dict__.pop("forward", None)  # accelerate keeps one that belongs to the original
    if path:
        shadow._modules[path[0]] = _shadow(module.get_submodule(path[0]), path[1:], forward)
    else:
        shadow.__dict__["forward"] = forward
    return shadow


Shapes = tuple[tuple[int, ...], ...]  # of the inputs of a module, one per call, without their last dimension


def check_own_forward(
    model: nn.Module, base: nn.Module, head: nn.Module, logits: Callable[[Tensor], Tensor], maps: Sequence[nn.Module]
) -> tuple[Shapes, ...]:
    """Run two short rows through the model's own forward, and through the decoder and `logits`.

    It runs once per model object, and again when its decoder, its head or one of the maps is another module.

    Args:
        model: The whole model.
        base: Its decoder.
        head: Its language-model head.
        logits: What is used for logits (..., V) of the decoder's output (..., d).
        maps: Linear maps of the decoder.

    Returns:
        What each of `maps` is given in a forward of the decoder, see `inputs_seen`.

    Raises:
        ArchitectureError: one of them cannot run, they differ by more than rounding, or a token depends on a later one.
    """
    key = tuple(map(id, (model, base, head, *maps)))
    kept = model.__dict__.get(CHECKED)
    if kept is not None and kept[0] == key:
        return kept[1]
    if any(parameter.is_meta for part in (base, head) for parameter in part.parameters()):
        return ((LAYOUTS[0],),) * len(maps)
    ids = torch.tensor(trial_rows(model, ROW), device=next(base.parameters()).device)
    part = ids[:, : ROW - 1]
    with torch.no_grad(), evaluating(model), without_compiled_forwards():
        own = _tried(f"the forward of {type(model).__name__}", lambda: model(input_ids=part, use_cache=False).logits)
        hidden = _tried(f"its decoder {type(base).__name__}", lambda: _hidden(base, part))
        ours = _tried(f"the head of {type(model).__name__}", lambda: logits(hidden))
        longer, seen = inputs_seen(base, ids, maps)
        ahead = _tried(f"the head of {type(model).__name__}", lambda: logits(longer))[:, : ROW - 1]
    if _agrees(model, base, own, ours, ahead):
        model.__dict__[CHECKED] = (key, seen)
    return seen


def inputs_seen(base: nn.Module, ids: Tensor, maps: Sequence[nn.Module]) -> tuple[Tensor, tuple[Shapes, ...]]:
    """Return the decoder's output for `ids`, and for each map the shapes of its inputs, without their last dimension.

    A map that editors can train runs once and gets (rows, length) or (rows * length,): see LAYOUTS.
    """
    seen: list[list[tuple[int, ...]]] = [[] for _ in maps]

    def keeping(index: int) -> Callable[..., None]:
        def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[index].append(tuple(args[0].shape[:-1]) if args else ())

        return keep

    with hooked(*(module.register_forward_pre_hook(keeping(i)) for i, module in enumerate(maps))):
        hidden = _tried(f"its decoder {type(base).__name__}", lambda: _hidden(base, ids))
    return hidden, tuple(map(tuple, seen))


def passes_gradients(base: nn.Module, ids: Tensor, module: nn.Module) -> bool:
    """Return whether the decoder's output has gradients for the output of one of its modules, all weights frozen."""

    def ask(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_().clone()  # a copy, as Falcon adds to it in place

    hook = module.register_forward_hook(ask)
    with hooked(hook), frozen(base), torch.inference_mode(False), torch.enable_grad():
        return _hidden(base, ids.clone()).requires_grad


def _agrees(model: nn.Module, base: nn.Module, own: Tensor, ours: Tensor, ahead: Tensor) -> bool:
    """Return whether the trial has proved that the parts are read as the model means them.

    Args:
        model: The model.
        base: Its decoder.
        own: Its own logits of two rows.
        ours: Those of the decoder and the head.
        ahead: The same, of rows that go on.

    Raises:
        ArchitectureError: it has proved that they are not.
    """
    name = type(model).__name__
    if ours.shape != own.shape:
        raise ArchitectureError(
            f"{name} gives logits {tuple(own.shape)} for two rows of {ROW - 1} tokens, and its decoder and head "
            f"{tuple(ours.shape)}; errata cannot read it"
        )
    if not bool(own.isfinite().all()):
        return False  # nothing to compare; methods and scores report it
    if differ(ours, own):
        raise ArchitectureError(
            f"{name} gives other logits than its decoder {type(base).__name__} and its head: something that errata "
            "does not know acts between them, or the decoder counts positions in another way"
        )
    if differ(ahead, own, at_least=0.01):
        if not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules()):
            raise ArchitectureError(
                f"{name} is no causal decoder: its prediction after a token depends on the tokens behind it; load a "
                "decoder, or set is_decoder=True in its configuration"
            )
        return False  # an edit on the model may look ahead; only without hooks is it known
    return True


def _hidden(base: nn.Module, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return base(
        input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False
    ).last_hidden_state


def _tried(what: str, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except MISFIT as error:
        text = " ".join(str(error).split())[:200]
        raise ArchitectureError(
            f"{what} cannot be run on two tokens, as a decoder is ({type(error).__name__}: {text})"
        ) from error


def differ(ours: Tensor, own: Tensor, at_least: float = 0.0) -> bool:
    """Return whether two tensors differ by more than rounding, and by at least this share of their norm."""
    own, share = own.to(ours.device), max(at_least, 32 * torch.finfo(own.dtype).eps)
    return bool((ours.double() - own.double()).norm() > share * own.double().norm())


def trial_rows(model: nn.Module, length: int) -> list[list[int]]:
    """Return two rows of ordinary tokens, which differ from their second token on."""
    config = model.config  # type: ignore[union-attr]
    special = set(_special(config.to_dict()))  # type: ignore[operator, union-attr]
    plain = [token for token in range(length + 1 + len(special)) if token not in special][: length + 1]
    return [plain[:length], [plain[0], *plain[2:]]]


def _special(settings: dict[str, Any]) -> Iterator[int]:
    """Yield the ids of special tokens that a configuration names."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _special({str(key): entry for key, entry in value.items()})
        elif re.search(r"token_id|token_index|pad_index|(bos|eos|unk|mask)_index", name):
            yield from (v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
