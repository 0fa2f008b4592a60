"""The one error that users see."""

from __future__ import annotations


class MdlError(Exception):
    """A fault that the user can mend; the command line prints it without a traceback and exits with 1.

    what: one sentence that names the fault; where: the file, key or option; fix: what to type or change.
    """

    def __init__(self, what: str, where: object = None, fix: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.fix = fix
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)

    # Exceptions are pickled on their way out of worker processes; the default would lose where and fix.
    def __reduce__(self) -> tuple[type[MdlError], tuple[str, str | None, str | None]]:
        return (type(self), (self.what, self.where, self.fix))


class Stopped(Exception):
    """A signal asked the run to stop and its checkpoint is written; the command line exits with 75."""


class Elsewhere(MdlError):
    """Another process has failed and says why; this one ends with it, silently."""
