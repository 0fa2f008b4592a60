"""Smoothed and mixed targets (spec multitrain 5.3 and 7.11)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mdltool.losses.targets import mixed_targets, soft_targets

DOMAINS = {"k": 400, "m": 305, "s": 174}
LABELS = torch.tensor([399, 3, 173, 7, 304, 0])
DOMAIN_OF = torch.tensor([0, 0, 2, 0, 1, 1])
MIRROR = torch.arange(5, -1, -1)


def smooth(label: int, classes: int, smoothing: float = 0.1) -> np.ndarray:
    return np.eye(classes)[label] * (1 - smoothing) + smoothing / classes


def test_smoothing_sums_to_one() -> None:
    soft = soft_targets(LABELS, DOMAIN_OF, DOMAINS)
    for clip, (label, k) in enumerate(zip(LABELS.tolist(), DOMAIN_OF.tolist(), strict=True)):
        for j, (name, classes) in enumerate(DOMAINS.items()):
            expected = smooth(label, classes) if j == k else np.zeros(classes)
            np.testing.assert_allclose(soft[name][clip].numpy(), expected, atol=1e-7)


def test_one_global_class_count_as_released() -> None:
    soft = soft_targets(LABELS, DOMAIN_OF, DOMAINS, smooth_classes=700)
    sums = [float(soft[name].sum(1).max()) for name in DOMAINS]
    assert sums == pytest.approx([0.957, 0.944, 0.925], abs=5e-4)


@pytest.mark.parametrize("share", [0.3, torch.tensor([0.3, 0.9, 0.5, 0.5, 0.9, 0.3])])
def test_masked_mixing(share: float | torch.Tensor) -> None:
    mixed = mixed_targets(LABELS, DOMAIN_OF, DOMAINS, MIRROR, share)
    shares = torch.as_tensor(share).expand(6).tolist()
    names = list(DOMAINS)
    for clip in range(6):
        k, partner, own = int(DOMAIN_OF[clip]), int(MIRROR[clip]), shares[clip]
        same = bool(DOMAIN_OF[partner] == k)
        expected = own * smooth(int(LABELS[clip]), DOMAINS[names[k]])
        if same:
            expected = expected + (1 - own) * smooth(int(LABELS[partner]), DOMAINS[names[k]])
        np.testing.assert_allclose(mixed[names[k]][clip].numpy(), expected, atol=1e-6)
        assert float(mixed[names[k]][clip].sum()) == pytest.approx(1.0 if same else own, abs=1e-5)
        assert all(not mixed[name][clip].any() for name in names if name != names[k])


def test_equal_domains_sum_to_one() -> None:
    partner = torch.tensor([3, 0, 2, 1, 5, 4])  # mixing `same`: partners inside each dataset
    mixed = mixed_targets(LABELS, DOMAIN_OF, DOMAINS, partner, 0.25)
    sums = sum(rows.sum(1) for rows in mixed.values())
    torch.testing.assert_close(sums, torch.ones(6))


def test_both_gives_the_partner_its_share_in_its_own_domain() -> None:
    mixed = mixed_targets(LABELS, DOMAIN_OF, DOMAINS, MIRROR, 0.3, both=True)
    np.testing.assert_allclose(mixed["k"][0].numpy(), 0.3 * smooth(399, 400), atol=1e-6)
    np.testing.assert_allclose(mixed["m"][0].numpy(), 0.7 * smooth(0, 305), atol=1e-6)


def test_released_mixing_fills_empty_partners() -> None:
    mixed = mixed_targets(LABELS, DOMAIN_OF, DOMAINS, MIRROR, 0.3, smooth_classes=700)
    floor = 0.1 / 700
    assert float(mixed["k"][0, 0]) == pytest.approx(floor)
    assert float(mixed["k"][0, 399]) == pytest.approx(0.3 * (0.9 + floor) + 0.7 * floor)
