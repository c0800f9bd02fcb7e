"""Models that a folder or a hub describes, by timm's own names."""

import http.server
import json
import threading

import pytest

from vmoe.errors import UserError
from vmoe.models.sources import architecture_of, with_source


def test_names_of_the_hub_s_timm():
    assert with_source("timm/vit_tiny_patch16_224.augreg_in21k") == "vit_tiny_patch16_224.augreg_in21k"
    assert with_source("timm/of_another_version") == "hf-hub:timm/of_another_version"
    assert with_source("vit_tiny_patch16_224") == "vit_tiny_patch16_224"
    assert architecture_of("timm/vit_tiny_patch16_224", {"depth": 2}) == ("vit_tiny_patch16_224", {"depth": 2})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architecture": "vit_tiny_patch16_224", "input_size": [3, 9, 9]}, ("vit_tiny_patch16_224", {"depth": 2})),
        (
            {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 3, "num_heads": 2, "img_size": 32}},
            ("vit_tiny_patch16_224", {"depth": 2, "num_heads": 2}),
        ),
        (
            {"architecture": "vmoe_on_backbone", "model_args": {"backbone": "vit_tiny_patch16_224", "moe": {}}},
            ("vit_tiny_patch16_224", {"depth": 2}),
        ),
    ],
)
def test_a_folder_s_architecture_and_arguments(tmp_path, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert architecture_of(f"local-dir:{tmp_path}", {"depth": 2}) == expected


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"architecture": "hf-hub:a/b"}', '{"architecture": 3}'])
def test_a_folder_without_a_model_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.name=local-dir:"):
        architecture_of(f"local-dir:{tmp_path}", {})


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with the one model me/model, at an address of this machine."""
    constants = pytest.importorskip("huggingface_hub").constants
    content = json.dumps(
        {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 3}, "pretrained_cfg": {}}
    ).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            is_there = self.path.startswith("/me/model/resolve/") and self.path.endswith("/config.json")
            self.send_response(200 if is_there else 404)
            for name, value in (
                ("X-Repo-Commit", "0" * 40), ("ETag", '"1"'), ("Content-Length", str(len(content) if is_there else 0)),
                ("X-Error-Code", "" if is_there else "RepoNotFound"),
            ):  # fmt: skip
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield
    server.shutdown()
    server.server_close()


def test_a_model_of_the_hub_is_known_by_timm_s_own_name(hub):
    """So that its checkpoint needs no hub."""
    assert architecture_of("hf-hub:me/model", {"drop_rate": 0.1}) == (
        "vit_tiny_patch16_224",
        {"depth": 3, "drop_rate": 0.1},
    )
    with pytest.raises(UserError, match=r"model\.name=hf-hub:me/other: its config\.json cannot be fetched"):
        architecture_of("hf-hub:me/other", {})
