"""Multi-scale spatio-temporal adapters (MST-Adapter, section 3.3, eqs. 6-9; spec mst_adapter 2.2, 2.3, 3.3).

The output at step 0 is the bare block's, in every position. Shape suffixes: B batch, T time slices, H height, W
width, C channels, R bottleneck.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mdltool.adapters.base import Inner, TokenAdapter, TokenOptions
from mdltool.adapters.factored import Axes
from mdltool.convolution import conv3d
from mdltool.types import Site
from mdltool.wrapping import TokenGrid

Kernel = tuple[int, int, int]
# Name -> three kernels; which of them fit the paper's counts: spec mst_adapter 3.1.
KERNELS: dict[str, tuple[Kernel, Kernel, Kernel]] = {
    "t357": ((3, 1, 1), (5, 1, 1), (7, 1, 1)),
    "t135": ((1, 1, 1), (3, 1, 1), (5, 1, 1)),
    "mixed17": ((1, 3, 3), (3, 1, 1), (5, 1, 1)),
    "mixed31": ((1, 1, 1), (3, 1, 1), (3, 3, 3)),
    "mixed39": ((1, 3, 3), (3, 1, 1), (3, 3, 3)),
    "cube135": ((1, 1, 1), (3, 3, 3), (5, 5, 5)),
    "cube357": ((3, 3, 3), (5, 5, 5), (7, 7, 7)),
    "dil3": ((3, 1, 1), (3, 1, 1), (3, 1, 1)),
}
ROLES = {
    "post": ("mid", "exit"),
    "prior_norm": ("entry", "mid"),
    "prior_norm_branch": ("norm1_in", "norm2_in"),
    "prior_sub": ("attn_in", "mlp_in"),
    "post_sub": ("attn_out", "mlp_out"),
}


class MstOptions(TokenOptions):
    """position: where in the block. kernels: a name of KERNELS; dil3 dilates by 1, 2 and 3. pointwise: the 1x1x1
    convolution. fusion: the branches' weights. act: a GELU after the down- or before the up-projection. cls: the
    class token passes all but the branches, nothing, or everything as a 1x1 grid.
    """

    r: Annotated[int, Field(ge=1)] = 384
    position: Literal["post", "prior_norm", "prior_norm_branch", "prior_sub", "post_sub"] = "post"
    kernels: Literal["t357", "t135", "mixed17", "mixed31", "mixed39", "cube135", "cube357", "dil3"] = "t357"
    pointwise: Literal["dense", "depthwise", "none"] = "dense"
    fusion: Literal["learned", "average", "softmax"] = "learned"
    act: Literal["none", "gelu_down", "gelu_up"] = "none"
    cls: Literal["linear", "bypass", "grid1"] = "linear"


class MstAdapter(TokenAdapter):
    """V + up(z + PW(z)), z = X + sum_i a_i DW_i(X), X = down(V); 2CR + R + C + R S + 3R + R^2 + R + 3 parameters,
    S the sum of the kernels' volumes.

    With a class-token readout, what acts on patch tokens after the last attention gets no gradient (spec 2.7).
    """

    kinds = frozenset({"block"})
    Options = MstOptions
    unfoldable = "it convolves the tokens, which no weight of a block does"

    def __init__(self, site: Site, options: MstOptions) -> None:
        super().__init__(site, options)
        r = options.r
        self._cls, self._act, self._fusion = options.cls, options.act, options.fusion
        self.down = nn.Linear(site.channels, r)
        dilations = (1, 2, 3) if options.kernels == "dil3" else (1, 1, 1)
        self.branches = nn.ModuleList(
            _depthwise(r, kernel, dilation)
            for kernel, dilation in zip(KERNELS[options.kernels], dilations, strict=True)
        )
        if options.fusion != "average":
            self.weights = nn.Parameter(torch.full((3,), 0.33 if options.fusion == "learned" else 0.0))
        self.pointwise = _pointwise(r, options.pointwise)
        self.up = nn.Linear(r, site.channels)
        nn.init.xavier_uniform_(self.down.weight)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    @classmethod
    def roles(cls, options: Any) -> frozenset[str]:
        return frozenset(ROLES[options.position])

    def factor_rules(self) -> dict[str, Axes]:
        return {"down.weight": Axes(shared=(1,)), "up.weight": Axes(shared=(0,))}

    def forward(self, inner: Inner, x: Tensor, grid: TokenGrid) -> Tensor:
        x = inner(x)
        class_BTC, patches_BTHWC = grid.split(x)
        patches_BTHWC = patches_BTHWC + self._grid_path(patches_BTHWC)
        if class_BTC is not None and self._cls == "linear":
            class_BTC = class_BTC + self._out(self._in(class_BTC))
        elif class_BTC is not None and self._cls == "grid1":
            class_BTC = class_BTC + self._grid_path(class_BTC[:, :, None, None])[:, :, 0, 0]
        return grid.join(class_BTC, patches_BTHWC)

    def branch_weights(self) -> Tensor:
        """What the three branches are multiplied with, [3]."""
        if self._fusion == "average":
            return self.up.bias.new_full((3,), 1 / 3)
        return self.weights.softmax(0) if self._fusion == "softmax" else self.weights

    def _in(self, v: Tensor) -> Tensor:
        x = self.down(v)
        return functional.gelu(x) if self._act == "gelu_down" else x

    def _grid_path(self, v_BTHWC: Tensor) -> Tensor:
        x_BTHWR = self._in(v_BTHWC)
        return self._out(x_BTHWR + self._branches(x_BTHWR.movedim(-1, 1)).movedim(1, -1))

    def _out(self, z: Tensor) -> Tensor:
        y = z + self.pointwise(z) if self.pointwise is not None else z
        return self.up(functional.gelu(y) if self._act == "gelu_up" else y)

    def _branches(self, x_BRTHW: Tensor) -> Tensor:
        """sum_i a_i DW_i(X): one convolution with the summed kernels where that is cheaper, else one each."""
        pairs: list[tuple[Tensor, Any]] = list(zip(self.branch_weights(), self.branches, strict=True))
        spans = [[d * (k - 1) + 1 for d, k in zip(b.dilation, b.kernel_size, strict=True)] for _, b in pairs]
        box = [max(sizes) for sizes in zip(*spans, strict=True)]
        if box[0] * box[1] * box[2] > sum(branch.weight[0].numel() for _, branch in pairs):
            return torch.stack([a * branch(x_BRTHW) for a, branch in pairs]).sum(0)
        kernel = torch.stack([a * _spread(branch, box) for a, branch in pairs]).sum(0)
        bias = torch.stack([a * branch.bias for a, branch in pairs]).sum(0)
        padding = [size // 2 for size in box]
        return conv3d(x_BRTHW, kernel, bias, padding=padding, groups=x_BRTHW.shape[1])


class _Channelwise(nn.Module):
    """A depthwise 1x1x1 convolution of tokens: a weight and a bias for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels).uniform_(-1, 1))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


