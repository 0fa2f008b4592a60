"""Adapters and how they attach to a network they do not know.

`attach` replaces the module at each site by a wrapper around it, once. A wrapper holds one adapter per domain and
what the domains share, and asks the model's Route which domain is active. Nothing else of the network changes, so
`detach` restores the library's own modules and keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from mdltool.errors import MdlError
from mdltool.types import Site

Inner = Callable[[Tensor], Tensor]


class AdapterOptions(BaseModel):
    """Keys that a recipe may set in an entry of `adapters`, beside `type` and `sites`."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Adapter(nn.Module, ABC):
    """A small module for one site and one domain.

    `forward(inner, x)` decides how it composes with the site's own module: after it, beside it, or around it.
    """

    kinds: ClassVar[frozenset[str]]
    Options: ClassVar[type[AdapterOptions]] = AdapterOptions

    @abstractmethod
    def forward(self, inner: Inner, x: Tensor) -> Tensor:
        """The site's output for input x; `inner` is the site's own module."""

    @classmethod
    def shared(cls, site: Site, options: AdapterOptions) -> nn.Module | None:
        """What all domains share at a site, applied after the adapter; None where the method has nothing."""
        return None


class Route:
    """Which domain the wrappers of one model serve now. The model sets it at the start of every forward."""

    def __init__(self, domain: str | None = None) -> None:
        self.domain = domain


class Wrapper(nn.Module, ABC):
    """A module around a library's module, which keeps its state under `inner`."""

    def __init__(self, inner: nn.Module, route: Route) -> None:
        super().__init__()
        self.inner = inner
        self.route = route

    @abstractmethod
    def domain_modules(self) -> Mapping[str, nn.Module]:
        """What each domain owns here: parameters and buffers."""


class AdaptedSite(Wrapper):
    """A site's module with one adapter per domain and the part that domains share."""

    def __init__(self, inner: nn.Module, site: Site, adapters: dict[str, Adapter], route: Route) -> None:
        super().__init__(inner, route)
        self.site = site
        self.adapters = nn.ModuleDict(adapters)
        self.shared: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.route.domain is not None, "the model sets the domain before it runs the backbone"
        y = self.adapters[self.route.domain](self.inner, x)
        return y if self.shared is None else self.shared(y)

    def domain_modules(self) -> Mapping[str, nn.Module]:
        return dict(self.adapters.items())


def attach(
    net: nn.Module,
    sites: Iterable[Site],
    domains: Iterable[str],
    method: type[Adapter],
    options: AdapterOptions,
    route: Route,
) -> dict[str, AdaptedSite]:
    """Wrap each site's module of `net` with one adapter of `method` per domain. Returns site name -> wrapper.

    Raises MdlError for a site of a kind that the method cannot take, or one that is wrapped already.
    """
    wrapped: dict[str, AdaptedSite] = {}
    for site in sites:
        if site.kind not in method.kinds:
            raise MdlError(
                f"the adapter attaches to sites of kind {', '.join(sorted(method.kinds))}, not {site.kind}",
                f"site '{site.name}'",
                "choose other sites, or another adapter",
            )
        holder, name = _holder(net, site.path)
        inner = getattr(holder, name)
        if isinstance(inner, AdaptedSite):
            raise MdlError(f"site '{site.name}' has an adapter already", "adapters", "name each site once")
        adapters = {domain: method(site, options) for domain in domains}
        wrapper = AdaptedSite(inner, site, adapters, route)
        wrapper.shared = method.shared(site, options)
        setattr(holder, name, wrapper)
        wrapped[site.name] = wrapper
    return wrapped


def detach(net: nn.Module) -> None:
    """Put every wrapped module of `net` back in its place."""
    for name, child in net.named_children():
        while isinstance(child, Wrapper):
            child = child.inner
            setattr(net, name, child)
        detach(child)


def _holder(net: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the one at a library path, and under which name, whatever wraps what lies between."""
    *parents, last = path.split(".")
    for part in parents:
        while isinstance(net, Wrapper):
            net = net.inner
        net = getattr(net, part)
    while isinstance(net, Wrapper):
        net = net.inner
    return net, last


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
