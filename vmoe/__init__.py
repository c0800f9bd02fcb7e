"""Vision Mixture-of-Experts for PyTorch: sparse experts in any timm transformer (Riquelme et al. 2021)."""

from typing import TYPE_CHECKING

from vmoe.imports import names_on_demand, register_with_timm
from vmoe.version import __version__

if TYPE_CHECKING:
    from vmoe.checkpoints import TrainedModel, load, save
    from vmoe.data import ImageDataModule, prepare_image
    from vmoe.evaluation.calibration import calibrate
    from vmoe.evaluation.evaluate import evaluate
    from vmoe.evaluation.super_classes import super_classes
    from vmoe.explain.heatmap.files import write_heatmaps
    from vmoe.models import (
        add_lora,
        create_model,
        densify,
        freeze,
        load_jax_checkpoint,
        load_swin_moe_checkpoint,
        merge_lora,
        sparsify,
    )
    from vmoe.moe import (
        MoeConfig,
        MoeMlp,
        auxiliary_loss,
        moe_layers,
        set_auxiliary_scale,
        set_eval_capacity_factor,
        set_top_k,
        update_router_biases,
    )
    from vmoe.routing.recording import record_routing
    from vmoe.training.callbacks import Ema, ExactResume, GradualUnfreezing, NanGuard, RoutingMonitor
    from vmoe.training.classifier import Classifier
    from vmoe.training.fit import fit
    from vmoe.training.run.finding import find_batch_size, find_lr
    from vmoe.training.tuning import tune
else:  # hidden from type checkers, which would accept any name
    from vmoe.moe import CONTROL_NAMES

    __getattr__ = names_on_demand(
        __name__,
        {
            "vmoe.evaluation.calibration": ["calibrate"],
            "vmoe.evaluation.evaluate": ["evaluate"],
            "vmoe.evaluation.super_classes": ["super_classes"],
            "vmoe.explain.heatmap.files": ["write_heatmaps"],
            "vmoe.routing.recording": ["record_routing"],
            "vmoe.checkpoints": ["TrainedModel", "load", "save"],
            "vmoe.data": ["ImageDataModule", "prepare_image"],
            "vmoe.training.callbacks": ["Ema", "ExactResume", "GradualUnfreezing", "NanGuard", "RoutingMonitor"],
            "vmoe.training.classifier": ["Classifier"],
            "vmoe.training.fit": ["fit"],
            "vmoe.training.run.finding": ["find_batch_size", "find_lr"],
            "vmoe.training.tuning": ["tune"],
            "vmoe.models": [
                "add_lora",
                "create_model",
                "densify",
                "freeze",
                "load_jax_checkpoint",
                "load_swin_moe_checkpoint",
                "merge_lora",
                "sparsify",
            ],
            "vmoe.moe": ["MoeConfig", "MoeMlp", *CONTROL_NAMES],
        },
        inner=["data", "evaluation", "models", "moe", "routing"],
    )

__all__ = [
    "Classifier",
    "Ema",
    "ExactResume",
    "GradualUnfreezing",
    "ImageDataModule",
    "MoeConfig",
    "MoeMlp",
    "NanGuard",
    "RoutingMonitor",
    "TrainedModel",
    "__version__",
    "add_lora",
    "auxiliary_loss",
    "calibrate",
    "create_model",
    "densify",
    "evaluate",
    "find_batch_size",
    "find_lr",
    "fit",
    "freeze",
    "load",
    "load_jax_checkpoint",
    "load_swin_moe_checkpoint",
    "merge_lora",
    "moe_layers",
    "prepare_image",
    "record_routing",
    "save",
    "set_auxiliary_scale",
    "set_eval_capacity_factor",
    "set_top_k",
    "sparsify",
    "super_classes",
    "tune",
    "update_router_biases",
    "write_heatmaps",
]

register_with_timm()
