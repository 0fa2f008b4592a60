"""The adapters between stages: the equations of spec omi_mdl 2.2 and 2.3, and their options."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from mdltool.adapters import ADAPTERS
from mdltool.adapters.base import AdaptedSite, attach
from mdltool.adapters.domain_norm import attach_domain_norms
from mdltool.adapters.shared_norm import shared_norm
from mdltool.backbones import BACKBONES
from mdltool.errors import MdlError
from mdltool.model import build_model
from mdltool.model_spec import build_backbone
from mdltool.types import Site
from mdltool.wrapping import Route, detach
from tests.models import clips, tiny_model, tiny_spec

STAGE = ("2d", "2plus1d", "3d", "2d_tmix")
PAIRS = list(itertools.product(STAGE, ["x3d_tiny"]))


def make(name: str, channels: int = 6, grid: tuple[int, int, int] = (4, 5, 5), **options: object) -> nn.Module:
    method = ADAPTERS.load(name)
    torch.manual_seed(3)
    site = Site("stage1", "0", "stage", "BCTHW", channels, grid)
    adapter = method(site, method.Options(**options)).double()
    for parameter in adapter.parameters():  # away from special values such as BN's ones and zeros
        nn.init.normal_(parameter, std=0.3)
    for module in adapter.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
    return adapter.eval()


def feature(channels: int = 6, frames: int = 4, size: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(2, channels, frames, size, size, generator=generator, dtype=torch.float64)


def normed(norm: nn.BatchNorm3d, x: torch.Tensor) -> torch.Tensor:
    shape = (1, -1, 1, 1, 1)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (x - norm.running_mean.view(shape)) * scale.view(shape) + norm.bias.view(shape)


def by_taps(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A zero-padded convolution written as a sum over its taps."""
    kt, kh, kw = weight.shape[2:]
    frames, height, width = x.shape[2:]
    padded = functional.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2, kt // 2, kt // 2))
    total = bias.view(1, -1, 1, 1, 1).expand(x.shape[0], -1, frames, height, width).clone()
    for t, y, z in itertools.product(range(kt), range(kh), range(kw)):
        part = padded[:, :, t : t + frames, y : y + height, z : z + width]
        total = total + torch.einsum("oc,bcthw->bothw", weight[:, :, t, y, z], part)
    return total


def test_2d_and_3d_are_a_dense_convolution_norm_skip_and_relu() -> None:
    for name in ("2d", "3d"):
        adapter, f = make(name), feature()
        expected = (normed(adapter.norm, by_taps(f, adapter.kernel.weight, adapter.kernel.bias)) + f).relu()
        torch.testing.assert_close(adapter(nn.Identity(), f), expected, rtol=0, atol=1e-12)


def test_2plus1d_is_space_then_time_without_anything_between() -> None:
    adapter, f = make("2plus1d"), feature()
    space, time = adapter.kernel
    middle = by_taps(f, space.weight, space.bias)
    expected = (normed(adapter.norm, by_taps(middle, time.weight, time.bias)) + f).relu()
    torch.testing.assert_close(adapter(nn.Identity(), f), expected, rtol=0, atol=1e-12)


def test_frame_mixing_follows_the_2d_stage_and_does_not_discard_it() -> None:
    adapter, f = make("2d_tmix"), feature()
    g = (normed(adapter.norm, by_taps(f, adapter.kernel.weight, adapter.kernel.bias)) + f).relu()
    mixed = torch.stack(
        [(adapter.mix.weight[u].view(-1, 1, 1) * g).sum(2) + adapter.mix.bias[u] for u in range(4)], 2
    )
    expected = (normed(adapter.mix_norm, mixed) + g).relu()
    torch.testing.assert_close(adapter(nn.Identity(), f), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", STAGE)
@pytest.mark.parametrize(("frames", "size"), [(1, 1), (3, 5), (5, 1), (1, 7)])
def test_the_shape_is_kept(name: str, frames: int, size: int) -> None:
    adapter = make(name, grid=(frames, size, size))
    assert adapter(nn.Identity(), feature(frames=frames, size=size)).shape == (2, 6, frames, size, size)


def test_frames_are_independent_under_2d_and_neighbours_only_under_temporal_kernels() -> None:
    f, order = feature(frames=7), torch.randperm(7, generator=torch.Generator().manual_seed(0))
    adapter = make("2d", grid=(7, 5, 5))
    permuted = adapter(nn.Identity(), f[:, :, order])
    torch.testing.assert_close(permuted, adapter(nn.Identity(), f)[:, :, order], rtol=0, atol=1e-12)
    for name in ("2plus1d", "3d"):
        adapter = make(name, grid=(7, 5, 5))
        changed = f.clone()
        changed[:, :, 0] += 1
        differs = (adapter(nn.Identity(), changed) != adapter(nn.Identity(), f)).flatten(3).any(3).any(0).any(0)
        assert differs.tolist() == [True, True, False, False, False, False, False]


@pytest.mark.parametrize("name", STAGE)
def test_identity_initialisation_is_the_bare_backbone(name: str) -> None:
    """Spec property 6: with `init: identity` and `ln: none` the logits are the bare backbone's."""
    spec = tiny_spec(name, options={"init": "identity", "ln": "none"})
    torch.manual_seed(0)
    backbone = build_backbone(spec).double()
    bare = copy.deepcopy(backbone).eval()
    model = build_model(spec, backbone).double().eval()
    x = clips()
    for domain in ("a", "b"):
        expected = model.heads[domain](bare(x)).mean(1)
        torch.testing.assert_close(model(x, domain), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "backbone"), PAIRS)
