"""Informative loss: variance and covariance of expanded embeddings over a mixed batch (Liang et al. 2022, eqs. 2
and 3, with the corrections of spec multitrain 2.4 and 8).

Shape suffixes: B clips of the whole batch, D embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mdltool.losses.precision import full, no_autocast


class Expander(nn.Module):
    """e(z): Linear(D, H) - GELU - Linear(H, D), for training only; 2DH + H + D parameters (spec multitrain 2.2)."""

    def __init__(self, features: int, hidden: int = 2048) -> None:
        super().__init__()
        self.expand = nn.Linear(features, hidden)
        self.out = nn.Linear(hidden, features)

    def forward(self, z_BD: Tensor) -> Tensor:
        out_BD: Tensor = self.out(nn.functional.gelu(self.expand(z_BD)))
        return out_BD


def defined(z_BD: Tensor) -> bool:
    """Whether the batch has a variance: it needs two clips."""
    return len(z_BD) > 1


def informative_loss(z_BD: Tensor, eps: float = 1e-4) -> tuple[Tensor, Tensor]:
    """(variance, covariance), scalars in float32 (float64 for float64), of expanded embeddings of any float dtype.

    variance = mean_j max(0, 1 - sqrt(Var_j + eps)); covariance = 1/D times the sum over i != j of Cov_ij^2; both
    with the divisor B - 1. The root contains eps, so that the gradient of a constant dimension is finite. Both are
    0 for a batch that is not `defined`. For uncorrelated features of variance 1 the covariance term is about
    (D - 1) / (B - 1) from sampling alone.
    """
    z_BD = full(z_BD)
    if not defined(z_BD):
        zero = (z_BD * 0).sum()  # part of the graph, so that backward works
        return zero, zero
    with no_autocast(z_BD):
        centred_BD = z_BD - z_BD.mean(dim=0)
        divisor = len(z_BD) - 1
        var_D = centred_BD.square().sum(dim=0) / divisor
        variance = (1 - (var_D + eps).sqrt()).clamp(min=0).mean()
        cov_DD = centred_BD.T @ centred_BD / divisor
        off_DD = cov_DD - torch.diag(cov_DD.diagonal())
        covariance = off_DD.square().sum() / z_BD.shape[1]
    return variance, covariance
