"""What of a model a form's readers do not compute: each a sentence for whoever makes the form."""

from __future__ import annotations

from collections.abc import Iterator

from telechat_mindie.computation import plain_length
from telechat_mindie.config import TelechatConfig


def limits(form: str, config: TelechatConfig) -> Iterator[str]:
    """Sentences about a model in the form `hf` or `llama`; none for another form."""
    if form == "hf":
        yield from _hugging_face(config)
    elif form == "llama":
        yield from _llama(config)


def _hugging_face(config: TelechatConfig) -> Iterator[str]:
    """Where vLLM (0.32, telechat2.py) and atb_llm (MindIE 3.0) leave the model; transformers computes all of it."""
    if config.is_moe:
        yield (
            "transformers loads this mixture of experts with the code beside the weights; vLLM, vllm-ascend and atb "
            "have none for TeleChat2."
        )
        return
    plain = plain_length(config)
    if not plain:
        yield (
            f"This model's rotary embedding is stretched at any length (base_seqlen {config.base_seqlen} below "
            f"training_seqlen {config.training_seqlen}), and vLLM, vllm-ascend and atb stretch none; take --to llama "
            f"for vLLM, which is right up to {config.training_seqlen} tokens."
        )
    elif plain < config.seq_length:
        yield (
            f"vLLM, vllm-ascend and atb have no Dynamic NTK, so they are right up to {plain} of {config.seq_length} "
            "tokens: vLLM takes that for its limit, and atb has to be given it as maxSeqLen."
        )
    if config.rope_theta != TelechatConfig.rope_theta:
        yield (
            f"atb ignores rope_theta, which is {config.rope_theta:g} here and {TelechatConfig.rope_theta:g} there, and "
            "would answer wrong; vLLM and transformers read it."
        )


def _llama(config: TelechatConfig) -> Iterator[str]:
    """Where a Llama leaves the model."""
    if config.training_seqlen < config.seq_length:
        yield (
            f"A Llama has no Dynamic NTK: it is right up to {config.training_seqlen} of {config.seq_length} tokens, "
            "which its config.json says."
        )
