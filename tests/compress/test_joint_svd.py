"""Joint SVD: spec residual_adapters 2.5, 6.7 to 6.10, 7.5 and 7.6, against numpy's SVD and least squares."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mdltool.compress.joint_svd import Factors, decompose, grow, project
from mdltool.errors import MdlError

# leading dimensions, shared side, private side, domains
CASES = {
    "square": ((), 6, 6, 3),
    "wide": ((), 4, 9, 3),
    "tall": ((), 30, 4, 3),
    "one domain": ((), 7, 5, 1),
    "stem": ((), 32, 3, 9),
    "one column": ((), 8, 1, 4),
    "one row": ((), 1, 5, 3),
    "heads": ((7,), 12, 3, 4),
    "wide heads": ((2, 3), 4, 6, 2),
}


def domains(case: str, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    batch, shared, private, count = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    options = {"dtype": torch.float64, "generator": generator} | options
    return {f"d{t}": (t + 1) * torch.randn(*batch, shared, private, **options) for t in range(count)}


def side_by_side(matrices: dict[str, Tensor]) -> np.ndarray:
    return np.concatenate([matrix.numpy() for matrix in matrices.values()], -1)


def error(matrices: dict[str, Tensor], factors: Factors) -> float:
    """Sum of squared differences, by numpy."""
    shared = factors.shared.numpy()
    return sum(((m.numpy() - shared @ factors.private[d].numpy()) ** 2).sum() for d, m in matrices.items())


def tails(matrices: dict[str, Tensor]) -> np.ndarray:
    """Eckart and Young's least error of each rank from 0."""
    energies = np.linalg.svd(side_by_side(matrices), compute_uv=False) ** 2
    energies = energies.reshape(-1, energies.shape[-1]).sum(0)
    return np.append(energies[::-1].cumsum()[::-1], 0.0)


def best_private(matrices: dict[str, Tensor], shared: np.ndarray) -> Factors:
    """The private factors that fit a shared one best, by least squares."""
    private = {d: torch.from_numpy(np.linalg.pinv(shared) @ m.numpy()) for d, m in matrices.items()}
    return Factors(torch.from_numpy(shared), private)


