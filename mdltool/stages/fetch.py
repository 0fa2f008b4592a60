"""`backbone fetch`: official weights from their publisher, a mirror or a file -> backbone artifact."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mdltool.artifact import Artifact
from mdltool.backbones import BACKBONES
from mdltool.backbones.download import NotThere, Unreachable, download
from mdltool.backbones.sources import HUB_FILES, Source, from_url, source_of
from mdltool.errors import MdlError
from mdltool.files import sha256_file
from mdltool.stages.weights import import_weights

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)


def fetch(
    name: str,
    out: Path,
    *,
    tag: str,
    url: str | None = None,
    sha256: str | None = None,
    file: Path | None = None,
    classes: list[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Artifact:
    """Download weights, check them and read them into an artifact, the same that `import` makes of the file.

    url: instead of the official address. sha256: first hex digits (8 or more) that the file must have. file: take
    this downloaded file or directory instead, checked against the official sha256.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{8,64}", sha256):
        raise MdlError(f"'{sha256}' is no sha256", "--sha256", "give its 64 hex digits, or the first 8 or more")
    if url is not None and file is not None:
        raise MdlError("--url and --file exclude each other", "--url, --file", "give one of them")
    if sha256 is not None and file is not None and file.is_dir():
        raise MdlError("a directory has no sha256 to check", "--sha256", "leave it away, or give the weights' file")
    weight_sources = BACKBONES.load(name, "NAME").weight_sources
    if file is not None:
        official = source_of(name, tag, weight_sources).sha256 if tag in weight_sources else None
        _check_file(file, sha256 or official)
        return import_weights(name, file, out, tag=tag, classes=classes, options=options)
    source = from_url(url) if url is not None else source_of(name, tag, weight_sources)
    try:
        path = _obtain(source, sha256 or source.sha256)
    except Unreachable as error:
        wanted, *others = source.urls
        files = f"{wanted} (or {others[0].rsplit('/', 1)[-1]} beside it)" if others else wanted
        raise MdlError(
            error.what,
            error.where,
            f"where there is a network, download {files}; then here: "
            f"mdltool backbone import {name} --file {wanted.rsplit('/', 1)[-1]} --tag {tag}",
        ) from None
    origin = f"{source.hub}/{path.name}" if source.hub is not None else path.name
    return import_weights(name, path, out, tag=tag, classes=classes, options=options, source=origin)


def _check_file(file: Path, sha256: str | None) -> None:
    if sha256 is None or not file.is_file():
        return
    found = sha256_file(file)
    if not found.startswith(sha256.lower()):
        raise MdlError(
            f"this file has sha256 {found[:16]}..., and {sha256} is expected",
            file,
            "download it again, or read it as it is: mdltool backbone import",
        )


def _obtain(source: Source, sha256: str | None) -> Path:
    """The downloaded file: of a hub repository through the hub's library and its cache, else by address."""
    if source.hub is not None and not os.environ.get("MDLTOOL_MIRROR"):
        path = _from_hub(source.hub, source.urls)
        if path is not None:
            _check_file(path, sha256)
            return path
    for url in source.urls[:-1]:
        try:
            return download(url, sha256=sha256)
        except NotThere:
            continue
    return download(source.urls[-1], sha256=sha256)


def _from_hub(repository: str, urls: tuple[str, ...]) -> Path | None:
    """A repository's weights in the hub's cache (HF_HOME), downloaded if need be; None without the hub's library.

    The cache calls a large file by its sha256, which is checked here.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        return None
    endpoint = os.environ.get("HF_ENDPOINT") or None
    for name, url in zip(HUB_FILES, urls, strict=True):
        try:
            path = Path(hf_hub_download(repository, name, endpoint=endpoint))
        except EntryNotFoundError as error:
            # A mirror that answers a plain 404 is told from no answer by the cause alone.
            status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
            if isinstance(error, LocalEntryNotFoundError) and status != 404:
                reason = _first_line(error.__cause__ or error)
                raise Unreachable(f"the hub cannot be reached ({reason})", url) from None
            continue
        except RepositoryNotFoundError as error:
            raise NotThere(f"the hub does not give {repository} ({_first_line(error)})", url) from None
        except Exception as error:  # the library lets through what its transport raises
            if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
                what = f"the download cannot be written ({error.strerror})"
                raise MdlError(what, error.filename or HF_HUB_CACHE, "free space, or set HF_HOME") from None
            raise Unreachable(f"the hub's download does not arrive ({_first_line(error)})", url) from None
        blob = path.resolve().name
        _check_file(path, blob if re.fullmatch(r"[0-9a-f]{64}", blob) else None)
        return path
    raise NotThere(f"{repository} holds none of {', '.join(HUB_FILES)}", urls[0], "give an address with --url")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
