"""How many parameters a model has, by part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from mdltool.model import MultiDomainModel


def parameter_counts(model: MultiDomainModel) -> dict[str, Any]:
    """Parameters by part (design, section 6): integers; total = backbone + heads + adapters; norms and streams
    (their embedders) apart.

    With `bn: per_domain` every domain owns a copy of the BatchNorms' weights; one of the copies stands for the
    backbone's own, so D - 1 of them are counted as adapters (spec omi_mdl 6.4). Factors that domains share
    are counted once, in `adapters` and again by themselves; adapters that domains share, once in `adapters`.
    """
    per_domain, parts = {}, (*model.sites.values(), *model.norms.values())
    for domain in model.spec.domains:
        owned = [part.domain_modules[domain] for part in parts]
        per_domain[domain] = {"adapters": count(owned), "head": count([model.heads[domain]])}
    adapters = sum(entry["adapters"] for entry in per_domain.values())
    if model.spec.bn == "per_domain":
        adapters -= count([norm.inner for norm in model.norms.values()])
    factors = count([wrapper.factors for wrapper in model.sites.values()])
    common = [wrapper.common for wrapper in model.sites.values() if wrapper.common is not None]
    adapters += factors + count(common)
    streams = count([model.embedders])
    heads = sum(entry["head"] for entry in per_domain.values())
    backbone = sum(parameter.numel() for parameter in model.backbone_parameters())
    shared = [wrapper.shared for wrapper in model.sites.values() if wrapper.shared is not None]
    return {
        "total": backbone + heads + adapters,
        "backbone": backbone,
        "heads": heads,
        "adapters": adapters,
        "shared_factors": factors,
        "norms": count(shared),
        "streams": streams,
        "projection": model.backbone.projection_parameters,
        "training_only": 0,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "per_domain": per_domain,
    }


def parts(model: MultiDomainModel) -> dict[str, int]:
    """Every count that a printed figure can be made of: those of `parameter_counts`, an adapter type's parameters
    under its name, all domains together, and the weights of convolutions, `filters` of the backbone and
    `adapter_filters` of all adapters.
    """
    counts = {part: number for part, number in parameter_counts(model).items() if part != "per_domain"}
    held = {}
    for site, wrapper in model.sites.items():
        held[site] = [wrapper.adapters, *([wrapper.common] if wrapper.common is not None else [])]
        kind = model.types[site]
        counts[kind] = counts.get(kind, 0) + count(held[site])
    counts["filters"] = sum(p.numel() for p in model.backbone_parameters() if p.dim() > 2)
    adapters = (p for modules in held.values() for module in modules for p in module.parameters())
    counts["adapter_filters"] = sum(p.numel() for p in adapters if p.dim() > 2)
    return counts


def count(modules: Iterable[nn.Module]) -> int:
    """Parameters of modules."""
    return sum(p.numel() for module in modules for p in module.parameters())
