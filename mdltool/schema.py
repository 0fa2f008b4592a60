"""The shape of a recipe: what each key is, which values it takes (design, section 6, "Shape of a recipe")."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mdltool.data.sampling import Sampling
from mdltool.errors import MdlError
from mdltool.schema_losses import Losses

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Above = Annotated[float, Field(gt=0)]
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
    """What the paper prints for this row: top1 per domain in percent, other metrics in scores, those of all domains
    together in overall. Of a shipped recipe the cells are read from the printed tables that name it (published.py):
    those of its domains and of `others`, without the columns in `omit`.

    parameters_m: millions as printed, with `digits` decimals. sums: of which parts of ours a printed cell is the
    sum, where that is not the cell's own name; `denominator` and, of one type's adapters, its name are parts too.
    percent: a printed share of `denominator` parameters. gflops: of gflops_views views together. size: all domains'
    networks as a multiple of one, by the weights of convolutions. corrected: cells that are proven wrong in print,
    with what they must be. why: figure -> why ours is another. notes: what else is to be known of the row.
    """

    paper: str
    rows: list[str]
    others: list[str] = []
    omit: list[str] = []
    top1: dict[str, float] = {}
    scores: dict[str, dict[str, float]] = {}
    overall: dict[str, float] = {}
    parameters_m: dict[str, float] = {}
    digits: Annotated[int, Field(ge=0, le=3)] = 2
    sums: dict[str, list[str]] = {}
    percent: dict[str, float] = {}
    denominator: Positive | None = None
    gflops: Above | None = None
    gflops_views: Positive | None = None
    size: Above | None = None
    corrected: dict[str, float] = {}
    why: dict[str, str] = {}
    notes: str | None = None


class BackbonePart(OpenPart):
    """weights: the pretraining that the row uses (a tag), or `scratch` for random weights. adapters: whether the
    domains' adapters begin as those that the backbone was pretrained with, where there are any.
    """

    name: str
    weights: str = "scratch"
    adapters: Literal["copy", "ignore"] = "copy"


class NormalizePart(Part):
    """Mean and deviation of a data set's pixels, RGB, of values 0..1."""

    mean: tuple[Fraction, Fraction, Fraction]
    std: tuple[Above, Above, Above]


