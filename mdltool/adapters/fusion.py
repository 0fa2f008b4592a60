"""How the streams' attended values become one (CM3T, eqs. 8 to 10; spec cm3t 2.5, 2.6 and section 6).

Everything is computed one stream after another and selected by `where`, so that an absent stream leaves the same
bits as one that was never built. Shape suffixes: B clips, N tokens of a clip, M tokens of a stream, R bottleneck,
D inner width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

Attend = Callable[[str, Tensor], Tensor]
"""(stream, queries [B, N, D]) -> z [B, N, D], finite for every clip."""

_MOST = 30.0  # exp of it is finite in every precision but fp16, whose scores are computed in float32


def attention(q_BND: Tensor, k_BMD: Tensor, v_BMD: Tensor, mask_BM: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(D / heads)) v over the tokens that are there, [B, N, D]; some mean of rows for a clip
    that has none, never NaN.
    """
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q_BND, k_BMD, v_BMD))
    seen_BM = mask_BM | ~mask_BM.any(1, keepdim=True)
    return functional.scaled_dot_product_attention(q, k, v, seen_BM[:, None, None]).transpose(1, 2).flatten(2)


def select(present_B: Tensor, x_BND: Tensor, other: Tensor | float = 0.0) -> Tensor:
    """x of the clips that are present, else the other."""
    return torch.where(present_B[:, None, None], x_BND, other)


