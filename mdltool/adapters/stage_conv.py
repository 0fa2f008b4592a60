"""Convolutional adapters between a backbone's stages (Omi et al., section 3.2, eqs. 6-9; spec omi_mdl 2.2).

g = act(BN(K * f) + f), f the stage's output; the shared LayerNorm follows. The kernels are dense C x C: the
paper's parameter tables prove it. With a BatchNorm weight of 0 (`init: identity`) g = act(f), which is f for the
non-negative features of X3D and ResNet; the LayerNorm still changes it, so the bare backbone's output at step 0
needs `init: identity` and `ln: none`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from torch import Tensor, nn

from mdltool.adapters.base import Adapter, AdapterOptions, Inner
from mdltool.adapters.factored import Axes
from mdltool.adapters.shared_norm import LnForm, shared_norm
from mdltool.types import Site


def _odd(size: int) -> int:
    if size < 1 or size % 2 == 0:
        raise ValueError("a kernel size must be odd")
    return size


KernelSize = Annotated[int, AfterValidator(_odd)]


class StageConvOptions(AdapterOptions):
    """ln: the shared LayerNorm's form. mid: channels between the two kernels of 2plus1d (default: C)."""

    kt: KernelSize = 3
    kh: KernelSize = 3
    kw: KernelSize = 3
    bias: bool = True
    mid: Annotated[int, Field(ge=1)] | None = None
    init: Literal["kaiming", "pytorch_default", "zero_last", "identity"] = "kaiming"
    bias_init: Literal["default", "zero"] = "default"
    out_act: Literal["relu", "none"] = "relu"
    ln: LnForm = "channel"


class StageConvAdapter(Adapter):
    """act(BN(kernel(f)) + f) with a kernel that keeps [B, C, T, H, W]."""

    kinds = frozenset({"stage"})
    Options = StageConvOptions
    unfoldable = "it is layers of its own behind a stage: a convolution, a BatchNorm and an activation"

    def __init__(self, site: Site, options: StageConvOptions) -> None:
        super().__init__(site, options)
        self.kernel = self.make_kernel(site.channels, options)
        self.norm = nn.BatchNorm3d(site.channels)
        self.act: nn.Module = nn.ReLU() if options.out_act == "relu" else nn.Identity()
        initialise(self.kernel, self.norm, options)

    @classmethod
    def has_batch_norm(cls, options: Any) -> bool:
        return True

    @abstractmethod
    def make_kernel(self, channels: int, options: StageConvOptions) -> nn.Module:
        """The kernel K, C -> C."""

    def factor_rules(self) -> dict[str, Axes]:
        return {"kernel.weight": Axes(shared=(0,))}

    def scale_rules(self) -> dict[str, str]:
        return {list(self.factor_rules())[-1]: "norm"}

    def forward(self, inner: Inner, x: Tensor) -> Tensor:
        return self.adapt(inner(x))

    def adapt(self, f_BCTHW: Tensor) -> Tensor:
        """The adapter on a stage's output."""
        return self.act(self.norm(self.kernel(f_BCTHW)) + f_BCTHW)

    @classmethod
    def shared(cls, site: Site, options: AdapterOptions) -> nn.Module | None:
        assert isinstance(options, StageConvOptions)
        return shared_norm(options.ln, site)


class Conv2dAdapter(StageConvAdapter):
    """Frame by frame: one 1 x kh x kw convolution (eq. 6); 9C^2 + 3C parameters."""

    def make_kernel(self, channels: int, options: StageConvOptions) -> nn.Module:
        return conv(channels, channels, (1, options.kh, options.kw), options.bias)


class Conv3dAdapter(StageConvAdapter):
    """One kt x kh x kw convolution (eq. 7); 27C^2 + 3C parameters."""

    def make_kernel(self, channels: int, options: StageConvOptions) -> nn.Module:
        return conv(channels, channels, (options.kt, options.kh, options.kw), options.bias)


class Conv2Plus1dAdapter(StageConvAdapter):
    """1 x kh x kw, then directly kt x 1 x 1, no norm between (eqs. 8, 9); 12C^2 + 4C parameters."""

    def make_kernel(self, channels: int, options: StageConvOptions) -> nn.Module:
        middle = options.mid or channels
        return nn.Sequential(
            conv(channels, middle, (1, options.kh, options.kw), options.bias),
            conv(middle, channels, (options.kt, 1, 1), options.bias),
        )

    def factor_rules(self) -> dict[str, Axes]:
        return {"kernel.0.weight": Axes(shared=(1,)), "kernel.1.weight": Axes(shared=(0,))}


def conv(inputs: int, outputs: int, kernel: tuple[int, int, int], bias: bool) -> nn.Conv3d:
    """A dense convolution of stride 1 that keeps T, H and W by zero padding."""
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    return nn.Conv3d(inputs, outputs, kernel, padding=padding, bias=bias)


def initialise(kernel: nn.Module, norm: nn.BatchNorm3d, options: StageConvOptions) -> None:
    """Spec omi_mdl 2.6: Kaiming normal (fan in, gain sqrt 2) by default; biases as the framework makes them."""
    convolutions = list(_convolutions(kernel))
    for convolution in convolutions:
        if options.init != "pytorch_default":
            nn.init.normal_(convolution.weight, std=math.sqrt(2 / _fan_in(convolution)))
        if convolution.bias is not None and options.bias_init == "zero":
            nn.init.zeros_(convolution.bias)
    if options.init == "zero_last":
        nn.init.zeros_(convolutions[-1].weight)
        if convolutions[-1].bias is not None:
            nn.init.zeros_(convolutions[-1].bias)
    if options.init == "identity":
        nn.init.zeros_(norm.weight)


def _convolutions(kernel: nn.Module) -> Iterator[nn.Conv3d]:
    return (module for module in kernel.modules() if isinstance(module, nn.Conv3d))


def _fan_in(convolution: nn.Conv3d) -> int:
    return convolution.weight[0].numel()