def _pointwise(channels: int, kind: str) -> nn.Module | None:
    if kind == "none":
        return None
    return nn.Linear(channels, channels) if kind == "dense" else _Channelwise(channels)


def _depthwise(channels: int, kernel: Kernel, dilation: int) -> nn.Conv3d:
    steps: Any = tuple(dilation if size > 1 else 1 for size in kernel)
    padding: Any = tuple(step * (size // 2) for step, size in zip(steps, kernel, strict=True))
    return nn.Conv3d(channels, channels, kernel, padding=padding, dilation=steps, groups=channels)


def _spread(branch: nn.Conv3d, box: list[int]) -> Tensor:
    """A branch's kernel in a box of odd sizes, its taps at their distances from the centre."""
    kernel = branch.weight
    for axis, step in enumerate(branch.dilation, 2):
        if step > 1:  # between two taps lie step - 1 zeros
            kernel = torch.stack([kernel, *[torch.zeros_like(kernel)] * (step - 1)], axis + 1).flatten(
                axis, axis + 1
            )
            kernel = kernel.narrow(axis, 0, kernel.shape[axis] - step + 1)
    margins = [(size - k) // 2 for size, k in zip(box, kernel.shape[2:], strict=True)]
    return functional.pad(kernel, [margins[2]] * 2 + [margins[1]] * 2 + [margins[0]] * 2)
