"""Checkpoints: one safetensors file each, written whole or not at all; nothing is pickled.

The header's metadata carries what is no tensor: the position, the optimizer's groups, the best score so far. Data
order, augmentation and dropout are pure functions of the seed and the update, so no generator state is stored.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mdltool import console

_NAME = re.compile(r"update-(\d{9})\.safetensors")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all. Tensors are copied to contiguous CPU memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    plain = {key: value.detach().to("cpu").contiguous().clone() for key, value in tensors.items()}
    try:
        save_file(plain, temporary, metadata=dict(metadata or {}))
    except SafetensorError as error:  # what it says of the system, without the path
        temporary.unlink(missing_ok=True)
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(temporary)) from None
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def save_checkpoint(
    folder: Path,
    update: int,
    tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any],
    keep: int = 2,
) -> None:
    """Store the state after `update` updates; the last `keep` checkpoints stay. progress: plain JSON values."""
    state = optimizer.state_dict()
    tensors = dict(tensors)
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    header = {"update": update, "groups": state["param_groups"], "scalars": scalars, "progress": dict(progress)}
    save_tensors(folder / f"update-{update:09d}.safetensors", tensors, {"mdltool": json.dumps(header)})
    for path in _checkpoints(folder)[:-keep]:
        path.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest readable checkpoint: (tensors, header), or None. A damaged one is passed over, with a message."""
    for path in reversed(_checkpoints(folder)):
        try:
            with safe_open(path, framework="pt") as handle:
                header = json.loads(handle.metadata()["mdltool"])
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            console.warn(f"{path.name} is damaged ({error}); going back to the checkpoint before")
            path.unlink(missing_ok=True)  # another process may have been faster
            continue
        return tensors, header
    return None


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Load the optimizer's part of a checkpoint, in the memory format of its parameters.

    The format matters: the same numbers in another layout can take another code path and differ in the last bit.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in header["scalars"].items()}
    for key, value in tensors.items():
        if not key.startswith("optimizer/"):
            continue
        _, index, name = key.split("/", 2)
        like = parameters[int(index)]
        if value.shape == like.shape:
            value = torch.empty_like(like, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": header["groups"]})


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("update-*.safetensors") if _NAME.fullmatch(path.name))
