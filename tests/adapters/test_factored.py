"""Adapters whose weights are products of two factors, for every adapter that has such weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from mdltool.adapters import ADAPTERS
from mdltool.adapters.factored import Axes, FactoredConv, FactoredWeight, FactorSpec, SharedFactor, value, weight_of
from mdltool.backbones import BACKBONES
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import AdapterSpec, ModelSpec
from mdltool.wrapping import TokenGrid
from tests.adapters.test_contract import PAIRS, clip, randomise

# The quickest backbone that carries an adapter, at the shortest clip.
_QUICK = ("resnet26_tiny", "clip_vit_tiny", "swin3d_tiny", "x3d_tiny")
CASES = [
    (adapter, next(backbone for backbone in _QUICK if (adapter, backbone) in PAIRS))
    for adapter in ADAPTERS
    if adapter not in ("cls_shift", "caa")
]


def rules(model: MultiDomainModel) -> dict[str, dict[str, Axes]]:
    return {site: wrapper.adapters["a"].factor_rules() for site, wrapper in model.sites.items()}


def fresh(adapter: str, backbone: str, **options: Any) -> MultiDomainModel:
    """A dense model of two domains with random adapters, double precision."""
    factory = BACKBONES.load(backbone)
    frames, crop = (4, 32) if backbone == "x3d_tiny" else (factory.default_frames, factory.default_crop)
    entry = AdapterSpec(adapter, "all", options)
    model = rebuilt(ModelSpec(backbone, {}, frames, crop, {"a": 3, "b": 4}, [entry], bn="frozen", dropout=0.0))
    randomise(model)
    return model


def factored(adapter: str, backbone: str, independent: bool = False, **options: Any) -> MultiDomainModel:
    """A model with random factors of rank 2, double precision."""
    dense = fresh(adapter, backbone, **options)
    factors = {
        site: {name: FactorSpec(2, axes, independent) for name, axes in entries.items()}
        for site, entries in rules(dense).items()
    }
    model = rebuilt(replace(dense.spec, factors=factors))
    randomise(model)
    return model


def rebuilt(spec: ModelSpec) -> MultiDomainModel:
    torch.manual_seed(3)
    model = build_model(spec).double()
    model.apply_regime("frozen", "frozen")
    return model.eval()


def multiplied_out(model: MultiDomainModel) -> MultiDomainModel:
    """The dense model of the same function."""
    dense = rebuilt(replace(model.spec, factors={}))
    state = model.tensors()
    for site, wrapper in model.sites.items():
        for domain, adapter in wrapper.adapters.items():
            for name in model.spec.factors[site]:
                state[f"{domain}/{site}/{name}"] = value(weight_of(adapter, name)).detach()
    dense.load_tensors({key: state[key] for key in dense.tensors()}, "test")
    return dense


def test_every_adapter_with_matrices_is_here() -> None:
    assert {adapter for adapter, _ in CASES} == set(ADAPTERS) - {"cls_shift", "caa"}


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize(("adapter", "backbone"), CASES)
def test_it_computes_what_the_product_does(adapter: str, backbone: str, independent: bool) -> None:
    model = factored(adapter, backbone, independent)
    dense = multiplied_out(model)
    x = clip(model).double()
    for domain in ("a", "b"):
        expected = dense(x, domain)
        torch.testing.assert_close(model(x, domain), expected, rtol=1e-9, atol=1e-9)
        assert (expected - fresh(adapter, backbone)(x, domain)).abs().max() > 1e-6


@pytest.mark.parametrize(("adapter", "backbone"), CASES)
def test_state_copies_and_what_trains(adapter: str, backbone: str) -> None:
    model = factored(adapter, backbone)
    x = clip(model).double()
    expected = model(x, "b")
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x, "b"), expected)
    with torch.no_grad():
        for wrapper in twin.sites.values():
            for shared in wrapper.shared_factors().values():
                shared.zero_()
    assert torch.equal(model(x, "b"), expected)
    assert not torch.equal(twin(x, "b"), expected)
    other = rebuilt(ModelSpec.from_json(model.spec.to_json()))
    assert other.spec == model.spec
    other.load_tensors(model.tensors(), "test")
    assert torch.equal(other(x, "b"), expected)
    assert torch.equal(model.float().double()(x.float().double(), "b"), model(x, "b"))
    parameters = list(model.parameters())
    assert len({id(p) for p in parameters}) == len(parameters)
    named = {id(t): key for key, t in model.tensors().items()}
    assert len(named) == len(model.tensors())
    model.train()
    nn.functional.cross_entropy(model(x, "a"), torch.tensor([0, 1])).backward()
    for parameter in parameters:
        key = named[id(parameter)]
        trains = key.startswith(("a/", "b/")) or (key.startswith("shared/") and "/factors." not in key)
        assert parameter.requires_grad == trains, key
        assert trains or parameter.grad is None, key
    private = [p for p in parameters if named[id(p)].startswith("a/") and named[id(p)].endswith(".private")]
    assert private
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in private)
    model.apply_regime("frozen", "frozen", shared_factors=True)
    model.zero_grad()
    for domain in ("a", "b"):
        nn.functional.cross_entropy(model(x, domain), torch.tensor([0, 1])).backward()
    shared = [p for p in parameters if "/factors." in named[id(p)]]
    assert shared
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in shared)
    model.apply_regime("frozen", "frozen", only=("a/",), shared_factors=True)
    assert all(named[id(p)].startswith("a/") for p in parameters if p.requires_grad)


@pytest.mark.parametrize(("adapter", "backbone"), CASES)
def test_shared_factors_count_once(adapter: str, backbone: str) -> None:
    model = factored(adapter, backbone)
    counts = model.parameter_counts()
    own = [t.numel() for key, t in model.tensors().items() if "/factors." in key]
    assert counts["shared_factors"] == sum(own) > 0
    per_domain = sum(entry["adapters"] for entry in counts["per_domain"].values())
    assert counts["adapters"] == counts["shared_factors"] + per_domain
    assert counts["total"] == counts["backbone"] + counts["heads"] + counts["adapters"]


@pytest.mark.parametrize("adapter", ["parallel", "st", "mhva"])
def test_each_form_compiles_without_graph_breaks(adapter: str) -> None:
    """A convolution, a linear layer and a bank of heads."""
    model = factored(adapter, dict(CASES)[adapter])
    wrapper = next(iter(model.sites.values()))
    x = torch.randn(2, wrapper.site.channels, 8, 8).double()
    if wrapper.site.layout != "BCHW":
        model.route.tokens = TokenGrid(2, 2, 3, "clip")
        x = torch.randn(2, 13, wrapper.site.channels).double()
    model.route.serve("a")
    torch._dynamo.reset()
    compiled = torch.compile(wrapper, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wrapper(x), rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


MATRICISED = [Axes((0,)), Axes((1,)), Axes((1, 2, 3)), Axes((0, 2)), Axes((0, 1, 2, 3))]


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("axes", MATRICISED)
def test_a_convolution_at_strides_and_borders(axes: Axes, rank: int) -> None:
    """Spec residual_adapters 7.9, of every matricisation."""
    torch.manual_seed(0)
    for stride, padding, side in ((1, 1, 5), (2, 1, 6), (2, 0, 7), (1, 3, 2)):
        conv = nn.Conv2d(4, 6, 3, stride, padding).double()
        spec = FactorSpec(rank, axes)
        shared = SharedFactor(conv.weight.shape, spec).double()
        layer = FactoredConv(conv, FactoredWeight(conv.weight, spec, shared))
        x = torch.randn(2, 4, side, side, dtype=torch.float64)
        expected = nn.functional.conv2d(x, layer.weight(), conv.bias, stride, padding)
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_axes_are_their_own_inverse() -> None:
    weight = torch.randn(2, 3, 4, 5)
    for axes in (*MATRICISED, Axes((2,), (0,)), Axes((1, 3), (2,)), Axes((1,), (0, 3))):
        matrix = axes.matrix(weight)
        heads, rows, columns = axes.sizes(weight.shape)
        assert matrix.shape == (*heads, rows, columns)
        assert torch.equal(axes.weight(matrix, weight.shape), weight)
    assert torch.equal(Axes((1,)).matrix(weight)[2, :5], weight[0, 2, 0])


def test_weights_that_a_domain_has_in_groups_stay_dense() -> None:
    grouped = fresh("parallel", "x3d_tiny")
    assert not any(rules(grouped).values())
    assert all(rules(fresh("parallel", "x3d_tiny", grouped="dense")).values())
    assert set(next(iter(rules(fresh("prefix", "clip_vit_tiny", reparam="mlp_relu")).values()))) == {
        "reparam.2.weight"
    }
