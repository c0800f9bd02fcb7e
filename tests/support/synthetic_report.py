"""A plausible report of a V-MoE with sampled images, made from noise, for tests of the page (not of the metrics)."""

import itertools
import math

import numpy as np

STRENGTHS = {"class": 0.02, "position": 0.2, "colour": 0.05, "brightness": 0.0, "edges": 0.01}


def make_report(
    layers=3, experts=6, classes=5, grid=(6, 6), top_k=2, prefix=1, images=40, size=48, seed=0, kind="tokens"
):
    """(report, images) in the form that `vmoe.explain.page.write_page` takes; expert 2 of the first layer is dead."""
    rng = np.random.default_rng(seed)
    names = [f"class {index}" if classes > 10 else NAMES[index] for index in range(classes)]
    labels = rng.integers(classes, size=images)
    right = rng.random(images) < 0.8
    sample = {
        "pixels": np.stack([picture(rng, size, label, classes) for label in labels]),
        "label": labels,
        "predicted": np.where(right, labels, (labels + 1) % classes),
        "confidence": rng.uniform(0.4, 1, images),
        "layers": [routed(rng, images, grid, experts, top_k, prefix, kind, dead=index == 0) for index in range(layers)],
    }
    return {
        "title": "A synthetic V-MoE on noise",
        "provenance": {
            "checkpoint": "runs/synthetic/checkpoints/best.ckpt",
            "data": "noise",
            "split": "test",
            "seed": seed,
            "num_images": 5000,
            "probe_images": 700,
            "cause_images": 1200,
            "versions": {"vmoe": "0.0", "torch": "2.0"},
            "command": "explore runs/synthetic --out report",
        },
        "classes": names,
        "patch_names": ["stripes", "dots", "ring"],
        "accuracy": {"value": 0.801, "low": 0.789, "high": 0.812},
        "is_dense": False,
        "shared_router": False,
        "layers": [
            layer_report(rng, f"blocks.{2 * index + 1}.mlp", sample, index, names, grid, top_k, prefix, kind)
            for index in range(layers)
        ],
        "flows": flows(sample, prefix),
        "capacity": [
            {
                "factor": factor,
                "priority": priority,
                "dropped": max(0, 0.6 - 0.5 * factor),
                **around(value + priority * 0.1 * (0.8 - value), 0.012),
            }
            for priority in (False, True)
            for factor, value in zip((0.25, 0.5, 1, 1.5, 2), (0.6, 0.7, 0.78, 0.8, 0.801), strict=True)
        ],
        "training": {
            "steps": list(range(0, 4000, 50)),
            "layers": {
                f"blocks.{2 * index + 1}.mlp": {"load": training_load(rng, experts, dead=index == 0)}
                for index in range(layers)
            },
        },
        "saturation": {
            "epochs": [1, 5, 10, 20],
            "layers": {f"blocks.{2 * index + 1}.mlp": [0.3, 0.6, 0.85, 1.0] for index in range(layers)},
        },
        "runs": runs(rng, layers),
        "agreement": [
            {
                "run": "seed 1",
                "layers": {
                    f"blocks.{2 * i + 1}.mlp": {"value": 0.3 + 0.1 * (i % 3), "null_mean": 0.25, "null_high": 0.32}
                    for i in range(layers)
                },
            }
        ],
        "findings": [
            "Experts of blocks.3.mlp follow position (NMI 0.21, null at most 0.004).",
            "No layer's experts follow brightness beyond chance.",
            "Expert 2 of blocks.1.mlp is dead.",
            "A random router costs 12.0 points of accuracy.",
            "At capacity factor 0.5 accuracy is 70.0 %.",
        ],
    }, sample


