"""Ranks by number, energy and budget: spec residual_adapters 2.5, 3.1, 6.7, 7.3 and 7.8, against their definitions
written out.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mdltool.adapters.base import AnyAdapter
from mdltool.compress.joint_svd import decompose
from mdltool.compress.ranks import Choice, Weight, by_budget, by_energy, by_rank, parse_budget, stored
from mdltool.errors import MdlError
from mdltool.model_spec import AdapterSpec, ModelSpec, build_backbone, method_of, sites_of


def weight(
    name: str, shared: int, private: int, domains: int, energies: Sequence[float] = (), batch: int = 1
) -> Weight:
    """A weight with given energies, else those of full rank, all equal; each domain has the same part of them."""
    held = torch.tensor(energies or [1.0] * min(shared, domains * private), dtype=torch.float64)
    return Weight(name, shared, private, domains, batch, held, (held / domains).expand(domains, -1))


def random_weights(seed: int, most: int = 8, side: int = 24) -> list[Weight]:
    """Weights of any shape, number of domains, batch, rank and decay, some of them zero."""
    rng = np.random.default_rng(seed)
    weights = []
    for number in range(rng.integers(1, most + 1)):
        shared, private = (int(n) for n in rng.integers(1, side + 1, 2))
        domains, batch = int(rng.integers(1, 6)), int(rng.choice([1, 1, 3]))
        rank = min(shared, domains * private)
        if rng.random() < 0.2:
            rank = int(rng.integers(1, rank + 1))
        decay = rng.choice([0.0, 0.5, 2.0, 6.0])
        energies = np.sort(rng.random(rank))[::-1] * (1 + np.arange(rank)) ** -decay * 10.0 ** rng.integers(-3, 4)
        energies *= rng.random() > 0.1
        weights.append(weight(f"w{number}", shared, private, domains, energies.tolist(), batch))
    return weights


# ---- counts of spec 3.1 ----


@functools.cache
def adapters_of(backbone: str, frames: int, crop: int, adapter: str) -> tuple[AnyAdapter, ...]:
    """One domain's adapters at all sites, without storage."""
    entry = AdapterSpec(adapter, "all")
    spec = ModelSpec(backbone, {}, frames, crop, {"a": 2}, [entry])
    with torch.device("meta"):
        method, options = method_of(entry)
        (sites,) = sites_of(build_backbone(spec), [(entry, method, options)])
        return tuple(method(site, options) for site in sites)


def matrices_of(adapters: Sequence[AnyAdapter]) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for adapter in adapters for p in adapter.parameters() if p.ndim > 1]


def size(adapters: Sequence[AnyAdapter]) -> int:
    return sum(p.numel() for adapter in adapters for p in adapter.parameters())


def resnet26(domains: int, share: str = "left") -> list[Weight]:
    adapters = adapters_of("resnet26", 1, 64, "parallel")
    sides = [shape[:2] if share == "left" else shape[1::-1] for shape in matrices_of(adapters)]
    return [weight(f"w{number}", *pair, domains) for number, pair in enumerate(sides)]


def shared_size(weights: Sequence[Weight], choices: Mapping[str, Choice]) -> int:
    return sum((choices[w.name].rank or 0) * w.batch * w.shared_dim for w in weights)


FILTERS = 5_806_944  # 3x3 filters of ResNet-26


@pytest.mark.parametrize(
    ("mode", "share", "total", "shared", "private", "ratio"),
    [
        ("per_domain", "left", 3_128_891, 322_592, 311_811, 1.539),
        ("stacked", "left", 3_247_871, 344_480, 322_599, 1.559),
        ("per_domain", "right", 3_215_139, 311_811, 322_592, 1.554),
    ],
)
def test_resnet26_of_nine_domains(
    mode: Any, share: str, total: int, shared: int, private: int, ratio: float
) -> None:
    weights = resnet26(9, share)
    assert len(weights) == 25
    assert sum(w.dense for w in weights) == FILTERS
    choices = by_rank(weights, 0.5, mode)
    assert stored(weights, choices) == total == shared + 9 * private
    assert shared_size(weights, choices) == shared
    assert round((FILTERS + total) / FILTERS, 3) == ratio


def test_resnet26_ranks() -> None:
    weights = resnet26(9)
    choices = by_rank(weights, 0.5)
    found = {(w.private_dim, w.shared_dim): choices[w.name].rank for w in weights}
    assert found == {
        (3, 32): 1,
        (32, 64): 16,
        (64, 64): 32,
        (64, 128): 32,
        (128, 128): 64,
        (128, 256): 64,
        (256, 256): 128,
    }


