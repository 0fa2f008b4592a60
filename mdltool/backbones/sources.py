"""Where a backbone's official weights are downloaded from: its `weight_sources`, read into addresses."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mdltool.errors import MdlError
from mdltool.registry import did_you_mean

_ZOO = "https://dl.fbaipublicfiles.com/pytorchvideo/model_zoo/"
# Files of a hub repository that hold the weights, the one that needs no unpickling first.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Source:
    """One official set of weights: files of a hub repository, of which the first that exists is taken, or one URL.

    sha256: its first hex digits, where the publisher states them.
    """

    urls: tuple[str, ...]
    sha256: str | None = None
    hub: str | None = None


def source_of(name: str, tag: str, weight_sources: Mapping[str, str]) -> Source:
    """The official source of a backbone's weights. Raises MdlError where there is none that can be downloaded."""
    if not weight_sources:
        raise MdlError(
            f"{name} has no official weights", "NAME", "give an address: --url URL, or a file: --file FILE"
        )
    if tag not in weight_sources:
        raise MdlError(f"{name} has no official weights '{tag}'", "--tag", did_you_mean(tag, weight_sources))
    text = weight_sources[tag]
    found = parse(text)
    if found is None:
        raise MdlError(
            f"there is no file of {name} '{tag}' that can be downloaded as it is ({text})",
            "NAME",
            f"mdltool backbone import {name} --file FILE --tag {tag}",
        )
    return found


def parse(text: str) -> Source | None:
    """A line of `weight_sources`: `PyTorchVideo model zoo, PATH`, `torchvision ENUM.MEMBER`, a hub repository's id,
    or a URL. None where it is none of these.
    """
    if text.startswith("PyTorchVideo model zoo, "):
        return from_url(_ZOO + text.removeprefix("PyTorchVideo model zoo, "))
    if text.startswith("torchvision "):
        enum, member = text.removeprefix("torchvision ").split(".")
        weights = getattr(importlib.import_module("torchvision.models.video"), enum)[member]
        return from_url(weights.url)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        urls = tuple(f"{hub_endpoint()}/{text}/resolve/main/{file}" for file in HUB_FILES)
        return Source(urls, hub=text)
    if re.match(r"https?://\S+$", text):
        return from_url(text)
    return None


def from_url(url: str) -> Source:
    """A file whose name ends in the first digits of its sha256, as torch's hub and OpenMMLab write them, or not."""
    digits = re.search(r"-([0-9a-f]{8,64})\.\w+$", url)
    return Source((url,), digits[1] if digits else None)


def hub_endpoint() -> str:
    """The model hub, or the mirror of it that HF_ENDPOINT names."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
