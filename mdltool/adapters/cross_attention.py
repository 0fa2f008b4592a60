"""Cross-attention adapters (CM3T, section 3.3, eqs. 7 to 10; spec cm3t 2.4 to 2.6 and section 6).

At a block's MLP the bottleneck of the vision adapter there queries other streams of the clip, and what comes back
is added to the block: y + CAA(b, streams). Shape suffixes: B clips, N tokens of a clip, M tokens of a stream, T
time slices, R bottleneck, D inner width, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mdltool.adapters.base import AdaptedSite, AdaptedTokens, AdapterOptions, AnyAdapter, BlockAdapter, TokenOptions
from mdltool.adapters.factored import Axes
from mdltool.adapters.fusion import AdapterFusion, Fusion, Mmca, Sum, attention, linear
from mdltool.errors import MdlError
from mdltool.types import Place, Site, StreamSpec, StreamTokens
from mdltool.wrapping import Route, TokenGrid

_NEEDS = "a cross-attention adapter reads the bottleneck of a vision adapter, and there is none at its site"


class CaaOptions(TokenOptions):
    """d, heads: inner width and attention heads. layers: left out, all blocks, but not a pyramid's first stage.

    fusion: of several streams. scaled: its scores are divided by sqrt(d). value: what is attended to, the modality
    itself, or the bottleneck's mean over space, pooled over time to as many rows. query: made of the bottleneck, or
    of the MLP's input. pos: sin adds fixed positions to the keys' input. stream_dropout: of a training clip's
    streams, each by itself. share: domains that hold one set of weights together. late: how streams come in that
    are added to a finished model; with gate a clip needs a founding stream beside them.
    """

    d: Annotated[int, Field(ge=1)] = 128
    heads: Annotated[int, Field(ge=1)] = 4
    fusion: Literal["adapterfusion", "sum", "mmca"] = "adapterfusion"
    scaled: bool = True
    value: Literal["modality", "vision"] = "modality"
    query: Literal["bottleneck", "block"] = "bottleneck"
    pos: Literal["none", "sin"] = "none"
    stream_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    share: tuple[str, ...] = ()
    late: Literal["gain", "gate"] = "gain"

    @model_validator(mode="after")
    def _fits(self) -> CaaOptions:
        if self.d % self.heads:
            raise ValueError(f"d {self.d} is no multiple of heads {self.heads}")
        if self.late == "gate" and self.fusion != "adapterfusion":
            raise ValueError("late: gate is of fusion: adapterfusion, whose softmax it joins")
        return self


class CrossAttentionAdapter(BlockAdapter):
    """CAA(b, streams) of one block and domain, or of several domains that share it. Without streams it is empty.

    Output and gains start at 0, so that it begins as the model without it.
    """

    kinds = frozenset({"mlp"})
    Options = CaaOptions
    unfoldable = "it depends on streams beside the frames"

    def __init__(self, site: Site, options: CaaOptions, bottleneck: int, streams: Mapping[str, StreamSpec]) -> None:
        super().__init__(site, options)
        self._options = options
        here = {n: s for n, s in streams.items() if self.in_layers(site, s)}
        self.streams = nn.ModuleDict()
        self.fusion: Fusion | None = None
        if not here:
            return
        founding = [name for name, spec in here.items() if not spec.late]
        late = [name for name, spec in here.items() if spec.late]
        for name, spec in here.items():
            values = spec.width if options.value == "modality" else bottleneck
            parts = {"key": linear(spec.width, options.d), "value": linear(values, options.d)}
            self.streams[name] = nn.ModuleDict(parts)
        source = bottleneck if options.query == "bottleneck" else site.channels
        if options.fusion == "mmca":
            if late:
                raise refuse_late(late[0])
            self.fusion = Mmca(source, bottleneck, options.d, founding)
        elif options.fusion == "sum":
            self.fusion = Sum(source, options.d, founding, late)
        else:
            fusion = AdapterFusion(source, bottleneck, options.d, founding, options.scaled)
            fusion.add_late(late, options.late)
            self.fusion = fusion
        self.out = nn.Linear(options.d, site.channels, bias=False)
        nn.init.zeros_(self.out.weight)
        self.out_bias = nn.Parameter(torch.zeros(site.channels))

    @classmethod
    def wrapper(cls) -> type[AdaptedSite]:
        return AdaptedStreams

    @classmethod
    def takes(cls, place: Place, options: Any) -> bool:
        skipped = options.layers is None and place.stage == 1
        return super().takes(place, options) and not skipped

    @classmethod
    def roles(cls, options: Any) -> frozenset[str]:
        return frozenset({"mlp"})

    def factor_rules(self) -> dict[str, Axes]:
        # What it reads of a stream and adds to the block are spaces that all domains have; of the fusion's matrices
        # the input side is taken.
        rules = {"out.weight": Axes((0,))} if self.fusion is not None else {}
        rules |= {f"streams.{n}.{part}.weight": Axes((1,)) for n in self.streams for part in ("key", "value")}
        if isinstance(self.fusion, AdapterFusion):
            rules |= {f"fusion.{part}.weight": Axes((1,)) for part in ("q", "k", "v")}
        return rules

    def constrain(self) -> None:
        if self.fusion is not None:
            self.fusion.constrain()

    @property
    def is_zero(self) -> bool:
        """Whether it adds nothing whatever the streams are."""
        tensors = [self.out_bias, *self.out.parameters()] if self.fusion is not None else []
        return not any(tensor.is_meta or bool(tensor.any()) for tensor in tensors)

    def forward(self, x: Tensor, b: Tensor, grid: TokenGrid, streams: Mapping[str, StreamTokens]) -> Tensor | None:
        """What is added to the site's output, in the layout of its input x; None where no clip has a stream of it.

        b: the bottleneck in the same layout. streams: of the clips whose tokens x holds.
        """
        given = {name: streams[name] for name in self.streams if name in streams}
        if self.fusion is None or not given:
            return None
        clips = len(next(iter(given.values())).mask_BM)
        b_BNR = b.reshape(clips, -1, b.shape[-1])
        source = b_BNR if self._options.query == "bottleneck" else x.reshape(clips, -1, x.shape[-1])
        pooled_BTR = grid.split(b)[1].mean((2, 3)) if self._options.value == "vision" else None

        def attend(name: str, query_BND: Tensor) -> Tensor:
            return self._attended(name, query_BND, given[name], pooled_BTR)

        present = {name: stream.mask_BM.any(1) for name, stream in given.items()}
        fused_BND, founded_B = self.fusion(attend, source, b_BNR, present)
        bias = torch.where(founded_B[:, None, None], self.out_bias, 0.0)
        y_BNC: Tensor = self.out(fused_BND.expand(*b_BNR.shape[:2], -1)) + bias
        return y_BNC.view(*b.shape[:-1], -1)

    def _attended(self, name: str, query_BND: Tensor, stream: StreamTokens, pooled_BTR: Tensor | None) -> Tensor:
        layers: Any = self.streams[name]
        tokens_BMD, mask_BM = stream.tokens_BMD, stream.mask_BM
        keys_BMD = tokens_BMD
        if self._options.pos == "sin":
            keys_BMD = keys_BMD + sinusoid(tokens_BMD.shape[1], tokens_BMD.shape[2], tokens_BMD.device)
        rows = tokens_BMD if pooled_BTR is None else pooled_rows(pooled_BTR, mask_BM)
        return attention(query_BND, layers["key"](keys_BMD), layers["value"](rows), mask_BM, self._options.heads)


class SharedCrossAttention(AnyAdapter):
    """A domain's place in a cross-attention that several domains hold together; it has nothing of its own."""

    kinds = CrossAttentionAdapter.kinds
    unfoldable = CrossAttentionAdapter.unfoldable

    def __init__(self, site: Site, options: CaaOptions, common: CrossAttentionAdapter) -> None:
        super().__init__(site, options)
        self._common = (common,)  # in a tuple it is no part of this domain's state

    @property
    def streams(self) -> nn.ModuleDict:
        """What of each stream is read here."""
        return self._common[0].streams

    def forward(self, x: Tensor, b: Tensor, grid: TokenGrid, streams: Mapping[str, StreamTokens]) -> Tensor | None:
        return self._common[0](x, b, grid, streams)


