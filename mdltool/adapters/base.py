"""Adapters and how they attach to a network they do not know.

`attach` replaces the module at each site by a wrapper around it. A wrapper holds one adapter per domain and what
the domains share, and asks the model's Route which domain is active. Nothing else of the network changes, so
`detach` restores the library's own modules and keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict
from torch import Tensor, nn

from mdltool.adapters.factored import Axes, FactorSpec, SharedFactor, factor, has_weight, weight_of
from mdltool.errors import MdlError
from mdltool.types import Place, Site, StreamSpec
from mdltool.wrapping import DomainWrapper, Route, TokenGrid, find, replace

Inner = Callable[..., Tensor]


class AdapterOptions(BaseModel):
    """Keys that a recipe may set in an entry of `adapters`, beside `type` and `sites`."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NotFoldable(Exception):
    """An adapter that no weight of its site's layer can hold; its text is the reason."""


class AnyAdapter(nn.Module, ABC):
    """A small module for one site and one domain, made by `method(site, options)`.

    unfoldable: why no weight can hold it, for methods that `added` and `folded` are not written for.
    """

    kinds: ClassVar[frozenset[str]]
    unfoldable: ClassVar[str]
    Options: ClassVar[type[AdapterOptions]] = AdapterOptions

    @abstractmethod
    def __init__(self, site: Site, options: Any) -> None:
        super().__init__()

    @classmethod
    def takes(cls, place: Place, options: Any) -> bool:
        """Whether `sites: all` includes a place: by its kind, and by what the options say of it."""
        return place.kind in cls.kinds

    @classmethod
    def has_batch_norm(cls, options: Any) -> bool:
        """Whether an adapter with these options has a BatchNorm of its own, whose statistics training moves."""
        return False

    @classmethod
    def wrapper(cls) -> type[AdaptedSite]:
        """What holds such adapters at a site."""
        return AdaptedSite

    def constrain(self) -> None:
        """Put parameters back into their range, after an update of the training."""

    @classmethod
    def shared(cls, site: Site, options: AdapterOptions) -> nn.Module | None:
        """What all domains share at a site, applied after the adapter; None where the method has nothing."""
        return None

    def added(self, layer: nn.Module) -> Tensor:
        """What an adapter beside its site's layer adds to the layer's weight in eval mode, in the weight's shape.

        Raises NotFoldable for an adapter that is no such sum.
        """
        raise NotFoldable(self.unfoldable)

    def folded(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of one layer that is the site's `layer` with this adapter, in eval mode (spec
        residual_adapters 2.3). Raises NotFoldable where there is none.
        """
        added = self.added(layer)
        return layer.weight + added, layer.bias

    def scale_rules(self) -> dict[str, str]:
        """Of the weights in `factor_rules`, those whose outputs go to a BatchNorm and nowhere else, and which.

        The scale of such a weight is without meaning, since the BatchNorm takes it out again.
        """
        return {}

    def factor_rules(self) -> dict[str, Axes]:
        """Parameters that `compress` may factor, and which of their axes mean the same for every domain.

        Those are the backbone's feature spaces; the space inside a bottleneck is arbitrary for each domain.
        """
        return {}


class Adapter(AnyAdapter):
    """`forward(inner, x)` decides how it composes with the site's own module: after it, beside it, or around it."""

    @abstractmethod
    def forward(self, inner: Inner, x: Tensor) -> Tensor:
        """The site's output for input x; `inner` is the site's own module."""


class TokenOptions(AdapterOptions):
    """layers: the blocks that adapters go to, from 1, e.g. "1-4" or "1-4,9-12"; None: all."""

    layers: Annotated[str, AfterValidator(lambda text: _ranges(text) and text)] | None = None


class BlockAdapter(AnyAdapter):
    """An adapter of places in a transformer's blocks."""

    Options: ClassVar[type[AdapterOptions]] = TokenOptions

    @classmethod
    def takes(cls, place: Place, options: Any) -> bool:
        return cls.in_layers(place, options) and place.kind in cls.kinds and place.role in cls.roles(options)

    @staticmethod
    def in_layers(place: Place | Site, options: Any) -> bool:
        """Whether the option `layers` includes a place."""
        return options.layers is None or any(place.layer in r for r in _ranges(options.layers))

    @classmethod
    @abstractmethod
    def roles(cls, options: Any) -> frozenset[str]:
        """Which places of a block it goes to."""


class TokenAdapter(BlockAdapter):
    """An adapter of a transformer's tokens; it learns from the grid where time, space and class tokens are."""

    @classmethod
    def wrapper(cls) -> type[AdaptedSite]:
        return AdaptedTokens

    @abstractmethod
    def forward(self, inner: Inner, x: Tensor, grid: TokenGrid) -> Tensor:
        """The site's output for tokens x that lie as `grid` says."""


