"""One domain of a model as a file of its own, and what a model must be to take it.

A safetensors file. Its tensors are named <site>/<param> and head/<param>, as a model names them after the domain;
its one metadata entry, `mdltool`, is JSON: schema, kind ("domain"), domain, task, classes, outputs (of the head),
streams (of the domain, in order; left out where it has none),
model (what the domain was made for: every field of the model's spec that its parts depend on), backbone and shared
(digests of what it was trained with), recipe (what the model's recipe says of the domain) and digest (of all).
It says nothing of the model that it came from, so that a domain that was put into another model and taken out again
is the same file, byte for byte.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mdltool.errors import MdlError
from mdltool.files import digest_of
from mdltool.model_spec import ModelSpec, spec_with_defaults
from mdltool.types import LabelSpace, StreamSpec

SCHEMA = 1
KIND = "domain"
_KEY = "mdltool"
# Of a spec: what decides nothing of one domain's tensors or of what they compute at inference.
_FREE = ("domains", "dropout", "head_init", "head_std", "logit_dropout", "normalize", "streams")


@dataclass(frozen=True)
class DomainPack:
    """A domain's tensors, and all that is known of it.

    model: see `model_form`. backbone, shared: digests of the tensors it belongs to. recipe: plain JSON values.
    where: the file, for messages.
    """

    domain: str
    space: LabelSpace
    outputs: int
    model: Mapping[str, Any]
    backbone: str
    shared: str
    recipe: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    where: object = None
    streams: Mapping[str, StreamSpec] = field(default_factory=dict)

    @property
    def normalize(self) -> dict[str, list[float]] | None:
        """The pixel statistics of the domain where it has its own, as ModelSpec has them."""
        own = self.recipe.get("domain", {}).get("normalize")
        return {name: list(own[name]) for name in ("mean", "std")} if own else None

    def header(self) -> dict[str, Any]:
        """The file's metadata but for the digest of its content."""
        streams = {"streams": [[name, asdict(spec)] for name, spec in self.streams.items()]}
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "domain": self.domain,
            **self.space.as_json(),
            "outputs": self.outputs,
            "model": self.model,
            "backbone": self.backbone,
            "shared": self.shared,
            "recipe": self.recipe,
        } | (streams if self.streams else {})

    def digest(self) -> str:
        """sha256 (hex) of tensors and metadata."""
        return digest_of([self.header(), content_digest(self.tensors)])

    def to_bytes(self) -> bytes:
        """The file; the same domain gives the same bytes."""
        plain = {key: value.detach().to("cpu").contiguous() for key, value in self.tensors.items()}
        return save(
            plain, {_KEY: json.dumps(self.header() | {"digest": self.digest()}, sort_keys=True, ensure_ascii=False)}
        )

    def check(self, model: Mapping[str, Any], backbone: str, shared: str) -> None:
        """Raise MdlError unless the domain was made for such a model."""
        differing = _differing(_completed(self.model), dict(model))
        if differing:
            raise MdlError(
                f"the domain '{self.domain}' was made for another model ({'; '.join(differing[:3])})",
                self.where,
                "take a model with the same backbone, adapters, BatchNorm and head",
            )
        for noun, own, there in (("backbone", self.backbone, backbone), ("shared part", self.shared, shared)):
            if own != there:
                raise MdlError(
                    f"the domain '{self.domain}' was trained on another {noun} (digest {own[:12]}, the model's "
                    f"{there[:12]})",
                    self.where,
                    "take a model with the very same tensors: what trains backbone or shared parts changes them, "
                    "and last, best and ema differ in them then",
                )


def model_form(spec: ModelSpec) -> dict[str, Any]:
    """What a model must have in common with another to take its domains, as plain values with every default."""
    form = spec_with_defaults(spec).to_json()
    if spec.head == "linear":
        del form["head_hidden"]
    plain: dict[str, Any] = json.loads(json.dumps({key: form[key] for key in form if key not in _FREE}))
    return plain


def _completed(form: Mapping[str, Any]) -> dict[str, Any]:
    """A form of an earlier mdltool with the options that came later, at their defaults."""
    try:
        return model_form(ModelSpec.from_json({"domains": {}, **form}))
    except (MdlError, TypeError, KeyError):  # of a later mdltool: the comparison says what differs
        return dict(form)


