"""Recipes: validated intent of a training run, one YAML file without inheritance.

The schema is strict: all faults are reported together, with their paths and the nearest valid key.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mdltool.adapters import ADAPTERS
from mdltool.backbones import BACKBONES
from mdltool.errors import MdlError
from mdltool.overrides import apply_override
from mdltool.published import with_printed
from mdltool.recipe_files import PUBLISHED, fault, read_yaml, recipe_dirs, said
from mdltool.recipe_streams import sharing_faults, stream_faults
from mdltool.registry import Table, did_you_mean, nearest
from mdltool.schema import Recipe
from mdltool.types import DOMAIN_NAMES, names_domain

ALIASES = {
    "cm3t_ek100": "cm3t_ek100_swinb",
    "cm3t_mpiigi": "cm3t_mpiigi_swinb",
    "cm3t_udiva": "cm3t_udiva_swinb",
    "omi_x3dm_all": "omi_x3dm_2plus1d_all",
    "mst_clip_b16_k400": "mst_k400_b16_8",
    "residual_decathlon": "residual_parallel",
}


def shipped() -> dict[str, Path]:
    """Name -> file of every shipped recipe: <family>/<row>.yaml is <family>_<row>."""
    found = {}
    for folder in recipe_dirs():
        for path in sorted(folder.glob("*/*.yaml")):
            if path.parent.name != PUBLISHED:
                found[f"{path.parent.name}_{path.stem}"] = path
    return found


def find(name: str) -> Path:
    """The file of a recipe: a path, a shipped name or an alias."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise MdlError("there is no such recipe file", path, "check the path, or see: mdltool recipe list")
        return path
    recipes = shipped()
    target = ALIASES.get(name, name)
    if target not in recipes:
        fix = (
            did_you_mean(name, [*recipes, *ALIASES])
            if nearest(name, [*recipes, *ALIASES])
            else "mdltool recipe list"
        )
        raise MdlError(f"there is no recipe '{name}'", None, fix)
    return recipes[target]


def read(name: str) -> dict[str, Any]:
    """The content of a recipe's file, with what the printed rows that name it print. Raises MdlError."""
    content = read_yaml(find(name), "a recipe is a mapping of keys", "see: mdltool recipe show tiny_demo")
    return with_printed(content)