class AdaptedSite(DomainWrapper):
    """A site's module with one adapter per domain and what domains share: a part that is applied after the
    adapters, and one adapter that several of them hold together (`common`). muted: the adapters stay out of the
    output.
    """

    def __init__(
        self, inner: nn.Module, site: Site, method: type[AnyAdapter], options: AdapterOptions, route: Route
    ) -> None:
        super().__init__(inner, route)
        self.site = site
        self.method = method
        self.options: Any = options
        self.muted = False
        self.adapters = nn.ModuleDict()
        self.shared = method.shared(site, options)
        self.common: nn.Module | None = None
        self.factors = nn.ModuleDict()
        self._factored: dict[str, FactorSpec] = {}

    def fill(self, domains: Iterable[str], streams: Mapping[str, Mapping[str, StreamSpec]]) -> None:
        """Begin with these domains' adapters. streams: of domains that have any."""
        self.adapters.update({domain: self.build(domain, streams.get(domain, {})) for domain in domains})

    def factor(self, specs: Mapping[str, FactorSpec]) -> None:
        """Store parameters of the adapters, by their names, as products of factors."""
        self._factored = dict(specs)
        for name, spec in specs.items():
            if not spec.independent:
                holders = (adapter for adapter in self.adapters.values() if has_weight(adapter, name))
                if (holder := next(holders, None)) is not None:  # a stream's, which no domain may have any more
                    self.factors[name.replace(".", "/")] = SharedFactor(weight_of(holder, name).shape, spec)
        for adapter in self.adapters.values():
            self._factor(adapter)

    def _factor(self, adapter: nn.Module) -> None:
        for name, spec in self._factored.items():
            if has_weight(adapter, name):
                factor(adapter, name, spec, self._shared_factor(name))

    def _shared_factor(self, name: str) -> SharedFactor | None:
        key = name.replace(".", "/")  # a module's name has no dots
        if key not in self.factors:
            return None
        module = self.factors[key]
        assert isinstance(module, SharedFactor)
        return module

    def shared_factors(self) -> dict[str, nn.Parameter]:
        """Parameter name -> the factor that domains share."""
        return {name: module.weight for name in self._factored if (module := self._shared_factor(name)) is not None}

    def set_trainable(self, trains: bool, factors: bool) -> None:
        """Whether what the site has beside its own module trains; of it the shared factors only if `factors`."""
        for module in (self.adapters, self.shared, self.common):
            if module is not None:
                module.requires_grad_(trains)
        self.factors.requires_grad_(trains and factors)

    def forward(self, x: Tensor, *rest: Tensor | None) -> Tensor:
        """rest: what an adapter outside this one gives to the site's own module."""
        if self.muted:
            y: Tensor = self.inner(x, *rest)
        else:
            parts = [self._adapt(*part) for part in self._parts(x, rest)]
            y = torch.cat(parts) if len(parts) > 1 else parts[0]
        return y if self.shared is None else self.shared(y)

    def _parts(self, x: Tensor, rest: tuple[Tensor | None, ...]) -> list[tuple[str, Inner, Tensor]]:
        """Each domain of the batch, the site's own module for it, and its rows of x."""
        inner: Inner = partial(_with, self.inner, rest) if rest else self.inner
        if not self.route.segments:
            assert self.route.domain is not None, "the model sets the domain before it runs the backbone"
            return [(self.route.domain, inner, x)]
        shared = _Common(inner, x, self.route)
        return [(d, partial(shared, i, rows), rows) for i, (d, rows) in enumerate(self.route.rows(x))]

    def _adapt(self, domain: str, inner: Inner, x: Tensor) -> Tensor:
        y: Tensor = self.adapters[domain](inner, x)
        return y

    @property
    def domain_modules(self) -> nn.ModuleDict:
        return self.adapters

    def build(self, domain: str, streams: Mapping[str, StreamSpec]) -> nn.Module:
        """A dense adapter as a domain with such streams begins with it."""
        return self.method(self.site, self.options)

    def fresh(self, domain: str, streams: Mapping[str, StreamSpec]) -> nn.Module:
        adapter = self.build(domain, streams)
        self._factor(adapter)
        return adapter

    @property
    def reads_streams(self) -> bool:
        """Whether the adapters read streams of the clips."""
        return False

    @property
    def is_zero(self) -> bool:
        """Whether the adapters are known to add nothing, whatever their input is."""
        return False

    def constrain(self) -> None:
        """See AnyAdapter.constrain."""
        for module in chain(self.adapters.values(), [self.common]):
            if isinstance(module, AnyAdapter):
                module.constrain()


