"""What decides a model's shape, as plain values, and which of its backbone's sites each adapter goes to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from mdltool.adapters import ADAPTERS
from mdltool.adapters.base import AdapterOptions, AnyAdapter
from mdltool.adapters.embedders import check_embedder
from mdltool.adapters.factored import FactorSpec
from mdltool.backbones import BACKBONES
from mdltool.backbones.base import Backbone, some
from mdltool.errors import MdlError
from mdltool.types import Place, Site, StreamSpec
from mdltool.wrapping import find
from mdltool.wrapping import replace as put

_EVERYWHERE = ("kind", "width", "input")
_SHARED = ("late", "layers", "embedder", "embedder_options")


@dataclass(frozen=True)
class Regime:
    """What trains; shared norms do where the backbone or the adapters do (spec omi_mdl 2.7)."""

    backbone: bool = False
    adapters: bool = False
    heads: bool = False


REGIMES = {
    "frozen": Regime(adapters=True, heads=True),
    "joint": Regime(backbone=True, adapters=True, heads=True),
    "heads": Regime(heads=True),
    "full": Regime(backbone=True, heads=True),
    "adapters": Regime(adapters=True),
}


@dataclass(frozen=True)
class AdapterSpec:
    """One entry of a recipe's adapters: method, where it goes, its options as plain values."""

    type: str
    sites: str | list[str]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FusedSpec:
    """How the backbone of a fused model differs from the library's.

    domain: whose adapters its weights hold. biases: layers that gained a bias. norms: BatchNorms that went into the
    convolution before them. Both are paths in the library's network.
    """

    domain: str
    biases: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)

    def reshape(self, net: nn.Module) -> None:
        """Give the library's network these biases, of zeros, and take these BatchNorms away."""
        for path in self.biases:
            layer: Any = find(net, path)
            layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
        for path in self.norms:
            put(net, path, nn.Identity())


@dataclass(frozen=True)
class ModelSpec:
    """Everything that decides a model's shape, as plain values; stored with the weights and enough to rebuild it.

    domains: name -> number of head outputs. bn: how the backbone's BatchNorms treat domains. fused: of a fused
    model, which has one domain and no adapters. factors: site -> parameter of its adapters -> how a compressed
    model stores it; dense where there is nothing. normalize: of domains whose pixels are not normalised as the
    backbone's, {"mean": [3], "std": [3]} of values 0..1. streams: domain -> stream -> what it is, in the order in
    which they were added; only of domains that have any. mute: types of adapters that stay out of the output.
    """

    backbone: str
    backbone_options: dict[str, Any]
    num_frames: int
    crop: int
    domains: dict[str, int]
    adapters: list[AdapterSpec]
    bn: str = "shared"
    dropout: float = 0.5
    head_init: str = "default"
    head_std: float = 0.01
    head: str = "linear"
    head_hidden: int = 2048
    logit_dropout: bool = False
    fused: FusedSpec | None = None
    factors: dict[str, dict[str, FactorSpec]] = field(default_factory=dict)
    normalize: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    streams: dict[str, dict[str, StreamSpec]] = field(default_factory=dict)
    mute: list[str] = field(default_factory=list)

    def of(self, domains: Iterable[str]) -> ModelSpec:
        """The spec of some of the domains alone, and of streams that weights are for which domains share."""
        domains = list(domains)
        kept = {name: self.domains[name] for name in domains}
        normalize = {name: values for name, values in self.normalize.items() if name in kept}
        with_streams = {*kept, *self.sharing}
        streams = {name: entries for name, entries in self.streams.items() if name in with_streams}
        return replace(self, domains=kept, normalize=normalize, streams=streams)

    @property
    def sharing(self) -> list[str]:
        """Domains that hold their cross-attention together, those too that the model has no more."""
        return [name for entry in self.adapters for name in entry.options.get("share", [])]

    def to_json(self) -> dict[str, Any]:
        """Without streams and mute where there are none: such a model is what it was before these were known."""
        later = ("streams", "mute")
        return {key: value for key, value in asdict(self).items() if value or key not in later}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> ModelSpec:
        adapters = [AdapterSpec(**entry) for entry in value["adapters"]]
        fused = FusedSpec(**value["fused"]) if value.get("fused") is not None else None
        factors = {
            site: {name: FactorSpec.from_json(entry) for name, entry in entries.items()}
            for site, entries in value.get("factors", {}).items()
        }
        streams = {
            domain: {name: StreamSpec.from_json(entry) for name, entry in entries.items()}
            for domain, entries in value.get("streams", {}).items()
        }
        plain = {**value, "adapters": adapters, "fused": fused, "factors": factors, "streams": streams}
        return ModelSpec(**plain)


def method_of(entry: AdapterSpec) -> tuple[type[AnyAdapter], AdapterOptions]:
    method = ADAPTERS.load(entry.type, "adapters.type")
    return method, parse_options(method.Options, entry.options, f"adapters ({entry.type})")


