"""New streams of a model that begin as those of another model's domain. No stage itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mdltool.adapters.base import AnyAdapter
from mdltool.adapters.factored import value, weight_of
from mdltool.compress.factoring import fit_factors
from mdltool.model import MultiDomainModel

_REST = ""


def begin_streams(model: MultiDomainModel, new: Sequence[str], other: MultiDomainModel, domain: str) -> int:
    """Copy what a domain of another model has of the same streams into new tensors; returns how many are copied.

    new: names of `model.tensors`. A stream's tensors at a site are copied all or none, and so is what its streams
    have in common there (fusion and output), where a stream of theirs is. Factors are fitted to the dense weights.
    """
    there, own, copied = _dense(other, domain), model.tensors(False), 0
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for key in new:
        owner, site, parameter = key.split("/", 2)
        groups.setdefault((owner, site), {}).setdefault(_stream(site, parameter), []).append(key)
    for parts in groups.values():
        fitting = {name: keys for name, keys in parts.items() if all(_fits(model, key, own, there) for key in keys)}
        if set(fitting) - {_REST}:
            for key in (key for keys in fitting.values() for key in keys):
                _copy(model, key, own, there)
                copied += 1
    return copied


def _stream(site: str, parameter: str) -> str:
    """The stream that a tensor is of alone; a gain is one of what comes after all streams."""
    parts = parameter.split(".")
    if site == "streams":
        return parts[0]
    return parts[1] if parts[0] == "streams" else _REST


def _dense(model: MultiDomainModel, domain: str) -> dict[str, Tensor]:
    """Site/parameter -> what a domain reads its streams with, its own or shared; factors are multiplied out."""
    found: dict[str, Tensor] = {}
    for site, wrapper in model.sites.items():
        if wrapper.reads_streams:
            shared = wrapper.common is not None and domain in model.spec.sharing
            adapter = wrapper.common if shared else wrapper.adapters[domain]
            assert isinstance(adapter, AnyAdapter)
            found |= {f"{site}/{name}": tensor for name, tensor in adapter.named_parameters()}
            found |= {f"{site}/{name}": value(weight_of(adapter, name)) for name in adapter.factor_rules()}
    embedders = model.embedders.common if domain in model.spec.sharing else model.embedders.own[domain]
    return found | {f"streams/{name}": tensor for name, tensor in embedders.named_parameters()}


def _source(key: str) -> str:
    """The dense weight that a tensor holds or is a factor of, by site."""
    return key.split("/", 1)[1].removesuffix(".private").removesuffix(".basis")


def _is_factor(key: str) -> bool:
    return key.endswith((".private", ".basis"))


def _held(model: MultiDomainModel, key: str) -> tuple[nn.Module, str]:
    """The adapter and the parameter that a factor is of."""
    owner, site = key.split("/", 2)[:2]
    return model.sites[site].adapters[owner], _source(key).removeprefix(f"{site}/")


def _fits(model: MultiDomainModel, key: str, own: dict[str, Tensor], there: dict[str, Tensor]) -> bool:
    source = there.get(_source(key))
    wanted = weight_of(*_held(model, key)) if _is_factor(key) else own[key]
    return source is not None and source.shape == wanted.shape


def _copy(model: MultiDomainModel, key: str, own: dict[str, Tensor], there: dict[str, Tensor]) -> None:
    source = there[_source(key)]
    if key.endswith(".private"):
        fit_factors(*_held(model, key), source.detach())
    elif not key.endswith(".basis"):  # which is fitted with the private factor
        with torch.no_grad():
            own[key].copy_(source)
