"""Residual adapters: the equations, counts and properties of spec residual_adapters 2.2, 2.4, 3.1 and 7."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

from mdltool.adapters import ADAPTERS
from mdltool.adapters.base import attach
from mdltool.backbones import BACKBONES
from mdltool.errors import MdlError
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import AdapterSpec, ModelSpec, build_backbone, choose_sites
from mdltool.recipe import load
from mdltool.stages import describe
from mdltool.types import ModuleShape, Site
from mdltool.wrapping import Route
from tests.figures import check_remarks

FORMS = ("parallel", "series")
# inputs, outputs, kernel, stride, groups, size of the input
CONVOLUTIONS = {
    "3x3": (5, 5, (3, 3), (1, 1), 1, (6, 7)),
    "strided": (4, 8, (3, 3), (2, 2), 1, (6, 8)),
    "strided, odd": (4, 8, (3, 3), (2, 2), 1, (7, 9)),
    "5x3": (3, 6, (5, 3), (1, 2), 1, (5, 6)),
    "one pixel": (3, 2, (7, 7), (2, 2), 1, (1, 1)),
    "1x3x3": (4, 4, (1, 3, 3), (1, 2, 2), 1, (3, 5, 6)),
    "3x1x1": (6, 3, (3, 1, 1), (1, 1, 1), 1, (4, 3, 3)),
    "3x3x3": (2, 4, (3, 3, 3), (2, 2, 2), 1, (5, 4, 7)),
    "depthwise": (6, 6, (3, 3, 3), (1, 2, 2), 6, (3, 5, 5)),
    "groups": (6, 4, (3, 3), (1, 1), 2, (4, 5)),
}


def make(form: str, case: str, role: str = "first", **options: Any) -> tuple[nn.Module, nn.Module, Tensor, Route]:
    """An adapted convolution in eval mode, the adapter of domain a, an input, and the route; float64."""
    inputs, outputs, kernel, stride, groups, size = CONVOLUTIONS[case]
    torch.manual_seed(3)
    layer = nn.Conv2d if len(kernel) == 2 else nn.Conv3d
    padding = tuple(side // 2 for side in kernel)
    convolution: Any = layer(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    method, route, net = ADAPTERS.load(form), Route("a"), nn.Sequential(convolution)
    shape = ModuleShape(outputs, kernel, stride, groups)
    site = Site("s", "0", "conv", "BCHW" if len(kernel) == 2 else "BCTHW", inputs, (1, 1, 1), role, 1, None, shape)
    wrapper = attach(net, [site], ["a", "b"], method, method.Options(**options), route)["s"]
    adapter = wrapper.adapters["a"]
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)
    if isinstance(getattr(adapter, "norm", None), nn.BatchNorm2d | nn.BatchNorm3d):
        adapter.norm.running_mean.normal_(std=0.2)
        adapter.norm.running_var.uniform_(0.5, 2)
    return net.double().eval(), adapter, torch.randn(2, inputs, *size, dtype=torch.float64), route


def by_taps(x: Tensor, weight: Tensor, stride: tuple[int, ...]) -> Tensor:
    """A convolution padded by half its kernel, written as a sum over its taps; a group-free weight."""
    kernel = weight.shape[2:]
    padded = functional.pad(x, [side // 2 for side in reversed(kernel) for _ in range(2)])
    total = None
    for tap in itertools.product(*map(range, kernel)):
        part = padded
        for axis, (start, length, step) in enumerate(zip(tap, x.shape[2:], stride, strict=True), 2):
            part = part.narrow(axis, start, length)[(slice(None),) * axis + (slice(None, None, step),)]
        term = torch.einsum("oc,bc...->bo...", weight[(..., *tap)], part)
        total = term if total is None else total + term
    assert total is not None
    return total


def dense(weight: Tensor, groups: int) -> Tensor:
    """A grouped weight with the zeros written out."""
    outputs, width = weight.shape[0] // groups, weight.shape[1]
    full = weight.new_zeros(weight.shape[0], width * groups, *weight.shape[2:])
    for g in range(groups):
        rows = slice(g * outputs, (g + 1) * outputs)
        full[rows, g * width : (g + 1) * width] = weight[rows]
    return full


def matrix(adapter: Any) -> Tensor:
    return dense(adapter.matrix.weight, adapter.matrix.groups).flatten(1)


@pytest.mark.parametrize("grouped", ["diagonal", "dense"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_parallel_is_a_matrix_added_to_the_centre_tap(case: str, grouped: str) -> None:
    net, adapter, x, _ = make("parallel", case, grouped=grouped)
    inputs, outputs, kernel, stride, groups, _ = CONVOLUTIONS[case]
    a = matrix(adapter)
    assert a.shape == (outputs, inputs)
    folded = dense(net[0].inner.weight, groups).clone()
    folded[(..., *(side // 2 for side in kernel))] += a
    torch.testing.assert_close(net(x), by_taps(x, folded, stride), rtol=0, atol=1e-12)
    if grouped == "diagonal":  # the filter keeps its groups
        assert adapter.matrix.weight.numel() == outputs * inputs // groups
        assert (a[dense(torch.ones_like(net[0].inner.weight), groups).flatten(2)[..., 0] == 0] == 0).all()


@pytest.mark.parametrize("pre_bn", [True, False])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_series_is_a_matrix_on_the_outputs(case: str, pre_bn: bool) -> None:
    net, adapter, x, _ = make("series", case, pre_bn=pre_bn, grouped="diagonal")
    outputs, stride, groups = CONVOLUTIONS[case][1], CONVOLUTIONS[case][3], CONVOLUTIONS[case][4]
    a, identity = matrix(adapter), torch.eye(outputs, dtype=torch.float64)
    assert a.shape == (outputs, outputs)
    filters = dense(net[0].inner.weight, groups)
    if not pre_bn:
        expected = by_taps(x, torch.einsum("ed,dc...->ec...", identity + a, filters), stride)
    else:  # spec 2.3: g = (I + a diag(s)) f, bias a b
        norm = adapter.norm
        s = norm.weight / (norm.running_var + norm.eps).sqrt()
        b = norm.bias - norm.running_mean * s
        expected = by_taps(x, torch.einsum("ed,dc...->ec...", identity + a * s, filters), stride)
        expected = expected + (a @ b).view(1, -1, *[1] * (x.ndim - 2))
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-12)


def test_series_normalises_with_the_batch_in_training() -> None:
    net, adapter, x, _ = make("series", "3x3")
    z = net[0].inner(x)
    mean, variance = z.mean((0, 2, 3), keepdim=True), z.var((0, 2, 3), unbiased=False, keepdim=True)
    scale, shift = (p.view(1, -1, 1, 1) for p in (adapter.norm.weight, adapter.norm.bias))
    normed = (z - mean) / (variance + adapter.norm.eps).sqrt() * scale + shift
    expected = z + torch.einsum("oc,bchw->bohw", matrix(adapter), normed)
    torch.testing.assert_close(net.train()(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("form", "case"), itertools.product(FORMS, CONVOLUTIONS))
def test_domains_have_matrices_of_their_own(form: str, case: str) -> None:
    net, _, x, route = make(form, case)
    before = net(x)
    route.domain = "b"
    assert not torch.equal(net(x), before)
    nn.init.zeros_(net[0].adapters["b"].matrix.weight)
    assert torch.equal(net(x), net[0].inner(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dropout", "role"), itertools.product(["00", "10", "01", "11"], ["stem", "first", "second"])
)
def test_dropout_is_on_the_adapters_copy_alone(form: str, dropout: str, role: str) -> None:
    options = {"pre_bn": False} if form == "series" else {}
    net, adapter, x, _ = make(form, "3x3", role, dropout=dropout, **options)
    with torch.no_grad():
        adapter.matrix.weight.copy_(torch.eye(5).view(5, 5, 1, 1))
    own = net[0].inner(x)
    copied = x if form == "parallel" else own
    torch.testing.assert_close(net(x), own + copied, rtol=0, atol=1e-12)
    torch.manual_seed(0)
    factors = ((net.train()(x) - own) / copied).flatten(2)
    assert (factors - factors[..., :1]).abs().max() < 1e-9  # whole channels
    seen = set(factors[..., 0].round(decimals=6).flatten().tolist())
    drops = dropout[1 if role == "second" else 0] == "1"
    assert seen == ({0.0, 2.0} if drops else {1.0})


def test_dropout_positions_are_read_from_unquoted_yaml() -> None:
    options = ADAPTERS.load("parallel").Options
    for text in ("00", "10", "01", "11"):
        assert options(**yaml.safe_load(f"dropout: {text}")).dropout == text
    with pytest.raises(ValueError, match="dropout"):
        options(dropout=2)


@pytest.mark.parametrize(
    ("form", "init", "std"),
    [(f, *i) for f in FORMS for i in (("he", (2 / 256) ** 0.5), ("small", 1e-3), ("zero", 0.0))],
)
def test_initialisation(form: str, init: str, std: float) -> None:
    method = ADAPTERS.load(form)
    site = Site("s", "0", "conv", "BCHW", 128, (1, 8, 8), "first", 3, None, ModuleShape(256, (3, 3), (2, 2)))
    torch.manual_seed(0)
    adapter = method(site, method.Options(init=init))
    weight = adapter.matrix.weight.detach()
    assert weight.shape == (256, 128 if form == "parallel" else 256, 1, 1)
    assert adapter.matrix.bias is None
    assert float(weight.std()) == pytest.approx(std, rel=0.02)
    if form == "series":
        state = {key: set(value.flatten().tolist()) for key, value in adapter.norm.state_dict().items()}
        expected = {"weight": {1.0}, "bias": {0.0}, "running_mean": {0.0}, "running_var": {1.0}}
        assert state == expected | {"num_batches_tracked": {0}}


def test_what_has_no_centre_tap_is_refused() -> None:
    method = ADAPTERS.load("parallel")
    site = Site("s", "0", "conv", "BCHW", 4, (1, 8, 8), "first", 1, None, ModuleShape(4, (2, 2), (1, 1)))
    with pytest.raises(MdlError, match="no centre"):
        method(site, method.Options())
    site = Site("s", "0", "conv", "BCHW", 4, (1, 8, 8), "first", 1, None, ModuleShape(4, (3, 3), (1, 1)))
    net = nn.Sequential(nn.Conv2d(4, 4, 3))
    attach(net, [site], ["a"], method, method.Options(), Route("a"))
    with pytest.raises(MdlError, match="padded by half"):
        net(torch.zeros(1, 4, 8, 8))


# whole networks


def spec(form: str | None, backbone: str = "resnet26_tiny", domains: int = 2, **options: Any) -> ModelSpec:
    factory = BACKBONES.load(backbone)
    adapters = [AdapterSpec(form, "all", options)] if form else []
    names = {f"d{i}": 3 for i in range(domains)}
    size = (factory.default_frames, factory.default_crop)
    return ModelSpec(backbone, {}, *size, names, adapters, bn="per_domain", dropout=0.0)


def counted(form: str | None, backbone: str = "resnet26", domains: int = 1, **options: Any) -> dict[str, Any]:
    """Parameter counts; `matrices`, `inner_norms` and `sites` are of one domain."""
    with torch.device("meta"):
        model = build_model(spec(form, backbone, domains, **options))
    adapters = [wrapper.adapters["d0"] for wrapper in model.sites.values()]
    matrices = sum(adapter.matrix.weight.numel() for adapter in adapters)
    own = sum(p.numel() for adapter in adapters for p in adapter.parameters())
    return model.parameter_counts() | {"matrices": matrices, "inner_norms": own - matrices, "sites": len(adapters)}


def small(form: str, backbone: str, seed: int = 0, **options: Any) -> MultiDomainModel:
    torch.manual_seed(seed)
    model = build_model(spec(form, backbone, **options)).double()
    model.apply_regime("frozen", "per_domain")
    return model.eval()


def clip(model: MultiDomainModel, batch: int = 4) -> Tensor:
    shape = (batch, 3, model.spec.num_frames, model.spec.crop, model.spec.crop)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    ("form", "options"),
    [("parallel", {}), ("series", {}), ("series", {"pre_bn": False}), ("parallel", {"dropout": "11"})],
)
@pytest.mark.parametrize("backbone", ["resnet26_tiny", "x3d_tiny"])
def test_zero_adapters_are_the_source_network(form: str, options: dict[str, Any], backbone: str) -> None:
    """Property 1."""
    described = spec(form, backbone, init="zero", **options)
    torch.manual_seed(0)
    source = build_backbone(described).double()
    for module in source.modules():  # X3D's last norm of a block starts at 0, which would hide the block
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    bare = copy.deepcopy(source).eval()
    model = build_model(described, source).double().eval()
    x = clip(model)
    for domain, head in model.heads.items():
        assert torch.equal(model(x, domain), head(bare(x)).mean(1))


@pytest.mark.parametrize("form", FORMS)
def test_zero_matrices_learn(form: str) -> None:
    model = small(form, "resnet26_tiny", init="zero").train()
    functional.cross_entropy(model(clip(model), "d0"), torch.tensor([0, 1, 2, 0])).backward()
    for name, wrapper in model.sites.items():
        assert wrapper.adapters["d0"].matrix.weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize("form", FORMS)
def test_training_a_domain_moves_nothing_but_its_own(form: str) -> None:
    model = small(form, "resnet26_tiny").train()
    before = {key: tensor.clone() for key, tensor in model.tensors().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    functional.cross_entropy(model(clip(model), "d0"), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    moved = {key for key, tensor in model.tensors().items() if not torch.equal(tensor, before[key])}
    assert all(key.startswith("d0/") for key in moved)
    own = {key for key in before if key.startswith("d0/")}
    # The domain's BatchNorm takes out what the inner norm's bias adds.
    assert not {key for key in own - moved if not key.endswith("/norm.bias")}
    for name, wrapper in model.sites.items():
        if form == "series":
            assert wrapper.adapters["d0"].norm.bias.grad.abs().max() < 1e-12, name


def test_counts_of_the_forms() -> None:
    """Spec 3.1."""
    parallel, series, bare = counted("parallel"), counted("series"), counted(None)
    assert (parallel["sites"], parallel["matrices"], parallel["inner_norms"]) == (25, 645_216, 0)
    assert (series["sites"], series["matrices"]) == (25, 689_152)
    assert series["inner_norms"] + 7_744 == 14_976
    assert 9 * parallel["matrices"] == 5_806_944
    assert parallel["per_domain"]["d0"] == {"adapters": 652_960, "head": 257 * 3}
    assert series["per_domain"]["d0"]["adapters"] == 704_128
    assert bare["per_domain"]["d0"]["adapters"] == 7_744
    assert {found["backbone"] for found in (parallel, series, bare)} == {5_814_688}
    assert counted("series", pre_bn=False)["inner_norms"] == 0


def test_nine_domains_double_the_filters() -> None:
    found = counted("parallel", domains=9)
    assert found["backbone"] + sum(part["adapters"] for part in found["per_domain"].values()) == 11_691_328
    assert 5_806_944 + 9 * found["matrices"] == 11_613_888
    assert found["adapters"] == 9 * 652_960 - 7_744  # one copy of the norms stands for the backbone's


@pytest.mark.parametrize("form", FORMS)
def test_placements_add_up_to_all(form: str) -> None:
    """Property 14, and the counts of the parts for the parallel form."""
    parts = {name: counted(form, placement=name) for name in ("early", "mid", "late")}
    assert sum(part["matrices"] for part in parts.values()) == counted(form)["matrices"]
    assert [part["sites"] for part in parts.values()] == [9, 8, 8]
    if form == "parallel":
        assert [part["matrices"] for part in parts.values()] == [30_720 + 96, 122_880, 491_520]
        assert counted(form, placement="first")["matrices"] == 301_152
        assert counted(form, placement="half")["matrices"] == 344_160


@pytest.mark.parametrize(
    ("placement", "stem", "expected"),
    [
        ("early", "never", 30_720),
        ("all", "never", 645_120),
        ("mid", "always", 122_976),
        ("half", "never", 344_064),
        ("late", "early", 491_520),
    ],
)
def test_the_stem_belongs_where_it_is_put(placement: str, stem: str, expected: int) -> None:
    assert counted("parallel", placement=placement, stem=stem)["matrices"] == expected


@pytest.mark.parametrize(
    ("backbone", "options", "sites", "weights"),
    [
        ("slow_r50", {}, 16, 1_257_472),
        ("slow_r50", {"convs": ["conv_a"]}, 9, 4_063_232),
        ("slow_r50", {"convs": ["conv_stem"]}, 1, 192),
        ("slow_r50", {"convs": ["conv_a", "conv_b", "conv_stem"]}, 26, 5_320_896),
        ("slow_r50", {"convs": ["conv_b", "conv_stem"], "stem": "never"}, 16, 1_257_472),
        ("x3d_m", {}, 26, 6_102),
        ("x3d_m", {"grouped": "dense"}, 26, 3 * 54**2 + 5 * 108**2 + 11 * 216**2 + 7 * 432**2),
    ],
)
def test_video_networks(backbone: str, options: dict[str, Any], sites: int, weights: int) -> None:
    found = counted("parallel", backbone, **options)
    assert (found["sites"], found["matrices"]) == (sites, weights)
    assert counted("series", backbone, **options)["sites"] == sites


def test_placements_of_a_network_of_four_stages_add_up_too() -> None:
    parts = [counted("parallel", "slow_r50", placement=name)["sites"] for name in ("early", "mid", "late")]
    assert parts == [3, 4, 9]


def test_stage_adapters_keep_to_stages_and_halves_need_pairs() -> None:
    factory = BACKBONES.load("slow_r50")
    with torch.device("meta"):
        places = factory(factory.Options(), 8, 224).places()
    stage, parallel = ADAPTERS.load("2plus1d"), ADAPTERS.load("parallel")
    assert choose_sites("all", places, stage, stage.Options()) == [f"stage{i}" for i in range(1, 6)]
    first = choose_sites("early-1", places, parallel, parallel.Options())
    assert first == ["stage2.1.conv_b", "stage2.2.conv_b", "stage2.3.conv_b"]
    with pytest.raises(MdlError, match="no site for the adapter"):
        choose_sites("all", places, parallel, parallel.Options(placement="half"))


# recipe -> sites, adapters' matrices of one domain, size by count (spec 1)
RECIPES = {
    "residual_finetune": (0, 0, None),
    "residual_bn_only": (0, 0, 1.0),
    "residual_series": (25, 689_152, 2.068),
    "residual_parallel": (25, 645_216, 2.0),
    "residual_parallel_early": (9, 30_816, 1.048),
    "residual_parallel_mid": (8, 122_880, 1.190),
    "residual_parallel_late": (8, 491_520, 1.762),
    "residual_parallel_half": (13, 344_160, 1.533),
    "residual_parallel_svd": (25, 645_216, 2.0),  # before the compression
}
CLASSES = {"aircraft": 100, "cifar100": 100, "dped": 2, "dtd": 47, "gtsrb": 43}
CLASSES |= {"flowers": 102, "omniglot": 1623, "svhn": 10, "ucf101": 101}


# domain -> classes (spec 5, transfer)
TRANSFER = {"cifar100": 100, "ucf101": 101, "places": 205}
# recipe -> adapters of the domain without its BatchNorms' copies
METHODS = {"finetune": 0, "series": 689_152 + 7_232, "parallel": 645_216}


@pytest.mark.parametrize(("domain", "method"), itertools.product(TRANSFER, METHODS))
def test_recipes_of_transfer(domain: str, method: str) -> None:
    recipe = load(f"residual_transfer_{domain}_{method}")
    found = describe.run(recipe)["parameters"]
    assert {name: part.classes for name, part in recipe.domains.items()} == {domain: TRANSFER[domain]}
    assert (found["backbone"], found["adapters"]) == (5_814_688, METHODS[method])
    assert found["heads"] == 257 * TRANSFER[domain]
    # what is trained: the filters too, or the domain's own parts, its BatchNorms among them
    frozen = 0 if method == "finetune" else 5_806_944
    assert found["trainable"] == 5_814_688 + found["adapters"] + found["heads"] - frozen


@pytest.mark.parametrize("kind", ["plain", "dropout"])
@pytest.mark.parametrize(
    ("name", "width", "filters"),
    [
        ("0p5", 0.5, 1_451_952),
        ("1", 1.0, 5_806_944),
        ("1p5", 1.5, 13_064_976),
        ("2", 2.0, 23_226_048),
        ("2p5", 2.5, 36_290_160),
    ],
)
def test_recipes_of_widths(name: str, width: float, filters: int, kind: str) -> None:
    recipe = load(f"residual_width{name}_{kind}")
    assert recipe.adapters[0].options["dropout"] == {"plain": "00", "dropout": "01"}[kind]
    found = describe.run(recipe)
    assert len(found["sites"]) == 25
    counts = found["parameters"]
    assert counts["backbone"] == filters + round(7_744 * width)
    assert 9 * counts["adapters"] == filters
    assert counts["heads"] == (256 * width + 1) * 100


def test_points_of_the_curves_are_parts_of_the_training_data() -> None:
    tenth = load("residual_transfer_ucf101_parallel", ["data.fraction=0.1"])
    assert (tenth.data.fraction, tenth.data.per_class) == (0.1, None)
    assert load("residual_width2p5_dropout", ["data.per_class=50"]).data.per_class == 50


def test_single_domains_are_normalised_as_among_the_nine() -> None:
    nine = load("residual_parallel").domains
    for name in ("residual_transfer_cifar100_series", "residual_transfer_ucf101_finetune", "residual_width1_plain"):
        ((domain, part),) = load(name).domains.items()
        assert part.normalize == nine[domain].normalize is not None


def test_the_recipe_from_scratch_is_the_whole_network() -> None:
    found = describe.run(load("residual_scratch"))["parameters"]
    assert found["total"] == found["trainable"] == 5_814_688 + 25_700


def test_recipes_of_the_source() -> None:
    bare, series = (describe.run(load(f"residual_pretrain{part}"))["parameters"] for part in ("", "_series"))
    assert bare["total"] == bare["trainable"] == 6_071_688
    assert (bare["backbone"], series["backbone"], bare["adapters"]) == (5_814_688, 5_814_688, 0)
    assert series["adapters"] == 689_152 + 7_232
    assert series["total"] == series["trainable"] == 6_071_688 + 689_152 + 7_232


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str) -> None:
    recipe = load(name)
    sites, weights, size = RECIPES[name]
    found = describe.run(recipe)
    assert len(found["sites"]) == sites
    assert recipe.train.bn == "per_domain"
    if name != "residual_bn_only":  # the paper has no such row
        assert recipe.published is not None
        assert set(recipe.published.top1) == {"imagenet", *CLASSES}
        assert round(check_remarks(name, found["published"])["size"]["ours"], 3) == (size or 10)
    if size is None:  # one network for each domain
        assert len(recipe.domains) == 1
        return
    assert {domain: part.classes for domain, part in recipe.domains.items()} == CLASSES
    inner_norms = 7_232 if name == "residual_series" else 0
    assert {part["adapters"] for part in found["per_domain"].values()} == {weights + 7_744 + inner_norms}
    assert found["parameters"]["heads"] == sum(257 * classes for classes in CLASSES.values()) == 803_896 - 257_000
    assert round(1 + 9 * weights / 5_806_944, 3) == size
    assert found["parameters"]["trainable"] == sum(
        part["adapters"] + part["head"] for part in found["per_domain"].values()
    )
