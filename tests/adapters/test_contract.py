"""The contract of every adapter on every small backbone that can carry it; a listed entry is tested at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from mdltool.adapters import ADAPTERS
from mdltool.adapters.base import AdaptedSite
from mdltool.adapters.domain_norm import BATCH_NORMS
from mdltool.backbones import BACKBONES
from mdltool.backbones.base import Backbone
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import AdapterSpec, ModelSpec, build_backbone
from mdltool.wrapping import detach

TINY = [name for name in BACKBONES if name.endswith("_tiny")]
# Options under which an adapter starts as the bare backbone; adapters that are not here never do.
IDENTITY: dict[str, dict[str, Any]] = {
    "2d": {"init": "identity", "ln": "none"},
    "2plus1d": {"init": "identity", "ln": "none"},
    "3d": {"init": "identity", "ln": "none"},
    "2d_tmix": {"init": "identity", "ln": "none"},
    "parallel": {"init": "zero"},
    "series": {"init": "zero"},
    **{name: {} for name in ("mhva", "adaptformer", "prefix", "st", "mst", "lora")},
}
READOUT = {"clip_vit_tiny": "class", "vit_tiny": "class", "vivit_tiny": "class", "mvit_tiny": "class"}


def carries(adapter: str, backbone: str) -> bool:
    if adapter == "caa":  # wants mhva beside it and streams: test_cross_attention.py holds it to the same contract
        return False
    if adapter == "cls_shift":  # wants a class token for each frame
        return backbone in ("clip_vit_tiny", "vit_tiny")
    method, factory = ADAPTERS.load(adapter), BACKBONES.load(backbone)
    with torch.device("meta"):
        net = factory(factory.Options(), factory.default_frames, factory.default_crop)
    return any(method.takes(place, method.Options()) for place in net.places().values())


PAIRS = [(adapter, backbone) for adapter in ADAPTERS for backbone in TINY if carries(adapter, backbone)]


def tiny_of(adapter: str, backbone: str, **options: Any) -> ModelSpec:
    factory = BACKBONES.load(backbone)
    return ModelSpec(
        backbone,
        {},
        factory.default_frames,
        factory.default_crop,
        {"a": 3, "b": 4},
        [AdapterSpec(adapter, "all", options)],
        bn="frozen",
        dropout=0.0,
    )


def make(adapter: str, backbone: str, seed: int = 0, **options: Any) -> MultiDomainModel:
    spec = tiny_of(adapter, backbone, **options)
    torch.manual_seed(seed)
    backbone_net = build_backbone(spec)
    _calibrate(backbone_net)
    model = build_model(spec, backbone_net)
    model.apply_regime("frozen", "frozen")
    return model.eval()


def _calibrate(backbone: Backbone) -> None:
    """BatchNorms as training leaves them: weights near one (X3D starts some at zero) and true statistics."""
    norms = [module for module in backbone.modules() if isinstance(module, BATCH_NORMS)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        norm.momentum = 1.0
    if norms:
        backbone.train()(torch.randn(8, 3, backbone.num_frames, backbone.crop, backbone.crop))
    for norm in norms:
        norm.momentum = 0.1


def clip(model: MultiDomainModel, batch: int = 2) -> torch.Tensor:
    spec = model.spec
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, spec.num_frames, spec.crop, spec.crop, generator=generator)


def randomise(model: MultiDomainModel) -> None:
    """Adapters away from their special starts."""
    for wrapper in model.sites.values():
        for parameter in wrapper.adapters.parameters():
            nn.init.normal_(parameter, std=0.1)


def dead(
    adapter: str, backbone: str, model: MultiDomainModel, site: str, key: str, grad: torch.Tensor
) -> torch.Tensor:
    """Which entries of a gradient must be exactly zero, as the specs prove (mst_adapter 2.7, cm3t 7.3)."""
    zero = torch.zeros_like(grad, dtype=torch.bool)
    last = max(wrapper.site.layer for wrapper in model.sites.values())
    if READOUT.get(backbone) != "class" or model.sites[site].site.layer != last:
        return zero
    role = model.sites[site].site.role
    if adapter == "mst" and role in ("mid", "exit") and key.startswith(("branches", "weights")):
        return ~zero  # patch tokens change after the last attention
    if adapter == "st" and role == "mid":
        return ~zero  # and class tokens pass this adapter untouched
    if adapter == "mhva" and grad.ndim:
        zero[1:] = True  # heads 1.. act on patch tokens only
    return zero


@pytest.mark.parametrize(("adapter", "backbone"), list({p[0]: p for p in PAIRS}.values()))
def test_an_adapter_says_whether_it_has_batch_norms(adapter: str, backbone: str) -> None:
    method = ADAPTERS.load(adapter)
    choices: list[dict[str, Any]] = [{}, *([{"pre_bn": False}] if adapter == "series" else [])]
    for options in choices:
        with torch.device("meta"):
            model = build_model(tiny_of(adapter, backbone, **options))
        own = [m for site in model.sites.values() for m in site.adapters.modules() if isinstance(m, BATCH_NORMS)]
        assert method.has_batch_norm(method.Options(**options)) == bool(own)


@pytest.mark.parametrize(("adapter", "backbone"), [p for p in PAIRS if p[0] in IDENTITY])
def test_the_start_is_the_bare_backbone(adapter: str, backbone: str) -> None:
    model = make(adapter, backbone, **IDENTITY[adapter]).double()
    bare = copy.deepcopy(model.backbone)
    detach(bare.net)
    x = clip(model).double()
    for domain in ("a", "b"):
        expected = model.heads[domain](bare(x)).mean(1)
        torch.testing.assert_close(model(x, domain), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backbone", ["clip_vit_tiny", "vit_tiny"])
def test_the_class_token_shift_changes_the_start_but_for_one_frame(backbone: str) -> None:
    model = make("cls_shift", backbone)
    bare = copy.deepcopy(model.backbone)
    detach(bare.net)
    x = clip(model)
    assert not torch.allclose(model(x, "a"), model.heads["a"](bare(x)).mean(1), atol=1e-4)
    still = model.heads["a"](bare(x[:, :, :1])).mean(1)
    torch.testing.assert_close(model(x[:, :, :1], "a"), still, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("adapter", "backbone"), PAIRS)
def test_every_parameter_learns_within_two_steps_and_nothing_else_moves(adapter: str, backbone: str) -> None:
    model = make(adapter, backbone)
    model.train()
    before = {key: tensor.clone() for key, tensor in model.tensors().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    seen: dict[str, torch.Tensor] = {}
    for step in range(2):
        torch.manual_seed(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(clip(model, 4), "a"), torch.tensor([0, 1, 2, 0])).backward()
        for key, tensor in model.tensors().items():
            if isinstance(tensor, nn.Parameter) and tensor.grad is not None:
                seen[key] = seen.get(key, torch.zeros(())) + tensor.grad.abs()
        optimizer.step()
    for site, wrapper in model.sites.items():
        for key, parameter in wrapper.adapters["a"].named_parameters():
            grad = seen.get(f"a/{site}/{key}", torch.zeros_like(parameter))
            must_be_zero = dead(adapter, backbone, model, site, key, grad)
            assert (grad[must_be_zero] == 0).all(), (site, key)
            assert must_be_zero.all() or grad[~must_be_zero].sum() > 0, (site, key)
    allowed = ("a/", "shared/")
    for key, tensor in model.tensors().items():
        if not key.startswith(allowed):
            assert torch.equal(tensor, before[key]), key
            assert key not in seen, key


@pytest.mark.parametrize(("adapter", "backbone"), [p for p in PAIRS if p[0] != "cls_shift"])
def test_every_parameter_changes_the_output(adapter: str, backbone: str) -> None:
    """On random weights, but for what the specs prove dead."""
    model = make(adapter, backbone)
    randomise(model)
    x = clip(model, 1)
    with torch.no_grad():
        expected = model(x, "a")
        for site, wrapper in model.sites.items():
            for key, parameter in wrapper.adapters["a"].named_parameters():
                before = parameter.clone()
                parameter.add_(torch.randn_like(parameter))
                changed = model(x, "a")
                parameter.copy_(before)
                gone = dead(adapter, backbone, model, site, key, parameter).all()
                assert torch.equal(changed, expected) == bool(gone), (site, key)


@pytest.mark.parametrize(("adapter", "backbone"), PAIRS)
def test_state_copies_and_detaching(adapter: str, backbone: str) -> None:
    model = make(adapter, backbone)
    bare = build_backbone(model.spec)
    randomise(model)
    x = clip(model)
    expected = model(x, "b")
    assert torch.equal(copy.deepcopy(model)(x, "b"), expected)
    other = make(adapter, backbone, seed=9)
    other.load_tensors(model.tensors(), "test")
    assert torch.equal(other(x, "b"), expected)
    own = {key.removeprefix("backbone/"): t for key, t in model.tensors().items() if key.startswith("backbone/")}
    assert list(own) == list(bare.net.state_dict())
    detach(model.backbone.net)
    assert not any(isinstance(module, AdaptedSite) for module in model.backbone.modules())
    assert list(model.backbone.net.state_dict()) == list(bare.net.state_dict())
    assert all(torch.equal(own[key], value) for key, value in model.backbone.net.state_dict().items())


@pytest.mark.parametrize(("adapter", "backbone"), PAIRS)
def test_bf16_autocast_and_channels_last(adapter: str, backbone: str) -> None:
    model = make(adapter, backbone)
    randomise(model)
    x = clip(model)
    expected = model(x, "a")
    last = copy.deepcopy(model).channels_last()
    torch.testing.assert_close(
        last(x.to(memory_format=torch.channels_last_3d), "a"), expected, rtol=1e-3, atol=1e-3
    )
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x, "a")
        assert rough.dtype == torch.bfloat16
    assert (rough - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("adapter", "backbone"), [p for p in PAIRS if p[0] not in ("2d", "3d", "2plus1d", "2d_tmix")]
)
def test_clips_do_not_mix(adapter: str, backbone: str) -> None:
    model = make(adapter, backbone).double()
    randomise(model)
    x = clip(model).double()
    changed = x.clone()
    changed[1] += 1
    before, after = model(x, "a"), model(changed, "a")
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-10)
    assert not torch.allclose(after[1], before[1])


@pytest.mark.parametrize(
    ("adapter", "backbone"),
    [
        ("mst", "clip_vit_tiny"),
        ("mhva", "swin3d_tiny"),
        ("prefix", "vivit_tiny"),
        ("st", "vit_tiny"),
        ("lora", "mvit_tiny"),
    ],
)
def test_frozen_layers_before_the_first_adapter_run_without_autograd(adapter: str, backbone: str) -> None:
    blocks = len(make(adapter, backbone).backbone.block_paths())
    model = make(adapter, backbone, layers=str(blocks))
    model.train()
    needs: dict[str, bool] = {}

    def keep(path: str, y: Any) -> None:
        needs[path] = (y[0] if isinstance(y, tuple) else y).requires_grad

    for path in model.backbone.block_paths():
        block = model.backbone.net.get_submodule(path)
        block.register_forward_hook(lambda module, args, y, path=path: keep(path, y))
    model(clip(model), "a")
    assert list(needs.values()) == [False] * (blocks - 1) + [True]
