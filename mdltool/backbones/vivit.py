"""ViViT-B 16x2 (transformers): tubelets of 2 x 16 x 16, one class token per clip (spec cm3t 2.1).

Shape suffixes: B batch, T frames, H height, W width, N tokens, C channels.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional
from transformers import VivitConfig, VivitModel

from mdltool.backbones.base import BackboneOptions
from mdltool.backbones.image_transformer import VIT_NAMES, VitAttention
from mdltool.backbones.transformer import TransformerBackbone
from mdltool.errors import MdlError
from mdltool.wrapping import TokenGrid


class VivitOptions(BackboneOptions):
    """pool: what the heads read. interpolate: fit the position table to other clip shapes (trilinear)."""

    pool: Literal["class_token", "mean_tokens"] = "class_token"
    interpolate: bool = False


class VivitB16x2(TransformerBackbone):
    """ViViT-B, factorised in nothing: 88,646,400 parameters without its pooler."""

    Options: ClassVar[type[BackboneOptions]] = VivitOptions
    about = "ViViT-B 16x2 (transformers)"
    weight_sources = {"kinetics400": "google/vivit-b-16x2-kinetics400"}  # noqa: RUF012
    default_frames = 32
    default_crop = 224
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)
    attention = VitAttention
    drop = "dropout"
    names = VIT_NAMES
    config: ClassVar[dict[str, Any]] = {}

    def __init__(self, options: VivitOptions, num_frames: int, crop: int) -> None:
        config: Any = VivitConfig(**self.config)
        net = VivitModel(config, add_pooling_layer=False)
        super().__init__(net, config.hidden_size, num_frames, crop)
        self.options = options
        self._tubelet: tuple[int, int, int] = tuple(config.tubelet_size)
        size = config.image_size
        self._shape: tuple[int, int, int] = (config.num_frames, size, size)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        net: Any = self.net
        shape = tuple(x_BCTHW.shape[2:])
        if shape != self._shape and not self.options.interpolate:
            raise MdlError(
                f"the position table is for clips of {self._shape} (T, H, W), not {shape}",
                "backbone",
                "use clips of that shape, or --set backbone.interpolate=true",
            )
        grid = [n // t for n, t in zip(shape, self._tubelet, strict=True)]
        self.route.tokens = TokenGrid.of(grid, "clip")
        tokens = net.embeddings.patch_embeddings(x_BCTHW.transpose(1, 2))
        tokens = functional.pad(tokens, (0, 0, 1, 0))
        first = functional.pad(net.embeddings.cls_token, (0, 0, 0, tokens.shape[1] - 1))
        tokens = net.embeddings.dropout(tokens + first + self._positions(grid))
        for path in self.block_paths():
            tokens = net.get_submodule(path)(tokens, None)
        tokens = net.layernorm(tokens)
        return tokens.mean(1, keepdim=True) if self.options.pool == "mean_tokens" else tokens[:, :1]

    def _positions(self, grid: list[int]) -> Tensor:
        """The position table [1, 1 + N, C] for a grid of tubelets."""
        net: Any = self.net
        table: Tensor = net.embeddings.position_embeddings
        own = [n // t for n, t in zip(self._shape, self._tubelet, strict=True)]
        if grid == own:
            return table
        volume = table[:, 1:].transpose(1, 2).unflatten(2, own)
        volume = functional.interpolate(volume, size=grid, mode="trilinear", align_corners=False)
        rest = functional.pad(volume.flatten(2).transpose(1, 2), (0, 0, 1, 0))
        return rest + functional.pad(table[:, :1], (0, 0, 0, rest.shape[1] - 1))

    def block_paths(self) -> list[str]:
        net: Any = self.net
        return [f"layers.{i}" for i in range(len(net.layers))]


class VivitTiny(VivitB16x2):
    """A small ViViT for CPUs: three blocks of 64 channels, clips of 4 x 32 x 32."""

    about = "a small ViViT for CPUs (transformers)"
    weight_sources = {}  # noqa: RUF012
    default_frames = 4
    default_crop = 32
    config: ClassVar[dict[str, Any]] = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "tubelet_size": [2, 8, 8],
        "image_size": 32,
        "num_frames": 4,
    }
