"""Files of image arrays: NumPy's .npy, and .npz with several arrays. Nothing is ever unpickled."""

from __future__ import annotations

import functools
import lzma
import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from mdltool.data.video import VideoError

ARRAY_SUFFIXES = (".npy", ".npz")
_MEMBER = ".npy"
_LOCAL_HEADER = struct.Struct("<26xHH")
# RuntimeError: an encrypted .npz; TokenError: a header that is no Python literal.
_FAULTS = (
    *(OSError, ValueError, KeyError, EOFError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, tokenize.TokenError),
)


class ArrayFault(Exception):
    """An array that cannot be read; its message is a short true sentence."""


@dataclass(frozen=True)
class ArrayHeader:
    """What an array is, by its header."""

    shape: tuple[int, ...]
    dtype: np.dtype


def headers_of(path: Path) -> dict[str, ArrayHeader]:
    """Name -> header of every array in a file; the one of an .npy is called "". Raises ArrayFault."""
    try:
        if path.suffix.lower() == ".npy":
            with open(path, "rb") as file:
                return {"": _read_header(file)}
        with zipfile.ZipFile(path) as archive:
            found = {}
            for name in archive.namelist():
                if name.endswith(_MEMBER):
                    with archive.open(name) as file:
                        found[name.removesuffix(_MEMBER)] = _read_header(file)
            return found
    except _FAULTS as error:
        raise ArrayFault(f"this is no file of NumPy arrays ({error})") from None


def open_array(path: Path, name: str) -> np.ndarray:
    """One array of a file, mapped where it is stored as it is, else read whole. Raises ArrayFault."""
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo(name + _MEMBER)
            if entry.compress_type != zipfile.ZIP_STORED:
                with archive.open(entry) as member:
                    return np.lib.format.read_array(member, allow_pickle=False)
        with open(path, "rb") as file:
            file.seek(entry.header_offset)
            names = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            file.seek(sum(names), 1)
            shape, in_columns, dtype = _header(file)
            order = "F" if in_columns else "C"
            return np.memmap(path, dtype, "r", file.tell(), shape, order)  # type: ignore[call-overload]
    except _FAULTS as error:
        raise ArrayFault(f"the array '{name}' cannot be read ({error})") from None


def read_row(path: Path, name: str, row: int) -> np.ndarray:
    """uint8 [H, W, 3] or [H, W]: one image of an array of images. Raises VideoError."""
    try:
        image = np.array(_held(path, name)[row])
    except (ArrayFault, IndexError) as error:
        raise VideoError(str(error)) from None
    return image[..., 0] if image.shape[2:] == (1,) else image


@functools.cache
def _held(path: Path, name: str) -> np.ndarray:
    # A compressed array is read whole for one row, and clips come in no order: every worker keeps what it has read.
    return open_array(path, name)


def _read_header(file: IO[bytes]) -> ArrayHeader:
    shape, _, dtype = _header(file)
    return ArrayHeader(shape, dtype)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, in_columns, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which would have to be unpickled")
    return shape, in_columns, dtype
