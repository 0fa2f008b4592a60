"""Video Swin (torchvision): a pyramid of shifted-window attention (spec cm3t 2.1, 2.3 and section 6).

Shape suffixes: B batch, T time slices, H height, W width, V windows, N tokens of a window, C channels.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.video.swin_transformer import SwinTransformer3d

from mdltool.backbones.base import BackboneOptions
from mdltool.backbones.transformer import Names, OpenAttention, TransformerBackbone, attend, fused_prefix
from mdltool.wrapping import TokenGrid

Size = Annotated[int, Field(ge=1)]


class SwinOptions(BackboneOptions):
    """window: (T, H, W); Something-Something v2 checkpoints have (16, 7, 7). drop_path: its maximum."""

    window: tuple[Size, Size, Size] = (8, 7, 7)
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1


class WindowAttention(OpenAttention):
    """torchvision's ShiftedWindowAttention3d, restated so that prefixes and LoRA reach it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        window: Any = inner.window_size
        self.window = (window[0], window[1], window[2])
        shift: Any = inner.shift_size
        self.shift = (shift[0], shift[1], shift[2])

    def forward(
        self,
        x_BTHWC: Tensor,
        prefix: Tensor | None = None,
        gate: Tensor | None = None,
        mass: Tensor | None = None,
    ) -> Tensor:
        layer: Any = self.inner
        size, heads = x_BTHWC.shape[1:4], layer.num_heads
        # As the library: where the map is no larger than the window, the window is the map and there is no shift.
        fits = [n <= w for n, w in zip(size, layer.window_size, strict=True)]
        window = [n if f else w for n, w, f in zip(size, layer.window_size, fits, strict=True)]
        shift = [0 if f else s for s, f in zip(layer.shift_size, fits, strict=True)]
        missing = [-n % w for n, w in zip(size, window, strict=True)]
        x = functional.pad(x_BTHWC, (0, 0, 0, missing[2], 0, missing[1], 0, missing[0]))
        padded = x.shape[1:4]
        if any(shift):
            x = x.roll([-s for s in shift], (1, 2, 3))
        q, k, v = (_partition(part, window, heads) for part in layer.qkv(x).chunk(3, -1))
        bias_BHNN = layer.get_relative_position_bias(window).to(q.dtype)
        if any(shift):
            mask_VNN = _shift_mask(padded, window, shift, q)
            bias_BHNN = (bias_BHNN + mask_VNN[:, None]).repeat(len(x_BTHWC), 1, 1, 1)
        dropout = layer.attention_dropout if layer.training else 0.0
        y = attend(q, k, v, bias_BHNN, fused_prefix(layer, prefix, gate, mass), dropout)
        y = _unpartition(y, len(x_BTHWC), padded, window)
        y = functional.dropout(layer.proj(y), layer.dropout, layer.training)
        if any(shift):
            y = y.roll(shift, (1, 2, 3))
        return y[:, : size[0], : size[1], : size[2]]


def _partition(x_BTHWC: Tensor, window: list[int], heads: int) -> Tensor:
    """[B * V, heads, N, D] in the library's order of windows and of positions in a window."""
    for axis, w in ((1, window[0]), (3, window[1]), (5, window[2])):
        x_BTHWC = x_BTHWC.unflatten(axis, (-1, w))
    x = x_BTHWC.unflatten(-1, (heads, -1)).permute(0, 1, 3, 5, 7, 2, 4, 6, 8)
    return x.flatten(5, 7).flatten(0, 3)


