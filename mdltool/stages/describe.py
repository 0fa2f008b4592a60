"""`describe`: parameters, GFLOPs and sites of a recipe, from shapes alone (meta device: no data, no weights)."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mdltool.counting import parts
from mdltool.evaluate.views import parse_views
from mdltool.losses.multitrain import MultitrainLoss
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import ModelSpec
from mdltool.schema import Published, Recipe
from mdltool.stages.plan import model_spec, multitrain_spec, outputs_of
from mdltool.types import StreamTokens

_TOKENS = 32  # of a stream, in the cost of a clip


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
        model.apply_regime(step.regime, recipe.train.bn, adapters=step.adapters)
        trained |= {id(p) for p in model.parameters() if p.requires_grad}
    counts = model.parameter_counts()
    counts["training_only"] = training_only(recipe, model)
    counts["trainable"] = sum(p.numel() for p in model.parameters() if id(p) in trained) + counts["training_only"]
    per_domain = counts.pop("per_domain")
    temporal, spatial = parse_views(views or recipe.views.grid)
    view = gflops_per_view(model, spec)
    saved = saved_bytes_per_clip(model, spec)
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
        "saved_for_backward_bytes": saved,
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
        "published": published(recipe, parts(model), view),
    }


def training_only(recipe: Recipe, model: MultiDomainModel) -> int:
    """Parameters of the objective, which no prediction needs: expander, projections, loss weights."""
    part = multitrain_spec(recipe)
    if part is None:
        return 0
    with torch.device("meta"):
        names = {name: [""] * outputs for name, outputs in model.spec.domains.items()}
        criterion = MultitrainLoss(model.backbone.feature_dim, model.spec.domains, part, names)
    return sum(parameter.numel() for parameter in criterion.parameters())


def parameters(recipe: Recipe) -> dict[str, int]:
    """Ours beside each count that the recipe's paper prints, as the paper sums it, and always adapters and total.

    From shapes alone. Without the class counts, which some recipes leave to the data, the adapters only.
    """
    outputs = {name: domain.classes or 1 for name, domain in recipe.domains.items()}
    with torch.device("meta"):
        model = build_model(model_spec(recipe, outputs))
    counts = parts(model)
    if any(domain.classes is None for domain in recipe.domains.values()):
        return {"adapters": counts["adapters"]}
    own = {part: counts[part] for part in ("adapters", "total")}
    source = recipe.published
    if source is None:
        return own
    ours = _as_printed(recipe, counts)
    return {cell: ours[cell] for cell in dict.fromkeys((*source.parameters_m, *own))}


def gflops_per_view(model: MultiDomainModel, spec: ModelSpec) -> float:
    """Multiply-adds / 1e9 of one clip through the path of one domain, the first, with its streams."""
    model.eval()
    clip = torch.empty(1, 3, spec.num_frames, spec.crop, spec.crop, device="meta")
    domain = next(iter(spec.domains))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(clip, domain, _tokens(spec, domain))
    return counter.get_total_flops() / 2 / 1e9


def saved_bytes_per_clip(model: MultiDomainModel, spec: ModelSpec) -> int:
    """Bytes of float32 activations that autograd keeps for the backward pass of one clip, under the last regime.

    Parameters do not count, a storage counts once, and what no gradient needs is not kept.
    """
    model.train()
    own = {id(parameter) for parameter in model.parameters()} | {id(buffer) for buffer in model.buffers()}
    kept: dict[int, tuple[Any, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in own:
            kept[id(base)] = (base, base.numel() * base.element_size())  # held, so that no other takes its id
        return tensor

    clip = torch.empty(1, 3, spec.num_frames, spec.crop, spec.crop, device="meta")
    domain = next(iter(spec.domains))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(clip, domain, _tokens(spec, domain))
    return sum(size for _, size in kept.values())


def _tokens(spec: ModelSpec, domain: str) -> dict[str, StreamTokens]:
    """One clip's streams, _TOKENS each (spec cm3t 4)."""
    return {
        name: StreamTokens(
            torch.empty(1, _TOKENS, stream.input, device="meta"),
            torch.empty(1, _TOKENS, dtype=torch.bool, device="meta"),
        )
        for name, stream in spec.streams.get(domain, {}).items()
    }


