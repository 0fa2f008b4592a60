"""ResNet-26 against a restatement over its state dict, and the counts of spec residual_adapters 3.1 and 4."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mdltool.backbones import BACKBONES
from mdltool.backbones.base import Backbone
from mdltool.errors import MdlError
from mdltool.model import build_model
from mdltool.model_spec import AdapterSpec, ModelSpec
from mdltool.stages.describe import gflops_per_view


def make(name: str = "resnet26_tiny", frames: int = 1, crop: int = 32, **options: object) -> Backbone:
    """A seeded backbone in float64 and eval mode whose norms are away from ones and zeros."""
    factory = BACKBONES.load(name)
    torch.manual_seed(0)
    backbone: Backbone = factory(factory.Options(**options), frames, crop)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
    return backbone.double().eval()


def pictures(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def restated(state: dict[str, Tensor], x: Tensor, grids: list[tuple[int, ...]] | None = None) -> Tensor:
    """Features [B, F] of pictures [B, 3, H, W] by spec 2.1, with plain functions only."""

    def norm(y: Tensor, at: str) -> Tensor:
        statistics = state[f"{at}.running_mean"], state[f"{at}.running_var"]
        return functional.batch_norm(y, *statistics, state[f"{at}.weight"], state[f"{at}.bias"], eps=1e-5)

    def unit(y: Tensor, at: str, stride: int = 1) -> Tensor:
        return norm(functional.conv2d(y, state[f"{at}.conv.weight"], stride=stride, padding=1), f"{at}.bn")

    grids = [] if grids is None else grids
    x = unit(x, "stem")
    grids.append(tuple(x.shape[2:]))
    for macro in ("early", "mid", "late"):
        for i in range(4):
            y = functional.relu(unit(x, f"{macro}.{i}.first", 2 if i == 0 else 1))
            y = unit(y, f"{macro}.{i}.second")
            if i == 0:
                pooled = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
                x = torch.cat([pooled, pooled * 0], 1)
            x = functional.relu(x + y)
        grids.append(tuple(x.shape[2:]))
    return functional.relu(norm(x, "end_bn")).mean((2, 3))


@pytest.mark.parametrize(
    ("name", "height", "width"),
    [("resnet26_tiny", 32, 32), ("resnet26_tiny", 24, 40), ("resnet26_tiny", 8, 8), ("resnet26", 64, 64)],
)
def test_the_network_is_the_papers(name: str, height: int, width: int) -> None:
    backbone, x = make(name, crop=height), pictures(2, 3, 1, height, width)
    expected = restated(dict(backbone.net.state_dict()), x[:, :, 0])
    torch.testing.assert_close(backbone(x)[:, 0], expected, rtol=0, atol=1e-11)
    assert expected.std() > 0.01  # no comparison of dead features


@pytest.mark.parametrize(("size", "expected"), [(64, [64, 32, 16, 8]), (72, [72, 36, 18, 9])])
def test_feature_grids(size: int, expected: list[int]) -> None:
    grids: list[tuple[int, ...]] = []
    restated(dict(make().net.state_dict()), pictures(1, 3, size, size), grids)
    assert grids == [(n, n) for n in expected]
    sites = make(crop=size).sites()
    assert {s.layer: s.grid for s in sites.values()} == {i: (1, n, n) for i, n in enumerate(expected)}


def test_frames_are_averaged() -> None:
    backbone, x = make(frames=3), pictures(2, 3, 3, 32, 32)
    expected = torch.stack([backbone(x[:, :, t : t + 1]) for t in range(3)]).mean(0)
    assert expected.shape == (2, 1, 64)
    torch.testing.assert_close(backbone(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(36, 32), (32, 33), (4, 4)])
def test_odd_grids_are_refused(height: int, width: int) -> None:
    with pytest.raises(MdlError, match=r"halves its input three times.*\n?.*data.crop"):
        make()(pictures(1, 3, 1, height, width))


@pytest.mark.parametrize(
    ("width", "filters"),
    [(0.5, 1_451_952), (1.0, 5_806_944), (1.5, 13_064_976), (2.0, 23_226_048), (2.5, 36_290_160)],
)
def test_filters_by_width(width: float, filters: int) -> None:
    factory = BACKBONES.load("resnet26")
    with torch.device("meta"):
        net = factory(factory.Options(width=width), 1, 64).net
    assert sum(p.numel() for p in net.parameters() if p.ndim == 4) == filters
    assert sum(p.numel() for p in net.parameters()) == filters + round(7744 * width)


def test_norms_and_classifier() -> None:
    factory = BACKBONES.load("resnet26")
    with torch.device("meta"):
        backbone = factory(factory.Options(), 1, 64)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in backbone.modules()) == 26
    parameters = sum(p.numel() for p in backbone.parameters())
    assert parameters == 5_814_688
    assert parameters + sum(t.numel() for t in backbone.classifier.values()) == 6_071_688


def test_its_25_convolutions_are_sites() -> None:
    sites = make("resnet26", crop=64).sites()
    assert list(sites)[:3] == ["stem", "early1.first", "early1.second"]
    assert len(sites) == 25
    assert [sum(s.layer == layer for s in sites.values()) for layer in range(4)] == [1, 8, 8, 8]
    assert {s.kind for s in sites.values()} == {"conv"}
    assert {s.layout for s in sites.values()} == {"BCHW"}
    for name, site in sites.items():
        widens = name in ("early1.first", "mid1.first", "late1.first")
        outputs = 32 << site.layer
        assert site.shape is not None
        assert site.shape.out_channels == outputs
        assert site.channels == (3 if name == "stem" else outputs // 2 if widens else outputs)
        assert site.shape.stride == ((2, 2) if widens else (1, 1))
        assert (site.shape.kernel, site.shape.groups) == ((3, 3), 1)


@pytest.mark.parametrize(
    ("adapter", "crop", "printed"),
    [(None, 64, 0.853), (None, 72, 1.080), ("parallel", 64, 0.948), ("parallel", 72, 1.200)],
)
def test_gflops(adapter: str | None, crop: int, printed: float) -> None:
    assert round(gflops(adapter, crop), 3) == printed


def test_gflops_of_series_are_those_of_parallel_and_of_its_square_adapters_where_channels_widen() -> None:
    widening = [(3, 32, 64), (32, 64, 32), (64, 128, 16), (128, 256, 8)]  # inputs, outputs, side of the output
    extra = sum((outputs - inputs) * outputs * side**2 for inputs, outputs, side in widening)
    assert gflops("series", 64) == pytest.approx(gflops("parallel", 64) + extra / 1e9, abs=1e-12)


def gflops(adapter: str | None, crop: int) -> float:
    adapters = [AdapterSpec(adapter, "all")] if adapter else []
    spec = ModelSpec("resnet26", {}, 1, crop, {"imagenet": 1000}, adapters, bn="per_domain")
    with torch.device("meta"):
        model = build_model(spec)
    return gflops_per_view(model, spec)


def test_filters_start_as_he_normal_by_outputs() -> None:
    factory = BACKBONES.load("resnet26")
    torch.manual_seed(0)
    net = factory(factory.Options(), 1, 64).net
    assert float(net.late[2].first.conv.weight.detach().std()) == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)
    assert float(net.early[0].first.conv.weight.detach().std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


def in_the_release(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the keys of the authors' code, whose torch kept no batch counts."""
    found = {}
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        place, _, rest = key.partition(".")
        if place in ("early", "mid", "late"):
            number, unit, rest = rest.split(".", 2)
            layer = 1 + ("early", "mid", "late").index(place)
            place = f"layer{layer}.{number}." + {"first": "conv1", "second": "conv2.1"}[unit]
        place = {"stem": "pre_layers_conv", "end_bn": "end_bns.0.0", "fc": "linears.0"}.get(place, place)
        found[f"{place}.{rest.replace('bn.', 'bns.0.')}"] = value
    return found


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_releases_keys_are_read(prefix: str) -> None:
    source, x = make(), pictures(1, 3, 1, 32, 32)
    source.classifier = {key: torch.randn_like(value) for key, value in source.classifier.items()}
    state = {prefix + key: value for key, value in in_the_release(source.library_state()).items()}
    for key in ("layer1.0.conv1.conv.weight", "layer3.3.conv2.1.bns.0.running_var", "linears.0.bias"):
        assert prefix + key in state
    factory = BACKBONES.load("resnet26_tiny")
    other = factory(factory.Options(), 1, 32).double().eval()
    other.load_library_state(state, "test")
    assert torch.equal(other(x), source(x))
    assert all(torch.equal(other.classifier[key], value) for key, value in source.classifier.items())
    del state[f"{prefix}layer2.1.conv1.conv.weight"]
    with pytest.raises(MdlError, match=r"missing: mid\.1\.first\.conv\.weight"):
        other.load_library_state(state, "test")


def test_its_own_keys_are_read() -> None:
    source, x = make(), pictures(1, 3, 1, 32, 32)
    factory = BACKBONES.load("resnet26_tiny")
    other = factory(factory.Options(), 1, 32).double().eval()
    other.load_library_state(source.library_state(), "test")
    assert torch.equal(other(x), source(x))
