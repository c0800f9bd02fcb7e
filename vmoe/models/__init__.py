"""timm models with MoE layers, and what they cost."""

from vmoe.models import registry  # registers the named models in timm
from vmoe.models.densify import densify
from vmoe.models.jax_import import load_jax_checkpoint
from vmoe.models.surgery import create_model, sparsify

__all__ = ["create_model", "densify", "load_jax_checkpoint", "registry", "sparsify"]
