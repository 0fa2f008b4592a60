"""Multiscale vision transformers on torchvision's blocks: its own MViT v2, and MultiTrain's (spec multitrain 2.1).

Where the queries are pooled with a stride, grid and width change inside a block (multiscale.py). Shape suffixes: B
batch, C channels, T frames or time slices, H height, W width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.video import mvit_v2_s
from torchvision.models.video.mvit import MSBlockConfig, MViT

from mdltool.backbones.base import BackboneOptions
from mdltool.backbones.multiscale import ClassFreeBlock, Grid, OpenMultiscaleBlock, grid_size
from mdltool.backbones.transformer import Names, TransformerBackbone
from mdltool.errors import MdlError
from mdltool.types import Place, Site
from mdltool.wrapping import TokenGrid, Wrapper


class MvitOptions(BackboneOptions):
    """drop_path: its maximum. interpolate: accept other clip shapes than the relative positions were made for."""

    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.2
    interpolate: bool = False


class MultitrainOptions(BackboneOptions):
    """drop_path: its maximum; MultiTrain has 0.1 for several data sets, 0.3 for Kinetics, 0.4 for
    Something-Something alone. interpolate: fit the spatial positions of weights made for another crop (bicubic), as
    for 312 pixels.
    """

    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    interpolate: bool = False


class MultiscaleBackbone(TransformerBackbone):
    """What the two families share. Attention that changes grid or width has the role "attn_pool": an adapter
    beside it would have nothing to add to, one inside it (prefix) attaches as everywhere.
    """

    names = Names("norm1", "attn", "norm2", "mlp", {"qkv": "qkv"})
    mean = (0.45, 0.45, 0.45)
    std = (0.225, 0.225, 0.225)
    grid_fix: ClassVar[str]

    def __init__(self, net: Any, num_frames: int, crop: int) -> None:
        super().__init__(net, net.head[1].in_features, num_frames, crop)
        self.take_classifier("head.1")
        self._changing = [
            i for i, b in enumerate(net.blocks, 1) if b.project is not None or b.pool_skip is not None
        ]
        encoding = net.pos_encoding
        self._grid: Grid = (encoding.temporal_size, *encoding.spatial_size)

    def block_paths(self) -> list[str]:
        net: Any = self.net
        return [f"blocks.{i}" for i in range(len(net.blocks))]

    def places(self) -> dict[str, Place]:
        found = super().places()
        for layer in self._changing:
            name = f"block{layer}.attn"
            found[name] = dataclasses.replace(found[name], role="attn_pool")
        return found

    def sites(self, extra_paths: tuple[str, ...] = ()) -> dict[str, Site]:
        """As Backbone.sites; attention that changes grid or width is described by what enters it."""
        found = super().sites(extra_paths)
        for layer in self._changing:
            name, source = f"block{layer}.attn", found[f"block{layer}.attn_in"]
            found[name] = dataclasses.replace(found[name], channels=source.channels, grid=source.grid)
        return found

    def open_block(self, block: nn.Module) -> Wrapper:
        return OpenMultiscaleBlock(block, self.names, self.route)

    def embed(self, x_BCTHW: Tensor, layout: str, strict: bool) -> Tensor:
        """Patches [B, T, H, W, C]; sets the grid. Raises MdlError if strict and it is not the positions' own."""
        net: Any = self.net
        self.route.tokens = None  # no tokens yet: what is at the patch convolution sees [B, C, T, H, W]
        x_BTHWC: Tensor = net.conv_proj(x_BCTHW).movedim(1, -1)
        grid = tuple(x_BTHWC.shape[1:4])
        if strict and grid != self._grid:
            raise MdlError(
                f"the positions are for a grid of {self._grid} (T, H, W), and clips of {tuple(x_BCTHW.shape[2:])} "
                f"have {grid}",
                "backbone",
                self.grid_fix,
            )
        self.route.tokens = TokenGrid.of(grid, layout)
        return x_BTHWC

    def blocks(self, x: Tensor) -> Tensor:
        """All blocks and the final norm, on tokens that lie as the route says."""
        net: Any = self.net
        assert self.route.tokens is not None
        thw: Sequence[int] = grid_size(self.route.tokens)
        for block in net.blocks:
            x, thw = block(x, thw)
        y: Tensor = net.norm(x)
        return y


class MvitV2S(MultiscaleBackbone):
    """MViT v2 S with relative positions: the class token after the final norm; 34,230,144 parameters."""

    Options: ClassVar[type[BackboneOptions]] = MvitOptions
    about = "MViT v2 S 16x4 (torchvision)"
    weight_sources = {"kinetics400": "torchvision MViT_V2_S_Weights.KINETICS400_V1"}  # noqa: RUF012
    default_frames = 16
    default_crop = 224
    grid_fix = "use clips of the backbone's own shape, or --set backbone.interpolate=true"

    def __init__(self, options: MvitOptions, num_frames: int, crop: int) -> None:
        super().__init__(self.make(options.drop_path), num_frames, crop)
        self._strict = not options.interpolate

    def make(self, drop_path: float) -> nn.Module:
        net: nn.Module = mvit_v2_s(weights=None, stochastic_depth_prob=drop_path)
        return net

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        net: Any = self.net
        x = self.embed(x_BCTHW, "clip", self._strict).flatten(1, 3)
        x = torch.cat([net.pos_encoding.class_token.expand(len(x), 1, -1), x], 1)
        return self.blocks(x)[:, :1]


