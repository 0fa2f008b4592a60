"""Adapters and BatchNorms folded into weights: the same function, or a refusal (spec residual_adapters 2.3)."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mdltool.adapters import ADAPTERS
from mdltool.adapters.base import NotFoldable, attach
from mdltool.adapters.domain_norm import BATCH_NORMS
from mdltool.adapters.factored import FactorSpec
from mdltool.backbones import BACKBONES
from mdltool.backbones.base import Backbone
from mdltool.compress.factoring import site_weights
from mdltool.compress.fusing import check_foldable, fused, is_sum, norms_after, subtract
from mdltool.errors import MdlError
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import AdapterSpec, ModelSpec
from mdltool.types import ModuleShape, Place, Site
from mdltool.wrapping import Route, Wrapper, library_modules
from tests.adapters.test_contract import PAIRS
from tests.adapters.test_residual import CONVOLUTIONS, make

LINEAR = ("parallel", "series", "lora")


def model_of(
    *adapters: AdapterSpec, backbone: str = "resnet26_tiny", bn: str = "per_domain", **fields: Any
) -> MultiDomainModel:
    """Two domains, in eval mode, whose adapters, BatchNorms and statistics are what training may leave."""
    factory = BACKBONES.load(backbone)
    shape = (factory.default_frames, factory.default_crop)
    torch.manual_seed(0)
    model = build_model(ModelSpec(backbone, {}, *shape, {"a": 3, "b": 4}, list(adapters), bn=bn, **fields))
    norms: list[Any] = [m for m in model.modules() if isinstance(m, BATCH_NORMS)]
    norms += [own for norm in model.norms.values() for own in norm.statistics.values()]
    for norm in norms:
        if norm.weight is not None:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
        norm.momentum = 1.0
    for site in model.sites.values():
        for name, parameter in site.adapters.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=0.1)
    if norms:
        model.train()
        with torch.no_grad():
            for domain in ("a", "b"):
                model(clip_of(model, 8), domain)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def clip_of(model: MultiDomainModel, batch: int = 2) -> Tensor:
    spec = model.spec
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, spec.num_frames, spec.crop, spec.crop, generator=generator)


def difference(model: MultiDomainModel, domain: str, fold_bn: bool = False) -> float:
    """How far the fused model's logits are off, relative to the largest."""
    clips = clip_of(model).to(next(model.parameters()).dtype)
    with torch.no_grad():
        expected = model(clips, domain)
        assert expected.abs().max() > 1e-2
        made = fused(copy.deepcopy(model), domain, fold_bn)
        assert not any(isinstance(module, Wrapper) for module in made.modules())
        return float((made(clips, domain) - expected).abs().max() / expected.abs().max())


def assert_fused_is_same(model: MultiDomainModel, fold_bn: bool = False) -> None:
    """The same logits in float32, and the same function: what is left of the difference in float64 is rounding."""
    assert difference(model, "a", fold_bn) < 1e-5
    assert difference(model.double(), "b", fold_bn) < 1e-11


