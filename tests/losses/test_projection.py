"""Projected logits: counts, starts, modes, routing of gradients (spec multitrain 2.2, 2.3, 7.4 to 7.6)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mdltool.errors import MdlError
from mdltool.losses.projection import Projections, projected_loss, same_names

DOMAINS = {"a": 4, "a_b": 3, "b": 5}


def inputs(clips: int = 6, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(clips, classes, generator=generator, dtype=torch.float64)
        for name, classes in DOMAINS.items()
    }


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Of probabilities [B, C], by the definition."""
    shifted = logits - logits.max(1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return np.asarray(-(targets * log_probabilities).sum(1))


def by_numpy(
    logits: dict[str, Tensor], target: str, soft: np.ndarray, maps: Projections, mode: str, weight: float
) -> np.ndarray:
    y = {name: values.numpy() for name, values in logits.items()}
    if mode == "none":
        return cross_entropy(y[target], soft)
    projected = [y[i] @ maps.weight(i, target).detach().double().numpy().T for i in y if i != target]
    if mode == "add":
        return cross_entropy(y[target] + weight * np.sum(projected, axis=0), soft)
    return cross_entropy(y[target], soft) + weight * np.mean([cross_entropy(p, soft) for p in projected], axis=0)


@pytest.mark.parametrize(
    ("classes", "parameters"),
    [((400, 305, 174, 200), 840_940), ((700, 305, 174, 200), 1_248_340), ((400, 305, 174), 489_340)],
)
def test_counts(classes: tuple[int, ...], parameters: int) -> None:
    with torch.device("meta"):
        maps = Projections({f"d{i}": n for i, n in enumerate(classes)})
    assert sum(p.numel() for p in maps.parameters()) == parameters


def test_pairs_are_kept_and_names_are_never_split() -> None:
    maps = Projections({"a": 2, "a_b": 3, "b": 4, "b_a": 5, "b_a_b": 6})
    assert len(maps.state_dict()) == len(maps.pairs) == 20
    assert maps.sources("b") == ["a", "a_b", "b_a", "b_a_b"]
    assert maps.weight("a_b", "b_a").shape == (5, 3)
    assert maps.weight("a", "b_a_b").shape == (6, 2)
    reordered = Projections({"b_a_b": 6, "b_a": 5, "b": 4, "a_b": 3, "a": 2})
    reordered.load_state_dict(maps.state_dict())
    assert all(torch.equal(maps.weight(*pair), reordered.weight(*pair)) for pair in maps.pairs)


def test_initialisations() -> None:
    torch.manual_seed(0)
    weight = Projections({"a": 200, "b": 300}).weight("a", "b").detach()
    assert float(weight.std()) == pytest.approx(0.02, rel=0.02)
    assert not Projections(DOMAINS, "zero").weight("a", "b").any()
    names = {"a": ["Playing guitar", "dance"], "b": ["dance", "playing_guitar", "--"], "c": ["PlayingGuitar"]}
    maps = Projections({"a": 2, "b": 3, "c": 1}, "names", class_names=names)
    assert maps.weight("a", "b").tolist() == [[0, 1], [1, 0], [0, 0]]
    assert maps.weight("b", "a").tolist() == [[0, 1, 0], [1, 0, 0]]
    assert maps.weight("a", "c").tolist() == [[1, 0]]
    assert not same_names(["--"], ["!"]).any()


def test_frozen_maps_get_no_gradient() -> None:
    logits = {name: values.requires_grad_() for name, values in inputs().items()}
    maps = Projections(DOMAINS, frozen=True).double()
    projected_loss(logits, "b", torch.zeros(6, dtype=torch.long), maps).sum().backward()
    assert all(not p.requires_grad and p.grad is None for p in maps.parameters())
    assert logits["a"].grad is not None  # the head behind a frozen map still learns


@pytest.mark.parametrize("mode", ["add", "branch", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_against_numpy(mode: str, soft: bool) -> None:
    maps, logits = Projections(DOMAINS).double(), inputs()
    rng = np.random.default_rng(0)
    for target, classes in DOMAINS.items():
        labels = rng.integers(0, classes, 6)
        targets = rng.random((6, classes)) if soft else np.eye(classes)[labels]
        given = torch.from_numpy(targets) if soft else torch.from_numpy(labels)
        found = projected_loss(logits, target, given, maps, mode, 0.7)
        np.testing.assert_allclose(
            found.detach().numpy(), by_numpy(logits, target, targets, maps, mode, 0.7), rtol=1e-12
        )


def test_one_clip_by_hand_without_softmax_before_the_map() -> None:
    maps = Projections({"s": 2, "t": 2}).double()
    with torch.no_grad():
        maps.weight("s", "t").copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
    logits = {
        "s": torch.tensor([[3.0, -1.0]], dtype=torch.float64),
        "t": torch.tensor([[0.5, 0.0]], dtype=torch.float64),
    }
    # W y_s = (1, 1), so y' = (1.5, 1): the loss of class 1 is log(1 + e^0.5)
    found = projected_loss(logits, "t", torch.tensor([1]), maps)
    assert float(found) == pytest.approx(np.log1p(np.exp(0.5)))
    branch = projected_loss(logits, "t", torch.tensor([1]), maps, "branch")
    assert float(branch) == pytest.approx(np.log1p(np.exp(0.5)) + np.log(2))


def test_softmax_input() -> None:
    maps, logits = Projections(DOMAINS, input="softmax").double(), inputs()
    expected = torch.softmax(logits["a"], 1) @ maps.weight("a", "b").T
    torch.testing.assert_close(maps(logits, "b")[0], expected)


def test_zero_maps_and_zero_weight_are_no_projection() -> None:
    logits, labels = inputs(), torch.tensor([0, 1, 2, 0, 1, 2])
    none = projected_loss(logits, "a_b", labels, Projections(DOMAINS).double(), "none")
    add = projected_loss(logits, "a_b", labels, Projections(DOMAINS, "zero").double(), "add")
    branch = projected_loss(logits, "a_b", labels, Projections(DOMAINS).double(), "branch", 0.0)
    assert torch.equal(add, none)
    assert torch.equal(branch, none)


@pytest.mark.parametrize("mode", ["add", "branch", "none"])
def test_a_single_domain_has_no_projections(mode: str) -> None:
    maps, logits, labels = Projections({"a": 4}), {"a": torch.randn(3, 4)}, torch.tensor([0, 3, 1])
    found = projected_loss(logits, "a", labels, maps, mode)
    assert torch.equal(found, torch.nn.functional.cross_entropy(logits["a"], labels, reduction="none"))
    assert not list(maps.parameters())


@pytest.mark.parametrize("mode", ["add", "branch"])
def test_gradient_routing(mode: str) -> None:
    maps = Projections(DOMAINS).double()
    logits = {name: values.requires_grad_() for name, values in inputs().items()}
    projected_loss(logits, "b", torch.zeros(6, dtype=torch.long), maps, mode).sum().backward()
    assert all(values.grad is not None and values.grad.any() for values in logits.values())
    for source, target in maps.pairs:
        grad = maps.weight(source, target).grad
        assert (grad is not None and grad.any()) if target == "b" else grad is None


def test_losses_are_float32_under_autocast() -> None:
    maps = Projections(DOMAINS)
    logits = {name: values.bfloat16() for name, values in inputs().items()}
    labels = torch.zeros(6, dtype=torch.long)
    expected = projected_loss({name: v.float() for name, v in logits.items()}, "a", labels, maps)
    with torch.autocast("cpu", torch.bfloat16):
        found = projected_loss(logits, "a", labels, maps)
    assert torch.equal(found, expected)


def test_unknown_choices() -> None:
    with pytest.raises(MdlError, match="'ad'"):
        projected_loss({"a": torch.zeros(1, 2)}, "a", torch.tensor([0]), Projections({"a": 2}), "ad")
    with pytest.raises(MdlError, match="'zeros'"):
        Projections(DOMAINS, "zeros")
    with pytest.raises(MdlError, match="'probs'"):
        Projections(DOMAINS, input="probs")
