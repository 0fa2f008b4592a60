"""Weights of several losses: learned by uncertainty (Liang et al. 2022, eq. 6, after Kendall et al. 2018), or fixed
(spec multitrain 2.5).

A weighting takes the losses of what is present, by name, and returns the terms of the total. `share`: the part of
the terms without data that this call contributes, 1 / the number of calls whose totals are summed (6.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mdltool.errors import MdlError
from mdltool.registry import did_you_mean

SIGMA_INITS = ("one", "uniform")


class UncertaintyWeights(nn.Module):
    """exp(-s_k) L_k / 2 + s_k / 2 with a learned s_k = log sigma_k^2 for every name; no weight decay is for them.

    half: the 1/2 before L_k, of the paper; without it the form for classification. init: sigma 1, or sigma^2
    uniform in 0.2..1. Each s_k is a parameter of its own: one whose domain is absent has no gradient at all, so
    that no optimizer moves it.
    """

    def __init__(self, names: Iterable[str], half: bool = True, init: str = "one") -> None:
        super().__init__()
        if init not in SIGMA_INITS:
            where = "weights.sigma_init"
            raise MdlError(f"there is no start of sigma '{init}'", where, did_you_mean(init, SIGMA_INITS))
        self.factor = 0.5 if half else 1.0
        self.log_variances = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in names})
        if init == "uniform":
            with torch.no_grad():
                for s in self.log_variances.values():
                    s.uniform_(0.2, 1.0).log_()

    def forward(self, losses: Mapping[str, Tensor], share: float = 1.0) -> dict[str, Tensor]:
        """name -> its bracket, for the names in `losses`; an absent name has none, or s would fall for ever."""
        terms = {}
        for name, loss in losses.items():
            s = self.log_variances[name]
            terms[name] = torch.exp(-s) * loss * self.factor + s * (share / 2)
        return terms


class FixedWeights(nn.Module):
    """w_k L_k; a name without a weight has 1."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.weights = dict(weights or {})

    def forward(self, losses: Mapping[str, Tensor], share: float = 1.0) -> dict[str, Tensor]:
        """name -> its term, for the names in `losses`."""
        return {name: self.weights.get(name, 1.0) * loss for name, loss in losses.items()}
