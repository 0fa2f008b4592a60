"""From a recipe to the plain values that the code below the stages takes. No stage itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError

from mdltool import console
from mdltool.data.augment import EraseSpec, RandAugmentSpec
from mdltool.data.index import ShardIndex
from mdltool.data.mixing import MixSpec
from mdltool.data.order import InTurn, Mixed, Order, Proportions, Share
from mdltool.data.sampling import Sampling
from mdltool.data.transforms import TrainTransform, flipped_classes
from mdltool.errors import MdlError
from mdltool.evaluate.views import ViewSpec, parse_views
from mdltool.losses.multitrain import MultitrainSpec
from mdltool.model_spec import AdapterSpec, ModelSpec, check_adapters
from mdltool.schema import Recipe
from mdltool.types import StreamSpec

# A weight decay for domains of fewer clips than this, the smallest first (spec residual_adapters 5).
_DECAYS = ((8_000, 0.002), (35_000, 0.0005))
_LEAST_DECAY = 0.0001


def model_spec(recipe: Recipe, outputs: dict[str, int]) -> ModelSpec:
    """The model that a recipe describes, with each domain's number of outputs."""
    regimes = {step.regime for step in recipe.train.steps}
    default_bn = "shared" if regimes & {"joint", "full"} else "frozen"
    return ModelSpec(
        backbone=recipe.backbone.name,
        backbone_options=recipe.backbone.options,
        num_frames=recipe.data.frames,
        crop=recipe.data.crop,
        domains=outputs,
        adapters=[AdapterSpec(entry.type, entry.sites, entry.options) for entry in recipe.adapters],
        bn=recipe.train.bn or default_bn,
        dropout=recipe.heads.dropout,
        head_init=recipe.heads.init,
        head_std=recipe.heads.std,
        head=recipe.heads.type,
        head_hidden=recipe.heads.hidden,
        logit_dropout=recipe.heads.logit_dropout,
        normalize={
            name: {"mean": list(part.normalize.mean), "std": list(part.normalize.std)}
            for name, part in recipe.domains.items()
            if part.normalize is not None
        },
        streams=stream_specs(recipe),
        mute=recipe.train.steps[-1].mute,
    )


def stream_specs(recipe: Recipe) -> dict[str, dict[str, StreamSpec]]:
    """Domain -> stream -> what it is, of domains that have any."""
    specs = {
        name: StreamSpec(
            kind=part.kind,
            width=part.width,
            input=part.input or part.width,
            embedder=part.embedder,
            embedder_options=part.embedder_options,
            layers=part.layers,
        )
        for name, part in recipe.streams.items()
    }
    chosen = {domain: {name: specs[name] for name in recipe.streams_of(domain)} for domain in recipe.domains}
    return {domain: entries for domain, entries in chosen.items() if entries}


def modalities(recipe: Recipe, domain: str, without: Collection[str] = ()) -> dict[str, int]:
    """Stream -> width of its stored rows, for a domain's loader. without: streams or kinds that are left out."""
    parts = {name: recipe.streams[name] for name in recipe.streams_of(domain)}
    kept = {name: part for name, part in parts.items() if name not in without and part.kind not in without}
    return {name: part.input or part.width for name, part in kept.items()}


def completed(request: dict[str, Any]) -> dict[str, Any]:
    """A stage's stored request with every key of its recipes, those too that came after it was made.

    A request is a recipe, with further keys or without, or holds one as `recipe` or `finetune`. What papers print
    decides nothing of a run and is left out.
    """
    inside = {key: _complete(request[key]) for key in ("recipe", "finetune") if isinstance(request.get(key), dict)}
    own = _complete({k: v for k, v in request.items() if k in Recipe.model_fields}) if "train" in request else {}
    return {**request, **own, **inside}


def _complete(content: dict[str, Any]) -> dict[str, Any]:
    try:
        return Recipe.model_validate({**content, "published": None}).model_dump(mode="json")
    except ValidationError:  # of another version: it differs as it stands
        return content


def check(recipe: Recipe) -> None:
    """Raise MdlError where the recipe's adapters find no site in its backbone."""
    check_adapters(model_spec(recipe, dict.fromkeys(recipe.domains, 1)))


