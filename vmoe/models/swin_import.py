"""Imports checkpoints of Swin-MoE (Microsoft's Swin Transformer with Tutel's MoE layers) as timm models.

E experts; H hidden width of an expert; C width of a token; K choices per token.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from vmoe.errors import UserError
from vmoe.models.imported import ImportedModel
from vmoe.models.surgery import create_model
from vmoe.models.swin_architecture import GATE, SwinArchitecture
from vmoe.models.swin_files import EXPERTS, SwinFiles
from vmoe.moe import MoeConfig, moe_layers

MODEL_NAME = "swin_small_patch4_window7_224"  # timm's name; arguments make it any Swin
# MODEL.SWIN_MOE in the released models' configs, for options that the tensors do not show
RELEASED = {
    "TOP_VALUE": 1,
    "CAPACITY_FACTOR": 1.25,
    "NORMALIZE_GATE": False,
    "USE_BPR": True,
    "GATE_NOISE": 1.0,
    "MOE_DROP": 0.1,
    "AUX_LOSS_WEIGHT": 0.01,
    "IS_GSHARD_LOSS": False,
}
_RECOMPUTED = (".relative_coords_table", ".relative_position_index", ".attn_mask", "._num_global_experts")


def load_swin_moe_checkpoint(
    path: str | Path,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    img_size: int | None = None,
    window_size: int | None = None,
    slices_per_expert: int | None = None,
) -> nn.Module:
    """Loads a Swin-MoE of microsoft/Swin-Transformer, sparse or dense, into a timm SwinTransformer with MoE layers.

    The tensors give width, depth, heads, windows, experts, router, MoE layers, classifier and image size. Normalise
    images by the mean and standard deviation of ImageNet. Values become float32.

    Args:
        path: A file of the checkpoint, the folder that holds its files, or their common path (NAME of NAME.rank0, ...
            and NAME.master). Files of any number of ranks are merged.
        config: Options that the tensors do not show, by the names of Swin-MoE's configs: TOP_VALUE, CAPACITY_FACTOR,
            NORMALIZE_GATE, USE_BPR, GATE_NOISE, MOE_DROP, AUX_LOSS_WEIGHT, IS_GSHARD_LOSS. A mapping of some of them,
            or the path of a YAML config. Missing options are those of the released models.
        img_size: Side of the images in pixels; None keeps the checkpoint's. The position biases of other windows are
            computed by the checkpoint's own network.
        window_size: Side of the windows in tokens; None keeps the checkpoint's.
        slices_per_expert: Number of ranks per expert. The original rounds a capacity up to a multiple of it. None reads
            it from the files; one merged file does not show it.

    Returns:
        The model, in evaluation mode. As in the original, the tokens of the whole batch compete for capacity, even at
        evaluation.

    Raises:
        UserError: A file is missing, damaged or foreign, a tensor is missing, unknown or of a wrong shape, or an
            argument does not match the tensors.
    """
    return import_swin_moe_checkpoint(path, config, img_size, window_size, slices_per_expert).model


def import_swin_moe_checkpoint(
    path: str | Path,
    config: str | Path | Mapping[str, Any] | None = None,
    img_size: int | None = None,
    window_size: int | None = None,
    slices_per_expert: int | None = None,
) -> ImportedModel:
    """Like `load_swin_moe_checkpoint`, with the arguments to rebuild the model."""
    settings = read_settings(config)
    files = SwinFiles(path)
    architecture = SwinArchitecture(files)
    window_size = max(architecture.windows) if window_size is None else window_size
    side = architecture.image_size() if img_size is None else img_size
    windows = architecture.windows_at(side, window_size)
    moe = _moe_config(architecture, settings, slices_per_expert)
    kwargs = architecture.kwargs(window_size)
    try:
        with torch.random.fork_rng(devices=[]):
            model = create_model(
                MODEL_NAME,
                moe,
                img_size=side,
                num_classes=architecture.num_classes,
                pretrained_cfg_overlay={"input_size": (architecture.in_chans, side, side)},
                **kwargs,
            )
    except (ValueError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{files.path}: its tensors describe no model ({reason})") from error
    with torch.no_grad():
        _fill_model(model, files, architecture, windows)
    return ImportedModel(
        model.eval(),
        MODEL_NAME,
        kwargs,
        moe,
        (side, side),
        architecture.num_classes,
        IMAGENET_DEFAULT_MEAN,
        IMAGENET_DEFAULT_STD,
    )


def read_settings(config: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings of `RELEASED`, with those that a config of Swin-MoE changes.

    Raises:
        UserError: The config cannot be read, or a value or a name is not allowed.
    """
    if isinstance(config, str | Path):
        where = f"config={str(config)!r}"
        try:
            content = yaml.safe_load(Path(config).expanduser().read_text(encoding="utf-8"))
            given = content["MODEL"].get("SWIN_MOE", {})
            given = {name: value for name, value in given.items() if name in RELEASED}  # the tensors show the others
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: cannot be read as a config of Swin-MoE (MODEL.SWIN_MOE) in YAML") from error
    else:
        where, given = "config", dict(config or {})
    unknown = next((name for name in given if name not in RELEASED), None)
    if unknown is not None:
        raise UserError(f"{where}: {unknown} is no setting to give; the settings are {', '.join(RELEASED)}")
    for name, value in given.items():
        kinds = (int, float) if isinstance(RELEASED[name], float) else (type(RELEASED[name]),)
        if type(value) not in kinds or not math.isfinite(value):
            raise UserError(f"{where}: {name}={value!r} must be {'true or false' if bool in kinds else 'a number'}")
    return RELEASED | given


