"""Downloads that survive cut connections: a `.part` beside the target, continued with Range requests, then checked.

http, https and file addresses; proxies as the environment sets them. With MDLTOOL_MIRROR=PREFIX, the file of
`https://host/path` is taken from `PREFIX/host/path` (the tree that a recursive download makes).
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import re
import string
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mdltool import __version__, console
from mdltool.errors import MdlError
from mdltool.files import digest_of, sha256_file, write_text

ATTEMPTS = 4  # in a row that bring no byte
PAUSE = 1.0  # seconds before the second attempt, doubled for each further one that brings nothing
_TIMEOUT = 30.0
_CHUNK = 1 << 18
_LATER = (408, 425, 429, 500, 502, 503, 504)


class NotThere(MdlError):
    """The server answered that it does not have or does not give the file."""


class Unreachable(MdlError):
    """No server answered, or the connection was cut again and again."""


class _Cut(Exception):
    """An attempt that is worth repeating."""


@dataclass
class _Part:
    """The unfinished file. validator: the server's ETag or date of the content that it is the start of."""

    path: Path
    handle: IO[bytes]

    @property
    def size(self) -> int:
        return self.handle.seek(0, os.SEEK_END)

    @property
    def validator(self) -> str | None:
        note = self._note()
        return note.read_text() if note.is_file() else None

    def restart(self, validator: str | None) -> None:
        try:
            self.handle.truncate(0)
            self._note().unlink(missing_ok=True)
            if validator is not None:
                write_text(self._note(), validator)
        except OSError as error:  # else it would look as one of the connection
            raise _unwritable(self.path, error) from None

    def finish(self, target: Path) -> None:
        self.handle.flush()
        os.fsync(self.handle.fileno())
        os.replace(self.path, target)
        self._note().unlink(missing_ok=True)

    def _note(self) -> Path:
        return self.path.with_name(self.path.name + ".validator")


def cache_dir() -> Path:
    """$MDLTOOL_CACHE, else ~/.cache/mdltool."""
    return Path(os.environ.get("MDLTOOL_CACHE") or Path.home() / ".cache" / "mdltool")


def mirrored(url: str) -> str:
    """The address to ask instead, where MDLTOOL_MIRROR names a mirror."""
    mirror = os.environ.get("MDLTOOL_MIRROR", "").rstrip("/")
    parts = urllib.parse.urlsplit(url)
    if not mirror or parts.scheme not in ("http", "https"):
        return url
    prefix = mirror if re.match(r"\w+://", mirror) else Path(mirror).resolve().as_uri()
    return f"{prefix}/{parts.netloc}{parts.path}" + (f"?{parts.query}" if parts.query else "")


def download(url: str, *, sha256: str | None = None, cache: Path | None = None) -> Path:
    """The file at `url`, from the cache if it is there.

    sha256: the hex digits that its hash starts with. cache: where to keep it (default `cache_dir()`).
    Raises NotThere, Unreachable, or MdlError for content that differs from `sha256`.
    """
    asked, parts = _checked(url)
    name = Path(urllib.parse.unquote(parts.path)).name or "download"
    folder = (cache or cache_dir()) / "downloads" / digest_of(asked)[:12]
    target = folder / name
    if target.is_file() and _agrees(target, sha256):
        console.say(f"already downloaded: {target}")
        return target
    with _open_part(folder / (name + ".part")) as part:
        _complete(asked, part)
        part.handle.flush()
        if not _agrees(part.path, sha256):
            found = sha256_file(part.path)
            part.restart(None)
            raise MdlError(
                f"what was downloaded has sha256 {found[:16]}..., and {sha256} is expected",
                asked,
                "run the command again; if it stays so, the address holds another file: --sha256 names it",
            )
        part.finish(target)
    return target


def _checked(url: str) -> tuple[str, urllib.parse.SplitResult]:
    """The address to ask, blanks and non-ASCII letters percent-encoded. Raises MdlError for a malformed one."""
    try:
        asked = urllib.parse.quote(mirrored(url), safe=string.punctuation)
        parts = urllib.parse.urlsplit(asked)
        usable = parts.scheme == "file" or (
            parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        )
    except ValueError:  # brackets that are no IPv6 host, a port that is no port
        usable = False
    if not usable:
        raise MdlError("this address cannot be downloaded from", url, "use an http, https or file address")
    return asked, parts


def _agrees(path: Path, sha256: str | None) -> bool:
    return sha256 is None or sha256_file(path).startswith(sha256.lower())


