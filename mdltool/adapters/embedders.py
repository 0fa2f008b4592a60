"""Embedders: trained maps from a stream's stored array to what the cross-attention sees (counted as `streams`).

One per domain and stream, applied once per forward. Shape suffixes: B batch, M tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from mdltool.errors import MdlError
from mdltool.registry import Table
from mdltool.types import StreamSpec

Size = Annotated[int, Field(ge=1)]


class EmbedderOptions(BaseModel):
    """Keys of a stream's `embedder_options`."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Embedder(nn.Module, ABC):
    """[B, M, input] -> [B, M, width]; a token's output depends on that token alone."""

    Options: ClassVar[type[EmbedderOptions]] = EmbedderOptions

    @abstractmethod
    def __init__(self, inputs: int, width: int, options: Any) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, tokens_BMD: Tensor) -> Tensor: ...


class NoEmbedder(Embedder):
    """The stored array as it is."""

    def __init__(self, inputs: int, width: int, options: EmbedderOptions) -> None:
        super().__init__(inputs, width, options)
        if inputs != width:
            raise ValueError(f"'none' leaves an input of {inputs}, which is no width of {width}; take 'linear'")

    def forward(self, tokens_BMD: Tensor) -> Tensor:
        return tokens_BMD


class LinearOptions(EmbedderOptions):
    """norm: a LayerNorm of the input before it."""

    norm: bool = True


class LinearEmbedder(Embedder):
    """A linear layer behind a LayerNorm: for features of a frozen extractor, whose scale is arbitrary."""

    Options = LinearOptions

    def __init__(self, inputs: int, width: int, options: LinearOptions) -> None:
        super().__init__(inputs, width, options)
        self.norm = nn.LayerNorm(inputs) if options.norm else nn.Identity()
        self.proj = nn.Linear(inputs, width)

    def forward(self, tokens_BMD: Tensor) -> Tensor:
        y: Tensor = self.proj(self.norm(tokens_BMD))
        return y


class TextEmbedder(LinearEmbedder):
    """A linear layer over token embeddings, without a LayerNorm unless asked for: their scale is learned."""

    class Options(LinearOptions):
        norm: bool = False


class PatchOptions(EmbedderOptions):
    """shape: (channels, height, width) of the picture that a stored row is, flattened. hidden: channels of the
    convolutions. patch: pixels of a side of what the first one reads.
    """

    shape: tuple[Size, Size, Size]
    hidden: Size = 64
    patch: Size = 4


class PatchEmbedder(Embedder):
    """A small convolutional network for pictures stored as rows: log-mel patches, stacks of flow fields.

    Patches of the picture to `hidden` channels, one 3x3 convolution, the mean over positions, a linear layer.
    """

    Options = PatchOptions

    def __init__(self, inputs: int, width: int, options: PatchOptions) -> None:
        super().__init__(inputs, width, options)
        channels, height, breadth = self._shape = options.shape
        if channels * height * breadth != inputs:
            raise ValueError(
                f"shape {list(options.shape)} is of {channels * height * breadth} numbers, not {inputs}"
            )
        if min(height, breadth) < options.patch:
            raise ValueError(f"patches of {options.patch} do not fit into {height} x {breadth}")
        self.net = nn.Sequential(
            nn.Conv2d(channels, options.hidden, options.patch, options.patch),
            nn.GELU(),
            nn.Conv2d(options.hidden, options.hidden, 3, padding=1),
            nn.GELU(),
        )
        self.proj = nn.Linear(options.hidden, width)

    def forward(self, tokens_BMD: Tensor) -> Tensor:
        pictures = tokens_BMD.reshape(-1, *self._shape)
        y: Tensor = self.proj(self.net(pictures).mean((2, 3)))
        return y.view(*tokens_BMD.shape[:2], -1)


EMBEDDERS = Table(
    "embedder",
    {
        "none": "mdltool.adapters.embedders:NoEmbedder",
        "linear": "mdltool.adapters.embedders:LinearEmbedder",
        "patch": "mdltool.adapters.embedders:PatchEmbedder",
        "text": "mdltool.adapters.embedders:TextEmbedder",
    },
)


def embedder_of(name: str, spec: StreamSpec) -> Embedder:
    """A stream's embedder, freshly initialised. Raises MdlError for options or widths that do not fit."""
    kind = EMBEDDERS.load(spec.embedder, f"streams.{name}.embedder")
    try:
        made: Embedder = kind(spec.input, spec.width, kind.Options(**spec.embedder_options))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        keys = ", ".join(kind.Options.model_fields) or "none"
        raise MdlError("; ".join(faults), f"streams.{name}.embedder_options", f"keys: {keys}") from None
    except ValueError as error:
        raise MdlError(str(error), f"streams.{name}", "mend width, input or embedder_options") from None
    return made


def check_embedder(name: str, spec: StreamSpec) -> None:
    """Raise MdlError as embedder_of does; makes no weights."""
    with torch.device("meta"):
        embedder_of(name, spec)


def embedders(streams: Mapping[str, StreamSpec]) -> nn.ModuleDict:
    """Of each of a domain's streams."""
    return nn.ModuleDict({name: embedder_of(name, spec) for name, spec in streams.items()})
