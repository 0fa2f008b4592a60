"""Weights of losses (spec multitrain 2.5 and 7.7)."""

from __future__ import annotations

import math

import pytest
import torch

from mdltool.errors import MdlError
from mdltool.losses import LOSSES, WEIGHTINGS
from mdltool.losses.weighting import FixedWeights, UncertaintyWeights


@pytest.mark.parametrize("half", [True, False])
def test_the_bracket_by_hand(half: bool) -> None:
    weights = UncertaintyWeights(["a", "b_c"], half)
    with torch.no_grad():
        weights.log_variances["a"].fill_(0.3)
        weights.log_variances["b_c"].fill_(-1.2)
    terms = weights({"a": torch.tensor(2.0), "b_c": torch.tensor(0.7)}, share=0.25)
    factor = 0.5 if half else 1.0
    assert float(terms["a"]) == pytest.approx(math.exp(-0.3) * 2 * factor + 0.25 * 0.15)
    assert float(terms["b_c"]) == pytest.approx(math.exp(1.2) * 0.7 * factor - 0.25 * 0.6)
    terms["a"].backward()
    assert float(weights.log_variances["a"].grad or 0) == pytest.approx(-math.exp(-0.3) * 2 * factor + 0.125)


@pytest.mark.parametrize(("loss", "value"), [(2.0, 0.84657), (5.0, 1.30472)])
def test_descent_converges_to_the_log_of_a_constant_loss(loss: float, value: float) -> None:
    weights = UncertaintyWeights(["a", "absent"])
    optimizer = torch.optim.AdamW(weights.parameters(), lr=0.05, weight_decay=0.0)
    with torch.no_grad():
        weights.log_variances["absent"].fill_(0.4)
    for update in range(600):
        optimizer.zero_grad()
        present = {"a": torch.tensor(loss)} | ({"absent": torch.tensor(1.0)} if update == 0 else {})
        total = sum(weights(present).values(), torch.zeros(()))
        total.backward()
        optimizer.step()
        if update == 0:
            after_one = float(weights.log_variances["absent"])
    assert float(weights.log_variances["a"]) == pytest.approx(math.log(loss), abs=1e-4)
    assert float(total) == pytest.approx(value, abs=1e-5)
    # Absent ever since, so that not even momentum moves it.
    assert float(weights.log_variances["absent"]) == after_one != pytest.approx(0.4)


def test_starts() -> None:
    assert all(float(s) == 0 for s in UncertaintyWeights(["a", "b"]).parameters())
    torch.manual_seed(0)
    sigma2 = [math.exp(s) for s in UncertaintyWeights([f"d{i}" for i in range(300)], init="uniform").parameters()]
    assert 0.2 <= min(sigma2) < 0.22
    assert 0.98 < max(sigma2) <= 1.0
    with pytest.raises(MdlError, match="'unifrom'"):
        UncertaintyWeights(["a"], init="unifrom")


def test_fixed() -> None:
    terms = FixedWeights({"a": 0.5})({"a": torch.tensor(3.0), "b": torch.tensor(2.0)}, share=0.5)
    assert {name: float(term) for name, term in terms.items()} == {"a": 1.5, "b": 2.0}
    assert not list(FixedWeights().parameters())


def test_the_tables_load() -> None:
    for table in (LOSSES, WEIGHTINGS):
        for name in table:
            assert table.name_of(table.load(name)) == name
