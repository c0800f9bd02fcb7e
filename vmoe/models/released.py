"""The sparse vision models that others have released, by name: the addresses of their files, and further facts.

Each value is the publisher's own, from the model's `source`. A value that no source gives is None.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

_BUCKET = "https://storage.googleapis.com/vmoe_checkpoints/"  # gs://vmoe_checkpoints over HTTPS
_RELEASE = "https://github.com/SwinTransformer/storage/releases/download/v2.0.2/"
_VMOE = "https://github.com/google-research/vmoe"
_SWIN = "https://github.com/microsoft/Swin-Transformer"
_HALF = (0.5, 0.5, 0.5)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Names = Literal["imagenet-1k", "imagenet-21k", "imagenet-22k", "cifar100"]


@dataclass(frozen=True)
class ReleasedModel:
    """A model that others have released.

    Attributes:
        kind: The format of its files: "jax" (google-research/vmoe) or "swin" (microsoft/Swin-Transformer).
        address: The HTTPS address of its files: their common prefix ("jax"), or a .zip ("swin").
        description: A short description.
        backbone: timm's name and arguments to build the same architecture.
        moe: The fields of `MoeConfig` that are not in the files, or that the same architecture needs.
        image_size: Side of its images in pixels.
        num_classes: Number of classes.
        parameters: Number of parameters of this package's model, in all and active for one token.
        names: The kind of class names.
        capacity_factor: The publisher's factor in training, or None.
        eval_capacity_factor: The factor of the publisher's measurement; None if no source gives it, or if it is dense.
        crop: How pictures of another shape are fitted: "centre" or "squash".
        crop_share: The side of the central square as a share of the resized picture's shorter side.
        interpolation: The interpolation with which the publisher resizes pictures.
        mean: Mean of each channel for normalisation, for pixels in [0, 1].
        std: Standard deviation of each channel, as for `mean`.
        accuracy: The published top-1 accuracy in per cent on `measured_on`; None if no source gives it.
        measured_on: The data and the method of the measurement.
        license: The licence of the publisher's repository.
        source: The source of these facts.
        paper: Its number at arXiv.
    """

    kind: Literal["jax", "swin"]
    address: str
    description: str
    backbone: tuple[str, dict[str, Any]]
    moe: dict[str, Any] | None
    image_size: int
    num_classes: int
    parameters: tuple[int, int]
    names: Names
    capacity_factor: float | None
    eval_capacity_factor: float | None
    crop: Literal["centre", "squash"]
    crop_share: float
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    accuracy: float | None
    measured_on: str
    license: str
    source: str
    paper: str

    @property
    def file(self) -> str:
        """The publisher's name: the prefix of its files, or the .zip without its suffix."""
        return self.address.rpartition("/")[2].removesuffix(".zip")

    @property
    def members(self) -> int:
        """The number of members of an ensemble in one model; else 1."""
        return (self.moe or {}).get("ensemble", 1)

    @property
    def digest(self) -> str:
        """A text that changes with any fact in the converted file."""
        facts = {name: value for name, value in vars(self).items() if name not in ("description", "source")}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]

    def class_names(self) -> list[str]:
        """The classes in the order of the logits: WordNet's words, with its number (ImageNet's) in brackets."""
        if self.names == "cifar100":
            return CIFAR100.split()
        from timm.data import ImageNetInfo  # here: reading the table does not need it

        info = ImageNetInfo("imagenet-1k" if self.names == "imagenet-1k" else "imagenet-21k-goog")
        names = [f"{info.label_name_to_description(synset)} ({synset})" for synset in info.label_names()]
        if self.names == "imagenet-22k":
            # The publisher's own map to ImageNet-1k has the order of Google's list up to its last index, not of
            # timm's list of 21841. Two of the later classes are missing there, and no source gives which.
            names = names[: _LAST_KNOWN_OF_22K + 1]
            names += [str(index) for index in range(len(names), self.num_classes)]
        return names


_LAST_KNOWN_OF_22K = 21817  # the largest index in data/map22kto1k.txt of microsoft/Swin-Transformer
CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""

_SMALL_32 = {"patch_size": 32, "embed_dim": 512, "depth": 8, "num_heads": 8}
_BASE_16 = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
_LAST_2 = {"layers": [5, 7], "num_experts": 8, "top_k": 2, "group": 8}
_EVERY_2 = {"layers": [1, 3, 5, 7, 9, 11], "num_experts": 8, "top_k": 2, "group": 8}
_CONFIGS = f"{_VMOE}/blob/main/vmoe/configs"
_OF_SEEDS = "the mean of 3 seeds, of which one was released"

