"""The nouns that cross module borders. No torch at import time: the command line reads this too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


IMAGE_SUFFIXES = frozenset(
    (".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)

STREAM_KINDS = ("audio", "flow", "text")

_NOT_DOMAINS = ("backbone", "shared", "head")  # what tensors' names begin with where a domain's could
DOMAIN_NAMES = f"lower case letters, digits, _ and -; not {', '.join(_NOT_DOMAINS)}"

Label = int | tuple[int, ...] | tuple[float, ...]
"""By task: single_label: the class's number, from 0. multi_label: the numbers of the clip's classes, increasing.
regression: each target's value. verb_noun: the numbers of its verb and its noun. In JSON all but the first are
lists."""


def names_domain(name: str) -> bool:
    """Whether a domain can be called so: see DOMAIN_NAMES."""
    return bool(re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name)) and name not in _NOT_DOMAINS


def is_image(name: Path | str) -> bool:
    """Whether a file is an image, by its extension."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


@dataclass(frozen=True)
class Clip:
    """One annotated segment of one video, as an annotation format lists it.

    key: unique within a domain's split; a relative path without extension and without dots.
    video: the source file, a video or an image. label: as the domain's task has it, see Label.
    start_s, end_s: the segment in seconds of presentation time from the first frame; None: the whole file.
    item: of a file of image arrays, the array's name and the image's row in it. sides: stream -> the side file that
    the data set has for it, of the whole video.
    """

    key: str
    video: Path
    label: Label
    start_s: float | None = None
    end_s: float | None = None
    item: tuple[str, int] | None = None
    sides: Mapping[str, Path] = field(default_factory=dict)

    @property
    def is_segment(self) -> bool:
        return self.start_s is not None or self.end_s is not None

    @property
    def is_image(self) -> bool:
        return self.item is not None or is_image(self.video)


@dataclass(frozen=True)
class Listing:
    """What an annotation format found: classes in label order, clips, and what it noticed.

    classes, task, verbs, actions: as LabelSpace has them. missing: (key, reason) of listed clips whose file is not
    there. notes: sentences printed to the user (label base, classes seen against listed, ...). excluded: how many
    listed clips were left out at the user's wish. absent: the missing clips, where the format says what they would
    be. subsets, participants: name -> keys of clips, there or not: parts that are scored for themselves, and who is
    to be seen in them. sides: streams that the data set has side files for, and takes from nowhere else.
    """

    classes: tuple[str, ...]
    clips: tuple[Clip, ...]
    missing: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    task: str = "single_label"
    excluded: int = 0
    verbs: int = 0
    actions: tuple[tuple[int, int], ...] = ()
    absent: tuple[Clip, ...] = ()
    subsets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    participants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sides: tuple[str, ...] = ()

    @property
    def marks(self) -> dict[str, dict[str, list[str]]]:
        """Subsets and participants as index.json has them; none of the names where there is nothing to say."""
        given = {"subsets": self.subsets, "participants": self.participants}
        return {name: {n: sorted(keys) for n, keys in of.items()} for name, of in given.items() if of}

    @property
    def space(self) -> LabelSpace:
        return LabelSpace(self.task, self.classes, self.verbs, self.actions)


@dataclass(frozen=True)
class Place:
    """Where a declared site is, before its shape is known.

    path: dotted module path in the library's network, or in an opened block. kind: stage, block, attention, mlp,
    conv, linear. role: which of a block's places, e.g. "mid". layer: the block or stage, from 1. block: path of the
    block that has to be opened for it; None: none. stage: of a pyramid of blocks, from 1; 0 of other networks.
    """

    path: str
    kind: str
    role: str = ""
    layer: int = 0
    block: str | None = None
    stage: int = 0


@dataclass(frozen=True)
class ModuleShape:
    """What a convolution or linear layer at a site is. out_channels: size of its output's C; parts: how many
    projections a fused linear layer holds (3 for qkv). kernel, stride: one number per spatial axis.
    """

    out_channels: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    groups: int = 1
    parts: int = 1


@dataclass(frozen=True)
class StreamSpec:
    """A named sequence of embeddings that a domain's clips may have beside their frames.

    kind: audio, flow, text. width: of what the cross-attention sees. input: of the stored array. embedder: the
    trained map from input to width, with its options. late: added to a finished model. layers: the blocks that read
    it, as an adapter's option says them; None: all that read streams.
    """

    kind: str
    width: int
    input: int
    embedder: str = "none"
    embedder_options: dict[str, Any] = field(default_factory=dict)
    late: bool = False
    layers: str | None = None

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> StreamSpec:
        return StreamSpec(**value)


