"""A small model of how MindIE-LLM v3.0.0.beta.2 makes `forward`'s arguments of what its clients ask for.

What its C++ refuses is refused here, and everything else goes through, odd or not. Batches, hits, chunks and drafts are
made as its plug-ins make them (text_generator/utils, text_generator/plugins), with their habits: -1 for a block that is
not there indexes from the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mindspore as ms
import numpy as np

MASKED = float(np.finfo(np.float32).min)
PAD = 3


@dataclass(eq=False)
class Request:
    """What a client asked for, and how far it has come: `done` of its `ids` are in the cache."""

    ids: list[int]
    max_tokens: int
    adapter: str | None = None
    table: list[int] = field(default_factory=list)
    done: int = 0
    made: int = 0


class Batching:
    """MindIE between its server and one runner.

    Args:
        runner: answers every call.
        vocab_size: of config.json; 0 where MindIE could not read it, and then no id is too large.
        max_seq_len: MindIE's, whatever the model's is.
        plugins: names of plug-ins.
        spare: tokens beyond the next one for which it has blocks; fewer than the drafts leave these without.
    """

    DRAFTS = 6
    CHUNK = 7

    def __init__(
        self,
        runner,
        block_size: int,
        num_blocks: int,
        rng: np.random.Generator,
        *,
        vocab_size: int,
        max_seq_len: int,
        plugins: Sequence[str] = (),
        spare: int = DRAFTS,
        caches: dict | None = None,
    ) -> None:
        self.runner, self.block_size, self.num_blocks, self.rng = runner, block_size, num_blocks, rng
        self.vocab_size, self.max_seq_len, self.plugins, self.spare = vocab_size, max_seq_len, plugins, spare
        self._caches = caches or {"key_cache": None, "value_cache": None}
        self._free = list(range(num_blocks - 1))  # the last is for dummy and simulated requests
        self._known: dict[tuple[int, ...], int] = {}  # block of a whole prefix
        self.waiting: list[Request] = []
        self.running: list[Request] = []

    def submit(self, request: Request) -> bool:
        """Whether MindIE takes it (single_req_*_infer_interface.cpp, llm_manager_impl.cpp:1430-1560)."""
        longest = self.max_seq_len - 1
        if not 0 < len(request.ids) <= longest or any(not -(2**63) <= i < 2**63 for i in request.ids):
            return False
        if self.vocab_size and any(token >= self.vocab_size for token in request.ids):
            return False
        self.waiting.append(request)
        return True

    def step(self, simulate: bool = False) -> tuple[np.ndarray, int] | None:
        """One call: its logits, and how many rows MindIE's sampler would look for; None where none is possible.

        A request for whose next token there is no block leaves: MindIE takes it up again when others have ended.
        """
        self.running = [r for r in self.running if self._allocate(r, len(r.ids))]
        chosen = [r for r in self.waiting[:2] if self._allocate(r, len(r.ids))]
        if "splitfuse" in self.plugins and chosen:
            return self._mixed(chosen)
        if chosen:
            self.waiting = [r for r in self.waiting if r not in chosen]
            return self._prefill(chosen)
        if not self.running:
            return None
        for request in self.running:
            self._allocate(request, len(request.ids) + self.spare, must=False)
        return self._decode(self.running, simulate)

    def _prefill(self, requests: list[Request]) -> tuple[np.ndarray, int]:
        for request in requests:  # tg_infer_context_store.py:505
            request.ids = [PAD if token == -1 else token for token in request.ids]
        hits = [self._hit(r) for r in requests] if "prefix_cache" in self.plugins else [0] * len(requests)
        lengths = [len(r.ids) - hit for r, hit in zip(requests, hits, strict=True)]
        arguments = self._span(requests, hits, lengths, kind=np.int64 if any(hits) else np.int32)
        arguments |= {"prefill": True, "prefill_head_indices": np.cumsum(lengths, dtype=np.int64) - 1}
        if any(hits):
            width = max(len(r.ids) for r in requests)
            triangle = np.where(np.tri(width, dtype=bool), 0.0, MASKED)
            rows = [triangle[hit : len(r.ids)] for r, hit in zip(requests, hits, strict=True)]
            arguments |= {"q_seq_lens": lengths, "spec_mask": np.concatenate(rows)}
            if self.rng.integers(2):  # hits that only the local cache knows: prefix_cache_plugin.py:180-181
                whole = [len(r.ids) for r in requests]
                arguments |= self._span(requests, [0] * len(requests), whole)
                arguments |= {"q_seq_lens": [1] * len(requests), "spec_mask": [[0]] * len(requests)}
                arguments["prefill_head_indices"] = np.cumsum(whole, dtype=np.int64) - 1
        logits = self._forward(arguments)
        for request in requests:
            self._computed(request, len(request.ids))
        self._accept(requests, logits)
        return logits, len(requests)

    def _mixed(self, prompts: list[Request]) -> tuple[np.ndarray, int]:
        """Decodes, then chunks (tg_infer_context_store.py:concatenate_mix). Here -1 stays what it is."""
        decoding = [r for r in self.running if self._allocate(r, len(r.ids))]
        requests = decoding + prompts
        lengths = [1] * len(decoding) + [min(self.CHUNK, len(r.ids) - r.done) for r in prompts]
        arguments = self._span(requests, [r.done for r in requests], lengths)
        arguments |= {"prefill": True, "adapter_ids": None, "q_seq_lens": lengths}
        arguments["prefill_head_indices"] = np.cumsum(lengths, dtype=np.int64) - 1
        logits = self._forward(arguments)
        for request, length in zip(requests, lengths, strict=True):
            self._computed(request, request.done + length)
        complete = [row for row, request in enumerate(requests) if request.done == len(request.ids)]
        self.waiting = [r for r in self.waiting if r.done < len(r.ids)]
        self._accept([requests[row] for row in complete], logits[complete])
        return logits, len(requests)

    def _decode(self, requests: list[Request], simulate: bool) -> tuple[np.ndarray, int]:
        tree, chain = "la" in self.plugins, "memory_decoding" in self.plugins
        drafts = [self._draft(r) if tree or chain else [] for r in requests]
        lengths = [1 + len(draft) for draft in drafts]
        kept = [len(r.ids) for r in requests]
        for request, draft in zip(requests, drafts, strict=True):
            request.ids = request.ids + draft
        arguments = self._span(requests, [n - 1 for n in kept], lengths, kind=np.int64 if chain else np.int32)
        for request, count in zip(requests, kept, strict=True):
            request.ids = request.ids[:count]
        arguments |= {"prefill": False, "prefill_head_indices": None}
        if chain:
            arguments |= {"adapter_ids": None, "q_seq_lens": lengths, "spec_mask": self._chain_mask(kept, lengths)}
        elif tree:
            arguments |= {"q_seq_lens": lengths, "spec_mask": self._tree_mask(kept, lengths)}
            arguments["position_ids"] = np.concatenate(
                [[n - 1, *self.rng.integers(n, n + self.DRAFTS, q - 1)] for n, q in zip(kept, lengths, strict=True)]
            ).astype(np.int64)
        elif simulate:
            self._add_simulated(arguments)
        logits = self._forward(arguments)
        rows = len(arguments["input_ids"])
        for request, count in zip(requests, kept, strict=True):
            request.done = count
        self._accept(list(requests), logits[np.cumsum(lengths) - lengths])
        return logits, rows

    def _span(self, requests, starts, lengths, kind=np.int32) -> dict:
        """Tokens starts[i] to starts[i] + lengths[i] of each request."""
        at = [np.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)]
        width = max(len(r.table) for r in requests)
        tables = np.array([r.table + [-1] * (width - len(r.table)) for r in requests], np.int32)
        slots = [
            [tables[row, place // self.block_size] * self.block_size + place % self.block_size for place in places]
            for row, places in enumerate(at)
        ]
        return {
            "input_ids": np.concatenate(
                [np.array(r.ids, np.int64)[places] for r, places in zip(requests, at, strict=True)]
            ),
            "valid_length_each_example": np.array([places[-1] + 1 for places in at], kind),
            "block_tables": tables,
            "slot_mapping": np.concatenate(slots).astype(np.int32),
            "position_ids": np.concatenate(at).astype(kind),
            "adapter_ids": [r.adapter for r in requests],
            "q_seq_lens": None,
            "spec_mask": None,
        }

    def _chain_mask(self, kept: list[int], lengths: list[int]) -> np.ndarray:
        """Float64, rows of a triangle as wide as the longest context (memory_decoding_plugin.py:56-97)."""
        width = max(n - 1 + q for n, q in zip(kept, lengths, strict=True))
        triangle = np.where(np.tri(width, dtype=bool), 0.0, MASKED)
        return np.concatenate([triangle[n - 1 : n - 1 + q] for n, q in zip(kept, lengths, strict=True)])

    def _tree_mask(self, kept: list[int], lengths: list[int]) -> ms.Tensor:
        """Float16: the cache, the token itself, and any of the drafts before it (la/decoding_policy.py:430-470)."""
        width = max(n - 1 + q for n, q in zip(kept, lengths, strict=True))
        mask = np.full((sum(lengths), width), np.finfo(np.float16).min, np.float16)
        row = 0
        for context, count in zip(kept, lengths, strict=True):
            for draft in range(count):
                mask[row, :context] = 0
                mask[row, context : context + draft] = self.rng.choice([0, np.finfo(np.float16).min], draft)
                mask[row, context - 1 + draft] = 0
                row += 1
        return ms.Tensor(mask)

    def _add_simulated(self, arguments: dict) -> None:
        """The health check's request at the end of a batch: context 0, no slot, the last block as its table."""
        arguments["input_ids"] = np.append(arguments["input_ids"], 0)
        arguments["valid_length_each_example"] = np.append(arguments["valid_length_each_example"], 0)
        arguments["position_ids"] = np.append(arguments["position_ids"], 0)
        arguments["slot_mapping"] = np.append(arguments["slot_mapping"], -1)
        arguments["adapter_ids"] = [*arguments["adapter_ids"], None]
        table = np.full((1, arguments["block_tables"].shape[1]), -1, np.int32)
        table[0, 0] = self.num_blocks - 1
        arguments["block_tables"] = np.concatenate([arguments["block_tables"], table])

    def _forward(self, arguments: dict) -> np.ndarray:
        return self.runner.forward(**arguments, **self._caches).asnumpy()

    def _draft(self, request: Request) -> list[int]:
        """Guesses out of the request's own tokens, the client's among them, as both plug-ins draw them. None where the
        table ends, which both make sure of."""
        room = len(request.table) * self.block_size
        if any(len(other.table) > len(request.table) for other in self.running):
            room = max(len(other.table) for other in self.running) * self.block_size  # padded with -1
        count = min(int(self.rng.integers(1, self.DRAFTS + 1)), room - len(request.ids))
        return [int(request.ids[i]) for i in self.rng.integers(0, len(request.ids), count)]

    def _hit(self, request: Request) -> int:
        """Tokens of whole blocks that are known, but for the last block of a prompt that is known as a whole."""
        blocks = len(request.ids) // self.block_size
        known = 0
        while known < blocks and tuple(request.ids[: (known + 1) * self.block_size]) in self._known:
            known += 1
        for index in range(known):
            request.table[index] = self._known[tuple(request.ids[: (index + 1) * self.block_size])]
        return min(known, -(-len(request.ids) // self.block_size) - 1) * self.block_size

    def _computed(self, request: Request, done: int) -> None:
        request.done = done
        for index in range(done // self.block_size):
            self._known.setdefault(tuple(request.ids[: (index + 1) * self.block_size]), request.table[index])

    def _allocate(self, request: Request, tokens: int, *, must: bool = True) -> bool:
        missing = -(-tokens // self.block_size) - len(request.table)
        if missing > len(self._free):
            return not must
        request.table += [self._free.pop() for _ in range(missing)]
        return True

    def _accept(self, requests: list[Request], rows: np.ndarray) -> None:
        """The next token of each, and an end by max_tokens or maxSeqLen. No block is given to another."""
        for request, logits in zip(requests, rows, strict=True):
            request.ids = [*request.ids, int(logits.argmax())]
            request.made += 1
            if request not in self.running:
                self.running = [*self.running, request]
            if request.made >= request.max_tokens or len(request.ids) >= self.max_seq_len:
                self.running = [r for r in self.running if r is not request]
