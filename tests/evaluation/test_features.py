"""Frozen features and the three probes against slow references."""

import numpy as np
import pytest
import torch

import vmoe
from vmoe.errors import UserError
from vmoe.evaluation.features import (
    Features,
    extract_features,
    few_shot_accuracies,
    knn_accuracy,
    linear_accuracy,
    logistic_regression,
    ridge,
)

CLASSES, DIM = 4, 6


def make_features(count, seed, noise=1.2):
    """Classes around centres of their own, with axes of unlike mean and scale."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % CLASSES
    vectors = centres[labels] + noise * torch.randn(count, DIM, generator=generator)
    return Features(vectors * torch.arange(1.0, DIM + 1) + 3, labels)


def standardised(vectors, reference):
    reference = reference.double().numpy()
    return (vectors.double().numpy() - reference.mean(0)) / (reference.std(0) + 1e-5)


def test_features_are_what_the_classifier_takes():
    torch.manual_seed(0)
    shape = {"num_classes": 10, "img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = vmoe.create_model("vit_tiny_patch16_224", vmoe.MoeConfig(num_experts=4), **shape)
    images = torch.randn(5, 3, 16, 16)
    features = extract_features(model, [(images[:3], torch.arange(3), []), (images[3:], torch.arange(2), [])])
    assert features.vectors.shape == (5, 24) and features.labels.tolist() == [0, 1, 2, 0, 1]
    with torch.no_grad():
        assert torch.allclose(model.head(features.vectors), model(images), atol=1e-5)


def test_models_without_such_features_and_sets_without_images_are_refused():
    with pytest.raises(UserError, match="--probe"):
        extract_features(torch.nn.Linear(2, 2), [])
    with pytest.raises(UserError, match="no images"):
        extract_features(vmoe.create_model("vit_tiny_patch16_224", depth=1), [])


def test_nearest_neighbours_agree_with_a_loop():
    train, test = make_features(60, 0), make_features(40, 1)
    correct = 0
    for vector, label in zip(test.vectors.numpy(), test.labels.tolist(), strict=True):
        similar = [
            (float(vector @ other / np.linalg.norm(vector) / np.linalg.norm(other)), int(of_other))
            for other, of_other in zip(train.vectors.numpy(), train.labels, strict=True)
        ]
        votes = np.zeros(CLASSES)
        for similarity, of_other in sorted(similar, reverse=True)[:7]:
            votes[of_other] += np.exp(similarity / 0.07)
        correct += votes.argmax() == label
    accuracy = knn_accuracy(train, test, CLASSES, neighbours=7)
    assert accuracy == correct / 40
    assert 0.3 < accuracy < 1


def test_neighbours_weigh_by_their_similarity():
    # Of three neighbours one is very near, two of another class are far: the near one wins, unless all weigh alike.
    train = Features(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]]), torch.tensor([0, 1, 1]))
    test = Features(torch.tensor([[5.0, 0.0]]), torch.tensor([0]))
    assert knn_accuracy(train, test, 2, neighbours=20) == 1
    assert knn_accuracy(train, test, 2, neighbours=20, temperature=100.0) == 0


def test_ridge_is_least_squares_with_a_row_for_each_penalty():
    train = make_features(40, 0)
    x = np.pad(standardised(train.vectors, train.vectors), ((0, 0), (0, 1)), constant_values=100)
    targets = 2 * np.eye(CLASSES)[train.labels] - 1
    rows = np.concatenate([x, 64.0**0.5 * np.eye(x.shape[1])])
    expected = np.linalg.lstsq(rows, np.concatenate([targets, np.zeros((x.shape[1], CLASSES))]), rcond=None)[0]
    assert np.allclose(ridge(train, CLASSES, 64.0).numpy(), expected, atol=1e-9)


def test_few_shots_learn_from_as_many_images_by_seed():
    train, test = make_features(400, 0, noise=0.9), make_features(200, 1, noise=0.9)
    few = few_shot_accuracies(train, test, CLASSES, 10, [0, 1, 2])
    assert few == few_shot_accuracies(train, test, CLASSES, 10, [0, 1, 2])
    assert len(set(few)) > 1 and min(few) > 0.4
    # All images of all classes: the seed has nothing to choose.
    everything = few_shot_accuracies(train, test, CLASSES, 100, [0, 1])
    assert everything[0] == everything[1] >= min(few)
    x = np.pad(standardised(test.vectors, train.vectors), ((0, 0), (0, 1)), constant_values=100)
    predicted = (x @ ridge(train, CLASSES, 1024.0).numpy()).argmax(1)
    assert everything[0] == (predicted == test.labels.numpy()).mean()


def test_too_few_images_for_the_shots_are_refused():
    with pytest.raises(UserError, match="--shots 11: a class has only 10"):
        few_shot_accuracies(make_features(40, 0), make_features(4, 1), CLASSES, 11, [0])


@pytest.mark.parametrize("l2", [1.0, 0.01])
def test_logistic_regression_finds_where_its_convex_loss_has_no_slope(l2):
    train = make_features(120, 0)
    weights, bias = (part.numpy() for part in logistic_regression(train, CLASSES, l2))
    x = standardised(train.vectors, train.vectors)
    odds = np.exp(x @ weights + bias)
    surplus = odds / odds.sum(1, keepdims=True) - np.eye(CLASSES)[train.labels]
    assert np.allclose(x.T @ surplus / 120 + l2 * weights, 0, atol=1e-5)  # no penalty on the bias
    assert np.allclose(surplus.mean(0), 0, atol=1e-5)


def test_the_linear_probe_takes_the_penalty_that_is_best_on_the_validation_images():
    train, val, test = (make_features(count, seed) for seed, count in enumerate((80, 200, 200)))
    accuracy, l2 = linear_accuracy(train, val, test, CLASSES)

    def score(penalty, part):
        weights, bias = logistic_regression(train, CLASSES, penalty)
        x = standardised(part.vectors, train.vectors)
        return ((x @ weights.numpy() + bias.numpy()).argmax(1) == part.labels.numpy()).mean()

    assert accuracy == pytest.approx(score(l2, test), abs=0.006)
    assert score(l2, val) >= max(score(other, val) for other in (10.0, 1.0, 0.01, 1e-6)) - 0.006
