"""The original's vision transformer in float64 NumPy loops, on parameters by their checkpoint names, and random ones.

B images of N tokens of width D; E experts; K choices per token; C slots of an expert in a group; P slots of an expert
in Soft MoE.
"""

import math

import numpy as np


def random_params(
    rng,
    *,
    depth=2,
    width=16,
    heads=2,
    hidden=24,
    patch=4,
    side=3,
    experts=4,
    moe=(1,),
    classes=5,
    cls=True,
    pre_logits=None,
    slots=None,
):
    """Parameters of any architecture; `slots` makes Soft MoE layers."""
    params = {}

    def add(name, *shape, mean=0.0, std=None):
        std = 1 / math.sqrt(shape[-2] if len(shape) > 1 else 16) if std is None else std
        params[name] = (mean + std * rng.standard_normal(shape)).astype(np.float32)

    def dense(name, *shape):
        add(f"{name}/kernel", *shape)
        add(f"{name}/bias", *shape[:-2], shape[-1], std=0.1)

    def norm(name):
        add(f"{name}/scale", width, mean=1.0, std=0.1)
        add(f"{name}/bias", width, std=0.1)

    add("embedding/kernel", patch, patch, 3, width, std=0.1)
    add("embedding/bias", width, std=0.1)
    if cls:
        add("cls", 1, 1, width, std=0.5)
    add("Encoder/posembed_input/pos_embedding", 1, side**2 + cls, width, std=0.5)
    for i in range(depth):
        block = f"Encoder/encoderblock_{i}"
        norm(f"{block}/LayerNorm_0")
        norm(f"{block}/LayerNorm_1")
        for part in ("query", "key", "value"):
            add(f"{block}/SelfAttention/{part}/kernel", width, heads, width // heads, std=1 / math.sqrt(width))
            add(f"{block}/SelfAttention/{part}/bias", heads, width // heads, std=0.1)
        add(f"{block}/SelfAttention/out/kernel", heads, width // heads, width, std=1 / math.sqrt(width))
        add(f"{block}/SelfAttention/out/bias", width, std=0.1)
        if i not in moe:
            dense(f"{block}/Mlp/Dense_0", width, hidden)
            dense(f"{block}/Mlp/Dense_1", hidden, width)
            continue
        dense(f"{block}/Moe/Mlp/Dense_0", experts, width, hidden)
        dense(f"{block}/Moe/Mlp/Dense_1", experts, hidden, width)
        if slots is None:
            add(f"{block}/Moe/Router/dense/kernel", width, experts, std=1.0)
        else:
            add(f"{block}/Moe/Router/mu", width, experts, slots, std=1.0)
            params[f"{block}/Moe/Router/scale"] = np.float32(7.5)
    norm("Encoder/encoder_norm")
    if pre_logits is not None:
        dense("pre_logits", width, pre_logits)
    dense("head", pre_logits or width, classes)
    return params


def logits(params, images, *, router="token_choice", top_k=2, capacity=None, group=8):
    """Logits of images (B, rows, columns, 3).

    Args:
        params: By name.
        images: Normalised.
        router: "token_choice", "expert_choice" or "soft".
        top_k: K.
        capacity: C itself; None drops nothing.
        group: Images per routing group.
    """
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x = _patches(p, np.asarray(images, np.float64))
    if "cls" in p:
        x = np.concatenate([np.repeat(p["cls"], len(x), 0), x], axis=1)
    x = x + p["Encoder/posembed_input/pos_embedding"]
    i = 0
    while f"Encoder/encoderblock_{i}/LayerNorm_0/scale" in p:
        block = f"Encoder/encoderblock_{i}"
        x = x + _attention(p, f"{block}/SelfAttention", _norm(p, f"{block}/LayerNorm_0", x))
        y = _norm(p, f"{block}/LayerNorm_1", x)
        if f"{block}/Mlp/Dense_0/kernel" in p:
            x = x + _mlp(p, f"{block}/Mlp", y)
        else:
            groups = [y[first : first + group].reshape(-1, y.shape[-1]) for first in range(0, len(y), group)]
            routed = [_ROUTERS[router](p, f"{block}/Moe", tokens, top_k, capacity) for tokens in groups]
            x = x + np.concatenate(routed).reshape(y.shape)
        i += 1
    x = _norm(p, "Encoder/encoder_norm", x)
    x = x[:, 0] if "cls" in p else x.mean(1)
    if "pre_logits/kernel" in p:
        x = np.tanh(x @ p["pre_logits/kernel"] + p["pre_logits/bias"])
    return x @ p["head/kernel"] + p["head/bias"]


def _patches(p, images):
    size, _, _, width = p["embedding/kernel"].shape
    rows, columns = images.shape[1] // size, images.shape[2] // size
    x = np.zeros((len(images), rows * columns, width))
    for row in range(rows):
        for column in range(columns):
            patch = images[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
            x[:, row * columns + column] = np.tensordot(patch, p["embedding/kernel"], axes=3) + p["embedding/bias"]
    return x


def _norm(p, name, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * p[f"{name}/scale"] + p[f"{name}/bias"]


def _softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def _attention(p, name, x):
    q, k, v = (
        np.einsum("bnd,dhe->bhne", x, p[f"{name}/{part}/kernel"]) + p[f"{name}/{part}/bias"][:, None]
        for part in ("query", "key", "value")
    )
    weights = _softmax(np.einsum("bhne,bhme->bhnm", q, k) / math.sqrt(q.shape[-1]), -1)
    mixed = np.einsum("bhnm,bhme->bnhe", weights, v)
    return np.einsum("bnhe,hed->bnd", mixed, p[f"{name}/out/kernel"]) + p[f"{name}/out/bias"]


def _mlp(p, name, x, expert=...):
    hidden = x @ p[f"{name}/Dense_0/kernel"][expert] + p[f"{name}/Dense_0/bias"][expert]
    hidden = hidden / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    return hidden @ p[f"{name}/Dense_1/kernel"][expert] + p[f"{name}/Dense_1/bias"][expert]


def _token_choice(p, name, tokens, top_k, capacity):
    gates = _softmax(tokens @ p[f"{name}/Router/dense/kernel"], -1)
    chosen = np.argsort(-gates, axis=-1, kind="stable")[:, :top_k]
    taken, result = [0] * gates.shape[1], np.zeros_like(tokens)
    for k in range(top_k):
        for t, token in enumerate(tokens):
            expert = chosen[t, k]
            taken[expert] += 1
            if capacity is None or taken[expert] <= capacity:
                result[t] += gates[t, expert] * _mlp(p, f"{name}/Mlp", token, expert)
    return result


def _expert_choice(p, name, tokens, top_k, capacity):
    gates = _softmax(tokens @ p[f"{name}/Router/dense/kernel"], -1)
    result = np.zeros_like(tokens)
    for expert in range(gates.shape[1]):
        for t in np.argsort(-gates[:, expert], kind="stable")[:capacity]:
            result[t] += gates[t, expert] * _mlp(p, f"{name}/Mlp", tokens[t], expert)
    return result


def _soft(p, name, tokens, top_k, capacity):
    def unit(x, axis):
        return x / np.sqrt((x**2).sum(axis, keepdims=True) + 1e-6)

    mu = unit(p[f"{name}/Router/mu"], 0)
    scores = p[f"{name}/Router/scale"] * np.einsum("nd,dep->nep", unit(tokens, -1), mu)
    dispatch = _softmax(scores, 0)
    combine = _softmax(scores.reshape(len(tokens), -1), -1).reshape(scores.shape)
    result = np.zeros_like(tokens)
    for expert in range(mu.shape[1]):
        for slot in range(mu.shape[2]):
            y = _mlp(p, f"{name}/Mlp", dispatch[:, expert, slot] @ tokens, expert)
            result += combine[:, expert, slot, None] * y
    return result


_ROUTERS = {"token_choice": _token_choice, "expert_choice": _expert_choice, "soft": _soft}
