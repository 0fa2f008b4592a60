"""Opened transformer blocks: a pre-norm block restated from its library's own submodules, with its places named.

    x  = mid(x + attn_out(attn(attn_in(LN1(norm1_in(entry(x)))))))
    x  = exit(x + mlp_out(mlp(mlp_in(LN2(norm2_in(x))))))

All but `attn` and `mlp` are nothing until an adapter attaches there. A block without adapters stays the library's
own. Shape suffixes: B batch, N tokens, H heads, L prefix tokens, C channels, D channels of a head.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from mdltool.backbones.base import Backbone
from mdltool.types import Place
from mdltool.wrapping import Wrapper

# Role -> kind of the places that are nothing of their own.
TAPS = {
    "entry": "block",
    "norm1_in": "block",
    "attn_in": "block",
    "attn_out": "block",
    "mid": "block",
    "norm2_in": "block",
    "mlp_in": "block",
    "mlp_out": "block",
    "exit": "block",
}


@dataclass(frozen=True)
class Names:
    """How a library calls the parts of its block, and the linear layers of its attention that LoRA may take."""

    norm1: str
    attn: str
    norm2: str
    mlp: str
    linear: dict[str, str]


class OpenAttention(Wrapper):
    """A library's self-attention, restated so that learned prefix tokens can join keys and values.

    window, shift: the (T, H, W) window of a windowed attention, and how far it is shifted.
    """

    window: tuple[int, int, int] | None = None
    shift: tuple[int, int, int] = (0, 0, 0)

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        prefix: Tensor | None = None,
        gate: Tensor | None = None,
        mass: Tensor | None = None,
    ) -> Tensor:
        """Attention of tokens x; with a prefix, [L, C] for keys and values or [2, L, C] of each their own, mixed in
        as `attend` says. The shape of x is kept.
        """


@dataclass(frozen=True)
class Prefix:
    """A prefix as an attention joins it: keys and values [H, L, D], gate g, and a number in place of the prefix's
    share of the softmax; None: the share itself.
    """

    keys_HLD: Tensor
    values_HLD: Tensor
    gate: Tensor
    mass: Tensor | None = None


def frozen_weight(projection: nn.Module) -> Tensor:
    """A projection's own weight, without LoRA, which a prefix does not pass."""
    while isinstance(projection, Wrapper):
        projection = projection.inner
    weight = projection.weight
    assert isinstance(weight, Tensor)
    return weight


def keys_and_values(prefix: Tensor, weights: Sequence[Tensor], width: int) -> tuple[Tensor, Tensor]:
    """A prefix's keys and values [H, L, D] by the weights of both projections, without biases (spec cm3t 2.3).

    prefix: [L, C], or [2, L, C] of each their own. width: D.
    """
    both = prefix if prefix.ndim == 3 else (prefix, prefix)
    rows = [functional.linear(part_LC, weight) for part_LC, weight in zip(both, weights, strict=True)]
    keys, values = (part.unflatten(-1, (-1, width)).transpose(0, 1) for part in rows)
    return keys, values


def fused_prefix(layer: Any, prefix: Tensor | None, gate: Tensor | None, mass: Tensor | None) -> Prefix | None:
    """A prefix by the last two thirds of the fused weight of torchvision's attention."""
    if prefix is None or gate is None:
        return None
    weights = frozen_weight(layer.qkv).chunk(3)
    width = len(weights[0]) // layer.num_heads
    return Prefix(*keys_and_values(prefix, weights[1:], width), gate, mass)


