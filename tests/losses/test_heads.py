"""Heads (spec multitrain 2.2)."""

from __future__ import annotations

import pytest
import torch

from mdltool.heads import MlpHead


@pytest.mark.parametrize(
    ("classes", "parameters"),
    [((400, 305, 174, 200), 8_510_519), ((700, 305, 174, 200), 9_125_219), ((400, 305, 174), 6_525_807)],
)
def test_counts(classes: tuple[int, ...], parameters: int) -> None:
    with torch.device("meta"):
        heads = [MlpHead(768, outputs) for outputs in classes]
    assert sum(p.numel() for head in heads for p in head.parameters()) == parameters


def test_values_and_dropout() -> None:
    torch.manual_seed(0)
    head, x = MlpHead(4, 50, hidden=16), torch.randn(3, 2, 4)
    expected = torch.nn.functional.gelu(x @ head.hidden.weight.T + head.hidden.bias) @ head.out.weight.T
    torch.testing.assert_close(head.eval()(x), expected + head.out.bias)
    assert not torch.equal(head.train()(x), head(x))  # after the activation
    assert (head(x) != 0).all()  # and not on the logits


def test_logit_dropout_zeroes_logits_in_training_only() -> None:
    torch.manual_seed(0)
    head, x = MlpHead(4, 500, hidden=16, logit_dropout=True), torch.randn(2, 4)
    head.dropout.p = 0.0
    whole, dropped = head.eval()(x), head.train()(x)
    kept = dropped != 0
    assert 0.4 < float(kept.float().mean()) < 0.6
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])
