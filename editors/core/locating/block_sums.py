"""What each block adds to the residual stream, and how: the sums that information flows through.

    middle = entry + attention        exit = middle + mlp

A block is not looked up by name. What its attention gives is followed through the norm behind it, if there is one, up
to the sum of it and the block's input, which some module of the block must read or the block's output must hold. These
forms are known:

- one after the other: the MLP reads `middle` (GPT-2, Llama), perhaps with a norm behind each part (Gemma 2, OLMo 2), or
  a factor (Granite);
- side by side: the MLP reads the entry, and `middle` is a sum that the model never forms (GPT-J, NeoX, Cohere);
- with the norm behind the sum (OPT 350M): what goes on is the norm of the sum, and shares are of the sum.

Shapes: T tokens, d hidden size, H heads, w width of a head, d_in width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from errata.editors.core.errors import ArchitectureError, RequestError
from errata.editors.core.forward.block_calls import hidden_of, split_hidden
from errata.editors.core.locating.attention_patterns import Attention, PatternWatch
from errata.editors.core.locating.frozen_norms import FrozenNorm, exact, freeze
from errata.editors.core.model import parts
from errata.editors.core.model.activations import run_base, without_autocast
from errata.editors.core.model.architecture import Architecture, LinearMap
from errata.editors.core.model.own_forward import evaluating, hooked
from errata.editors.core.model.tokens import right_padded

# Errors of a sum, in units of the precision and the length of the sum.
_ROUNDING = 8
# A factor this close to 1 is 1 and rounding.
_NEARLY_ONE = 1e-3


@dataclass(frozen=True)
class Behind:
    """What lies between an attention or MLP and the sum that it enters, as a linear map: norms and a factor."""

    norms: tuple[FrozenNorm, ...]
    gain: float

    def __call__(self, part: Tensor) -> Tensor:
        """Return what enters the sum of parts (..., T, d) of the output."""
        for norm in self.norms:
            part = norm(part)
        return part if self.gain == 1 else self.gain * part

    def at(self, token: int) -> Behind:
        """Return the map at one token, for parts (..., d)."""
        return Behind(tuple(norm.at(token) for norm in self.norms), self.gain)


@dataclass(frozen=True)
class BlockSums:
    """The sums of one block for one row of tokens. All tensors are in float64 on the CPU.

    Attributes:
        entry: (T, d) what enters the block.
        middle: (T, d) the sum of entry and attention.
        stream: (T, d) what the MLP is added to: `middle`, or the norm of it where norms stand behind sums.
        exit: (T, d) the sum of `stream` and what the MLP gives.
        reads_middle: Whether the MLP reads the stream; False: it reads the entry, beside the attention.
        heads: (T, H w) what enters the attention's output projection.
        projection: That projection.
        behind: What lies between the projection and the sum.
        attention: Patterns and values; None where they were not asked for.
        keys: (T, d_in) what enters the down projection; None without a dense MLP.
        behind_mlp: What lies between the down projection and its sum; None likewise.
    """

    entry: Tensor
    middle: Tensor
    stream: Tensor
    exit: Tensor
    reads_middle: bool
    heads: Tensor
    projection: LinearMap
    behind: Behind
    attention: Attention | None
    keys: Tensor | None
    behind_mlp: Behind | None

    @property
    def out(self) -> Tensor:
        """Return the weight of the attention's output projection, (d, H w)."""
        return exact(self.projection.weight)


class RowSums(NamedTuple):
    """What one row computes.

    Attributes:
        blocks: The sums of its blocks.
        last: (T, d) what the last block gives, in the model's precision and on its device.
        normed: (T, d) what the decoder gives, after the final norm.
    """

    blocks: list[BlockSums]
    last: Tensor
    normed: Tensor


@torch.no_grad()
def block_sums(
    architecture: Architecture, ids: Sequence[int], *, patterns: bool = True, layers: Sequence[int] | None = None
) -> RowSums:
    """Run one row and return the sums of its blocks.

    Args:
        architecture: The model.
        ids: The tokens of the row.
        patterns: Keep what each head looked at.
        layers: The blocks, counted from 0; None: all.

    Raises:
        ArchitectureError: a block has no attention, or its sums have another form; the message names the block.
        RequestError: the row has no token.
    """
    if not ids:
        raise RequestError("expected text of at least one token, got none", field="prompt")
    chosen = range(architecture.n_layers) if layers is None else layers
    watch = PatternWatch(len(ids)) if patterns else None
    blocks = [_BlockWatch(architecture, layer, len(ids), watch) for layer in chosen]
    batch = right_padded([list(ids)], ids[0]).to(architecture.device)
    with evaluating(architecture.model), without_autocast():
        last: list[Tensor] = []
        with ExitStack() as stack, hooked(), watch or nullcontext():
            keep = architecture.blocks[-1].register_forward_hook(lambda _m, _a, output: last.append(hidden_of(output)))
            stack.callback(keep.remove)
            for block in blocks:
                for hook in block.hooks():
                    stack.callback(hook.remove)  # at once: none may stay if a later one cannot be made
            normed = run_base(architecture, batch)[0]
        return RowSums([block.sums() for block in blocks], last[0].reshape(len(ids), -1), normed)


