"""A model's adapters to factors and back: which weights, their decompositions, the tensors that are stored.

It works on tensors by their stored names and needs no backbone (design, section 4). Joint: the matrices that the
domains have of a weight share one factor. Independent: each domain's matrix is factored by itself, with one rank
for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mdltool.adapters.factored import Axes, FactoredWeight, FactorSpec, has_weight, weight_of
from mdltool.compress.joint_svd import Balance, Decomposition, Scale, decompose, grow, project
from mdltool.compress.ranks import Choice, Weight
from mdltool.model import MultiDomainModel

# svd.matricise of convolutions [C_o, C_i, (kt,) kh, kw]: the axes of the shared side; the adapter's own by default.
MATRICISE = ("adapter", "out", "in", "filters", "separable", "basis")


@dataclass(frozen=True)
class SiteWeight:
    """A weight that every domain has at a site, and how it is read as matrices. shape: of one domain's."""

    site: str
    parameter: str
    axes: Axes
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.site}/{self.parameter}"

    def key(self, domain: str) -> str:
        """The stored name of a domain's dense weight."""
        return f"{domain}/{self.name}"

    def keys(self, domain: str, independent: bool) -> tuple[str, str]:
        """The stored names of the factors: the shared side's and the private one's."""
        shared = f"{self.key(domain)}.basis" if independent else f"shared/{self.site}/factors.{self.parameter}"
        return shared, f"{self.key(domain)}.private"


@dataclass(frozen=True)
class Decomposed:
    """A weight's decompositions: one of all domains together, or each domain's own.

    whitened: with second moments, so that norms are of outputs.
    """

    weight: SiteWeight
    independent: bool
    parts: tuple[Decomposition, ...]
    whitened: bool = False

    def for_ranks(self) -> Weight:
        """What a choice of ranks needs of it. Independent matrices are a batch that takes one rank."""
        if not self.independent:
            return Weight.of(self.weight.name, self.parts[0])
        longest = max(part.max_rank for part in self.parts)
        held = torch.stack([_padded(part.energies, 0, longest) for part in self.parts])
        heads, rows, columns = self.weight.axes.sizes(self.weight.shape)
        batch = math.prod(heads) * len(self.parts)
        return Weight(self.weight.name, rows, columns, 1, batch, held.sum(0), held)

    def tensors(self, rank: int, scale: Scale) -> dict[str, Tensor]:
        """The factors by their stored names, with zeros for components that are not there."""
        found: dict[str, Tensor] = {}
        for part in self.parts:
            factors = part.truncate(min(rank, part.max_rank), scale=scale)
            for domain, private in factors.private.items():
                shared_key, private_key = self.weight.keys(domain, self.independent)
                found[shared_key] = _padded(factors.shared, -1, rank)
                found[private_key] = _padded(private, -2, rank)
        return found

    def retained(self, rank: int | None) -> dict[str, float]:
        """Domain -> fraction of its squared norm that a rank retains; 1 of nothing."""
        found: dict[str, float] = {}
        for part in self.parts:
            held = part.domain_energies(part.max_rank if rank is None else rank)
            found |= {d: 1.0 if rank is None or not norm else held[d] / norm for d, norm in part.norms.items()}
        return found


def site_weights(model: MultiDomainModel, matricise: str = "adapter") -> list[SiteWeight]:
    """What of a dense model's adapters is matrices that every domain has; the model may be on the meta device."""
    found = []
    for site, wrapper in model.sites.items():
        adapter, *others = wrapper.adapters.values()
        for parameter, axes in adapter.factor_rules().items():  # type: ignore[operator]
            if not all(has_weight(other, parameter) for other in others):
                continue  # a stream that a domain has not
            shape = tuple(weight_of(adapter, parameter).shape)
            if matricise != "adapter" and len(shape) > 3:
                axes = _convolution_axes(matricise, len(shape))
            found.append(SiteWeight(site, parameter, axes, shape))
    return found


def _convolution_axes(matricise: str, ndim: int) -> Axes:
    rows = {
        "out": (0,),
        "in": (1,),
        "filters": tuple(range(1, ndim)),
        "separable": (0, ndim - 2),
        "basis": tuple(range(ndim)),
    }
    return Axes(rows[matricise])


