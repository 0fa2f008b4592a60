"""Streams on their way to the cross-attention: which domain has which, and each one's embedder.

Shape suffixes: B clips, M tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mdltool.adapters.embedders import embedders
from mdltool.errors import MdlError
from mdltool.registry import did_you_mean
from mdltool.types import StreamSpec, StreamTokens
from mdltool.wrapping import PerDomain

Streams = Mapping[str, StreamTokens]


class StreamEmbedders(nn.Module, PerDomain):
    """Every domain's embedders, applied once per forward; domains that share a cross-attention share theirs too.

    specs: domain -> its streams. share: the sharing domains. dropout: of a training clip's streams, each by itself.
    idle: nothing of the model uses streams now.
    """

    def __init__(
        self,
        domains: Iterable[str],
        specs: Mapping[str, Mapping[str, StreamSpec]],
        share: Sequence[str] = (),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.specs = {domain: dict(entries) for domain, entries in specs.items()}
        self.share, self.dropout, self.idle = tuple(share), dropout, False
        self.own = nn.ModuleDict({domain: self.fresh(domain, specs.get(domain, {})) for domain in domains})
        common = {name: spec for domain in share for name, spec in specs.get(domain, {}).items()}
        self.common = embedders(common)

    @property
    def domain_modules(self) -> nn.ModuleDict:
        return self.own

    def fresh(self, domain: str, streams: Mapping[str, StreamSpec]) -> nn.Module:
        return nn.ModuleDict() if domain in self.share else embedders(streams)

    def forward(self, domain: str, streams: Streams) -> dict[str, StreamTokens]:
        """A domain's streams among the given ones, embedded [B, M, width]; tokens that are not there are not 0."""
        own = self.common if domain in self.share else self.own[domain]
        assert isinstance(own, nn.ModuleDict)
        found = {}
        for name in self.specs.get(domain, {}):
            if name in streams:
                given = streams[name]
                mask_BM = given.mask_BM
                if self.training and self.dropout:
                    kept_B = torch.rand(len(mask_BM), device=mask_BM.device) >= self.dropout
                    mask_BM = mask_BM & kept_B[:, None]
                found[name] = StreamTokens(own[name](given.tokens_BMD), mask_BM)
        return found

    def routed(
        self, streams: Streams | None, counts: Iterable[tuple[str | None, int]], dtype: torch.dtype
    ) -> dict[str, dict[str, StreamTokens]]:
        """Domain -> stream -> what Route.streams says. counts: (domain, its clips, which are adjacent).

        Raises MdlError for a stream that no domain of the batch reads, one of another width, and another number of
        clips.
        """
        if not streams:
            return {}
        counts = list(counts)
        self._check(streams, counts)
        if self.idle:
            return {}
        found, start = {}, 0
        for domain, clips in counts:
            if domain is not None and self.specs.get(domain):
                rows = slice(start, start + clips)
                part = {
                    name: StreamTokens(given.tokens_BMD[rows].to(dtype), given.mask_BM[rows])
                    for name, given in streams.items()
                }
                found[domain] = self(domain, part)
            start += clips
        return found

    def _check(self, streams: Streams, counts: Sequence[tuple[str | None, int]]) -> None:
        read = {name: spec for domain, _ in counts for name, spec in self.specs.get(domain or "", {}).items()}
        clips = sum(number for _, number in counts)
        for name, given in streams.items():
            if name not in read:
                what = f"the model reads no stream '{name}' of {', '.join(str(d) for d, _ in counts)}"
                raise MdlError(what, "streams", did_you_mean(name, read) if read else "leave it out")
            shape = tuple(given.tokens_BMD.shape)
            if len(shape) != 3 or shape[0] != clips or shape[2] != read[name].input:
                what = f"the stream '{name}' has shape {list(shape)}, not [{clips}, tokens, {read[name].input}]"
                raise MdlError(what, "streams", "give [B, M, D], padded, as the model's streams say")

    def shared_tensors(self) -> dict[str, Tensor]:
        """What sharing domains hold together, under the names of MultiDomainModel.tensors."""
        state = (*self.common.named_parameters(), *self.common.named_buffers())
        return {f"shared/streams/{key}": value for key, value in state}


def reordered(streams: Streams | None, order: Sequence[int]) -> Streams | None:
    """The streams of clips that were put into another order."""
    if not streams:
        return streams
    return {
        name: replace(s, tokens_BMD=s.tokens_BMD[order], mask_BM=s.mask_BM[order]) for name, s in streams.items()
    }
