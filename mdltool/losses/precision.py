"""Losses are computed in float32 whatever the network runs in (spec multitrain 5.4 and 6.10)."""

from __future__ import annotations

import torch
from torch import Tensor


def full(x: Tensor) -> Tensor:
    """x in float32; float64 stays, for whoever computes in it throughout."""
    return x if x.dtype == torch.float64 else x.float()


def no_autocast(x: Tensor) -> torch.autocast:
    """A region in which products of x are not cast down, which `full` alone would not prevent."""
    return torch.autocast(x.device.type, enabled=False)
