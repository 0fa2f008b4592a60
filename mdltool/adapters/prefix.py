"""Prefix tuning in its parallel gated form (CM3T, section 3.1, eq. 3; spec cm3t 2.3).

Learned tokens join the keys and values of a block's attention. The output at step 0 is the bare block's with
`gate: softmax_zero` alone. Shape suffixes: L prefix tokens, C channels.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mdltool.adapters.base import Inner, TokenAdapter, TokenOptions
from mdltool.adapters.factored import Axes, value
from mdltool.types import Site
from mdltool.wrapping import TokenGrid


class PrefixOptions(TokenOptions):
    """length: prefix tokens per block. gate: softmax_zero multiplies the prefix's softmax mass by a learned gain
    that starts at 0; softmax is attention over the joined keys and values; learned puts a number in the place of
    the mass, sigmoid(-4) at first, and fixed the constant gate_value. keys: one embedding for keys and values, or
    two of that length. reparam: what the embedding passes first; the two with an MLP (C -> 64 -> C) are the
    ablation with tanh and its ReLU form.
    """

    length: Annotated[int, Field(ge=1)] = 30
    gate: Literal["softmax_zero", "softmax", "learned", "fixed"] = "softmax_zero"
    gate_value: Annotated[float, Field(ge=0, le=1)] = 0.1
    keys: Literal["joint", "separate"] = "joint"
    reparam: Literal["relu", "none", "mlp_relu", "mlp_tanh"] = "relu"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


class PrefixAdapter(TokenAdapter):
    """Attention with a gated prefix; L C + 1 parameters, 2 L C + 1 with separate keys."""

    kinds = frozenset({"attention"})
    Options = PrefixOptions
    unfoldable = "its tokens join the keys and values of the attention"

    def __init__(self, site: Site, options: PrefixOptions) -> None:
        super().__init__(site, options)
        # |N(0, 0.02)|: the ReLU would keep the negative half out for ever
        shape = (options.length, site.channels) if options.keys == "joint" else (2, options.length, site.channels)
        self.prefix = nn.Parameter(torch.randn(shape).mul_(0.02).abs_())
        self._gate = options.gate
        if options.gate in ("softmax", "fixed"):  # tanh of the first is 1
            start = float("inf") if options.gate == "softmax" else options.gate_value
            self.register_buffer("gain", torch.tensor(start), persistent=False)
        else:
            self.gain = nn.Parameter(torch.full((), -4.0 if options.gate == "learned" else 0.0))
        self.reparam: nn.Module = nn.ReLU() if options.reparam == "relu" else nn.Identity()
        if options.reparam.startswith("mlp"):
            act = nn.Tanh() if options.reparam == "mlp_tanh" else nn.ReLU()
            self.reparam = nn.Sequential(nn.Linear(site.channels, 64), act, nn.Linear(64, site.channels))
        self.dropout = nn.Dropout(options.dropout)

    @classmethod
    def roles(cls, options: Any) -> frozenset[str]:
        return frozenset({"attn", "attn_pool"})

    def factor_rules(self) -> dict[str, Axes]:
        # What an MLP reads is a space of the domain's own; what it writes are the attention's inputs.
        mlp = isinstance(self.reparam, nn.Sequential)
        if mlp:
            return {"reparam.2.weight": Axes(shared=(0,))}
        return {"prefix": Axes((1,)) if value(self.prefix).ndim == 2 else Axes((2,), batch=(0,))}

    def forward(self, inner: Inner, x: Tensor, grid: TokenGrid) -> Tensor:
        prefix = self.dropout(self.reparam(value(self.prefix)))
        if self._gate == "learned":
            return inner(x, prefix, torch.ones_like(self.gain), self.gain.sigmoid())
        if self._gate == "fixed":
            return inner(x, prefix, torch.ones_like(self.gain), self.gain)
        return inner(x, prefix, self.gain.tanh())
