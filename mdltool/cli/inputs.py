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


def piped_paths() -> list[str] | None:
    """The artifacts' paths or addresses that the stage before printed, or None where stdin is no pipe.

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
            return [os.fspath(json.loads(text)["artifact"])]
        except (ValueError, KeyError, TypeError):
            raise MdlError(
                "stdin holds no artifact's path", "stdin", "pipe from a stage, with or without --json"
            ) from None
    return [line.strip() for line in text.splitlines() if line.strip()]


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
            f"give the path of an artifact of kind {kind}",
        )
    console.say(f"using the latest {kind}: {found.path}")
    return found


def shards_for(data: list[str] | None, work: Path, domains: list[str], splits: tuple[str, ...]) -> list[Artifact]:
    """Shards of --data D=PATH, and of the work directory (<work>/shards/<domain>-<split>) for domains not named.

    PATH may be an address. Raises MdlError for a malformed --data or one whose shards are of another domain.
    """
    from mdltool.artifact import open_artifact
    from mdltool.registry import did_you_mean

    found: list[Artifact] = []
    named: set[tuple[str, str]] = set()
    for entry in data or ():
        domain, equals, path = entry.partition("=")
        if not equals or not domain or not path:
            raise MdlError(
                f"'{entry}' is no DOMAIN=PATH", "--data", "e.g. --data ucf101=artifacts/shards/ucf101-train"
            )
        if domain not in domains:
            raise MdlError(f"there is no domain '{domain}' here", f"--data {entry}", did_you_mean(domain, domains))
        artifact = open_artifact(path, "shards")
        inside = artifact.summary.get("domain")
        if inside != domain:
            raise MdlError(
                f"these shards are of domain '{inside}'", f"--data {entry}", f"--data {inside}={artifact.path}"
            )
        found.append(artifact)
        named.add((domain, str(artifact.summary.get("split"))))
    for domain in domains:
        for split in splits:
            default = work / "shards" / f"{domain}-{split}"
            if (domain, split) not in named and not _held_out(named, domain, split) and default.is_dir():
                console.say(f"using {default}")
                found.append(open_artifact(default, "shards"))
    return found


def _held_out(named: set[tuple[str, str]], domain: str, split: str) -> bool:
    """Whether --data already gave this domain's held-out split under another name (val, test)."""
    return split != "train" and any(d == domain and s != "train" for d, s in named)


def workers_or_default(given: int | None) -> int:
    """Loader processes: as many as were asked for, else one a core, up to 8."""
    return min(8, os.cpu_count() or 1) if given is None else given


def piped_shards() -> list[str]:
    """DOMAIN=PATH of every shards artifact that the pipe names; empty where stdin is no pipe."""
    from mdltool.artifact import open_artifact

    artifacts = [open_artifact(path, "shards") for path in piped_paths() or []]
    return [f"{artifact.summary.get('domain')}={artifact.path}" for artifact in artifacts]
