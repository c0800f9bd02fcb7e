"""Tar shards behind addresses: listed, read in parts by every process, and what a network does to them."""

import functools
import gc
import http.server
import io
import multiprocessing
import queue
import threading

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFile

import vmoe.data.addresses
from vmoe.cli.make_shards import main
from vmoe.data import DataConfig, ImageDataModule
from vmoe.data.addresses import read_whole
from vmoe.data.config import set_and_root
from vmoe.data.datasets import load_whole_splits
from vmoe.data.loading import read_or_next
from vmoe.errors import UserError


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, with parts of files where `in_parts`; counts what it sends, and fails as often as `failing` says
    for a name.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, *args, log, in_parts, failing, **options):
        self.log, self.in_parts, self.failing = log, in_parts, failing
        super().__init__(*args, **options)

    def log_message(self, *_):
        pass

    def fails(self):
        name = self.path.lstrip("/")
        if not self.failing.get(name):
            return False
        self.failing[name] -= 1
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return True

    def do_HEAD(self):
        return None if self.fails() else super().do_HEAD()

    def do_GET(self):
        if self.fails():
            return None
        wanted = self.headers.get("Range")
        self.log.append((self.path, wanted))
        if wanted is None or not self.in_parts:
            return super().do_GET()
        with open(self.translate_path(self.path), "rb") as file:
            content = file.read()
        first, last = (int(each or len(content)) for each in wanted.removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture
def shards(image_tree, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(vmoe.data.addresses, "_WAITS", ())
    assert main([str(image_tree(count=6)), "--out", str(tmp_path / "shards"), "--images", "4"]) == 0
    return tmp_path / "shards"


@pytest.fixture
def in_memory(shards):
    fs = fsspec.filesystem("memory")
    for path in shards.iterdir():
        fs.pipe(f"/photos/{path.name}", path.read_bytes())
    yield fs
    fs.rm("/photos", recursive=True)


@pytest.fixture
def served(shards):
    """Makes a server of the shards; gives its address and the requests that it has answered."""
    servers = []

    def serve(in_parts=True, failing=None):
        log = []
        handler = functools.partial(
            Server, directory=str(shards), log=log, in_parts=in_parts, failing={} if failing is None else failing
        )
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", log

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def splits_of(root):
    return load_whole_splits(DataConfig("webdataset", str(root)))


def batches(root, **options):
    module = ImageDataModule(DataConfig("webdataset", str(root), image_size=8, batch_size=4, **options), seed=3)
    module.setup()
    return [(batch.labels.tolist(), batch.images.mean((1, 2, 3)).tolist()) for batch in module.train_dataloader()]


def test_batches_are_those_of_the_folder_whatever_the_workers(shards, in_memory, served):
    address, log = served()
    assert set_and_root(address) == ("webdataset", address)
    whole = batches(shards)
    assert batches("memory://photos") == batches(address) == batches(address, workers=1) == whole
    assert not [path for path, wanted in log if path.endswith(".tar") and wanted is None]  # parts of shards alone
    names = "{train,val}-{000000..000004}.tar"
    assert batches(f"{address}/{names}") == whole and batches(f"file://{shards}") == whole
    assert DataConfig("webdataset", "s3://bucket/photos/train-{0..9}.tar").title == "photos"


def test_an_index_beside_the_shards_serves_while_their_sizes_are_the_same(in_memory, tmp_path):
    assert len(splits_of("memory://photos").train) == 18
    assert not (tmp_path / "cache").exists()
    in_memory.pipe("/photos/train-000004.tar", in_memory.cat("/photos/train-000000.tar"))
    assert len(splits_of("memory://photos").train) == 20
    (kept,) = (tmp_path / "cache").rglob("index-train.npz")
    written = kept.stat().st_mtime_ns
    assert len(splits_of("memory://photos").train) == 20 and kept.stat().st_mtime_ns == written


def test_a_server_without_parts_needs_whole_files(served):
    address, _ = served(in_parts=False)
    with pytest.raises(UserError, match=r"gives no parts of files; give simplecache::http://127"):
        batches(address)
    assert batches(f"simplecache::{address}") == batches(served()[0])


def test_a_worker_that_reads_leaves_the_connections_of_its_parent(served):
    file = f"{served()[0]}/classes.json"
    assert read_whole(file)
    worker = multiprocessing.get_context("fork").Process(target=lambda: (read_whole(file), gc.collect()))
    worker.start()
    worker.join()
    answers = queue.Queue()
    threading.Thread(target=lambda: answers.put(read_whole(file)), daemon=True).start()
    assert answers.get(timeout=20)


def test_a_network_that_fails_is_no_damaged_picture(in_memory):
    splits = splits_of("memory://photos")
    in_memory.rm("/photos/train-000000.tar")
    position = int(np.flatnonzero(splits.train.images.shards == 0)[0])
    with pytest.raises(UserError, match=r"memory://photos/train-000000\.tar: cannot be read \(there is no such file"):
        read_or_next(splits.train, position, [])


@pytest.mark.parametrize("name", ["classes.json", "index-val.npz", "train-000001.tar"])
def test_a_server_that_fails_is_asked_again(served, shards, monkeypatch, name):
    names = splits_of(shards).class_names
    assert names != ["0", "1"]
    (shards / "index-train.npz").unlink()
    address, _ = served(failing={name: 3})  # a HEAD, and the GET in its place, are one try
    with pytest.raises(UserError, match=rf"{name}: cannot be read \(503"):
        splits_of(address)
    monkeypatch.setattr(vmoe.data.addresses, "_WAITS", (0, 0))
    splits = splits_of(address)
    assert splits.class_names == names and len(splits.train) == 18


def test_a_scan_that_breaks_off_starts_again(in_memory, monkeypatch):
    in_memory.rm("/photos/index-train.npz")
    plain, fails = io.BytesIO.read, [True]

    def read(file, *size):
        if fails and getattr(file, "path", "").endswith("train-000001.tar"):
            fails.clear()
            raise ConnectionResetError("gone")
        return plain(file, *size)

    monkeypatch.setattr(MemoryFile, "read", read, raising=False)
    monkeypatch.setattr(vmoe.data.addresses, "_WAITS", (0,))
    assert len(splits_of("memory://photos").train) == 18 and not fails


@pytest.mark.parametrize(
    ("root", "line"),
    [
        ("memory://{photos,others}/{train-000000,val-000000}.tar", "2 of these files are called train-000000.tar"),
        ("nope://photos", r"nope://photos: cannot be read \(Protocol not known"),
        ("memory://lost", r"memory://lost: cannot be read \(there is no such file"),
        ("memory://photos/train-{0..1.tar", "its braces are not balanced"),
    ],
)
def test_addresses_that_lead_nowhere(in_memory, root, line):
    with pytest.raises(UserError, match=line):
        splits_of(root)
    with pytest.raises(ValueError, match="is an address, behind which only"):
        DataConfig("folder", root)
