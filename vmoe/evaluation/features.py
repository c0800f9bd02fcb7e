"""Features of a frozen model before the classifier, and three probes that predict classes from them.

n images, D features, C classes.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.data.subsets import pick
from vmoe.errors import UserError
from vmoe.models.members import refuse_ensemble

KNN_NEIGHBOURS, KNN_TEMPERATURE = 20, 0.07
RIDGE_L2 = 2.0**10
LINEAR_L2 = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_AT_ONCE = 1024  # number of images with similarities to all training images in memory at once
_RIDGE_BIAS = 100.0


class Features(NamedTuple):
    """Features of a set of images."""

    vectors: Tensor  # (n, D) float32
    labels: Tensor  # (n,) int64

    def take(self, indices) -> "Features":
        """The features of the images at `indices`."""
        indices = torch.as_tensor(indices, device=self.labels.device)
        return Features(self.vectors[indices], self.labels[indices])


@torch.no_grad()  # not inference_mode: a probe is trained on the result
def extract_features(model: nn.Module, batches: Iterable, device: torch.device | str = "cpu") -> Features:
    """The classifier's inputs for batches of (images (B, 3, H, W), labels (B,), ...).

    These are timm's `forward_head(forward_features(x), pre_logits=True)`. The model is put in evaluation mode and moved
    to the device; it stays so.

    Raises:
        UserError: The model has no such features or is an ensemble, a feature is not finite, or there is no image.
    """
    refuse_ensemble(model, "--probe: each member has features of its own")
    model = model.to(device).eval()
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        raise UserError("--probe: this model has no features before its classifier (timm's forward_head); leave it out")
    vectors, labels = [], []
    for images, of_images, *_ in batches:
        features = model.forward_head(model.forward_features(images.to(device, non_blocking=True)), pre_logits=True)
        vectors.append(features.flatten(1).float())
        labels.append(of_images.to(device))
    if not vectors:
        raise UserError("data: this split holds no images; choose another split or another data set")
    result = Features(torch.cat(vectors), torch.cat(labels))
    if not torch.isfinite(result.vectors).all():
        raise UserError("CKPT: the model gives features that are not finite; its training probably diverged")
    return result


def knn_accuracy(
    train: Features,
    test: Features,
    num_classes: int,
    neighbours: int = KNN_NEIGHBOURS,
    temperature: float = KNN_TEMPERATURE,
) -> float:
    """Top-1 of weighted nearest neighbours: the k most similar training images, by cosine, vote for their class.

    A vote has the weight exp(similarity / temperature), as in DINO (Caron et al. 2021,
    https://arxiv.org/abs/2104.14294, section 4.1) after Wu et al. 2018 (https://arxiv.org/abs/1805.01978).
    """
    bank = F.normalize(train.vectors, dim=1)
    neighbours = min(neighbours, len(bank))
    correct = 0
    for vectors, labels in zip(test.vectors.split(_AT_ONCE), test.labels.split(_AT_ONCE), strict=True):
        similarity, nearest = (F.normalize(vectors, dim=1) @ bank.t()).topk(neighbours)
        votes = similarity.new_zeros(len(labels), num_classes)
        votes.scatter_add_(1, train.labels[nearest], (similarity / temperature).exp())
        correct += int((votes.argmax(1) == labels).sum())
    return correct / len(test.labels)


def few_shot_accuracies(
    train: Features, test: Features, num_classes: int, shots: int, seeds: Sequence[int], l2: float = RIDGE_L2
) -> list[float]:
    """Top-1 of ridge regression on `shots` training images per class, for each seed of their choice.

    It is the linear few-shot evaluation of the V-MoE paper (Riquelme et al. 2021, section 3) with the constants of its
    authors' public code (big_vision's `fewshot_lsr`): features of zero mean and unit variance over the chosen images,
    targets -1 and 1, one regularisation for all sets, and a nearly unregularised bias.

    Raises:
        UserError: A class has fewer training images.
    """
    labels = train.labels.cpu().numpy()
    sizes = torch.bincount(train.labels, minlength=num_classes)
    if int(sizes.min()) < shots:
        raise UserError(f"--shots {shots}: a class has only {int(sizes.min())} training images; ask for at most those")
    accuracies = []
    for seed in seeds:
        few = train.take(pick(labels, lambda _, __: shots, seed))
        predicted = _with_bias(_scaled(test.vectors, few.vectors)) @ ridge(few, num_classes, l2)
        accuracies.append(float((predicted.argmax(1) == test.labels).double().mean()))
    return accuracies


def ridge(features: Features, num_classes: int, l2: float) -> Tensor:
    """The (D + 1, C) weights W that minimise |X W - Y|^2 + l2 |W|^2, in closed form, float64.

    X (n, D + 1) are the features of zero mean and unit variance with a constant for the bias, Y (n, C) are -1 and 1.
    """
    x = _with_bias(_scaled(features.vectors, features.vectors))
    y = 2 * F.one_hot(features.labels, num_classes).to(x.dtype) - 1
    return torch.linalg.solve(x.t() @ x + l2 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device), x.t() @ y)


def linear_accuracy(train: Features, val: Features, test: Features, num_classes: int) -> tuple[float, float]:
    """Top-1 on `test` of multinomial logistic regression on `train`, and the chosen L2 penalty of `LINEAR_L2`.

    The penalty is the best on `val`. The model has not been trained on these images: memorised training images would be
    separable with any penalty.
    """
    best = (-1.0, 0.0, 0.0)
    fitted = None
    for l2 in LINEAR_L2:  # from strong to weak; each starts from the last solution
        fitted = logistic_regression(train, num_classes, l2, fitted)
        score = _linear_score(fitted, train, val)
        if score > best[0]:
            best = score, _linear_score(fitted, train, test), l2
    return best[1:]


def logistic_regression(
    features: Features, num_classes: int, l2: float, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Weights (D, C) and bias (C,) that minimise the mean cross-entropy + l2 / 2 |weights|^2, by L-BFGS in float64.

    The features are first scaled to zero mean and unit variance. `start` is the initial solution.
    """
    x = _scaled(features.vectors, features.vectors)
    weights, bias = start or (x.new_zeros(x.shape[1], num_classes), x.new_zeros(num_classes))
    weights, bias = (part.clone().requires_grad_() for part in (weights, bias))
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=500, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weights + bias, features.labels) + l2 / 2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach(), bias.detach()


def _linear_score(fitted: tuple[Tensor, Tensor], train: Features, test: Features) -> float:
    weights, bias = fitted
    predicted = (_scaled(test.vectors, train.vectors) @ weights + bias).argmax(1)
    return float((predicted == test.labels).double().mean())


def _scaled(vectors: Tensor, reference: Tensor) -> Tensor:
    """Scales `vectors`, in float64, by the mean and variance of `reference`."""
    reference = reference.double()
    return (vectors.double() - reference.mean(0)) / (reference.std(0, correction=0) + 1e-5)


def _with_bias(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1), value=_RIDGE_BIAS)
