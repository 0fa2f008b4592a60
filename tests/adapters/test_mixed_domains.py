"""A batch of several domains gives what each domain's clips give alone, in one pass through the backbone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mdltool.errors import MdlError
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import AdapterSpec, ModelSpec
from mdltool.wrapping import DomainWrapper
from tests.adapters.test_contract import PAIRS
from tests.adapters.test_factored import CASES, factored
from tests.models import clips, tiny_model

DOMAINS = {"a": 3, "b": 4, "c": 2}
# Interleaved, repeated, and one that comes once.
BATCH = ["b", "a", "b", "c", "a"]


def make(backbone: str, *adapters: AdapterSpec, **changes: Any) -> MultiDomainModel:
    """A model of three domains in eval mode, whose every tensor of a domain is random and its own."""
    size = {"resnet26_tiny": 1}.get(backbone, 8 if "swin" in backbone or "mvit" in backbone else 4)
    fields: dict[str, Any] = {"bn": "frozen", "dropout": 0.0} | changes
    torch.manual_seed(0)
    spec = ModelSpec(backbone, {}, size, 32, DOMAINS, list(adapters), **fields)
    model = build_model(spec).double().eval()
    generator = torch.Generator().manual_seed(1)
    for key, tensor in model.tensors().items():
        if not tensor.is_floating_point() or key.startswith("backbone/"):
            continue
        noise = 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            if key.endswith("matrix.weight"):  # 25 of them in series would grow beyond any tolerance
                tensor.copy_(0.1 * noise)
            elif key.endswith(("running_var", "scale")):
                tensor.copy_(1 + noise.abs())
            elif tensor.isfinite().all():
                tensor.add_(noise)
    return model


def batch(model: MultiDomainModel, number: int = len(BATCH)) -> torch.Tensor:
    return clips(number, model.spec.num_frames, model.spec.crop)


def alone(model: MultiDomainModel, frames: torch.Tensor, domains: list[str]) -> list[torch.Tensor]:
    """Each clip by itself, by the domain's own forward."""
    return [model(frames[i : i + 1], domain)[0] for i, domain in enumerate(domains)]


def assert_mixed_as_alone(model: MultiDomainModel, domains: list[str] = BATCH) -> None:
    frames = batch(model, len(domains))
    with torch.no_grad():
        expected = alone(model, frames, domains)
        found = model(frames, domains)
        assert [tuple(row.shape) for row in found] == [(DOMAINS[domain],) for domain in domains]
        for row, right in zip(found, expected, strict=True):
            torch.testing.assert_close(row, right, rtol=0, atol=1e-10)
        by_domain = {domain: model(frames, domain) for domain in DOMAINS}
        if len(set(domains)) > 1:  # the domains do differ: a batch of one domain is not what is asked for
            first, second = by_domain["a"][:, :2], by_domain["b"][:, :2]
            assert not torch.allclose(first, second, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("adapter", "backbone"), PAIRS)
def test_every_adapter_on_every_backbone(adapter: str, backbone: str) -> None:
    assert_mixed_as_alone(make(backbone, AdapterSpec(adapter, "all")))


@pytest.mark.parametrize("domains", [["a", "a"], ["c"], ["a", "b", "a", "b"], ["c", "b", "a"], ["b", "b", "a"]])
def test_repeated_interleaved_and_single_domains(domains: list[str]) -> None:
    assert_mixed_as_alone(make("x3d_tiny", AdapterSpec("2plus1d", "all"), bn="per_domain"), domains)


STACKS = {
    "a prefix around a bottleneck": ("swin3d_tiny", ("mhva", {"at": "both"}), ("prefix", {})),
    "a bottleneck around a prefix": ("swin3d_tiny", ("prefix", {}), ("mhva", {"at": "both"})),
    "in attention, around and beside it": (
        "mvit_tiny",
        ("lora", {"r": 2}),
        ("prefix", {}),
        ("mst", {"r": 8}),
    ),
    "class tokens by frame": ("clip_vit_tiny", ("cls_shift", {}), ("mst", {"r": 8}), ("prefix", {}), ("lora", {})),
    "class tokens by clip": ("vivit_tiny", ("lora", {}), ("prefix", {}), ("st", {"r": 8}), ("adaptformer", {})),
    "series around parallel": ("resnet26_tiny", ("parallel", {}), ("series", {})),
    "parallel around series": ("x3d_tiny", ("series", {}), ("parallel", {"grouped": "dense"}), ("3d", {})),
}


