"""What every backbone offers: a library's network, its input, its sites, and features for the heads.

Shape suffixes: B batch, C channels, T frames, H height, W width, P positions left after pooling, F features.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from mdltool.errors import MdlError
from mdltool.types import ModuleShape, Place, Site
from mdltool.wrapping import Route, TokenGrid, Wrapper, find, library_tensors, replace


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
    projection_parameters: ClassVar[int] = 0  # of a projection that papers count though it is not used

    def __init__(self, net: nn.Module, feature_dim: int, num_frames: int, crop: int) -> None:
        super().__init__()
        self.net = net
        self.feature_dim = feature_dim
        self.num_frames = num_frames
        self.crop = crop
        self.classifier: dict[str, Tensor] = {}
        self.route = Route()

    @abstractmethod
    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Features [B, P, F] of normalised clips; P is 1 unless a fixed pool leaves several positions."""

    @abstractmethod
    def places(self) -> dict[str, Place]:
        """Declared sites by name."""

    def block_paths(self) -> list[str]:
        """Paths of the parts that the network is a sequence of: its blocks or, without these, its stages."""
        places = self.places().values()
        found = [place.block for place in places if place.block is not None]
        found = found or [place.path for place in places if place.kind == "stage"]
        return list(dict.fromkeys(found))

    def open_block(self, block: nn.Module) -> Wrapper:
        """A block with its places opened; only backbones that declare such places have it."""
        raise AssertionError(f"{type(self).__name__} declares no place inside a block")

    def open_blocks(self, blocks: Iterable[str]) -> None:
        """Open the blocks at these paths, those that are closed."""
        for path in dict.fromkeys(blocks):
            block = find(self.net, path)
            if not isinstance(block, Wrapper):
                replace(self.net, path, self.open_block(block))

    def sites(self, extra_paths: tuple[str, ...] = ()) -> dict[str, Site]:
        """Every declared site, and one named by its path for each of `extra_paths`, with channels and grid.

        They are read from one dry forward of the configured clip shape on the meta device, never from a table.
        """
        wanted = self.places() | {path: Place(path, "stage") for path in extra_paths}
        dry = copy.deepcopy(self).to("meta").float().eval()
        dry.open_blocks(place.block for place in wanted.values() if place.block is not None)
        probes = {}
        # the deepest first: a path through a module that is replaced already would not be found
        for name, place in sorted(wanted.items(), key=lambda item: -item[1].path.count(".")):
            try:
                inner = find(dry.net, place.path)
            except AttributeError:
                raise MdlError(
                    f"the backbone has no site or module '{place.path}'",
                    "adapters.sites",
                    f"sites: {some(self.places())}, or a module path of the network",
                ) from None
            probes[name] = _Probe(inner, dry.route)
            replace(dry.net, place.path, probes[name])
        dry(torch.empty(1, 3, self.num_frames, self.crop, self.crop, device="meta"))
        found = {name: probes[name].site(name, place) for name, place in wanted.items()}
        windows = {site.block: (site.window, site.shift) for site in found.values() if site.window is not None}
        for name, site in found.items():
            window, shift = windows.get(site.block, (None, site.shift))
            found[name] = dataclasses.replace(site, window=window, shift=shift)
        return found

    def take_classifier(self, key: str) -> None:
        """Move the linear layer at module path `key` out of `net` into `classifier`."""
        layer = self.net.get_submodule(key)
        self.classifier = {f"{key}.{name}": value.detach() for name, value in layer.state_dict().items()}
        self.net.set_submodule(key, nn.Identity())

    def library_state(self) -> dict[str, Tensor]:
        """The network's own state under the library's keys, whatever wraps its modules; classifier included."""
        return {key: value.detach() for key, value in library_tensors(self.net)} | self.classifier

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


def some(names: Iterable[str], most: int = 12) -> str:
    """The first names of a long list, for a message."""
    names = list(names)
    return ", ".join(names[:most]) + (f" ... ({len(names)} in all)" if len(names) > most else "")


class _Probe(Wrapper):
    """Records the shape that passes; used in the dry forward only."""

    def __init__(self, inner: nn.Module, route: Route) -> None:
        super().__init__(inner)
        self._route = route
        self.shape: tuple[int, ...] | None = None
        self._tokens: TokenGrid | None = None

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        y = self.inner(x, *rest, **named)
        self.shape = tuple(y.shape) if isinstance(y, Tensor) else None
        self._tokens = self._route.tokens  # here and now: a pyramid's grid changes on the way
        return y

    def owned(self) -> nn.Module | None:
        return self.inner.owned() if isinstance(self.inner, Wrapper) else None

    def site(self, name: str, place: Place) -> Site:
        """The site with the shape that passed. Raises MdlError where no tensor of a known layout did."""
        module: nn.Module = self.inner
        windows = getattr(module, "window", None), getattr(module, "shift", (0, 0, 0))
        while isinstance(module, Wrapper):
            module = module.inner
        shape, tokens, layer = self.shape or (), self._tokens, None
        grid: tuple[int, ...]
        channels = shape[-1] if tokens is not None and shape else 0
        if tokens is not None and tokens.layout == "grid" and len(shape) == 5:
            layout, grid = "grid", shape[1:4]
        elif tokens is not None and len(shape) == 3:
            layout, grid = tokens.layout, (tokens.frames, tokens.height, tokens.width)
        elif tokens is None and len(shape) in (4, 5):
            layout, channels = ("BCHW", "BCTHW")[len(shape) - 4], shape[1]
            grid = (1, *shape[2:]) if layout == "BCHW" else shape[2:]
        else:
            raise MdlError(
                f"'{place.path}' gives no [B, C, T, H, W] tensor", "adapters.sites", "choose another module"
            )
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            channels = module.in_channels
            layer = ModuleShape(module.out_channels, module.kernel_size, module.stride, module.groups)
        elif isinstance(module, nn.Linear):
            channels = module.in_features
            layer = ModuleShape(module.out_features, parts=3 if place.role == "qkv" else 1)
        at = (place.role, place.layer, place.block)
        size = (grid[0], grid[1], grid[2])
        return Site(name, place.path, place.kind, layout, channels, size, *at, layer, *windows)
