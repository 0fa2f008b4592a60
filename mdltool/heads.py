"""Heads beyond one linear layer. Shape suffixes: B batch, F features, N outputs."""

from __future__ import annotations

from torch import Tensor, nn


class MlpHead(nn.Module):
    """Linear(F, H) - GELU - dropout - Linear(H, N): FH + H + HN + N parameters (spec multitrain 2.2).

    logit_dropout: dropout once more on the logits, which the authors' code has and the paper has not. There is no
    dropout before the first layer.
    """

    def __init__(
        self, features: int, outputs: int, hidden: int = 2048, dropout: float = 0.5, logit_dropout: bool = False
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, hidden)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, outputs)
        self.logit_dropout = nn.Dropout(dropout if logit_dropout else 0.0)

    def forward(self, features_BF: Tensor) -> Tensor:
        """Logits [..., N] of features [..., F]."""
        hidden = self.dropout(nn.functional.gelu(self.hidden(features_BF)))
        logits_BN: Tensor = self.logit_dropout(self.out(hidden))
        return logits_BN
