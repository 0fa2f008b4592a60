"""GFLOPs of the specifications' sections 4 that no recipe stands for, and how the papers count those they print."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from mdltool.adapters.factored import FactorSpec
from mdltool.compress.factoring import site_weights
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import AdapterSpec, ModelSpec
from mdltool.recipe import load
from mdltool.stages import describe


def built(spec: ModelSpec) -> MultiDomainModel:
    with torch.device("meta"):
        return build_model(spec)


def test_the_bare_encoder_of_mst_adapter() -> None:
    """Spec mst_adapter 4: CLIP L/14, 8 frames."""
    spec = ModelSpec("clip_vit_l14", {}, 8, 224, {"k400": 400}, [], bn="frozen")
    assert describe.gflops_per_view(built(spec), spec) == pytest.approx(648.1, rel=0.005)


def test_what_the_tuned_encoder_costs_without_the_embedding_of_its_patches() -> None:
    """418.7, as the recipe notes beside the printed 419: 196 patches a frame of 3 x 16 x 16 values."""
    recipe = load("mst_k400_b16_8_full")
    spec = describe.model_spec(recipe, describe.outputs_of(recipe))
    patches = 8 * 196 * 3 * 16 * 16 * 768 / 1e9
    assert round(3 * (describe.gflops_per_view(built(spec), spec) - patches), 1) == 418.7
    assert recipe.published is not None
    assert "418.7" in str(recipe.published.notes)


@pytest.mark.parametrize(("part", "share"), [(2, 1.0), (4, 0.5)])
def test_factors_of_half_the_rank_cost_what_a_square_adapter_does(part: int, share: float) -> None:
    """Spec residual_adapters 4: K = C/2 costs 2CK = C^2 a pixel; of a quarter, half of it."""
    spec = ModelSpec("resnet26", {}, 1, 64, {"a": 10}, [AdapterSpec("parallel", "all")], bn="per_domain")
    dense = built(spec)
    square = [weight for weight in site_weights(dense) if weight.shape[0] == weight.shape[1]]
    assert len(square) == 21, "all but the stem and the three that widen"
    factors = {w.site: {w.parameter: FactorSpec(w.shape[0] // part, w.axes)} for w in square}
    factored = dataclasses.replace(spec, factors=factors)
    saved = describe.gflops_per_view(dense, spec) - describe.gflops_per_view(built(factored), factored)
    # 64, 128, 256 channels at 32, 16, 8 pixels a side: all cost the same
    assert saved == pytest.approx((1 - share) * 21 * 64**2 * 32**2 / 1e9, abs=1e-12)


@pytest.mark.parametrize(
    "name",
    [
        "mst_k400_b16_8_stadapter",
        "cm3t_ek100_clipb_stadapter",
        "mst_ssv2_b16_16_stadapter",
        "multitrain_k400",
        "multitrain_k400_312",
    ],
)
def test_printed_gflops_are_ours_and_layer_norms(name: str) -> None:
    """455, 911, 977, 224 and 614 count LayerNorm at five operations an element, as fvcore does."""
    recipe = load(name)
    assert recipe.published is not None
    spec = describe.model_spec(recipe, describe.outputs_of(recipe))
    model = built(spec)
    elements = []

    def note(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        elements.append(output.numel())

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(note)
    view = describe.gflops_per_view(model, spec) + 5 * sum(elements) / 1e9
    assert round(view * (recipe.published.gflops_views or 1)) == recipe.published.gflops
