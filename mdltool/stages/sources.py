"""What makes the tokens of a recipe's streams: asked of `shard`, taken from the shards, and compared between them.

No stage itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from mdltool.data.features import DEFAULTS, EXTRACTORS
from mdltool.data.index import ShardIndex
from mdltool.data.modalities.asked import Asked, asked
from mdltool.data.modalities.plan import FILES, settings_of
from mdltool.data.tokens import check_stored
from mdltool.errors import MdlError
from mdltool.registry import did_you_mean
from mdltool.schema import Recipe, StreamPart
from mdltool.stages.fitting import DomainData
from mdltool.stages.plan import modalities
from mdltool.types import StreamInfo

# What shards of one stream may differ in: how it is stored, whose speech, where sound and flow come from.
_FREE = ("store", "speaker", "side", "method", "weights", "pairs_per_s")


def streams_for(recipe: Recipe, domain: str) -> dict[str, StreamPart]:
    """The streams that a recipe has for a domain; for one that it does not name, all of them."""
    names = recipe.streams_of(domain) if domain in recipe.domains else recipe.streams
    return {name: recipe.streams[name] for name in names}


def named(word: str, kinds: Mapping[str, str]) -> list[str]:
    """The streams that a word of the command line stands for: those of that kind, and that of that name.

    kinds: of the streams, by name.
    """
    return [name for name, kind in kinds.items() if word in (name, kind)]


def asked_for(
    recipe: Recipe,
    domain: str,
    modalities: Sequence[str],
    sides: Sequence[str] = (),
    features: Sequence[str] = (),
    settings: Sequence[str] = (),
) -> tuple[Asked, ...]:
    """What shards of a domain are to hold for a recipe: the streams that the words name, as it declares them.

    modalities: kinds, or names of streams. sides, features, settings: as `asked` takes them; a setting of a kind is
    one of all streams that it stands for. Raises MdlError for words of no stream of the recipe, and where the
    command line and the recipe do not agree.
    """
    parts = streams_for(recipe, domain)
    kinds = {name: part.kind for name, part in parts.items()}
    if not parts:
        what = f"the recipe {recipe.name} has no streams" + (f" for '{domain}'" if recipe.streams else "")
        raise MdlError(what, "--recipe", "name one that has, or leave it out")
    if not modalities:
        fix = f"add --modality {' --modality '.join(dict.fromkeys(kinds.values()))}"
        raise MdlError("nothing of the recipe's streams is asked for", "--recipe", fix)
    found = {word: named(word, kinds) for word in modalities}
    for word, names in found.items():
        if not names:
            what = f"the recipe {recipe.name} has no stream of that name or kind for '{domain}'"
            raise MdlError(what, f"--modality {word}", did_you_mean(word, dict.fromkeys((*kinds, *kinds.values()))))
    words = dict.fromkeys(f"{name}={kinds[name]}" for names in found.values() for name in names)
    pairs = [setting.partition(".") for setting in settings]
    spread = [f"{name}.{rest}" for word, _, rest in pairs for name in found.get(word, [word])]
    return tuple(_declared(entry, parts[entry.name]) for entry in asked(list(words), sides, features, spread))


def _declared(entry: Asked, part: StreamPart) -> Asked:
    """What is asked for, made as the recipe says. Raises MdlError where the command line says otherwise."""
    name, own = entry.name, {**part.extractor_options, "extractor": part.extractor}
    given = {**entry.settings} if entry.features is None else {"extractor": FILES}
    for key, value in given.items():
        if key not in _FREE and own.get(key) not in (None, value):
            what = f"the recipe makes '{name}' with {key} {own[key]}, not {value}"
            raise MdlError(what, f"--modality {name}", "leave it out, or change the recipe's streams")
    width = part.input or part.width
    if entry.features is not None:
        return dataclasses.replace(entry, width=width)
    if part.extractor == FILES:
        what = f"the recipe takes the tokens of '{name}' from files of the data set"
        raise MdlError(what, f"--modality {name}", f"--features {name}=FOLDER")
    made = settings_of(part.extractor or DEFAULTS[part.kind], part.extractor_options)
    return dataclasses.replace(entry, settings={**made, **given}, width=width)


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
