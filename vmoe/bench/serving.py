"""Measures a running `vmoe serve` under load from many clients. Each sends its next request after an answer."""

import http.client
import io
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from vmoe.bench.report import Column, Row
from vmoe.data.samples import PHOTOGRAPHS, load_photograph
from vmoe.errors import UserError

SERVING_COLUMNS = (
    Column("uploads", "uploads"),
    Column("clients", "clients"),
    Column("requests", "requests"),
    Column("answered", "answered"),
    Column("lost", "lost"),
    Column("requests/s", "rate", ".1f"),
    Column("p50 ms", "p50_ms", ".1f"),
    Column("p99 ms", "p99_ms", ".1f"),
)
_BORDER = "vmoe-upload"


class Target(NamedTuple):
    """A server: its host, port and key."""

    host: str
    port: int
    key: str


def find_target(url: str) -> Target:
    """The server at `url`, with the key of VMOE_API_KEY.

    Raises:
        UserError: The address is invalid, or no server there is ready.
    """
    parts = urlsplit(url)
    try:
        target = Target(parts.hostname or "", parts.port or 80, os.environ.get("VMOE_API_KEY", ""))
        connection = http.client.HTTPConnection(target.host, target.port, timeout=10)
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"--url {url}: no server answers there ({error}); start one by vmoe serve") from error
    if parts.scheme != "http" or status != 200:
        raise UserError(f"--url {url}: is no http address of a server that is ready; see its /health")
    return target


def photograph() -> bytes:
    """A JPEG of 640 x 427 pixels."""
    content = io.BytesIO()
    Image.fromarray(load_photograph(PHOTOGRAPHS[0])).save(content, "JPEG", quality=90)
    return content.getvalue()


def damaged(content: bytes, count: int, seed: int) -> list[bytes]:
    """Damaged copies of an image file: each is cut off at a random place, with some bytes changed."""
    random = np.random.default_rng(seed)
    whole, copies = np.frombuffer(content, np.uint8), []
    for _ in range(count):
        copy = whole[: random.integers(1, len(whole))].copy()
        copy[random.integers(0, len(copy), 10)] ^= random.integers(1, 256, 10, dtype=np.uint8)
        copies.append(copy.tobytes())
    return copies


def measure_server(target: Target, uploads: list[bytes], clients: int, expected: range) -> Row:
    """Sends each upload once, spread over the clients.

    Args:
        target: The server.
        uploads: Contents of image files.
        clients: Number of concurrent clients, each with its own connection.
        expected: The statuses that count as answered. All others count as lost.

    Returns:
        The numbers of requests, of answered and of lost ones, answers per second, and the median and 99th percentile of
        a request's time in ms.
    """
    of_thread = threading.local()

    def connect() -> None:
        of_thread.connection = http.client.HTTPConnection(target.host, target.port, timeout=60)

    def ask(upload: bytes) -> tuple[int, float]:
        start = time.perf_counter()
        return _ask(of_thread.connection, target.key, upload), time.perf_counter() - start

    start = time.perf_counter()
    with ThreadPoolExecutor(clients, initializer=connect) as pool:
        statuses, seconds = zip(*pool.map(ask, uploads), strict=True)
    wall = time.perf_counter() - start
    answered = sum(status in expected for status in statuses)
    p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
    return {
        "clients": clients, "requests": len(uploads), "answered": answered, "lost": len(uploads) - answered,
        "rate": answered / wall, "p50_ms": float(p50), "p99_ms": float(p99),
    }  # fmt: skip


def _ask(connection: http.client.HTTPConnection, key: str, upload: bytes) -> int:
    """The status of an answer; 0 for none."""
    head = f'--{_BORDER}\r\nContent-Disposition: form-data; name="image"; filename="upload"\r\n\r\n'
    body = head.encode() + upload + f"\r\n--{_BORDER}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={_BORDER}", "X-API-Key": key.encode()}
    try:
        connection.request("POST", "/predict", body, headers)
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException):
        connection.close()  # the next request opens it again
        return 0
    return answer.status
