"""timm models with MoE layers, and their costs."""

from typing import TYPE_CHECKING

from vmoe.imports import names_on_demand
from vmoe.models import registry  # registers the named models in timm
from vmoe.models.densify import densify
from vmoe.models.freezing import freeze
from vmoe.models.lora import add_lora, merge_lora
from vmoe.models.surgery import create_model, sparsify

if TYPE_CHECKING:
    from vmoe.models.jax_import import load_jax_checkpoint
    from vmoe.models.swin_import import load_swin_moe_checkpoint
else:  # the JAX importer needs msgpack, from the extra `jax`
    __getattr__ = names_on_demand(
        __name__,
        {
            "vmoe.models.jax_import": ["load_jax_checkpoint"],
            "vmoe.models.swin_import": ["load_swin_moe_checkpoint"],
        },
    )

__all__ = [
    "add_lora",
    "create_model",
    "densify",
    "freeze",
    "load_jax_checkpoint",
    "load_swin_moe_checkpoint",
    "merge_lora",
    "registry",
    "sparsify",
]
