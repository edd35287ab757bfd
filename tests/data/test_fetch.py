"""Fetching files: downloads over a real connection, the order of places, and the report of failures."""

import gzip
import hashlib
import shutil
import tracemalloc
from pathlib import Path

import pytest

from glf_fast.data.fetch import Attempt, Unavailable, check_hash, debian_package, download, first, gunzip
from glf_fast.errors import UserError

CONTENT = b"pixels" * 1000
CLOSED = "http://127.0.0.1:9"  # the discard port, on which nothing listens


def test_download_verifies_before_it_keeps(mirror, tmp_path: Path) -> None:
    url, served = mirror
    (served / "file").write_bytes(CONTENT)
    target = tmp_path / "deep" / "file"

    def check(file: Path) -> None:
        check_hash(file, "file", sha256=hashlib.sha256(CONTENT).hexdigest())

    assert download(f"{url}/file", target, check, limit=10_000).read_bytes() == CONTENT
    (served / "file").write_bytes(CONTENT + b"!")
    with pytest.raises(Unavailable, match="file is not the published file"):
        download(f"{url}/file", target, check, limit=10_000)
    assert target.read_bytes() == CONTENT, "the verified file stays"
    assert list(target.parent.iterdir()) == [target], "no partial file"


def test_download_follows_redirects(mirror, tmp_path: Path) -> None:
    url, served = mirror
    (served / "file").write_bytes(CONTENT)
    assert download(f"{url}/moved/file", tmp_path / "file", lambda file: None, limit=10_000).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("path", "message"),
    [("cut/file", "broke off after 3,000 of 6,000 bytes|IncompleteRead"), ("none", "File not found")],
)
def test_failed_downloads_leave_nothing(mirror, tmp_path: Path, path: str, message: str) -> None:
    url, served = mirror
    (served / "file").write_bytes(CONTENT)
    with pytest.raises(Unavailable, match=message):
        download(f"{url}/{path}", tmp_path / "target" / "file", lambda file: None, limit=10_000)
    assert not list(tmp_path.glob("target/*"))


def test_downloads_go_to_the_disk_as_they_come(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 25)  # 32 MiB
    expected = {"md5": "58f06dd588d8ffb3beb46ada6309436b"}
    tracemalloc.start()
    try:
        uri = (tmp_path / "large").as_uri()
        download(uri, tmp_path / "copy", lambda file: check_hash(file, "large", **expected), limit=1 << 25)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "copy").stat().st_size == 1 << 25
    assert peak < 1 << 23


def test_closed_network_is_a_reason_not_a_crash(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="refused"):
        download(f"{CLOSED}/file", tmp_path / "file", lambda file: None, limit=10_000)


def test_the_proxy_of_each_download_is_that_of_the_environment(
    mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that leads nowhere stops this download, and none that comes after it was mended."""
    url, served = mirror
    (served / "file").write_bytes(CONTENT)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as patch:
        patch.setenv("http_proxy", CLOSED)
        with pytest.raises(Unavailable, match="refused"):
            download(f"{url}/file", tmp_path / "file", lambda file: None, limit=10_000)
    monkeypatch.delenv("http_proxy", raising=False)
    assert download(f"{url}/file", tmp_path / "file", lambda file: None, limit=10_000).read_bytes() == CONTENT


def test_first_success_ends_the_search_and_failures_are_all_told(tmp_path: Path) -> None:
    def absent() -> Path:
        raise Unavailable("not here")

    def forbidden() -> Path:
        raise PermissionError("permission denied")

    def wrong() -> Path:
        raise UserError("the file that you named is corrupt")

    tried = [Attempt("the shelf", absent), Attempt("the safe", forbidden)]
    assert first("the thing", [*tried, Attempt("the table", lambda: tmp_path)], "Buy one") == tmp_path
    with pytest.raises(UserError) as error:
        first("the thing", tried, "Buy one")
    assert str(error.value) == (
        "the thing could not be found. Tried the shelf: not here; the safe: permission denied. Buy one"
    )
    with pytest.raises(UserError, match="you named is corrupt"):
        first("the thing", [Attempt("given", wrong), Attempt("the table", lambda: tmp_path)], "")


def test_broken_compression_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(b"\x1f\x8b\x08\x00 nonsense")
    with pytest.raises(Unavailable, match=r"a\.gz is truncated or corrupt"):
        gunzip(tmp_path / "a.gz", 100)


def test_no_more_is_unpacked_or_downloaded_than_a_file_can_have(mirror, tmp_path: Path) -> None:
    url, served = mirror
    with gzip.open(tmp_path / "a.gz", "wb") as file:
        for _ in range(1 << 5):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(Unavailable, match=r"a\.gz unpacks to more than 10,000 bytes"):
            gunzip(tmp_path / "a.gz", 10_000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()
    (served / "file").write_bytes(CONTENT)
    with pytest.raises(Unavailable, match="more than 5,999 bytes"):
        download(f"{url}/file", tmp_path / "file", lambda file: None, limit=5_999)
    assert not (tmp_path / "file").exists()


def test_a_server_that_drips_is_given_up(mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, served = mirror
    (served / "file").write_bytes(CONTENT)
    clock = iter(range(0, 1000, 61))
    monkeypatch.setattr("glf_fast.data.fetch.time.monotonic", lambda: next(clock))
    with pytest.raises(Unavailable, match="sent 6,000 bytes in 61 seconds, which is too slow"):
        download(f"{url}/file", tmp_path / "file", lambda file: None, limit=10_000)


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="not a Debian machine")
def test_unknown_packages_are_a_reason() -> None:
    with pytest.raises(Unavailable, match="apt-get failed: E: "), debian_package("no-such-package-anywhere"):
        pass