def test_resnet26_of_fewer_domains() -> None:
    alone = resnet26(1)
    choices = by_rank(alone, 0.5)
    assert stored(alone, choices) == 634_403
    assert all((choices[w.name].rank is None) == (w.shared_dim == w.private_dim) for w in alone)  # 2 K C = C C
    three = resnet26(3)
    assert round(stored(three, by_rank(three, 0.5, "stacked")) / sum(w.dense for w in three), 3) == 0.678


@pytest.mark.parametrize(
    ("adapter", "domains", "dense", "shared", "private", "total"),
    [
        ("2d", 3, 1_340_928, 24_768, 224_064, 696_960),
        ("2plus1d", 3, 1_787_904, 49_536, 298_752, 945_792),
        ("3d", 3, 4_015_872, 24_768, 669_888, 2_034_432),
        ("2plus1d", 10, 5_959_680, 49_536, 298_752, 3_037_056),
    ],
)
def test_x3d_m(adapter: str, domains: int, dense: int, shared: int, private: int, total: int) -> None:
    adapters = adapters_of("x3d_m", 16, 224, adapter)
    weights = []
    for number, (outputs, inputs, *kernel) in enumerate(matrices_of(adapters)):
        right = adapter == "2plus1d" and kernel[0] == 1  # the spatial part shares its input side
        sides = (inputs, outputs) if right else (outputs, inputs)
        weights.append(weight(f"w{number}", sides[0], sides[1] * math.prod(kernel), domains))
    kept = domains * size(adapters) - sum(w.dense for w in weights)  # biases and norms
    choices = by_rank(weights, 0.5)
    assert domains * size(adapters) == dense
    assert shared_size(weights, choices) == shared
    assert stored(weights, choices) + kept == total == shared + domains * private


def test_modes_differ_where_a_matrix_is_not_square() -> None:
    bottleneck = [weight("down", 768, 192, 3)]
    assert bottleneck[0].dense == 442_368
    one, other = by_rank(bottleneck, 0.5), by_rank(bottleneck, 0.5, "stacked")
    assert (one["down"].rank, stored(bottleneck, one)) == (96, 129_024)
    assert (other["down"].rank, stored(bottleneck, other)) == (288, 387_072)


# ---- by rank ----


