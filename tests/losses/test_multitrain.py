"""The whole objective against numpy, and what several processes make of it (spec multitrain 2.5, 6, 6.1, 7)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mdltool.errors import MdlError
from mdltool.heads import MlpHead
from mdltool.losses.multitrain import MultitrainLoss, MultitrainSpec, Update
from mdltool.losses.targets import mixed_targets
from tests.losses.test_informative import by_numpy as informative_by_numpy
from tests.losses.test_projection import by_numpy as projected_by_numpy

DOMAINS = {"a": 4, "a_b": 3, "b": 5}
FEATURES = 6


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@dataclass
class Found:
    """One call's parts: their sum, domain -> L_k, and L_v and L_c of the whole batch."""

    total: Tensor
    losses: dict[str, Tensor]
    terms: dict[str, Tensor]


@dataclass
class Setup:
    """Embeddings as leaves, heads and a loss: all that has gradients."""

    z: Tensor
    domain: Tensor
    labels: Tensor
    heads: nn.ModuleDict
    loss: MultitrainLoss

    def call(self, rows: slice, update: Update | None, targets: Any = None) -> Found:
        """update: None: these clips are the whole batch."""
        z, domain = self.z[rows], self.domain[rows]
        logits = {name: head(z) for name, head in self.heads.items()}
        targets = self.labels[rows] if targets is None else targets
        if update is None:
            counts = {name: int((domain == k).sum()) for k, name in enumerate(self.loss.domains)}
            update = Update(len(domain), counts)
        classification, losses = self.loss.classification(domain, logits, targets, update)
        informative, terms = self.loss.informative(z, update)
        return Found(classification + informative, losses, terms)

    def gradients(self) -> dict[str, Tensor | None]:
        named = [*self.heads.named_parameters("heads"), *self.loss.named_parameters("loss"), ("z", self.z)]
        return {name: None if p.grad is None else p.grad.clone() for name, p in named}

    def logits(self) -> dict[str, Tensor]:
        return {name: head(self.z).detach() for name, head in self.heads.items()}


def setup(domain: list[int], spec: MultitrainSpec, domains: dict[str, int] = DOMAINS) -> Setup:
    sizes = list(domains.values())
    labels = torch.tensor([int(torch.randint(sizes[k], ())) for k in domain])
    heads = nn.ModuleDict({name: MlpHead(FEATURES, n, hidden=8, dropout=0.0) for name, n in domains.items()})
    names = {name: [str(c) for c in range(n)] for name, n in domains.items()}
    loss = MultitrainLoss(FEATURES, domains, spec, names)
    for parameter in loss.weights.parameters():
        nn.init.normal_(parameter)
    z = torch.randn(len(domain), FEATURES, requires_grad=True)
    return Setup(z, torch.tensor(domain), labels, heads, loss)


def by_numpy(s: Setup, spec: MultitrainSpec) -> float:
    assert s.loss.expander is not None
    variance, covariance = informative_by_numpy(s.loss.expander(s.z).detach().numpy(), spec.eps)
    total, domains = 0.0, s.domain.numpy()
    logits = s.logits()
    for k, (name, classes) in enumerate(DOMAINS.items()):
        rows = np.flatnonzero(domains == k)
        if len(rows) == 0:
            continue
        own = {other: values[rows] for other, values in logits.items()}
        soft = np.eye(classes)[s.labels.numpy()[rows]]
        maps, mode = s.loss.projections, spec.proj_mode
        losses = projected_by_numpy(own, name, soft, maps, mode, spec.proj_weight)
        mean = losses.sum() / (len(domains) if spec.norm == "batch" else len(rows))
        if spec.weights == "fixed":
            total += spec.fixed_weights.get(name, 1.0) * mean
        else:
            sigma = np.sqrt(np.exp(s.loss.weights.log_variances[name].item()))
            total += mean / ((2 if spec.weights_half else 1) * sigma**2) + np.log(sigma)
    for name, term in (("variance", spec.lambda_v * variance), ("covariance", spec.lambda_c * covariance)):
        if s.loss.informative_weights is None:
            total += term
        else:
            v = s.loss.informative_weights.log_variances[name].item()
            total += np.exp(-v) * term / 2 + v / 2
    return float(total)


@pytest.mark.parametrize(
    "spec",
    [
        MultitrainSpec(),
        MultitrainSpec(norm="dataset", proj_mode="branch", proj_weight=0.3),
        MultitrainSpec(lambda_v=2.5, lambda_c=0.1, weights="fixed", fixed_weights={"b": 0.5}),
        MultitrainSpec(proj_mode="none", weights_half=False, sigma_init="uniform", eps=1e-2),
        MultitrainSpec(informative_learned=True, sigma_init="uniform", proj_init="names"),
    ],
)
@pytest.mark.parametrize("domain", [[0, 1, 2, 0, 1, 2, 2, 2, 0], [2, 0, 0, 2, 0]])
def test_against_numpy(spec: MultitrainSpec, domain: list[int]) -> None:
    s = setup(domain, spec)
    found = s.call(slice(None), None)
    assert found.total.item() == pytest.approx(by_numpy(s, spec), rel=1e-12)
    assert set(found.losses) == {name for k, name in enumerate(DOMAINS) if k in domain}


def test_an_absent_dataset_is_dropped_but_its_head_learns() -> None:
    s = setup([0, 2, 0, 2], MultitrainSpec())
    s.call(slice(None), None).total.backward()
    gradients = s.gradients()
    assert gradients["loss.weights.log_variances.a_b"] is None
    assert gradients["loss.weights.log_variances.a"] is not None
    head = gradients["heads.a_b.out.weight"]
    assert head is not None
    assert head.any()
    for source, target in s.loss.projections.pairs:
        map_gradient = gradients[f"loss.projections.maps.{source}>{target}.weight"]
        assert (map_gradient is None) == (target == "a_b")


