"""A model as an HTTP service on LitServe: it checks uploads one by one, and answers them in batches.

Nothing is dropped at evaluation, so an answer does not depend on the other images of its batch. Other models are
refused.
"""

import logging
import multiprocessing
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import litserve
from fastapi import Depends, Header, HTTPException, Request
from litserve.loops import BatchedLoop
from starlette.middleware.cors import CORSMiddleware

from vmoe.checkpoints.source import local_path
from vmoe.errors import UserError
from vmoe.serve.api_description import describe_api
from vmoe.serve.uploads import Upload, UploadReader, read_upload
from vmoe.version import __version__

if TYPE_CHECKING:
    import numpy as np
    import torch

    from vmoe.checkpoints import TrainedModel

KEY_VARIABLE = "VMOE_API_KEY"
BATCH_WAIT = 0.002  # seconds to wait for further images of a batch
MAX_CONNECTIONS = 128  # each may hold a request in memory


class ModelService(litserve.LitAPI):
    """Answers uploads with a model. Only the worker opens the model and imports torch, which takes seconds.

    Args:
        path: A path for `load_predictor`.
        device: Returns the model's device, in the worker.
        max_batch: Images per batch.

    Attributes:
        started: The worker's message after opening the model: a description of it, or an error line.
    """

    def __init__(self, path: str | Path, device: Callable[[], "torch.device"], max_batch: int) -> None:
        # with `max_batch` 1 LitServe's own loop would call `predict` with a single upload instead of a list
        super().__init__(max_batch_size=max_batch, batch_timeout=BATCH_WAIT, loop=BatchedLoop())
        self.path, self.runs_on = path, device
        self.started = multiprocessing.get_context("spawn").SimpleQueue()
        self.model: TrainedModel | None = None

    def setup(self, device: str) -> None:
        """Opens the model in a worker. The worker ignores Ctrl-C, so that it gives its last answer."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        from vmoe.export.predictor import load_predictor

        try:
            where = self.runs_on()
            self.model = load_predictor(self.path, where)
            self.started.put(_describe(self.path, self.model) | {"device": str(where)})
        except UserError as error:
            self.started.put(str(error))
            logging.getLogger("litserve").setLevel(logging.CRITICAL)  # it would print a traceback
            raise

    def authorize(self, request: Request, x_api_key: Annotated[str, Header()] = "") -> None:
        """Refuses requests without the key of the environment. /health needs no key."""
        key = os.environ.get(KEY_VARIABLE, "")
        if key and request.url.path != "/health" and not _is_key(x_api_key, key):
            raise HTTPException(401, "X-API-Key: this header must hold the server's key")

    def decode_request(self, request: Annotated[Upload, Depends(read_upload)]) -> Upload:
        """Passes on the result of `read_upload`, which ran in the process that received the request."""
        return request

    def batch(self, inputs: list[Upload]) -> list[Upload]:
        """Returns the uploads unchanged, since `predict` stacks them."""
        return inputs

    def predict(self, uploads: list[Upload]) -> list[dict[str, Any]]:
        """The answers to a batch."""
        from vmoe.checkpoints.prediction import most_probable

        names = self.model.class_names
        pixels = [upload.pixels for upload in uploads]
        # Of a model with channels their values are fractions already
        depth = None if self.model.channels is None else 1
        found = self.model.predict(pixels, batch_size=len(pixels), bit_depth=depth, progress=False)
        answers: list[dict[str, Any]] = [
            {"predictions": most_probable(row, names, upload.top)}
            for upload, row in zip(uploads, found.probabilities, strict=True)
        ]
        if found.multi_label:
            for answer, labels in zip(answers, found.labels, strict=True):
                answer["labels"] = labels
        for upload, answer in zip(uploads, answers, strict=True):
            if upload.routing:
                answer["routing"] = _routing_answer(self.model, upload.pixels)
        return answers


class _Server(litserve.LitServer):
    """A LitServe server that accepts requests once the worker has opened the model."""

    def __init__(self, service: ModelService, when_ready: Callable[[], None], **options: Any) -> None:
        super().__init__(service, **options)
        self._when_ready = when_ready

    def verify_worker_status(self) -> None:
        """Waits until the worker has opened the model.

        Raises:
            UserError: It could not open the model, or died.
        """
        service = self.lit_api
        while service.started.empty():
            if not any(worker.is_alive() for worker in self.inference_workers) and service.started.empty():
                raise UserError(f"{service.path}: the worker ended while it opened it; its reason stands above")
            time.sleep(0.02)
        about = service.started.get()
        if isinstance(about, str):
            raise UserError(about)
        super().verify_worker_status()
        self.model_metadata = {key: about[key] for key in ("classes", "image_size")} | {"vmoe": __version__}
        prepared = about["image_size"], about["crop"], len(about["classes"]), about["bit_depth"]
        self.app.state.uploads = UploadReader(*prepared, about["why_no_routing"], about["channels"])
        self.devices = [about["device"]]  # /info reports it
        pictures = about["image_size"], about["crop"]
        described = describe_api(about["classes"], *pictures, self.max_payload_size, about["channels"])
        self.app.openapi = lambda: described
        self._when_ready()


def _is_key(header: str, key: str) -> bool:
    """Whether a header (bytes read as latin-1) is the key in UTF-8, compared in constant time."""
    return secrets.compare_digest(header.encode("latin-1"), key.encode())


def serve(
    path: str | Path,
    device: Callable[[], "torch.device"],
    host: str,
    port: int,
    max_batch: int,
    max_bytes: int,
    origins: Sequence[str] = (),
    when_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serves a model until SIGINT or SIGTERM. It stops after the last answer.

    Args:
        path: A path for `load_predictor`.
        device: Returns the model's device. It is pickled and called in the worker, which alone imports torch.
        host: The address to listen on: "127.0.0.1", "0.0.0.0" or "::".
        port: 1024 to 65535.
        max_batch: The most images per batch.
        max_bytes: The most bytes of a request.
        origins: Origins of pages that may send requests from a browser (CORS), such as "https://example.org"; "*" for
            all.
        when_ready: Called when the model is open and requests are answered.

    Raises:
        UserError: The model cannot be opened, its answers depend on the other images of a batch, the port is taken, or
            the worker died.
    """
    if not local_path(path).exists():  # and fetches it here, once, where it is elsewhere
        raise UserError(f"{path}: no such file; give a checkpoint, a run's folder or an ONNX file")
    _check_port(host, port)
    server = _Server(
        ModelService(path, device, max_batch),
        when_ready,
        accelerator="cpu",  # only LitServe's label: the worker chooses its device itself
        devices=1,
        max_payload_size=max_bytes,
    )
    for route in server.app.routes:
        if "GET" in (methods := getattr(route, "methods", None) or ()):
            methods.add("HEAD")  # load balancers use it for /health
    if origins:
        headers = ["Content-Type", "X-API-Key"]
        server.app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=headers)
    _stop_on_signals()
    try:
        server.run(
            host=host,
            port=port,
            log_level="warning",
            generate_client_file=False,
            limit_concurrency=MAX_CONNECTIONS,
        )
    except (EOFError, ConnectionError) as error:  # LitServe ends like this when a worker has died
        raise UserError(f"{path}: the worker died; had it enough memory?") from error
    finally:
        for child in multiprocessing.active_children():  # left if it was stopped during its start
            child.terminate()


