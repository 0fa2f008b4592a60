"""Every adapter on every backbone of full size: counts and shapes only, on the meta device."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from mdltool.adapters import ADAPTERS
from mdltool.backbones import BACKBONES
from mdltool.backbones.base import Backbone
from mdltool.counting import count
from mdltool.errors import MdlError
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import AdapterSpec, ModelSpec

FULL = [name for name in BACKBONES if not name.endswith(("_tiny", "_small"))]
# Other sizes of a family: one adapter in the quick form, since the family's own takes all.
SIBLINGS = ("swin3d_t", "swin3d_s", "clip_vit_l14", "multitrain_mvit_b", "multitrain_mvit_s")
PAIRS = [
    pytest.param(adapter, backbone, marks=pytest.mark.full if backbone in SIBLINGS and adapter != "mst" else ())
    for adapter in ADAPTERS
    for backbone in FULL
    if adapter != "caa"  # see test_token_recipes.py
]


@functools.cache
def bare(name: str) -> Backbone:
    factory = BACKBONES.load(name)
    with torch.device("meta"):
        backbone: Backbone = factory(factory.Options(), factory.default_frames, factory.default_crop)
    return backbone


def carries(adapter: str, backbone: str) -> bool:
    if adapter == "cls_shift":  # wants a class token for each frame
        return backbone in ("clip_vit_b16", "clip_vit_l14", "vit_b16")
    method = ADAPTERS.load(adapter)
    return any(method.takes(place, method.Options()) for place in bare(backbone).places().values())


@pytest.mark.sizes
@pytest.mark.parametrize(("adapter", "backbone"), PAIRS)
def test_it_attaches_and_gives_logits(adapter: str, backbone: str) -> None:
    if not carries(adapter, backbone):
        with pytest.raises(MdlError, match=r"no site|class token"):
            attached(adapter, backbone)
        return
    model = attached(adapter, backbone)
    spec = model.spec
    clip = torch.empty(2, 3, spec.num_frames, spec.crop, spec.crop, device="meta")
    assert model.eval()(clip, "a").shape == (2, 7)
    counts = model.parameter_counts()
    own = sum(count([wrapper.adapters["a"]]) for wrapper in model.sites.values())
    assert counts["per_domain"]["a"]["adapters"] == own
    assert (own > 0) == (adapter != "cls_shift")
    assert counts["backbone"] == count([bare(backbone)])


def attached(adapter: str, backbone: str) -> MultiDomainModel:
    factory = BACKBONES.load(backbone)
    entry = AdapterSpec(adapter, "late-1", {})
    spec = ModelSpec(backbone, {}, factory.default_frames, factory.default_crop, {"a": 7}, [entry], bn="frozen")
    with torch.device("meta"):
        return build_model(spec, copy.deepcopy(bare(backbone)))
