"""Reading the JSON files of annotation formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mdltool.errors import MdlError


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises MdlError for a file that is missing or is no JSON."""
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise MdlError("there is no such file", path, "check --annotations") from None
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise MdlError(f"this is not a JSON file ({error})", path, "check --annotations") from None


def object_of(value: Any, where: object) -> dict[str, Any]:
    """`value`, which must be a JSON object. Raises MdlError."""
    if not isinstance(value, dict):
        raise MdlError(f"expected an object, found {value!r:.40}", where, "use the published file")
    return value


def text_of(entry: dict[str, Any], name: str, where: object, fix: str = "use the published file") -> str:
    """A text that is not blank. Raises MdlError."""
    value = entry.get(name)
    if not isinstance(value, str) or not value.strip():
        what = f"'{name}' is {value!r:.40}, no text" if name in entry else f"there is no '{name}'"
        raise MdlError(what, where, fix)
    return value.strip()
