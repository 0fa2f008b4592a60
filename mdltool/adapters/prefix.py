"""Prefix tuning in its parallel gated form (CM3T, section 3.1, eq. 3; spec cm3t 2.3).

Learned tokens join the keys and values of a block's attention. The output at step 0 is the bare block's, but not
with `gate: softmax`. Shape suffixes: L prefix tokens, C channels.
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
    that starts at 0; softmax is attention over the joined keys and values. reparam: what the embedding passes
    first; the two with an MLP (C -> 64 -> C) are the ablation with tanh and its ReLU form.
    """

    length: Annotated[int, Field(ge=1)] = 30
    gate: Literal["softmax_zero", "softmax"] = "softmax_zero"
    reparam: Literal["relu", "none", "mlp_relu", "mlp_tanh"] = "relu"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


class PrefixAdapter(TokenAdapter):
    """Attention with a gated prefix; L C + 1 parameters."""

    kinds = frozenset({"attention"})
    Options = PrefixOptions
    unfoldable = "its tokens join the keys and values of the attention"

    def __init__(self, site: Site, options: PrefixOptions) -> None:
        super().__init__(site, options)
        # |N(0, 0.02)|: the ReLU would keep the negative half out for ever
        self.prefix = nn.Parameter(torch.randn(options.length, site.channels).mul_(0.02).abs_())
        if options.gate == "softmax":
            self.register_buffer("gain", torch.tensor(float("inf")), persistent=False)
        else:
            self.gain = nn.Parameter(torch.zeros(()))
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
        return {"reparam.2.weight": Axes(shared=(0,))} if mlp else {"prefix": Axes(shared=(1,))}

    def forward(self, inner: Inner, x: Tensor, grid: TokenGrid) -> Tensor:
        prefix_LC = self.dropout(self.reparam(value(self.prefix)))
        return inner(x, prefix_LC, self.gain.tanh())
