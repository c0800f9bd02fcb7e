"""Exports a V-MoE as an ONNX program for the demo page. It returns its routing, and its inputs can change it.

L MoE layers; B images of N tokens; G groups, which are images, of S = N tokens; E experts; K choices per token.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vmoe.checkpoints import TrainedModel
from vmoe.checkpoints.program import program_metadata
from vmoe.errors import UserError
from vmoe.export.layer import ExportedMoe, MakeLinear, exportable_copy
from vmoe.export.programs import TOLERANCE, make_attention_plain, quiet, reason_of, write_onnx
from vmoe.moe import MoeMlp, moe_layers
from vmoe.moe.assignment import Capacity, assign
from vmoe.moe.groups import Groups
from vmoe.moe.routers import token_choice
from vmoe.routing.recording import LayerRouting, record_routing

STEERABLE_ROUTERS = ("token_choice", "cosine")
INPUTS = ("images", "bias", "capacity_factor")
OFF = -1e9  # added to an expert's score to switch it off: its gate becomes 0


class SteeredMoe(ExportedMoe):
    """A MoE layer with experts that can be switched off and a capacity that is an input.

    Attributes:
        controls: For the next call: "bias_E", which is added to the router's scores, and "capacity_factor" ().
        decisions: From the last call: gates (G, S, E), chosen experts (G, S, K), and kept choices (G, S, K).
    """

    def __init__(self, layer: MoeMlp, make_linear: MakeLinear) -> None:
        super().__init__(layer, make_linear)
        self.controls: dict[str, Tensor] = {}
        self.decisions: list[Tensor] = []

    def _routed(self, x_TD: Tensor, groups: Groups, valid_GS: Tensor | None) -> Tensor:
        moe = self.config
        scores_GSE = groups.split(self.router.scores(x_TD)[0] + self.controls["bias_E"])
        routing = token_choice(scores_GSE, scores_GSE, groups, moe.top_k, moe.renormalize, valid_GS)
        capacity = Capacity.by_tensor(groups, moe, self.controls["capacity_factor"])
        routing = assign(routing, capacity, moe.batch_priority, exportable=True)
        self.decisions[:] = [routing.gates_GSE, routing.chosen_GSK.to(torch.int32), routing.kept_GSK.to(torch.int32)]
        return self._by_choices(x_TD, routing)


class SteeredModel(nn.Module):
    """A model as a function of images, a bias per expert and a capacity factor per layer.

    Args:
        model: A V-MoE with token choice. It is not changed.

    Raises:
        ValueError: It cannot be exported, or has no such layers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        layers = moe_layers(model)
        if not layers:
            raise ValueError("a dense model without experts; give a V-MoE's checkpoint")
        for name, layer in layers:
            if layer.config.router not in STEERABLE_ROUTERS:
                raise ValueError(
                    f"{name}: its router is {layer.config.router}; the page knows {', '.join(STEERABLE_ROUTERS)}"
                )
            if layer.images is not None:
                raise ValueError(f"{name}: route=image; the page draws where patches go, and knows route=patch alone")
            if layer.config.ensemble > 1:
                raise ValueError(f"{name}: ensemble={layer.config.ensemble}; the page knows single models alone")
        self.model = exportable_copy(model, layer_type=SteeredMoe)
        make_attention_plain(self.model)
        self.names = [name for name, _ in layers]

    def forward(self, images: Tensor, bias_LE: Tensor, capacity_factor_L: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, classes), then gates (B, N, E), chosen (B, N, K) and kept (B, N, K) of each layer.

        Args:
            images: (B, 3, size, size), normalised.
            bias_LE: 0 or `OFF`, added to the routers' scores.
            capacity_factor_L: Above 0; with E / K or more nothing is dropped.
        """
        steered = [self.model.get_submodule(name) for name in self.names]
        for layer, bias_E, factor in zip(steered, bias_LE.unbind(0), capacity_factor_L.unbind(0), strict=True):
            layer.controls |= {"bias_E": bias_E, "capacity_factor": factor}
        logits = self.model(images)
        decisions = [part for layer in steered for part in layer.decisions]
        for layer in steered:
            layer.controls.clear()
            layer.decisions.clear()
        return logits, *decisions


def write_steered(path: Path, checkpoint: TrainedModel) -> dict[str, Any]:
    """Writes a checkpoint as an ONNX program with the inputs and outputs of `SteeredModel`.

    Returns:
        A description for its user: `program_metadata`, and the layers with their grids, E, K and capacity factor.

    Raises:
        UserError: The model cannot be exported in this form.
    """
    try:
        steered = SteeredModel(checkpoint.model).eval()
        layers = _layers(checkpoint)
        size, experts = checkpoint.image_size, layers[0]["num_experts"]
        example = torch.zeros(2, 3, size, size), torch.zeros(len(layers), experts), torch.ones(len(layers))
        batch = torch.export.Dim("batch", min=1)
        about = {**program_metadata(checkpoint.facts), "layers": layers, "off": OFF}
        outputs = [f"{part}_{index}" for index in range(len(layers)) for part in ("gates", "chosen", "kept")]
        with quiet():
            program = torch.export.export(steered, example, dynamic_shapes=({0: batch}, None, None))
            write_onnx(path, program, about, list(INPUTS), ["logits", *outputs])
    except OSError:
        raise
    except Exception as error:  # exporters raise many types
        raise UserError(f"{checkpoint.path}: cannot be shown: {reason_of(error)}") from error
    _compare_logits(path, checkpoint, layers)
    return about


@torch.no_grad()
def _compare_logits(path: Path, checkpoint: TrainedModel, layers: list[dict[str, Any]]) -> None:
    """Compares the program's logits, with the model's own capacity and all experts on, with the model's."""
    import onnxruntime

    size = checkpoint.image_size
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    settings = torch.zeros(len(layers), layers[0]["num_experts"]), torch.tensor([e["capacity_factor"] for e in layers])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    fed = {name: value.numpy() for name, value in zip(INPUTS, (images, *settings), strict=True)}
    expected = checkpoint.model(images)
    difference = (torch.from_numpy(session.run(["logits"], fed)[0]) - expected).abs().max()
    worst = float(difference / expected.abs().max().clamp_min(1))
    if not worst <= TOLERANCE:  # NaN included
        raise UserError(f"{checkpoint.path}: logits of its program differ by {worst:.2g}; nothing is written")


