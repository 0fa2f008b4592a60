"""Where a stage's input comes from: an argument, the pipe before it, or the latest in the work directory."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mdltool import console
from mdltool.errors import MdlError

if TYPE_CHECKING:
    from mdltool.artifact import Artifact


def piped_paths() -> list[Path] | None:
    """The artifact paths that the stage before printed, or None where stdin is no pipe.

    Reads plain paths, one a line, and the objects of --json. Raises MdlError for an empty pipe: the stage before
    failed, and falling back to an older artifact would hide that.
    """
    try:
        if not stat.S_ISFIFO(os.fstat(sys.stdin.fileno()).st_mode):
            return None
    except (OSError, ValueError, AttributeError):  # closed or replaced stdin
        return None
    text = sys.stdin.read().strip()
    if not text:
        raise MdlError(
            "the pipe is empty: the command before wrote no path", "stdin", "see that command's message above"
        )
    if text.startswith("{"):
        try:
            return [Path(json.loads(text)["artifact"])]
        except (ValueError, KeyError, TypeError):
            raise MdlError(
                "stdin holds no artifact's path", "stdin", "pipe from a stage, with or without --json"
            ) from None
    return [Path(line) for line in text.splitlines() if line.strip()]


def resolve(given: Path | None, kind: str, work: Path) -> Artifact:
    """The one artifact of `kind` that a command works on: given, piped, or the latest (announced)."""
    from mdltool.artifact import latest, open_artifact

    if given is not None:
        return open_artifact(given, kind)
    piped = piped_paths()
    if piped is not None:
        if len(piped) != 1:
            raise MdlError(
                f"the pipe gave {len(piped)} paths; this command takes one {kind}", "stdin", "pipe one stage"
            )
        return open_artifact(piped[0], kind)
    found = latest(work, kind)
    if found is None:
        raise MdlError(
            f"no {kind} given, and none in the work directory",
            work / kind,
            f"give the path of a {kind} artifact",
        )
    console.say(f"using the latest {kind}: {found.path}")
    return found
