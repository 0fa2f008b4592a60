"""Files at addresses, from a loopback server with faults and from fsspec's file system in memory."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from mdltool import remote
from mdltool.errors import MdlError
from mdltool.remote import Url, location
from tests.file_server import Server, server

__all__ = ["server"]  # a fixture

CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def own_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def url(server: Server) -> Url:
    server.files["/a/b.tar"] = CONTENT
    found = location(f"{server.url}/a/b.tar")
    assert isinstance(found, Url)
    return found


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    """fsspec's file system in memory, as s3 and gs."""
    for scheme in ("s3", "gs"):
        monkeypatch.setitem(_registry, scheme, MemoryFileSystem)
    system = MemoryFileSystem()
    yield system
    system.store.clear()


class TestAddresses:
    @pytest.mark.parametrize("text", ["a/b", "/a/b", "c:d", "http:/a", Path("a/b")])
    def test_paths_stay_paths(self, text: str | Path) -> None:
        assert location(text) == Path(text)

    @pytest.mark.parametrize(
        ("text", "address"),
        [
            ("HTTPS://host:8/a b/ä/", "https://host:8/a%20b/%C3%A4"),
            ("https://host/a%20b", "https://host/a%20b"),
            ("s3://bucket/a b/", "s3://bucket/a b"),
            ("gs://bucket", "gs://bucket"),
        ],
    )
    def test_parts(self, text: str, address: str) -> None:
        found = location(text)
        assert isinstance(found, Url)
        assert str(found) == address
        assert str(found / "x.tar") == f"{address}/x.tar"
        assert (found / "x.tar").name == "x.tar"
        assert found.resolve() == found == location(found) == pickle.loads(pickle.dumps(found))

    @pytest.mark.parametrize("text", ["ftp://host/a", "http://", "http://host:port/a", "http://[::1/a", "s3://"])
    def test_others_are_refused(self, text: str) -> None:
        with pytest.raises(MdlError, match="cannot be read") as caught:
            location(text)
        assert caught.value.where == text

    def test_passwords_are_refused_and_not_repeated(self) -> None:
        with pytest.raises(MdlError, match="password") as caught:
            location("https://me:secret@host/a")
        assert "secret" not in str(caught.value)

    def test_a_token_goes_with_each_request_and_is_not_shown(self, server: Server) -> None:
        server.files["/a/b.tar?token=secret&x=1"] = CONTENT
        folder = location(f"{server.url}/a?token=secret&x=1")
        assert "secret" not in str(folder) + repr(folder)
        assert isinstance(folder, Url)
        assert remote.read(folder / "b.tar") == CONTENT


