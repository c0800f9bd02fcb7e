"""Vision Mixture-of-Experts for PyTorch: sparse experts in any timm transformer (Riquelme et al. 2021)."""

import importlib
import sys
from pathlib import Path

try:
    importlib.import_module("torchvision")
except RuntimeError as error:  # such as "operator torchvision::nms does not exist"
    _line = "torchvision was built for another torch; install both anew: pip install --upgrade torch torchvision"
    _program = Path(sys.argv[0] if sys.argv else "").resolve()
    if _program.stem == "vmoe" or _program.parent == Path(__file__).resolve().parents[1] / "tools":
        print(f"vmoe: error: {_line}", file=sys.stderr)  # a command, which tells mistakes in a line
        raise SystemExit(2) from None
    raise ImportError(_line) from error

from vmoe.analysis.recording import record_routing
from vmoe.models import create_model, densify, load_jax_checkpoint, sparsify
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
from vmoe.version import __version__

__all__ = [
    "MoeConfig",
    "MoeMlp",
    "__version__",
    "auxiliary_loss",
    "create_model",
    "densify",
    "load_jax_checkpoint",
    "moe_layers",
    "record_routing",
    "set_auxiliary_scale",
    "set_eval_capacity_factor",
    "set_top_k",
    "sparsify",
    "update_router_biases",
]
