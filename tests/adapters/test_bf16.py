"""Gradients under bf16 autocast come from the numbers alone, not from what memory held before."""

from __future__ import annotations

import pytest
import torch

from mdltool.model import MultiDomainModel
from tests.adapters.test_contract import PAIRS, clip, make, randomise
from tests.memory import soil


def _gradients(model: MultiDomainModel, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    soil()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x, "a")
    soil()
    logits.float().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("adapter", "backbone"), PAIRS)
def test_gradients_repeat_exactly(adapter: str, backbone: str) -> None:
    model = make(adapter, backbone)
    randomise(model)
    model.apply_regime("joint", "frozen")
    x = clip(model).float()
    first, *others = (_gradients(model, x) for _ in range(3))
    assert all(torch.isfinite(gradient).all() for gradient in first.values())
    for other in others:
        assert all(torch.equal(first[name], gradient) for name, gradient in other.items())