def decompositions(
    weights: Iterable[SiteWeight],
    tensors: Mapping[str, Tensor],
    domains: Sequence[str],
    *,
    independent: bool = False,
    balance: Balance = "none",
    second_moments: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> dict[str, Decomposed]:
    """By the weights' names. second_moments: weight's name -> domain -> of what enters it, where it is known.

    Raises MdlError for matrices of different shapes and for values that are not finite.
    """
    found = {}
    for weight in weights:
        matrices = {domain: weight.axes.matrix(tensors[weight.key(domain)]) for domain in domains}
        moments = (second_moments or {}).get(weight.name)
        groups = [[domain] for domain in domains] if independent else [list(domains)]
        parts = [
            decompose({d: matrices[d] for d in group}, balance=balance, second_moments=moments) for group in groups
        ]
        found[weight.name] = Decomposed(weight, independent, tuple(parts), moments is not None)
    return found


def folded_norms(model: MultiDomainModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors with the scale of each BatchNorm that follows a weight of an adapter in that weight.

    The same function in both modes, up to the norm's eps in training: the statistics are scaled as the outputs are,
    and in eval mode the norm adds its bias alone. So what a decomposition weighs is what leaves the norm.
    """
    result = dict(tensors)
    for site, wrapper in model.sites.items():
        for domain, adapter in wrapper.adapters.items():
            for parameter, norm in adapter.scale_rules().items():  # type: ignore[operator]
                own, eps = f"{domain}/{site}", float(adapter.get_submodule(norm).eps)  # type: ignore[arg-type]
                mean, var, gain = (tensors[f"{own}/{norm}.{n}"] for n in ("running_mean", "running_var", "weight"))
                scale = gain.double() / (var.double() + eps).sqrt()
                path = parameter.removesuffix("weight")
                for name in {f"{own}/{path}weight", f"{own}/{path}bias"} & tensors.keys():
                    value = tensors[name]
                    result[name] = (value * scale.view(-1, *[1] * (value.ndim - 1))).to(value)
                moved = scale.square() * var
                result[f"{own}/{norm}.running_mean"] = (scale * mean).to(mean)
                result[f"{own}/{norm}.running_var"] = moved.to(var)
                result[f"{own}/{norm}.weight"] = (moved + eps).sqrt().to(gain)
    return result


def factored(
    tensors: Mapping[str, Tensor], found: Mapping[str, Decomposed], choices: Mapping[str, Choice], scale: Scale
) -> dict[str, Tensor]:
    """A model's tensors with factors in the place of the weights that are not left dense."""
    result = dict(tensors)
    for name, entry in found.items():
        rank = choices[name].rank
        if rank is None:
            continue
        for part in entry.parts:
            for domain in part.domains:
                dtype = result.pop(entry.weight.key(domain)).dtype
        result |= {key: value.to(dtype) for key, value in entry.tensors(rank, scale).items()}
    return result


def multiplied(
    tensors: Mapping[str, Tensor], found: Mapping[str, Decomposed], choices: Mapping[str, Choice]
) -> dict[str, Tensor]:
    """A dense model's tensors with the products of the factors: the same function as the factored model's."""
    result = dict(tensors)
    for name, entry in found.items():
        rank = choices[name].rank
        if rank is None:
            continue
        for part in entry.parts:
            factors = part.truncate(min(rank, part.max_rank))
            for domain in part.domains:
                key = entry.weight.key(domain)
                dense = entry.weight.axes.weight(factors.product(domain), entry.weight.shape)
                result[key] = dense.to(tensors[key].dtype)
    return result


def factor_specs(
    found: Mapping[str, Decomposed], choices: Mapping[str, Choice]
) -> dict[str, dict[str, FactorSpec]]:
    """What ModelSpec says of the weights that are not left dense."""
    specs: dict[str, dict[str, FactorSpec]] = {}
    for name, entry in found.items():
        rank = choices[name].rank
        if rank is not None:
            spec = FactorSpec(rank, entry.weight.axes, entry.independent)
            specs.setdefault(entry.weight.site, {})[entry.weight.parameter] = spec
    return specs


def extended_factors(
    tensors: dict[str, Tensor],
    weight: SiteWeight,
    spec: FactorSpec,
    domain: str,
    old: Sequence[str],
    dense: Tensor,
    more: int = 0,
) -> tuple[FactorSpec, float, float]:
    """Add a new domain's factors of a weight to a compressed model's tensors, in place.

    old: the domains that it has. dense: the new one's weight. more: further components of the shared factor, for
    what it cannot hold; the old domains' private factors have zeros there, so that their products stay. Returns
    how the weight is stored now, the new domain's squared norm, and what of it is lost.
    """
    matrix = weight.axes.matrix(dense).double()
    if spec.independent:
        own = decompose({domain: matrix})
        best = own.truncate(min(spec.rank, own.max_rank))
        shared, private = _padded(best.shared, -1, spec.rank), _padded(best.private[domain], -2, spec.rank)
    else:
        shared = tensors[weight.keys(domain, False)[0]].double()
        more = max(0, min(more, shared.shape[-2] - spec.rank))  # a full basis holds everything
        if more:
            shared = _padded(torch.cat([shared, grow(matrix, shared, more)], -1), -1, spec.rank + more)
            for name in old:
                key = weight.keys(name, False)[1]
                tensors[key] = _padded(tensors[key], -2, spec.rank + more)
        private, _ = project(matrix, shared)
    for key, value in zip(weight.keys(domain, spec.independent), (shared, private), strict=True):
        tensors[key] = value.to(dense.dtype)
    gone = float((matrix - shared @ private).square().sum())
    return replace(spec, rank=shared.shape[-1]), float(matrix.square().sum()), gone


def fit_factors(adapter: nn.Module, parameter: str, dense: Tensor) -> float:
    """Set a factored weight of a domain to a dense one, as near as its factors allow; what domains share stays.

    Returns the squared norm that is lost.
    """
    held = weight_of(adapter, parameter)
    assert isinstance(held, FactoredWeight)
    with torch.no_grad():
        matrix, (shared, private) = held.axes.matrix(dense), held.factors()
        if held.independent:
            decomposition = decompose({"": matrix})
            rank = private.shape[-2]
            # The basis is never zero, beyond the weight's own components it is what it was: of two zeros neither
            # would ever get a gradient, and many adapters start at zero.
            best = decomposition.truncate(min(rank, decomposition.max_rank), scale="right")
            shared[..., : best.shared.shape[-1]].copy_(best.shared)
            fitted = _padded(best.private[""], -2, rank)
        else:
            fitted, _ = project(matrix, shared)
        private.copy_(fitted)
        return float((matrix.double() - shared.double() @ fitted).square().sum())


def _padded(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Zeros behind, so that an axis has a size."""
    missing = list(tensor.shape)
    missing[axis] = size - tensor.shape[axis]
    return torch.cat([tensor, tensor.new_zeros(missing)], axis) if missing[axis] else tensor