@contextlib.contextmanager
def _open_part(path: Path) -> Iterator[_Part]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "ab")  # noqa: SIM115 - the generator closes it
    except OSError as error:
        raise _unwritable(path, error) from None
    with _closing(path, handle):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A process that has just finished renamed the file that was opened here.
            free = os.path.samestat(os.fstat(handle.fileno()), os.stat(path))
        except OSError:
            free = False
        if not free:
            raise MdlError("another process downloads this file", path, "wait for it, then run again")
        yield _Part(path, handle)


@contextlib.contextmanager
def _closing(path: Path, handle: IO[bytes]) -> Iterator[None]:
    """What a write, a flush or, once more, the closing says of the disk, with the path."""
    try:
        with handle:
            yield
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> MdlError:
    return MdlError(
        f"the download cannot be written ({error.strerror})", path, "free space, or set MDLTOOL_CACHE to a folder"
    )


def _complete(url: str, part: _Part) -> None:
    """Attempts until the part is whole."""
    barren = 0
    while True:
        before = part.size
        try:
            _attempt(url, part)
            return
        except _Cut as cut:
            barren = 0 if part.size > before else barren + 1
            if barren == ATTEMPTS or (barren and url.startswith("file:")):
                raise Unreachable(f"the download does not arrive ({cut})", url, "try again later") from None
            at = f", continuing at {part.size / 1e6:.1f} MB" if part.size else ""
            console.say(f"{Path(url).name}: {cut}; trying again{at}")
            time.sleep(PAUSE * 2 ** max(barren - 1, 0))


def _attempt(url: str, part: _Part) -> None:
    """One request, from where the part ends. Raises _Cut when it should be repeated."""
    headers = {"User-Agent": f"mdltool/{__version__}", "Accept-Encoding": "identity"}
    start = part.size
    if start and not url.startswith("file:"):
        headers["Range"] = f"bytes={start}-"
        if validator := part.validator:
            headers["If-Range"] = validator
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT) as response:
            total = _place(response, part, start)
            _receive(url, response, part, total)
    except urllib.error.HTTPError as error:
        error.close()
        _judge(url, error, part, start)
    except urllib.error.URLError as error:
        if isinstance(error.reason, FileNotFoundError):
            raise NotThere("there is no such file", url, "put it there, or give --url or --file") from None
        raise _Cut(str(error.reason)) from None
    except (OSError, http.client.HTTPException) as error:
        raise _Cut(str(error) or type(error).__name__) from None


def _place(response: Any, part: _Part, start: int) -> int | None:
    """Make the part ready for what the server sends; returns the whole file's length where it is known."""
    span = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range") or "")
    if response.status == 206 and span and int(span[1]) == start:
        return None if span[2] == "*" else int(span[2])
    if response.status == 206:
        part.restart(None)
        raise _Cut("the server sent another part than was asked for")
    # A weak ETag does not promise the same bytes.
    tag = response.headers.get("ETag") or ""
    part.restart(tag if tag.startswith('"') else response.headers.get("Last-Modified"))
    length = response.headers.get("Content-Length")
    return int(length) if length else None


def _receive(url: str, response: Any, part: _Part, total: int | None) -> None:
    label = f"download {Path(urllib.parse.urlsplit(url).path).name}"
    megabytes = None if total is None else -(-total // 1_000_000)
    with console.progress(label, megabytes, unit="MB", before=part.size // 1_000_000) as advance:
        while data := response.read(_CHUNK):
            done = part.size // 1_000_000
            try:
                part.handle.write(data)
                part.handle.flush()  # a killed process leaves what has arrived
            except OSError as error:
                raise _unwritable(part.path, error) from None
            advance(part.size // 1_000_000 - done)
    if total is not None and part.size < total:
        raise _Cut(f"the connection was cut at {part.size / 1e6:.1f} of {total / 1e6:.1f} MB")
    if total is not None and part.size > total:
        part.restart(None)
        raise _Cut("the server sent more than it announced")


def _judge(url: str, error: urllib.error.HTTPError, part: _Part, start: int) -> None:
    """An error status: give up, try again, or (416 on a part that is whole) nothing."""
    if error.code == 416 and start:
        span = re.match(r"bytes \*/(\d+)", error.headers.get("Content-Range") or "")
        if span and int(span[1]) == start:
            return
        part.restart(None)
        raise _Cut("the server cannot continue this file")
    if error.code in _LATER:
        raise _Cut(f"the server answered {error.code} {error.reason}")
    raise NotThere(
        f"the server does not give this file ({error.code} {error.reason})",
        url,
        "look the address up, or give --url",
    )