def _stop_on_signals() -> None:
    """Makes SIGTERM stop LitServe as Ctrl-C does, and the process for requests exit without a traceback."""
    main = os.getpid()

    def stop(*_: Any) -> None:
        logging.getLogger("litserve").setLevel(logging.CRITICAL)  # its monitor of the workers fails on ended processes
        raise KeyboardInterrupt if os.getpid() == main else SystemExit(0)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def _describe(path: str | Path, model: "TrainedModel") -> dict[str, Any]:
    """The facts about a model that the processes for requests need, such as its classes and image size.

    Raises:
        UserError: An answer would depend on the other images of its batch.
    """
    from vmoe.export.predictor import Program
    from vmoe.moe import moe_layers
    from vmoe.moe.exportable import why_not_exportable

    layers = moe_layers(model)
    for name, layer in layers:
        if reason := why_not_exportable(layer.config):
            raise UserError(f"{path}: cannot be served: {name}: {reason}")
    silent = None if layers else "a dense model has no experts"
    if isinstance(model, Program):
        silent = "a program records no routing; serve the checkpoint it was made from"
    described = {"classes": model.class_names, "image_size": model.image_size, "crop": model.crop}
    return described | {"bit_depth": model.bit_depth, "channels": model.channels, "why_no_routing": silent}


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror} on {host}; choose another") from error


def _routing_answer(model: "TrainedModel", pixels: "np.ndarray") -> dict[str, Any]:
    """Per MoE layer: the patch grid, each expert's share of the choices, and the first choice of each patch."""
    from vmoe.explain.heatmap.routed import describe_layer, patch_part, route_image

    routed = route_image(model, pixels, model.image_size, model.mean, model.std, crop=model.crop)
    answer = {}
    for name, layer in routed.layers.items():
        facts = describe_layer(layer)
        first = patch_part(layer).chosen[0, :, 0].reshape(layer.grid).tolist()
        answer[name] = {"grid": facts["grid"], "choice_share": facts["choice_share"], "first_choice": first}
    return answer
