"""`vmoe serve`, as its clients and its operator see it."""

import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
import zlib
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import local_hub

from vmoe.cli.benchmark import main as benchmark
from vmoe.cli.export import main as export
from vmoe.cli.serve import main
from vmoe.export.predictor import load_predictor

pytest.importorskip("litserve")
REPOSITORY = Path(__file__).parents[2]
SHIPPED = REPOSITORY / "assets" / "models" / "cifar100_tiny.safetensors"
KEY = "the kĕy"
ORIGIN = "https://example.org"
BOUND = 1e-6  # of a probability: as products of matrices of other sizes round


class Server:
    """A server in processes of its own."""

    def __init__(self, *options, model=SHIPPED):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "tools/serve.py", str(model), "--port", str(self.port), *options]
        environment = os.environ | {"VMOE_API_KEY": KEY, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=pipe, text=True)
        self.sent = threading.Semaphore(0)  # requests
        # However busy the machine is: the line comes, or the process ends.
        if not any(line.startswith("ready") for line in self.process.stdout):
            pytest.fail(f"did not start: {self.process.communicate()}")
        self.wait_for_health()

    def wait_for_health(self):
        """Until it answers, which is at once, or has ended."""
        while self.process.poll() is None:
            try:
                if self.ask("GET", "/health", key="")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.02)
        pytest.fail(f"ended: {self.process.communicate()}")

    def ask(self, method, path, body=b"", kind="application/json", key=KEY):
        """The status and the body of an answer."""
        answer, content = self.exchange(method, path, body, {"Content-Type": kind, "X-API-Key": key.encode()})
        return answer.status, content

    def exchange(self, method, path, body=b"", headers=None):
        """An answer and its body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            self.sent.release()
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()

    def predict(self, content, **fields):
        """The status and the answer to an upload by a form."""
        border = uuid.uuid4().hex
        parts = [f'--{border}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()]
        head = f'--{border}\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        body = "".join([*parts, head]).encode() + content + f"\r\n--{border}--\r\n".encode()
        status, answer = self.ask("POST", "/predict", body, f"multipart/form-data; boundary={border}")
        return status, json.loads(answer)

    def predict_json(self, body):
        status, answer = self.ask("POST", "/predict", body if isinstance(body, bytes) else json.dumps(body).encode())
        return status, json.loads(answer)

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait()


@pytest.fixture(scope="module")
def server():
    server = Server("--max-upload", "1", "--cors", ORIGIN)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def predictor():
    return load_predictor(SHIPPED, torch.device("cpu"))


def encoded(image: Image.Image, format="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(seed: int) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (*generator.integers(20, 60, 2), 3), dtype=np.uint8))


def bomb(side: int = 20_000) -> bytes:
    """A PNG of black pixels in few bytes: 50 KB of the side of 20,000."""

    def chunk(name, data):
        checked = name + data
        return len(data).to_bytes(4, "big") + checked + zlib.crc32(checked).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    data = zlib.compress(bytes((side // 8 + 1) * side))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def odd_pictures() -> dict[str, bytes]:
    frames = [Image.new("P", (20, 20), colour) for colour in range(3)]
    return {
        "1x1": encoded(Image.new("RGB", (1, 1), "red")),
        "30000x2": encoded(Image.new("RGB", (30000, 2), "blue")),
        "CMYK": encoded(Image.new("CMYK", (40, 50)), "JPEG"),
        "animated": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "photograph": encoded(noise(0), "WEBP"),
        "PGM": encoded(noise(0).convert("L"), "PPM"),
        "AVIF": encoded(noise(0), "AVIF"),
    }


@pytest.mark.parametrize("name", odd_pictures())
def test_odd_pictures_are_answered_as_by_predict(server, predictor, name):
    from vmoe.data.images import decode_image

    content = odd_pictures()[name]
    row = predictor.predict(decode_image(io.BytesIO(content), name)).probabilities[0]
    for status, answer in (
        server.predict(content, top=3),
        server.predict_json({"image": base64.b64encode(content).decode(), "top": 3}),
    ):
        assert status == 200
        order = (-row).argsort()[:3]
        assert [each["class"] for each in answer["predictions"]] == [predictor.class_names[index] for index in order]
        np.testing.assert_allclose([each["probability"] for each in answer["predictions"]], row[order], atol=BOUND)


def test_a_picture_is_decoded_as_the_format_that_was_checked(server):
    """Those bytes make Pillow, asked for any format, take the file for a Photo CD of 512 x 768 pixels."""
    hidden, plain = (
        encoded(noise(6), "WEBP", icc_profile=bytes(2010) + name + bytes(999)) for name in (b"PCD_", b"....")
    )
    assert hidden.index(b"PCD_") == 2048 and Image.open(io.BytesIO(hidden)).format == "PCD"
    assert server.predict(hidden) == server.predict(plain) and server.predict(plain)[0] == 200


def test_connections_are_bounded(server):
    content = encoded(noise(7))
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(128)]
    assert server.ask("POST", "/predict")[0] == 503
    for connection in held:
        connection.close()
    server.wait_for_health()
    assert server.predict(content)[0] == 200


def test_bad_requests_are_told_why(server):
    good = encoded(noise(1))
    for (status, answer), expected, told in (
        (server.predict(b"some text in a file called .jpg"), 415, "no image of a known format"),
        (server.predict(b""), 415, "no image of a known format"),
        (server.predict(good[: len(good) // 2]), 422, "cannot be read as an image"),
        (server.predict(bomb()), 413, "image: too many pixels"),
        (server.predict(bomb(9000)), 413, "image: too many pixels"),
        (server.predict(bytes(2**20 + 1)), 413, "too large"),
        (server.predict(good, top=0), 400, "top='0'"),
        (server.predict(good, routing="perhaps"), 400, "routing='perhaps'"),
        (server.predict_json(b"{"), 400, "the body must be JSON"),
        (server.predict_json(b"[" * 100_000), 400, "the body must be JSON"),
        (server.predict_json({"picture": ""}), 400, "the body must be JSON"),
        (server.predict_json({"image": "not base64!"}), 400, "the body must be JSON"),
    ):
        assert status == expected and told in answer["detail"], answer
    status, answer = server.ask("POST", "/predict", good, "image/png")
    assert status == 415 and "Content-Type 'image/png'" in json.loads(answer)["detail"]
    status, answer = server.ask("POST", "/predict", b"--x--", "multipart/form-data; boundary=x")
    assert status == 400 and "image: missing" in json.loads(answer)["detail"]


def test_the_key_is_asked_for(server):
    for key in ("", "another"):
        status, answer = server.ask("POST", "/predict", b"{}", key=key)
        assert status == 401 and "X-API-Key" in json.loads(answer)["detail"]
    assert server.ask("POST", "/predict", b"{}", key=KEY)[0] == 400
    assert server.ask("GET", "/info", key="")[0] == 401
    assert server.ask("GET", "/health", key="") == (200, b"ok")


def test_the_server_describes_itself(server):
    status, page = server.ask("GET", "/docs", key="")
    assert status == 200 and b"openapi.json" in page
    status, answer = server.ask("GET", "/openapi.json", key="")
    described = json.loads(answer)
    asked = described["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert status == 200 and set(asked) == {"multipart/form-data", "application/json"}
    for content in asked.values():
        assert set(content["schema"]["properties"]) == {"image", "top", "routing"}
    answers = described["paths"]["/predict"]["post"]["responses"]
    assert set(answers) == {"200", "400", "401", "413", "415", "422", "503"}
    schema = answers["200"]["content"]["application/json"]["schema"]
    _, found = server.predict(encoded(noise(8)), top=1, routing="true")
    assert set(found) == set(schema["properties"]) - {"labels"}  # which a model for several classes gives
    assert set(found["predictions"][0]) == set(schema["properties"]["predictions"]["items"]["properties"])
    told = json.loads(server.ask("GET", "/info")[1])
    assert len(told["model"]["classes"]) == 100 and told["server"]["devices"] == ["cpu"]
    layer = schema["properties"]["routing"]["additionalProperties"]["properties"]
    assert all(set(told) == set(layer) for told in found["routing"].values())


def test_load_balancers_and_browsers_may_ask(server):
    for path in ("/", "/health", "/info", "/docs"):
        answer, content = server.exchange("HEAD", path, headers={"X-API-Key": KEY.encode()})
        assert answer.status == 200 and content == b"", path
    assert server.exchange("HEAD", "/health")[0].status == 200
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    for origin, allowed in ((ORIGIN, ORIGIN), ("https://elsewhere.org", None)):
        answer, _ = server.exchange("OPTIONS", "/predict", headers={"Origin": origin} | preflight)
        assert answer.getheader("Access-Control-Allow-Origin") == allowed
        answer, _ = server.exchange("POST", "/predict", b"{}", {"Origin": origin, "X-API-Key": KEY.encode()})
        assert answer.status == 415 and answer.getheader("Access-Control-Allow-Origin") == allowed


def test_a_data_url_is_an_image(server):
    content = encoded(noise(9))
    plain = base64.b64encode(content).decode()
    expected = server.predict_json({"image": plain})
    assert expected[0] == 200
    for head in ("data:image/png;base64,", "data:;base64,", "DATA:image/png;charset=x;BASE64,"):
        assert server.predict_json({"image": head + plain}) == expected
    assert server.predict_json({"image": "data:image/png;base64," + plain.replace("+", "%2B")}) == expected
    for wrong in ("data:text/plain,hello", "data:image/png;base64", f"image/png;base64,{plain}", 7):
        status, answer = server.predict_json({"image": wrong})
        assert status == 400 and "data URL" in answer["detail"]


def test_routing_is_told(server, predictor):
    status, answer = server.predict(encoded(noise(2)), routing="true")
    assert status == 200 and list(answer["routing"]) == [f"blocks.{block}.mlp" for block in (1, 3, 5, 7)]
    for layer in answer["routing"].values():
        assert layer["grid"] == [8, 8] and np.shape(layer["first_choice"]) == (8, 8)
        assert len(layer["choice_share"]) == 8 and sum(layer["choice_share"]) == pytest.approx(1)


def test_an_answer_does_not_depend_on_its_batch(server):
    """Good and damaged uploads of many clients at once, beside the same one by one."""
    uploads = [encoded(noise(seed)) if seed % 4 else b"damaged" for seed in range(96)]
    alone = [server.predict(upload, top=10) for upload in uploads]
    with ThreadPoolExecutor(32) as clients:
        together = list(clients.map(lambda upload: server.predict(upload, top=10), uploads))
    assert [status for status, _ in together] == [200 if seed % 4 else 415 for seed in range(96)]
    for (_, found), (_, expected) in zip(together, alone, strict=True):
        assert found.keys() == expected.keys()
        found, expected = (
            {each["class"]: each["probability"] for each in answer.get("predictions", [])}
            for answer in (found, expected)
        )
        assert found == pytest.approx(expected, abs=BOUND)


def test_the_load_test(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VMOE_API_KEY", KEY)
    url = f"http://127.0.0.1:{server.port}"
    assert benchmark(["serve", "--url", url, "--clients", "1", "4", "--requests", "12", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "serve.json").read_text())["rows"]
    assert [(row["clients"], row["answered"], row["lost"]) for row in rows] == [(1, 12, 0), (4, 12, 0), (4, 12, 0)]
    assert all(0 < row["p50_ms"] <= row["p99_ms"] and row["rate"] > 0 for row in rows)
    monkeypatch.setenv("VMOE_API_KEY", "another")
    assert benchmark(["serve", "--url", url, "--clients", "1", "--requests", "3", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "serve.json").read_text())["rows"][0]["lost"] == 3
    capsys.readouterr()
    for address in ("http://127.0.0.1:1", "nowhere", "http://127.0.0.1:x"):
        assert benchmark(["serve", "--url", address]) == 2
        error = capsys.readouterr().err
        assert f"--url {address}: " in error and error.count("\n") == 1


@pytest.mark.slow
def test_none_of_1000_damaged_uploads_is_lost(server):
    good = encoded(noise(3))
    generator = np.random.default_rng(0)

    def damaged(seed):
        """Cut off, or with bytes changed, or both."""
        content = np.frombuffer(good, np.uint8).copy()
        content[generator.integers(8, len(content), 40)] ^= 255
        return content[: generator.integers(1, len(content))].tobytes()

    uploads = [damaged(seed) for seed in range(1000)]
    with ThreadPoolExecutor(32) as clients:
        answers = list(clients.map(server.predict, uploads))
    assert len(answers) == 1000 and {status for status, _ in answers} <= {413, 415, 422}
    assert all(answer["detail"] for _, answer in answers)
    assert server.predict(good)[0] == 200


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_large_pictures_are_decoded_one_at_a_time():
    server = Server()
    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(server.predict, [bomb(7992)] * 4))
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    status = [Path(f"/proc/{child}/status").read_text() for child in children]
    peaks = [int(line.split()[1]) / 2**20 for text in status for line in text.splitlines() if line.startswith("VmHWM")]
    server.stop()
    assert [status for status, _ in answers] == [200] * 4
    assert max(peaks) < 1.8, peaks  # GiB; one takes 0.9 besides what the server holds


@pytest.mark.slow
def test_a_program_is_served(tmp_path, save_run):
    pytest.importorskip("onnxscript")
    run, program, content = save_run(moe={"num_experts": 2}), tmp_path / "model.onnx", encoded(noise(5))
    assert export([str(run), "--format", "onnx", "--out", str(program)]) == 0
    server = Server(model=program)
    (status, answer), (refused, told) = server.predict(content, top=10), server.predict(content, routing="true")
    server.stop()
    predictor = load_predictor(run, torch.device("cpu"))
    row = predictor.predict(np.array(noise(5))).probabilities[0]
    expected = {
        name: pytest.approx(float(value), abs=1e-4) for name, value in zip(predictor.class_names, row, strict=True)
    }
    assert status == 200 and {each["class"]: each["probability"] for each in answer["predictions"]} == expected
    assert refused == 400 and "a program records no routing" in told["detail"]


@pytest.mark.slow
def test_a_model_of_the_hub_is_served_by_its_name(tmp_path, monkeypatch):
    with local_hub.serving({"me/model/model.safetensors": SHIPPED.read_bytes()}, tmp_path / "cache", monkeypatch):
        server = Server(model="hf-hub:me/model")
        status, answer = server.predict(encoded(noise(5)))
        server.stop()
    assert status == 200 and len(answer["predictions"]) == 5


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_after_the_last_answer(number):
    server = Server("--max-batch", "1")
    content = encoded(noise(4))
    server.sent = threading.Semaphore(0)  # counts from here
    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(server.predict, content, routing="true") for _ in range(8)]
        for _ in answers:
            server.sent.acquire()
        wait(answers, return_when=FIRST_COMPLETED)  # so the others have arrived, too
        code = server.stop(number)
    assert [answer.result()[0] for answer in answers] == [200] * 8
    assert code == 0 and server.process.stderr.read() == ""


def test_mistakes_are_one_line(save_run, tmp_path, capsys):
    moe = {"num_experts": 3, "layers": [1]}
    mixes = save_run("mixes", moe | {"eval_capacity_factor": 1.0, "group": "batch"})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        of_its_own = free.getsockname()[1]  # something else may serve at the default
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for arguments, told in (
            ([tmp_path / "nowhere"], "nowhere: no such file"),
            ([mixes, "--port", of_its_own], "makes a prediction depend on the other images of its batch"),
            ([SHIPPED, "--port", "80"], "--port"),
            ([SHIPPED, "--port", taken.getsockname()[1]], "Address already in use"),
            ([SHIPPED, "--host", "example.org"], "--host"),
            ([SHIPPED, "--max-upload", "0"], "--max-upload"),
            ([SHIPPED, "--cors", "example.org/page"], "--cors"),
        ):
            assert main(list(map(str, arguments))) == 2
            error = capsys.readouterr().err
            assert told in error and error.count("\n") == 1
