"""Every adapter on every small backbone compiles without graph breaks (a file of its own: it takes minutes)."""

from __future__ import annotations

import pytest
import torch

from tests.adapters.test_contract import PAIRS, clip, make, randomise

# Families that need their own kernels compiled: one adapter each goes through inductor.
INDUCTOR = {
    "x3d_tiny": "2plus1d",
    "swin3d_tiny": "mhva",
    "clip_vit_tiny": "mst",
    "vivit_tiny": "prefix",
    "mvit_tiny": "st",
    "resnet26_tiny": "parallel",
}


@pytest.mark.parametrize(("adapter", "backbone"), PAIRS)
def test_it_compiles_without_graph_breaks(adapter: str, backbone: str) -> None:
    torch._dynamo.reset()
    model = make(adapter, backbone)
    randomise(model)
    x = clip(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    # The way of a domain through the wrappers is the same code for every adapter: once for each backbone.
    domains = ("a", "b") if adapter == next(name for name, other in PAIRS if other == backbone) else ("a",)
    for domain in domains:
        torch.testing.assert_close(compiled(x, domain), model(x, domain), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.full
@pytest.mark.parametrize(("backbone", "adapter"), INDUCTOR.items())
def test_inductor_compiles_one_of_each_family(adapter: str, backbone: str) -> None:
    torch._dynamo.reset()
    model = make(adapter, backbone)
    randomise(model)
    x = clip(model)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x, "a"), model(x, "a"), rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()