@pytest.mark.parametrize("seed", range(20))
def test_a_rank_and_what_it_stores(seed: int) -> None:
    weights = random_weights(seed)
    for rank in (1, 2, 5, 40, 0.01, 0.29, 0.5, 0.99):
        for mode in ("per_domain", "stacked"):
            for w, choice in zip(weights, by_rank(weights, rank, mode).values(), strict=True):  # type: ignore[arg-type]
                top = min(w.shared_dim, (1 if mode == "per_domain" else w.domains) * w.private_dim)
                asked = rank if isinstance(rank, int) else max(1, round(rank * 100) * top // 100)
                kept = min(asked, len(w.energies))
                cost = kept * w.batch * (w.shared_dim + w.domains * w.private_dim)
                dense = w.batch * w.domains * w.shared_dim * w.private_dim
                assert choice.rank == (None if cost >= dense else kept)
                assert choice.clamped == (asked > len(w.energies))
                assert stored([w], {w.name: choice}) == min(cost, dense)
                total = w.energies.sum()
                expected = 1.0 if choice.rank is None or total == 0 else float(w.energies[:kept].sum() / total)
                assert choice.retained == pytest.approx(expected)


def test_half_of_the_smaller_side_is_never_larger_than_dense() -> None:
    for seed in range(50):
        for w in random_weights(seed):
            side = min(w.shared_dim, w.private_dim)
            assert side == 1 or side // 2 * w.component <= w.dense


def test_a_weight_of_a_decomposition() -> None:
    generator = torch.Generator().manual_seed(0)
    found = decompose({d: torch.randn(3, 6, 4, generator=generator) for d in "abc"})
    w = Weight.of("up", found)
    assert (w.name, w.shared_dim, w.private_dim, w.domains, w.batch) == ("up", 6, 4, 3, 3)
    factors = found.truncate(2)
    assert 2 * w.component == factors.shared.numel() + sum(g.numel() for g in factors.private.values())
    assert w.dense == 3 * 3 * 6 * 4
    assert torch.equal(w.energies, found.energies)
    held = w.domain_energies.cumsum(1)[:, 1].tolist()
    assert held == pytest.approx(list(found.domain_energies(2).values()))


@pytest.mark.parametrize("rank", [0, -1, 1.0, 1.5, 0.0, -0.5, math.nan, True])
def test_no_rank(rank: float) -> None:
    with pytest.raises(MdlError, match="is no rank"):
        by_rank([weight("w", 4, 4, 2)], rank)


# ---- by energy ----


@pytest.mark.parametrize("scope", ["joint", "worst"])
@pytest.mark.parametrize("energy", [0.05, 0.5, 0.9, 0.999, 1.0])
def test_energy_takes_the_least_rank(energy: float, scope: Any) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        # nine components of 160 numbers, so that none of these is stored dense
        thin = {d: torch.randn(2, 40, 3, generator=generator).double() for d in "abc"}
        matrices = {d: 10**n * x @ y.T for n, (d, (x, y)) in enumerate(thin.items())}
        found = decompose(matrices, balance="frobenius")
        assert found.max_rank == 9
        rank = by_energy([Weight.of("w", found)], energy, scope)["w"].rank
        assert rank is not None
        assert retains(found, rank, energy, scope)
        assert rank == 1 or not retains(found, rank - 1, energy, scope)
        assert energy < 1 or rank == 9


def test_energy_may_need_the_dense_form() -> None:
    w = weight("w", 4, 4, 2)  # four components of 12, dense 32
    assert [by_energy([w], energy)["w"].rank for energy in (0.25, 0.5, 0.51, 1.0)] == [1, 2, None, None]


def retains(found: Any, rank: int, energy: float, scope: str) -> bool:
    if scope == "joint":
        return bool(found.energies[:rank].sum() >= energy * found.energies.sum())
    held = found.domain_energies(rank)
    return all(held[d] >= energy * found.norms[d] * (1 - 1e-12) for d in held)


def test_energy_of_nothing_keeps_one_component() -> None:
    assert by_energy([weight("w", 9, 2, 3, [0.0])], 0.9) == {"w": Choice(1, 1.0)}


@pytest.mark.parametrize("energy", [0.0, -1, 1.1, math.nan])
def test_no_energy(energy: float) -> None:
    with pytest.raises(MdlError, match="is no fraction"):
        by_energy([weight("w", 4, 4, 2)], energy)


# ---- by budget ----


def forms(w: Weight, weighting: str, min_rank: int = 1) -> list[tuple[int, float]]:
    """Size and weighted energy of each form a weight can take, by definition."""
    energies = w.energies.tolist()
    scale = 1.0 if weighting == "frobenius" else 1 / (sum(energies) or 1)
    component = w.batch * (w.shared_dim + w.domains * w.private_dim)
    dense = w.batch * w.domains * w.shared_dim * w.private_dim
    found = [(k * component, scale * sum(energies[:k])) for k in range(min_rank, len(energies) + 1)]
    return [form for form in found if form[0] < dense] + [(dense, scale * sum(energies))]


def value(weights: Sequence[Weight], choices: Mapping[str, Choice], weighting: str) -> float:
    """Weighted energy that choices retain."""
    total = 0.0
    for w in weights:
        energies, rank = w.energies.tolist(), choices[w.name].rank
        total += sum(energies[:rank]) * (1.0 if weighting == "frobenius" else 1 / (sum(energies) or 1))
    return total


UNIFORM = [(rank, "per_domain") for rank in (1, 2, 3, 5, 8, 13)] + [
    (fraction, mode) for fraction in (0.1, 0.25, 1 / 3, 0.5, 0.75, 0.9) for mode in ("per_domain", "stacked")
]


@pytest.mark.parametrize("weighting", ["relative", "frobenius"])
@pytest.mark.parametrize("seed", range(60))
def test_a_budget_is_never_worse_than_the_uniform_rank_of_its_size(seed: int, weighting: Any) -> None:
    weights = random_weights(seed)
    for rank, mode in UNIFORM:
        uniform = by_rank(weights, rank, mode)  # type: ignore[arg-type]
        budget = stored(weights, uniform)
        choices = by_budget(weights, budget, weighting)
        assert stored(weights, choices) <= budget
        least = value(weights, uniform, weighting)
        assert value(weights, choices, weighting) >= least * (1 - 1e-12)


@pytest.mark.parametrize("min_rank", [0, 1, 3])
@pytest.mark.parametrize("weighting", ["relative", "frobenius"])
def test_no_further_component_fits_a_budget(weighting: Any, min_rank: int) -> None:
    for seed in range(12):
        weights = random_weights(seed)
        dense = sum(w.dense for w in weights)
        least = sum(min(min(min_rank, len(w.energies)) * w.component, w.dense) for w in weights)
        for fraction in (0.0, 0.1, 0.4, 0.8, 1.0):
            budget = least + int(fraction * (dense - least))
            choices = by_budget(weights, budget, weighting, min_rank)
            left = budget - stored(weights, choices)
            assert left >= 0
            for w in weights:
                rank = choices[w.name].rank
                if rank is None or w.energies[rank:].sum() == 0:
                    continue  # all of it is there
                assert rank >= min(min_rank, len(w.energies))
                assert w.energies[rank] == 0 or min(w.component, w.dense - rank * w.component) > left
        assert all(choice.retained == pytest.approx(1) for choice in choices.values())  # of the whole dense size


@pytest.mark.parametrize("weighting", ["relative", "frobenius"])
def test_a_budget_where_a_step_ends_is_the_best_of_all_choices(weighting: Any) -> None:
    """What is best at a price per number is best for its size: the choices of every price, by trying all."""
    tried = 0
    for seed in range(40):
        weights = random_weights(seed, most=3, side=6)
        tables = [forms(w, weighting) for w in weights]
        for price in np.random.default_rng(seed).random(10) ** 4 / 20:
            best = max(
                itertools.product(*tables), key=lambda chosen: sum(worth - price * size for size, worth in chosen)
            )
            budget, worth = (sum(column) for column in zip(*best, strict=True))
            choices = by_budget(weights, budget, weighting)
            assert stored(weights, choices) <= budget
            assert value(weights, choices, weighting) == pytest.approx(worth, rel=1e-12)
            tried += 0 < budget < sum(w.dense for w in weights)
    assert tried > 50


@pytest.mark.parametrize("seed", range(10))
def test_components_of_one_size_are_chosen_best_at_every_budget(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = [
        weight(f"w{n}", 6, 5, 3, np.sort(rng.random(4) ** 3)[::-1].tolist()) for n in range(3)
    ]  # rank 4 at most, 21 each, below the dense 90
    for budget in range(63, 260):
        best = max(
            sum(worth for _, worth in chosen)
            for chosen in itertools.product(*(forms(w, "frobenius") for w in weights))
            if sum(size for size, _ in chosen) <= budget
        )
        assert value(weights, by_budget(weights, budget, "frobenius"), "frobenius") == pytest.approx(best)


def test_relative_weighting_does_not_starve_a_small_weight() -> None:
    loud, quiet = weight("loud", 20, 9, 3, [900.0, 90.0, 9.0]), weight("quiet", 20, 9, 3, [0.6, 0.35, 0.05])
    budget = 4 * loud.component
    assert [c.rank for c in by_budget([loud, quiet], budget).values()] == [2, 2]
    assert [c.rank for c in by_budget([loud, quiet], budget, "frobenius").values()] == [3, 1]


def test_a_weight_without_energy_gets_no_more_than_the_least() -> None:
    weights = [weight("zero", 9, 9, 3, [0.0]), weight("w", 9, 9, 3)]
    assert by_budget(weights, 10**6)["zero"].rank == 1
    assert by_budget(weights, 10**6, min_rank=0)["zero"].rank == 0


def test_dense_is_taken_where_it_costs_less_than_the_components() -> None:
    w = weight("w", 4, 4, 2)  # a component 12, dense 32
    assert [by_budget([w], budget)["w"].rank for budget in (12, 23, 24, 31, 32, 99)] == [1, 1, 2, 2, None, None]


def test_a_budget_below_the_least_names_it() -> None:
    weights = [weight("a", 9, 9, 3), weight("b", 4, 4, 2)]
    with pytest.raises(MdlError) as caught:
        by_budget(weights, 47)
    assert caught.value.fix == "at least 48, or --min-rank 0, which drops whole adapters"
    assert stored(weights, by_budget(weights, 48)) == 48
    assert [c.rank for c in by_budget(weights, 35, min_rank=0).values()] == [0, None]
    with pytest.raises(MdlError) as caught:
        by_budget(weights, 100, min_rank=3)  # b is dense at 32 from there
    assert "at least 140" in str(caught.value.fix)
    with pytest.raises(MdlError, match="is no rank"):
        by_budget(weights, 100, min_rank=-1)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("123456", 123_456), ("300k", 300_000), ("1.2M", 1_200_000), ("0.5x", 500), ("1x", 1001), ("0.29M", 290_000)],
)
def test_budgets(text: str, numbers: int) -> None:
    assert parse_budget(text, 1001) == numbers


@pytest.mark.parametrize("text", ["", "half", "0", "0x", "-5", "0.5", "1.5", "2G", "1e6", "1,200", "x", "5 k"])
def test_no_budget(text: str) -> None:
    with pytest.raises(MdlError, match="is no budget"):
        parse_budget(text, 1001)
