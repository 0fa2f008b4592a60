"""Image transformers on video: frames folded into the batch, their class tokens averaged over time.

CLIP's image encoder and a supervised ViT, both from transformers (spec mst_adapter 2.1 and 2.5, cm3t 2.1). Shape
suffixes: B batch, T frames, H height, W width, N tokens of a frame, C channels.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

from mdltool.backbones.base import BackboneOptions
from mdltool.backbones.transformer import Names, ProjectedAttention, TransformerBackbone
from mdltool.errors import MdlError
from mdltool.wrapping import TokenGrid


class ImageOptions(BackboneOptions):
    """pool: what the heads read. norm_mean: the final LayerNorm of each frame's class token, then the mean over
    time; mean_norm: the mean first; mean_tokens: the mean over all tokens after the LayerNorm. interpolate: fit the
    position embeddings to another picture size than the weights were made for.
    """

    pool: Literal["norm_mean", "mean_norm", "mean_tokens"] = "norm_mean"
    interpolate: bool = False


class ImageTransformer(TransformerBackbone):
    """An image transformer that reads [B, 3, T, H, W] as B*T pictures."""

    Options: ClassVar[type[BackboneOptions]] = ImageOptions
    default_frames = 8
    default_crop = 224
    config: ClassVar[dict[str, Any]]
    final_norm: ClassVar[str]

    def __init__(self, options: ImageOptions, num_frames: int, crop: int) -> None:
        net = self.make(self.config)
        super().__init__(net, net.config.hidden_size, num_frames, crop)
        self.options = options
        self._size: int = net.config.image_size
        self._patch: int = net.config.patch_size

    @abstractmethod
    def make(self, config: dict[str, Any]) -> Any:
        """The library's network with random weights."""

    @abstractmethod
    def embed(self, pictures: Tensor) -> Tensor:
        """Tokens [B*T, N, C] that enter the first block."""

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        frames, height, width = x_BCTHW.shape[2:]
        if (height, width) != (self._size, self._size) and not self.options.interpolate:
            raise MdlError(
                f"the position embeddings are for pictures of {self._size} x {self._size}, not {height} x {width}",
                "backbone",
                f"--set data.crop={self._size}, or --set backbone.interpolate=true",
            )
        self.route.tokens = TokenGrid(frames, height // self._patch, width // self._patch, "frame")
        tokens = self.embed(x_BCTHW.transpose(1, 2).flatten(0, 1))
        for path in self.block_paths():
            tokens = self.net.get_submodule(path)(tokens, None)
        norm = getattr(self.net, self.final_norm)
        if self.options.pool == "mean_tokens":
            return norm(tokens).unflatten(0, (-1, frames)).mean((1, 2)).unsqueeze(1)
        class_BTC = tokens[:, 0].unflatten(0, (-1, frames))
        if self.options.pool == "mean_norm":
            return norm(class_BTC.mean(1)).unsqueeze(1)
        return norm(class_BTC).mean(1).unsqueeze(1)


class ClipAttention(ProjectedAttention):
    output = "out_proj"


class ClipVision(ImageTransformer):
    """CLIP's image encoder (transformers' CLIPVisionModel) without its projection."""

    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)
    final_norm = "post_layernorm"
    attention = ClipAttention
    names = Names("layer_norm1", "self_attn", "layer_norm2", "mlp", {"q": "q_proj", "k": "k_proj", "v": "v_proj"})

    def make(self, config: dict[str, Any]) -> nn.Module:
        return CLIPVisionModel(CLIPVisionConfig(**config))

    def block_paths(self) -> list[str]:
        return [f"encoder.layers.{i}" for i in range(self.config["num_hidden_layers"])]

    def embed(self, pictures: Tensor) -> Tensor:
        net: Any = self.net
        tokens: Tensor = net.pre_layrnorm(
            net.embeddings(pictures, interpolate_pos_encoding=self.options.interpolate)
        )
        return tokens


def _clip(
    hidden: int, layers: int, heads: int, patch: int, size: int = 224, projection: int = 512
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": size,
        "projection_dim": projection,
    }


class ClipB16(ClipVision):
    """CLIP ViT-B/16: 85,799,424 parameters, 86,192,640 with CLIP's projection."""

    about = "CLIP ViT-B/16 image encoder (transformers)"
    weight_sources = {"clip": "openai/clip-vit-base-patch16"}  # noqa: RUF012
    config = _clip(768, 12, 12, 16)
    projection_parameters = 768 * 512


class ClipL14(ClipVision):
    """CLIP ViT-L/14: 303,179,776 parameters, 303,966,208 with CLIP's projection."""

    about = "CLIP ViT-L/14 image encoder (transformers)"
    weight_sources = {"clip": "openai/clip-vit-large-patch14"}  # noqa: RUF012
    config = _clip(1024, 24, 16, 14, projection=768)
    projection_parameters = 1024 * 768


class ClipTiny(ClipVision):
    """A small CLIP-style encoder for CPUs: three blocks of 64 channels, pictures of 32 x 32."""

    about = "a small CLIP-style image encoder for CPUs (transformers)"
    config = _clip(64, 3, 4, 8, 32)
    default_frames = 4
    default_crop = 32


class ClipSmall(ClipVision):
    """A CLIP-style encoder that two CPU cores can train: four blocks of 128 channels, pictures of 64 x 64."""

    about = "a CLIP-style image encoder of a size that CPUs can train (transformers)"
    config = _clip(128, 4, 4, 8, 64)
    default_crop = 64


# How transformers calls the parts of a ViT's block, and of a ViViT's.
VIT_NAMES = Names(
    "layernorm_before",
    "attention",
    "layernorm_after",
    "mlp",
    {"q": "q_proj", "k": "k_proj", "v": "v_proj"},
)


class VitAttention(ProjectedAttention):
    output = "o_proj"


class Vit(ImageTransformer):
    """A supervised vision transformer (transformers' ViTModel, without its pooler)."""

    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)
    final_norm = "layernorm"
    attention = VitAttention
    drop = "dropout"
    names = VIT_NAMES

    def make(self, config: dict[str, Any]) -> nn.Module:
        return ViTModel(ViTConfig(**config), add_pooling_layer=False)

    def block_paths(self) -> list[str]:
        net: Any = self.net
        return [f"layers.{i}" for i in range(len(net.layers))]

    def embed(self, pictures: Tensor) -> Tensor:
        net: Any = self.net
        tokens: Tensor = net.embeddings(pictures, interpolate_pos_encoding=self.options.interpolate)
        return tokens


class VitB16(Vit):
    """ViT-B/16 with supervised weights: 85,798,656 parameters."""

    about = "ViT-B/16, supervised (transformers)"
    weight_sources = {"imagenet21k": "google/vit-base-patch16-224-in21k"}  # noqa: RUF012
    config: ClassVar[dict[str, Any]] = {"image_size": 224, "patch_size": 16}


class VitTiny(Vit):
    """A small ViT for CPUs."""

    about = "a small supervised-style ViT for CPUs (transformers)"
    config: ClassVar[dict[str, Any]] = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_size": 8,
        "image_size": 32,
    }
    default_frames = 4
    default_crop = 32