def outputs_of(recipe: Recipe) -> dict[str, int]:
    """Head outputs by the recipe alone. Raises MdlError where it leaves the number of classes to the data."""
    missing = [name for name, domain in recipe.domains.items() if domain.classes is None]
    if missing:
        raise MdlError(
            f"the recipe does not say how many classes {', '.join(missing)} has",
            f"domains.{missing[0]}.classes",
            f"add it, or: --set domains.{missing[0]}.classes=N",
        )
    return {name: domain.classes or 0 for name, domain in recipe.domains.items()}


def multitrain_spec(recipe: Recipe) -> MultitrainSpec | None:
    """The options of the multi-dataset objective; None where each domain has its own loss alone."""
    losses = recipe.losses
    if recipe.train.batches == "in_turn" and losses.inf is None and losses.proj is None and losses.weights is None:
        return None
    inf, proj, weights = losses.inf, losses.proj, losses.weights
    return MultitrainSpec(
        lambda_v=inf.lambda_v if inf else 0.0,
        lambda_c=inf.lambda_c if inf else 0.0,
        eps=inf.eps if inf else 1e-4,
        expander_hidden=inf.expander_hidden if inf else 2048,
        informative_learned=inf.learned if inf else False,
        proj_mode=proj.mode if proj else "none",
        proj_weight=proj.weight if proj else 1.0,
        proj_input=proj.input if proj else "logits",
        proj_init=proj.init if proj else "trunc_normal",
        proj_freeze=proj.freeze if proj else False,
        norm=losses.norm,
        weights=weights.mode if weights else "fixed",
        weights_half=weights.half if weights else True,
        sigma_init=weights.sigma_init if weights else "one",
        fixed_weights={name: domain.weight for name, domain in recipe.domains.items()},
    )


def decay_for(clips: int) -> float:
    """The weight decay of a domain of so many clips, stronger for fewer (Rebuffi et al. 2018, 4.1; spec 5)."""
    return next((decay for below, decay in _DECAYS if clips < below), _LEAST_DECAY)


def decays_of(recipe: Recipe, clips: Mapping[str, int]) -> dict[str, float]:
    """Domain -> weight decay of its own parameters, where it is not the optimizer's. clips: of both splits."""
    by_size = {name: decay_for(clips[name]) for name in recipe.domains} if recipe.train.decay_by_size else {}
    own = {name: d.weight_decay for name, d in recipe.domains.items() if d.weight_decay is not None}
    return by_size | own


def order_of(recipe: Recipe, clips: Mapping[str, int]) -> Order:
    """Which clips make an update. clips: of each domain's training split."""
    part = recipe.data.proportions
    chosen = Proportions(part.mode, part.temperature, part.weights, part.replicas) if part is not None else None
    repeat, seed = recipe.data.augment.repeat, recipe.train.seed
    if recipe.train.batches == "mixed":
        assert isinstance(recipe.data.batch, int)
        return Mixed(clips, recipe.data.batch, seed, chosen, repeat)
    batch = {name: recipe.batch_of(name) for name in recipe.domains}
    order, rounds = recipe.train.domain_order, recipe.train.rounds_per_update
    return InTurn(clips, batch, seed, order, rounds, chosen, repeat)


def share_of(recipe: Recipe, rank: int, world: int) -> Share:
    """What a process reads of it."""
    augment, train = recipe.data.augment, recipe.train
    mixes = augment.mixup > 0 or augment.cutmix > 0
    pairing = ("within" if augment.mix_scope == "same" else "mirrored") if mixes else None
    return Share(rank, world, train.accumulate, pairing, train.split)


def mix_of(recipe: Recipe) -> MixSpec | None:
    """How batches are mixed, where they are."""
    part = recipe.data.augment
    if not part.mixup and not part.cutmix:
        return None
    return MixSpec(part.mixup, part.cutmix, part.mix_probability, part.switch_probability)


def sampling(recipe: Recipe, domain: str) -> Sampling:
    """How frames are picked from a stretch of a domain's video."""
    part = recipe.domains[domain].sampling or recipe.data.sampling
    return Sampling(recipe.data.frames, part.clip_seconds, part.short, part.index, part.stride_frames)


