"""A local Hugging Face hub for tests. It serves only the given files."""

import contextlib
import hashlib
import http.server
import threading
from collections.abc import Iterator, Mapping

from huggingface_hub import constants


@contextlib.contextmanager
def serving(files: Mapping[str, bytes], cache, monkeypatch) -> Iterator[None]:
    """Serves `files`, by USER/NAME/FILE, to huggingface_hub, at the revision main or one of 40 zeros."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self._answer()

        def do_GET(self):
            self.wfile.write(self._answer())

        def _answer(self) -> bytes:
            repository, _, rest = self.path.lstrip("/").partition("/resolve/")
            content = files.get(f"{repository}/{rest.partition('/')[2]}")
            self.send_response(404 if content is None else 200)
            etag = hashlib.sha1(content or b"").hexdigest()
            for name, value in (
                ("X-Repo-Commit", "0" * 40), ("ETag", f'"{etag}"'), ("Content-Length", str(len(content or b""))),
                ("X-Error-Code", "RepoNotFound" if content is None else ""),
            ):  # fmt: skip
                self.send_header(name, value)
            self.end_headers()
            return content or b""

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name, value in (("HF_ENDPOINT", address), ("HF_HUB_CACHE", str(cache)), ("HF_HUB_OFFLINE", "0")):
        monkeypatch.setenv(name, value)  # for processes that the test starts
    yield
    server.shutdown()
    server.server_close()