def load(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override (`key=value` with dots in the key) and validate. Raises MdlError with all faults together."""
    content = read(name)
    for override in overrides:
        apply_override(content, override)
    return validate(content, find(name))


def validate(content: dict[str, Any], where: object, *, partial: bool = False) -> Recipe:
    """A parsed YAML to a Recipe. partial: of some of a model's domains, so that it may name others as sharing.

    Raises MdlError with all faults together.
    """
    faults: list[str] = []
    recipe = None
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        faults = [fault(entry, Recipe) for entry in error.errors()]
    faults += _part_faults(content)
    if recipe is not None and not faults:
        faults = _cross_faults(recipe) + ([] if partial else sharing_faults(recipe))
    if faults:
        noun = "fault" if len(faults) == 1 else "faults"
        listing = "".join(f"\n    {entry}" for entry in faults)
        raise MdlError(f"the recipe has {len(faults)} {noun}:{listing}", where, "mend the keys above")
    assert recipe is not None
    return recipe


def _part_faults(content: dict[str, Any]) -> list[str]:
    """Faults of names that tables hold and of the keys that belong to the named parts."""
    from mdltool.tasks import TASKS  # here, since it imports torch, which listing recipes does not need

    faults = []
    backbone = content.get("backbone")
    if isinstance(backbone, dict):
        faults += _options_faults(BACKBONES, "name", ("weights", "adapters"), backbone, "backbone")
    adapters = content.get("adapters")
    for i, entry in enumerate(adapters if isinstance(adapters, list) else []):
        if isinstance(entry, dict):
            faults += _options_faults(ADAPTERS, "type", ("sites",), entry, f"adapters.{i}")
    domains = content.get("domains")
    for name, domain in (domains if isinstance(domains, dict) else {}).items():
        if not names_domain(str(name)):
            faults.append(f"domains.{name}: a domain's name is {DOMAIN_NAMES}")
        task = domain.get("task", "single_label") if isinstance(domain, dict) else None
        if isinstance(task, str) and task not in TASKS:
            faults.append(f"domains.{name}.task: there is no task '{task}'; {did_you_mean(task, TASKS)}")
    return faults


def _options_faults(table: Table, key: str, own: tuple[str, ...], part: dict[str, Any], path: str) -> list[str]:
    name = part.get(key)
    if not isinstance(name, str):
        return []
    if name not in table:
        return [f"{path}.{key}: there is no {table.noun} '{name}'; {did_you_mean(name, table)}"]
    schema = table.load(name).Options
    try:
        schema(**{k: v for k, v in part.items() if k != key and k not in own})
    except ValidationError as error:
        keys = [key, *own, *schema.model_fields]
        return [_option_fault(entry, path, keys) for entry in error.errors()]
    return []


def _option_fault(entry: Any, path: str, keys: list[str]) -> str:
    where = ".".join([path, *map(str, entry["loc"])])
    if entry["type"] == "extra_forbidden":
        return f"{where}: unknown key; {did_you_mean(str(entry['loc'][-1]), keys)}"
    return f"{where}: {said(entry)}"


def _cross_faults(recipe: Recipe) -> list[str]:
    """Faults between keys that are each valid alone."""
    faults = []
    if isinstance(recipe.data.batch, dict):
        missing = [d for d in recipe.domains if d not in recipe.data.batch]
        unknown = [d for d in recipe.data.batch if d not in recipe.domains]
        faults += [f"data.batch.{d}: missing; each domain needs its batch" for d in missing]
        faults += [f"data.batch.{d}: no such domain; {did_you_mean(d, recipe.domains)}" for d in unknown]
    augment = recipe.data.augment
    if augment.crop == "short_side" and augment.short_side and augment.short_side[0] < recipe.data.crop:
        faults.append(f"data.augment.short_side: its lower bound is below data.crop ({recipe.data.crop})")
    for key, side in (("views", recipe.views.short_side), ("val", recipe.val.short_side)):
        if side is not None and side < recipe.data.crop:
            faults.append(f"{key}.short_side: {side} is below data.crop ({recipe.data.crop})")
    faults += _domain_faults(recipe)
    trains = {step.regime for step in recipe.train.steps}
    if trains == {"adapters"} and not recipe.adapters:
        faults.append("train.steps: regime 'adapters' without adapters trains nothing")
    if recipe.heads.type == "mlp" and recipe.heads.reuse_pretrained:
        faults.append("heads.reuse_pretrained: a pretrained classifier is one layer, which type: mlp does not take")
    return faults + _training_faults(recipe) + _norm_faults(recipe) + stream_faults(recipe)


def _domain_faults(recipe: Recipe) -> list[str]:
    """What the domains' own keys do not go with."""
    faults = []
    augment, mixed = recipe.data.augment, recipe.train.batches == "mixed"
    for name, part in recipe.domains.items():
        crop = recipe.crop_of(name)
        sides = {"views": recipe.test_side_of(name), "val": recipe.val_side_of(name)}
        if part.augment == "recipe" and augment.crop == "short_side" and augment.short_side:
            sides["data.augment"] = part.short_side or augment.short_side[0]
        small = [f"{key} ({side})" for key, side in sides.items() if side < crop]
        if small and (part.crop or part.short_side):
            key = "crop" if part.crop else "short_side"
            faults.append(f"domains.{name}.{key}: crops of {crop} are above the shorter side of {', '.join(small)}")
        if mixed and (crop != recipe.data.crop or part.normalize is not None):
            key = "crop" if crop != recipe.data.crop else "normalize"
            faults.append(f"domains.{name}.{key}: the clips of mixed batches are all alike; leave it out")
        if part.swap_sides and part.task != "single_label":
            faults.append(f"domains.{name}.swap_sides: this is of single labels; set flip: 0 instead")
        plain = augment.flip if part.augment == "recipe" else 0.0
        if part.swap_sides and not (plain if part.flip is None else part.flip):
            faults.append(f"domains.{name}.swap_sides: no clip of it is flipped; set flip, or leave it out")
        if recipe.data.per_class is not None and part.task != "single_label":
            faults.append(
                f"data.per_class: the clips of {name}, of {part.task}, are of no single class; use fraction"
            )
    return faults


def _norm_faults(recipe: Recipe) -> list[str]:
    """What BatchNorms that move do not go with."""
    faults, train = [], recipe.train
    regimes = {step.regime for step in train.steps}
    bn = train.bn or ("shared" if regimes & {"joint", "full"} else "frozen")
    if train.split == "batches":
        if train.sync_bn or bn in ("shared", "recalibrate"):
            faults.append(
                f"train.split: with 'batches' processes see different domains, which bn: {bn} or sync_bn would mix"
                "; use bn: frozen, per_domain or per_domain_stats, without sync_bn"
            )
        elif bn != "frozen" and train.domain_order != "sequential":
            faults.append("train.split: 'batches' with statistics per domain wants domain_order: sequential")
    trains_adapters = bool(regimes - {"heads", "full"})
    if bn == "frozen" and train.sync_bn and not (trains_adapters and has_adapter_norms(recipe)):
        faults.append(
            "train.sync_bn: every BatchNorm of the backbone is frozen, no adapter that trains has one; leave it out"
        )
    if bn == "recalibrate" and (train.domain_order == "random" or train.ema):
        faults.append(
            "train.bn: 'recalibrate' measures every domain, with the last weights: no random order, no ema"
        )
    return faults


def has_adapter_norms(recipe: Recipe) -> bool:
    """Whether an adapter has BatchNorms of its own."""
    methods = ((ADAPTERS.load(entry.type), entry.options) for entry in recipe.adapters)
    return any(method.has_batch_norm(method.Options(**options)) for method, options in methods)


def _training_faults(recipe: Recipe) -> list[str]:
    """What the way of training does not go with."""
    faults, train = _loss_faults(recipe), recipe.train
    if train.batches == "mixed":
        if recipe.adapters:
            faults.append("train.batches: mixed batches share every layer; leave out the adapters, or: in_turn")
        if train.bn in ("per_domain", "per_domain_stats", "recalibrate"):
            faults.append(f"train.bn: '{train.bn}' tells domains apart, which mixed batches do not")
        if isinstance(recipe.data.batch, dict):
            faults.append("data.batch: mixed batches have one number of clips, of all domains together")
        if train.rounds_per_update > 1:
            faults.append("train.rounds_per_update: a mixed batch is an update; raise data.batch")
        if train.domain_order != "sequential":
            faults.append("train.domain_order: a mixed batch has every domain; see data.proportions")
    if train.compile and train.checkpoint_activations:
        faults.append("train.compile: torch cannot compile what checkpoint_activations runs again")
    if train.batches == "in_turn" and recipe.data.augment.mix_scope == "both":
        faults.append("data.augment.mix_scope: 'both' wants mixed batches")
    if train.batches == "in_turn" and not _multitrain(recipe) and recipe.data.augment.smooth_classes is not None:
        faults.append("data.augment.smooth_classes: this is of mixed batches, where data sets differ in classes")
    if recipe.data.proportions is not None:
        if train.batches == "in_turn" and train.domain_order != "random":
            faults.append("data.proportions: these are for mixed batches and for train.domain_order: random")
        part = recipe.data.proportions
        named = [("weights", name) for name in part.weights] + [("replicas", name) for name in part.replicas]
        for key, name in named:
            if name not in recipe.domains:
                hint = did_you_mean(name, recipe.domains)
                faults.append(f"data.proportions.{key}.{name}: no such domain; {hint}")
    return faults


def _loss_faults(recipe: Recipe) -> list[str]:
    """What the losses do not go with, and keys of losses that are not there."""
    faults: list[str] = []
    losses, train = recipe.losses, recipe.train
    if losses.weights is not None and losses.weights.mode == "uncertainty":
        weighted = [name for name, part in recipe.domains.items() if part.weight != 1]
        faults += [f"domains.{name}.weight: the weights are learned; leave it out" for name in weighted]
    if losses.weights is not None and losses.weights.mode == "fixed":
        of_learned = [key for key in ("half", "sigma_init") if key in _changed(losses.weights)]
        faults += [f"losses.weights.{key}: this is of mode: uncertainty; leave it out" for key in of_learned]
    if losses.norm != "batch" and not _multitrain(recipe) and train.batches == "in_turn":
        faults.append("losses.norm: this is of mixed batches, inf, proj and weights; see losses.reduction")
    if _multitrain(recipe) or train.batches == "mixed":
        tasks = {d.task for d in recipe.domains.values()} - {"single_label"}
        if tasks:
            faults.append(f"losses: mixed batches, inf, proj and weights are for single_label, not {tasks.pop()}")
        if train.split == "batches":
            faults.append("train.split: 'batches' wants each domain's own loss, in batches in turn")
        if losses.reduction != "mean" or losses.domain_average:
            faults.append("losses.reduction, domain_average: these are of batches in turn; see losses.norm")
    return faults


def _multitrain(recipe: Recipe) -> bool:
    """Whether the recipe names a part of MultiTrain's objective."""
    return any(part is not None for part in (recipe.losses.inf, recipe.losses.proj, recipe.losses.weights))


def _changed(part: BaseModel) -> set[str]:
    """The keys of a part that are not as they are by default."""
    return {key for key, entry in type(part).model_fields.items() if getattr(part, key) != entry.default}


def rename_domain(recipe: Recipe, domain: str) -> Recipe:
    """The recipe with its only domain called `domain`; its number of classes is left to the data."""
    if len(recipe.domains) != 1:
        raise MdlError("this recipe has several domains", recipe.name, "take one with a single domain")
    content = recipe.model_dump(mode="json", exclude_unset=True)
    (part,) = content["domains"].values()
    content["domains"] = {domain: {**part, "classes": None}}
    return validate(content, recipe.name)
