"""Text to tokens by a text encoder of the transformers library, frozen (spec cm3t 5.3).

Axes: M utterances or tokens, D the encoder's width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from mdltool.data.features import Tokens
from mdltool.data.modalities import Utterance
from mdltool.errors import MdlError

UNITS = ("utterance", "token")


@dataclass(frozen=True)
class TransformersText:
    """model: a folder that `save_pretrained` wrote, or a name on the hub.

    unit: utterance, the mean over its tokens; or token, without the special ones, which share the time of their
    utterance. longest: tokens of an utterance that are read.
    """

    model: str = ""
    unit: str = "utterance"
    longest: int = 256
    kind: ClassVar[str] = "text"
    version: ClassVar[str] = "1"

    @property
    def width(self) -> int:
        return int(_loaded(self.model)[1].config.hidden_size)

    def check(self, where: str) -> None:
        """Raises MdlError for an unknown unit, and where the encoder cannot be loaded."""
        if not self.model:
            raise MdlError(
                "no text encoder is given", f"{where}.model", f"--set {where}.model=FOLDER or a hub name"
            )
        if self.unit not in UNITS:
            raise MdlError(f"'{self.unit}' is no unit", f"{where}.unit", f"one of: {', '.join(UNITS)}")
        _loaded(self.model)

    @torch.inference_mode()
    def __call__(self, utterances: Sequence[Utterance]) -> Tokens:
        """One utterance at a time: in a batch the padding changes the last bits."""
        tokenizer, encoder = _loaded(self.model)
        tokens, times = [], []
        for said in utterances:
            entry = tokenizer(
                said.text,
                return_tensors="pt",
                truncation=True,
                max_length=self.longest,
                return_special_tokens_mask=True,
            )
            special_T = entry.pop("special_tokens_mask")[0].bool()
            states_TD = encoder(**entry).last_hidden_state[0]
            own = states_TD.mean(0, keepdim=True) if self.unit == "utterance" else states_TD[~special_T]
            edges = np.linspace(said.start_s, said.end_s, len(own) + 1)
            tokens.append(own.float().numpy())
            times.append(np.stack([edges[:-1], edges[1:]], 1))
        return Tokens(np.concatenate(tokens), np.concatenate(times))


@functools.lru_cache(maxsize=2)
def _loaded(model: str) -> tuple[Any, Any]:
    """(tokenizer, encoder). Raises MdlError where they cannot be had."""
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise MdlError(
            "text encoders need the package transformers", model, "pip install 'mdltool[transformers]'"
        ) from None
    try:
        encoder = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
        return AutoTokenizer.from_pretrained(model), encoder
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise MdlError(
            f"the text encoder cannot be loaded ({first[:120]})",
            model,
            "give a folder that save_pretrained wrote (this machine may be offline), or extractor hashed_ngrams",
        ) from None
