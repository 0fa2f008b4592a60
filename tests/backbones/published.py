"""What the tests of checkpoint layouts share: random backbones, and originals restated under their own names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mdltool.artifact import Artifact
from mdltool.backbones import BACKBONES
from mdltool.model_store import read_tensors
from mdltool.stages.weights import import_weights


def fresh(name: str, **options: Any) -> Any:
    """A backbone with random weights, running statistics included."""
    factory = BACKBONES.load(name)
    made = factory(factory.Options(**options), factory.default_frames, factory.default_crop)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    for parameter in made.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5)
    return made.eval()


def loaded(artifact: Artifact) -> Any:
    """The backbone of an artifact."""
    about = artifact.load_json("backbone.json")
    made = fresh(about["name"], **about["options"])
    made.load_library_state(read_tensors(artifact.file("backbone.safetensors")), artifact.path)
    return made


def clip_of(backbone: Any, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, backbone.num_frames, backbone.crop, backbone.crop)


def imported(name: str, path: Path, out: Path, **more: Any) -> Any:
    return loaded(import_weights(name, path, out / "made", tag="test", **more))


def randomize(model: nn.Module) -> Any:
    """Every tensor random: zero biases and unit norms would hide a mix-up."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 0.2)
    return model.eval()


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class OpenAiBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGelu())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x_NBC: Tensor) -> Tensor:
        y = self.ln_1(x_NBC)
        x_NBC = x_NBC + self.attn(y, y, y, need_weights=False)[0]
        return x_NBC + self.mlp(self.ln_2(x_NBC))


class OpenAiVision(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, patch: int, size: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((size // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*(OpenAiBlock(width, heads) for _ in range(layers)))
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.transformer.resblocks(self.ln_pre(x).transpose(0, 1))
        return self.ln_post(x[0])
