"""Text to tokens without a model: hashed n-grams, the same on every machine.

Axes: M utterances or words, D buckets.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mdltool.data.features import Tokens
from mdltool.data.modalities import Utterance
from mdltool.errors import MdlError

UNITS = ("utterance", "word")


@dataclass(frozen=True)
class HashedNgrams:
    """Words and their runs of `low` to `high` characters, counted in `buckets` with a sign, scaled to length 1.

    unit: what a token is of, an utterance or a word; words share the time of theirs evenly.
    """

    buckets: int = 512
    low: int = 3
    high: int = 5
    unit: str = "utterance"
    kind: ClassVar[str] = "text"
    version: ClassVar[str] = "1"

    @property
    def width(self) -> int:
        return self.buckets

    def check(self, where: str) -> None:
        """Raises MdlError for an unknown unit and for no n-grams."""
        if self.unit not in UNITS:
            raise MdlError(f"'{self.unit}' is no unit", f"{where}.unit", f"one of: {', '.join(UNITS)}")
        if not (1 <= self.low <= self.high and self.buckets >= 1):
            raise MdlError("n-grams want 1 <= low <= high and a bucket", where, None)

    def __call__(self, utterances: Sequence[Utterance]) -> Tokens:
        """Utterances of signs alone give tokens of zeros."""
        units = utterances if self.unit == "utterance" else [w for u in utterances for w in words_of(u)]
        tokens_MD = np.zeros((len(units), self.buckets), np.float32)
        for row, unit in zip(tokens_MD, units, strict=True):
            for ngram in self._ngrams(unit.text):
                hashed = zlib.crc32(ngram.encode())
                # The lowest bit is the sign: what shares a bucket by chance cancels on average.
                row[(hashed >> 1) % self.buckets] += 1 if hashed & 1 else -1
            row /= max(1e-9, float(np.linalg.norm(row)))
        times = np.array([[unit.start_s, unit.end_s] for unit in units], np.float64).reshape(-1, 2)
        return Tokens(tokens_MD, times)

    def _ngrams(self, text: str) -> Iterator[str]:
        for word in re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()):
            yield word
            marked = f"<{word}>"
            for length in range(self.low, self.high + 1):
                yield from (marked[i : i + length] for i in range(len(marked) - length + 1))


def words_of(utterance: Utterance) -> list[Utterance]:
    """The words of an utterance, which share its time evenly."""
    words = re.findall(r"\S+", utterance.text)
    edges = np.linspace(utterance.start_s, utterance.end_s, len(words) + 1).tolist()
    return [Utterance(a, b, word) for a, b, word in zip(edges, edges[1:], words, strict=False)]
