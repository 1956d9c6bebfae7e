"""The released TeleChat2 sizes, as data: for dry runs, labels, docs and tests. Conversion never looks here."""

from __future__ import annotations

from telechat_mindie.config import TelechatConfig
from telechat_mindie.errors import InputError

VARIANTS: dict[str, TelechatConfig] = {
    "3b": TelechatConfig(131072, 3072, 24, 24, 6144, seq_length=32768),
    "7b": TelechatConfig(131072, 4096, 30, 32, 12288, seq_length=32768),
    "35b": TelechatConfig(131072, 6144, 64, 48, 20480),
    "115b": TelechatConfig(131072, 8192, 96, 64, 40960, num_kv_heads=8),
    "39b-a12b": TelechatConfig(131072, 4096, 30, 32, 6144, num_experts=16, experts_per_token=4),
}
"""By label. 3B, 7B and 115B as in their published config.json, the others from the READMEs and mindformers' yamls."""


def named(label: str) -> TelechatConfig:
    """The size of a label, in capitals or not; InputError where there is none."""
    if label.lower() not in VARIANTS:
        raise InputError("unknown size", where="--variant", expected=" or ".join(VARIANTS), found=label)
    return VARIANTS[label.lower()]


def label_for(config: TelechatConfig) -> str:
    """The released label of a model of this shape, else its size: `105m`, `2.4b`."""
    for label, variant in VARIANTS.items():
        if config.parameter_count == variant.parameter_count and config.num_layers == variant.num_layers:
            return label
    count = config.parameter_count
    return f"{count / 1e9:.1f}b" if count >= 1e9 else f"{max(1, round(count / 1e6))}m"
