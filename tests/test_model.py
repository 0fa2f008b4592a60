"""The assembled model: switching, isolation, regimes and BatchNorm options (spec omi_mdl sections 2, 6 and 7)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mdltool.errors import MdlError
from mdltool.model import build_model, reuse_classifier
from mdltool.model_spec import ModelSpec, build_backbone
from mdltool.wrapping import library_tensors
from tests.models import clips, tiny_model, tiny_spec


def test_other_domains_weights_do_not_matter() -> None:
    model = tiny_model(domains=("a", "b", "c"), bn="per_domain")
    x = clips()
    expected = model(x, "a")
    for key, tensor in model.tensors().items():
        if key.startswith(("b/", "c/")) and tensor.is_floating_point():
            with torch.no_grad():
                tensor.normal_()
    assert torch.equal(model(x, "a"), expected)


def test_gradients_stay_with_their_domain_and_the_shared_parts() -> None:
    model = tiny_model()
    model.train()
    model(clips(), "a").square().sum().backward()
    for key, tensor in model.tensors().items():
        if not isinstance(tensor, nn.Parameter):
            continue
        if key.startswith("b/"):
            assert tensor.grad is None, key
        elif key.startswith("shared/"):
            assert tensor.grad is not None, key
            assert tensor.grad.abs().sum() > 0, key


@pytest.mark.parametrize(
    ("sites", "expected"),
    [("all", [1, 2, 3, 4, 5]), ("early-1", [1]), ("early-3", [1, 2, 3]), ("late-3", [3, 4, 5]), ("late-1", [5])],
)
def test_placements(sites: str, expected: list[int]) -> None:
    """Spec property 11."""
    model = tiny_model(sites=sites)
    assert list(model.sites) == [f"stage{i}" for i in expected]
    held = {key.split("/")[1] for key in model.tensors() if key.startswith("shared/")}
    assert held == set(model.sites)


def test_multihead_has_neither_adapters_nor_shared_norms() -> None:
    keys = list(tiny_model(None).tensors())
    assert not [key for key in keys if key.startswith("shared/")]
    assert {key.split("/")[1] for key in keys if key.startswith(("a/", "b/"))} == {"head"}


@pytest.mark.parametrize("sites", ["early-0", "late-6", "middle-1", "early-x"])
def test_a_wrong_placement_is_refused(sites: str) -> None:
    with pytest.raises(MdlError, match="no choice of sites"):
        tiny_model(sites=sites)


def test_shared_norm_is_one_tensor_whatever_the_number_of_domains() -> None:
    for domains in (("a",), ("a", "b", "c")):
        tensors = tiny_model(domains=domains).tensors()
        shared = {key: value.shape for key, value in tensors.items() if key.startswith("shared/")}
        assert shared["shared/stage1/weight"] == (16,)
        assert len(shared) == 2 * 5


def _step(model: nn.Module) -> dict[str, torch.Tensor]:
    """Two SGD steps on each domain; the state before."""
    before = {key: value.detach().clone() for key, value in model.tensors().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for domain in ("a", "b"):
        model(clips(4), domain).square().sum().backward()
    optimizer.step()
    return before


def _changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {key for key, value in model.tensors().items() if not torch.equal(value, before[key])}


PARTS = {
    "frozen": {"adapter", "head", "shared"},
    "joint": {"adapter", "head", "shared", "backbone"},
    "heads": {"head"},
    "adapters": {"adapter", "shared"},
    "full": {"head", "backbone"},
}


def _part(key: str) -> str:
    owner, rest = key.split("/", 1)
    if owner in ("shared", "backbone"):
        return owner
    return "head" if rest.startswith("head/") else "adapter"


@pytest.mark.parametrize("regime", PARTS)
def test_a_regime_changes_its_parts_and_nothing_else(regime: str) -> None:
    """Spec property 16 among them: frozen leaves the backbone's tensors and buffers bit-identical."""
    model = tiny_model()
    model.apply_regime(regime)
    changed = _changed(model, _step(model))
    assert {_part(key) for key in changed} == PARTS[regime]


def test_the_naive_freeze_moves_statistics_and_no_weight() -> None:
    model = tiny_model()
    model.apply_regime("frozen", "shared")
    changed = {key for key in _changed(model, _step(model)) if key.startswith("backbone/")}
    assert changed
    assert {key.rsplit(".", 1)[1] for key in changed} == {"running_mean", "running_var", "num_batches_tracked"}


def test_joint_training_with_frozen_batchnorm_keeps_the_statistics() -> None:
    model = tiny_model()
    model.apply_regime("joint", "frozen")
    changed = {key for key in _changed(model, _step(model)) if key.startswith("backbone/")}
    assert changed
    assert not [key for key in changed if "running" in key]