def _moe_config(
    architecture: SwinArchitecture, settings: dict[str, Any], slices_per_expert: int | None
) -> MoeConfig | None:
    """The MoE config from settings and tensors; None for a dense checkpoint."""
    if architecture.slices is None:
        return None
    first_of_stage = [sum(architecture.depths[:stage]) for stage in range(len(architecture.depths))]
    # with a negative factor Tutel takes the needed capacity, up to its absolute value: the same tokens are dropped
    num_experts, factor = architecture.num_experts, abs(settings["CAPACITY_FACTOR"])
    # Tutel divides the variance over experts by E - 1 instead of E
    weight = settings["AUX_LOSS_WEIGHT"] / 2 * num_experts / max(num_experts - 1, 1)
    is_gshard = settings["IS_GSHARD_LOSS"]
    is_cosine = architecture.router == "cosine"
    try:
        return MoeConfig(
            layers=[first_of_stage[stage] + block for stage, block in architecture.moe_blocks],
            num_experts=num_experts,
            router=architecture.router,
            top_k=settings["TOP_VALUE"],
            capacity_factor=factor or None,
            eval_capacity_factor=factor or None,
            capacity_rounding="tutel",
            capacity_multiple_of=architecture.slices.per_expert if slices_per_expert is None else slices_per_expert,
            batch_priority=settings["USE_BPR"],
            group="batch",
            noise_std=settings["GATE_NOISE"],
            renormalize=settings["NORMALIZE_GATE"] and settings["TOP_VALUE"] > 1,
            expert_dropout=settings["MOE_DROP"],
            importance_loss_weight=0.0 if is_gshard else weight,
            load_loss_weight=0.0 if is_gshard else weight,
            gshard_loss_weight=settings["AUX_LOSS_WEIGHT"] if is_gshard else 0.0,
            cosine_dim=architecture.cosine_dim if is_cosine else None,
            cosine_bias=is_cosine,
        )
    except ValueError as error:
        raise UserError(f"{architecture.path}: {error}") from error


def _fill_model(model: nn.Module, files: SwinFiles, architecture: SwinArchitecture, windows: list[int]) -> None:
    """Copies all values of the checkpoint into the model.

    Raises:
        UserError: The checkpoint does not have exactly the model's tensors.
    """
    own = model.state_dict()
    filled = _fill_experts(model, files, architecture)
    for attention in {name.rpartition(".cpb_mlp.")[0] for name in files.tensors if ".cpb_mlp." in name}:
        stage = int(attention.split(".")[1])
        table = architecture.position_bias(attention, stage, windows[stage])
        filled |= {_copy(files.path, own, f"{attention}.relative_position_bias_table", table, attention)}
    for name, value in files.tensors.items():
        if ".cpb_mlp." not in name and not name.endswith(_RECOMPUTED):
            filled |= {_copy(files.path, own, *_in_timm(name, value), name)}
    for name in own.keys() - filled:
        if not name.endswith(".mlp.fc2.bias"):  # Swin-MoE's dense MLPs do not have it
            raise UserError(f"{files.path}: lacks what timm calls {name}; is it a checkpoint of Swin-MoE?")
        own[name].zero_()


