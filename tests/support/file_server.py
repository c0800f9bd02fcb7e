"""A local file server for tests. It serves parts of files, and fails in typical ways."""

import base64
import contextlib
import hashlib
import http.server
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class FileServer:
    """The server's files and its failures, which may change while it runs.

    Attributes:
        files: Contents of files by path.
        address: The address of the server.
        asked: The path and the Range of each request so far.
        breaks_after: For each of the next answers, the bytes after which the connection breaks.
        statuses: HTTP status codes of the next answers, which have no content. 302 leads to the same path again.
        pause: Seconds before the second half of a file.
        gives_parts: Whether it supports Range.
        content_type: The type of all files.
        md5: Added to each answer as Google's storage does: "right", "wrong", or "".
    """

    files: dict[str, bytes]
    address: str = ""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    breaks_after: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    pause: float = 0.0
    gives_parts: bool = True
    content_type: str = "application/octet-stream"
    md5: str = ""

    def count(self, path: str) -> int:
        """The number of requests for a path."""
        return sum(asked == path for asked, _ in self.asked)


@contextlib.contextmanager
def serving(files: dict[str, bytes]) -> Iterator[FileServer]:
    """Serves files by path within the block."""
    state = FileServer(files)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path, wanted = self.path.lstrip("/"), self.headers["Range"]
            state.asked.append((path, wanted))
            content = state.files.get(path)
            if state.statuses or content is None:
                status = state.statuses.pop(0) if state.statuses else 404
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", self.path)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            etag, start = f'"{hashlib.sha1(content).hexdigest()}"', 0
            if wanted and state.gives_parts and self.headers["If-Range"] == etag:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            if state.md5:
                digest = hashlib.md5(content if state.md5 == "right" else b"").digest()
                self.send_header("x-goog-hash", "crc32c=AAAAAA==")
                self.send_header("x-goog-hash", f"md5={base64.b64encode(digest).decode()}")
            for name, value in (
                ("ETag", etag), ("Content-Type", state.content_type), ("Content-Length", str(len(content) - start)),
            ):  # fmt: skip
                self.send_header(name, value)
            self.end_headers()
            rest = content[start:]
            half = len(rest) // 2
            if state.breaks_after:
                self.wfile.write(rest[: state.breaks_after.pop(0)])
                return
            self.wfile.write(rest[:half])
            time.sleep(state.pause)
            with contextlib.suppress(ConnectionError):  # the client has given up
                self.wfile.write(rest[half:])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    state.address = f"http://127.0.0.1:{server.server_port}/"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
