"""Files are fetched whole or not at all, and what broke off is gone on with."""

import hashlib

import numpy as np
import pytest
from support import file_server

from vmoe.checkpoints import downloading
from vmoe.checkpoints.downloading import fetch_file
from vmoe.errors import UserError

CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloading, "WAITS", (0.0, 0.0))
    with file_server.serving({"a/file": CONTENT}) as server:
        yield server


def starts(server):
    """Where each answer was asked to begin."""
    return [0 if part is None else int(part.removeprefix("bytes=").rstrip("-")) for _, part in server.asked]


def test_a_file_that_breaks_off_is_gone_on_with(server, tmp_path):
    server.breaks_after = [100_000, 50_000]
    path = tmp_path / "file"
    assert fetch_file(f"{server.address}a/file", path) == hashlib.sha256(CONTENT).hexdigest()
    assert path.read_bytes() == CONTENT and starts(server) == [0, 100_000, 150_000]
    assert list(tmp_path.iterdir()) == [path]


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(server, tmp_path):
    server.breaks_after, server.statuses = [100_000], []
    path = tmp_path / "file"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(downloading, "WAITS", ())
        with pytest.raises(
            UserError, match=r"a/file: cannot be downloaded \(it broke off after 100,000 of 300,000 bytes"
        ):
            fetch_file(f"{server.address}a/file", path)
    assert not path.exists()
    fetch_file(f"{server.address}a/file", path)
    assert path.read_bytes() == CONTENT and starts(server) == [0, 100_000]


@pytest.mark.parametrize("changes", [True, False])
def test_parts_of_another_file_or_of_a_server_without_parts_are_not_joined(server, tmp_path, changes):
    server.breaks_after = [100_000]
    path, files = tmp_path / "file", server.files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(downloading, "WAITS", ())
        with pytest.raises(UserError):
            fetch_file(f"{server.address}a/file", path)
    if changes:
        files["a/file"] = CONTENT[::-1]
    else:
        server.gives_parts = False
    fetch_file(f"{server.address}a/file", path)
    assert path.read_bytes() == files["a/file"]


def test_a_server_that_fails_for_a_moment_is_asked_again(server, tmp_path):
    server.statuses = [503, 429]
    fetch_file(f"{server.address}a/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_slow_server_is_waited_for_and_a_silent_one_is_not(server, tmp_path, monkeypatch):
    server.pause = 0.3
    fetch_file(f"{server.address}a/file", tmp_path / "slow")
    assert (tmp_path / "slow").read_bytes() == CONTENT
    monkeypatch.setattr(downloading, "_SILENCE", 0.1)
    monkeypatch.setattr(downloading, "WAITS", ())
    with pytest.raises(UserError, match=r"cannot be downloaded .*timed out"):
        fetch_file(f"{server.address}a/file", tmp_path / "silent")


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ({"files": {}}, r"a/file: cannot be downloaded \(there is no such file\)"),
        ({"statuses": [403]}, r"a/file: cannot be downloaded \(HTTP 403, Forbidden\)"),
        ({"statuses": [302] * 9}, r"a/file: cannot be downloaded \(HTTP 302, .*redirect"),
        ({"statuses": [500] * 3}, r"a/file: cannot be downloaded \(HTTP 500"),
        ({"content_type": "text/html"}, "a/file: a web page came, and no file"),
        ({"md5": "wrong"}, "a/file: was damaged on its way"),
    ],
)
def test_what_cannot_be_fetched_is_one_line_and_leaves_no_file(server, tmp_path, how, line):
    for name, value in how.items():
        setattr(server, name, value)
    with pytest.raises(UserError, match=line) as error:
        fetch_file(f"{server.address}a/file", tmp_path / "file")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("[!.]*"))


def test_the_publishers_checksum_is_compared(server, tmp_path):
    server.md5 = "right"
    fetch_file(f"{server.address}a/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_without_a_network_it_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.invalid/x: cannot be downloaded \(.*\); check the network"):
        fetch_file("https://nowhere.invalid/x", tmp_path / "x")


def test_a_full_disk_is_found_before_the_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloading, "_RESERVE", 2**62)
    with pytest.raises(UserError, match=r"needs 0 MB, and .* MB free; make room, or set TORCH_HOME"):
        fetch_file(f"{server.address}a/file", tmp_path / "file")
