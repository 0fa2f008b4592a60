"""Frozen extractors: a raw stream to tokens [M, D], the same when sharding and in `predict` (spec cm3t 5.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from mdltool.data.modalities import Raw
from mdltool.errors import MdlError
from mdltool.registry import Table, did_you_mean


@dataclass(frozen=True)
class Tokens:
    """tokens_MD: float32. times_M2: float64, the seconds of the clip that each is of."""

    tokens_MD: np.ndarray
    times_M2: np.ndarray


class Extractor(Protocol):
    """A dataclass of its options. kind: of the streams it reads. version: changes when its tokens do. width: D."""

    kind: ClassVar[str]
    version: ClassVar[str]

    @property
    def width(self) -> int: ...

    def check(self, where: str) -> None:
        """Raises MdlError for options without a meaning."""
        ...

    def __call__(self, raw: Any) -> Tokens: ...


class SoundExtractor(Extractor, Protocol):
    """One of sound, whose options are times."""

    def check_rate(self, rate: int, where: str) -> None:
        """Raises MdlError for samples a second at which these times cannot be kept."""
        ...


EXTRACTORS = Table(
    "feature extractor",
    {
        "log_mel": "mdltool.data.features.log_mel:LogMel",
        "flow_grid": "mdltool.data.features.flow:FlowGrid",
        "hashed_ngrams": "mdltool.data.features.text:HashedNgrams",
        "transformers": "mdltool.data.features.transformers_text:TransformersText",
    },
)
DEFAULTS = {"audio": "log_mel", "flow": "flow_grid", "text": "hashed_ngrams"}


def make_extractor(name: str, kind: str, options: Mapping[str, Any], where: str) -> Extractor:
    """An extractor with some of its options. Raises MdlError for one of another kind and for unknown options."""
    build = EXTRACTORS.load(name, f"{where}.extractor")
    if build.kind != kind:
        raise MdlError(f"'{name}' reads {build.kind}, not {kind}", f"{where}.extractor", f"e.g. {DEFAULTS[kind]}")
    extractor: Extractor = with_options(build, options, where)
    extractor.check(where)
    return extractor


def with_options(build: Any, options: Mapping[str, Any], where: str) -> Any:
    """A dataclass of options, some of them given. Raises MdlError for an unknown one or one of another type."""
    fields = {field.name: field for field in dataclasses.fields(build)}
    for name, value in options.items():
        if name not in fields:
            raise MdlError(f"there is no option '{name}'", f"{where}.{name}", did_you_mean(name, fields))
        default = fields[name].default
        wanted = type(default) if default is not dataclasses.MISSING else str
        if not isinstance(value, wanted) and not (wanted is float and type(value) is int):
            raise MdlError(f"{value!r} is no {wanted.__name__}", f"{where}.{name}", f"e.g. {default!r}")
    return build(**options)


def extract(extractor: Extractor, raw: Raw) -> Tokens:
    """The tokens, finite. Raises FloatingPointError where they are not."""
    found = extractor(raw)
    if not np.isfinite(found.tokens_MD).all():
        raise FloatingPointError("the extractor gave values that are not finite")
    return found
