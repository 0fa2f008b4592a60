"""What `shard --modality` asks for: streams by name and kind, their side files, options and features."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdltool.errors import MdlError
from mdltool.registry import did_you_mean
from mdltool.types import STREAM_KINDS

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TAKEN = ("json", "npy")


@dataclass(frozen=True)
class Asked:
    """A stream that shards are to hold.

    side: folder of side files, or one transcript of all videos. features: folder of the data set's own arrays.
    settings: options of its extraction, `extractor` among them. width: D that its tokens must have; None: any.
    """

    name: str
    kind: str
    side: Path | None = None
    features: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    width: int | None = None


def asked(
    modalities: Sequence[str], sides: Sequence[str], features: Sequence[str], settings: Sequence[str]
) -> tuple[Asked, ...]:
    """Streams of the command line: NAME or NAME=KIND, NAME=PATH, NAME=FOLDER, NAME.KEY=VALUE.

    A NAME without KIND is one, or begins with one and "_". Raises MdlError.
    """
    kinds: dict[str, str] = {}
    for word in modalities:
        name, equals, kind = word.partition("=")
        kind = kind if equals else name.partition("_")[0]
        if kind not in STREAM_KINDS:
            what = f"'{kind}' is no kind of modality" if equals else f"'{name}' does not say its kind"
            raise MdlError(what, f"--modality {word}", f"write {', '.join(STREAM_KINDS)}, audio_NAME or NAME=audio")
        if not _NAME.fullmatch(name) or name in _TAKEN:
            raise MdlError(f"'{name}' cannot name a stream", f"--modality {word}", "use a-z, 0-9 and '_'")
        if name in kinds:
            raise MdlError(f"the stream '{name}' is given twice", f"--modality {word}", "name each stream once")
        kinds[name] = kind
    side, own = paths_of("--side", sides), paths_of("--features", features)
    for option, names in (("--side", side), ("--features", own)):
        for name in names:
            _known(name, kinds, f"{option} {name}")
    values = _settings(settings, kinds)
    for name in own:
        if name in side or values.get(name):
            raise MdlError(
                f"the features of '{name}' are taken as they are: nothing is extracted",
                f"--features {name}",
                f"leave out --side {name}=... and --set {name}....",
            )
    return tuple(Asked(n, kind, side.get(n), own.get(n), values.get(n, {})) for n, kind in kinds.items())


def paths_of(option: str, words: Iterable[str]) -> dict[str, Path]:
    """STREAM=PATH by stream. Raises MdlError for a path that is not there."""
    found: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not path:
            raise MdlError(
                f"'{word}' names no path", option, f"write {option} STREAM=PATH, e.g. {option} text=subs"
            )
        if name in found:
            raise MdlError(f"'{name}' is given twice", f"{option} {word}", "give each stream one path")
        found[name] = Path(path).expanduser()
        if not found[name].exists():
            raise MdlError("there is no such file or folder", f"{option} {word}", "check the path")
    return found


def _settings(words: Iterable[str], names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    import yaml

    found: dict[str, dict[str, Any]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        name, dot, option = key.partition(".")
        if not equals or not dot or not option:
            raise MdlError(f"'{word}' is no option of a stream", "--set", "write --set STREAM.KEY=VALUE")
        _known(name, names, f"--set {word}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise MdlError("the value is not valid YAML", f"--set {word}", "quote it") from None
        found.setdefault(name, {})[option] = value
    return found


def _known(name: str, names: Mapping[str, str], where: str) -> None:
    if name not in names:
        fix = did_you_mean(name, names) if names else f"add --modality {name}"
        raise MdlError(f"'{name}' is not among the streams of --modality", where, fix)
