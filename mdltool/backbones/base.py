"""What every backbone offers: a library's network, its input, its sites, and features for the heads.

Shape suffixes: B batch, C channels, T frames, H height, W width, P positions left after pooling, F features.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from mdltool.errors import MdlError
from mdltool.types import Site


class BackboneOptions(BaseModel):
    """Keys that a recipe may set under `backbone`, beside `name` and `weights`."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Backbone(nn.Module, ABC):
    """A library's own network without its classifier.

    net: the network; its state dict has the library's keys. classifier: the library's last linear layer as plain
    tensors under the library's keys: heads replace it, so it is neither trained nor counted, only kept for
    `reuse_pretrained` and for a complete checkpoint.
    """

    Options: ClassVar[type[BackboneOptions]] = BackboneOptions
    about: ClassVar[str]
    weight_sources: ClassVar[dict[str, str]] = {}
    default_frames: ClassVar[int]
    default_crop: ClassVar[int]
    mean: ClassVar[tuple[float, float, float]] = (0.45, 0.45, 0.45)
    std: ClassVar[tuple[float, float, float]] = (0.225, 0.225, 0.225)

    def __init__(self, net: nn.Module, feature_dim: int, num_frames: int, crop: int) -> None:
        super().__init__()
        self.net = net
        self.feature_dim = feature_dim
        self.num_frames = num_frames
        self.crop = crop
        self.classifier: dict[str, Tensor] = {}

    @abstractmethod
    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Features [B, P, F] of normalised clips; P is 1 unless a fixed pool leaves several positions."""

    @abstractmethod
    def site_paths(self) -> dict[str, tuple[str, str]]:
        """Declared sites: name -> (module path in `net`, kind)."""

    def sites(self, extra_paths: tuple[str, ...] = ()) -> dict[str, Site]:
        """Every declared site, and one named by its path for each of `extra_paths`, with channels and grid.

        They are read from one dry forward of the configured clip shape on the meta device, never from a table.
        """
        wanted = self.site_paths() | {path: (path, "stage") for path in extra_paths}
        dry = copy.deepcopy(self).to("meta").float().eval()
        probes = {}
        # the deepest first: a path through a module that is replaced already would not be found
        for name, (path, _) in sorted(wanted.items(), key=lambda item: -item[1][0].count(".")):
            try:
                inner = dry.net.get_submodule(path)
            except AttributeError:
                raise MdlError(
                    f"the backbone has no site or module '{path}'",
                    "adapters.sites",
                    f"sites: {', '.join(self.site_paths())}, or a module path of the network",
                ) from None
            probes[name] = _Probe(inner)
            dry.net.set_submodule(path, probes[name])
        dry(torch.empty(1, 3, self.num_frames, self.crop, self.crop, device="meta"))
        sites = {}
        for name, (path, kind) in wanted.items():
            shape = probes[name].shape
            if shape is None or len(shape) != 5:
                raise MdlError(
                    f"'{path}' gives no [B, C, T, H, W] tensor", "adapters.sites", "choose another module"
                )
            sites[name] = Site(name, path, kind, "BCTHW", shape[1], (shape[2], shape[3], shape[4]))
        return sites

    def take_classifier(self, key: str) -> None:
        """Move the linear layer at module path `key` out of `net` into `classifier`."""
        layer = self.net.get_submodule(key)
        self.classifier = {f"{key}.{name}": value.detach() for name, value in layer.state_dict().items()}
        self.net.set_submodule(key, nn.Identity())

    def library_state(self) -> dict[str, Tensor]:
        """The bare network's state under the library's own keys, classifier included."""
        return dict(self.net.state_dict()) | self.classifier

    def load_library_state(self, state: dict[str, Tensor], where: object) -> None:
        """Load an official checkpoint's tensors into the bare network.

        A classifier for another number of classes is accepted. Raises MdlError that lists missing, unknown and
        misshapen tensors.
        """
        body = {key: value for key, value in state.items() if key not in self.classifier}
        own = self.net.state_dict()
        faults = [f"missing: {key}" for key in own if key not in body]
        faults += [f"unknown: {key}" for key in body if key not in own]
        faults += [
            f"{key}: shape {list(body[key].shape)}, {list(own[key].shape)} expected"
            for key in own
            if key in body and body[key].shape != own[key].shape
        ]
        if faults:
            more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
            raise MdlError(
                f"the weights do not fit this backbone ({'; '.join(faults[:4])}{more})",
                where,
                "choose the backbone that the file was made for",
            )
        self.net.load_state_dict(body)
        for key in self.classifier:
            if key in state:
                self.classifier[key] = state[key].detach().clone()


class _Probe(nn.Module):
    """Records the shape that passes; used in the dry forward only."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.shape: tuple[int, ...] | None = None

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        self.shape = tuple(y.shape)
        return y
