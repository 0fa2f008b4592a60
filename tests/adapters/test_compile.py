"""Adapters on small backbones compile without graph breaks: each of either once, all pairs in the long form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.adapters.streams import BOTH, both, clips, stream_model, stream_spec
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


def covering(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Some of the pairs that have every adapter and every backbone."""
    chosen: list[tuple[str, str]] = []
    for adapter in dict.fromkeys(name for name, _ in pairs):
        carriers = [pair for pair in pairs if pair[0] == adapter]
        done = {backbone for _, backbone in chosen}
        chosen.append(next((pair for pair in carriers if pair[1] not in done), carriers[0]))
    for backbone in dict.fromkeys(name for _, name in pairs):
        if backbone not in {name for _, name in chosen}:
            chosen.append(next(pair for pair in pairs if pair[1] == backbone))
    return chosen


COVERING = covering(PAIRS)
# The way of a domain through the wrappers is the same code for every adapter: once for each backbone, in the quick
# form for a convolutional one and one of tokens.
SEVERAL = [
    next(pair for pair in COVERING if pair[1] == backbone) for backbone in dict.fromkeys(name for _, name in PAIRS)
]
QUICK_SEVERAL = [pair for pair in SEVERAL if pair[1] in ("x3d_tiny", "clip_vit_tiny")]
FORMS = [
    *((pair, ("a",), pair in COVERING and pair not in QUICK_SEVERAL) for pair in PAIRS),
    *((pair, ("a", "b"), pair in QUICK_SEVERAL) for pair in SEVERAL),
]


@pytest.mark.parametrize(
    ("adapter", "backbone", "domains"),
    [pytest.param(*pair, domains, marks=() if quick else pytest.mark.full) for pair, domains, quick in FORMS],
)
def test_it_compiles_without_graph_breaks(adapter: str, backbone: str, domains: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    model = make(adapter, backbone)
    randomise(model)
    x = clip(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
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


def test_cross_attention_compiles_with_streams() -> None:
    """The network behind the streams' way to it, which is Python: clips with other streams are other graphs."""
    torch._dynamo.reset()
    model, expected = (stream_model(stream_spec("clip_vit_tiny", {"a": BOTH})).float() for _ in range(2))
    model.backbone.compile(backend="aot_eager", fullgraph=True)
    x = clips(model.spec).float()
    streams = {n: replace(s, tokens_BMD=s.tokens_BMD.float()) for n, s in both(2, 1, 0).items()}
    with torch.no_grad():
        found = model(x, "a", streams)
        torch.testing.assert_close(found, expected(x, "a", streams), rtol=1e-4, atol=1e-4)
        assert not torch.equal(found, expected(x, "a"))
    torch._dynamo.reset()
