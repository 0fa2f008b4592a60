"""Residual adapters: 1x1 convolutions in series with or parallel to 3x3 ones (Rebuffi et al. 2018; spec
residual_adapters 2.2).

Each domain's own BatchNorm after the convolution is the model's `bn: per_domain`. With `init: zero` the output at
step 0 is the bare backbone's; the paper's `he` does not start there. Under that BatchNorm in training mode, without
dropout, the bias of the series form's inner norm only adds a constant to each channel: its gradient is zero.
Shape suffixes: G groups of the convolution, R output channels of a group.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from mdltool.adapters.base import Adapter, AdapterOptions, Inner, NotFoldable
from mdltool.adapters.domain_norm import affine_of
from mdltool.adapters.factored import Axes, value
from mdltool.convolution import PointConv2d
from mdltool.errors import MdlError
from mdltool.types import Place, Site

_BOTTLENECK = ("conv_a", "conv_b", "conv_stem")
_STEMS = ("stem", "conv_stem")
_LAYERS = {"early": 1, "mid": 2, "late": 3}
_HALVES = {"half": "second", "first": "first"}

# An unquoted 01 is a number in YAML.
Positions = Annotated[
    Literal["00", "10", "01", "11"],
    BeforeValidator(lambda value: f"{value:02d}" if type(value) is int else value),
]


class ResidualOptions(AdapterOptions):
    """placement: which convolutions of `sites: all`: early, mid or late are those of the first, the second, and the
    third and later macro blocks; half and first are the second and the first of each block, and the stem.
    stem: whether the stem belongs to early, to every placement, or to none.
    convs: of networks of bottlenecks, which of a bottleneck's convolutions; conv_stem is the stem there.
    init: normal with deviation sqrt(2 / C_out), zeros, or normal with deviation 0.001.
    dropout: whether channels of what enters the matrix are dropped (p = 0.5), at the first convolution of a block
    (the stem, conv_a) and at the second (conv_b).
    grouped: at a grouped convolution, a matrix with its groups, which can be folded into it, or a dense one.
    """

    placement: Literal["all", "early", "mid", "late", "half", "first"] = "all"
    stem: Literal["early", "always", "never"] = "early"
    convs: Annotated[tuple[Literal["conv_a", "conv_b", "conv_stem"], ...], Field(min_length=1)] = ("conv_b",)
    init: Literal["he", "zero", "small"] = "he"
    dropout: Positions = "00"
    grouped: Literal["diagonal", "dense"] = "diagonal"


class SeriesOptions(ResidualOptions):
    """pre_bn: a BatchNorm of the domain's own before the matrix, which the authors' code has and the paper's
    formula has not.
    """

    pre_bn: bool = True


class ResidualAdapter(Adapter):
    """What both forms share: where they go, and a matrix a without bias as a 1x1 convolution."""

    kinds = frozenset({"conv"})
    Options = ResidualOptions

    def __init__(self, site: Site, options: ResidualOptions, inputs: int, stride: tuple[int, ...] | int) -> None:
        super().__init__(site, options)
        assert site.shape is not None, "a convolution's site has its shape"
        outputs = site.shape.out_channels
        groups = site.shape.groups if options.grouped == "diagonal" else 1
        self._groups = groups
        form: Any = _of(site, PointConv2d, nn.Conv3d)
        self.matrix = form(inputs, outputs, 1, stride, groups=groups, bias=False)
        std = {"he": math.sqrt(2 / outputs), "zero": 0.0, "small": 1e-3}[options.init]
        nn.init.normal_(self.matrix.weight, std=std)
        dropped = options.dropout[1 if site.role in ("second", "conv_b") else 0] == "1"
        self.dropout = _of(site, nn.Dropout2d, nn.Dropout3d)(0.5) if dropped else nn.Identity()

    @classmethod
    def takes(cls, place: Place, options: Any) -> bool:
        return place.kind in cls.kinds and _chosen(place, options) and _placed(place, options)

    def _check_groups(self, layer: Any) -> None:
        if layer.groups != self._groups:
            raise NotFoldable("its matrix is dense, the convolution has groups (grouped: diagonal can be folded)")

    def factor_rules(self) -> dict[str, Axes]:
        return {"matrix.weight": Axes(shared=(0,))} if self._groups == 1 else {}


class ParallelAdapter(ResidualAdapter):
    """f * x + a x: a has the convolution's stride and is its centre tap. C_in C_out parameters."""

    def __init__(self, site: Site, options: ResidualOptions) -> None:
        assert site.shape is not None
        super().__init__(site, options, site.channels, site.shape.stride)
        self._site = site.name
        if any(side % 2 == 0 for side in site.shape.kernel):
            raise MdlError(
                f"a kernel of {site.shape.kernel} has no centre, where a parallel adapter sits",
                f"site '{site.name}'",
                "choose convolutions with odd kernels, or type: series",
            )

    def added(self, layer: Any) -> Tensor:
        self._check_groups(layer)
        centre = tuple(side // 2 for side in layer.kernel_size)
        reached = tuple(step * side for step, side in zip(layer.dilation, centre, strict=True))
        if layer.padding not in (reached, "same"):
            raise NotFoldable("the convolution is not padded by half its kernel, so its centre tap reads elsewhere")
        added = torch.zeros_like(layer.weight)
        added[(..., *centre)] = value(self.matrix.weight).flatten(1)
        return added

    def forward(self, inner: Inner, x: Tensor) -> Tensor:
        y = inner(x)
        added: Tensor = self.matrix(self.dropout(x))
        if added.shape != y.shape:
            raise MdlError(
                f"the convolution gives {list(y.shape)}, its centre taps {list(added.shape)}",
                f"site '{self._site}'",
                "choose convolutions that are padded by half their kernel, or type: series",
            )
        return y + added


class SeriesAdapter(ResidualAdapter):
    """z + a BN(z) with z = f * x; without pre_bn (I + a) z. C_out^2 parameters, 2 C_out more for the norm.

    Dropout comes after the norm, whose statistics it would change.
    """

    Options = SeriesOptions
    unfoldable = "I + a, which the convolution is multiplied with, need not have an inverse"

    def __init__(self, site: Site, options: SeriesOptions) -> None:
        assert site.shape is not None
        super().__init__(site, options, site.shape.out_channels, 1)
        norm: Any = _of(site, nn.BatchNorm2d, nn.BatchNorm3d)
        self.norm: nn.Module = norm(site.shape.out_channels) if options.pre_bn else nn.Identity()

    @classmethod
    def has_batch_norm(cls, options: Any) -> bool:
        return bool(options.pre_bn)

    def folded(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        """With BN(z) = s z + t: (I + a diag(s)) f, and the bias (I + a diag(s)) b + a t."""
        self._check_groups(layer)
        grouped = (self._groups, -1)
        a_GRR = value(self.matrix.weight).flatten(1).unflatten(0, grouped)
        filters = layer.weight.flatten(1).unflatten(0, grouped)
        mixed, bias = a_GRR, None
        if isinstance(self.norm, nn.BatchNorm2d | nn.BatchNorm3d):
            scale_GR, shift_GR = (part.unflatten(0, grouped) for part in affine_of(self.norm))
            mixed = a_GRR * scale_GR[:, None]
            bias = (a_GRR @ shift_GR[..., None]).flatten()
        mixed = mixed + torch.eye(a_GRR.shape[-1]).to(a_GRR)
        if layer.bias is not None:
            own = (mixed @ layer.bias.unflatten(0, grouped)[..., None]).flatten()
            bias = own if bias is None else own + bias
        return (mixed @ filters).view_as(layer.weight), bias

    def forward(self, inner: Inner, x: Tensor) -> Tensor:
        z = inner(x)
        added: Tensor = self.matrix(self.dropout(self.norm(z)))
        return z + added


def _of(site: Site, flat: type[nn.Module], deep: type[nn.Module]) -> type[nn.Module]:
    """The 2D or the 3D form of a layer."""
    return flat if site.layout == "BCHW" else deep


def _chosen(place: Place, options: ResidualOptions) -> bool:
    """Whether `convs` includes a convolution; it says nothing of networks without bottlenecks."""
    return place.role not in _BOTTLENECK or place.role in options.convs


def _placed(place: Place, options: ResidualOptions) -> bool:
    """Whether `placement` and `stem` include a convolution."""
    if place.role in _STEMS:
        belongs = options.placement not in ("mid", "late")
        return {"early": belongs, "always": True, "never": False}[options.stem]
    if options.placement in _HALVES:
        return place.role == _HALVES[options.placement]
    return options.placement == "all" or min(place.layer, 3) == _LAYERS[options.placement]