def test_every_adapter_parameter_matters_and_learns(name: str, backbone: str) -> None:
    model = tiny_model(name, backbone=backbone, options={"init": "pytorch_default"})
    model.train()
    for module in model.modules():  # away from zero: the ReLU passes everywhere
        if isinstance(module, nn.BatchNorm3d):
            module.eval()
    x = clips()
    model(x, "a").square().sum().backward()
    for site, wrapper in model.sites.items():
        for key, parameter in wrapper.adapters["a"].named_parameters():
            assert parameter.grad is not None, (site, key)
            assert parameter.grad.abs().sum() > 0, (site, key)
            before = model(x, "a").detach()
            with torch.no_grad():
                parameter.add_(0.5)
                after = model(x, "a")
                parameter.sub_(0.5)
            assert not torch.equal(before, after), (site, key)


@pytest.mark.parametrize(("name", "backbone"), PAIRS)
def test_detaching_restores_the_library(name: str, backbone: str) -> None:
    for bn in ("shared", "per_domain"):
        spec = tiny_spec(name, backbone=backbone, bn=bn)
        torch.manual_seed(0)
        bare = build_backbone(spec)
        keys = list(bare.net.state_dict())
        before = {key: value.clone() for key, value in bare.net.state_dict().items()}
        model = build_model(spec, bare)
        assert list(bare.net.state_dict()) != keys
        own = {key.removeprefix("backbone/") for key in model.tensors() if key.startswith("backbone/")}
        assert own == set(keys)
        detach(bare.net)
        assert list(bare.net.state_dict()) == keys
        assert all(torch.equal(before[key], value) for key, value in bare.net.state_dict().items())


@pytest.mark.parametrize(("name", "backbone"), PAIRS)
def test_copies_and_stored_tensors_give_the_same_output(name: str, backbone: str) -> None:
    model = tiny_model(name, backbone=backbone, bn="per_domain")
    x = clips()
    expected = model(x, "b")
    assert torch.equal(copy.deepcopy(model)(x, "b"), expected)
    other = tiny_model(name, backbone=backbone, bn="per_domain", seed=9)
    assert not torch.equal(other(x, "b"), expected)
    other.load_tensors(model.tensors(), "test")
    assert torch.equal(other(x, "b"), expected)


@pytest.mark.parametrize(
    ("options", "check"),
    [
        ({"init": "zero_last"}, lambda k: all((p == 0).all() for p in k[-1].parameters())),
        ({"init": "kaiming"}, lambda k: abs(k[0].weight.std() - (2 / (64 * 9)) ** 0.5) < 0.002),
        ({"bias_init": "zero"}, lambda k: all((c.bias == 0).all() for c in k)),
        ({"mid": 5}, lambda k: k[0].out_channels == 5),
        ({"kt": 5, "kh": 1, "kw": 1, "bias": False}, lambda k: k[1].kernel_size == (5, 1, 1) and k[1].bias is None),
    ],
)
def test_options(options: dict, check) -> None:
    method = ADAPTERS.load("2plus1d")
    torch.manual_seed(0)
    adapter = method(Site("s", "0", "stage", "BCTHW", 64, (4, 4, 4)), method.Options(**options))
    assert check(adapter.kernel)