def attend(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    bias: Tensor | None,
    prefix: Prefix | None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, [B, H, N, D]; bias broadcasts to [B, H, N, N].

    With a prefix, (1 - g m) h + g m p, where h attends to the tokens, p to the prefix, and m is the prefix's share
    of the softmax over both (CM3T, eq. 3; spec cm3t 2.3), or the prefix's `mass`. g = 1 is attention over the
    joined keys and values; g = 0 is h.
    """
    if prefix is None:
        return functional.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, bias, dropout)
    q_BHND = q_BHND * q_BHND.shape[-1] ** -0.5
    logits_BHNN = q_BHND @ k_BHND.transpose(-2, -1)
    if bias is not None:
        logits_BHNN = logits_BHNN + bias
    prefix_BHNL = q_BHND @ prefix.keys_HLD.transpose(-2, -1)
    own_BHND = functional.dropout(logits_BHNN.softmax(-1), dropout) @ v_BHND
    extra_BHND = prefix_BHNL.softmax(-1) @ prefix.values_HLD
    share = prefix.mass
    if share is None:
        share = torch.sigmoid(prefix_BHNL.logsumexp(-1, True) - logits_BHNN.logsumexp(-1, True))
    return own_BHND + prefix.gate * share * (extra_BHND - own_BHND)


class ProjectedAttention(OpenAttention):
    """transformers' attention with four projections over [B, N, C]; `output` names the last."""

    output: ClassVar[str]

    def forward(
        self,
        x: Tensor,
        prefix: Tensor | None = None,
        gate: Tensor | None = None,
        mass: Tensor | None = None,
    ) -> Tensor:
        layer: Any = self.inner
        width = layer.head_dim

        def heads(projection: nn.Module, tokens: Tensor) -> Tensor:
            return projection(tokens).unflatten(-1, (-1, width)).transpose(-3, -2)

        joined = None
        if prefix is not None and gate is not None:
            weights = (frozen_weight(layer.k_proj), frozen_weight(layer.v_proj))
            joined = Prefix(*keys_and_values(prefix, weights, width), gate, mass)
        dropout = self._dropout() if layer.training else 0.0
        q, k, v = (heads(projection, x) for projection in (layer.q_proj, layer.k_proj, layer.v_proj))
        y_BNC = attend(q, k, v, None, joined, dropout).transpose(1, 2).flatten(2)
        y: Tensor = getattr(layer, self.output)(y_BNC)
        return y

    def _dropout(self) -> float:
        layer: Any = self.inner
        rate: float = layer.dropout if hasattr(layer, "dropout") else layer.attention_dropout
        return rate


class Dropped(Wrapper):
    """A branch with the library's stochastic depth or dropout after it, inside what an adapter is parallel to."""

    def __init__(self, inner: nn.Module, drop: nn.Module) -> None:
        super().__init__(inner)
        self._drop = [drop]  # the block's own module, which stays in the block

    def forward(self, x: Tensor, *rest: Tensor | None) -> Tensor:
        y: Tensor = self._drop[0](self.inner(x, *rest))
        return y


class OpenBlock(Wrapper):
    """A library's block restated with its places open."""

    def __init__(
        self, block: nn.Module, names: Names, attention: Callable[[nn.Module], OpenAttention], drop: str | None
    ) -> None:
        super().__init__(block)
        self._names = names
        self.taps = nn.ModuleDict({role: nn.Identity() for role in TAPS})
        attn: nn.Module = attention(getattr(block, names.attn))
        mlp: nn.Module = getattr(block, names.mlp)
        if drop is not None:
            attn, mlp = OpenDropped(attn, getattr(block, drop)), Dropped(mlp, getattr(block, drop))
        setattr(block, names.attn, attn)
        setattr(block, names.mlp, mlp)

    def owned(self) -> nn.Module:
        return self.taps

    def forward(self, x: Tensor, attention_mask: None = None) -> Tensor:
        block, names, taps = self.inner, self._names, self.taps
        x = taps["entry"](x)
        y = getattr(block, names.norm1)(taps["norm1_in"](x))
        y = taps["attn_out"](getattr(block, names.attn)(taps["attn_in"](y)))
        x = taps["mid"](x + y)
        y = getattr(block, names.norm2)(taps["norm2_in"](x))
        y = taps["mlp_out"](getattr(block, names.mlp)(taps["mlp_in"](y)))
        out: Tensor = taps["exit"](x + y)
        return out


class OpenDropped(Dropped):
    """Dropped around an OpenAttention."""

    inner: OpenAttention

    @property
    def window(self) -> tuple[int, int, int] | None:
        return self.inner.window

    @property
    def shift(self) -> tuple[int, int, int]:
        return self.inner.shift


def block_places(path: str, layer: int, names: Names, stage: int = 0) -> dict[str, Place]:
    """The places of one block by name: block<layer>.<role>."""
    at = (layer, path, stage)
    found = {f"block{layer}.{role}": Place(f"{path}.{role}", kind, role, *at) for role, kind in TAPS.items()}
    found[f"block{layer}.attn"] = Place(f"{path}.{names.attn}", "attention", "attn", *at)
    found[f"block{layer}.mlp"] = Place(f"{path}.{names.mlp}", "mlp", "mlp", *at)
    for role, name in names.linear.items():
        found[f"block{layer}.{role}"] = Place(f"{path}.{names.attn}.{name}", "linear", role, *at)
    return found


class TransformerBackbone(Backbone):
    """What backbones of pre-norm blocks share. block_paths: their blocks in order."""

    names: ClassVar[Names]
    attention: ClassVar[type[OpenAttention]]
    drop: ClassVar[str | None] = None

    @abstractmethod
    def block_paths(self) -> list[str]: ...

    def places(self) -> dict[str, Place]:
        found: dict[str, Place] = {}
        for number, path in enumerate(self.block_paths(), 1):
            found |= block_places(path, number, self.names, self.stage_of(path))
        return found

    def stage_of(self, path: str) -> int:
        """The stage of a pyramid that a block is in, from 1; 0 of other networks."""
        return 0

    def open_block(self, block: nn.Module) -> Wrapper:
        return OpenBlock(block, self.names, self.attention, self.drop)
