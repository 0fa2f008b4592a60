"""How a library's network is opened without changing it: wrappers that keep what they wrap, and take it out again.

`Route` carries what one forward pass is about: which domain, or which domains, and how the tokens lie. Shape
suffixes: B batch, T time slices, H height, W width, N tokens, C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mdltool.types import StreamSpec, StreamTokens


@dataclass(frozen=True)
class TokenGrid:
    """How a transformer's token tensor lies.

    frames, height, width: the grid of patch tokens of one clip. layout: "grid" is [B, T, H, W, C] (no class token);
    "clip" is [B, 1 + T*H*W, C], one class token per clip, first; "frame" is [B*T, 1 + H*W, C], one class token per
    frame, the frames of a clip adjacent.
    """

    frames: int
    height: int
    width: int
    layout: str

    @staticmethod
    def of(size: Sequence[int], layout: str) -> TokenGrid:
        """size: (T, H, W)."""
        frames, height, width = size
        return TokenGrid(frames, height, width, layout)

    def split(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Class tokens [B, T, C] (T is 1 for layout "clip"; None for "grid") and patches [B, T, H, W, C]."""
        if self.layout == "grid":
            return None, x
        channels = x.shape[-1]
        slices = self.frames if self.layout == "frame" else 1
        class_BTC = x[:, 0].reshape(-1, slices, channels)
        return class_BTC, x[:, 1:].reshape(-1, self.frames, self.height, self.width, channels)

    def join(self, class_BTC: Tensor | None, patches_BTHWC: Tensor) -> Tensor:
        """The inverse of split."""
        if class_BTC is None:
            return patches_BTHWC
        rows = class_BTC.shape[0] * class_BTC.shape[1]
        channels = patches_BTHWC.shape[-1]
        tokens = patches_BTHWC.reshape(rows, -1, channels)
        return torch.cat([class_BTC.reshape(rows, 1, channels), tokens], 1)


class Route:
    """Which domain the wrappers of one model serve now, and its tokens' grid; set during every forward.

    segments: of a batch of several domains, each one's (domain, clips) in the batch's order; `domain` is None then.
    streams: domain -> stream -> what of it the domain's clips have, embedded; without domains and streams that no
    clip has.
    """

    def __init__(self, domain: str | None = None) -> None:
        self.domain = domain
        self.segments: tuple[tuple[str, int], ...] = ()
        self.tokens: TokenGrid | None = None
        self.streams: Mapping[str, Mapping[str, StreamTokens]] = {}

    def serve(self, domain: str | None, segments: Sequence[tuple[str, int]] = ()) -> None:
        """The forward that begins is of one domain, or of several in segments."""
        self.domain, self.segments = domain, tuple(segments)

    def rows(self, x: Tensor) -> list[tuple[str, Tensor]]:
        """Each segment's rows of a tensor whose first axis is B, or B * T with a clip's frames adjacent."""
        clips = sum(number for _, number in self.segments)
        each, rest = divmod(len(x), clips)
        assert rest == 0, f"{len(x)} rows are no multiple of {clips} clips"
        parts = x.split([number * each for _, number in self.segments])
        return [(domain, part) for (domain, _), part in zip(self.segments, parts, strict=True)]

    @contextmanager
    def only(self, domain: str) -> Iterator[None]:
        """While one segment's rows alone go through a module."""
        before = self.domain, self.segments
        self.serve(domain)
        try:
            yield
        finally:
            self.serve(*before)


class Wrapper(nn.Module, ABC):
    """A module around a library's module, which keeps its state under `inner`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def owned(self) -> nn.Module | None:
        """What of the wrapper's own a site's path may name below the wrapped module's path; None: nothing."""
        return None


class PerDomain(ABC):
    """A part of a model that holds a module for each domain."""

    @property
    @abstractmethod
    def domain_modules(self) -> nn.ModuleDict:
        """What each domain owns here: parameters and buffers."""

    @abstractmethod
    def fresh(self, domain: str, streams: Mapping[str, StreamSpec]) -> nn.Module:
        """What one more domain with such streams would own here, as training begins with it; it is not added."""


class DomainWrapper(Wrapper, PerDomain):
    """A wrapper that holds a module for each domain."""

    def __init__(self, inner: nn.Module, route: Route) -> None:
        super().__init__(inner)
        self.route = route


def find(net: nn.Module, path: str) -> nn.Module:
    """The module at a library path, or at a place inside an opened block, with all its wrappers.

    Raises AttributeError where there is none.
    """
    holder, name = holder_of(net, path)
    found = getattr(holder, name)
    if not isinstance(found, nn.Module):
        raise AttributeError(path)
    return found


def replace(net: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path that `find` knows."""
    holder, name = holder_of(net, path)
    setattr(holder, name, module)


def holder_of(net: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the one at a path, and under which name, whatever wraps what lies between."""
    *parents, last = path.split(".")
    for part in parents:
        net = getattr(_below(net, part), part)
    return _below(net, last), last


def _below(net: nn.Module, part: str) -> nn.Module:
    """Where a child called `part` is: in what a wrapper owns, or in what the innermost wrapper wraps."""
    while isinstance(net, Wrapper):
        owned = net.owned()
        if owned is not None and hasattr(owned, part):
            return owned
        net = net.inner
    return net


def detach(net: nn.Module) -> None:
    """Put every wrapped module of `net` back in its place."""
    for name, child in net.named_children():
        while isinstance(child, Wrapper):
            child = child.inner
            setattr(net, name, child)
        detach(child)


def library_modules(net: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The network's own modules under the library's own paths, whatever wraps them."""
    while isinstance(net, Wrapper):
        net = net.inner
    yield prefix, net
    for name, child in net.named_children():
        yield from library_modules(child, f"{prefix}.{name}" if prefix else name)


def library_tensors(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of the network itself under the library's own keys."""
    for path, module in library_modules(net):
        dot = f"{path}." if path else ""
        for name, parameter in module.named_parameters(recurse=False):
            yield dot + name, parameter
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield dot + name, buffer