@torch.no_grad()
def _layers(checkpoint: TrainedModel) -> list[dict[str, Any]]:
    model, size = checkpoint.model, checkpoint.image_size
    with record_routing(model) as trace:
        model(torch.zeros(1, 3, size, size))
    layers = dict(moe_layers(model))
    return [_layer(name, layers[name], routing) for name, routing in trace.layers.items()]


def _layer(name: str, layer: MoeMlp, routing: LayerRouting) -> dict[str, Any]:
    moe, tokens = layer.config, routing.gates.shape[1]
    order = routing.on_grid(torch.arange(tokens)[None, :, None])
    return {
        "name": name,
        "grid": list(routing.grid),
        "tokens": tokens,
        "patches": order.flatten().tolist(),  # the token of each patch, row by row
        "num_experts": moe.num_experts,
        "top_k": moe.top_k,
        "batch_priority": moe.batch_priority,
        "capacity_factor": layer_factor(layer, tokens),
    }


def layer_factor(layer: MoeMlp, tokens: int) -> float:
    """The capacity factor that gives a layer its number of slots at evaluation; E / K if nothing is dropped."""
    moe = layer.config
    capacity = Capacity.of_pass(Groups(1, tokens, tokens, tokens), None, moe, is_training=False)
    slots_per_token = 1 if capacity is None else capacity.most / tokens
    return slots_per_token * moe.num_experts / moe.top_k
