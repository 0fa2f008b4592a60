"""Artifact directories: the only thing that passes between stages (design, section 5).

A stage fills `<name>.partial/` and renames it when complete, so a directory with `artifact.json` is whole. A lock
in the partial directory keeps two processes from building the same artifact; the kernel drops it on any death.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from mdltool import __version__, console, remote
from mdltool.environment import environment
from mdltool.errors import MdlError
from mdltool.files import differences, digest_of, empty_directory, sha256_file, sync_directory, write_text
from mdltool.remote import Url

SCHEMA = 1
KINDS = ("shards", "backbone", "model", "eval", "export", "report")
_MANIFEST = "artifact.json"
_PARTIAL = "partial.json"
_LOCK = "partial.lock"

Completed = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Input:
    """One artifact that another was made from. role: what it was used as (train, val, backbone, model, eval)."""

    role: str
    kind: str
    path: str
    digest: str


@dataclass(frozen=True)
class Artifact:
    """A complete artifact directory, as its artifact.json describes it. path: a Url where it lies elsewhere."""

    path: Path | Url
    kind: str
    stage: str
    name: str
    digest: str
    inputs: tuple[Input, ...]
    files: dict[str, dict[str, Any]]
    summary: dict[str, Any]
    request: dict[str, Any]
    manifest: dict[str, Any]

    def file(self, name: str) -> Path:
        """Path of a listed file. Raises MdlError when there is none on this machine, or it lies outside."""
        path = self._listed(name)
        if isinstance(path, Url):
            raise MdlError(f"a {self.kind} artifact is used on this machine only", self.path, "copy it here")
        return path

    def size(self, name: str) -> int:
        """Bytes of a listed file: those that it has, or elsewhere those that artifact.json says."""
        path = self._listed(name)
        return path.stat().st_size if isinstance(path, Path) else int(self.files[name]["bytes"])

    def load_json(self, name: str) -> Any:
        """The parsed content of a listed JSON file. Raises MdlError where it was changed or damaged."""
        path = self._listed(name)
        data = remote.read(path)
        if hashlib.sha256(data).hexdigest() != self.files[name].get("sha256"):
            raise MdlError(f"{name} is not what the stage wrote (sha256 differs)", path, "make the artifact again")
        return json.loads(data)

    def _listed(self, name: str) -> Path | Url:
        path = self.path / name
        if name not in self.files or not _inside(name, self.path):
            raise MdlError(f"the artifact has no file '{name}'", self.path, f"it holds: {', '.join(self.files)}")
        if isinstance(path, Path) and not path.is_file():
            raise MdlError(f"a file of the artifact is gone: {name}", self.path, "make the artifact again")
        return path

    def as_input(self, role: str) -> Input:
        return Input(role, self.kind, str(self.path.resolve()), self.digest)

    def verify(self, names: Iterable[str] | None = None) -> list[str]:
        """Check files' sizes and sha256; returns the faults, empty when all is well. names: default all files."""
        faults = []
        for name in self.files if names is None else names:
            entry = self.files[name]
            fault: str | None = "lies outside the artifact"
            if _inside(name, self.path):
                fault = remote.fault(self.path / name, entry["bytes"], entry["sha256"])
            if fault is not None:
                faults.append(f"{name}: {fault}")
        if _digest(self.kind, self.stage, self.inputs, self.files) != self.digest:
            faults.append(f"{_MANIFEST}: its digest does not follow from its files and inputs")
        return faults


def open_artifact(path: str | Path | Url, kind: str | Iterable[str] | None = None) -> Artifact:
    """Read an artifact directory, here or at an address.

    Raises MdlError when it is missing, incomplete, newer, or of another kind.
    """
    path = remote.location(path)
    kinds = KINDS if kind is None else (kind,) if isinstance(kind, str) else tuple(kind)
    wanted = f"an artifact of kind {' or '.join(kinds)}" if kind is not None else "an artifact"
    manifest_path = path / _MANIFEST
    if isinstance(path, Path) and not (path / _MANIFEST).is_file():
        raise _not_an_artifact(path, wanted)
    data = remote.read(manifest_path)
    try:
        manifest = json.loads(data)
        schema = int(manifest["schema"])
        if schema > SCHEMA:
            raise MdlError(
                f"this artifact has schema {schema}, made by mdltool {manifest.get('mdltool', '?')}; "
                f"this is mdltool {__version__}, which reads up to {SCHEMA}",
                path,
                "update mdltool",
            )
        artifact = Artifact(
            path=path,
            kind=manifest["kind"],
            stage=manifest["stage"],
            name=manifest["name"],
            digest=manifest["digest"],
            inputs=tuple(Input(**entry) for entry in manifest["inputs"]),
            files=manifest["files"],
            summary=manifest["summary"],
            request=manifest.get("request", {}),
            manifest=manifest,
        )
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise MdlError(f"artifact.json cannot be read ({error!r})", manifest_path, "make it again") from None
    if artifact.kind not in kinds:
        what = f"this artifact is of kind {artifact.kind}, not {' or '.join(kinds)}"
        raise MdlError(what, path, f"give the path of {wanted}")
    return artifact