class MvitTiny(MvitV2S):
    """A small MViT v2 for CPUs: four blocks of 32 and 64 channels, clips of 8 x 32 x 32."""

    about = "a small MViT v2 for CPUs (torchvision)"
    weight_sources = {}  # noqa: RUF012
    default_frames = 8
    default_crop = 32

    def make(self, drop_path: float) -> nn.Module:
        net: nn.Module = MViT(
            spatial_size=(self.default_crop, self.default_crop),
            temporal_size=self.default_frames,
            block_setting=block_settings(4, 32, (2,), 4),
            residual_pool=True,
            residual_with_cls_embed=False,
            rel_pos_embed=True,
            proj_after_attn=True,
            stochastic_depth_prob=drop_path,
        )
        return net


def block_settings(depth: int, width: int, transitions: Sequence[int], kv_stride: int) -> list[Any]:
    """torchvision's settings of `depth` blocks. The transitions (from 0) double width and heads and halve the grid;
    kv_stride: of the first block's keys and values, halved at each transition.
    """
    settings, heads = [], 1
    for block in range(depth):
        grows = block in transitions
        out, stride = (2 * width, 2) if grows else (width, 1)
        heads, kv_stride = heads * stride, max(kv_stride // stride, 1)
        kernel, steps = [3, 3, 3], [1, kv_stride, kv_stride]
        settings.append(MSBlockConfig(heads, width, out, kernel, kernel, [1, stride, stride], steps))
        width = out
    return settings


class MultitrainMvitB(MultiscaleBackbone):
    """MultiTrain's "MViTv2 full B conv": the mean token; 50,986,176 parameters at 224, 51,269,184 at 312.

    torchvision's blocks with convolutional pooling in each and the pooled queries added to the attention; separable
    absolute positions, made for the configured clip shape; no class token (spec multitrain 2.1).
    """

    Options: ClassVar[type[BackboneOptions]] = MultitrainOptions
    about = "MultiTrain's MViTv2 B 32x3 (torchvision's blocks)"
    default_frames = 32
    default_crop = 224
    grid_fix = "give clips of the configured frames and crop"
    depth: ClassVar[int] = 24
    width: ClassVar[int] = 96
    transitions: ClassVar[tuple[int, ...]] = (2, 5, 21)
    kv_stride: ClassVar[int] = 8

    def __init__(self, options: MultitrainOptions, num_frames: int, crop: int) -> None:
        if num_frames % 2 or crop % 4:
            raise MdlError(
                f"clips of {num_frames} frames of {crop} pixels do not divide into patches of 2 x 4 x 4",
                "backbone",
                f"e.g. --set data.frames={num_frames + num_frames % 2} --set data.crop={crop + -crop % 4}",
            )
        net = MViT(
            spatial_size=(crop, crop),
            temporal_size=num_frames,
            block_setting=block_settings(self.depth, self.width, self.transitions, self.kv_stride),
            residual_pool=True,
            residual_with_cls_embed=True,
            rel_pos_embed=False,
            proj_after_attn=True,
            stochastic_depth_prob=options.drop_path,
            block=ClassFreeBlock,
        )
        net.pos_encoding.class_token = net.pos_encoding.class_pos = None
        for block in net.blocks:
            for pool in (block.attn.pool_q, block.attn.pool_k, block.attn.pool_v):
                pool.norm_act[0].eps = 1e-5  # the other norms have 1e-6
        super().__init__(net, num_frames, crop)
        self._interpolate = options.interpolate

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        net: Any = self.net
        x_BTHWC = self.embed(x_BCTHW, "grid", strict=True)
        space_HWC = net.pos_encoding.spatial_pos.unflatten(0, self._grid[1:])
        x_BTHWC = x_BTHWC + (net.pos_encoding.temporal_pos[:, None, None] + space_HWC)
        return self.blocks(x_BTHWC).mean((1, 2, 3)).unsqueeze(1)

    def load_library_state(self, state: dict[str, Tensor], where: object) -> None:
        """As Backbone's; with `interpolate`, spatial positions of another square crop are resized."""
        key = "pos_encoding.spatial_pos"
        rows = len(state[key]) if key in state else 0
        side = math.isqrt(rows)
        if self._interpolate and rows and side * side == rows != self._grid[1] * self._grid[2]:
            table_1CHW = state[key].T.unflatten(1, (side, side))[None].float()
            table_1CHW = functional.interpolate(
                table_1CHW, size=self._grid[1:], mode="bicubic", align_corners=False
            )
            state = state | {key: table_1CHW[0].flatten(1).T.to(state[key].dtype)}
        super().load_library_state(state, where)


class MultitrainMvitS(MultitrainMvitB):
    """MultiTrain's 16x4 network of the supplement: MViT v2 S's depth and widths; 34,401,696 parameters at 224."""

    about = "MultiTrain's MViTv2 S 16x4 (torchvision's blocks)"
    default_frames = 16
    depth, transitions = 16, (1, 3, 14)


class MultitrainMvitTiny(MultitrainMvitB):
    """MultiTrain's network for CPUs: four blocks of 32 and 64 channels, clips of 8 x 32 x 32."""

    about = "a small MultiTrain MViTv2 for CPUs (torchvision's blocks)"
    default_frames = 8
    default_crop = 32
    depth, width, transitions, kv_stride = 4, 32, (2,), 4
