"""Averaged weights: an exponential moving average of what trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mdltool.model import MultiDomainModel


class Average:
    """shadow <- decay * shadow + (1 - decay) * weights after every update; of trainable parameters.

    Early on the decay is at most (1 + n) / (10 + n) after n updates, so that the start does not linger.
    """

    def __init__(self, model: MultiDomainModel, decay: float) -> None:
        self.decay = decay
        self._live = {k: t for k, t in model.tensors().items() if isinstance(t, torch.nn.Parameter)}
        self.shadow = {key: tensor.detach().clone() for key, tensor in self._live.items()}

    def load(self, stored: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint's shadow."""
        with torch.no_grad():
            for key, tensor in self.shadow.items():
                tensor.copy_(stored[key])

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """updates: done before this one."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(list(self.shadow.values()), list(self._live.values()), 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights meanwhile."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for key, tensor in self._live.items():
            kept = tensor.clone()
            tensor.copy_(self.shadow[key])
            self.shadow[key].copy_(kept)
