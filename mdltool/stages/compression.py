"""What `compress` and its sweep share: how much is kept, of what, and what became of it. No stage itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mdltool import console
from mdltool.artifact import Artifact, partial_path
from mdltool.compress import ranks
from mdltool.compress.factoring import Decomposed, SiteWeight, folded_norms, site_weights
from mdltool.compress.ranks import Choice
from mdltool.data.index import ShardIndex
from mdltool.data.tokens import check_stored
from mdltool.errors import MdlError
from mdltool.model import build_model
from mdltool.model_spec import ModelSpec, parse_options
from mdltool.model_store import backbone_with_weights, find_backbone, read_tensors, seeded
from mdltool.overrides import apply_override
from mdltool.schema import Recipe
from mdltool.stages.continuing import finetuning
from mdltool.stages.fitting import DomainData, Scope, announced_parts, check_domain, sort_shards, wanted
from mdltool.stages.making import trained
from mdltool.stages.plan import modalities
from mdltool.stages.sources import check_sources
from mdltool.train.plan import Progress


@dataclass(frozen=True)
class Amount:
    """How much is kept: one of rank (a whole number, or a fraction), energy (a fraction) and budget (text).

    rank_mode: what a fraction is of. energy_scope: of whom. min_rank: under a budget; 0 may drop adapters.
    independent: each domain for itself.
    """

    rank: float | None = None
    energy: float | None = None
    budget: str | None = None
    rank_mode: ranks.RankMode = "per_domain"
    energy_scope: ranks.EnergyScope = "joint"
    min_rank: int = 1
    independent: bool = False

    @property
    def given(self) -> bool:
        """Whether it says anything of how much."""
        return any(value is not None for value in (self.rank, self.energy, self.budget))


class Svd(BaseModel):
    """Keys under `svd.`: of the decomposition (spec residual_adapters 2.5), and of the fine-tuning.

    scale: which factor holds the singular values. balance: whether domains weigh alike. weighting: of the weights
    under a budget. matricise: which sides of convolutions are shared. fold_bn: scale kernels as the BatchNorm that
    reads them alone does, first. train_shared: fine-tune what is shared too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: Literal["left", "sqrt", "right"] = "left"
    balance: Literal["none", "frobenius"] = "none"
    weighting: Literal["relative", "frobenius"] = "relative"
    matricise: Literal["adapter", "out", "in", "filters", "separable", "basis"] = "adapter"
    fold_bn: bool = False
    train_shared: bool = False


@dataclass(frozen=True)
class Finetune:
    """Updates after the compression, on which shards, and changes to the recipe's last step."""

    updates: int
    shards: Sequence[Artifact]
    overrides: Sequence[str] = ()
    resume: bool = False
    workers: int = 1


@dataclass(frozen=True)
class Training:
    """A fine-tuning that is settled."""

    recipe: Recipe
    data: dict[str, DomainData]
    workers: int
    resume: bool


def training_of(
    stored: Mapping[str, Any], domains: Mapping[str, Any], finetune: Finetune | None, source: Artifact
) -> Training | None:
    """Fine-tuning a model by a recipe, as it is stored or for one domain alone.

    domains: what model.json says of them. Raises MdlError for shards that are not the model's, or lack a stream of
    it.
    """
    if finetune is None:
        return None
    before = Recipe.model_validate(stored)
    for artifact in finetune.shards:
        index = ShardIndex.open(artifact)
        check_domain(artifact, index, domains)
        check_sources(before, index)
    whole = sort_shards(before, finetune.shards)
    clips = {name: len(wanted(before, part.train_index)) for name, part in whole.items()}
    recipe = finetuning(stored, finetune.updates, clips, finetune.overrides, source)
    for name, part in whole.items():
        check_stored(part.train_index, modalities(recipe, name))
    return Training(recipe, announced_parts(recipe, whole), finetune.workers, finetune.resume)


def finetuned(
    spec: ModelSpec, start: str, source: Artifact, training: Training, scope: Scope, out: Path, work: Path
) -> Progress:
    """Train a compressed model in the draft of `out`, where the file `start` holds its tensors."""
    path = partial_path(out) / start
    own = bool(source.load_json("model.json")["own_backbone"])
    seeded(training.recipe.train.seed)
    model = build_model(spec, backbone_with_weights(spec, None if own else find_backbone(source, work)))
    model.load_tensors(read_tensors(path), path, with_backbone=own)
    recipe, workers = training.recipe, training.workers
    return trained(recipe, model, training.data, out, own_backbone=own, workers=workers, scope=scope)


def sizes(spec: ModelSpec) -> dict[str, Any]:
    """How many numbers a model of this form has, none of them trainable."""
    with torch.device("meta"):
        model = build_model(spec)
        model.apply_regime("frozen", spec.bn)
        return model.parameter_counts()


def parse_svd(overrides: Iterable[str]) -> tuple[Svd, list[str]]:
    """`svd.KEY=VALUE` of the overrides, and the other overrides. Raises MdlError with every fault."""
    content: dict[str, Any] = {}
    rest = []
    for override in overrides:
        if override.startswith("svd."):
            apply_override(content, override)
        else:
            rest.append(override)
    return parse_options(Svd, content.get("svd", {}), "--set svd"), rest