class AdaptedStreams(AdaptedTokens):
    """A vision adapter's site with a cross-attention per domain around it, or one that domains share."""

    inner: AdaptedTokens
    common: CrossAttentionAdapter | None

    def __init__(
        self, inner: nn.Module, site: Site, method: type[AnyAdapter], options: AdapterOptions, route: Route
    ) -> None:
        super().__init__(inner, site, method, options, route)
        if not isinstance(inner, AdaptedTokens) or inner.bottleneck is None:
            raise MdlError(
                _NEEDS,
                f"adapters (caa), site '{site.name}'",
                "put mhva or adaptformer right before caa among the adapters, at the same blocks",
            )
        self._width: int = inner.bottleneck

    def fill(self, domains: Iterable[str], streams: Mapping[str, Mapping[str, StreamSpec]]) -> None:
        shared = self._shared_streams(streams)
        if shared is not None:
            self.common = CrossAttentionAdapter(self.site, self.options, self._width, shared)
        super().fill(domains, streams)

    def _shared_streams(self, streams: Mapping[str, Mapping[str, StreamSpec]]) -> dict[str, StreamSpec] | None:
        """The streams of the domains that share, in their order; None where none do."""
        sharing: tuple[str, ...] = self.options.share
        if not any(domain in streams for domain in sharing):
            return None
        return {name: spec for domain in sharing for name, spec in streams.get(domain, {}).items()}

    def build(self, domain: str, streams: Mapping[str, StreamSpec]) -> nn.Module:
        if domain not in self.options.share:
            return CrossAttentionAdapter(self.site, self.options, self._width, streams)
        if self.common is None:
            self.common = CrossAttentionAdapter(self.site, self.options, self._width, streams)
        return SharedCrossAttention(self.site, self.options, self.common)

    def forward(self, x: Tensor, *rest: Tensor | None) -> Tensor:
        if self.muted or not any(self._used(domain) for domain in self.route.streams):
            y: Tensor = self.inner(x, *rest)
            return y
        y, b = self.inner.with_bottleneck(x, rest)
        if not self.route.segments:
            assert self.route.domain is not None
            return self._joined(self.route.domain, x, y, b)
        parts = zip(*(self.route.rows(part) for part in (x, y, b)), strict=True)
        return torch.cat([self._joined(own[0], own[1], part[1], rows[1]) for own, part, rows in parts])

    @property
    def reads_streams(self) -> bool:
        return True

    @property
    def is_zero(self) -> bool:
        held = [*self.adapters.values(), self.common]
        return all(module.is_zero for module in held if isinstance(module, CrossAttentionAdapter))

    def _used(self, domain: str) -> bool:
        """Whether any stream of a domain that this batch has is read here."""
        adapter: Any = self.adapters[domain]
        return any(name in adapter.streams for name in self.route.streams[domain])

    def _joined(self, domain: str, x: Tensor, y: Tensor, b: Tensor) -> Tensor:
        """The site's output y with the cross-attention of one domain's clips."""
        streams = self.route.streams.get(domain)
        if not streams:
            return y
        grid = self.grid(x)
        added: Tensor | None = self.adapters[domain](x, b, grid, streams)
        if added is None:
            return y
        if grid.layout != "grid" and getattr(self.inner.adapters[domain], "skips_class", False):
            class_BTC, patches = grid.split(added)
            assert class_BTC is not None
            added = grid.join(torch.zeros_like(class_BTC), patches)
        return y + added


