"""Mixup and CutMix against numpy, shares against pixels, targets against their sums (spec multitrain 5.3)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mdltool.data.mixing import Mix, MixSpec, apply, draw
from mdltool.errors import MdlError
from mdltool.tasks import MultiLabel, Regression, SingleLabel, Task, VerbNoun

BOTH = MixSpec(mixup_alpha=0.8, cutmix_alpha=1.0)


def mirrored(count: int) -> torch.Tensor:
    """Clip b's partner is count - 1 - b (spec multitrain 5.3)."""
    return torch.arange(count - 1, -1, -1)


def batch(count: int = 5, frames: int = 3, height: int = 13, width: int = 18) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, frames, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def draws(spec: MixSpec, count: int, height: int = 56, width: int = 40) -> list[Mix]:
    rng = np.random.default_rng(0)
    return [draw(spec, rng, height, width) for _ in range(count)]


@pytest.mark.parametrize("share", [0.0, 0.137, 0.5, 1.0])
def test_mixup_is_the_rounded_convex_combination(share: float) -> None:
    frames = batch()
    kept = frames.clone()
    mixed = apply(frames, mirrored(5), Mix(share))
    exact = share * frames.numpy().astype(float) + (1 - share) * frames.numpy()[::-1]
    assert mixed.dtype == torch.uint8
    assert np.abs(mixed.numpy() - exact).max() <= 0.5 + 1e-4
    assert torch.equal(frames, kept)
    assert torch.equal(mixed[2], frames[2])  # the middle clip of an odd batch is its own partner


@pytest.mark.parametrize("box", [(2, 3, 9, 17), (0, 0, 13, 18), (4, 0, 4, 6)])
def test_cutmix_pastes_the_partners_box_in_every_frame(box: tuple[int, int, int, int]) -> None:
    frames = batch()
    kept = frames.clone()
    top, left, bottom, right = box
    wanted = frames.numpy().copy()
    wanted[..., top:bottom, left:right] = frames.numpy()[::-1][..., top:bottom, left:right]
    assert np.array_equal(apply(frames, mirrored(5), Mix(0.5, box)).numpy(), wanted)
    assert torch.equal(frames, kept)


@pytest.mark.parametrize(("height", "width", "frames"), [(13, 18, 3), (31, 8, 1), (1, 1, 2), (2, 1, 1)])
def test_the_share_is_that_of_the_pixels_that_stay(height: int, width: int, frames: int) -> None:
    own = torch.zeros((2, 3, frames, height, width), dtype=torch.uint8)
    own[1] = 255
    for mix in draws(MixSpec(cutmix_alpha=1.0), 100, height, width):
        mixed = apply(own, mirrored(2), mix)
        assert float((mixed[0] == 0).double().mean()) == pytest.approx(mix.own_share, abs=1e-12)
        assert float((mixed[1] == 255).double().mean()) == pytest.approx(mix.own_share, abs=1e-12)


def test_mixup_shares_are_beta() -> None:
    shares = np.array([mix.own_share for mix in draws(MixSpec(mixup_alpha=0.8), 6000)])
    assert all(mix.box is None for mix in draws(MixSpec(mixup_alpha=0.8), 50))
    assert shares.mean() == pytest.approx(0.5, abs=0.015)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.004)  # of Beta(a, a)


def test_cutmix_boxes_have_uniform_centres_and_lose_what_is_outside() -> None:
    mixes = draws(MixSpec(cutmix_alpha=1.0), 6000, 56, 40)
    own = np.array([mix.own_share for mix in mixes])
    # Sides sqrt(v) of the picture's, v uniform, centre uniform: along one axis sqrt(v) - v / 4 is left of it on
    # average, and both axes are drawn apart.
    v = (np.arange(100_000) + 0.5) / 100_000
    assert 1 - own.mean() == pytest.approx(np.mean((np.sqrt(v) - v / 4) ** 2), abs=0.02)
    covered = np.zeros((56, 40))
    for mix in mixes:
        assert mix.box is not None
        top, left, bottom, right = mix.box
        assert 0 <= top <= bottom <= 56
        assert 0 <= left <= right <= 40
        covered[top:bottom, left:right] += 1
    assert covered[28, 20] > covered[0, 0] > 0
    assert np.abs(covered - covered[::-1, ::-1]).max() / 6000 < 0.06


@pytest.mark.parametrize(
    ("spec", "mixup", "cutmix"),
    [
        (MixSpec(), 0, 0),
        (BOTH, 0.5, 0.5),
        (MixSpec(0.8, 1.0, switch_probability=0.1), 0.9, 0.1),
        (MixSpec(0.8, 1.0, probability=0.4), 0.2, 0.2),
        (MixSpec(0.8, 0.0, probability=0.4), 0.4, 0),
        (MixSpec(0.0, 1.0, switch_probability=0.0), 0, 1),
    ],
)
def test_how_often_a_batch_is_mixed(spec: MixSpec, mixup: float, cutmix: float) -> None:
    mixes = draws(spec, 3000)
    pasted = np.mean([mix.box is not None for mix in mixes])
    blended = np.mean([mix.box is None and mix.own_share < 1 for mix in mixes])
    assert (blended, pasted) == (pytest.approx(mixup, abs=0.03), pytest.approx(cutmix, abs=0.03))


