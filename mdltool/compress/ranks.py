"""How many components each factored weight keeps (spec residual_adapters 2.5: rank, energy, budget).

A component of a weight costs its column of the shared factor and its row of every domain's private one; a weight
whose components would cost no less than the dense matrices stays dense, which loses nothing. Sizes are numbers
(scalars), not bytes.
"""

from __future__ import annotations

import bisect
import heapq
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mdltool.compress.joint_svd import Decomposition
from mdltool.errors import MdlError

RankMode = Literal["per_domain", "stacked"]
EnergyScope = Literal["joint", "worst"]
Weighting = Literal["relative", "frobenius"]


@dataclass(frozen=True)
class Weight:
    """What a choice of ranks needs of one weight.

    name: unique among the weights. shared_dim, private_dim: sides S and P of each domain's matrix. domains: how
    many have it. batch: independent matrices of each domain. energies: squared norm of each component there is,
    [N]. domain_energies: what each component holds of each domain's squared norm, [T, N].
    """

    name: str
    shared_dim: int
    private_dim: int
    domains: int
    batch: int
    energies: Tensor
    domain_energies: Tensor

    @classmethod
    def of(cls, name: str, decomposition: Decomposition) -> Weight:
        *batch, shared_dim, private_dim = decomposition.shape
        held = torch.stack(list(decomposition.components.values()))
        domains = len(decomposition.domains)
        return cls(name, shared_dim, private_dim, domains, math.prod(batch), decomposition.energies, held)

    @property
    def component(self) -> int:
        """Size of one component."""
        return self.batch * (self.shared_dim + self.domains * self.private_dim)

    @property
    def dense(self) -> int:
        """Size without compression."""
        return self.batch * self.domains * self.shared_dim * self.private_dim

    @property
    def full(self) -> int:
        """The largest rank that its shape allows."""
        return min(self.shared_dim, self.domains * self.private_dim)

    @property
    def ends(self) -> int:
        """The largest rank that takes less than the dense form and than its components."""
        return min(len(self.energies), (self.dense - 1) // self.component)

    def retained(self, rank: int | None) -> float:
        """Fraction of the squared norm that a rank retains; 1 of nothing."""
        total = float(self.energies.sum())
        return 1.0 if rank is None or total == 0 else float(self.energies[:rank].sum()) / total


@dataclass(frozen=True)
class Choice:
    """rank: 0 drops the adapter, None leaves it dense. retained: fraction of the squared norm. clamped: more was
    asked for than there is.
    """

    rank: int | None
    retained: float
    clamped: bool = False


def stored(weights: Sequence[Weight], choices: Mapping[str, Choice]) -> int:
    """Size of all weights of all domains as chosen."""
    return sum(_size(weight, choices[weight.name].rank) for weight in weights)


def by_rank(weights: Sequence[Weight], rank: float, mode: RankMode = "per_domain") -> dict[str, Choice]:
    """The same rank for every weight: an integer, or a fraction of the smaller side of one domain's matrix
    (`per_domain`) or of the largest rank of all domains' side by side (`stacked`), and at least 1.
    """
    if isinstance(rank, bool) or not (0 < rank < 1 or (isinstance(rank, int) and rank >= 1)):
        raise MdlError(f"{rank} is no rank", "--rank", "a whole number from 1, or a fraction between 0 and 1")
    return {weight.name: _choose(weight, _asked(weight, rank, mode)) for weight in weights}


def by_energy(weights: Sequence[Weight], energy: float, scope: EnergyScope = "joint") -> dict[str, Choice]:
    """The smallest rank of each weight that retains the fraction `energy` of the squared norm: of all domains
    together, or of every domain's own (`worst`).
    """
    if not 0 < energy <= 1:
        raise MdlError(f"{energy} is no fraction of the energy", "--energy", "a number above 0, up to 1")
    return {weight.name: _choose(weight, _least(weight, energy, scope)) for weight in weights}


def by_budget(
    weights: Sequence[Weight], budget: int, weighting: Weighting = "relative", min_rank: int = 1
) -> dict[str, Choice]:
    """The ranks that retain most within `budget` numbers.

    Greedy: as long as a step fits, the one that retains most per number; a step is the next component, or all that
    is missing where the dense form is the cheaper way to it. At the sizes where a step ends no other choice retains
    more. Between them the last numbers may go to a worse step, because the better one does not fit; the result is
    no worse than the largest uniform rank that fits. weighting: a weight's energy counts as a fraction of its own
    (`relative`) or as it is. min_rank: of every weight, as far as it has as many components.
    """
    if min_rank < 0:
        raise MdlError(f"{min_rank} is no rank", "--min-rank", "a whole number from 0")
    curves = [_Curve.of(weight, weighting, min_rank) for weight in weights]
    least = sum(int(curve.sizes[0]) for curve in curves)
    if least > budget:
        raise MdlError(
            f"a budget of {budget:,} numbers cannot hold rank {min_rank} of every weight",
            "--budget",
            f"at least {least:,}" + ("" if min_rank == 0 else ", or --min-rank 0, which drops whole adapters"),
        )
    starts = [[0] * len(curves), *_uniform(weights, curves, budget)]
    filled = [_fill(curves, start, budget) for start in starts]
    best = max(filled, key=lambda steps: sum(float(c.values[i]) for c, i in zip(curves, steps, strict=True)))
    ranks = [curve.ranks[step] for curve, step in zip(curves, best, strict=True)]
    return {w.name: Choice(rank, w.retained(rank)) for w, rank in zip(weights, ranks, strict=True)}


def parse_budget(text: str, dense: int) -> int:
    """Numbers ("123456", "300k", "1.2M") or a fraction of the dense size ("0.5x") as numbers."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMx]?)", text)
    if not match or ("." in text and not match[2]) or float(match[1]) == 0:
        raise MdlError(
            f"'{text}' is no budget", "--budget", "numbers such as 300k or 1.2M, or 0.5x of the dense size"
        )
    return int(float(match[1]) * {"": 1, "k": 1_000, "M": 1_000_000, "x": dense}[match[2]])


@dataclass(frozen=True)
class _Curve:
    """The forms a weight can take, each larger than the one before: sizes, what they retain (weighted), ranks."""

    sizes: Tensor
    values: Tensor
    ranks: list[int | None]

    @classmethod
    def of(cls, weight: Weight, weighting: Weighting, min_rank: int) -> _Curve:
        ranks: list[int | None] = list(range(min(min_rank, len(weight.energies)), weight.ends + 1))
        if weight.ends < len(weight.energies):
            ranks.append(None)
        total = float(weight.energies.sum())
        scale = 1.0 if weighting == "frobenius" else 1 / total if total else 0.0
        held = torch.cat([weight.energies.new_zeros(1), weight.energies.cumsum(0)]) * scale
        values = torch.stack([held[-1] if rank is None else held[rank] for rank in ranks])
        return cls(torch.tensor([_size(weight, rank) for rank in ranks]), values, ranks)

    def form(self, rank: int | None) -> int:
        """The form of a rank, the first of a smaller one."""
        return self.ranks.index(rank) if rank in self.ranks else 0

    def step(self, at: int, left: int) -> tuple[float, int] | None:
        """The step from form `at` that fits `left` numbers and retains most per number: that, and the form."""
        more = self.sizes[at + 1 :] - self.sizes[at]
        fitting = int((more <= left).sum())
        if not fitting:
            return None
        ratios = (self.values[at + 1 : at + 1 + fitting] - self.values[at]) / more[:fitting]
        best = int(ratios.argmax())
        return (float(ratios[best]), at + 1 + best) if ratios[best] > 0 else None


def _fill(curves: Sequence[_Curve], start: Sequence[int], budget: int) -> list[int]:
    """From given forms to those that the steps lead to while they fit."""
    at = list(start)
    left = budget - sum(int(curve.sizes[step]) for curve, step in zip(curves, at, strict=True))
    # The room only shrinks, so that a step's place in the queue is never too low; its turn come, it is made anew.
    queue = [(-found[0], i) for i, curve in enumerate(curves) if (found := curve.step(at[i], left))]
    heapq.heapify(queue)
    while queue:
        promised, i = heapq.heappop(queue)
        found = curves[i].step(at[i], left)
        if found and -found[0] == promised:
            left -= int(curves[i].sizes[found[1]] - curves[i].sizes[at[i]])
            at[i] = found[1]
            found = curves[i].step(at[i], left)
        if found:
            heapq.heappush(queue, (-found[0], i))
    return at


def _uniform(weights: Sequence[Weight], curves: Sequence[_Curve], budget: int) -> list[list[int]]:
    """The largest uniform rank that fits, of each kind that `by_rank` knows, as forms."""
    sides = {min(weight.shared_dim, weight.private_dim) for weight in weights}
    tops = {weight.full for weight in weights}
    kinds: list[tuple[RankMode, Sequence[float]]] = [
        ("per_domain", range(1, max(tops, default=0) + 1)),
        ("per_domain", _fractions(sides)),
        ("stacked", _fractions(tops)),
    ]
    pairs = list(zip(weights, curves, strict=True))

    def forms(rank: float, mode: RankMode) -> list[int]:
        return [curve.form(_choose(weight, _asked(weight, rank, mode)).rank) for weight, curve in pairs]

    def size(candidate: tuple[float, RankMode]) -> int:
        return sum(int(curve.sizes[form]) for curve, form in zip(curves, forms(*candidate), strict=True))

    found = []
    for mode, ranks in kinds:
        candidates = [(rank, mode) for rank in ranks]
        fitting = bisect.bisect_right(candidates, budget, key=size)
        found += [forms(*candidate) for candidate in candidates[:fitting][-1:]]
    return found


def _fractions(tops: set[int]) -> list[float]:
    """The fractions where the rank of a weight with one of these largest ranks changes."""
    return sorted({k / top for top in tops for k in range(1, top)})


def _asked(weight: Weight, rank: float, mode: RankMode) -> int:
    if isinstance(rank, int):
        return rank
    top = weight.full if mode == "stacked" else min(weight.shared_dim, weight.private_dim)
    return max(1, math.floor(rank * top + 1e-9))  # 0.29 * 100 is 28.999...


def _least(weight: Weight, energy: float, scope: EnergyScope) -> int:
    held = weight.domain_energies if scope == "worst" else weight.energies[None]
    sums = held.cumsum(-1)
    return max(1, int((sums < energy * sums[:, -1:]).sum(-1).max()) + 1)


def _choose(weight: Weight, asked: int) -> Choice:
    """A rank as far as the weight has components, or dense from where that is no larger."""
    kept = min(asked, len(weight.energies))
    rank = None if kept > weight.ends else kept
    return Choice(rank, weight.retained(rank), clamped=asked > len(weight.energies))


def _size(weight: Weight, rank: int | None) -> int:
    return weight.dense if rank is None else rank * weight.component