@dataclass(frozen=True)
class Site:
    """A named place in a backbone where an adapter can attach.

    path, kind, role, layer, block: as Place says. layout: the axes of the tensor that an adapter sees, e.g. "BCTHW"
    or a TokenGrid's layout. channels: size of C, of the input where `shape` is given. grid: (T, H, W) at the
    configured clip shape. window, shift: the (T, H, W) window of the block's attention where it has one, and how
    far the windows are shifted where the map is larger than one.
    """

    name: str
    path: str
    kind: str
    layout: str
    channels: int
    grid: tuple[int, int, int]
    role: str = ""
    layer: int = 0
    block: str | None = None
    shape: ModuleShape | None = None
    window: tuple[int, int, int] | None = None
    shift: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class StreamInfo:
    """A stream of embeddings that shards hold (spec cm3t 5.3). kind: audio, flow or text. width: D of its arrays.

    extractor, options, version: what made the arrays; "files": the data set's own. clips: how many have tokens.
    """

    kind: str
    width: int
    extractor: str
    options: Mapping[str, Any]
    version: str
    clips: int


@dataclass(frozen=True)
class StreamTokens:
    """One stream of embeddings of a batch of clips.

    tokens_BMD: float32 [B, M, D], 0 where there is no token. mask_BM: bool [B, M], True where there is one; a clip
    without the stream has none. M is at least 1.
    """

    tokens_BMD: torch.Tensor
    mask_BM: torch.Tensor


@dataclass(frozen=True)
class LabelSpace:
    """A domain's task and what its labels can be; index.json, model.json and a domain's file say it alike.

    classes: names in label order; of a regression, of its targets; of verb_noun, the verbs and then the nouns, as
    the head's outputs are. verbs: how many of them are verbs, 0 for other tasks. actions: of verb_noun, the valid
    pairs of verb and noun, sorted.
    """

    task: str
    classes: tuple[str, ...]
    verbs: int = 0
    actions: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> LabelSpace:
        """Of what `as_json` gave, among other keys."""
        actions = tuple((int(verb), int(noun)) for verb, noun in entry.get("actions", ()))
        return cls(str(entry["task"]), tuple(map(str, entry["classes"])), int(entry.get("verbs", 0)), actions)

    def as_json(self) -> dict[str, Any]:
        """Plain values; the last two of verb_noun alone, so that the files of other tasks stay what they are."""
        own = {"verbs": self.verbs, "actions": [list(pair) for pair in self.actions]} if self.verbs else {}
        return {"task": self.task, "classes": list(self.classes), **own}

    @property
    def row_names(self) -> list[str]:
        """A name for each class that no other has: a verb and a noun may be one word."""
        return [
            f"{'verb' if i < self.verbs else 'noun'} {name}" if self.verbs else name
            for i, name in enumerate(self.classes)
        ]


@dataclass
class Batch:
    """Clips on their way to the model: this process's micro-batch of one whole batch.

    domain: of all clips; None where several are mixed. frames: uint8 [B, C, T, H, W], values 0..255, not
    normalised. labels: int64 [B] of single_label, int64 [B, 2] of verb_noun; else float32 [B, N]: 0 or 1 for each
    class, or each target's value. keys: the clips' keys. positions: each clip's position in its domain's endless
    stream. skipped: (key, reason) of clips that could not be decoded and were passed over for the next of the
    stream. domain_B: int64 [B], each clip's domain by its number among the recipe's; None: all of `domain`. whole:
    domain -> clips of the whole batch, over all processes and micro-batches. number: of the whole batch, in its
    update. partner_B: int64 [B], whom each clip is mixed with, where clips are mixed. streams: by name, those of
    any of the batch's domains.
    """

    domain: str | None
    frames: torch.Tensor
    labels: torch.Tensor
    keys: list[str]
    positions: list[int] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    domain_B: torch.Tensor | None = None
    whole: dict[str, int] = field(default_factory=dict)
    number: int = 0
    partner_B: torch.Tensor | None = None
    streams: dict[str, StreamTokens] = field(default_factory=dict)