@pytest.mark.parametrize("scale", ["left", "sqrt", "right"])
@pytest.mark.parametrize("case", CASES)
def test_every_rank_reaches_the_eckart_young_optimum(case: str, scale: Any) -> None:
    matrices = domains(case)
    found, optimum = decompose(matrices), tails(matrices)
    assert found.max_rank == len(optimum) - 1 == min(CASES[case][1], CASES[case][2] * CASES[case][3])
    errors = [error(matrices, found.truncate(rank, scale=scale)) for rank in range(found.max_rank + 1)]
    np.testing.assert_allclose(errors[:-1], optimum[:-1], rtol=1e-10)
    assert errors[-1] < 1e-20 * optimum[0]
    assert all(after <= before for before, after in itertools.pairwise(errors))
    np.testing.assert_allclose(found.energies.numpy(), optimum[:-1] - optimum[1:], rtol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_full_rank_gives_the_matrices_back(case: str) -> None:
    matrices = domains(case)
    found = decompose(matrices)
    factors = found.truncate(found.max_rank)
    for domain, matrix in matrices.items():
        torch.testing.assert_close(factors.product(domain), matrix, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_both_sides_are_orthonormal(case: str) -> None:
    found = decompose(domains(case))
    for rank in (1, found.max_rank):
        identity = torch.eye(rank, dtype=torch.float64).expand(*CASES[case][0], rank, rank)
        left, private = found.truncate(rank, scale="right").shared, found.truncate(rank).private
        torch.testing.assert_close(left.mT @ left, identity, rtol=0, atol=1e-12)
        torch.testing.assert_close(sum(g @ g.mT for g in private.values()), identity, rtol=0, atol=1e-12)
        lengths = found.truncate(rank).shared.square().sum(-2).sqrt()
        torch.testing.assert_close(lengths, found.singular_values[..., :rank], rtol=1e-12, atol=0)


def test_graded_singular_values_keep_the_private_side_orthonormal() -> None:
    """Where a Gram matrix would lose all digits of the small ones."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(n, 8, generator=generator, dtype=torch.float64))[0] for n in (8, 20))
    sigma = 10.0 ** -torch.arange(8, dtype=torch.float64)
    found = decompose({"a": left * sigma @ right[:10].T, "b": left * sigma @ right[10:].T})
    torch.testing.assert_close(found.singular_values, sigma, rtol=1e-7, atol=0)
    private = found.truncate(8).private.values()
    identity = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(sum(g @ g.T for g in private), identity, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["square", "wide", "tall", "heads"])
def test_no_random_shared_factor_is_better(case: str) -> None:
    """With the best private factors there are for it: so no common left space is."""
    matrices = domains(case)
    found = decompose(matrices)
    for number in range(100):
        rank = 1 + number % (found.max_rank - 1)
        shape = (*CASES[case][0], CASES[case][1], rank)
        shared = np.random.default_rng(number).standard_normal(shape)
        assert error(matrices, found.truncate(rank)) < error(matrices, best_private(matrices, shared))


def test_nor_is_one_beside_it() -> None:
    matrices = domains("wide")
    factors = decompose(matrices).truncate(2)
    for number in range(20):
        moved = np.random.default_rng(number).standard_normal(factors.shared.shape) * 1e-3
        assert error(matrices, factors) < error(matrices, best_private(matrices, factors.shared.numpy() + moved))


@pytest.mark.parametrize("case", ["square", "wide", "tall", "heads"])
def test_permuted_domains_permute_the_private_factors_only(case: str) -> None:
    matrices = domains(case)
    one, other = decompose(matrices), decompose(dict(reversed(matrices.items())))
    assert other.domains == tuple(reversed(one.domains))
    one_factors, other_factors = (found.truncate(found.max_rank) for found in (one, other))
    torch.testing.assert_close(other_factors.shared, one_factors.shared, rtol=0, atol=1e-10)
    for domain in matrices:
        torch.testing.assert_close(other_factors.private[domain], one_factors.private[domain], rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", ["square", "wide", "tall", "heads"])
def test_scaled_matrices_scale_the_singular_values_only(case: str) -> None:
    matrices = domains(case)
    one, other = decompose(matrices), decompose({d: 3e-5 * matrix for d, matrix in matrices.items()})
    torch.testing.assert_close(other.singular_values, 3e-5 * one.singular_values, rtol=1e-12, atol=0)
    torch.testing.assert_close(other.left, one.left, rtol=0, atol=1e-10)
    for domain in matrices:
        torch.testing.assert_close(other.right[domain], one.right[domain], rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", ["square", "wide", "tall", "heads"])
def test_a_rotated_shared_side_rotates_the_shared_factor_only(case: str) -> None:
    matrices, size = domains(case), CASES[case][1]
    rotation = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(5)).double())[0]
    one, other = decompose(matrices), decompose({d: rotation @ matrix for d, matrix in matrices.items()})
    turned = rotation @ one.left
    signs = (turned * other.left).sum(-2).sign()  # the largest entry of a turned vector is another one
    torch.testing.assert_close(other.left, turned * signs[..., None, :], rtol=0, atol=1e-10)
    torch.testing.assert_close(other.singular_values, one.singular_values, rtol=1e-12, atol=0)
    for domain in matrices:
        torch.testing.assert_close(other.right[domain], signs[..., None] * one.right[domain], rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_the_largest_entry_of_a_left_vector_is_positive(case: str) -> None:
    left = decompose(domains(case)).left
    assert (left.amax(-2) == left.abs().amax(-2)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_input_is_decomposed_in_double(dtype: torch.dtype) -> None:
    matrices = {d: torch.nn.Parameter(matrix.to(dtype)) for d, matrix in domains("tall").items()}
    found, same = decompose(matrices), decompose({d: matrix.double() for d, matrix in matrices.items()})
    assert found.left.dtype is torch.float64
    assert not found.left.requires_grad
    assert torch.equal(found.singular_values, same.singular_values)


@pytest.mark.parametrize("case", ["square", "wide", "heads"])
@pytest.mark.parametrize("balance", ["none", "frobenius"])
def test_what_each_domain_retains(case: str, balance: Any) -> None:
    matrices = domains(case)
    found = decompose(matrices, balance=balance)
    for rank in range(found.max_rank + 1):
        factors = found.truncate(rank)
        for domain, held in found.domain_energies(rank).items():
            lost = float((matrices[domain] - factors.product(domain)).square().sum())
            assert found.norms[domain] == pytest.approx(float(matrices[domain].square().sum()), rel=1e-12)
            assert held == pytest.approx(found.norms[domain] - lost, rel=1e-9, abs=1e-9)


def test_balance_is_the_optimum_of_each_domains_own_fraction() -> None:
    matrices = domains("square") | {"loud": 1e3 * domains("square", seed=9)["d0"]}
    norms = {d: float(matrix.norm()) for d, matrix in matrices.items()}
    found = decompose(matrices, balance="frobenius")
    optimum = tails({d: matrix / norms[d] for d, matrix in matrices.items()})
    for rank in range(found.max_rank):
        factors = found.truncate(rank)
        lost = sum(float((matrices[d] - factors.product(d)).square().sum()) / norm**2 for d, norm in norms.items())
        assert lost == pytest.approx(optimum[rank], rel=1e-10)
    plain = decompose(matrices)
    assert found.domain_energies(2)["d0"] > plain.domain_energies(2)["d0"]
    assert found.domain_energies(2)["loud"] < plain.domain_energies(2)["loud"]


@pytest.mark.parametrize("case", ["square", "wide", "tall", "heads"])
def test_second_moments_give_the_least_error_of_the_outputs(case: str) -> None:
    matrices = domains(case)
    roots = domains(case, seed=4)
    roots = {d: root.mT @ root + torch.eye(root.shape[-1]) for d, root in roots.items()}  # any root will do
    moments = {d: root @ root.mT for d, root in roots.items()}
    found = decompose(matrices, second_moments=moments)
    optimum = tails({d: matrices[d] @ roots[d] for d in matrices})
    plain = decompose(matrices)
    for rank in range(1, found.max_rank):
        lost = error_of_outputs(matrices, found.truncate(rank), roots)
        assert lost == pytest.approx(optimum[rank], rel=1e-8)
        assert lost < error_of_outputs(matrices, plain.truncate(rank), roots)
    factors = found.truncate(found.max_rank)
    for domain, matrix in matrices.items():
        torch.testing.assert_close(factors.product(domain), matrix, rtol=0, atol=1e-9)


def error_of_outputs(matrices: dict[str, Tensor], factors: Factors, roots: dict[str, Tensor]) -> float:
    return sum(float(((matrix - factors.product(d)) @ roots[d]).square().sum()) for d, matrix in matrices.items())


@pytest.mark.parametrize("case", ["square", "wide", "tall", "heads"])
def test_singular_second_moments_lose_no_output_that_occurs(case: str) -> None:
    matrices = domains(case)
    inputs = {d: x[..., :1, :].mT for d, x in domains(case, seed=2).items()}  # each domain saw one input
    found = decompose(matrices, second_moments={d: x @ x.mT for d, x in inputs.items()})
    assert found.max_rank == len(matrices)
    factors = found.truncate(found.max_rank)
    for domain, x in inputs.items():
        torch.testing.assert_close(factors.product(domain) @ x, matrices[domain] @ x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("balance", ["none", "frobenius"])
@pytest.mark.parametrize("case", ["square", "wide", "tall", "heads"])
def test_a_zero_domain_has_a_zero_factor_and_moves_no_other(case: str, balance: Any) -> None:
    matrices = domains(case)
    with_zero = {"zero": torch.zeros_like(matrices["d0"])} | matrices
    one, other = decompose(matrices, balance=balance), decompose(with_zero, balance=balance)
    assert (other.right["zero"] == 0).all()
    assert one.max_rank == other.max_rank
    for domain in matrices:
        torch.testing.assert_close(other.right[domain], one.right[domain], rtol=0, atol=1e-10)


@pytest.mark.parametrize("balance", ["none", "frobenius"])
@pytest.mark.parametrize("case", CASES)
def test_all_zero(case: str, balance: Any) -> None:
    matrices = {d: torch.zeros_like(matrix) for d, matrix in domains(case).items()}
    moments = {d: torch.zeros(m.shape[-1], m.shape[-1]) for d, m in matrices.items()}
    for found in (decompose(matrices, balance=balance), decompose(matrices, second_moments=moments)):
        assert found.max_rank == 1
        for scale in ("left", "sqrt", "right"):
            factors = found.truncate(1, scale=scale)
            assert factors.shared.isfinite().all()
            assert all((factors.product(d) == 0).all() for d in matrices)


def test_components_of_rounding_are_dropped() -> None:
    low = {d: matrix[:, :3] @ matrix[:3] for d, matrix in domains("square").items()}
    common = low["d0"]
    found = decompose({"a": common, "b": -2 * common})
    assert found.max_rank == 3
    with pytest.raises(ValueError, match="rank 4 of 3"):
        found.truncate(4)
    torch.testing.assert_close(found.truncate(3).product("b"), -2 * common, rtol=0, atol=1e-12)


def test_heads_of_different_rank_have_zeros_where_one_has_fewer() -> None:
    full = domains("heads")
    matrices = {d: matrix.clone() for d, matrix in full.items()}
    for matrix in matrices.values():
        matrix[2] = 0
        matrix[3, :, 1:] = 0  # at most one column of each domain
    found = decompose(matrices)
    assert found.max_rank == 12
    assert (found.singular_values[2] == 0).all()
    assert (found.singular_values[3] > 0).sum() == 4
    for scale in ("left", "sqrt", "right"):
        factors = found.truncate(12, scale=scale)
        for domain, matrix in matrices.items():
            torch.testing.assert_close(factors.product(domain), matrix, rtol=0, atol=1e-10)


def test_heads_are_decomposed_apart() -> None:
    matrices = domains("heads")
    together = decompose(matrices)
    for head in range(7):
        alone = decompose({d: matrix[head] for d, matrix in matrices.items()})
        torch.testing.assert_close(together.left[head], alone.left, rtol=0, atol=1e-12)
        torch.testing.assert_close(together.singular_values[head], alone.singular_values)


@pytest.mark.parametrize("case", ["square", "wide", "tall", "heads"])
@pytest.mark.parametrize("scale", ["left", "sqrt", "right"])
def test_projecting_a_domain_of_its_own_gives_its_factor(case: str, scale: Any) -> None:
    matrices = domains(case)
    factors = decompose(matrices).truncate(3, scale=scale)
    for domain, matrix in matrices.items():
        private, lost = project(matrix, factors.shared)
        torch.testing.assert_close(private, factors.private[domain], rtol=0, atol=1e-10)
        assert lost == pytest.approx(error({domain: matrix}, factors))


@pytest.mark.parametrize("case", ["square", "wide", "tall", "heads"])
def test_projecting_a_new_domain_is_least_squares(case: str) -> None:
    new, shared = domains(case, seed=7)["d0"], domains(case, seed=8)["d0"][..., :3]  # no orthogonal columns
    fitted = best_private({"new": new}, shared.numpy())
    private, lost = project(new, shared)
    torch.testing.assert_close(private, fitted.private["new"], rtol=0, atol=1e-10)
    assert lost == pytest.approx(error({"new": new}, fitted))


def test_projecting_on_columns_that_are_zero_twice_or_of_very_different_length() -> None:
    new, shared = domains("square", seed=7)["d0"], domains("square", seed=8)["d0"]
    scaled = shared[:, :3] * torch.tensor([1e9, 1.0, 1e-9])
    private, lost = project(new, scaled)
    expected, least = project(new, shared[:, :3])
    torch.testing.assert_close(scaled @ private, shared[:, :3] @ expected, rtol=0, atol=1e-9)
    again = torch.cat([shared[:, :3], shared[:, :1], torch.zeros(6, 1)], -1)
    private, lost_again = project(new, again)
    assert private.isfinite().all()
    assert lost == pytest.approx(least)
    assert lost_again == pytest.approx(least)


@pytest.mark.parametrize("case", ["square", "tall", "heads"])
def test_grown_columns_hold_what_is_missing_best(case: str) -> None:
    factors = decompose(domains(case)).truncate(2)
    new = domains(case, seed=7)["d0"]
    private, lost = project(new, factors.shared)
    optimum = tails({"rest": new - factors.shared @ private})
    assert lost == pytest.approx(optimum[0])
    for k in (1, 2, 3):
        columns = grow(new, factors.shared, k)
        assert columns.shape == (*factors.shared.shape[:-1], k)
        crossed = factors.shared.mT @ columns
        torch.testing.assert_close(crossed, torch.zeros_like(crossed), rtol=0, atol=1e-9)
        identity = torch.eye(k, dtype=torch.float64).expand(*CASES[case][0], k, k)
        torch.testing.assert_close(columns.mT @ columns, identity, rtol=0, atol=1e-12)
        _, left_over = project(new, torch.cat([factors.shared, columns], -1))
        assert left_over == pytest.approx(optimum[k], rel=1e-9, abs=1e-18 * optimum[0])


def test_nothing_grows_where_nothing_is_missing() -> None:
    matrices = domains("wide")
    found = decompose(matrices)
    assert grow(matrices["d1"], found.truncate(found.max_rank).shared, 3).shape == (4, 0)
    assert grow(domains("wide", seed=3)["d0"], found.truncate(3).shared, 3).shape == (4, 1)
    assert grow(torch.zeros(4, 9), found.truncate(2).shared, 3).shape == (4, 0)


def test_the_number_of_threads_changes_no_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = {d: torch.randn(150, 128, generator=generator) for d in "ab"}
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            result = decompose(matrices)
            found.append((result.left, result.singular_values, *result.right.values()))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_refusals() -> None:
    with pytest.raises(MdlError, match=r"'b' has a matrix of \[3, 4\], that of 'a' one of \[3, 5\]"):
        decompose({"a": torch.ones(3, 5), "b": torch.ones(3, 4)})
    bad = torch.ones(3, 5)
    bad[1, 1] = torch.nan
    with pytest.raises(MdlError, match="'b' has values that are not finite") as caught:
        decompose({"a": torch.ones(3, 5), "b": bad}, where="block1.mlp/down")
    assert caught.value.where == "block1.mlp/down"