@pytest.mark.parametrize("form", ["parallel", "series", "series without norm"])
@pytest.mark.parametrize("case", [name for name in CONVOLUTIONS if name != "groups"])
def test_a_folded_convolution_is_the_adapted_one(form: str, case: str) -> None:
    """Strides, 3D kernels, depthwise ones, single pixels; with a bias of the layer's own too."""
    options = {"pre_bn": False} if form.endswith("norm") else {}
    net, adapter, x, _ = make(form.split()[0], case, **options)
    layer = net[0].inner
    for bias in (None, torch.randn(layer.out_channels, dtype=torch.float64)):
        layer.bias = None if bias is None else nn.Parameter(bias)
        plain = copy.deepcopy(layer)
        weight, bias = adapter.folded(layer)
        assert (bias is None) == (layer.bias is None and form != "series")
        plain.weight, plain.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
        torch.testing.assert_close(plain(x), net(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["parallel", "series"])
def test_groups_keep_to_themselves(form: str) -> None:
    net, adapter, x, _ = make(form, "groups")
    plain = copy.deepcopy(net[0].inner)
    weight, bias = adapter.folded(plain)
    plain.weight, plain.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
    torch.testing.assert_close(plain(x), net(x), rtol=0, atol=1e-12)
    for case in ("groups", "depthwise"):
        net, adapter, _, _ = make(form, case, grouped="dense")
        with pytest.raises(NotFoldable, match="dense"):
            adapter.folded(net[0].inner)


def test_a_convolution_without_padding_has_no_centre_tap_there() -> None:
    """Of a stride that hides it: both paths give the same shape."""
    method, shape = ADAPTERS.load("parallel"), ModuleShape(4, (3, 3), (4, 4))
    site = Site("s", "0", "conv", "BCHW", 4, (1, 8, 8), "first", 1, None, shape)
    net = nn.Sequential(nn.Conv2d(4, 4, 3, 4))
    adapter: Any = attach(net, [site], ["a"], method, method.Options(), Route("a"))["s"].adapters["a"]
    assert net(torch.zeros(1, 4, 8, 8)).shape == (1, 4, 2, 2)
    layer: Any = net[0]
    with pytest.raises(NotFoldable, match="padded by half"):
        adapter.folded(layer.inner)


@pytest.mark.parametrize("fold_bn", [False, True])
@pytest.mark.parametrize("bn", ["per_domain", "per_domain_stats", "frozen"])
@pytest.mark.parametrize("form", ["parallel", "series"])
def test_networks_compute_the_same(form: str, bn: str, fold_bn: bool) -> None:
    """Property 2, with dropout in the adapters, which is off."""
    assert_fused_is_same(model_of(AdapterSpec(form, "all", {"dropout": "11"}), bn=bn, dropout=0.5), fold_bn)


@pytest.mark.parametrize("fold_bn", [False, True])
@pytest.mark.parametrize("options", [{}, {"convs": ["conv_a", "conv_b", "conv_stem"]}], ids=["conv_b", "all"])
@pytest.mark.parametrize("form", ["parallel", "series"])
def test_video_networks_compute_the_same(form: str, options: dict[str, Any], fold_bn: bool) -> None:
    assert_fused_is_same(model_of(AdapterSpec(form, "all", options), backbone="x3d_tiny"), fold_bn)


@pytest.mark.parametrize("backbone", [backbone for adapter, backbone in PAIRS if adapter == "lora"])
@pytest.mark.parametrize("targets", [["q", "k", "v"], ["v"]])
def test_transformers_compute_the_same(backbone: str, targets: list[str]) -> None:
    assert_fused_is_same(
        model_of(AdapterSpec("lora", "all", {"r": 3, "targets": targets}), backbone=backbone, bn="frozen")
    )


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize(
    ("form", "backbone"), [("parallel", "resnet26_tiny"), ("series", "resnet26_tiny"), ("lora", "swin3d_tiny")]
)
def test_compressed_adapters_fold_by_their_products(form: str, backbone: str, independent: bool) -> None:
    adapters = AdapterSpec(form, "all", {"r": 3} if form == "lora" else {})
    factors: dict[str, dict[str, FactorSpec]] = {}
    for weight in site_weights(model_of(adapters, backbone=backbone)):
        factors.setdefault(weight.site, {})[weight.parameter] = FactorSpec(2, weight.axes, independent)
    model = model_of(adapters, backbone=backbone, factors=factors)
    assert any(key.endswith(".private") for key in model.tensors())
    assert_fused_is_same(model)
    assert fused(model, "a").spec.factors == {}


@pytest.mark.parametrize("order", [("parallel", "series"), ("series", "parallel")])
def test_two_adapters_at_a_convolution(order: tuple[str, str]) -> None:
    assert_fused_is_same(model_of(*(AdapterSpec(form, "all") for form in order)))


@pytest.mark.parametrize("backbone", ["resnet26_tiny", "x3d_tiny"])
def test_without_adapters_a_domains_own_batchnorms_become_the_networks(backbone: str) -> None:
    assert_fused_is_same(model_of(backbone=backbone))


def test_folding_leaves_no_batchnorm_but_the_one_after_a_sum() -> None:
    model = model_of(AdapterSpec("series", "all"))
    made = fused(copy.deepcopy(model), "a", fold_bn=True)
    left = [path for path, module in library_modules(made.backbone.net) if isinstance(module, BATCH_NORMS)]
    assert left == ["end_bn"]
    assert made.spec.fused is not None
    assert len(made.spec.fused.norms) == len(made.spec.fused.biases) == 25
    plain = fused(model, "a")
    assert plain.spec.fused is not None
    assert (plain.spec.fused.norms, plain.spec.fused.biases) == ([], [])  # the means took them


def test_a_bias_stays_where_no_batchnorm_follows() -> None:
    """X3D's stem is two convolutions; the adapter's is the first."""
    made = fused(model_of(AdapterSpec("series", "all", {"convs": ["conv_stem"]}), backbone="x3d_tiny"), "a")
    assert made.spec.fused is not None
    assert made.spec.fused.biases == ["blocks.0.conv.conv_t"]


@pytest.mark.parametrize("fold_bn", [False, True])
def test_a_fused_model_is_rebuilt_from_its_spec_and_its_tensors(fold_bn: bool) -> None:
    model = model_of(AdapterSpec("series", "all", {"convs": ["conv_b", "conv_stem"]}), backbone="x3d_tiny")
    made = fused(model, "b", fold_bn)
    spec = ModelSpec.from_json(made.spec.to_json())
    assert spec == made.spec
    assert (spec.domains, spec.adapters, spec.bn) == ({"b": 4}, [], "frozen")
    again = build_model(spec)
    again.load_tensors(made.tensors(), "test")
    assert torch.equal(again.eval()(clip_of(made), "b"), made(clip_of(made), "b"))
    assert all(key.startswith(("backbone/", "b/head/")) for key in made.tensors())


@pytest.mark.parametrize(
    ("form", "backbone"), [("parallel", "x3d_tiny"), ("series", "resnet26_tiny"), ("lora", "swin3d_tiny")]
)
def test_a_fused_network_is_the_librarys_own(form: str, backbone: str) -> None:
    """Layer for layer, so that it costs what the bare backbone costs."""
    made = fused(model_of(AdapterSpec(form, "all"), backbone=backbone), "a")
    bare = build_model(dataclasses.replace(made.spec, fused=None))
    assert [str(type(m)) for m in made.modules()] == [str(type(m)) for m in bare.modules()]
    shapes = {key: tensor.shape for key, tensor in bare.tensors().items()}
    assert {key: tensor.shape for key, tensor in made.tensors().items()} == shapes


def test_specs_of_older_models_are_read() -> None:
    written = model_of().spec.to_json()
    del written["fused"]
    assert ModelSpec.from_json(written).fused is None


@pytest.mark.parametrize(("adapter", "backbone"), dict(PAIRS).items())
def test_every_adapter_folds_exactly_or_says_why_not(adapter: str, backbone: str) -> None:
    model = model_of(AdapterSpec(adapter, "all"), backbone=backbone, bn="frozen")
    if adapter in LINEAR:
        check_foldable(model, "a", "test")
        assert difference(model, "a") < 1e-5
        return
    with pytest.raises(MdlError, match=rf"{adapter} at \S+.*: ") as refusal:
        check_foldable(model, "a", "test")
    site = next(iter(model.sites.values()))
    assert site.adapters["a"].unfoldable in refusal.value.what


def test_of_several_adapters_those_that_cannot_are_named() -> None:
    model = model_of(AdapterSpec("lora", "all"), AdapterSpec("mhva", "all"), backbone="vit_tiny", bn="frozen")
    with pytest.raises(MdlError, match="ReLU") as refusal:
        check_foldable(model, "a", "test")
    assert "mhva at block1.mlp, block2.mlp" in refusal.value.what
    assert "lora" not in refusal.value.what


@pytest.mark.parametrize(
    ("form", "backbone", "sums"),
    [("parallel", "resnet26_tiny", True), ("lora", "swin3d_tiny", True), ("series", "resnet26_tiny", False)],
)
def test_what_was_added_can_be_subtracted(form: str, backbone: str, sums: bool) -> None:
    """Property 2: within 1e-6."""
    model = model_of(AdapterSpec(form, "all"), backbone=backbone, bn="frozen")
    assert is_sum(model, "a") == sums
    if not sums:
        return
    before = {key: tensor.clone() for key, tensor in model.tensors().items()}
    folded = fused(copy.deepcopy(model), "a").tensors()
    model.load_tensors(before | {key: folded[key] for key in folded if key.startswith("backbone/")}, "test")
    subtract(model, "a")
    for key, tensor in model.tensors().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=1e-6)
    assert not torch.equal(folded["backbone/" + _weight(form)], before["backbone/" + _weight(form)])


