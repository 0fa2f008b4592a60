"""Files at http(s), s3 and gs addresses: whole, or a range of their bytes, with patience.

http and https by the standard library, s3 and gs by fsspec. Every process and thread opens its own connections,
when it first reads, so that an address may be pickled and read in forked workers.
"""

from __future__ import annotations

import hashlib
import http.client
import itertools
import os
import re
import string
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mdltool import __version__, console
from mdltool.errors import MdlError
from mdltool.files import sha256_file

ATTEMPTS = 6
PAUSE = 1.0  # seconds before the third attempt, doubled for each further one
_TIMEOUT = 30.0
_CHUNK = 1 << 23
_REDIRECTS = 5
_MOVED = (301, 302, 303, 307, 308)
_LATER = (408, 425, 429, 500, 502, 503, 504)
_HTTP = ("http", "https")
_BY_FSSPEC = ("s3", "gs")
_AS_WRITTEN = "look the address up: the artifact's files must lie there as they were written, open to read"


class _Cut(Exception):
    """An attempt that is worth repeating."""


@dataclass(frozen=True)
class Url:
    """A file or directory elsewhere, with what an artifact asks of its Path.

    query: what follows `?`, such as an access token; it goes with every request and is never shown or recorded.
    """

    address: str
    query: str = field(default="", repr=False)

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.address}/{name}", self.query)

    @property
    def name(self) -> str:
        return self.address.rsplit("/", 1)[-1]

    @property
    def scheme(self) -> str:
        return self.address.partition("://")[0]

    def resolve(self) -> Url:
        return self


def location(text: str | Path | Url) -> Path | Url:
    """What a user's argument names: a Url or a Path. Raises MdlError for an address that cannot be read."""
    if not isinstance(text, str) or not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        return Path(text) if isinstance(text, str) else text
    scheme, _, rest = text.partition("://")
    scheme = scheme.lower()
    if scheme in _BY_FSSPEC and rest.strip("/"):
        return Url(f"{scheme}://{rest.rstrip('/')}")
    address, _, query = rest.partition("?")
    try:
        parts = urllib.parse.urlsplit(f"{scheme}://{address}")
        usable = scheme in _HTTP and parts.hostname and parts.port != 0
    except ValueError:  # brackets that are no IPv6 host, a port that is no port
        usable = False
    if not usable:
        raise MdlError("this address cannot be read", text, "use http, https, s3 or gs, or a path on this machine")
    if parts.username is not None:
        raise MdlError("an address must not hold a password", parts.hostname, "leave what stands before the @ out")
    return Url(urllib.parse.quote(f"{scheme}://{address.rstrip('/')}", safe=string.punctuation), query)


def read(place: Path | Url) -> bytes:
    """A whole file. Raises MdlError that names the address and the cause; OSError for one of this machine."""
    if isinstance(place, Path):
        return place.read_bytes()
    return _patiently(place, lambda: _stored(place) if place.scheme in _BY_FSSPEC else _http_read(place))


def read_range(url: Url, offset: int, size: int, length: int) -> bytes:
    """`size` bytes of a file from `offset` on, by one request. length: bytes that the file should have in all.

    Raises MdlError that names the address and the cause; also where an http server says that the file is longer or
    shorter, or does not send ranges.
    """
    if url.scheme in _BY_FSSPEC:
        return _patiently(url, lambda: _whole(_stored(url, offset, offset + size), size))
    return _patiently(url, lambda: _http_range(url, offset, size, length))


def fault(place: Path | Url, length: int, sha256: str) -> str | None:
    """What is wrong with a file that should have `length` bytes and this hash, or None. Reads all of it."""
    if isinstance(place, Path) and not place.is_file():
        return "missing"
    try:
        if isinstance(place, Path):
            found = place.stat().st_size
            content = sha256_file(place) if found == length else ""
        elif length <= _CHUNK:
            data = read(place)
            found, content = len(data), hashlib.sha256(data).hexdigest()
        else:
            found, content = length, _sha256(place, length)
    except MdlError as error:
        return error.what
    if found != length:
        return f"{found} bytes, {length} expected"
    return None if content == sha256 else "content differs from its sha256"


def _sha256(url: Url, length: int) -> str:
    content = hashlib.sha256()
    for offset in range(0, length, _CHUNK):
        content.update(read_range(url, offset, min(_CHUNK, length - offset), length))
    return content.hexdigest()


def _patiently(url: Url, ask: Callable[[], bytes]) -> bytes:
    for attempt in itertools.count(1):
        try:
            return ask()
        except _Cut as cut:
            if attempt == ATTEMPTS:
                what = f"this file does not arrive ({cut}; {ATTEMPTS} attempts)"
                raise MdlError(what, url, "look whether the server answers, and run again") from None
            # The second comes at once and silently: servers close connections that were idle for a while.
            if attempt > 1:
                console.say(f"{url}: {cut}; trying again")
                time.sleep(PAUSE * 2 ** (attempt - 2))
    raise AssertionError("the last attempt returns or raises")


