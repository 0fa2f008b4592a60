"""Downloads over cut connections, from servers without ranges or lengths, and of the wrong content."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from mdltool.backbones import download
from mdltool.backbones.download import NotThere, Unreachable
from mdltool.errors import MdlError
from tests.file_server import Server, own_world, server, sha

__all__ = ["own_world", "server"]  # fixtures
pytestmark = pytest.mark.usefixtures("own_world")

DATA = bytes(range(256)) * 4000


def test_cut_connections_are_continued(server: Server) -> None:
    server.files["/a.bin"] = DATA
    server.cuts = [300_000, 1, 400_000]
    path = download.download(f"{server.url}/a.bin", sha256=sha(DATA))
    assert path.read_bytes() == DATA
    assert [span for _, span in server.asked] == [None, "bytes=300000-", "bytes=300001-", "bytes=700001-"]
    assert not list(path.parent.glob("*.part*"))
    download.download(f"{server.url}/a.bin", sha256=sha(DATA))
    assert len(server.asked) == 4, "the second time it comes from the cache"


def test_a_later_run_continues(server: Server) -> None:
    server.files["/a.bin"] = DATA
    server.etag = '"v1"'
    server.cuts, server.statuses = [500_000], [0, *[503] * download.ATTEMPTS]
    with pytest.raises(Unreachable, match="503"):
        download.download(f"{server.url}/a.bin")
    server.asked.clear()
    assert download.download(f"{server.url}/a.bin").read_bytes() == DATA
    assert server.asked == [("/a.bin", "bytes=500000-")]


def test_a_file_that_changed_meanwhile_starts_over(server: Server) -> None:
    server.files["/a.bin"] = b"old" * 1000
    server.etag = '"v1"'
    server.cuts, server.statuses = [500], [0, *[503] * download.ATTEMPTS]
    with pytest.raises(Unreachable):
        download.download(f"{server.url}/a.bin")
    server.files["/a.bin"], server.etag = DATA, '"v2"'
    assert download.download(f"{server.url}/a.bin").read_bytes() == DATA


def test_server_without_ranges(server: Server) -> None:
    server.files["/a.bin"] = DATA
    server.ranges, server.cuts = False, [300_000, 900_000]
    assert download.download(f"{server.url}/a.bin", sha256=sha(DATA)[:8]).read_bytes() == DATA


def test_server_without_lengths(server: Server) -> None:
    server.files["/a.bin"] = DATA
    server.lengths = False
    assert download.download(f"{server.url}/a.bin").read_bytes() == DATA


def test_a_whole_part_is_taken_as_it_is(server: Server) -> None:
    server.files["/a.bin"] = DATA
    server.cuts, server.lengths = [500_000], False
    target = download.download(f"{server.url}/a.bin")  # without a length the cut cannot be seen
    assert target.stat().st_size == 500_000
    os.rename(target, target.with_name("a.bin.part"))
    server.lengths = True
    assert download.download(f"{server.url}/a.bin", sha256=sha(DATA)).read_bytes() == DATA
    os.rename(target, target.with_name("a.bin.part"))
    assert download.download(f"{server.url}/a.bin", sha256=sha(DATA)).read_bytes() == DATA
    assert server.asked[-1] == ("/a.bin", f"bytes={len(DATA)}-")


def test_longer_part_than_the_file_starts_over(server: Server) -> None:
    server.files["/a.bin"] = DATA
    target = download.download(f"{server.url}/a.bin")
    target.with_name("a.bin.part").write_bytes(DATA + b"more")
    target.unlink()
    assert download.download(f"{server.url}/a.bin").read_bytes() == DATA


def test_wrong_sha256(server: Server) -> None:
    server.files["/a.bin"] = DATA
    with pytest.raises(MdlError) as caught:
        download.download(f"{server.url}/a.bin", sha256="0" * 64)
    assert sha(DATA)[:16] in str(caught.value)
    assert "0" * 64 in str(caught.value)
    assert download.download(f"{server.url}/a.bin", sha256=sha(DATA)).read_bytes() == DATA, "nothing bad is kept"
    server.files["/a.bin"] = b"new"
    assert download.download(f"{server.url}/a.bin", sha256=sha(b"new")).read_bytes() == b"new"


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_refused(server: Server, status: int) -> None:
    server.files["/a.bin"] = DATA
    server.statuses = [status]
    with pytest.raises(NotThere, match=str(status)):
        download.download(f"{server.url}/a.bin")
    assert len(server.asked) == 1


def test_busy_server_is_asked_again(server: Server) -> None:
    server.files["/a.bin"] = DATA
    server.statuses = [503, 429]
    assert download.download(f"{server.url}/a.bin").read_bytes() == DATA


def test_two_processes(server: Server) -> None:
    server.files["/a.bin"] = DATA
    target = download.download(f"{server.url}/a.bin")
    target.unlink()
    with (
        download._open_part(target.with_name("a.bin.part")),
        pytest.raises(MdlError, match="another process"),
    ):
        download.download(f"{server.url}/a.bin")


def test_blanks_and_letters_in_the_address(server: Server, tmp_path: Path) -> None:
    server.files["/a%20b/%C3%BC.bin"] = DATA
    for address in ("/a b/ü.bin", "/a%20b/%C3%BC.bin"):
        path = download.download(server.url + address)
        assert (path.name, path.read_bytes()) == ("ü.bin", DATA)
    (tmp_path / "a ü.bin").write_bytes(DATA)
    assert download.download(f"file://{tmp_path}/a ü.bin").read_bytes() == DATA


def test_places_that_do_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MdlError, match="cannot be downloaded from"):
        download.download("ftp://127.0.0.1/a.bin")
    for address in ("http://", "http://[::1", "http://127.0.0.1:99999999/a.bin", "a.bin", ""):
        with pytest.raises(MdlError, match="cannot be downloaded from"):
            download.download(address)
    with pytest.raises(NotThere, match="no such file"):
        download.download((tmp_path / "a.bin").as_uri())
    (tmp_path / "a.bin").write_bytes(DATA)
    (tmp_path / "full").write_text("")
    monkeypatch.setenv("MDLTOOL_CACHE", str(tmp_path / "full"))
    with pytest.raises(MdlError, match="cannot be written"):
        download.download((tmp_path / "a.bin").as_uri())


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Writing beyond so many bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [10, 50_000])
def test_a_full_disk_is_named(size: int, server: Server) -> None:
    """It takes neither the server's note of the content nor the first bytes, which closing the file tries again."""
    server.files["/a.bin"], server.etag = bytes(100_000), f'"{"x" * 64}"'
    with files_up_to(size), pytest.raises(MdlError, match="cannot be written") as caught:
        download.download(f"{server.url}/a.bin")
    assert str(caught.value.where).endswith("a.bin.part")
    assert download.download(f"{server.url}/a.bin").stat().st_size == 100_000