class DomainPart(Part):
    """classes: how many, verbs and nouns together; needed by `describe`, otherwise read from the shards and checked
    against them. weight: of the domain's loss. weight_decay: of its own parameters, where it is not the
    optimizer's. sampling, flip, views, crop: of this domain, where they are not those of `data.sampling`,
    `data.augment.flip`, `views.grid` and `data.crop`. short_side: of this domain's frames, in training and in every
    test. swap_sides: a flipped clip of a class named with left or right is one of the class named with the other;
    where there is none it is not flipped. augment: `none` trains on the centre crop of the test protocol, without
    flips and all else. normalize: where it is not the backbone's. streams: which of the recipe's its clips may
    have; null: all.
    """

    task: str = "single_label"
    classes: Positive | None = None
    weight: Annotated[float, Field(ge=0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    sampling: SamplingPart | None = None
    flip: Fraction | None = None
    views: Grid | None = None
    crop: Positive | None = None
    short_side: Positive | None = None
    swap_sides: bool = False
    augment: Literal["recipe", "none"] = "recipe"
    normalize: NormalizePart | None = None
    streams: list[str] | None = None


class StreamPart(Part):
    """A stream of embeddings beside the frames, for the adapter `caa`. width: of what the adapter sees. input: of
    the stored array, where it is another. embedder: the trained map from input to width. layers: the blocks that
    read it, where these are fewer than the adapter's. extractor: what makes the array, frozen; training takes it,
    its options and its version from the shards, and refuses others than are given here.
    """

    kind: Literal["audio", "flow", "text"]
    width: Positive = 512
    input: Positive | None = None
    embedder: str = "none"
    embedder_options: dict[str, Any] = {}
    layers: str | None = None
    extractor: str | None = None
    extractor_options: dict[str, Any] = {}
    extractor_version: str | None = None


class AdapterPart(OpenPart):
    type: str
    sites: str | list[str] = "all"


class Heads(Part):
    """type: one linear layer, or `mlp`, two with `hidden` between them (spec multitrain 2.2)."""

    type: Literal["linear", "mlp"] = "linear"
    hidden: Positive = 2048
    logit_dropout: bool = False
    dropout: Fraction = 0.5
    init: Literal["default", "normal"] = "default"
    std: Annotated[float, Field(gt=0)] = 0.01
    reuse_pretrained: bool = False


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
    """unit: whether milestones and warm-up count updates, batch steps (D batch steps are one update) or epochs.
    warmup_from: the rate of the first update; None: lr / warmup.
    """

    name: Literal["constant", "step", "cosine"] = "constant"
    milestones: list[Positive] = []
    gamma: Annotated[float, Field(gt=0)] = 0.1
    warmup: Annotated[int, Field(ge=0)] = 0
    warmup_from: Annotated[float, Field(ge=0)] | None = None
    final_lr: Annotated[float, Field(ge=0)] = 0.0
    unit: Literal["update", "batch", "epoch"] = "update"


class Step(Part):
    """updates or epochs; an epoch is as many updates as the domain with the most of them needs to be seen once.
    adapters: the types that train in this step, whatever the regime; null: as the regime says. mute: types that
    stay out of the output; the last step's are the model's.
    """

    regime: Literal["frozen", "joint", "heads", "full", "adapters"]
    adapters: list[str] | None = None
    mute: list[str] = []
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
    """bn: None takes the regime's default (frozen for a frozen backbone, else shared). sync_bn: statistics over all
    processes. batches: one domain each, or clips of all mixed. split: how processes share an update, rows of each
    batch or whole batches. accumulate: micro-batches of a batch. ema: decay of averaged weights, 0 for none.
    decay_by_size: each domain's weight decay by its clips, where domains.D.weight_decay does not say it.
    log_clips: the keys of every update's clips go to clips-RANK.jsonl.
    """

    steps: Annotated[list[Step], Field(min_length=1)]
    bn: Literal["frozen", "shared", "per_domain_stats", "per_domain", "recalibrate"] | None = None
    recalibrate_batches: Positive = 200
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = True
    seed: Annotated[int, Field(ge=0)] = 0
    domain_order: Literal["sequential", "shuffled", "random"] = "sequential"
    rounds_per_update: Positive = 1
    batches: Literal["in_turn", "mixed"] = "in_turn"
    split: Literal["rows", "batches"] = "rows"
    accumulate: Positive = 1
    sync_bn: bool = False
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    decay_by_size: bool = False
    compile: bool = False
    checkpoint_activations: bool = False
    checkpoint_every: Positive = 1000
    keep_checkpoints: Positive = 2
    log_clips: bool = False


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


class RandAugmentPart(Part):
    """ops operations in turn, each done with `probability`, at a magnitude 0..10 of mean and deviation given."""

    ops: Positive = 4
    magnitude: Annotated[float, Field(ge=0, le=10)] = 7.0
    std: Annotated[float, Field(ge=0)] = 0.5
    probability: Fraction = 0.5


class ErasePart(Part):
    """One box in `probability` of the clips. mode: noise, the mean grey, or black."""

    probability: Fraction = 0.25
    mode: Literal["pixel", "mean", "constant"] = "pixel"


class Augment(Part):
    """One draw per clip (spec multitrain 3, 5.3); what is null, 0 or 1 by default is off.

    short_side: bounds in pixels of the shorter side, inclusive; `crop: resized` takes a window of `area` (share of
    the picture) and `aspect` (width / height) instead and does not read it. flip: probability; 0 where left and
    right differ. mixup, cutmix: alpha. mix_probability: of mixing a batch. switch_probability: of cutmix, where
    both are on. mix_scope: what a partner of another domain counts for. smooth_classes: one class count for the
    smoothing of every domain, as the release has it. repeat: differently augmented copies of each clip in a batch.
    """

    crop: Literal["short_side", "resized"] = "short_side"
    short_side: tuple[Positive, Positive] | None = None
    area: tuple[Above, Above] = (0.08, 1.0)
    aspect: tuple[Above, Above] = (3 / 4, 4 / 3)
    flip: Fraction = 0.5
    rand_augment: RandAugmentPart | None = None
    erase: ErasePart | None = None
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    mix_probability: Fraction = 1.0
    switch_probability: Fraction = 0.5
    mix_scope: Literal["masked", "both", "same"] = "masked"
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    smooth_classes: Positive | None = None
    repeat: Positive = 1

    @field_validator("short_side", "area", "aspect")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError("the lower bound is above the upper one")
        return value

    @field_validator("area")
    @classmethod
    def _share(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[1] > 1:
            raise ValueError("a share of the picture is 1 at most")
        return value

    @model_validator(mode="after")
    def _complete(self) -> Augment:
        if self.crop == "short_side" and self.short_side is None:
            raise ValueError("give short_side: [lo, hi] in pixels, or crop: resized")
        if self.smooth_classes is not None and not self.smoothing:
            raise ValueError("smooth_classes says how to smooth, but smoothing is 0")
        return self


class ProportionsPart(Part):
    """How often each domain is drawn, for mixed batches and for `domain_order: random` (data.order.Proportions)."""

    mode: Literal["proportional", "uniform", "temperature", "weighted"] = "proportional"
    temperature: Annotated[float, Field(gt=0)] = 2.0
    weights: dict[str, Annotated[float, Field(gt=0)]] = {}
    replicas: dict[str, Positive] = {}


class Data(Part):
    """frames and crop: the clip's shape. batch: clips per batch, one number or one per domain; of mixed batches,
    one number for all domains together. fraction, per_class: how much of every training split is used, a share of
    each class or so many clips of it; subset_seed: which ones.
    """

    frames: Positive
    crop: Positive
    sampling: SamplingPart
    augment: Augment
    batch: Positive | dict[str, Positive]
    proportions: ProportionsPart | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    per_class: Positive | None = None
    subset_seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_subset(self) -> Data:
        if self.fraction != 1 and self.per_class is not None:
            raise ValueError("give either fraction or per_class")
        return self


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
    streams: dict[str, StreamPart] = {}
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

    def streams_of(self, domain: str) -> list[str]:
        """The streams that one domain's clips may have, in the recipe's order."""
        own = self.domains[domain].streams
        return [name for name in self.streams if own is None or name in own]

    def crop_of(self, domain: str) -> int:
        """Pixels of a side of one domain's crops."""
        return self.domains[domain].crop or self.data.crop

    def test_side_of(self, domain: str) -> int:
        """The shorter side in the test protocol of one domain."""
        return self.domains[domain].short_side or self.views.short_side

    def val_side_of(self, domain: str) -> int:
        """The shorter side in the validation of one domain."""
        return self.domains[domain].short_side or self.val.short_side or self.views.short_side
