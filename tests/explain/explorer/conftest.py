"""Small untrained V-MoEs and batches for them."""

import pytest
import timm
import torch

import vmoe
from vmoe import MoeConfig

SIZE = (16, 24)  # pixels: 4 x 6 patches


@pytest.fixture
def make_model():
    """A ViT of 5 classes for images of 16 x 24 pixels with MoE layers in blocks 1 and 3."""

    def make(router="token_choice", seed=0, dense=False, **knobs):
        torch.manual_seed(seed)
        options = knobs.pop("model", {})
        knobs = {"num_experts": 4, "top_k": 2, "router": router} | knobs
        if router in ("expert_choice", "soft"):
            knobs["capacity_factor"] = 1.0
            knobs.pop("top_k")
        shape = {"img_size": SIZE, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 5}
        moe = None if dense else MoeConfig(**knobs)
        return vmoe.create_model("vit_tiny_patch16_224", moe, **shape, **options).eval()

    return make


@pytest.fixture
def make_swin():
    """A Swin of two stages with windows, for images of 32 pixels: MoE layers on 8 x 8 and 4 x 4 places."""

    def make():
        torch.manual_seed(0)
        shape = {
            "img_size": 32,
            "patch_size": 4,
            "window_size": 4,
            "embed_dim": 16,
            "depths": (2, 2),
            "num_heads": (2, 2),
        }
        model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **shape)
        return vmoe.sparsify(model, MoeConfig(num_experts=4, top_k=1)).eval()

    return make


@pytest.fixture
def make_batches():
    """Batches of random images and labels, in a list."""

    def make(count=60, size=SIZE, batch=16, classes=5):
        generator = torch.Generator().manual_seed(3)
        images = torch.randn(count, 3, *size, generator=generator)
        labels = torch.randint(0, classes, (count,), generator=generator)
        return list(zip(images.split(batch), labels.split(batch), strict=True))

    return make