def _not_an_artifact(path: Path, wanted: str) -> MdlError:
    partial = path if path.name.endswith(".partial") else partial_path(path)
    if (partial / _PARTIAL).is_file():
        try:
            header = json.loads((partial / _PARTIAL).read_text())
        except ValueError:
            header = {}
        what = f"this artifact is incomplete: '{header.get('stage', '?')}' was interrupted"
        again = "with --resume" if header.get("resumes") else "again"
        return MdlError(what, partial, f"run the same command {again}")
    if not path.exists():
        return MdlError("there is no such directory", path, f"give the path of {wanted}")
    return MdlError("this is not an artifact (it has no artifact.json)", path, f"give the path of {wanted}")


class Draft:
    """An artifact being built in `<out>.partial/`; `commit` makes it whole. Made by `begin`.

    As a context it covers work of which nothing could be continued: what is raised there deletes the directory,
    unless an earlier run had left it.
    """

    def __init__(self, out: Path, lock: IO[str], header: dict[str, Any], resumed: bool) -> None:
        self.out = out
        self.path = partial_path(out)
        self.resumed = resumed
        self._lock = lock
        self._header = header

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abandon(keep=self.resumed)

    def commit(
        self,
        summary: Mapping[str, Any],
        *,
        volatile: Iterable[str] = (),
        known: Mapping[str, tuple[int, str]] | None = None,
        drop: Iterable[str] = (),
    ) -> Artifact:
        """Hash the files, write artifact.json and rename. Returns the complete artifact.

        volatile: files or folders that carry times and are left out of the digest.
        known: file -> (bytes, sha256) where the writer has hashed it already.
        drop: names of working files and folders to delete first (checkpoints, sidecars).
        """
        for name in drop:
            target = self.path / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
        files = self._files(tuple(volatile), known or {})
        inputs = tuple(Input(**entry) for entry in self._header["inputs"])
        stage, kind = self._header["stage"], self._header["kind"]
        manifest = {
            "schema": SCHEMA,
            "kind": kind,
            "stage": stage,
            "name": self.out.name,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "mdltool": __version__,
            "digest": _digest(kind, stage, inputs, files),
            "inputs": self._header["inputs"],
            "request": self._header["request"],
            "files": files,
            "environment": environment(),
            "summary": dict(summary),
        }
        write_text(self.path / _MANIFEST, json.dumps(manifest, indent=1))
        os.rename(self.path, self.out)
        for name in (_PARTIAL, _LOCK):  # only now: what a kill cuts off before can be continued
            (self.out / name).unlink()
        sync_directory(self.out.parent)
        self._lock.close()
        if self.out.parent.name == kind:
            _point_latest(self.out)
        return open_artifact(self.out, kind)

    def _files(self, volatile: tuple[str, ...], known: Mapping[str, tuple[int, str]]) -> dict[str, dict[str, Any]]:
        """The manifest's entry for every file."""
        files: dict[str, dict[str, Any]] = {}
        for path in sorted(p for p in self.path.rglob("*") if p.is_file()):
            name = path.relative_to(self.path).as_posix()
            if name in (_PARTIAL, _LOCK, _MANIFEST):
                continue
            size, sha256 = known.get(name) or (path.stat().st_size, sha256_file(path))
            files[name] = {"bytes": size, "sha256": sha256}
            if any(name == v or name.startswith(v + "/") for v in volatile):
                files[name]["volatile"] = True
        return files

    def abandon(self, keep: bool = False) -> None:
        """Give up: release the lock, and delete the partial directory unless `keep`."""
        self._lock.close()
        if not keep:
            shutil.rmtree(self.path, ignore_errors=True)


