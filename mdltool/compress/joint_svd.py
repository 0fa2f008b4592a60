"""Joint SVD of the domains' adapter matrices (RA section 3.3; spec residual_adapters 2.5).

The caller brings the weight of domain t into a matrix A_t, rows on the side that domains share, columns on their
private side, so that the spec's `share: left` and `right` are one case. A_t ~ B G_t with the shared factor B and
the private G_t. Leading dimensions are independent matrices, such as the heads of an adapter, of one common rank.
Everything is computed and returned in float64.

Shapes: S shared side, P private side, T domains, N components, K of them kept, `*batch` independent matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mdltool.errors import MdlError

Balance = Literal["none", "frobenius"]
Scale = Literal["left", "sqrt", "right"]

NEGLIGIBLE = 1e-12  # of the largest singular value of the same matrix (spec 6.10)


@dataclass(frozen=True)
class Factors:
    """A weight of all domains. shared: [*batch, S, K]; private: domain -> [*batch, K, P]."""

    shared: Tensor
    private: dict[str, Tensor]

    def product(self, domain: str) -> Tensor:
        """What stands for A_t, [*batch, S, P]."""
        return self.shared @ self.private[domain]


@dataclass(frozen=True)
class Decomposition:
    """A_t = left diag(singular_values) right_t, or its best approximation where singular values were dropped.

    shape: of each domain's matrix, [*batch, S, P]. left: orthonormal columns, [*batch, S, N]. singular_values:
    non-increasing, 0 where a matrix of the batch has fewer than another, [*batch, N]. right: domain ->
    [*batch, N, P]; without balance and second moments, side by side they have orthonormal rows. components: domain
    -> what each component holds of its squared norm, summed over the batch, [N]. norms: domain -> its squared norm.
    With second moments, components and norms are those of A_t C_t^{1/2}: of outputs instead of weights.
    """

    shape: torch.Size
    left: Tensor
    singular_values: Tensor
    right: dict[str, Tensor]
    components: dict[str, Tensor]
    norms: dict[str, float]

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.right)

    @property
    def max_rank(self) -> int:
        """Components that are there to keep: those of the numerical rank, but 1 where all is zero (spec 6.8)."""
        return self.singular_values.shape[-1]

    @property
    def energies(self) -> Tensor:
        """Squared singular values of the matrices side by side, summed over the batch, non-increasing, [N].

        With balance they are those of the balanced matrices.
        """
        return _over_batch(self.singular_values.square())

    def domain_energies(self, rank: int) -> dict[str, float]:
        """What `rank` components retain of each domain's squared norm."""
        return {domain: float(held[:rank].sum()) for domain, held in self.components.items()}

    def truncate(self, rank: int, *, scale: Scale = "left") -> Factors:
        """The first `rank` components, 0 to max_rank. scale: which factor holds the singular values, or their root
        both; the product is the same.
        """
        if not 0 <= rank <= self.max_rank:
            raise ValueError(f"rank {rank} of {self.max_rank}")
        sigma = self.singular_values[..., :rank]
        in_shared = sigma ** {"left": 1.0, "sqrt": 0.5, "right": 0.0}[scale]
        in_private = sigma ** {"left": 0.0, "sqrt": 0.5, "right": 1.0}[scale]
        private = {domain: in_private[..., None] * rows[..., :rank, :] for domain, rows in self.right.items()}
        return Factors(self.left[..., :rank] * in_shared[..., None, :], private)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The last bits of LAPACK's results depend on the number of threads. They also wait for each other at every
    column, which on a machine with other work takes many times as long as one thread.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def decompose(
    matrices: Mapping[str, Tensor],
    *,
    balance: Balance = "none",
    second_moments: Mapping[str, Tensor] | None = None,
    where: str | None = None,
) -> Decomposition:
    """One SVD of the domains' matrices side by side, [*batch, S, T P].

    The sign makes the largest entry of each left vector positive. For one domain it is that matrix's own SVD: the
    independent form is a call for each domain.

    matrices: domain -> A_t, [*batch, S, P], of any dtype. balance: `frobenius` divides A_t by its norm (over the
    batch) first and multiplies its factor by it again, so that no domain outweighs another. second_moments: domain
    -> C_t = E[x x^T] of what enters A_t, [P, P] or [*batch, P, P]; then the outputs' error is minimised, that of
    A_t C_t^{1/2}. The private factor is undone by projecting A_t itself on the left vectors: the same as
    multiplying by C_t^{-1/2} where that exists, and elsewhere it keeps what the calibration did not see.

    Raises MdlError, of the weight that `where` names, for matrices of different shapes and for values that are not
    finite.
    """
    weights = {domain: matrix.detach().double() for domain, matrix in matrices.items()}
    _check(weights, where)
    whitened = weights if second_moments is None else _whiten(weights, second_moments)
    norms = {domain: float(matrix.square().sum()) for domain, matrix in whitened.items()}
    lengths = {domain: norm**0.5 if balance == "frobenius" and norm else 1.0 for domain, norm in norms.items()}
    left, sigma, side_by_side = _svd(torch.cat([whitened[d] / lengths[d] for d in weights], -1))
    shape = next(iter(weights.values())).shape
    blocks = dict(zip(weights, side_by_side.split(shape[-1], -1), strict=True))
    # Rounding leaves 1e-17 where a domain is zero.
    blocks = {d: torch.where(_is_zero(whitened[d]), 0.0, rows * lengths[d]) for d, rows in blocks.items()}
    held = {d: _over_batch((sigma[..., None] * rows).square().sum(-1)) for d, rows in blocks.items()}
    if second_moments is not None:
        inverse = torch.where(sigma > 0, 1 / sigma, 0.0)
        blocks = {d: inverse[..., None] * (left.mT @ weights[d]) for d in weights}
    return Decomposition(shape, left, sigma, blocks, held, norms)