def _differing(there: Any, here: Any, at: str = "") -> list[str]:
    """What differs between two plain values, by the paths of the values inside."""
    if isinstance(there, dict) and isinstance(here, dict):
        pairs = [(key, there.get(key), here.get(key)) for key in {**there, **here}]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = list(zip(map(str, range(len(here))), there, here, strict=True))
    else:
        return [] if there == here else [f"{at}: {str(there)[:60]} there, {str(here)[:60]} here"]
    return [line for key, a, b in pairs for line in _differing(a, b, f"{at}.{key}" if at else key)]


def content_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) of tensors' names, types, shapes and values, wherever and in whatever memory format they are."""
    entries = []
    for key in sorted(tensors):
        value = tensors[key].detach().to("cpu").contiguous()
        data = value.reshape(-1).view(torch.uint8).numpy().data
        entries.append([key, str(value.dtype), list(value.shape), hashlib.sha256(data).hexdigest()])
    return digest_of(entries)


def read_pack(path: str | Path, verify: bool = False) -> DomainPack:
    """The domain of a file. Its tensors are mapped, not copied: pages are read when they are first used.

    verify: check the digest of all of it too, which reads every tensor. Raises MdlError for a file that is missing,
    damaged, newer, or none of a domain.
    """
    path = Path(path)
    if not path.is_file():
        raise MdlError("there is no such file", path, "give the file that `mdltool model split` wrote")
    try:
        with safe_open(path, framework="pt") as handle:
            text = (handle.metadata() or {}).get(_KEY)
            if text is None:
                raise _foreign(path)
            header = json.loads(text)
            _check_header(header, path)
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - no mapping
        digest = header["digest"]
        pack = DomainPack(
            domain=str(header["domain"]),
            space=LabelSpace.from_json(header),
            outputs=int(header["outputs"]),
            model=dict(header["model"]),
            backbone=str(header["backbone"]),
            shared=str(header["shared"]),
            recipe=dict(header["recipe"]),
            tensors=tensors,
            where=path,
            streams={name: StreamSpec.from_json(entry) for name, entry in header.get("streams", [])},
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise MdlError(f"this file of a domain cannot be read ({error!r})", path, "split it again") from None
    if verify and pack.digest() != digest:
        raise MdlError("this file of a domain is damaged (its digest differs)", path, "split it again")
    return pack


def _foreign(path: Path) -> MdlError:
    return MdlError("this file holds no domain of a model", path, "give the file that `mdltool model split` wrote")


def _check_header(header: Any, path: Path) -> None:
    if not isinstance(header, dict) or header.get("kind") != KIND:
        raise _foreign(path)
    if header["schema"] > SCHEMA:
        raise MdlError(
            f"this file of a domain has schema {header['schema']}; this mdltool reads up to {SCHEMA}",
            path,
            "update mdltool",
        )


def with_tensors(shells: Mapping[str, nn.Module], pack: DomainPack, device: torch.device) -> dict[str, nn.Module]:
    """A domain's modules: those of `shells`, which stay as they are, with the pack's tensors in them, by name.

    shells: site or "head" -> module, its tensors without storage. Nothing is copied where the device is the
    tensors' own. Raises MdlError for missing, unknown and misshapen tensors.
    """
    parts = {name: _duplicate(module) for name, module in shells.items()}
    own = {f"{name}/{key}": slot for name, module in parts.items() for key, slot in _slots(module)}
    given = pack.tensors
    faults = [f"missing {key}" for key in own if key not in given]
    faults += [f"unknown {key}" for key in given if key not in own]
    shapes = {key: getattr(holder, name).shape for key, (holder, name) in own.items()}
    faults += [f"shape of {key}" for key in own if key in given and given[key].shape != shapes[key]]
    if faults:
        raise MdlError(
            f"the domain's tensors do not fit the model ({'; '.join(faults[:4])})", pack.where, "split it again"
        )
    for key, (holder, name) in own.items():
        tensor = given[key].to(device)
        setattr(holder, name, nn.Parameter(tensor) if name in holder._parameters else tensor)
    return parts


def _duplicate(module: nn.Module) -> nn.Module:
    """A module with the same tensors, which can be replaced in it without changing the first."""
    twin = copy.copy(module)
    twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
    twin._modules = {name: child and _duplicate(child) for name, child in module._modules.items()}
    return twin


def _slots(module: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Every parameter and buffer by its name, as the module that holds it and the name there."""
    for path, holder in module.named_modules():
        for name, tensor in (*holder._parameters.items(), *holder._buffers.items()):
            if tensor is not None:
                yield (f"{path}.{name}" if path else name), (holder, name)
