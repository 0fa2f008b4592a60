"""`backbone import`, with which `fetch` ends too: a checkpoint file or directory -> backbone artifact."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdltool.artifact import Artifact, begin
from mdltool.backbones import BACKBONES
from mdltool.backbones.base import Backbone
from mdltool.backbones.formats import to_library
from mdltool.backbones.sources import HUB_FILES
from mdltool.counting import count
from mdltool.errors import MdlError
from mdltool.files import digest_of, sha256_file
from mdltool.model_spec import parse_options
from mdltool.model_store import read_tensors, save_backbone

# What a transformers directory may hold its weights in; the first that is there is read.
_WEIGHTS = tuple(name for file in HUB_FILES for name in (file, f"{file}.index.json"))
# Keys of a transformers config that shapes do not show, or show badly.
_CONFIG_KEYS = ("hidden_act", "num_attention_heads", "layer_norm_eps", "image_size", "patch_size", "tubelet_size")
# Packages whose objects lie beside the tensors as records; anything else is taken for a pickled module.
_RECORDS = ("mmengine", "mmcv", "numpy", "omegaconf", "argparse", "pathlib", "collections")
_SYSTEM = ("os", "posix", "nt", "subprocess", "sys", "builtins", "__builtin__", "runpy", "importlib", "shutil")
_MODULE_LINES = """\
if you trust it, export its tensors where it was made (this runs its code):
    import torch
    content = torch.load("{file}", map_location="cpu", weights_only=False)
    net = content.get("net", content) if isinstance(content, dict) else content
    torch.save(net.state_dict(), "export.pth")"""
_RECORD_LINES = """\
if you trust it, export its tensors where it was made (this runs its code):
    import torch
    content = torch.load("{file}", map_location="cpu", weights_only=False)
    torch.save(content.get("state_dict", content), "export.pth")"""
_SCRIPT_LINES = """\
OpenAI's CLIP is published so; if you trust it, export its tensors:
    import torch
    torch.save(torch.jit.load("{file}", map_location="cpu").state_dict(), "export.pth")"""


def default_tag(name: str) -> str:
    """The first of a backbone's official weights; `imported` where it has none."""
    return next(iter(BACKBONES.load(name, "NAME").weight_sources), "imported")


def check_tag(tag: str) -> str:
    """The tag. Raises MdlError for one that cannot stand in a directory's name."""
    if not re.fullmatch(r"[\w.+=-]+", tag):
        raise MdlError(f"'{tag}' cannot be a tag", "--tag", "use letters, digits and . _ - + =")
    return tag


def import_weights(
    name: str,
    path: Path,
    out: Path,
    *,
    tag: str,
    classes: list[str] | None = None,
    options: Mapping[str, Any] | None = None,
    source: str | None = None,
) -> Artifact:
    """Read a published checkpoint, a file or a transformers directory, into a backbone artifact.

    options: the backbone's, as a recipe has them. source: what to note as the origin (default: the file's name).
    """
    if not path.exists():
        raise MdlError("there is no such file", path, "give the checkpoint that you downloaded")
    factory = BACKBONES.load(name, "NAME")
    chosen = parse_options(factory.Options, dict(options or {}), f"--set ({name})")
    request: dict[str, Any] = {"name": name, "sha256": _content(path), "tag": tag, "classes": classes or []}
    if options:
        request["options"] = dict(options)
    draft = begin(out, kind="backbone", stage="backbone import", inputs=[], request=request)
    if isinstance(draft, Artifact):
        return draft
    with draft:
        backbone = factory(chosen, factory.default_frames, factory.default_crop)
        _check_config(path, backbone)
        state = to_library(read_checkpoint(path), backbone.library_state(), path)
        backbone.load_library_state(state, path)
        note = about(name, backbone, dict(options or {}))
        note |= {"weights": tag, "classes": classes or [], "source": source or path.resolve().name}
        save_backbone(draft.path, backbone, note)
        return draft.commit({"name": name, "weights": tag, "parameters": note["parameters"]})


def about(name: str, backbone: Backbone, options: dict[str, Any]) -> dict[str, Any]:
    """What backbone.json says of every backbone, whatever its weights."""
    return {
        "name": name,
        "options": options,
        "num_frames": backbone.num_frames,
        "crop": backbone.crop,
        "parameters": count([backbone]),
    }