def test_signed_features_pass_without_the_output_activation() -> None:
    f = feature() - 0.5
    assert (make("2d", out_act="none")(nn.Identity(), f) < 0).any()
    assert (make("2d", out_act="relu")(nn.Identity(), f) >= 0).all()


def test_shared_norms_normalise_what_they_say() -> None:
    site, f = Site("s", "0", "stage", "BCTHW", 6, (4, 5, 5)), feature()
    channel = shared_norm("channel", site).double()(f)
    torch.testing.assert_close(channel.mean(1), torch.zeros_like(channel.mean(1)), rtol=0, atol=1e-9)
    expected = (f - f.mean(1, keepdim=True)) / (f.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(channel, expected, rtol=0, atol=1e-9)
    whole = f.flatten(1)
    expected = (whole - whole.mean(1, keepdim=True)) / (whole.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    for form in ("cthw", "cthw_noaffine"):
        torch.testing.assert_close(shared_norm(form, site).double()(f), expected.view_as(f), rtol=0, atol=1e-9)
    assert shared_norm("none", site) is None


@pytest.mark.parametrize(("name", "options"), [("2plus1d", {"ln": "cthw"}), ("2d_tmix", {})])
def test_what_is_bound_to_a_clip_size_says_so(name: str, options: dict) -> None:
    model = tiny_model(name, options=options)
    with pytest.raises(MdlError, match="bound to"):
        model(clips(frames=6), "a")


def test_a_wrong_site_kind_and_a_site_named_twice_are_refused() -> None:
    method, site = ADAPTERS.load("2d"), Site("attn", "0", "attention", "BTC", 8, (1, 1, 1))
    with pytest.raises(MdlError, match="kind stage, not attention"):
        attach(nn.Sequential(nn.Identity()), [site], ["a"], method, method.Options(), Route())
    stage = Site("stage1", "0", "stage", "BCTHW", 8, (1, 1, 1))
    with pytest.raises(MdlError, match="already"):
        attach(nn.Sequential(nn.Identity()), [stage, stage], ["a"], method, method.Options(), Route())


def test_domain_norms_use_and_move_their_own_statistics_only() -> None:
    route = Route()
    net = nn.Sequential(nn.BatchNorm3d(3)).double()
    reference = copy.deepcopy(net[0])
    wrapped = attach_domain_norms(net, ("a", "b"), True, route)["0"]
    x = feature(channels=3)
    route.domain = "a"
    torch.testing.assert_close(net(x), reference(x), rtol=0, atol=0)
    torch.testing.assert_close(wrapped.statistics["a"].running_mean, reference.running_mean, rtol=0, atol=0)
    assert torch.equal(wrapped.statistics["b"].running_mean, torch.zeros(3))
    assert torch.equal(wrapped.inner.running_mean, torch.zeros(3))


@pytest.mark.parametrize("name", ["x3d_m", "x3d_tiny", "slow_r50"])
def test_sites_by_name_and_by_module_path(name: str) -> None:
    factory = BACKBONES.load(name)
    with torch.device("meta"):
        backbone = factory(factory.Options(), factory.default_frames, factory.default_crop)
    sites = backbone.sites(("blocks.1.res_blocks.0",))
    assert list(sites)[:5] == ["stage1", "stage2", "stage3", "stage4", "stage5"]
    assert sites["blocks.1.res_blocks.0"].channels == sites["stage2"].channels
    with pytest.raises(MdlError, match=r"blocks\.99"):
        backbone.sites(("blocks.99",))


def test_an_adapter_attaches_at_a_module_path() -> None:
    model = tiny_model("2d", sites=["blocks.1.res_blocks.0"])
    assert isinstance(model.backbone.net.get_submodule("blocks.1.res_blocks.0"), AdaptedSite)
    assert any(key.startswith("a/blocks.1.res_blocks.0/kernel") for key in model.tensors())


def test_sites_may_lie_inside_one_another() -> None:
    spec = tiny_spec("2d", sites=["stage2", "blocks.1.res_blocks.0"])
    torch.manual_seed(0)
    bare = build_backbone(spec)
    keys = list(bare.net.state_dict())
    model = build_model(spec, bare)
    assert set(model.sites) == {"stage2", "blocks.1.res_blocks.0"}
    model(clips().float(), "a")
    detach(bare.net)
    assert list(bare.net.state_dict()) == keys
