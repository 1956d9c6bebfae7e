"""The engine's state in numbers, for metrics."""

from __future__ import annotations

from dataclasses import dataclass

from telechat_mindie.engine.output import FinishReason


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One look at the engine. Totals count from its construction.

    Attributes:
        running: requests that hold device blocks.
        waiting: requests that hold none, preempted ones included.
        swapped: requests that hold host blocks.
        blocks_total: device blocks that may be handed out; the runner's last one is reserved, as in MindIE.
        blocks_used: of these, held by running requests; blocks that are only cached count as free.
        host_blocks_total: blocks in host memory.
        host_blocks_used: of these, held by swapped requests.
        preemptions: times that a running request gave its blocks back, in total.
        prompt_tokens: tokens of admitted prompts in total; a preempted request's answer is prompt on its return.
        cached_tokens: of these, found in the prefix cache.
        generated_tokens: tokens of answers, in total.
        received: requests that `add` accepted, in total.
        finished: of these, how many ended for which reason.
    """

    running: int
    waiting: int
    swapped: int
    blocks_total: int
    blocks_used: int
    host_blocks_total: int
    host_blocks_used: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    received: int
    finished: dict[FinishReason, int]

    @property
    def block_use(self) -> float:
        """Held part of the device blocks, 0 to 1."""
        return self.blocks_used / self.blocks_total

    @property
    def prefix_hit_rate(self) -> float:
        """Cached part of the prompt tokens, 0 to 1."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