def _unpartition(y_VHND: Tensor, batch: int, size: Any, window: list[int]) -> Tensor:
    counts = [n // w for n, w in zip(size, window, strict=True)]
    y = y_VHND.transpose(1, 2).flatten(2).unflatten(1, window).unflatten(0, (batch, *counts))
    return y.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def _shift_mask(size: Any, window: list[int], shift: list[int], like: Tensor) -> Tensor:
    """[V, N, N]: 0 within a region, -100 between regions that the cyclic shift brought side by side."""
    region = torch.zeros(tuple(size), dtype=like.dtype, device=like.device)
    for axis, (n, w, s) in enumerate(zip(size, window, shift, strict=True)):
        place = torch.arange(n, device=like.device)
        # The library cuts each axis at -window and -shift; without a shift the second cut leaves nothing.
        part = (place >= n - w).to(like.dtype) + ((place >= n - s).to(like.dtype) if s else 0)
        region = 3 * region + part.view([-1 if i == axis else 1 for i in range(3)])
    rows = _partition(region[None, ..., None], window, 1)[:, 0, :, 0]
    return (rows[:, None] != rows[:, :, None]).to(like.dtype) * -100.0


class Swin3d(TransformerBackbone):
    """Video Swin: mean of the last stage's normalised tokens."""

    Options: ClassVar[type[BackboneOptions]] = SwinOptions
    default_frames = 32
    default_crop = 224
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    attention = WindowAttention
    drop = "stochastic_depth"
    names = Names("norm1", "attn", "norm2", "mlp", {"qkv": "qkv"})
    patch: ClassVar[tuple[int, int, int]] = (2, 4, 4)
    width: ClassVar[int]
    depths: ClassVar[tuple[int, ...]]
    heads: ClassVar[tuple[int, ...]]

    def __init__(self, options: SwinOptions, num_frames: int, crop: int) -> None:
        net = SwinTransformer3d(
            patch_size=list(self.patch),
            embed_dim=self.width,
            depths=list(self.depths),
            num_heads=list(self.heads),
            window_size=list(options.window),
            stochastic_depth_prob=options.drop_path,
        )
        super().__init__(net, net.num_features, num_frames, crop)
        self.take_classifier("head")

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        net: Any = self.net
        x = net.pos_drop(net.patch_embed(x_BCTHW))
        self.route.tokens = TokenGrid.of(x.shape[1:4], "grid")
        x = net.norm(net.features(x))
        return x.mean((1, 2, 3)).unsqueeze(1)

    def block_paths(self) -> list[str]:
        return [f"features.{2 * stage}.{i}" for stage, depth in enumerate(self.depths) for i in range(depth)]

    def stage_of(self, path: str) -> int:
        return int(path.split(".")[1]) // 2 + 1


class Swin3dT(Swin3d):
    """Video Swin-T: 27,850,470 parameters without its classifier."""

    about = "Video Swin-T (torchvision)"
    weight_sources = {"kinetics400": "torchvision Swin3D_T_Weights.KINETICS400_V1"}  # noqa: RUF012
    width, depths, heads = 96, (2, 2, 6, 2), (3, 6, 12, 24)


class Swin3dS(Swin3d):
    """Video Swin-S: 49,509,078 parameters without its classifier."""

    about = "Video Swin-S (torchvision)"
    weight_sources = {"kinetics400": "torchvision Swin3D_S_Weights.KINETICS400_V1"}  # noqa: RUF012
    width, depths, heads = 96, (2, 2, 18, 2), (3, 6, 12, 24)


class Swin3dB(Swin3d):
    """Video Swin-B: 87,638,984 parameters without its classifier (88,048,984 with it)."""

    about = "Video Swin-B (torchvision)"
    weight_sources = {  # noqa: RUF012
        "kinetics400": "torchvision Swin3D_B_Weights.KINETICS400_V1",
        "kinetics400_imagenet22k": "torchvision Swin3D_B_Weights.KINETICS400_IMAGENET22K_V1",
    }
    width, depths, heads = 128, (2, 2, 18, 2), (4, 8, 16, 32)


class TinySwinOptions(SwinOptions):
    window: tuple[Size, Size, Size] = (2, 3, 3)


class Swin3dTiny(Swin3d):
    """A small Video Swin for CPUs: two stages of two blocks, 32 and 64 channels."""

    Options = TinySwinOptions
    about = "a small Video Swin for CPUs (torchvision)"
    default_frames = 8
    default_crop = 32
    width, depths, heads = 32, (2, 2), (2, 4)