class Fusion(nn.Module, ABC):
    """founding: streams that were trained together; the later ones are of the kind `late`, gain or gate."""

    def __init__(self, width: int, founding: Sequence[str]) -> None:
        super().__init__()
        self.width = width
        self.founding = tuple(founding)

    @abstractmethod
    def forward(
        self, attend: Attend, source: Tensor, b_BNR: Tensor, present: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """[B, N, D] to be projected to the block's width, and bool [B]: which clips have any founding stream.

        source [B, N, R or C]: what queries are made of. present: of the streams in the batch, bool [B], not empty.
        """

    def _founded(self, present: Mapping[str, Tensor]) -> Tensor:
        found_B = torch.zeros_like(next(iter(present.values())))
        for name in self.founding:
            if name in present:
                found_B = found_B | present[name]
        return found_B

    def constrain(self) -> None:
        """Put parameters back into their range, after an update of the training."""


class Queried(Fusion):
    """A fusion of streams that one query reads."""

    def __init__(self, source: int, width: int, founding: Sequence[str]) -> None:
        super().__init__(width, founding)
        self.query = linear(source, width)


class Sum(Queried):
    """The plain sum of what the founding streams give; late ones come with a gain."""

    def __init__(self, source: int, width: int, founding: Sequence[str], late: Sequence[str]) -> None:
        super().__init__(source, width, founding)
        self.gains = nn.ParameterDict({name: torch.zeros(width) for name in late})

    def forward(
        self, attend: Attend, source: Tensor, b_BNR: Tensor, present: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        query_BND = self.query(source)
        fused = query_BND.new_zeros(())
        for name in (*self.founding, *self.gains):
            if name in present:
                z_BND = attend(name, query_BND)
                z_BND = z_BND if name in self.founding else self.gains[name] * z_BND
                fused = fused + select(present[name], z_BND)
        return fused, self._founded(present)


class AdapterFusion(Queried):
    """A softmax over the founding streams that are present, for each token: AdapterFusion's (spec 2.5).

    late: `gain` streams come outside the softmax, with a gain per channel; `gate` ones join it with a weight g in
    front of exp. Both begin at 0, which leaves every output as it was. A clip without a founding stream has no
    softmax to join, so that a gate gives it nothing.
    """

    def __init__(self, source: int, bottleneck: int, width: int, founding: Sequence[str], scaled: bool) -> None:
        super().__init__(source, width, founding)
        self.q, self.k, self.v = linear(bottleneck, width), linear(width, width), linear(width, width)
        nn.init.eye_(self.v.weight)
        self.scale = width**-0.5 if scaled else 1.0
        self.gains = nn.ParameterDict()
        self.gates = nn.ParameterDict()

    def add_late(self, names: Sequence[str], kind: str) -> None:
        """Make room for late streams."""
        for name in names:
            if kind == "gate":
                self.gates[name] = torch.zeros(())
            else:
                self.gains[name] = torch.zeros(self.width)

    def constrain(self) -> None:
        with torch.no_grad():
            for gate in self.gates.values():
                gate.clamp_(min=0)

    def forward(
        self, attend: Attend, source: Tensor, b_BNR: Tensor, present: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        query_BND, q_BND = self.query(source), self.q(b_BNR)
        names = [name for name in (*self.founding, *self.gates) if name in present]
        scores: list[tuple[str, Tensor, Tensor]] = []
        for name in names:
            z_BND = attend(name, query_BND)
            score_BN1 = (q_BND * self.k(z_BND)).sum(-1, keepdim=True) * self.scale
            precise = torch.promote_types(score_BN1.dtype, torch.float32)
            scores.append((name, score_BN1.to(precise), self.v(z_BND)))
        founded_B = self._founded(present)
        fused = select(founded_B, self._softmax(scores, present)) if scores else q_BND.new_zeros(())
        for name, gain_D in self.gains.items():
            if name in present:
                fused = fused + select(present[name], gain_D * self.v(attend(name, query_BND)))
        return fused, founded_B

    def _softmax(self, scores: Sequence[tuple[str, Tensor, Tensor]], present: Mapping[str, Tensor]) -> Tensor:
        """The softmax's mean of the streams' values; 0 for a clip without any."""
        top_BN1 = torch.full_like(scores[0][1], -math.inf)
        for name, score_BN1, _ in scores:  # a gate that is 0 leaves the others' rounding as it was
            counts_B = present[name] & (self.gates[name] > 0) if name in self.gates else present[name]
            top_BN1 = select(counts_B, torch.maximum(top_BN1, score_BN1.detach()), top_BN1)
        total, mixed = torch.zeros_like(top_BN1), torch.zeros((), dtype=scores[0][2].dtype, device=top_BN1.device)
        top_BN1 = torch.where(top_BN1.isinf(), 0.0, top_BN1)
        for name, score_BN1, value_BND in scores:
            share_BN1 = (select(present[name], score_BN1, top_BN1) - top_BN1).clamp(max=_MOST).exp()
            share_BN1 = select(present[name], share_BN1)
            share_BN1 = self.gates[name] * share_BN1 if name in self.gates else share_BN1
            total, mixed = total + share_BN1, mixed + share_BN1 * value_BND
        return mixed / torch.where(total > 0, total, 1.0)


class Mmca(Fusion):
    """FAt's multimodal attention: the streams one after another, each of which queries with what came before.

    h_0 = b W_R; h_m = h_{m-1} + attn(q_m; E_m) W_A,m, where the first stream's query comes from b and the others'
    from h_{m-1} (spec 2.6). A stream that a clip has not is passed over.
    """

    def __init__(self, source: int, bottleneck: int, width: int, founding: Sequence[str]) -> None:
        super().__init__(width, founding)
        self.residual = linear(bottleneck, width)
        self.queries = nn.ModuleDict({n: linear(source if n == founding[0] else width, width) for n in founding})
        self.outs = nn.ModuleDict({name: linear(width, width) for name in founding})

    def forward(
        self, attend: Attend, source: Tensor, b_BNR: Tensor, present: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        h_BND = self.residual(b_BNR)
        for name in self.founding:
            if name in present:
                query_BND = self.queries[name](source if name == self.founding[0] else h_BND)
                h_BND = select(present[name], h_BND + self.outs[name](attend(name, query_BND)), h_BND)
        founded_B = self._founded(present)
        return select(founded_B, h_BND), founded_B


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Xavier-uniform, bias 0."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
