"""Writing a tar whose bytes depend on its members' names and contents only, hashed on the way."""

from __future__ import annotations

import hashlib
import itertools
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

_RECORD_BYTES = tarfile.RECORDSIZE
_BUFFER_BYTES = 8 << 20
_THREAD_BYTES = 1 << 16  # less is hashed sooner than handed over
# So often the kernel is told to begin writing to the disk; left alone it begins at the final fsync.
_FLUSH_BYTES = 64 << 20


class ReadFault(Exception):
    """A member's source could not be read; its message is a short true sentence."""


class TarWriter:
    """A tar being written to `path`; other bytes of an existing file are lost.

    Members are regular files of mode 0644 without owner and date, in POSIX (pax) format. A thread hashes one buffer
    while the next is read and written. size: bytes so far. sha256: of the whole file, after `close`.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115 - closed by close and abandon
        self._hash = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._hashing: Future[None] | None = None
        self._buffers = itertools.cycle([memoryview(bytearray(_BUFFER_BYTES)) for _ in range(2)])
        self._flushed = 0
        self.size = 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def add(self, name: str, data: bytes) -> None:
        """Append a member."""
        self._write(_header(name, len(data)))
        self._write(data)
        self._pad(tarfile.BLOCKSIZE)

    def add_file(self, name: str, source: FileIO, size: int) -> None:
        """Append a member of `size` bytes from an open, unbuffered file. Raises ReadFault when they do not come."""
        self._write(_header(name, size))
        left = size
        while left:
            buffer = next(self._buffers)
            try:
                count = source.readinto(buffer[: min(left, _BUFFER_BYTES)])
            except OSError as error:
                raise ReadFault(f"the file cannot be read ({error.strerror})") from error
            if not count:
                raise ReadFault("the file changed while it was being read")
            self._write(buffer[:count])
            left -= count
        self._pad(tarfile.BLOCKSIZE)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Members added inside stand in the tar all together, or not at all when an exception passes."""
        size = self.size
        try:
            yield
        except BaseException:
            self._finish_hash()
            self._file.truncate(size)
            self._file.seek(0)
            # Rare, so it is hashed again from the file: a copy at every member would stop the hashing thread.
            self._hash = hashlib.file_digest(self._file, "sha256")
            self.size = size
            raise

    def close(self) -> None:
        """End the tar and wait until it is on the disk."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._pad(_RECORD_BYTES)
        self._finish_hash()
        os.fsync(self._file.fileno())
        self.abandon()

    def abandon(self) -> None:
        """Close the file as it is."""
        self._thread.shutdown()
        self._file.close()

    def _finish_hash(self) -> None:
        if self._hashing is not None:
            self._hashing.result()
            self._hashing = None

    def _pad(self, multiple: int) -> None:
        self._write(bytes(-self.size % multiple))

    def _write(self, data: bytes | memoryview) -> None:
        self._finish_hash()
        if len(data) < _THREAD_BYTES:
            self._hash.update(data)
        else:
            self._hashing = self._thread.submit(self._hash.update, data)
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self.size += len(data)
        if self.size - self._flushed >= _FLUSH_BYTES:
            os.posix_fadvise(self._file.fileno(), self._flushed, self.size - self._flushed, os.POSIX_FADV_DONTNEED)
            self._flushed = self.size


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.PAX_FORMAT)