def _with(inner: Inner, rest: tuple[Tensor | None, ...], x: Tensor) -> Tensor:
    return inner(x, *rest)


class _Common:
    """A site's own module under a batch of several domains, as each segment's adapter calls it.

    It runs once on the whole batch, when the first adapter asks for the output of its unchanged rows. An adapter
    that changes them first, or adds arguments, has it run on its rows alone.
    """

    def __init__(self, inner: Inner, x: Tensor, route: Route) -> None:
        self._inner, self._x, self._route = inner, x, route
        self._outputs: list[tuple[str, Tensor]] | None = None

    def __call__(self, segment: int, rows: Tensor, x: Tensor, *rest: Tensor | None) -> Tensor:
        """The output for x, which a segment's adapter gives. rows: the segment's rows of the site's input."""
        if x is not rows or rest:
            with self._route.only(self._route.segments[segment][0]):
                return self._inner(x, *rest)
        if self._outputs is None:
            self._outputs = self._route.rows(self._inner(self._x))
        return self._outputs[segment][1]


class AdaptedTokens(AdaptedSite):
    """AdaptedSite for TokenAdapters."""

    def _adapt(self, domain: str, inner: Inner, x: Tensor) -> Tensor:
        y: Tensor = self.adapters[domain](inner, x, self.grid(x))
        return y

    def grid(self, x: Tensor) -> TokenGrid:
        """How the tokens x lie."""
        grid = self.route.tokens
        assert grid is not None, "the backbone sets the grid before it runs its blocks"
        if grid.layout == "grid":  # a pyramid's grid changes from stage to stage; its tensors say it
            grid = TokenGrid.of(x.shape[1:4], "grid")
        return grid

    @property
    def bottleneck(self) -> int | None:
        """Width of the bottleneck that `with_bottleneck` gives; None where the adapters have none to offer."""
        offered: int | None = getattr(next(iter(self.adapters.values()), None), "bottleneck_width", None)
        return offered

    def with_bottleneck(self, x: Tensor, rest: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
        """The site's output and the adapters' bottleneck, as the tokens lie; adapters that `bottleneck` is not None
        of.
        """
        assert self.shared is None
        found: list[tuple[Tensor, Tensor]] = []
        for domain, inner, rows in self._parts(x, rest):
            adapter: Any = self.adapters[domain]
            grid = self.grid(rows)
            b = adapter.bottleneck(rows, grid)
            found.append((inner(rows) if self.muted else inner(rows) + adapter.expand(b, grid), b))
        ys, bs = zip(*found, strict=True)
        return (torch.cat(ys), torch.cat(bs)) if len(found) > 1 else found[0]


def _ranges(text: str) -> list[range]:
    """ "1-4,9" as ranges. Raises ValueError for anything else."""
    found = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not first.isdigit() or not last.isdigit() or not 1 <= int(first) <= int(last):
            raise ValueError(f"'{text}' is no list of blocks such as 1-4 or 1-4,9-12")
        found.append(range(int(first), int(last) + 1))
    return found


def attach(
    net: nn.Module,
    sites: Iterable[Site],
    domains: Iterable[str],
    method: type[AnyAdapter],
    options: AdapterOptions,
    route: Route,
    streams: Mapping[str, Mapping[str, StreamSpec]] | None = None,
) -> dict[str, AdaptedSite]:
    """Wrap each site's module of `net` with one adapter of `method` per domain. Returns site name -> wrapper.

    Several methods may share a site: the later one wraps the earlier. streams: of domains that have any. Raises
    MdlError for a site of a kind that the method cannot take, or one that the same method wraps already.
    """
    wrapped: dict[str, AdaptedSite] = {}
    for site in sites:
        if site.kind not in method.kinds:
            raise MdlError(
                f"the adapter attaches to sites of kind {', '.join(sorted(method.kinds))}, not {site.kind}",
                f"site '{site.name}'",
                "choose other sites, or another adapter",
            )
        inner = find(net, site.path)
        if _holds(inner, method):
            raise MdlError(
                f"site '{site.name}' has such an adapter already", "adapters", "name each site once per type"
            )
        wrapper = method.wrapper()(inner, site, method, options, route)
        wrapper.fill(domains, streams or {})
        replace(net, site.path, wrapper)
        wrapped[site.name] = wrapper
    return wrapped


def _holds(module: nn.Module, method: type[AnyAdapter]) -> bool:
    while isinstance(module, AdaptedSite):
        if module.method is method:
            return True
        module = module.inner
    return False
