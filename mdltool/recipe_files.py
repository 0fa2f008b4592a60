"""Files of recipes and of the papers' printed tables: where they ship, how one is read, the names of its faults."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from mdltool.errors import MdlError
from mdltool.registry import did_you_mean

PUBLISHED = "published"  # the folder beside the families that holds the papers' printed tables, no recipes


def recipe_dirs() -> list[Path]:
    """Where the shipped recipes are: inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).parent
    return [folder for folder in (package / "_recipes", package.parent / "recipes") if folder.is_dir()][:1]


def read_yaml(path: Path, what: str, fix: str) -> dict[str, Any]:
    """The mapping that a YAML file holds. what, fix: said of a file that holds another thing. Raises MdlError."""
    try:
        # libyaml's loader: a list of many files should not take seconds
        content = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MdlError(f"this is not valid YAML: {error}", path, "mend the file") from None
    if not isinstance(content, dict):
        raise MdlError(what, path, fix)
    return content


def fault(entry: Any, model: type[BaseModel]) -> str:
    """One line for one of pydantic's errors: its path in `model`, what is wrong, the nearest valid key."""
    path = ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        *parents, key = entry["loc"]
        keys = _keys_at(model, parents)
        return f"{path}: unknown key; {did_you_mean(str(key), keys)}" if keys else f"{path}: unknown key"
    if entry["type"] == "missing":
        return f"{path}: missing"
    return f"{path}: {said(entry)}"


def said(entry: Any) -> str:
    """What is wrong, with the value, but for a whole part of the recipe."""
    what = entry["msg"].removeprefix("Value error, ")
    return what if isinstance(entry["input"], dict) else f"{what} (got {entry['input']!r})"


def _keys_at(model: type[BaseModel], path: Iterable[Any]) -> list[str]:
    """Valid keys at a path of the schema. A part that is no key of its model is a dict's key or a list's index."""
    for part in path:
        if part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first model inside an annotation such as dict[str, DomainPart] or Published | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(_model_in, get_args(annotation)) if m is not None), None)