@pytest.mark.parametrize("name", STACKS)
def test_adapters_on_top_of_adapters(name: str) -> None:
    backbone, *adapters = STACKS[name]
    assert_mixed_as_alone(make(backbone, *(AdapterSpec(method, "all", options) for method, options in adapters)))


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize(("adapter", "backbone"), CASES)
def test_compressed_adapters(adapter: str, backbone: str, independent: bool) -> None:
    model = factored(adapter, backbone, independent)
    domains = ["b", "a", "b"]
    frames = clips(3, model.spec.num_frames, model.spec.crop)
    with torch.no_grad():
        for row, right in zip(model(frames, domains), alone(model, frames, domains), strict=True):
            torch.testing.assert_close(row, right, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("bn", ["per_domain", "per_domain_stats", "recalibrate"])
@pytest.mark.parametrize("backbone", ["x3d_tiny", "resnet26_tiny"])
def test_batchnorms_of_each_domain(bn: str, backbone: str) -> None:
    assert_mixed_as_alone(make(backbone, bn=bn))


def test_the_site_itself_runs_once_unless_its_input_changes() -> None:
    """In place of forward hooks: what the library's own modules were given."""

    class Counting(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.rows = inner, []

        def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            self.rows.append(len(x))
            return self.inner(x, *rest)

    def seen(model: MultiDomainModel, site: str) -> list[int]:
        wrapper = model.sites[site]
        while isinstance(wrapper.inner, DomainWrapper):
            wrapper = wrapper.inner
        wrapper.inner = counting = Counting(wrapper.inner)
        with torch.no_grad():
            model(batch(model), BATCH)
        return counting.rows

    mhva, prefix = AdapterSpec("mhva", "all", {"at": "attn"}), AdapterSpec("prefix", "all")
    assert seen(make("swin3d_tiny", mhva), "block1.attn") == [5]
    assert seen(make("swin3d_tiny", prefix), "block1.attn") == [2, 2, 1]
    assert seen(make("swin3d_tiny", prefix, mhva), "block1.attn") == [2, 2, 1]
    assert seen(make("clip_vit_tiny", AdapterSpec("mhva", "all")), "block1.mlp") == [5 * 4]


def test_a_batch_of_bytes_and_of_one_domain_by_name() -> None:
    model = tiny_model()
    frames = torch.randint(0, 256, (3, 3, 4, 32, 32), dtype=torch.uint8)
    whole = model(frames, "b")
    rows = model(frames, ["b", "b", "b"])
    assert torch.equal(torch.stack(rows), whole)
    assert model(frames[:0], []) == []


def test_gradients_reach_each_domain_through_a_mixed_batch() -> None:
    """In eval mode; the same as those of the clips alone."""
    model = make("clip_vit_tiny", AdapterSpec("mst", "all", {"r": 8}))
    frames = batch(model)

    def gradients(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.cat([row.square() for row in rows]).sum().backward()
        named = model.tensors(with_backbone=False)
        return {key: tensor.grad.clone() for key, tensor in named.items() if tensor.grad is not None}

    expected, found = gradients(alone(model, frames, BATCH)), gradients(model(frames, BATCH))
    assert expected
    assert set(found) == set(expected)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-8, atol=1e-10)


def test_what_is_refused() -> None:
    model = tiny_model(bn="per_domain")
    frames = clips(2)
    with pytest.raises(MdlError, match="no domain 'd'"):
        model(frames, ["a", "d"])
    with pytest.raises(MdlError, match="2 clips and 3 domains"):
        model(frames, ["a", "b", "a"])
    model.train()
    with pytest.raises(MdlError, match="for inference"):
        model(frames, ["a", "b"])
    assert model(frames, "a").shape == (2, 3), "and then the model still trains"


def test_a_mixed_batch_leaves_no_trace() -> None:
    model = make("x3d_tiny", AdapterSpec("2plus1d", "all"), bn="per_domain")
    frames = batch(model)
    with torch.no_grad():
        before = model(frames, "a")
        model(frames, BATCH)
        assert torch.equal(model(frames, "a"), before)
