"""The losses by the labels against plain formulas in float64."""

import lightning as L
import pytest
import torch
from timm.loss import BinaryCrossEntropy
from torch.utils.data import DataLoader, TensorDataset

import vmoe
from vmoe.data import DataConfig
from vmoe.errors import UserError
from vmoe.training.config import LossConfig
from vmoe.training.label_loss import LabelLoss

COUNTS = [60, 30, 9, 1, 0]
CLASSES = len(COUNTS)


def drawn(mixed):
    """Logits (B, C), labels (B,) that have images, and their shares (B, C), mixed in pairs or not."""
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(12, CLASSES, generator=draw, dtype=torch.float64), torch.arange(12) % 4
    shares = torch.zeros(12, CLASSES, dtype=torch.float64).scatter_(1, labels[:, None], 1)
    return logits, labels, 0.7 * shares + 0.3 * shares.roll(1, 0) if mixed else shares


def weights_of(config):
    """The weight of each class by the papers' formulas, of mean 1 over the images."""
    if config.class_weights is None:
        return torch.ones(CLASSES, dtype=torch.float64)
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    numbers = {"balanced": counts, "auto": (1 - 0.99**counts) / (1 - 0.99)}
    given = config.class_weights
    weights = torch.tensor(given).double() if isinstance(given, list) else 1 / numbers[given]
    weights[4] = 0 if not isinstance(given, list) else weights[4]
    return weights * counts.sum() / (weights * counts).sum()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "config",
    [
        LossConfig(),
        LossConfig(class_weights="balanced"),
        LossConfig(class_weights="auto", effective_beta=0.99),
        LossConfig(class_weights=[1, 2, 3, 4, 5.0], logit_adjustment=0.5),
        LossConfig(logit_adjustment=1.0),
        LossConfig("bce"),
        LossConfig("bce", class_weights="balanced"),
    ],
)
def test_losses_are_their_formulas(config, smoothing, mixed):
    logits, labels, shares = drawn(mixed)
    smoothed = shares * (1 - smoothing) + smoothing / CLASSES
    weights = weights_of(config)
    if config.name == "bce":
        terms = smoothed * logits.sigmoid().log() + (1 - smoothed) * (1 - logits.sigmoid()).log()
        expected = (-terms.mean(1) * (shares @ weights)).mean()
    else:
        priors = torch.tensor([max(count, 1) for count in COUNTS]).double() / sum(COUNTS)
        logs = (logits + config.logit_adjustment * priors.log()).log_softmax(1)
        expected = -(smoothed * weights * logs).sum(1).mean()
    loss = LabelLoss(config, smoothing, lambda: COUNTS)
    found = loss(logits.float(), labels, shares.float() if mixed else None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_the_binary_loss_of_labels_is_timm_s():
    logits, labels, _ = drawn(mixed=False)
    torch.testing.assert_close(
        LabelLoss(LossConfig("bce"), 0.1)(logits, labels).double(),
        BinaryCrossEntropy(0.1)(logits.float(), labels).double(),
    )


def test_a_weighted_batch_is_the_mean_of_its_parts():
    """As it must be where ranks share a batch: torch's own weighted mean is not."""
    logits, labels, _ = drawn(mixed=False)
    loss = LabelLoss(LossConfig(class_weights="balanced"), 0.0, lambda: COUNTS)
    parts = [loss(logits[part].float(), labels[part]) for part in (slice(0, 6), slice(6, 12))]
    torch.testing.assert_close(loss(logits.float(), labels), sum(parts) / 2)


def fitted(loss, tmp_path, **data):
    model = vmoe.create_model(
        "vit_tiny_patch16_224", num_classes=10, img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2
    )
    task = vmoe.Classifier(model, loss=loss)
    run = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    run.fit(task, **data)
    run.save_checkpoint(tmp_path / "one.ckpt")
    return task


def test_a_classifier_counts_the_classes_of_its_data_and_keeps_its_loss(tmp_path):
    config = DataConfig(batch_size=16, eval_batch_size=500)
    task = fitted({"class_weights": "auto", "logit_adjustment": 1.0}, tmp_path, datamodule=vmoe.ImageDataModule(config))
    assert task.hparams["loss"]["class_weights"] == "auto"
    again = vmoe.Classifier.load_from_checkpoint(tmp_path / "one.ckpt")
    assert again.loss == LossConfig(class_weights="auto", logit_adjustment=1.0)


def test_loaders_of_tensors_take_a_list_of_weights_alone(tmp_path):
    loader = DataLoader(TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8)), batch_size=8)
    fitted({"class_weights": [1.0] * 9 + [2.0]}, tmp_path, train_dataloaders=loader)
    with pytest.raises(UserError, match="images_of_classes"):
        fitted({"class_weights": "balanced"}, tmp_path, train_dataloaders=loader)
    with pytest.raises(UserError, match="has 2 weights, and the data have 10 classes"):
        fitted({"class_weights": [1.0, 2.0]}, tmp_path, train_dataloaders=loader)
