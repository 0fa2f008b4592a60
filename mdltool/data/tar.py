"""Writing a tar whose bytes depend on its members' names and contents only, hashed on the way."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

_RECORD_BYTES = tarfile.RECORDSIZE
_BUFFER_BYTES = 8 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)


class ReadFault(Exception):
    """A member's source could not be read; its message is a short true sentence."""


class TarWriter:
    """A tar being written to `path`; other bytes of an existing file are lost.

    Members are regular files of mode 0644 without owner and date, in POSIX (pax) format. One thread hashes a full
    buffer and another writes it while the next is filled. Where the file system can, it is written past the page
    cache: to find pages for a gigabyte costs the kernel more than the disk needs, and evicts what training reads.
    size: bytes so far. sha256: of the whole file, after `close`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = _open(path)
        self._hash = hashlib.sha256()
        self._threads = ThreadPoolExecutor(2)
        self._pending: list[Future[None]] = []
        # Anonymous maps begin at a page, as writing past the cache needs it.
        self._buffer, self._spare = (memoryview(mmap.mmap(-1, _BUFFER_BYTES)) for _ in range(2))
        self._filled = 0
        self._handed = 0  # bytes of the buffers that were full
        self._open = True

    @property
    def size(self) -> int:
        return self._handed + self._filled

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def add(self, name: str, data: bytes) -> None:
        """Append a member."""
        self._append(_header(name, len(data)))
        self._append(data)
        self._pad(tarfile.BLOCKSIZE)

    def add_file(self, name: str, source: FileIO, size: int) -> None:
        """Append a member of `size` bytes from an open, unbuffered file. Raises ReadFault when they do not come."""
        self._append(_header(name, size))
        left = size
        while left:
            try:
                count = source.readinto(self._buffer[self._filled : self._filled + left])
            except OSError as error:
                raise ReadFault(f"the file cannot be read ({error.strerror})") from error
            if not count:
                raise ReadFault("the file changed while it was being read")
            self._advance(count)
            left -= count
        self._pad(tarfile.BLOCKSIZE)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Members added inside stand in the tar all together, or not at all when an exception passes."""
        size = self.size
        try:
            yield
        except BaseException:
            self._cut(size)
            raise

    def close(self) -> None:
        """End the tar and wait until it is on the disk."""
        self._append(bytes(2 * tarfile.BLOCKSIZE))
        self._pad(_RECORD_BYTES)
        self._wait()
        rest = self._buffer[: self._filled]
        self._hash.update(rest)
        self._write(rest)
        os.fsync(self._descriptor)
        self.abandon()

    def abandon(self) -> None:
        """Close the file as it is."""
        self._threads.shutdown()
        if self._open:
            os.close(self._descriptor)
            self._open = False

    def _append(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            count = min(len(view), _BUFFER_BYTES - self._filled)
            self._buffer[self._filled : self._filled + count] = view[:count]
            self._advance(count)
            view = view[count:]

    def _pad(self, multiple: int) -> None:
        self._append(bytes(-self.size % multiple))

    def _advance(self, count: int) -> None:
        """Count bytes that were put into the buffer; a full one is handed to the threads."""
        self._filled += count
        if self._filled == _BUFFER_BYTES:
            self._wait()
            full, self._buffer, self._spare = self._buffer, self._spare, self._buffer
            self._pending = [self._threads.submit(work, full) for work in (self._hash.update, self._write)]
            self._handed += _BUFFER_BYTES
            self._filled = 0

    def _wait(self) -> None:
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def _write(self, view: memoryview) -> None:
        while view:
            try:
                view = view[os.write(self._descriptor, view) :]
            except OSError as error:
                # The end of the tar is no whole page, nor is what an almost full disk left over; some file systems
                # refuse only now.
                if error.errno != errno.EINVAL or not _past_cache(self._descriptor):
                    error.filename = str(self._path)
                    raise
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, _flags(self._descriptor) & ~_DIRECT)

    def _cut(self, size: int) -> None:
        """Go back to a smaller size."""
        if size < self._handed:
            # Rare, so it is hashed again from the file: a copy at every member would stop the hashing thread.
            self._wait()
            self._handed = size // _BUFFER_BYTES * _BUFFER_BYTES
            self._hash = hashlib.sha256()
            with self._path.open("rb") as file:
                for _ in range(self._handed // _BUFFER_BYTES):
                    file.readinto(self._buffer)
                    self._hash.update(self._buffer)
                file.readinto(self._buffer[: size - self._handed])
            os.ftruncate(self._descriptor, self._handed)
            os.lseek(self._descriptor, self._handed, os.SEEK_SET)
        self._filled = size - self._handed


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _flags(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_GETFL)


def _past_cache(descriptor: int) -> bool:
    return bool(_flags(descriptor) & _DIRECT)


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.PAX_FORMAT)
