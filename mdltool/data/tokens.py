"""Streams of embeddings on their way into batches: what shards must hold, and padding (spec cm3t 5.3).

Axes: B clips, M tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from mdltool import console
from mdltool.errors import MdlError
from mdltool.types import StreamTokens

if TYPE_CHECKING:
    from mdltool.data.index import ShardIndex


def check_stored(index: ShardIndex, widths: Mapping[str, int], *, all_there: bool = True) -> None:
    """Raises MdlError unless the shards hold each of these streams, so wide, in at least one clip.

    all_there: False says what they lack, and leaves it at that.
    """
    for name, width in widths.items():
        found = index.streams.get(name)
        whose = f"{index.domain}/{index.split}"
        if not all_there and (found is None or (found.width == width and found.clips == 0)):
            console.say(f"no clip of the shards {whose} has the stream '{name}': they are scored without it")
            continue
        if found is None:
            held = ", ".join(f"{n} ({info.kind}, {info.width} wide)" for n, info in index.streams.items())
            raise MdlError(
                f"the shards {whose} have no stream '{name}' (they have: {held or 'none'})",
                index.folder,
                f"shard again with --modality {name}, or --set domains.{index.domain}.streams=[...] without it",
            )
        if found.width != width:
            raise MdlError(
                f"the stream '{name}' is {found.width} wide in the shards {whose}, {width} in the recipe",
                index.folder,
                f"--set streams.{name}.input={found.width} (with streams.{name}.embedder=linear for a width of the "
                "recipe's), or shard again",
            )
        if found.clips == 0:
            raise MdlError(
                f"no clip of the shards {whose} has tokens of the stream '{name}'",
                index.folder,
                "the clips' JSON say why (streams.missing); mend the sources and shard again",
            )


def check_widths(widths: Mapping[str, Mapping[str, int]]) -> None:
    """Raises MdlError where a stream's width differs between domains. widths: domain -> stream -> D."""
    first: dict[str, str] = {}
    for domain, own in widths.items():
        for name, width in own.items():
            other = first.setdefault(name, domain)
            if widths[other][name] != width:
                raise MdlError(
                    f"the stream '{name}' is {widths[other][name]} wide in {other} and {width} in {domain}",
                    f"streams.{name}",
                    "give the streams names of their own, or make both with one extractor",
                )


def padded(clips: Sequence[Mapping[str, np.ndarray | torch.Tensor]]) -> dict[str, StreamTokens]:
    """The streams of a batch: by name those of any of its clips. clips: of each, name -> float32 [M, D]."""
    widths = {name: tokens.shape[1] for clip in clips for name, tokens in clip.items()}
    return {name: _padded([clip.get(name) for clip in clips], width) for name, width in widths.items()}


def _padded(clips: Sequence[np.ndarray | torch.Tensor | None], width: int) -> StreamTokens:
    counts = [0 if tokens is None else len(tokens) for tokens in clips]
    # One token at least: attention over an axis of length 0 is a special case for nobody's benefit.
    tokens_BMD = torch.zeros(len(clips), max(1, *counts), width)
    mask_BM = torch.arange(tokens_BMD.shape[1]) < torch.tensor(counts)[:, None]
    for row_MD, tokens in zip(tokens_BMD, clips, strict=True):
        if tokens is not None:
            row_MD[: len(tokens)] = torch.as_tensor(tokens)
    return StreamTokens(tokens_BMD, mask_BM)
