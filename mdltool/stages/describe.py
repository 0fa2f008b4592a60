"""`describe`: parameters, GFLOPs and sites of a recipe, from shapes alone (meta device: no data, no weights)."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mdltool.evaluate.views import parse_views
from mdltool.model import ModelSpec, MultiDomainModel, build_model
from mdltool.recipe import Recipe
from mdltool.stages.plan import model_spec, outputs_of


def run(recipe: Recipe, views: str | None = None) -> dict[str, Any]:
    """Describe a recipe. views: TxS for the cost of a whole video (default: the recipe's).

    Returns the object of `describe --json` (design, section 6) with `sites`, `spec` and, for papers that name the
    cost of separate models, `separate_models`. Raises MdlError where the recipe leaves class counts to the data.
    """
    spec = model_spec(recipe, outputs_of(recipe))
    with torch.device("meta"):
        model = build_model(spec)
    trained: set[int] = set()
    for step in recipe.train.steps:
        model.apply_regime(step.regime, recipe.train.bn)
        trained |= {id(p) for p in model.parameters() if p.requires_grad}
    counts = model.parameter_counts()
    counts["trainable"] = sum(p.numel() for p in model.parameters() if id(p) in trained)
    per_domain = counts.pop("per_domain")
    temporal, spatial = parse_views(views or recipe.views.grid)
    view = gflops_per_view(model, spec)
    return {
        "recipe": recipe.name,
        "parameters": counts,
        "per_domain": per_domain,
        "percent_of_backbone": 100 * counts["trainable"] / counts["backbone"],
        "gflops": {
            "view": view,
            "video": view * temporal * spatial,
            "views": f"{temporal}x{spatial}",
            "counting": "one multiply-add is one operation; norms not counted",
        },
        "separate_models": sum(counts["backbone"] + entry["head"] for entry in per_domain.values()),
        "sites": [
            {
                "name": name,
                "path": w.site.path,
                "kind": w.site.kind,
                "channels": w.site.channels,
                "grid": w.site.grid,
            }
            for name, w in model.sites.items()
        ],
        "published": published(recipe, counts),
    }


def gflops_per_view(model: MultiDomainModel, spec: ModelSpec) -> float:
    """Multiply-adds / 1e9 of one clip through the path of one domain (the first; the paths are alike)."""
    model.eval()
    clip = torch.empty(1, 3, spec.num_frames, spec.crop, spec.crop, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(clip, next(iter(spec.domains)))
    return counter.get_total_flops() / 2 / 1e9


def published(recipe: Recipe, counts: dict[str, int]) -> dict[str, Any]:
    """What the paper prints beside our count of the same thing, cell by cell.

    `trainable` in the paper's sense is heads + adapters (+ backbone where it trains); the shared norms stand in no
    column of the paper (spec omi_mdl 2.3).
    """
    source = recipe.published
    if source is None:
        return {}
    ours = dict(counts)
    trains_backbone = any(step.regime in ("joint", "full") for step in recipe.train.steps)
    ours["trainable"] = counts["heads"] + counts["adapters"] + (counts["backbone"] if trains_backbone else 0)
    cells = {}
    for cell, printed in source.parameters_m.items():
        expected = source.corrected.get(cell, printed)
        cells[cell] = {
            "printed_m": printed,
            "ours": ours[cell],
            "ours_m": millions(ours[cell]),
            "matches": millions(ours[cell]) == expected,
        }
        if cell in source.corrected:
            cells[cell]["corrected_m"] = expected
    return {
        "paper": source.paper,
        "rows": source.rows,
        "parameters": cells,
        "top1": source.top1,
        "notes": source.notes,
    }


def millions(parameters: int) -> float:
    """Millions with two decimals, half up, as the paper rounds."""
    return float((Decimal(parameters) / 1_000_000).quantize(Decimal("0.01"), ROUND_HALF_UP))