class _Call(NamedTuple):
    """One call of a module without linear maps, with copies of what it was given and gave, (T, d)."""

    name: str
    module: nn.Module
    given: Tensor
    gave: Tensor


class _BlockWatch:
    """Keeps what one block computes for one row, and reads its sums out of it."""

    def __init__(self, architecture: Architecture, layer: int, length: int, patterns: PatternWatch | None) -> None:
        self.block = architecture.block(layer)
        self.name = f"{architecture.blocks_path}.{layer}"
        self.shape = (length, architecture.d_model)
        self.projection = architecture.attention_map(layer)
        if not self.projection.is_plain:
            raise ArchitectureError(f"{self.projection.name} is quantised or sharded; load the model in float32")
        down = architecture.down_paths[layer]
        self.down = None if down is None else self.block.get_submodule(down)
        self.patterns = patterns
        self.calls: list[_Call] = []
        self.read: list[Tensor] = []  # (T, d) what modules read, once the attention has run
        self.start = -1  # calls before the attention's output
        self.start_mlp = -1
        self.tensors: dict[str, Tensor] = {}
        self.attention: Attention | None = None

    def hooks(self) -> Iterator[Any]:
        leaves = {n: m for n, m in self.block.named_modules() if n and not parts.linears(m)}
        yield from (m.register_forward_hook(self._called(n)) for n, m in leaves.items())
        yield from (m.register_forward_pre_hook(self._reads) for m in parts.linears(self.block).values())
        yield self.block.register_forward_pre_hook(self._entered, with_kwargs=True)
        yield self.block.register_forward_hook(self._left)
        yield self.projection.module.register_forward_hook(self._attended)
        if self.down is not None:
            yield self.down.register_forward_hook(self._answered)

    def _called(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given, size = args[0] if args else None, self.shape[0] * self.shape[1]
            if isinstance(given, Tensor) and isinstance(output, Tensor) and given.numel() == output.numel() == size:
                given, gave = (x.detach().reshape(self.shape).clone() for x in (given, output))
                self.calls.append(_Call(name, module, given, gave))
                self._note(given)

        return keep

    def _reads(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].numel() == self.shape[0] * self.shape[1]:
            self._note(args[0].detach().reshape(self.shape).clone())

    def _note(self, given: Tensor) -> None:
        if self.start >= 0 and not (self.read and torch.equal(self.read[-1], given)):
            self.read.append(given)

    def _entered(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._put("entry", split_hidden(args, kwargs)[2])

    def _left(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._put("exit", hidden_of(output))

    def _attended(self, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.tensors["heads"] = args[0].detach().reshape(self.shape[0], -1).clone()
        self._put("attention", output)
        self.start = len(self.calls)
        if self.patterns is not None:
            self.attention = self.patterns.attention_before(self.tensors["heads"])

    def _answered(self, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.tensors["keys"] = args[0].detach().reshape(self.shape[0], -1).clone()
        self._put("mlp", output)
        self.start_mlp = len(self.calls)

    def _put(self, name: str, tensor: Tensor) -> None:
        if tensor.numel() != self.shape[0] * self.shape[1]:
            raise ArchitectureError(f"{self.name} carries several streams of hidden states, and has no one sum")
        self.tensors[name] = tensor.detach().reshape(self.shape).clone()  # Falcon's blocks add to it in place

    # --- the sums ---------------------------------------------------------------------------------------------------

    def sums(self) -> BlockSums:
        """Return the sums of what was seen.

        Raises:
            ArchitectureError: they have another form than the known ones.
        """
        for name in ("exit", "attention"):
            if name not in self.tensors:
                raise ArchitectureError(
                    f"{self.name} did not run {self.projection.name}, through which heads would reach it"
                )
        if self.patterns is not None and self.attention is None:
            raise ArchitectureError(
                f"{self.name}: what enters {self.projection.name} is no sum of values, weighted by an attention over "
                "earlier tokens; if it is an attention of another implementation, load the model with "
                'attn_implementation="eager"'
            )
        entry, exit_ = self.tensors["entry"], self.tensors["exit"]
        norms, given = self._behind(self.start, self.tensors["attention"])
        found = self._middle(norms, given)
        if found is None:
            return self._side_by_side(norms, given)
        behind, middle = found
        # Where a norm stands behind each sum, the block gives what its last norm gives, and its MLP reads the first's.
        last = next(
            (c for c in self.calls[self.start :] if torch.equal(c.gave, exit_) and not torch.equal(c.given, exit_)),
            None,
        )
        first = next((c for c in self.calls[self.start :] if torch.equal(c.given, middle)), None)
        stream = middle if last is None or first is None else first.gave
        whole = exit_ if last is None else last.given
        behind_mlp = None
        if self.start_mlp >= 0:
            more, gives = self._behind(self.start_mlp, self.tensors["mlp"])
            gain = self._gain(whole, stream, gives)
            if gain is None:
                raise self._refusal("its output is not the sum of what its attention and its MLP give")
            behind_mlp = Behind(more, gain)
        return self._made(behind, behind_mlp, entry, middle, stream, whole, reads_middle=True)

    def _side_by_side(self, norms: tuple[FrozenNorm, ...], given: Tensor) -> BlockSums:
        """Return the sums of a block whose MLP reads what its attention reads."""
        entry, exit_ = self.tensors["entry"], self.tensors["exit"]
        if self.start_mlp < 0:
            raise self._refusal("what its attention gives is not found in a sum")
        more, gives = self._behind(self.start_mlp, self.tensors["mlp"])
        added = exact(exit_) - exact(entry)
        columns = torch.stack([exact(given).reshape(-1), exact(gives).reshape(-1)], dim=1)
        gains = torch.linalg.lstsq(columns, added.reshape(-1, 1)).solution[:, 0]
        if float((columns @ gains - added.reshape(-1)).norm()) > self._allowed(exit_):
            raise self._refusal("its output is not the sum of what its attention and its MLP give")
        first, second = (1.0 if abs(gain - 1) <= _NEARLY_ONE else gain for gain in gains.tolist())
        middle = exact(entry) + first * exact(given)
        return self._made(Behind(norms, first), Behind(more, second), entry, middle, middle, exit_, reads_middle=False)

    def _made(
        self,
        behind: Behind,
        behind_mlp: Behind | None,
        entry: Tensor,
        middle: Tensor,
        stream: Tensor,
        exit_: Tensor,
        *,
        reads_middle: bool,
    ) -> BlockSums:
        keys = self.tensors.get("keys")
        return BlockSums(
            entry=exact(entry),
            middle=exact(middle),
            stream=exact(stream),
            exit=exact(exit_),
            reads_middle=reads_middle,
            heads=exact(self.tensors["heads"]),
            projection=self.projection,
            behind=behind,
            attention=self.attention,
            keys=None if keys is None or behind_mlp is None else exact(keys),
            behind_mlp=behind_mlp,
        )

    def _behind(self, start: int, gave: Tensor) -> tuple[tuple[FrozenNorm, ...], Tensor]:
        """Return the norms that a part passes one after the other, and what the last of them gives."""
        norms = []
        for call in self.calls[start:]:
            if torch.equal(call.given, gave) and not torch.equal(call.gave, gave):
                norms.append(freeze(call.module, call.given, f"{self.name}.{call.name}"))
                gave = call.gave
        return tuple(norms), gave

    def _middle(self, norms: tuple[FrozenNorm, ...], given: Tensor) -> tuple[Behind, Tensor] | None:
        """Return what lies behind the attention, and the first sum of it and the entry that a module reads."""
        for read in self.read:
            gain = self._gain(read, self.tensors["entry"], given)
            if gain is not None:
                return Behind(norms, gain), read
        return None

    def _gain(self, whole: Tensor, stream: Tensor, part: Tensor) -> float | None:
        """Return by which factor a part is in whole = stream + factor * part; None if the sum is another."""
        added, part = exact(whole) - exact(stream), exact(part)
        square = float((part * part).sum())
        gain = float((added * part).sum()) / square if square else 1.0
        allowed = self._allowed(whole)
        if float((added - gain * part).norm()) > allowed or abs(gain) * square**0.5 <= 4 * allowed:
            return None
        return 1.0 if abs(gain - 1) <= _NEARLY_ONE else gain

    def _allowed(self, whole: Tensor) -> float:
        return _ROUNDING * torch.finfo(whole.dtype).eps * float(exact(whole).norm())

    def _refusal(self, why: str) -> ArchitectureError:
        return ArchitectureError(f"{self.name}: {why}, so that there are no shares of it")