NAMES = ("aeroplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def picture(rng, size, label, classes):
    """Smooth coloured noise, (size, size, 3) uint8. Its tint depends on the class."""
    coarse = rng.random((7, 7, 3)) * 0.7
    coarse += 0.3 * np.array([math.sin(label), math.cos(label), label / classes])
    at = np.linspace(0, 5.99, size)
    low, part = at.astype(int), (at % 1)[:, None]
    rows = coarse[low] * (1 - part[..., None]) + coarse[low + 1] * part[..., None]
    blended = rows[:, low] * (1 - part[None]) + rows[:, low + 1] * part[None]
    return (255 * np.clip(blended, 0, 1)).astype(np.uint8)


def routed(rng, images, grid, experts, top_k, prefix, kind, dead):
    """One layer's entry of `images["layers"]`. Experts prefer positions."""
    tokens = prefix + grid[0] * grid[1]
    liking = 2.5 * rng.standard_normal((1, tokens, experts))
    logits = liking + 1.2 * rng.standard_normal((images, tokens, experts))
    if dead:
        logits[..., 2] = -30
    gates = np.exp(logits - logits.max(-1, keepdims=True))
    gates /= gates.sum(-1, keepdims=True)
    entropy = -(gates * np.log(gates + 1e-12)).sum(-1)
    maps = {"gates": gates.astype(np.float16), "dispatch": None, "entropy": entropy.astype(np.float16)}
    if kind == "slots":
        dispatch = gates / gates.sum(1, keepdims=True)
        return {**maps, "dispatch": dispatch.astype(np.float16), "chosen": None, "dropped": None}
    chosen = np.argsort(-gates, axis=-1)[..., :top_k].astype(np.int16)
    return {**maps, "chosen": chosen, "dropped": rng.random(chosen.shape) < 0.06}


def layer_report(rng, name, sample, index, names, grid, top_k, prefix, kind):
    """One layer's entry of `report["layers"]`."""
    maps = sample["layers"][index]
    gates = maps["gates"][:, prefix:].astype(float)
    experts = gates.shape[-1]
    first = gates.argmax(-1)
    load = np.bincount(first.ravel(), minlength=experts) / first.size * experts
    matrix = rng.normal(0, 0.5, (experts, len(names)))
    tokens = kind == "tokens"
    return {
        "name": name,
        "num_experts": experts,
        "top_k": top_k if tokens else None,
        "router": "token_choice" if tokens else "soft_moe",
        "route": "patch",
        "kind": kind,
        "grid": list(grid),
        "prefix": prefix,
        "prefix_names": ["class token", *(f"register {index}" for index in range(1, prefix))][:prefix],
        "load": load.tolist(),
        "load_cv": float(load.std()),
        "max_load": float(load.max()),
        "dropped": 0.06 if tokens else None,
        "entropy": float(maps["entropy"].astype(float).mean()),
        "specialisation": {feature: nmi(rng, strength) for feature, strength in STRENGTHS.items()},
        "class_log_ratio": {"matrix": matrix.tolist(), "order": rng.permutation(len(names)).tolist()},
        "patch_label_log_ratio": {"matrix": rng.normal(0, 0.5, (experts, 3)).tolist(), "order": [2, 0, 1]},
        "coactivation": rng.lognormal(0, 0.5, (experts, experts)).tolist(),
        "experts_per_image": {"mean": experts * 0.7, "histogram": rng.integers(0, 50, experts + 1).tolist()},
        "consistency": {
            change: {**around(value, 0.02, "value"), "chance": 1.2 / experts}
            for change, value in (("flip", 0.6), ("shift", 0.75))
        },
        "ablation": [
            {"expert": e, "by_class": rng.normal(-0.02, 0.03, len(names)).tolist()}
            | around(-abs(rng.normal(0, 0.012)), 0.006, "change")
            for e in range(experts)
        ]
        if tokens
        else None,
        "random_router": around(-0.12, 0.01, "change") if tokens else None,
        "super_classes": None,
        "experts": [one_expert(rng, maps, first, expert, names, grid, prefix) for expert in range(experts)],
    }


def one_expert(rng, maps, first, expert, names, grid, prefix):
    """One expert's entry of `experts`."""
    gates = maps["gates"][:, prefix:, expert].astype(float)
    images, patches = np.nonzero(first == expert)
    if not len(images):
        return {
            "dead": True,
            "top": [],
            "random": [],
            "classes": [],
            "position": None,
            "colour": None,
        }

    def entries(places):
        return [{"image": int(i), "patch": int(p), "gate": float(gates[i, p])} for i, p in places]

    best = [np.unravel_index(place, gates.shape) for place in np.argsort(-gates, axis=None)[:16]]
    drawn = rng.integers(len(images), size=16)
    counts = np.bincount(patches, minlength=grid[0] * grid[1]).reshape(grid)
    position = counts / len(gates) * maps["gates"].shape[-1]
    ratios = np.sort(rng.lognormal(0, 0.5, min(5, len(names))))[::-1]
    return {
        "dead": False,
        "top": entries(best),
        "random": entries(zip(images[drawn], patches[drawn], strict=True)),
        "classes": [
            {"name": names[c], "share": float(ratio / len(names)), "ratio": float(ratio)}
            for c, ratio in zip(rng.permutation(len(names)), ratios, strict=False)
        ],
        "position": position.tolist(),
        "colour": rng.integers(40, 220, 3).tolist(),
    }


def around(value, half, name="accuracy"):
    """A value and its interval."""
    return {name: float(value), "low": float(value - half), "high": float(value + half)}


def nmi(rng, strength):
    """A link of this strength, with its null value."""
    value = strength * rng.uniform(0.5, 1.2) + 0.002
    null = 0.0025
    return {
        "nmi": value,
        "low": max(0, value - 0.1 * value - 0.0005),
        "high": value + 0.1 * value + 0.0005,
        "null_mean": null,
        "null_high": 1.2 * null,
        "p": 0.001 if value > 1.2 * null else 0.4,
        "beats_null": bool(value > 1.2 * null),
    }


def flows(sample, prefix):
    """Shares of patches from the experts of each layer to those of the next."""
    first = [maps["gates"][:, prefix:].argmax(-1).ravel() for maps in sample["layers"]]
    found = []
    for index, (here, there) in enumerate(itertools.pairwise(first)):
        matrix = np.zeros((sample["layers"][0]["gates"].shape[-1],) * 2)
        np.add.at(matrix, (here, there), 1 / len(here))
        found.append({"from": index, "to": index + 1, "matrix": matrix.tolist()})
    return found


def training_load(rng, experts, dead, steps=80):
    """Loads that drift apart: (steps, experts)."""
    drift = np.cumsum(0.08 * rng.standard_normal((steps, experts)), axis=0)
    if dead:
        drift[:, 2] -= np.linspace(0, 12, steps)
    share = np.exp(drift)
    return (experts * share / share.sum(1, keepdims=True)).tolist()


def runs(rng, layers):
    """Two seeds and a dense twin."""

    def measured(seed):
        return [
            {
                "name": f"blocks.{2 * i + 1}.mlp",
                "load_cv": 0.2 + 0.05 * i + 0.03 * seed,
                "nmi": {"class": nmi(rng, 0.02), "position": nmi(rng, 0.2), "brightness": nmi(rng, 0)},
                "dropped": 0.05,
            }
            for i in range(layers)
        ]

    return [
        {"name": "seed 0", "accuracy": around(0.801, 0.011, "value"), "is_dense": False, "layers": measured(0)},
        {"name": "seed 1", "accuracy": around(0.797, 0.011, "value"), "is_dense": False, "layers": measured(1)},
        {"name": "dense", "accuracy": around(0.783, 0.012, "value"), "is_dense": True, "layers": []},
    ]