def spec_with_defaults(spec: ModelSpec) -> ModelSpec:
    """A spec whose backbone and adapters name every option, those that were left out too."""
    factory = BACKBONES.load(spec.backbone, "backbone.name")
    chosen = parse_options(factory.Options, spec.backbone_options, f"backbone ({spec.backbone})")
    adapters = [replace(entry, options=method_of(entry)[1].model_dump(mode="json")) for entry in spec.adapters]
    return replace(spec, backbone_options=chosen.model_dump(mode="json"), adapters=adapters)


def build_backbone(spec: ModelSpec) -> Backbone:
    """The bare backbone of a spec, with random weights; as fusing left it where the spec is of a fused model."""
    factory = BACKBONES.load(spec.backbone, "backbone.name")
    options = parse_options(factory.Options, spec.backbone_options, f"backbone ({spec.backbone})")
    backbone = factory(options, spec.num_frames, spec.crop)
    if spec.fused is not None:
        spec.fused.reshape(backbone.net)
    return backbone


def check_streams(streams: Mapping[str, Mapping[str, StreamSpec]], sharing: Collection[str] = ()) -> None:
    """Raise MdlError for a stream that differs between two domains, and for an embedder that does not fit.

    sharing: domains with one cross-attention, whose streams are alike in everything.
    """
    first: dict[tuple[str, bool], tuple[str, StreamSpec]] = {}
    for domain, entries in streams.items():
        for name, spec in entries.items():
            if hasattr(nn.ModuleDict, name) or name == "training":
                raise MdlError(f"a stream cannot be called '{name}'", "streams", f"call it {name}_1")
            check_embedder(name, spec)
            for shared in (False, True) if domain in sharing else (False,):
                other, known = first.setdefault((name, shared), (domain, spec))
                for key in _SHARED if shared else _EVERYWHERE:
                    if getattr(known, key) != getattr(spec, key):
                        raise MdlError(
                            f"the stream '{name}' has {key} {getattr(known, key)} in the domain {other} and "
                            f"{getattr(spec, key)} in {domain}",
                            f"streams.{name}.{key}",
                            "give one of the two another name",
                        )


def check_adapters(spec: ModelSpec) -> None:
    """Raise MdlError for an adapter that the backbone has no site for; builds no weights."""
    check_streams(spec.streams, spec.sharing)
    with torch.device("meta"):
        declared = build_backbone(spec).places()
    for entry in spec.adapters:
        method, options = method_of(entry)
        for name in choose_sites(entry.sites, declared, method, options):
            if name in declared and declared[name].kind not in method.kinds:
                raise _no_site(method, declared)


def parse_options(schema: Any, values: Mapping[str, Any], where: str) -> Any:
    """Plain values to a part's options. Raises MdlError with every fault."""
    try:
        return schema(**values)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise MdlError("; ".join(faults), where, f"keys: {', '.join(schema.model_fields)}") from None


def sites_of(
    backbone: Backbone, parts: Iterable[tuple[AdapterSpec, type[AnyAdapter], AdapterOptions]]
) -> list[list[Site]]:
    parts = list(parts)
    if not parts:
        return []
    declared = backbone.places()
    chosen = [choose_sites(entry.sites, declared, method, options) for entry, method, options in parts]
    extra = tuple(name for names in chosen for name in names if name not in declared)
    sites = backbone.sites(extra)
    return [[sites[name] for name in names] for names in chosen]


def choose_sites(
    sites: str | list[str], declared: Mapping[str, Place], method: type[AnyAdapter], options: AdapterOptions
) -> list[str]:
    """`all` that the method takes, `early-x` (those in the first x layers), `late-x` (in the last x), or a list of
    site names or module paths.
    """
    if isinstance(sites, list):
        return sites
    taken = {name: place for name, place in declared.items() if method.takes(place, options)}
    if not taken:
        raise _no_site(method, declared)
    if sites == "all":
        return list(taken)
    layers = sorted({place.layer for place in taken.values()})
    side, _, number = sites.partition("-")
    if side in ("early", "late") and number.isdigit() and 1 <= int(number) <= len(layers):
        wanted = layers[: int(number)] if side == "early" else layers[-int(number) :]
        return [name for name, place in taken.items() if place.layer in wanted]
    raise MdlError(
        f"'{sites}' is no choice of sites",
        "adapters.sites",
        f"all, early-x or late-x with x from 1 to {len(layers)}, or a list of {some(taken)}",
    )


def _no_site(method: type[AnyAdapter], declared: Mapping[str, Place]) -> MdlError:
    name, takes = ADAPTERS.name_of(method), " or ".join(sorted(method.kinds))
    kinds = sorted({place.kind for place in declared.values()})
    return MdlError(
        f"the backbone has no site for the adapter '{name}', which takes sites of kind {takes}",
        "adapters",
        f"this backbone offers sites of kind {', '.join(kinds)}; take an adapter for one of them",
    )