@pytest.mark.parametrize("bn", ["per_domain_stats", "per_domain"])
def test_a_domain_that_is_not_trained_keeps_its_statistics(bn: str) -> None:
    """Spec property 15."""
    model = tiny_model(bn=bn)
    before = {key: value.clone() for key, value in model.tensors().items()}
    model.train()
    model(clips(4), "b")
    changed = _changed(model, before)
    assert changed
    assert not [key for key in changed if key.startswith(("a/", "backbone/"))]
    statistics = [key for key in changed if key.startswith("b/blocks.")]
    norms = [key for key, _ in library_tensors(model.backbone.net) if key.endswith("running_mean")]
    assert len({key.split("/")[1] for key in statistics}) == len(norms), "every BatchNorm of the backbone, M6's too"


def test_shared_statistics_become_the_mixture_of_the_paper() -> None:
    """Spec 6.4: three constant domains, momentum 0.1: weights 0.299, 0.332, 0.369 in the order of the domains."""
    norm = nn.BatchNorm3d(1).double().train()
    for _ in range(200):
        for value in (1.0, 10.0, 100.0):
            norm(torch.full((2, 1, 1, 1, 1), value, dtype=torch.float64))
    weights = torch.tensor([0.9**2, 0.9, 1.0], dtype=torch.float64) * 0.1 / (1 - 0.9**3)
    torch.testing.assert_close(weights, torch.tensor([0.299, 0.332, 0.369], dtype=torch.float64), rtol=0, atol=5e-4)
    expected = (weights * torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)).sum()
    torch.testing.assert_close(norm.running_mean[0], expected, rtol=1e-9, atol=0)


def test_weights_trained_with_shared_statistics_load_into_domain_norms_by_copying() -> None:
    shared = tiny_model(bn="shared")
    shared.train()
    shared(clips(4), "a")
    shared.eval()
    spec = tiny_spec(bn="per_domain_stats")
    backbone = build_backbone(spec).double()
    state = {k.removeprefix("backbone/"): v for k, v in shared.tensors().items() if k.startswith("backbone/")}
    backbone.load_library_state(state | backbone.classifier, "test")
    model = build_model(spec, backbone).double().eval()
    rest = {k: v for k, v in shared.tensors().items() if not k.startswith("backbone/")}
    for key, value in model.tensors().items():
        if key in rest:
            with torch.no_grad():
                value.copy_(rest[key])
    torch.testing.assert_close(model(clips(), "a"), shared(clips(), "a"), rtol=0, atol=1e-12)


def test_uint8_frames_are_normalised_on_the_way_in() -> None:
    model = tiny_model()
    frames = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    floats = (frames.double() / 255 - 0.45) / 0.225
    torch.testing.assert_close(model(frames, "a"), model(floats, "a"), rtol=0, atol=1e-6)


def test_logits_are_no_softmax_and_one_position_is_left() -> None:
    model = tiny_model(None)
    logits = model(clips(), "a")
    assert logits.shape == (2, 3)
    assert not torch.allclose(logits.sum(1), torch.ones(2, dtype=torch.float64))
    assert model.backbone(clips()).shape[1] == 1


def test_a_fixed_pool_averages_logits_over_positions() -> None:
    fixed = tiny_model(None, backbone_options={"pool": "fixed"}, num_frames=8, crop=64)
    features = fixed.backbone(clips(1, 8, 128))
    assert features.shape[1] == 9
    expected = torch.stack([fixed.heads["a"](features[:, i]) for i in range(9)]).mean(0)
    torch.testing.assert_close(fixed(clips(1, 8, 128), "a"), expected, rtol=0, atol=1e-12)
    adaptive = tiny_model(None, num_frames=8, crop=64)
    torch.testing.assert_close(adaptive(clips(1, 8, 64), "a"), fixed(clips(1, 8, 64), "a"), rtol=0, atol=1e-9)


def test_without_temporal_kernels_the_order_of_frames_does_not_matter() -> None:
    x = clips(frames=4)
    blind = tiny_model("2d", backbone_options={"temporal_kernels": False})
    torch.testing.assert_close(blind(x.flip(2), "a"), blind(x, "a"), rtol=0, atol=1e-10)
    seeing = tiny_model("2plus1d")
    assert not torch.allclose(seeing(x.flip(2), "a"), seeing(x, "a"), rtol=0, atol=1e-6)


def test_the_pretrained_classifier_goes_to_the_domain_with_its_classes() -> None:
    spec = tiny_spec(domains=("a", "b"))
    backbone = build_backbone(spec)
    backbone.classifier = {k: torch.randn(3, *v.shape[1:]) for k, v in backbone.classifier.items()}
    model = build_model(spec, backbone)
    names = {"a": ["x", "y", "z"], "b": ["x", "y", "w"]}
    assert reuse_classifier(model, names, ["x", "y", "z"]) == ["a"]
    assert torch.equal(model.heads["a"].weight, backbone.classifier["blocks.5.proj.weight"])
    assert not torch.equal(model.heads["b"].weight, model.heads["a"].weight)


def test_a_spec_survives_json() -> None:
    spec = tiny_spec(options={"ln": "none"})
    assert ModelSpec.from_json(spec.to_json()) == spec


def test_unknown_domains_and_options_are_named() -> None:
    with pytest.raises(MdlError, match="no domain 'c'"):
        tiny_model()(clips(), "c")
    with pytest.raises(MdlError, match="lnn"):
        tiny_model(options={"lnn": "none"})
