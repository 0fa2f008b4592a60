"""`--set key=value`: one change to a recipe's parsed YAML before it is validated."""

from __future__ import annotations

from typing import Any

import yaml

from mdltool.errors import MdlError


def apply_override(content: dict[str, Any], override: str) -> None:
    """Apply one `a.b.0.c=value`; the value is read as YAML."""
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
        _step_into(node, last, override)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise MdlError(f"'{last}' lies below a plain value", f"--set {override}", "check the key")


def _step_into(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        if not part.isdigit() or int(part) >= len(node):
            raise MdlError(f"'{part}' is no index of a list of {len(node)}", f"--set {override}", "count from 0")
        return node[int(part)]
    if isinstance(node, dict):
        return node.get(part)
    raise MdlError(f"'{part}' lies below a plain value", f"--set {override}", "check the key")
