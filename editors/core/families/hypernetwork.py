"""The networks of MEND, MALMEN and RLEdit, which transform the factors of a gradient.

    z = (x, delta), normalised;    z <- z + relu(s_m * (U V z + b) + o_m), layer after layer;    (x~, delta~) = z

Mitchell et al. 2022, "Fast Model Editing at Scale", section 3.2 and equation 3. As in the authors' code, every layer
has a relu and an offset b, also the last one. U begins at zero, so that a new network is the identity.

If `shared`, all weights of one shape use the same network, and each weight m has its own scale s_m and offset o_m. The
statistics for normalisation cover every token seen in training, and are saved with the network.

Legend: x (t, d_in) the inputs of a linear map at t tokens; delta (t, d_out) the gradients of its outputs; x~ and delta~
the transformed factors; m the mode: the index of a weight among those that share a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

EPSILON = 1e-7  # what MEND adds to standard deviations
Form = Literal["mend", "malmen"]
MIN_TOKENS = 2  # a standard deviation needs two


class ResidualLayer(nn.Module):
    """The layer z + relu(s_m * (U V z + b) + o_m); without modes s is 1 and o is 0.

    In MALMEN's form the scale and the offset act behind the relu: z + s_m * relu(U V z + b) + o_m.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        modes: int | None,
        dtype: torch.dtype,
        generator: torch.Generator,
        form: Form,
    ) -> None:
        super().__init__()
        self.outside = form == "malmen"
        rank = min(rank, width)
        self.U = nn.Parameter(torch.zeros(width, rank, dtype=dtype))
        self.V = nn.Parameter(torch.randn(rank, width, generator=generator, dtype=torch.float32).to(dtype))
        self.b = nn.Parameter(torch.zeros(width, dtype=dtype))
        self.s = None if modes is None else nn.Parameter(torch.ones(modes, width, dtype=dtype))
        self.o = None if modes is None else nn.Parameter(torch.zeros(modes, width, dtype=dtype))

    def forward(self, z: Tensor, mode: int) -> Tensor:
        # Not relu(): in a new network all values are 0. There the derivative of relu is 0, and that of clamp is 1.
        inner = z @ self.V.T @ self.U.T + self.b
        if self.outside:
            inner = inner.clamp_min(0)
        if self.s is not None and self.o is not None:
            inner = inner * self.s[mode] + self.o[mode]
        return z + (inner if self.outside else inner.clamp_min(0))


class RunningNorm(nn.Module):
    """The normalisation (z - mean) / (standard deviation + epsilon), over all tokens seen in training mode so far.

    Epsilon is 1e-7 in MEND's form, and the relative rounding error of the precision in MALMEN's.

    In training mode, the present tokens are included. Statistics are updated per batch (Chan et al. 1983), with the
    same result as one token at a time. Before two tokens have been seen, z is returned unchanged.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor  # sum of squared deviations

    def __init__(self, width: int, form: Form = "mend") -> None:
        super().__init__()
        self.form = form
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(width, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        if self.training and len(z):
            self._absorb(z.detach().double())
        if self.count < MIN_TOKENS:
            return z
        deviation = (self.squares / (self.count - 1)).sqrt().to(z.dtype)
        epsilon = EPSILON if self.form == "mend" else torch.finfo(z.dtype).eps
        return (z - self.mean.to(z.dtype)) / (deviation + epsilon)

    def _absorb(self, z: Tensor) -> None:
        n, total = len(z), self.count + len(z)
        mean = z.mean(0)
        gap = mean - self.mean
        self.squares = self.squares + ((z - mean) ** 2).sum(0) + gap**2 * (self.count * n / total)
        self.mean = self.mean + gap * (n / total)
        self.count = total


class Transform(nn.Module):
    """The map (x, delta) -> (x~, delta~) for weights of one shape (d_in, d_out).

    If `combine`, one network transforms both side by side; else there is one for each.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        modes: int | None,
        *,
        n_hidden: int,
        rank: int,
        combine: bool,
        norm: bool,
        form: Form,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        widths = [sum(shape)] if combine else list(shape)
        self.widths, self.shape = widths, shape
        self.norms = nn.ModuleList(RunningNorm(width, form) for width in shape) if norm else None
        self.nets = nn.ModuleList(
            nn.ModuleList(ResidualLayer(width, rank, modes, dtype, generator, form) for _ in range(n_hidden + 1))
            for width in widths
        )

    def forward(self, x: Tensor, delta: Tensor, mode: int) -> tuple[Tensor, Tensor]:
        parts = [x, delta]
        if self.norms is not None:
            parts = [norm(part) for norm, part in zip(self.norms, parts, strict=True)]
        z = torch.cat(parts, dim=-1).split(self.widths, dim=-1)
        out = torch.cat([_apply_layers(net, part, mode) for net, part in zip(self.nets, z, strict=True)], dim=-1)
        new_x, new_delta = out.split(self.shape, dim=-1)
        return new_x, new_delta


