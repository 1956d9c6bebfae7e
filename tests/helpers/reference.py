"""TeleChat2 in plain numpy, straight from the published description: the independent reference of the suite.

It reads Hugging Face weights, recomputes the whole sequence, and knows no cache, blocks, packing or ranks.
"""

from __future__ import annotations

import numpy as np

from telechat_mindie.config import TelechatConfig


def logits(weights: dict[str, np.ndarray], config: TelechatConfig, ids: np.ndarray) -> np.ndarray:
    """Logits [length, vocabulary] in float64 of one sequence, up to the trained length (no extension)."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    x = w["transformer.word_embeddings.weight"][ids]
    for layer in range(config.num_layers):
        stem = f"transformer.h.{layer}."
        x = x + attention(w, stem + "self_attention.", config, norm(x, w[stem + "input_layernorm.weight"], config))
        n = norm(x, w[stem + "post_attention_layernorm.weight"], config)
        x = x + (experts(w, stem + "mlp.", config, n) if config.is_moe else mlp(w, stem + "mlp.", n))
    return norm(x, w["transformer.ln_f.weight"], config) @ w["lm_head.weight"].T


def norm(x, weight, config):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * weight


def attention(w, stem, config, n):
    length, head_dim = len(n), config.head_dim
    q = (n @ w[stem + "query.weight"].T).reshape(length, config.num_heads, head_dim)
    kv = (n @ w[stem + "key_value.weight"].T).reshape(length, config.num_kv_heads, 2, head_dim)
    q, k, v = rotate(q, config), store(rotate(kv[:, :, 0], config)), store(kv[:, :, 1])
    out = np.empty_like(q)
    for head in range(config.num_heads):
        kv_head = head // (config.num_heads // config.num_kv_heads)
        scores = q[:, head] @ k[:, kv_head].T / np.sqrt(head_dim)
        scores[np.triu_indices(length, 1)] = -np.inf
        out[:, head] = softmax(scores) @ v[:, kv_head]
    return out.reshape(length, -1) @ w[stem + "dense.weight"].T + w[stem + "dense.bias"]


def store(x):
    """Keys and values as a cache holds them: here exactly, elsewhere rounded."""
    return x


def rotate(x, config):
    length, _, head_dim = x.shape
    angles = np.arange(length)[:, None] * config.rope_theta ** (-np.arange(0, head_dim, 2) / head_dim)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def mlp(w, stem, n):
    gate, up = n @ w[stem + "gate_proj.weight"].T, n @ w[stem + "up_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * up) @ w[stem + "down_proj.weight"].T + w[stem + "down_proj.bias"]


def experts(w, stem, config, n):
    probabilities = softmax(n @ w[stem + "router.weight"].T)
    out = np.zeros_like(n)
    for token, row in enumerate(probabilities):
        chosen = np.argsort(-row, kind="stable")[: config.experts_per_token]
        for expert in chosen:
            weight = row[expert] / row[chosen].sum()
            out[token] += weight * mlp(w, f"{stem}local_experts.{expert}.", n[token : token + 1])[0]
    return out


def softmax(x):
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)
