"""The ResNet-26 of the residual adapters' authors, for pictures of about 64 pixels (spec residual_adapters 2.1).

Frames are folded into the batch and their features averaged; a picture is a clip of one frame. No library has this
network. Its 25 convolutions are sites. Shape suffixes: B batch, C channels, T frames, H height, W width, P
positions, F features.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mdltool.backbones.base import Backbone, BackboneOptions
from mdltool.errors import MdlError
from mdltool.types import Place

MACRO_BLOCKS = ("early", "mid", "late")
_DEPTH = 4  # residual blocks in a macro block
_RELEASE = (
    (r"^module\.", ""),
    (r"^pre_layers_conv\.", "stem."),
    (r"^layer1\.", "early."),
    (r"^layer2\.", "mid."),
    (r"^layer3\.", "late."),
    (r"\.conv1\.", ".first."),
    (r"\.conv2\.1\.", ".second."),
    (r"\.bns\.0\.", ".bn."),
    (r"^end_bns\.0\.0\.", "end_bn."),
    (r"^linears\.0\.", "fc."),
)


class Unit(nn.Module):
    """A 3x3 convolution without bias, then BatchNorm."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x_BCHW))
        return y


class Block(nn.Module):
    """Unit, ReLU, unit, shortcut, ReLU.

    A block that doubles the channels halves H and W: by the stride of its first convolution, and in the shortcut by
    a 2x2 average pool, whose missing channels are zeros.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self._added = outputs - inputs
        self.first = Unit(inputs, outputs, 2 if self._added else 1)
        self.second = Unit(outputs, outputs)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.second(self.first(x_BCHW).relu())
        if self._added:
            x_BCHW = functional.pad(functional.avg_pool2d(x_BCHW, 2), (0, 0, 0, 0, 0, self._added))
        return (x_BCHW + y_BCHW).relu()


class Net(nn.Module):
    """25 convolutions and a linear layer. channels: of the stem; the macro blocks have 2, 4 and 8 times as many."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = Unit(3, channels)
        for i, name in enumerate(MACRO_BLOCKS):
            inputs = channels << i
            blocks = [Block(inputs if j == 0 else 2 * inputs, 2 * inputs) for j in range(_DEPTH)]
            self.add_module(name, nn.Sequential(*blocks))
        self.end_bn = nn.BatchNorm2d(8 * channels)
        self.fc: nn.Module = nn.Linear(8 * channels, classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.stem(x_BCHW)  # no ReLU here
        for name in MACRO_BLOCKS:
            x_BCHW = self.get_submodule(name)(x_BCHW)
        y: Tensor = self.fc(self.end_bn(x_BCHW).relu().mean((2, 3)))
        return y


class ResNet26Backbone(Backbone):
    """What both widths share. width: multiplies the 32, 64, 128 and 256 channels of stem and macro blocks."""

    default_frames = 1
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(self, width: float, num_frames: int, crop: int) -> None:
        net = Net(round(32 * width), classes=1000)
        super().__init__(net, net.end_bn.num_features, num_frames, crop)
        self.take_classifier("fc")

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        frames, height, width = x_BCTHW.shape[2:]
        if height % 8 or width % 8:  # on an odd grid the pooled shortcut is smaller than the strided convolution
            raise MdlError(
                f"ResNet-26 halves its input three times and cannot take {height} x {width} pixels",
                "data.crop",
                f"--set data.crop={max(8, min(height, width) // 8 * 8)}, or another multiple of 8",
            )
        features_BTF = self.net(x_BCTHW.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, frames))
        mean_BPF: Tensor = features_BTF.mean(1, keepdim=True)
        return mean_BPF

    def places(self) -> dict[str, Place]:
        """The stem, layer 0, and both convolutions of every block; layers 1, 2 and 3 are early, mid and late."""
        found = {"stem": Place("stem.conv", "conv", "stem", 0)}
        for layer, macro in enumerate(MACRO_BLOCKS, 1):
            for i in range(_DEPTH):
                for role in ("first", "second"):
                    found[f"{macro}{i + 1}.{role}"] = Place(f"{macro}.{i}.{role}.conv", "conv", role, layer)
        return found

    def block_paths(self) -> list[str]:
        return [f"{macro}.{i}" for macro in MACRO_BLOCKS for i in range(_DEPTH)]

    def load_library_state(self, state: dict[str, Tensor], where: object) -> None:
        """As every backbone's; the keys of the authors' release, of one domain without adapters, are read too."""
        super().load_library_state(self._from_release(state), where)

    def _from_release(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if not any("pre_layers_conv" in key for key in state):
            return state
        renamed = {}
        for key, value in state.items():
            for pattern, replacement in _RELEASE:
                key = re.sub(pattern, replacement, key)
            renamed[key] = value
        # The release's torch did not count batches yet.
        counters = (key for key in self.net.state_dict() if key.endswith("num_batches_tracked"))
        return {key: torch.tensor(0) for key in counters} | renamed


class WidthOptions(BackboneOptions):
    """width: multiplies the channels."""

    width: Annotated[float, Field(ge=0.5, le=2.5)] = 1.0


class ResNet26(ResNet26Backbone):
    """ResNet-26: 5,814,688 parameters without its classifier, 5,806,944 of them in its 3x3 filters."""

    Options: ClassVar[type[BackboneOptions]] = WidthOptions
    about = "ResNet-26 of the residual adapters (pictures of 64 pixels)"
    weight_sources: ClassVar[dict[str, str]] = {
        "imagenet": "the authors' ResNet-26 for ImageNet at 72 pixels (github.com/srebuffi/residual_adapters), "
        "its state dict saved alone"
    }
    default_crop = 64

    def __init__(self, options: WidthOptions, num_frames: int, crop: int) -> None:
        super().__init__(options.width, num_frames, crop)


class ResNet26Tiny(ResNet26Backbone):
    """ResNet-26 with 8, 16, 32 and 64 channels, for CPUs and tests."""

    about = "a narrow ResNet-26 for CPUs"
    default_crop = 32

    def __init__(self, options: BackboneOptions, num_frames: int, crop: int) -> None:
        super().__init__(0.25, num_frames, crop)