@_one_thread()
def project(matrix: Tensor, shared: Tensor) -> tuple[Tensor, float]:
    """A new domain on a fixed shared factor, by least squares (spec 2.5).

    matrix: [*batch, S, P]; shared: [*batch, S, K], of any scale. Returns its private factor, [*batch, K, P], and
    the squared norm that the shared factor cannot hold.
    """
    matrix, shared = matrix.detach().double(), shared.detach().double()
    lengths = torch.linalg.vector_norm(shared, dim=-2, keepdim=True)
    lengths = torch.where(lengths > 0, lengths, 1.0)  # unit columns: their scale is no matter of rank
    private = (torch.linalg.pinv(shared / lengths) @ matrix) / lengths.mT
    return private, float((matrix - shared @ private).square().sum())


@_one_thread()
def grow(matrix: Tensor, shared: Tensor, k: int) -> Tensor:
    """Columns for the shared factor: the k leading left vectors of what it cannot hold of `matrix`, orthonormal and
    orthogonal to it, [*batch, S, k]; fewer where no more is missing.
    """
    private, _ = project(matrix, shared)
    matrix = matrix.detach().double()
    left, sigma, _ = _svd(matrix - shared.detach().double() @ private)
    sizes = torch.linalg.matrix_norm(matrix)[..., None]
    missing = int((sigma > NEGLIGIBLE * sizes).sum(-1).max())
    return left[..., : min(k, missing)]


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [*batch, S, N], singular values [*batch, N] and V^T [*batch, N, Q]; N is at least 1."""
    # LAPACK needs half the time for a tall matrix.
    right_T, sigma, left_T = torch.linalg.svd(matrix.mT, full_matrices=False)
    left, right = left_T.mT, right_T.mT
    counts = sigma > NEGLIGIBLE * sigma[..., :1]
    kept = max(1, int(counts.sum(-1).max()))
    left, sigma, right, counts = left[..., :kept], sigma[..., :kept], right[..., :kept, :], counts[..., :kept]
    largest = left.gather(-2, left.abs().argmax(-2, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)
    right = torch.where(counts[..., None], right * signs.mT, 0.0)
    return left * signs, torch.where(counts, sigma, 0.0), right


def _whiten(weights: Mapping[str, Tensor], second_moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A_t C_t^{1/2}."""
    whitened = {}
    for domain, matrix in weights.items():
        values, vectors = torch.linalg.eigh(second_moments[domain].to(matrix))
        rounding = values.shape[-1] * torch.finfo(values.dtype).eps * values[..., -1:]
        roots = torch.where(values > rounding, values, 0.0).sqrt()
        whitened[domain] = matrix @ (vectors * roots[..., None, :] @ vectors.mT)
    return whitened


def _over_batch(values: Tensor) -> Tensor:
    """[*batch, N] summed to [N]."""
    return values.reshape(-1, values.shape[-1]).sum(0)


def _is_zero(matrix: Tensor) -> Tensor:
    """[*batch, 1, 1]"""
    return (matrix == 0).all(-1, keepdim=True).all(-2, keepdim=True)


def _check(weights: Mapping[str, Tensor], where: str | None) -> None:
    first = next(iter(weights))
    for domain, matrix in weights.items():
        if matrix.shape != weights[first].shape:
            raise MdlError(
                f"the adapter of '{domain}' has a matrix of {list(matrix.shape)}, that of '{first}' one of "
                f"{list(weights[first].shape)}; they cannot share a factor",
                where,
                "compress models whose domains have the same adapters with the same options",
            )
        if not matrix.isfinite().all():
            raise MdlError(
                f"the adapter of '{domain}' has values that are not finite", where, f"train '{domain}' again"
            )