def _content(path: Path) -> str:
    """A sha256 of a file, or of the files of a directory that hold weights."""
    if path.is_file():
        return sha256_file(path)
    return digest_of({file.name: sha256_file(file) for file in _weight_files(path)})


def _weight_files(folder: Path) -> list[Path]:
    """The files of a transformers directory that hold its weights. Raises MdlError where one is missing."""
    first = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        raise MdlError(
            "this directory holds no weights",
            folder,
            f"a transformers directory has one of {', '.join(_WEIGHTS)}",
        )
    if first.suffix != ".json":
        return [first]
    try:
        names = sorted(set(json.loads(first.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MdlError(f"this index of shards cannot be read ({error!r})", first, "download it again") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise MdlError(f"the index names a file elsewhere: {name}", first, "download the directory again")
        if not (folder / name).is_file():
            raise MdlError(f"a shard is missing: {name}", folder, "download it into the directory")
    return [folder / name for name in names]


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, a file or a transformers directory; code in a pickle is refused, never run."""
    files = _weight_files(path) if path.is_dir() else [path]
    found: dict[str, Tensor] = {}
    for file in files:
        found |= _read_file(file)
    return found


def _read_file(file: Path) -> dict[str, Tensor]:
    """PyTorchVideo's files hold their tensors under `model_state`, mmaction2's under `state_dict`; others bare."""
    with open(file, "rb") as handle:
        head = handle.read(9)
    if head[8:] == b"{":  # safetensors: the header's length, then JSON
        return read_tensors(file)
    if not head or head.lstrip().startswith(b"<"):
        what = "is a web page, no checkpoint" if head else "is empty, no checkpoint"
        raise MdlError(f"this file {what}", file, "download the checkpoint again; look at its address")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of is refused or read
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the bytes provoke
        raise _refused(file, error) from None
    for key in ("model_state", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise MdlError("this file holds no dictionary of tensors", file, "give a checkpoint of the backbone")
    return content


def _refused(file: Path, error: Exception) -> MdlError:
    """Why a file was not read, and the lines that make a readable one of it."""
    what = "this file cannot be read without running code in it"
    reason = str(error)
    wanted = re.search(r"GLOBAL (\S+)", reason)
    if "TorchScript" in reason:
        return MdlError(f"{what}: it is a TorchScript archive", file, _SCRIPT_LINES.format(file=file.name))
    if wanted and wanted[1].partition(".")[0] in _SYSTEM:
        return MdlError(
            f"this file wants to run {wanted[1]} when it is read",
            file,
            "do not use it: a checkpoint has no need to",
        )
    if isinstance(error, pickle.UnpicklingError) and wanted:
        records = wanted[1].partition(".")[0] in _RECORDS
        detail = f"objects of {wanted[1]} beside its tensors" if records else f"a whole module ({wanted[1]})"
        lines = _RECORD_LINES if records else _MODULE_LINES
        return MdlError(f"{what}: it pickles {detail}", file, lines.format(file=file.name))
    # The first sentence: torch goes on to advise reading the file by running it.
    first = re.split(r"[.\n] ?", reason.strip())[0] or type(error).__name__
    return MdlError(
        f"this file is no checkpoint that can be read without running code in it ({first})",
        file,
        "download it again, or save its state dict alone where it was made: torch.save(model.state_dict(), F)",
    )


def _check_config(path: Path, backbone: Backbone) -> None:
    """Compare a transformers directory's config.json with the network's: shapes do not show all of it."""
    own = getattr(backbone.net, "config", None)
    file = path / "config.json"
    if own is None or not file.is_file():
        return
    try:
        content = json.loads(file.read_text())
        content = content.get("vision_config") or content
        faults = list(_differing(content, own))
    except (ValueError, AttributeError) as error:
        raise MdlError(f"this config.json cannot be read ({error!r})", file, "download it again") from None
    if faults:
        raise MdlError(
            f"this directory is of another network ({'; '.join(faults)})",
            file,
            "choose the backbone that the weights were made for",
        )


def _differing(content: Mapping[str, Any], own: Any) -> Iterable[str]:
    for key in _CONFIG_KEYS:
        ours = getattr(own, key, None)
        ours = list(ours) if isinstance(ours, tuple) else ours
        if key in content and ours is not None and content[key] != ours:
            yield f"{key}: {content[key]}, {ours} expected"