def _in_timm(name: str, value: Tensor) -> tuple[str, Tensor]:
    """The name and the value of a tensor in timm's model."""
    block, gate, part = name.partition(GATE)
    if not gate:
        name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) + 1}.downsample.", name)
        return re.sub(r"^head\.", "head.fc.", name), value
    router = f"{block}.mlp.router"
    if part == "sim_matrix":
        return f"{router}.gate.weight", value.t()
    if part == "temperature":  # Tutel multiplies by its exponential, at most 100
        return f"{router}.temperature", value.float().neg().exp().reshape(())
    names = {
        "wg.weight": "gate.weight",
        "cosine_projector.weight": "projection.weight",
        "cosine_projector.bias": "projection_bias",
    }
    return f"{router}.{names.get(part, part)}", value


def _copy(path: Path, own: dict[str, Tensor], name: str, value: Tensor, original: str) -> str:
    if name not in own:
        raise UserError(f"{path}: holds {original}, which this model does not have; it is of a kind not supported")
    if own[name].shape != value.shape:
        raise UserError(
            f"{path}: {original} has shape {tuple(value.shape)}, but the others ask for {tuple(own[name].shape)}"
        )
    own[name].copy_(value)
    return name


def _fill_experts(model: nn.Module, files: SwinFiles, architecture: SwinArchitecture) -> set[str]:
    """Copies the experts of all ranks, and returns the names of the filled tensors."""
    if architecture.slices is None:
        unknown = sorted(files.experts(0))
        if unknown:
            raise UserError(f"{files.path}: holds {unknown[0]}, but no router for it")
        return set()
    layers = dict(moe_layers(model))
    for rank in range(len(files.ranks)):
        left = files.experts(rank)
        for name, layer in layers.items():
            original = name.removesuffix(".mlp") + EXPERTS
            targets = _slices_of(layer.experts, architecture, rank)
            if rank == 0 and f"{original}batched_fc2_bias" not in left:
                bias = layer.experts.fc2.bias
                assert bias is not None  # all experts that replace timm's MLPs have biases
                _fill_frozen_bias(files, f"{original}batched_fc2_bias", bias)
            for part, target in targets.items():
                value = left.pop(f"{original}{part}", None)
                if value is None and part == "batched_fc2_bias":
                    continue
                if value is None:
                    raise UserError(f"{files.ranks[rank]}: lacks {original}{part}")
                value = value.flatten(1) if part.endswith("bias") else value
                if part == "batched_fc2_bias":
                    value = value[:, : target.shape[1]]  # slices are padded if they do not divide the width
                if value.shape != target.shape:
                    raise UserError(
                        f"{files.ranks[rank]}: {original}{part} has shape {tuple(value.shape)}, but the others ask for "
                        f"{tuple(target.shape)}"
                    )
                target.copy_(value)
        if left:
            raise UserError(f"{files.ranks[rank]}: holds {min(left)}, which this model does not have")
    return {f"{name}.experts.{each}" for name, layer in layers.items() for each in layer.experts.state_dict()}


def _slices_of(experts: Any, architecture: SwinArchitecture, rank: int) -> dict[str, Tensor]:
    """The part of a layer's experts in the file of a rank, as views in the original's layout."""
    slices = architecture.slices
    assert slices is not None  # every model with experts has slices
    expert, part = divmod(rank, slices.per_expert)
    part_width = experts.fc1.weight.shape[1] // slices.per_expert
    rows = slice(expert * slices.experts, (expert + 1) * slices.experts)
    hidden = slice(part * part_width, (part + 1) * part_width)
    width = math.ceil(experts.fc2.bias.shape[1] / slices.per_expert)
    return {
        "batched_fc1_w": experts.fc1.weight[rows, hidden],
        "batched_fc2_w": experts.fc2.weight[rows, :, hidden].transpose(1, 2),
        "batched_fc1_bias": experts.fc1.bias[rows, hidden],
        "batched_fc2_bias": experts.fc2.bias[rows, part * width : (part + 1) * width],
    }


def _fill_frozen_bias(files: SwinFiles, name: str, bias: Tensor) -> None:
    """Fills a frozen last bias of experts: it is zero, and the master file has one rank's."""
    value = files.frozen.get(name)
    if value is None:
        bias.zero_()
        return
    value = value.flatten(1)
    if value.shape != bias.shape and value.any():
        raise UserError(f"{files.path}: {name} has shape {tuple(value.shape)}, but is needed for all experts")
    bias.copy_(value if value.shape == bias.shape else torch.zeros_like(bias))