def begin(
    out: Path,
    *,
    kind: str,
    stage: str,
    inputs: Iterable[Input],
    request: Mapping[str, Any],
    resume: str = "never",
    completed: Completed = dict,
) -> Draft | Artifact:
    """Start building the artifact `out`, or return it when it is already there, complete and identical.

    request: plain JSON values that, with the inputs' digests, decide the content. resume: what to do with an
    interrupted build of the same request: "never" starts over, "auto" continues it, "ask" refuses and names
    --resume, "must" continues and fails where there is nothing to continue. completed: a stored request of an
    earlier mdltool -> with the keys that came later, at their defaults; requests are compared so.
    Raises MdlError when `out` holds something else, another request is half done there, or another process works.
    """
    header = {
        "stage": stage,
        "kind": kind,
        "inputs": [asdict(entry) for entry in inputs],
        "request": json.loads(json.dumps(dict(request))),
        "resumes": resume in ("ask", "must"),
    }
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        return _reuse(out, header, completed)
    partial = partial_path(out)
    held = {path.name for path in partial.iterdir()} if partial.is_dir() else set()
    # The header comes first, by way of a temporary: another process may be writing it at this moment.
    if held - {_LOCK} and not held & {_PARTIAL, _PARTIAL + ".tmp"}:
        raise MdlError("this directory holds something else", partial, "give another --out, or move it away")
    if resume == "must" and _PARTIAL not in held:
        raise MdlError("there is nothing to resume", partial, "run without --resume")
    partial.mkdir(parents=True, exist_ok=True)
    lock = _take_lock(partial)
    resumed = False
    if (partial / _PARTIAL).is_file():
        resumed = _may_resume(partial, header, resume, completed)
        if not resumed:
            empty_directory(partial, but=_LOCK)
    write_text(partial / _PARTIAL, json.dumps(header, indent=1))
    return Draft(out, lock, header, resumed)


def _reuse(out: Path, header: dict[str, Any], completed: Completed) -> Artifact:
    if not (out / _MANIFEST).is_file():
        raise MdlError("this path holds something else", out, "give another --out, or move it away")
    found = open_artifact(out)
    same_inputs = _made_from(asdict(entry) for entry in found.inputs) == _made_from(header["inputs"])
    if found.kind == header["kind"] and found.stage == header["stage"] and same_inputs:
        differs = differences(completed(found.request), completed(header["request"]))
        if not differs:
            if out.parent.name == found.kind:
                _point_latest(out)
            console.say(f"already there and identical: {out}")
            return found
        detail = f" (different: {', '.join(differs)})"
    else:
        detail = f" (a {found.kind} artifact, or other inputs)"
    raise MdlError(f"another artifact is already there{detail}", out, "give another --out, or remove it")


def _made_from(inputs: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """What tells the inputs of one run from another's; their order means nothing."""
    return sorted((entry["role"], entry["kind"], entry["digest"]) for entry in inputs)


def _may_resume(partial: Path, header: dict[str, Any], resume: str, completed: Completed) -> bool:
    try:
        old = json.loads((partial / _PARTIAL).read_text())
    except ValueError:
        old = {}
    if resume == "never":
        return False

    def content(h: dict[str, Any]) -> Any:
        return h.get("stage"), h.get("kind"), _made_from(h.get("inputs", []))

    differing = differences(completed(old.get("request", {})), completed(header["request"]))
    if differing or content(old) != content(header):
        differs = ", ".join(differing) or "its inputs"
        raise MdlError(
            f"an interrupted '{old.get('stage', '?')}' of another request is here (different: {differs})",
            partial,
            "repeat that command, give another --out, or delete the directory",
        )
    if resume == "ask":
        raise MdlError(
            "an interrupted run is here",
            partial,
            f"add --resume to continue it, or start over: rm -r {shlex.quote(str(partial))}",
        )
    return True


def _take_lock(partial: Path) -> IO[str]:
    handle = open(partial / _LOCK, "a")  # noqa: SIM115 - held until commit or death
    try:
        # lockf, not flock: a forked loader process that outlives a killed parent must not hold on to it
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.close()
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise MdlError(
                "another process is writing this artifact", partial, "wait for it, or give another --out"
            ) from None
        raise
    return handle


def partial_path(out: Path) -> Path:
    """Where the artifact `out` is built. `.` and `/` have no name to append to."""
    return out.parent / (out.name + ".partial")


def work_dir(option: Path | None) -> Path:
    """The work directory: the option, else $MDLTOOL_WORK, else ./artifacts."""
    return option or Path(os.environ.get("MDLTOOL_WORK") or "artifacts")


def latest(work: Path, kind: str) -> Artifact | None:
    """The artifact that `<work>/<kind>/latest` points at, or None."""
    link = work / kind / "latest"
    return open_artifact(link.resolve(), kind) if link.exists() else None


def _point_latest(out: Path) -> None:
    temporary = out.parent / f".latest.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(out.name)
    os.replace(temporary, out.parent / "latest")


def _digest(kind: str, stage: str, inputs: Iterable[Input], files: Mapping[str, Mapping[str, Any]]) -> str:
    content = {
        "kind": kind,
        "stage": stage,
        "inputs": [[i.role, i.kind, i.digest] for i in inputs],
        "files": {name: entry["sha256"] for name, entry in sorted(files.items()) if not entry.get("volatile")},
    }
    return digest_of(content)


def _inside(name: str, directory: Path | Url) -> bool:
    if isinstance(directory, Url):
        return not name.startswith("/") and ".." not in name.split("/")
    return (directory / name).resolve().is_relative_to(directory.resolve())