def train_transform(recipe: Recipe, domain: str) -> TrainTransform:
    """The augmentation of a domain's single clips; mixing, smoothing and repetition are the training's."""
    part, own = recipe.data.augment, recipe.domains[domain]
    crop = recipe.crop_of(domain)
    if own.augment == "none":
        side = recipe.test_side_of(domain)
        rounding = recipe.views.crop_round
        return TrainTransform(short_side=(side, side), crop=crop, flip=own.flip or 0.0, centre=rounding)
    resized = part.crop == "resized"
    ops, box = part.rand_augment, part.erase
    side_range = (own.short_side, own.short_side) if own.short_side else part.short_side
    return TrainTransform(
        short_side=None if resized else side_range,
        crop=crop,
        flip=part.flip if own.flip is None else own.flip,
        area=part.area if resized else None,
        aspect=part.aspect,
        rand_augment=RandAugmentSpec(ops.ops, ops.magnitude, ops.std, ops.probability) if ops else None,
        erase=EraseSpec(box.probability, box.mode) if box else None,
    )


def check_sides(recipe: Recipe, index: ShardIndex) -> None:
    """Warn of flipped clips whose classes differ by left and right alone. Raises MdlError where these are to be
    swapped and no class is named so.
    """
    domain = index.domain
    if index.task != "single_label" or not train_transform(recipe, domain).flip:
        return
    names, images = index.classes, flipped_classes(index.classes)
    swapped = [names[number] for number, image in images.items() if image != number]
    swaps = recipe.domains[domain].swap_sides
    if swaps and not swapped and len(images) == len(names):
        raise MdlError(
            f"{domain}: no class is named with left or right, so that nothing says what a flipped clip is",
            f"domains.{domain}.swap_sides",
            f"shard with the classes' names, or --set domains.{domain}.swap_sides=false and flip=0",
        )
    if swapped and not swaps:
        console.warn(
            f"{domain}: clips are flipped, though classes differ by left and right alone ({swapped[0]}, ...): "
            f"--set domains.{domain}.swap_sides=true or domains.{domain}.flip=0"
        )


def grid_of(recipe: Recipe, domain: str, grid: str | None = None) -> str:
    """A domain's `TxS` views of the test protocol; `grid` overrides the recipe's."""
    return grid or recipe.domains[domain].views or recipe.views.grid


def eval_views(recipe: Recipe, domain: str, grid: str | None = None) -> ViewSpec:
    """The views of the test protocol."""
    part = recipe.views
    temporal, spatial = parse_views(grid_of(recipe, domain, grid))
    return ViewSpec(
        temporal=temporal,
        spatial=spatial,
        sampling=sampling(recipe, domain),
        short_side=recipe.test_side_of(domain),
        crop=recipe.crop_of(domain),
        starts="centre" if temporal == 1 else part.starts,
        axis=part.crop_axis,
        rounding=part.crop_round,
        seed=recipe.train.seed,
    )


def val_views(recipe: Recipe, domain: str) -> ViewSpec:
    """The views of the validation inside training: one centre view unless the recipe says otherwise."""
    temporal, spatial = parse_views(recipe.val.views)
    return ViewSpec(
        temporal=temporal,
        spatial=spatial,
        sampling=sampling(recipe, domain),
        short_side=recipe.val_side_of(domain),
        crop=recipe.crop_of(domain),
        starts="centre" if temporal == 1 else recipe.views.starts,
        axis=recipe.views.crop_axis,
        rounding=recipe.views.crop_round,
        seed=recipe.train.seed,
    )


def without_domain(recipe: Mapping[str, Any], domain: str) -> dict[str, Any]:
    """A recipe, as stored with a model, without a domain and whatever it says by that domain."""

    def less(part: Any) -> Any:
        return {name: value for name, value in part.items() if name != domain} if isinstance(part, dict) else part

    data = {**recipe["data"], "batch": less(recipe["data"]["batch"])}
    if (proportions := data.get("proportions")) is not None:
        data["proportions"] = {key: less(value) for key, value in proportions.items()}
    return {**recipe, "domains": less(recipe["domains"]), "data": data}
