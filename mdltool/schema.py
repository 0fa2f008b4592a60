"""The shape of a recipe: what each key is, which values it takes (design, section 6, "Shape of a recipe")."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mdltool.data.sampling import Sampling
from mdltool.errors import MdlError

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Grid = Annotated[str, Field(pattern=r"^[1-9]\d*x[13]$")]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OpenPart(BaseModel):
    """A part whose further keys belong to the backbone or adapter that it names."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Published(Part):
    """What the paper prints for this row: top1 per domain in percent, other metrics in scores.

    parameters_m: millions as printed, with `digits` decimals. sums: of which parts of ours a printed cell is the
    sum, where that is not the cell's own name. percent: a printed share of `denominator` parameters. gflops: of
    gflops_views views together. corrected: cells that are proven wrong in print, with what they must be. notes:
    why, and what cannot be derived.
    """

    paper: str
    rows: list[str]
    top1: dict[str, float] = {}
    scores: dict[str, dict[str, float]] = {}
    parameters_m: dict[str, float] = {}
    digits: Annotated[int, Field(ge=0, le=3)] = 2
    sums: dict[str, list[str]] = {}
    percent: dict[str, float] = {}
    denominator: Positive | None = None
    gflops: Annotated[float, Field(gt=0)] | None = None
    gflops_views: Positive | None = None
    corrected: dict[str, float] = {}
    notes: str | None = None


class BackbonePart(OpenPart):
    """weights: the pretraining that the row uses (a tag), or `scratch` for random weights."""

    name: str
    weights: str = "scratch"


class DomainPart(Part):
    """classes: how many; needed by `describe`, otherwise read from the shards and checked against them."""

    task: str = "single_label"
    classes: Positive | None = None
    weight: Annotated[float, Field(ge=0)] = 1.0


class AdapterPart(OpenPart):
    type: str
    sites: str | list[str] = "all"


class Heads(Part):
    dropout: Fraction = 0.5
    init: Literal["default", "normal"] = "default"
    std: Annotated[float, Field(gt=0)] = 0.01
    reuse_pretrained: bool = False


class Losses(Part):
    reduction: Literal["mean", "sum"] = "mean"
    domain_average: bool = False


class Optimizer(Part):
    name: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)]
    momentum: Fraction = 0.9
    nesterov: bool = False
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    decay: Literal["all", "matrices"] = "all"
    backbone_lr: Annotated[float, Field(gt=0)] | None = None
    clip_norm: Annotated[float, Field(gt=0)] | None = None


class Schedule(Part):
    """unit: whether milestones and warm-up count updates, batch steps (D batch steps are one update) or epochs."""

    name: Literal["constant", "step", "cosine"] = "constant"
    milestones: list[Positive] = []
    gamma: Annotated[float, Field(gt=0)] = 0.1
    warmup: Annotated[int, Field(ge=0)] = 0
    final_lr: Annotated[float, Field(ge=0)] = 0.0
    unit: Literal["update", "batch", "epoch"] = "update"


class Step(Part):
    """updates or epochs; an epoch is as many updates as the domain with the most of them needs to be seen once."""

    regime: Literal["frozen", "joint", "heads", "full", "adapters"]
    updates: Positive | None = None
    epochs: Positive | None = None
    optimizer: Optimizer
    schedule: Schedule = Schedule()

    @model_validator(mode="after")
    def _one_length(self) -> Step:
        if (self.updates is None) == (self.epochs is None):
            raise ValueError("give either updates or epochs")
        if self.schedule.unit == "epoch" and self.epochs is None:
            raise ValueError("a schedule in epochs needs the step's epochs")
        return self


class Train(Part):
    """bn: None takes the regime's default (frozen for a frozen backbone, else shared)."""

    steps: Annotated[list[Step], Field(min_length=1)]
    bn: Literal["frozen", "shared", "per_domain_stats", "per_domain", "recalibrate"] | None = None
    recalibrate_batches: Positive = 200
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = True
    seed: Annotated[int, Field(ge=0)] = 0
    domain_order: Literal["sequential", "shuffled", "random"] = "sequential"
    rounds_per_update: Positive = 1
    checkpoint_every: Positive = 1000


class SamplingPart(Part):
    """One rule of data.sampling.Sampling: clip_seconds for count and time, stride_frames for stride."""

    clip_seconds: Annotated[float, Field(gt=0)] | None = None
    stride_frames: Positive | None = None
    short: Literal["stretch", "repeat_last", "loop"] = "stretch"
    index: Literal["count", "time", "stride", "segments"] = "count"

    @model_validator(mode="after")
    def _complete(self) -> SamplingPart:
        try:
            Sampling(1, self.clip_seconds, self.short, self.index, self.stride_frames)
        except MdlError as error:
            raise ValueError(error.what) from None
        return self


class Augment(Part):
    """short_side: the jitter's bounds in pixels, inclusive. flip: probability; 0 where left and right differ."""

    short_side: tuple[Positive, Positive]
    flip: Fraction = 0.5

    @field_validator("short_side")
    @classmethod
    def _ordered(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] > value[1]:
            raise ValueError("the lower bound is above the upper one")
        return value


class Data(Part):
    """frames and crop: the clip's shape. batch: clips per domain and update, one number or one per domain."""

    frames: Positive
    crop: Positive
    sampling: SamplingPart
    augment: Augment
    batch: Positive | dict[str, Positive]


class Validation(Part):
    """every: updates between validations; 0 validates once, at the end. views: 1x1 is one centre view."""

    every: Annotated[int, Field(ge=0)] = 1000
    views: Grid = "1x1"
    short_side: Positive | None = None


class Views(Part):
    """The test protocol. grid: T temporal positions x S crops."""

    grid: Grid = "10x3"
    short_side: Positive
    starts: Literal["spaced_exclusive", "spaced_inclusive", "random"] = "spaced_exclusive"
    crop_axis: Literal["horizontal", "long_side"] = "long_side"
    crop_round: Literal["floor", "ceil"] = "floor"
    average: Literal["probs", "logits"] = "probs"
    on_error: Literal["wrong", "skip"] = "wrong"


class Recipe(Part):
    """A whole training run (design, section 6, "Shape of a recipe")."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]
    about: str
    published: Published | None = None
    backbone: BackbonePart
    domains: Annotated[dict[str, DomainPart], Field(min_length=1)]
    adapters: list[AdapterPart] = []
    heads: Heads = Heads()
    losses: Losses = Losses()
    train: Train
    data: Data
    val: Validation = Validation()
    views: Views

    def batch_of(self, domain: str) -> int:
        """Clips of one domain in one batch step."""
        return self.data.batch if isinstance(self.data.batch, int) else self.data.batch[domain]
