"""`--set key=value`: one change to a recipe's parsed YAML before it is validated."""

from __future__ import annotations

from typing import Any

import yaml

from mdltool.errors import MdlError


def apply_override(content: dict[str, Any], override: str) -> None:
    """Apply one `a.b.0.c=value`; the value is read as YAML. A list's entry may be named by its type, as in
    `adapters.caa.d`.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise MdlError(f"'{override}' is no override", "--set", "write --set key=value, e.g. --set train.seed=1")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise MdlError(f"the value is not valid YAML: {error}", f"--set {override}", "quote it") from None
    *parents, last = key.split(".")
    node: Any = content
    for part in parents:
        child = _step_into(node, part, override)
        if child is None:
            node[part] = child = {}
        node = child
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise MdlError(f"'{last}' lies below a plain value", f"--set {override}", "check the key")


def _step_into(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, override)]
    if isinstance(node, dict):
        return node.get(part)
    raise MdlError(f"'{part}' lies below a plain value", f"--set {override}", "check the key")


def _index(entries: list[Any], part: str, override: str) -> int:
    found = [i for i, entry in enumerate(entries) if isinstance(entry, dict) and entry.get("type") == part]
    if len(found) == 1:
        return found[0]
    if not part.isdigit() or int(part) >= len(entries):
        what = f"'{part}' is no index of a list of {len(entries)}, nor the type of one of its entries alone"
        raise MdlError(what, f"--set {override}", "count from 0")
    return int(part)
