"""What made the tokens of a recipe's streams: taken from the shards, and compared between them. No stage itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from mdltool.data.features import DEFAULTS, EXTRACTORS
from mdltool.data.index import ShardIndex
from mdltool.data.tokens import check_stored
from mdltool.errors import MdlError
from mdltool.schema import Recipe, StreamPart
from mdltool.stages.fitting import DomainData
from mdltool.stages.plan import modalities
from mdltool.types import StreamInfo

# What shards of one stream may differ in: how it is stored, whose speech, where sound and flow come from.
_FREE = ("store", "speaker", "side", "method", "weights", "pairs_per_s")


def with_sources(recipe: Recipe, data: Mapping[str, DomainData]) -> Recipe:
    """The recipe with the extractors that made its streams. data: by domain.

    Raises MdlError where shards lack a stream, and where they differ from the recipe or from each other.
    """
    parts = dict(recipe.streams)
    for domain, own in data.items():
        for index in (own.train_index, own.val_index):
            if index is None:
                continue
            # What made them first: another extractor's width is no fault of the recipe's.
            for name in set(recipe.streams_of(domain)) & set(index.streams):
                parts[name] = _agreed(name, parts[name], index)
            check_stored(index, modalities(recipe, domain))
    return recipe.model_copy(update={"streams": parts}) if parts else recipe


def source_of(part: StreamPart) -> StreamInfo:
    """What `with_sources` noted, or the defaults of the kind."""
    extractor = part.extractor or DEFAULTS[part.kind]
    version = part.extractor_version
    if version is None:
        version = str(EXTRACTORS.load(extractor, "streams").version)
    return StreamInfo(part.kind, part.input or part.width, extractor, part.extractor_options, version, 0)


def check_sources(recipe: Recipe, index: ShardIndex, without: Collection[str] = ()) -> None:
    """Raise MdlError where shards hold other tokens than a finished model has learned to read.

    without: streams or kinds that are not read. What shards lack altogether is not looked at.
    """
    for name in modalities(recipe, index.domain, without):
        if name in index.streams:
            _check_same(name, recipe.streams[name], index)


def _agreed(name: str, part: StreamPart, index: ShardIndex) -> StreamPart:
    _check_same(name, part, index)
    info = index.streams[name]
    given = part.extractor_options or dict(info.options)
    options = {**info.options, **given}
    return part.model_copy(
        update={"extractor": info.extractor, "extractor_options": options, "extractor_version": info.version}
    )


def _check_same(name: str, part: StreamPart, index: ShardIndex) -> None:
    """Raise MdlError where a stream of the shards was made in another way than the recipe says."""
    info = index.streams[name]
    whose = f"{index.domain}/{index.split}"
    wanted = {"kind": part.kind, "extractor": part.extractor, "version": part.extractor_version}
    found = {"kind": info.kind, "extractor": info.extractor, "version": info.version}
    wanted |= {key: value for key, value in part.extractor_options.items() if key not in _FREE}
    found |= {key: value for key, value in info.options.items() if key not in _FREE}
    for key, value in wanted.items():
        if value is not None and found.get(key) != value:
            raise MdlError(
                f"the stream '{name}' of the shards {whose} has {key} {found.get(key)}, where {value} is wanted",
                index.folder,
                f"shard all splits and domains with the same --features or --set {name}.... options",
            )