def _whole(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise _Cut(f"{len(data)} of {size} bytes came")
    return data


class _Connections(threading.local):
    """This thread's open connections by scheme and host. A forked process does not speak on its parent's."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.open: dict[tuple[str, str], http.client.HTTPConnection] = {}

    def to(self, scheme: str, host: str) -> http.client.HTTPConnection:
        if self.pid != os.getpid():
            self.pid, self.open = os.getpid(), {}
        if (scheme, host) not in self.open:
            self.open[scheme, host] = _connection(scheme, host)
        return self.open[scheme, host]


_connections = _Connections()


def _proxy(scheme: str, host: str) -> str | None:
    """host:port of the proxy that the environment sets for a host."""
    found = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(scheme)
    return (
        urllib.parse.urlsplit(found if "//" in found else f"//{found}").netloc.rpartition("@")[2] if found else None
    )


def _connection(scheme: str, host: str) -> http.client.HTTPConnection:
    kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    proxy = _proxy(scheme, host)
    made = kind(proxy or host, timeout=_TIMEOUT)
    if proxy and scheme == "https":
        made.set_tunnel(host)
    return made


def _http_read(url: Url) -> bytes:
    return _http(url, {}, lambda response: response.read())


def _http_range(url: Url, offset: int, size: int, length: int) -> bytes:
    def receive(response: http.client.HTTPResponse) -> bytes:
        if response.status != 206:
            raise MdlError(
                "this server sends whole files only (it ignores Range requests)",
                url,
                "use a server that sends ranges, or copy the shards to this machine",
            )
        span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range") or "")
        if span is not None and span[3] not in ("*", str(length)):
            what = f"this is not the file that the artifact lists ({span[3]} bytes, {length} expected)"
            raise MdlError(what, url, "upload the artifact again, whole")
        if span is None or (int(span[1]), int(span[2])) != (offset, offset + size - 1):
            raise _Cut("the server sent another range than was asked for")
        return _whole(response.read(size), size)

    return _http(url, {"Range": f"bytes={offset}-{offset + size - 1}"}, receive)


def _http(url: Url, headers: dict[str, str], receive: Callable[[http.client.HTTPResponse], bytes]) -> bytes:
    """What `receive` makes of the answer 200 or 206, redirections followed. Raises _Cut or MdlError."""
    address = url.address + (f"?{url.query}" if url.query else "")
    headers = {"User-Agent": f"mdltool/{__version__}", "Accept-Encoding": "identity", **headers}
    for _ in range(_REDIRECTS):
        parts = urllib.parse.urlsplit(address)
        if parts.scheme not in _HTTP:
            break
        connection = _connections.to(parts.scheme, parts.netloc)
        target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        if parts.scheme == "http" and _proxy(parts.scheme, parts.netloc):
            target = address
        clean = False
        try:
            connection.request("GET", target, headers=headers)
            response = connection.getresponse()
            if response.status in (200, 206):
                data = receive(response)
                clean = response.isclosed()
                return data
            if response.status not in _MOVED or not response.headers.get("Location"):
                raise _refusal(url, response)
            address = urllib.parse.urljoin(address, response.headers["Location"])
        except (OSError, http.client.HTTPException) as error:
            raise _Cut(str(error) or type(error).__name__) from None
        finally:
            if not clean:  # what is left of an answer would be taken for the next one's
                connection.close()
    raise MdlError("the server sends from address to address", url, _AS_WRITTEN)


def _refusal(url: Url, response: http.client.HTTPResponse) -> Exception:
    if response.status == 416:
        return MdlError("this file is shorter than the artifact lists", url, "upload the artifact again, whole")
    if response.status in _LATER:
        return _Cut(f"the server answered {response.status} {response.reason}")
    return MdlError(f"the server does not give this file ({response.status} {response.reason})", url, _AS_WRITTEN)


def _stored(url: Url, start: int | None = None, end: int | None = None) -> bytes:
    """Bytes of an object, by fsspec, which keeps a file system for each process."""
    try:
        import fsspec

        data: bytes = fsspec.filesystem(url.scheme).cat_file(str(url), start=start, end=end)
    except ImportError as error:
        what = f"{url.scheme}:// addresses need packages that are not here ({error})"
        raise MdlError(what, url, "pip install 'mdltool[remote]'") from None
    except FileNotFoundError:
        raise MdlError("there is no such file", url, _AS_WRITTEN) from None
    except PermissionError as error:
        raise MdlError(f"this file may not be read ({error})", url, "look at the credentials") from None
    except Exception as error:  # each store's library has errors of its own
        raise _Cut(str(error) or type(error).__name__) from None
    return data