def _as_printed(recipe: Recipe, counts: dict[str, int]) -> dict[str, int]:
    """Our counts by the cells of the recipe's paper. counts: as counting.parts has them.

    `trainable` in the paper's sense is heads + adapters (+ backbone where it trains); the shared norms stand in no
    column of the paper (spec omi_mdl 2.3). `tunable` and `trained` leave out the heads; an encoder that is tuned
    counts with its projection (spec mst_adapter 3.1, cm3t 1).
    """
    assert recipe.published is not None
    ours = dict(counts)
    trained = counts["backbone"] if any(step.regime in ("joint", "full") for step in recipe.train.steps) else 0
    ours["denominator"] = recipe.published.denominator or counts["backbone"]
    ours["trainable"] = counts["heads"] + counts["adapters"] + trained
    ours["trained"] = counts["adapters"] + trained
    ours["tunable"] = ours["trained"] + (counts["projection"] if trained else 0)
    return ours | {cell: sum(ours[part] for part in summed) for cell, summed in recipe.published.sums.items()}


def published(recipe: Recipe, counts: dict[str, int], view: float) -> dict[str, Any]:
    """What the paper prints beside our count of the same thing, figure by figure.

    counts: as counting.parts has them. view: GFLOPs of one view. Each figure has `matches`, whether ours rounds to
    what is printed, or must be where that is proven wrong, and a `remark`, empty if it is printed right.
    """
    source = recipe.published
    if source is None:
        return {}
    ours = _as_printed(recipe, counts)
    cells: dict[str, dict[str, Any]] = {}
    for cell, printed in source.parameters_m.items():
        found = _beside(source, cell, printed, Decimal(ours[cell]) / 1_000_000, source.digits)
        rounded = found.pop("rounded")
        cells[cell] = found | {"printed_m": found.pop("printed"), "ours": ours[cell], "ours_m": rounded}
        cells[cell]["difference_m"] = round(rounded - printed, source.digits)
        if cell in source.corrected:
            cells[cell]["corrected_m"] = source.corrected[cell]
    shares = {cell: 100 * ours[cell] / ours["denominator"] for cell in source.percent}
    found = {
        "paper": source.paper,
        "rows": source.rows,
        "parameters": cells,
        "percent": {cell: _beside(source, cell, source.percent[cell], share, 1) for cell, share in shares.items()},
        "denominator": source.denominator,
        "top1": source.top1,
        "scores": source.scores,
        "overall": source.overall,
        "corrected": source.corrected,
        "notes": source.notes,
    }
    if source.gflops is not None:
        views = source.gflops_views or 1
        found["gflops"] = {"views": views, **_beside(source, "gflops", source.gflops, view * views)}
    if source.size is not None:
        found["size"] = _beside(source, "size", source.size, _size(recipe, counts))
    return found


def _beside(
    source: Published, figure: str, printed: float, ours: Decimal | float, digits: int | None = None
) -> dict[str, Any]:
    """A printed figure and ours. digits: of print; otherwise as many as the figure itself has."""
    expected = source.corrected.get(figure, printed)
    rounded = float(_rounded(ours, _digits(expected) if digits is None else digits))
    remarks = [f"the paper's cell is wrong: {expected:g}"] if figure in source.corrected else []
    if rounded != expected:
        remarks.append(source.why.get(figure, "not what the paper prints"))
    return {
        "printed": printed,
        "ours": float(ours),
        "rounded": rounded,
        "difference": round(float(ours) - printed, 4),
        "matches": rounded == expected,
        "remark": "; ".join(remarks),
    }


def _size(recipe: Recipe, counts: dict[str, int]) -> float:
    """All domains' networks as a multiple of one, by the weights of convolutions (spec residual_adapters 1): what
    is fully fine-tuned is a network for each of the row's domains.
    """
    assert recipe.published is not None
    tuned = any(step.regime == "full" for step in recipe.train.steps)
    networks = len(recipe.published.top1) if tuned else 1
    return networks + counts["adapter_filters"] / counts["filters"]


def millions(parameters: int, digits: int = 2) -> float:
    """Millions with so many decimals, half up, as the papers round."""
    return float(_rounded(Decimal(parameters) / 1_000_000, digits))


def _digits(value: float) -> int:
    return len(f"{value:g}".partition(".")[2])


def _rounded(value: Decimal | float, digits: int) -> Decimal:
    return Decimal(value).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