def _weight(form: str) -> str:
    return "stem.conv.weight" if form == "parallel" else "features.0.0.attn.qkv.weight"


class Tangle(nn.Module):
    """Convolutions and BatchNorms that belong together, and some that only seem to."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.read_twice, self.runs_twice, self.viewed, self.of_two, self.last = (
            nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(6)
        )
        self.good_bn, self.read_twice_bn, self.runs_twice_bn, self.viewed_bn, self.of_two_bn = (
            nn.BatchNorm2d(3) for _ in range(5)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.good_bn(self.good(x)), inplace=True)
        y = self.read_twice(x)
        x = self.read_twice_bn(y) + y
        x = self.runs_twice(self.runs_twice_bn(self.runs_twice(x)))
        x = self.viewed_bn(self.viewed(x).transpose(2, 3))
        return self.of_two_bn(self.of_two(x)) + self.of_two_bn(self.last(x))


class TangleBackbone(Backbone):
    def __init__(self) -> None:
        super().__init__(Tangle(), 3, 1, 8)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        features: Tensor = self.net(x_BCTHW[:, :, 0]).mean((2, 3))[:, None]
        return features

    def places(self) -> dict[str, Place]:
        return {}


def test_only_a_norm_that_alone_reads_a_convolution_follows_it() -> None:
    assert norms_after(TangleBackbone()) == {"good": "good_bn"}


def test_a_changed_spec_keeps_what_fusing_does_not_touch() -> None:
    pixels = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    other = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    head = {"head": "mlp", "head_hidden": 16}
    model = model_of(AdapterSpec("parallel", "all"), normalize={"a": pixels, "b": other}, **head)
    made = fused(copy.deepcopy(model), "a")
    alone = {"domains": {"a": 3}, "normalize": {"a": pixels}}
    kept = dataclasses.replace(model.spec, **alone, adapters=[], bn="frozen", fused=made.spec.fused)
    assert made.spec == kept
    assert difference(model, "a") < 1e-5
    frames = torch.randint(256, (2, 3, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(made(frames, "a"), model(frames, "a"), rtol=1e-4, atol=1e-5)
