"""timm models with MoE layers, and what they cost."""

from vmoe.models.surgery import create_model, sparsify

__all__ = ["create_model", "sparsify"]