def _apply_layers(layers: nn.Module, z: Tensor, mode: int) -> Tensor:
    for layer in layers.children():
        z = layer(z, mode)
    return z


class Hypernetwork(nn.Module):
    """The transforms of several weights, and a learned rate for each.

    Args:
        shapes: (d_in, d_out) of each weight.
        n_hidden: Number of hidden layers; a network has one layer more.
        rank: Rank of each layer, at most its width.
        combine: Whether one network transforms x and delta side by side; else there is one for each.
        shared: Whether all weights of one shape share a network.
        norm: Whether x and delta are normalised.
        edit_lr: Initial value of every rate. The edit is added, so that a positive rate raises the loss at first.
            Training changes its sign.
        dtype: Dtype of the parameters; the running statistics are float64.
        generator: Random generator for the initial V.
        form: Whose layers and normalisation it has.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        *,
        n_hidden: int,
        rank: int,
        combine: bool,
        shared: bool,
        norm: bool,
        edit_lr: float,
        dtype: torch.dtype,
        generator: torch.Generator,
        form: Form = "mend",
    ) -> None:
        super().__init__()
        distinct = list(dict.fromkeys(shapes))
        uses = distinct if shared else list(shapes)
        self.transforms = nn.ModuleList(
            Transform(
                shape,
                list(shapes).count(shape) if shared else None,
                n_hidden=n_hidden,
                rank=rank,
                combine=combine,
                norm=norm,
                form=form,
                dtype=dtype,
                generator=generator,
            )
            for shape in uses
        )
        # (index of its network, mode) for each weight
        self.assignments = [
            (distinct.index(shape), list(shapes[:i]).count(shape)) if shared else (i, 0)
            for i, shape in enumerate(shapes)
        ]
        self.edit_lrs = nn.Parameter(torch.full((len(shapes),), edit_lr, dtype=dtype))

    def forward(self, weight: int, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Transform the factors of one weight.

        Args:
            weight: Index of the weight.
            x: (t, d_in) inputs.
            delta: (t, d_out) gradients of the outputs.

        Returns:
            x~ (t, d_in) times the weight's rate, and delta~ (t, d_out). The edit adds sum_t delta~_t x~_t^T.
        """
        network, mode = self.assignments[weight]
        rate = self.edit_lrs[weight]
        x, delta = self.transforms[network](x.to(rate.dtype), delta.to(rate.dtype), mode)
        return x * rate, delta


class RidgeHypernetwork(Hypernetwork):
    """MALMEN's: scales and offsets act behind the relu, and each weight has a learned ridge exp(lambda), 1 at first.

    Args as `Hypernetwork`, which is always shared and normalised here.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        *,
        n_hidden: int,
        rank: int,
        combine: bool,
        edit_lr: float,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        super().__init__(
            shapes,
            n_hidden=n_hidden,
            rank=rank,
            combine=combine,
            shared=True,
            norm=True,
            edit_lr=edit_lr,
            dtype=dtype,
            generator=generator,
            form="malmen",
        )
        self.log_ridges = nn.Parameter(torch.zeros(len(shapes), dtype=dtype))