_jax = partial(
    ReleasedModel,
    kind="jax",
    names="imagenet-1k",
    num_classes=1000,
    crop="squash",
    crop_share=1.0,
    interpolation="bilinear",
    mean=_HALF,
    std=_HALF,
    license="apache-2.0",
    paper="2106.05974",
)


def _swin(file: str, experts: int, router: str | None, accuracy: float, parameters: tuple[int, int]) -> ReleasedModel:
    """A Swin-MoE-S. `swin_import.RELEASED` holds MODEL.SWIN_MOE of the publisher's configs."""
    shape = {"patch_size": 4, "embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 12}
    cosine = {"cosine_dim": 256, "cosine_bias": True} if router == "cosine" else {}
    loss_weight = 0.005 * experts / max(experts - 1, 1)  # as in `swin_import`
    moe = {
        "layers": [*range(5, 22, 2), 23],
        "num_experts": experts,
        "top_k": 1,
        "router": "cosine" if cosine else "token_choice",
        "group": "batch",
        "batch_priority": True,
        "expert_dropout": 0.1,
        "capacity_rounding": "tutel",
        "capacity_multiple_of": max(1, 32 // experts),  # an expert's slices on 32 GPUs
        "noise_std": 1.0,
        "importance_loss_weight": loss_weight,
        "load_loss_weight": loss_weight,
        **cosine,
    }
    what = "no experts, the dense baseline" if router is None else f"{experts} experts, {router} router"
    return ReleasedModel(
        kind="swin",
        address=f"{_RELEASE}{file}.zip",
        description=f"Swin-MoE-S, {what}, ImageNet-22k, 192 px",
        backbone=("swin_small_patch4_window7_224", shape),
        moe=None if router is None else moe,
        image_size=192,
        num_classes=21841,
        parameters=parameters,
        names="imagenet-22k",
        capacity_factor=None if router is None else 1.25,
        eval_capacity_factor=None if router is None else 1.25,
        crop="centre",
        crop_share=192 / 219,
        interpolation="bicubic",
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        accuracy=accuracy,
        measured_on="ImageNet-22k, validation",
        license="mit",
        source=f"{_SWIN}/blob/main/MODELHUB.md",
        paper="2206.03382",
    )


_S22K = "swin_moe_small_patch4_window12_192_"
RELEASED: dict[str, ReleasedModel] = {
    "vmoe_s32_last2.ilsvrc2012": _jax(
        address=f"{_BUCKET}vmoe_s32_last2_ilsvrc2012_randaug_light1",
        description="V-MoE S/32, ImageNet-1k from scratch for 300 epochs, 224 px",
        backbone=("vmoe_vit", {**_SMALL_32, "pre_logits": 512}),
        moe=_LAST_2 | {"expert_dropout": 0.2},
        parameters=(56_999_400, 31_802_856),
        image_size=224,
        capacity_factor=1.05,
        eval_capacity_factor=4.0,
        crop="centre",
        crop_share=224 / 256,
        accuracy=73.1,
        measured_on=f"ImageNet-1k, validation; {_OF_SEEDS}",
        source=f"{_CONFIGS}/vmoe_paper/vmoe_s32_last2_ilsvrc2012_randaug_light1.py",
    ),
    "vmoe_s32_last2.ilsvrc2012_ft384": _jax(
        address=f"{_BUCKET}vmoe_s32_last2_ilsvrc2012_randaug_light1_ft_ilsvrc2012",
        description="V-MoE S/32, the same fine-tuned at 384 px",
        backbone=("vmoe_vit", _SMALL_32),
        moe=_LAST_2,
        parameters=(56_785_384, 31_588_840),
        image_size=384,
        capacity_factor=1.5,
        eval_capacity_factor=1.5,
        accuracy=75.9,
        measured_on=f"ImageNet-1k, validation; {_OF_SEEDS}",
        source=f"{_CONFIGS}/vmoe_paper/vmoe_s32_last2_ilsvrc2012_randaug_light1_ft_ilsvrc2012.py",
    ),
    "vmoe_s32_last2.ilsvrc2012_1000ep": _jax(
        address=f"{_BUCKET}vmoe_s32_last2_ilsvrc2012_randaug_medium",
        description="V-MoE S/32, ImageNet-1k from scratch for 1000 epochs, 224 px",
        backbone=("vmoe_vit", {**_SMALL_32, "pre_logits": 512}),
        moe=_LAST_2,
        parameters=(56_999_400, 31_802_856),
        image_size=224,
        capacity_factor=None,
        eval_capacity_factor=None,
        crop="centre",
        crop_share=224 / 256,
        accuracy=None,
        measured_on="",
        source=f"{_VMOE}#checkpoints",
    ),
    "vmoe_b16_every2.imagenet21k": _jax(
        address=f"{_BUCKET}vmoe_b16_imagenet21k_randaug_strong",
        description="V-MoE B/16, ImageNet-21k, 224 px",
        backbone=("vmoe_vit", _BASE_16),
        moe=_EVERY_2,
        parameters=(300_974_931, 130_967_379),
        image_size=224,
        num_classes=21843,
        names="imagenet-21k",
        capacity_factor=1.05,
        eval_capacity_factor=1.05,
        crop="centre",
        crop_share=224 / 256,
        accuracy=None,
        measured_on="",
        source=f"{_CONFIGS}/vmoe_paper/pretrain_imagenet21k.py",
    ),
    "vmoe_b16_every2.imagenet21k_ft384": _jax(
        address=f"{_BUCKET}vmoe_b16_imagenet21k_randaug_strong_ft_ilsvrc2012",
        description="V-MoE B/16, ImageNet-21k, then ImageNet-1k at 384 px",
        backbone=("vmoe_vit", _BASE_16),
        moe=_EVERY_2,
        parameters=(285_238_504, 115_230_952),
        image_size=384,
        capacity_factor=1.5,
        eval_capacity_factor=1.5,
        accuracy=85.6,
        measured_on=f"ImageNet-1k, validation; {_OF_SEEDS}",
        source=f"{_CONFIGS}/vmoe_paper/vmoe_b16_imagenet21k_randaug_strong_ft_ilsvrc2012.py",
    ),
    "eee_s32_last2.ilsvrc2012": _jax(
        address=f"{_BUCKET}eee_s32_last2_ilsvrc2012",
        description="E3 S/32, an ensemble of 2 members, ImageNet-1k, 224 px",
        backbone=("vmoe_vit", {**_SMALL_32, "pre_logits": 512}),
        moe=_LAST_2 | {"top_k": 1, "ensemble": 2},
        parameters=(56_999_400, 31_802_856),
        image_size=224,
        capacity_factor=None,
        eval_capacity_factor=None,
        crop="centre",
        crop_share=224 / 256,
        accuracy=None,
        measured_on="",
        source=f"{_VMOE}#checkpoints",
        paper="2110.03360",
    ),
    "eee_s32_last2.ilsvrc2012_ft_cifar100": _jax(
        address=f"{_BUCKET}eee_s32_last2_ilsvrc2012_ft_cifar100",
        description="E3 S/32, an ensemble of 2 members, fine-tuned on CIFAR-100 at 128 px",
        backbone=("vmoe_vit", {**_SMALL_32, "pre_logits": 512}),
        moe=_LAST_2 | {"top_k": 1, "ensemble": 2, "group": 128},
        parameters=(56_520_804, 31_324_260),
        image_size=128,
        num_classes=100,
        names="cifar100",
        capacity_factor=1.5,
        eval_capacity_factor=1.5,
        accuracy=81.31,
        measured_on=f"CIFAR-100, test; {_OF_SEEDS}",
        source=f"{_CONFIGS}/eee_paper/eee_s32_last2_ilsvrc2012_ft_cifar100.py",
        paper="2110.03360",
    ),
    "swin_moe_small_dense.imagenet22k": _swin(f"{_S22K}densebaseline_22k", 1, None, 35.5, (65_714_923, 65_714_923)),
    "swin_moe_small_e8.imagenet22k": _swin(f"{_S22K}8expert_32gpu_22k", 8, "linear", 36.8, (173_244_523, 65_748_715)),
    "swin_moe_small_e16.imagenet22k": _swin(
        f"{_S22K}16expert_32gpu_22k", 16, "linear", 37.6, (296_130_667, 65_782_507)
    ),
    "swin_moe_small_e32.imagenet22k": _swin(
        f"{_S22K}32expert_32gpu_22k", 32, "linear", 37.4, (541_902_955, 65_850_091)
    ),
    "swin_moe_small_e32_cosine.imagenet22k": _swin(
        f"{_S22K}cosine_router_32expert_32gpu_22k", 32, "cosine", 37.2, (542_933_621, 66_880_757)
    ),
}


def is_released(name: str) -> bool:
    """Whether a name is that of a released model, or of its architecture (the name up to the dot)."""
    return name in RELEASED or name in architectures()


def full_name(name: str) -> str:
    """A released model's own name; for an architecture, the name of its first model.

    Raises:
        KeyError: There is no such model.
    """
    return name if name in RELEASED else architectures()[name][0]


def architectures() -> dict[str, list[str]]:
    """The names of the released models, by architecture."""
    found: dict[str, list[str]] = {}
    for name in RELEASED:
        found.setdefault(name.partition(".")[0], []).append(name)
    return found
