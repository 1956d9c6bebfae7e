"""The engine's limits and switches, by the names of MindIE's service config in snake case."""

from __future__ import annotations

from dataclasses import dataclass, fields

from telechat_mindie.errors import InputError

_LEAST = {"max_seq_len": 2, "max_prefill_batch_size": 0, "max_preempt_count": 0}
"""The smallest allowed values that are not 1."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What may run at once. Defaults are those of the conf/config.json that MindIE-LLM v3.0.0.beta.2 ships.

    Args:
        max_seq_len: tokens of prompt and answer together.
        max_input_token_len: tokens of a prompt; effectively at most max_seq_len - 1.
        max_iter_times: tokens of an answer, also when a request asks for more.
        max_batch_size: sequences that hold cache blocks at once, and so of a decode batch.
        max_prefill_batch_size: sequences of a prefill batch; 0 means max_batch_size.
        max_prefill_tokens: new tokens of a prefill batch.
        max_preempt_count: sequences that one step may swap out to host blocks; beyond it (or without host blocks) a
            preempted sequence is computed anew.
        block_size: tokens of a cache block (cacheBlockSize); must be what the runner was made with.
        prefix_cache: share the full blocks of equal prompt prefixes (the prefix_cache plugin).
        chunked_prefill: cut prompts into chunks that run beside decodes (the splitfuse plugin).
        split_chunk_tokens: new tokens of a mixed batch, decodes included.
        max_waiting: requests that may wait for their first admission; further ones are refused.

    Raises:
        InputError: a limit that is not positive, or limits under which some request could never run.
    """

    max_seq_len: int = 2560
    max_input_token_len: int = 2048
    max_iter_times: int = 512
    max_batch_size: int = 200
    max_prefill_batch_size: int = 50
    max_prefill_tokens: int = 8192
    max_preempt_count: int = 0
    block_size: int = 128
    prefix_cache: bool = False
    chunked_prefill: bool = False
    split_chunk_tokens: int = 512
    max_waiting: int = 1000

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), _LEAST.get(field.name, 1)
            if field.type == "int" and value < least:
                raise InputError("is too small", where=field.name, expected=f"at least {least}", found=value)
        if self.max_prefill_batch_size > self.max_batch_size:
            limit, given = f"at most {self.max_batch_size}", self.max_prefill_batch_size
            raise InputError("exceeds max_batch_size", where="max_prefill_batch_size", expected=limit, found=given)
        if not self.chunked_prefill and self.max_prefill_tokens < self.longest_prompt:
            raise InputError(
                "cannot hold the longest prompt",
                where="max_prefill_tokens",
                expected=f"at least {self.longest_prompt}",
                found=self.max_prefill_tokens,
                advice="Raise it, lower max_input_token_len, or turn chunked_prefill on.",
            )

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that leaves room for one token of an answer."""
        return min(self.max_input_token_len, self.max_seq_len - 1)

    @property
    def prefill_budget(self) -> int:
        """New tokens of a batch that prefills."""
        most = self.max_prefill_tokens
        return min(most, self.split_chunk_tokens) if self.chunked_prefill else most

    @property
    def prefill_batch_limit(self) -> int:
        return self.max_prefill_batch_size or self.max_batch_size