def test_a_draw_is_a_function_of_its_generator() -> None:
    before = torch.get_rng_state()
    assert draws(BOTH, 50) == draws(BOTH, 50)
    assert len(set(draws(BOTH, 50))) == 50
    assert torch.equal(before, torch.get_rng_state())


def test_an_unmixed_batch_is_the_batch() -> None:
    frames = batch()
    assert apply(frames, mirrored(5), draws(MixSpec(), 1)[0]) is frames


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_targets(smoothing: float) -> None:
    labels = torch.tensor([3, 0, 6, 6])
    hard = np.eye(7)[labels.numpy()] * (1 - smoothing) + smoothing / 7
    mixed = SingleLabel().soft_labels(labels, 7, mirrored(4), 0.3, smoothing)
    assert mixed.dtype == torch.float32
    np.testing.assert_allclose(mixed.numpy(), 0.3 * hard + 0.7 * hard[::-1], atol=1e-6)
    np.testing.assert_allclose(mixed.sum(1).numpy(), np.ones(4), atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_multi_label_targets(smoothing: float) -> None:
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]])
    soft = labels.numpy() * (1 - smoothing) + smoothing * 0.5
    mixed = MultiLabel().soft_labels(labels, 3, mirrored(3), 0.3, smoothing)
    np.testing.assert_allclose(mixed.numpy(), 0.3 * soft + 0.7 * soft[::-1], atol=1e-6)
    assert float(mixed.min()) >= 0
    assert float(mixed.max()) <= 1


def test_regression_targets_are_mixed_and_never_smoothed() -> None:
    labels = torch.tensor([[1.5, -2.0], [0.25, 8.0]])
    mixed = Regression().soft_labels(labels, 2, mirrored(2), 0.75, 0.1)
    assert mixed.tolist() == [[0.75 * 1.5 + 0.25 * 0.25, 0.5], [0.25 * 1.5 + 0.75 * 0.25, 5.5]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_verbs_and_nouns_are_each_smoothed(smoothing: float) -> None:
    labels = torch.tensor([[1, 0], [0, 2], [1, 3]])
    parts = [
        np.eye(n)[column] * (1 - smoothing) + smoothing / n for n, column in zip((2, 4), labels.T, strict=True)
    ]
    hard = np.concatenate(parts, axis=1)
    mixed = VerbNoun(2, 4, [(1, 0)]).soft_labels(labels, 6, mirrored(3), 0.3, smoothing)
    np.testing.assert_allclose(mixed.numpy(), 0.3 * hard + 0.7 * hard[::-1], atol=1e-6)


@pytest.mark.parametrize("task", [SingleLabel(), MultiLabel(), Regression(), VerbNoun(2, 3, [(0, 0)])])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_take_mixed_targets(task: Task, reduction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((4, 5), generator=generator, dtype=torch.float64)
    labels = torch.tensor([4, 0, 2, 2]) if task.name == "single_label" else torch.randint(0, 2, (4, 5))
    labels = labels[:, :2] if task.name == "verb_noun" else labels
    loss, partner = task.loss, mirrored(4)
    mixed = task.soft_labels(labels, 5, partner, 0.3, 0.0).double()
    if task.name == "regression":
        targets = 0.3 * labels.double() + 0.7 * labels[partner].double()
        wanted = getattr((logits - targets).square().mean(1), reduction)()
    else:  # linear in the targets: the losses themselves are mixed
        wanted = 0.3 * loss(logits, labels, reduction) + 0.7 * loss(logits, labels[partner], reduction)
    assert float(loss(logits, mixed, reduction)) == pytest.approx(float(wanted), abs=1e-6)


def test_what_cannot_be_mixed_is_refused() -> None:
    for task in (MultiLabel(), Regression()):
        with pytest.raises(MdlError, match=r"labels of shape \[2\] where \[2, 3\] are wanted"):
            task.soft_labels(torch.tensor([1, 0]), 3, mirrored(2), 0.5, 0.0)
    with pytest.raises(MdlError, match=r"labels of shape \[2\] where \[2, 2\] are wanted"):
        VerbNoun(1, 2, [(0, 0)]).soft_labels(torch.tensor([1, 0]), 3, mirrored(2), 0.5, 0.0)
    for make in (lambda: MixSpec(-0.1), lambda: MixSpec(1.0, probability=1.1), lambda: MixSpec(1.0, 1.0, 1.0, -1)):
        with pytest.raises(MdlError):
            make()
