"""What x3d and slow_r50 share: PyTorchVideo's `blocks`, the last of which bundles pool and classifier.

Omi et al. cut them into M1..M5 (blocks 0 to 4), M6 (the pool of the last block) and M7 (dropout and linear layer);
adapters sit after M1..M5 (spec omi_mdl 2.1).
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

from torch import Tensor, nn

from mdltool.backbones.base import Backbone, BackboneOptions
from mdltool.types import Place
from mdltool.wrapping import library_modules

with warnings.catch_warnings():
    # fvcore scripts a function at import, which newer torch calls deprecated: nothing that a user could change.
    warnings.simplefilter("ignore")
    from pytorchvideo.models.resnet import create_resnet
    from pytorchvideo.models.x3d import create_x3d

__all__ = ["PoolOptions", "PyTorchVideoBackbone", "create_resnet", "create_x3d"]


class PoolOptions(BackboneOptions):
    pool: Literal["fixed", "adaptive"] = "adaptive"


class PyTorchVideoBackbone(Backbone):
    """Runs blocks 0..4 and the pool of block 5; the hub head's softmax and output pool are bypassed."""

    Options = PoolOptions

    def __init__(self, net: nn.Module, num_frames: int, crop: int, pool: str) -> None:
        blocks: Any = net.blocks
        head = blocks[-1]
        super().__init__(net, head.proj.in_features, num_frames, crop)
        self.take_classifier(f"blocks.{len(blocks) - 1}.proj")
        # The hub head softmaxes in training too: with cross-entropy that would be a double softmax.
        head.activation = None
        head.output_pool = None
        head.dropout = None
        if pool == "adaptive":
            holder = head.pool if hasattr(head.pool, "pre_conv") else head
            holder.pool = nn.AdaptiveAvgPool3d(1)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        *stages, head = self._blocks()
        for stage in stages:
            x_BCTHW = stage(x_BCTHW)
        pooled_BFthw = head.pool(x_BCTHW)
        return pooled_BFthw.flatten(2).transpose(1, 2)

    def places(self) -> dict[str, Place]:
        count = len(self._blocks()) - 1
        stages = {f"stage{i + 1}": Place(f"blocks.{i}", "stage", "", i + 1) for i in range(count)}
        return stages | self._convolutions()

    def _convolutions(self) -> dict[str, Place]:
        """Convolutions with a side of 3 or more: conv_b of every bottleneck, conv_a where it spans frames, and the
        stem's dense one (spec residual_adapters 2.2). Their layers count the stages of bottlenecks; the stem's is
        0.
        """
        found = {}
        for path, module in library_modules(self.net):
            if not isinstance(module, nn.Conv3d) or max(module.kernel_size) < 3:
                continue
            _, block, *inner = path.split(".")
            if inner[0] == "res_blocks":
                name = f"stage{int(block) + 1}.{int(inner[1]) + 1}.{inner[-1]}"
                found[name] = Place(path, "conv", inner[-1], int(block))
            elif module.groups == 1:
                found["stage1.conv_stem"] = Place(path, "conv", "conv_stem", 0)
        return found

    def _blocks(self) -> Any:
        return self.net.blocks