class TestHttp:
    def test_whole_and_ranges(self, server: Server, url: Url) -> None:
        assert remote.read(url) == CONTENT
        assert remote.read_range(url, 0, 1, len(CONTENT)) == CONTENT[:1]
        assert remote.read_range(url, 700, 5000, len(CONTENT)) == CONTENT[700:5700]
        assert remote.read_range(url, 10_000, 240, len(CONTENT)) == CONTENT[10_000:]
        assert [span for _, span in server.asked] == [None, "bytes=0-0", "bytes=700-5699", "bytes=10000-10239"]
        assert server.connections == 1

    def test_cut_connections_and_busy_servers_are_asked_again(
        self, server: Server, url: Url, capsys: pytest.CaptureFixture[str]
    ) -> None:
        server.cuts = [100, 0]
        server.statuses = [0, 0, 503, 429]
        assert remote.read_range(url, 700, 5000, len(CONTENT)) == CONTENT[700:5700]
        assert len(server.asked) == 5
        assert "429 Too Many Requests; trying again" in capsys.readouterr().err
        server.cuts = [100]
        assert remote.read(url) == CONTENT

    def test_waits_grow(self, server: Server, url: Url, monkeypatch: pytest.MonkeyPatch) -> None:
        waits: list[float] = []
        monkeypatch.setattr(remote.time, "sleep", waits.append)
        server.statuses = [500] * 10
        with pytest.raises(MdlError, match=r"does not arrive \(the server answered 500 .*; 6 attempts\)") as caught:
            remote.read(url)
        assert caught.value.where == str(url)
        assert len(server.asked) == 6
        assert waits == [remote.PAUSE * factor for factor in (1, 2, 4, 8)]

    def test_nobody_answers(self, server: Server) -> None:
        port = int(server.url.rpartition(":")[2])
        free = Url(f"http://127.0.0.2:{port}/a")  # the server listens on 127.0.0.1
        with pytest.raises(MdlError, match="refused; 6 attempts"):
            remote.read(free)

    @pytest.mark.parametrize(
        ("status", "cause"), [(404, "404 Not Found"), (403, "403 Forbidden"), (401, "401 Unauthorized")]
    )
    def test_refusals_are_final(self, server: Server, url: Url, status: int, cause: str) -> None:
        server.statuses = [status]
        with pytest.raises(MdlError, match=cause) as caught:
            remote.read_range(url, 0, 10, len(CONTENT))
        assert caught.value.where == str(url)
        assert len(server.asked) == 1
        assert remote.read(url) == CONTENT

    def test_a_server_without_ranges(self, server: Server, url: Url) -> None:
        server.ranges = False
        with pytest.raises(MdlError, match="ignores Range"):
            remote.read_range(url, 0, 10, len(CONTENT))
        assert len(server.asked) == 1

    @pytest.mark.parametrize(("offset", "length"), [(0, 20_000), (0, 5_000), (10_200, 20_000), (12_000, 20_000)])
    def test_a_file_of_another_length(self, url: Url, offset: int, length: int) -> None:
        with pytest.raises(MdlError, match=r"\(10240 bytes, \d+ expected\)|shorter than the artifact lists"):
            remote.read_range(url, offset, 100, length)

    def test_redirections(self, server: Server, url: Url) -> None:
        server.moved["/old.tar"] = "/a/b.tar"
        old = Url(f"{server.url}/old.tar")
        assert remote.read_range(old, 5, 7, len(CONTENT)) == CONTENT[5:12]
        server.moved["/old.tar"] = "/old.tar"
        with pytest.raises(MdlError, match="from address to address"):
            remote.read(old)

    def test_a_proxy_is_asked_where_the_environment_names_one(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server.files["http://elsewhere.invalid/a?k=v"] = CONTENT
        monkeypatch.setenv("http_proxy", server.url)
        monkeypatch.setenv("no_proxy", "")
        assert remote.read(Url("http://elsewhere.invalid/a", "k=v")) == CONTENT

    def test_a_forked_process_opens_its_own_connection(self, server: Server, url: Url) -> None:
        assert remote.read(url) == CONTENT
        child = os.fork()
        if child == 0:
            same = all(remote.read_range(url, i, 9, len(CONTENT)) == CONTENT[i : i + 9] for i in range(20))
            os._exit(0 if same else 1)
        for i in range(20):
            assert remote.read_range(url, i, 100, len(CONTENT)) == CONTENT[i : i + 100]
        assert os.waitpid(child, 0)[1] == 0
        assert server.connections == 2


class TestStores:
    @pytest.mark.parametrize("scheme", ["s3", "gs"])
    def test_whole_and_ranges(self, store: MemoryFileSystem, scheme: str) -> None:
        place = Url(f"{scheme}://bucket/b.tar")
        store.pipe_file(str(place), CONTENT)
        assert remote.read(place) == CONTENT
        assert remote.read_range(place, 700, 5000, len(CONTENT)) == CONTENT[700:5700]

    def test_faults_of_the_store(self, store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
        place = Url("s3://bucket/b.tar")
        with pytest.raises(MdlError, match="no such file"):
            remote.read(place)
        store.pipe_file(str(place), CONTENT)
        with pytest.raises(MdlError, match="140 of 200 bytes came; 6 attempts"):
            remote.read_range(place, 10_100, 200, 20_000)
        causes: list[Exception] = [RuntimeError("busy"), OSError("cut")]
        whole = MemoryFileSystem.cat_file

        def unsure(self: MemoryFileSystem, *words: object, **named: object) -> bytes:
            if causes:
                raise causes.pop()
            return bytes(whole(self, *words, **named))

        monkeypatch.setattr(MemoryFileSystem, "cat_file", unsure)
        assert remote.read(place) == CONTENT
        causes.append(PermissionError("Forbidden"))
        with pytest.raises(MdlError, match="may not be read"):
            remote.read(place)

    def test_without_the_package_it_says_how_to_get_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(protocol: str) -> None:
            raise ImportError("Install s3fs to access S3")

        monkeypatch.setattr(fsspec, "filesystem", absent)
        with pytest.raises(MdlError, match="s3:// addresses need packages") as caught:
            remote.read(Url("s3://bucket/a"))
        assert caught.value.fix == "pip install 'mdltool[remote]'"


@pytest.mark.parametrize("chunk", [700, 1 << 20])
def test_what_is_wrong_with_a_file(
    server: Server, url: Url, tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_CHUNK", chunk)
    local = tmp_path / "b.tar"
    local.write_bytes(CONTENT)
    right = hashlib.sha256(CONTENT).hexdigest()
    for place in (local, url):
        assert remote.fault(place, len(CONTENT), right) is None
        assert "differs from its sha256" in str(remote.fault(place, len(CONTENT), "0" * 64))
        assert "10240 bytes, 10000 expected" in str(remote.fault(place, 10_000, right))
    local.unlink()
    assert remote.fault(local, len(CONTENT), right) == "missing"
    server.files.clear()
    assert "404" in str(remote.fault(url, len(CONTENT), right))
