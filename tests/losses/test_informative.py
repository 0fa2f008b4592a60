"""Informative loss: hand values, numpy, invariances, gradients (spec multitrain 2.4 and 7.1, 7.2)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mdltool.losses.informative import Expander, defined, informative_loss


def by_numpy(z: np.ndarray, eps: float = 1e-4) -> tuple[float, float]:
    cov = np.cov(z, rowvar=False, ddof=1)
    off = cov[~np.eye(len(cov), dtype=bool)]
    return float(np.maximum(0, 1 - np.sqrt(np.diag(cov) + eps)).mean()), float((off**2).sum() / len(cov))


@pytest.mark.parametrize(
    ("rows", "variance", "covariance"),
    [
        ([[1, 2], [3, 0], [5, 4]], 0.0, 4.0),
        ([[0, 0], [0.5, -0.5], [1, 0.5], [0.5, 0]], 0.59163, 0.0069444),
    ],
)
def test_hand_values(rows: list[list[float]], variance: float, covariance: float) -> None:
    found = informative_loss(torch.tensor(rows))
    assert float(found[0]) == pytest.approx(variance, abs=1e-5)
    assert float(found[1]) == pytest.approx(covariance, abs=1e-7)


@pytest.mark.parametrize("shape", [(2, 5), (7, 3), (64, 48)])
@pytest.mark.parametrize("scale", [0.1, 0.9, 3.0])
def test_against_numpy(shape: tuple[int, int], scale: float) -> None:
    z = np.random.default_rng(0).normal(2.0, scale, shape)
    expected = by_numpy(z, 1e-3)
    found = informative_loss(torch.from_numpy(z), 1e-3)
    assert [float(part) for part in found] == pytest.approx(expected, rel=1e-12)
    single = informative_loss(torch.from_numpy(z).float(), 1e-3)
    assert [float(part) for part in single] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_invariances() -> None:
    z = torch.randn(9, 6, dtype=torch.float64)
    covariance = float(informative_loss(z)[1])
    assert float(informative_loss(z + torch.randn(6, dtype=torch.float64))[1]) == pytest.approx(covariance)
    assert float(informative_loss(3 * z)[1]) == pytest.approx(81 * covariance)
    assert float(informative_loss(z / z.std(dim=0))[0]) == 0.0


def test_gradient_is_right_and_finite_for_constant_dimensions() -> None:
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(informative_loss, (z,))
    for rows in (torch.ones(5, 4), torch.cat([torch.ones(5, 1), torch.randn(5, 3)], 1)):
        rows.requires_grad_()
        variance, covariance = informative_loss(rows)
        (variance + covariance).backward()
        assert rows.grad is not None
        assert rows.grad.isfinite().all()
    assert float(informative_loss(torch.ones(5, 4))[0]) == pytest.approx(1 - 0.01)


@pytest.mark.parametrize("clips", [0, 1])
def test_fewer_than_two_clips_have_none(clips: int) -> None:
    z = torch.randn(clips, 4, requires_grad=True)
    assert not defined(z)
    variance, covariance = informative_loss(z)
    assert (variance.item(), covariance.item()) == (0.0, 0.0)
    (variance + covariance).backward()
    assert z.grad is not None
    assert not z.grad.any()
    assert defined(torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    z = (torch.randn(32, 16) * 100).to(dtype)  # squares overflow in float16
    expected = by_numpy(z.double().numpy())
    with torch.autocast("cpu", torch.bfloat16):
        found: tuple[Tensor, Tensor] = informative_loss(z)
    assert found[1].dtype == torch.float32
    assert float(found[1]) == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.parametrize(("hidden", "parameters"), [(4096, 6_296_320), (2048, 3_148_544)])
def test_expander(hidden: int, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in Expander(768, hidden).parameters()) == parameters
    expander = Expander(3, 8).double()
    z = torch.randn(4, 3, dtype=torch.float64)
    w = {name: p.detach().numpy() for name, p in expander.named_parameters()}
    inner = z.numpy() @ w["expand.weight"].T + w["expand.bias"]
    gelu = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / np.sqrt(2)))
    expected = gelu @ w["out.weight"].T + w["out.bias"]
    np.testing.assert_allclose(expander(z).detach().numpy(), expected, rtol=1e-12)