def test_a_batch_of_one_skips_the_informative_loss() -> None:
    s = setup([1], MultitrainSpec())
    found = s.call(slice(None), None)
    assert [term.item() for term in found.terms.values()] == [0.0, 0.0]
    found.total.backward()
    assert s.z.grad is not None
    assert s.z.grad.isfinite().all()


def test_one_dataset_alone() -> None:
    spec = MultitrainSpec(weights="fixed")
    s = setup([0, 0, 0], spec, {"a": 4})
    found = s.call(slice(None), None)
    assert s.loss.expander is not None
    expected = nn.functional.cross_entropy(s.heads["a"](s.z), s.labels)
    expected = expected + sum(informative_by_numpy(s.loss.expander(s.z).detach().numpy()))
    torch.testing.assert_close(found.total, expected)
    assert not list(s.loss.projections.parameters())


def test_without_informative_loss_there_is_no_expander() -> None:
    s = setup([0, 1], MultitrainSpec(lambda_v=0.0, lambda_c=0.0, proj_mode="none", weights="fixed"))
    assert not list(s.loss.parameters())
    found = s.call(slice(None), None)
    assert found.total.item() == pytest.approx(sum(loss.item() for loss in found.losses.values()))


@pytest.mark.parametrize("hidden", [2048, 4096])
def test_training_only_parameters(hidden: int) -> None:
    classes = {"k400": 400, "mit": 305, "ssv2": 174, "actnet": 200}
    with torch.device("meta"):
        loss = MultitrainLoss(768, classes, MultitrainSpec(expander_hidden=hidden))
    expander = {2048: 3_148_544, 4096: 6_296_320}[hidden]
    assert sum(p.numel() for p in loss.parameters()) == 840_940 + expander + 4


def test_noise_in_what_only_training_needs_leaves_predictions_alone() -> None:
    s = setup([0, 1, 2], MultitrainSpec())
    before = copy.deepcopy(s.logits())
    for parameter in s.loss.parameters():
        nn.init.normal_(parameter)
    s.call(slice(None), None).total.backward()
    after = s.logits()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_soft_targets_equal_hard_ones() -> None:
    spec = MultitrainSpec(norm="dataset")
    s = setup([0, 1, 2, 0, 2], spec)
    soft = mixed_targets(s.labels, s.domain, DOMAINS, torch.arange(4, -1, -1), 1.0, smoothing=0.0)
    hard = s.call(slice(None), None)
    torch.testing.assert_close(s.call(slice(None), None, soft).total, hard.total)


def test_a_clip_counts_in_its_partners_domain() -> None:
    spec = MultitrainSpec(proj_mode="none", weights="fixed", lambda_v=0.0, lambda_c=0.0)
    s = setup([0, 2], spec)
    soft = mixed_targets(s.labels, s.domain, DOMAINS, torch.tensor([1, 0]), 0.7, smoothing=0.0, both=True)
    found, logits = s.call(slice(None), None, soft), s.logits()
    logs = {name: values.log_softmax(1).numpy() for name, values in logits.items()}
    a, b = s.labels.tolist()
    assert found.losses["a"].item() == pytest.approx(-(0.7 * logs["a"][0, a] + 0.3 * logs["a"][1, a]) / 2)
    assert found.losses["b"].item() == pytest.approx(-(0.7 * logs["b"][1, b] + 0.3 * logs["b"][0, b]) / 2)


@pytest.mark.parametrize(
    "spec",
    [
        MultitrainSpec(informative_learned=True),
        MultitrainSpec(norm="dataset", weights="fixed", proj_mode="branch"),
    ],
)
def test_parts_sum_to_the_whole_batch(spec: MultitrainSpec) -> None:
    """The calls of three processes, on uneven shares of which one lacks two domains: values and gradients."""
    domain = [0, 1, 2, 2, 2, 2, 1, 0]
    s = setup(domain, spec)
    whole = s.call(slice(None), None)
    whole.total.backward()
    expected = s.gradients()
    for module in (s.heads, s.loss):
        module.zero_grad()
    s.z.grad = None
    # Every call sees all rows with their graphs: what an all-gather whose backward sums over processes amounts to.
    expander = s.loss.expander
    assert expander is not None
    update = Update(8, {"a": 2, "a_b": 2, "b": 4}, calls=3, gather=lambda _: expander(s.z))
    calls = [s.call(rows, update) for rows in (slice(0, 3), slice(3, 6), slice(6, 8))]
    total = sum((call.total for call in calls), torch.zeros(()))
    total.backward()
    torch.testing.assert_close(total, whole.total)
    for call in calls:
        torch.testing.assert_close(call.terms["covariance"], whole.terms["covariance"])
    for name in DOMAINS:
        torch.testing.assert_close(sum(call.losses[name] for call in calls), whole.losses[name])
    for name, gradient in s.gradients().items():
        if expected[name] is None:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, expected[name])


def test_faults_of_options() -> None:
    for spec in (
        MultitrainSpec(norm="batches"),
        MultitrainSpec(proj_mode="adds"),
        MultitrainSpec(weights="learned"),
        MultitrainSpec(weights="fixed", fixed_weights={"c": 1.0}),
    ):
        with pytest.raises(MdlError):
            MultitrainLoss(FEATURES, DOMAINS, spec)