def refuse_late(name: str) -> MdlError:
    """The refusal of a stream that is added to a fusion with a fixed order."""
    return MdlError(
        f"fusion: mmca reads its streams in the order that it was trained with, so '{name}' cannot be added later",
        "adapters (caa)",
        "train the model with fusion: adapterfusion, which takes later streams, or train all streams together",
    )


def sinusoid(length: int, width: int, device: torch.device) -> Tensor:
    """Fixed positions [M, D]: sines, then cosines, of wavelengths from 2 pi to 10000 * 2 pi."""
    half = (width + 1) // 2
    rates = torch.exp(torch.arange(half, device=device) * (-math.log(10_000) / half))
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width]


def pooled_rows(rows_BTR: Tensor, mask_BM: Tensor) -> Tensor:
    """[B, M, R]: rows averaged over time to as many as each clip has tokens, as adaptive average pooling does."""
    times = rows_BTR.shape[1]
    count_B1 = mask_BM.sum(1, keepdim=True).clamp(min=1)
    number_BM = (mask_BM.cumsum(1) - 1).clamp(min=0)
    start_BM = number_BM * times // count_B1
    end_BM = -(-(number_BM + 1) * times // count_B1)
    time_T = torch.arange(times, device=rows_BTR.device)
    inside_BMT = (time_T >= start_BM[..., None]) & (time_T < end_BM[..., None])
    weights_BMT = inside_BMT / (end_BM - start_BM)[..., None]
    return weights_BMT.to(rows_BTR.dtype) @ rows_BTR