def factorable(spec: ModelSpec, source: Artifact, matricise: str = "adapter") -> list[SiteWeight]:
    """What of a model's adapters is matrices. Raises MdlError where nothing is, and for a compressed model."""
    if spec.factors:
        before = next((entry.path for entry in source.inputs if entry.role == "model"), "MODEL")
        raise MdlError("this model is compressed already", source.path, f"compress what it was made from: {before}")
    with torch.device("meta"):
        weights = site_weights(build_model(spec), matricise)
    if not weights:
        kinds = ", ".join(entry.type for entry in spec.adapters)
        what = (
            f"its adapters ({kinds}) have no matrices that domains could share" if kinds else "it has no adapters"
        )
        raise MdlError(f"there is nothing to compress: {what}", source.path, "compress a model with other adapters")
    return weights


def read_model_tensors(
    source: Artifact, spec: ModelSpec, weights: str = "last", fold_bn: bool = False
) -> dict[str, Tensor]:
    """A model's stored tensors, with BatchNorms folded into what they alone read or as they are.

    Raises MdlError where they are not those of its spec.
    """
    path = source.file(f"weights/{weights}.safetensors")
    tensors = read_tensors(path)
    with torch.device("meta"):
        model = build_model(spec)
    model.load_tensors(tensors, path, with_backbone=bool(source.load_json("model.json")["own_backbone"]))
    return folded_norms(model, tensors) if fold_bn else tensors


def check_amount(amount: Amount) -> None:
    """Raise MdlError for an amount that makes no sense for any weight."""
    if amount.rank is not None:
        ranks.by_rank([], amount.rank, amount.rank_mode)
    if amount.energy is not None:
        ranks.by_energy([], amount.energy, amount.energy_scope)
    if amount.budget is not None:
        ranks.parse_budget(amount.budget, 1)


def choose(found: Mapping[str, Decomposed], amount: Amount, weighting: ranks.Weighting) -> dict[str, Choice]:
    """Each weight's rank. Raises MdlError unless one of rank, energy and budget says how much."""
    given = [value for value in (amount.rank, amount.energy, amount.budget) if value is not None]
    if len(given) != 1:
        raise MdlError("say how much is to be kept, in one way", "--rank, --energy, --budget", "e.g. --rank 0.5")
    weights = [entry.for_ranks() for entry in found.values()]
    if amount.rank is not None:
        return ranks.by_rank(weights, amount.rank, amount.rank_mode)
    if amount.energy is not None:
        return ranks.by_energy(weights, amount.energy, amount.energy_scope)
    assert amount.budget is not None
    budget = ranks.parse_budget(amount.budget, sum(weight.dense for weight in weights))
    return ranks.by_budget(weights, budget, weighting, amount.min_rank)


def rows(found: Mapping[str, Decomposed], choices: Mapping[str, Choice]) -> list[dict[str, Any]]:
    """What became of each weight, as plain values; sizes are numbers, of all domains together."""
    table = []
    for name, entry in found.items():
        weight, choice = entry.for_ranks(), choices[name]
        kind = "independent" if entry.independent else "shared"
        heads, shared_dim, private_dim = entry.weight.axes.sizes(entry.weight.shape)
        table.append(
            {
                "site": entry.weight.site,
                "parameter": entry.weight.parameter,
                "heads": list(heads),
                "shared_dim": shared_dim,
                "private_dim": private_dim,
                "form": "dense" if choice.rank is None else "dropped" if choice.rank == 0 else kind,
                "rank": choice.rank,
                "components": len(weight.energies),
                "full": weight.full,
                "clamped": choice.clamped,
                "whitened": entry.whitened,
                "energy": float(weight.energies.sum()),
                "retained": choice.retained,
                "retained_by_domain": entry.retained(choice.rank),
                "stored": ranks.stored([weight], choices),
                "dense": weight.dense,
            }
        )
    return table


def announce(table: Sequence[Mapping[str, Any]], amount: Amount, domains: int) -> None:
    """Say what the user did not ask for."""
    if domains == 1 and not amount.independent:
        console.say("the model has one domain: nothing is shared, this is its adapters' plain SVD")
    for words, names in (
        ("a rank above what there is, and keep all", [_name(row) for row in table if row["clamped"]]),
        ("no fewer numbers as factors and stay dense", [_name(row) for row in table if row["form"] == "dense"]),
        ("rank 0: their adapters are dropped", [_name(row) for row in table if row["form"] == "dropped"]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            console.say(f"{len(names)} weight(s) have {words}: {', '.join(names[:3])}{more}")


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['site']} {row['parameter']}"


def totals(table: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all weights together: numbers stored and dense, and the retained fraction of the squared norm."""
    stored, dense = (sum(row[key] for row in table) for key in ("stored", "dense"))
    # Norms of outputs and of weights are no quantities to add; then each weight counts by its size.
    size = "dense" if any(row["whitened"] for row in table) else "energy"
    energy = sum(row[size] for row in table)
    kept = sum(row[size] * row["retained"] for row in table)
    return {
        "weights": len(table),
        "factored": sum(row["rank"] is not None for row in table),
        "stored": stored,
        "dense": dense,
        "ratio": round(stored / dense, 4),
        "retained": 1.0 if energy == 0 else kept / energy,
    }
