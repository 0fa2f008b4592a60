"""Tables of interchangeable parts: name -> "module:Attribute", imported only when asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator
from typing import Any

from mdltool.errors import MdlError


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The valid name most like `name`, or None when nothing is near."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return matches[0] if matches else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A sentence for the `fix` of an error: the nearest valid name, else all of them."""
    names = list(names)
    near = nearest(name, names)
    return f"did you mean '{near}'?" if near else f"one of: {', '.join(sorted(names))}"


class Table:
    """One family of parts. Listing names costs no import; `load` imports the one that is asked for."""

    def __init__(self, noun: str, entries: dict[str, str]) -> None:
        self.noun = noun
        self.entries = entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def name_of(self, attribute: type) -> str:
        """The name that stands for a class of this table."""
        return next(name for name, target in self.entries.items() if target.endswith(f":{attribute.__name__}"))

    def load(self, name: str, where: object = None) -> Any:
        """The attribute that `name` stands for. Raises MdlError for a name that is not listed."""
        if name not in self.entries:
            raise MdlError(f"there is no {self.noun} '{name}'", where, did_you_mean(name, self.entries))
        module, _, attribute = self.entries[name].partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("", "mdltool"):
                raise
            raise MdlError(
                f"the {self.noun} '{name}' needs the package {package}", where, f"pip install {package}"
            ) from None
