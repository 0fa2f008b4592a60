"""From a recipe to the plain values that the code below the stages takes. No stage itself."""

from __future__ import annotations

from mdltool.data.augment import EraseSpec, RandAugmentSpec
from mdltool.data.sampling import Sampling
from mdltool.data.transforms import TrainTransform
from mdltool.errors import MdlError
from mdltool.evaluate.views import ViewSpec, parse_views
from mdltool.model import AdapterSpec, ModelSpec, check_adapters
from mdltool.schema import Recipe


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
    )


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


def sampling(recipe: Recipe) -> Sampling:
    """How frames are picked from a stretch of video."""
    part = recipe.data.sampling
    return Sampling(recipe.data.frames, part.clip_seconds, part.short, part.index, part.stride_frames)


def train_transform(recipe: Recipe) -> TrainTransform:
    """The augmentation of single clips; mixing, smoothing and repetition are the training's."""
    part = recipe.data.augment
    resized = part.crop == "resized"
    ops, box = part.rand_augment, part.erase
    return TrainTransform(
        short_side=None if resized else part.short_side,
        crop=recipe.data.crop,
        flip=part.flip,
        area=part.area if resized else None,
        aspect=part.aspect,
        rand_augment=RandAugmentSpec(ops.ops, ops.magnitude, ops.std, ops.probability) if ops else None,
        erase=EraseSpec(box.probability, box.mode) if box else None,
    )


def eval_views(recipe: Recipe, grid: str | None = None) -> ViewSpec:
    """The views of the test protocol; grid (`TxS`) overrides the recipe's."""
    part = recipe.views
    temporal, spatial = parse_views(grid or part.grid)
    return ViewSpec(
        temporal=temporal,
        spatial=spatial,
        sampling=sampling(recipe),
        short_side=part.short_side,
        crop=recipe.data.crop,
        starts="centre" if temporal == 1 else part.starts,
        axis=part.crop_axis,
        rounding=part.crop_round,
        seed=recipe.train.seed,
    )


def val_views(recipe: Recipe) -> ViewSpec:
    """The views of the validation inside training: one centre view unless the recipe says otherwise."""
    temporal, spatial = parse_views(recipe.val.views)
    return ViewSpec(
        temporal=temporal,
        spatial=spatial,
        sampling=sampling(recipe),
        short_side=recipe.val.short_side or recipe.views.short_side,
        crop=recipe.data.crop,
        starts="centre" if temporal == 1 else recipe.views.starts,
        axis=recipe.views.crop_axis,
        rounding=recipe.views.crop_round,
        seed=recipe.train.seed,
    )
