"""Which TeleChat2 atb_llm loads and computes right: each rule with the way out.

A bare file:line is of MindIE-LLM v3.0.0 examples/atb_models/atb_llm/models/telechat/.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from telechat_mindie.computation import plain_length
from telechat_mindie.config import TelechatConfig

DTYPE = "float16"
"""flash_causal_telechat.py:473 tells the graph that it is float16, whatever config.json says."""

MIN_LAYERS = 30
"""Below, no lm_head is made (flash_causal_telechat.py:362-381)."""

ROPE_THETA = 10000.0
"""The base of the rotary embedding, not read from config.json (flash_causal_telechat.py:99, 402)."""

SIGN = "telechat2"
"""What a value of auto_map must contain (flash_causal_telechat.py:48-52). Without it the model is taken for the first
TeleChat: other names below 38 layers, and at 30 layers the embedding in the place of lm_head."""

MODEL_TYPE = "telechat"  # the folder that the router looks for

BLOCK_SIZE = 128

REQUIRED_KEYS = (
    *("vocab_size", "hidden_size", "n_layer", "n_head", "num_key_value_heads", "layer_norm_epsilon", "seq_length"),
    "torch_dtype",
)
"""Keys of config.json in the spelling that counts: each has a default, mostly that of another model
(config_telechat.py:23-40)."""

BUILD = "Build the directory for it: telechat-mindie build MODEL_PATH --checkpoint DIR --backend atb"
ELSEWHERE = (
    "Serve this model with backendType ms on MindIE 3.0.0.beta.2 or older (`build` without --backend), or with "
    "vllm-ascend (`convert --to hf`)."
)
MS_ALONE = "Serve this model with backendType ms on MindIE 3.0.0.beta.2 or older (`build` without --backend)."


class Refusal(NamedTuple):
    """A rule that a model breaks: its name, the key concerned, a clause, and a sentence of advice."""

    id: str
    key: str
    message: str
    advice: str


def model_refusals(config: TelechatConfig) -> Iterator[Refusal]:
    """What no conversion of this model can mend."""
    if config.is_moe:
        yield Refusal(
            "atb-moe", "num_local_experts", f"{config.num_experts} experts: atb_llm's TeleChat has none", MS_ALONE
        )
    if config.num_layers < MIN_LAYERS:
        message = f"{config.num_layers} layers: below {MIN_LAYERS} atb_llm makes no lm_head, and every request fails"
        yield Refusal("atb-layers", "n_layer", message, ELSEWHERE)
    if config.rope_theta != ROPE_THETA:
        message = f"{config.rope_theta:g}: atb_llm computes with {ROPE_THETA:g} all the same, so every answer is wrong"
        yield Refusal("atb-rope-theta", "rope_theta", message, ELSEWHERE)
    if not plain_length(config):
        message = (
            f"{config.base_seqlen}, below training_seqlen {config.training_seqlen}: the rotary embedding is stretched "
            "at any length, and atb_llm stretches none, so every answer is wrong"
        )
        yield Refusal("atb-ntk", "base_seqlen", message, MS_ALONE)
    if config.embed_layernorm:
        message = "true: atb_llm leaves that norm out, so every answer is wrong"
        yield Refusal("atb-embed-layernorm", "embed_layernorm", message, MS_ALONE)


def config_refusals(data: Mapping[str, Any]) -> Iterator[Refusal]:
    """What a config.json must say, and says otherwise."""
    model_type = data.get("model_type")
    if model_type != MODEL_TYPE:
        yield Refusal("atb-model-type", "model_type", f"is {model_type!r}, and atb_llm looks for {MODEL_TYPE!r}", BUILD)
    given = data.get("auto_map")
    values = list(given.values()) if isinstance(given, Mapping) else []
    if not values or not all(isinstance(value, str) for value in values):
        message = "is no object of texts, where atb_llm ends" if given else "is missing, where atb_llm ends"
        yield Refusal("atb-auto-map", "auto_map", message, BUILD)
    elif not any(SIGN in value.lower() for value in values):
        message = f"has no value that contains {SIGN!r}: atb_llm takes the model for the first TeleChat"
        yield Refusal("atb-auto-map", "auto_map", message, BUILD)
    for key in REQUIRED_KEYS:
        if key not in data and not (key == "hidden_size" and "n_embed" in data):
            yield Refusal(
                "atb-config-key", key, "is missing in this spelling: atb_llm takes another model's value", BUILD
            )
    dtype = data.get("torch_dtype")
    if "torch_dtype" in data and dtype != DTYPE:
        message = f"is {dtype!r}: atb_llm loads it without a word and computes in {DTYPE}"
        yield Refusal("atb-dtype", "torch_dtype", message, BUILD)


def beyond_plain(length: int, plain: int) -> str:
    """What to say of sequences of `length` tokens, where up to `plain` all is well; empty for those."""
    if length <= plain:
        return ""
    return f"is {length}, and atb_llm has no dynamic NTK: beyond {plain} tokens its answers are not the model's"
