"""Sequences that a model computes by any mix of MindIE's modes, and what plain numpy says of their tokens."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from unittest import mock

import mindspore as ms
import numpy as np

from helpers import reference
from helpers.checkpoints import CONFIG, make_checkpoint
from helpers.driver import Driver
from helpers.mindie_calls import Draft, MindIECalls, Sequence_
from telechat_mindie.config import TelechatConfig
from telechat_mindie.model_dir.build import BuildOptions, build

BLOCK, NUM_BLOCKS, LONGEST, TOLERANCE = 16, 40, 60, 5e-4
MASK_DTYPES = (ms.float16, ms.bfloat16, ms.float32)


class Model:
    """A random model, its runner, and what numpy says of any tokens.

    The reference recomputes a sequence as a whole, with a length L for each token. That is what a paged cache gives: a
    key keeps the rotation of the call that wrote it, and the query of the same token was rotated in that call too.
    """

    def __init__(
        self, root: Path, changes: dict, *, external: bool = False, block_size: int = BLOCK, max_seq_len: int = 64
    ) -> None:
        from telechat_mindie import ModelRunner

        self._weights = make_checkpoint(root / "ckpt", "float32", **changes)
        self.config = TelechatConfig.from_dict(CONFIG | changes)
        options = BuildOptions(dtype="float32", block_size=block_size, max_seq_len=max_seq_len)
        build(root / "model", root / "ckpt", options)
        blocks = {"num_blocks": None if external else NUM_BLOCKS}
        self.runner = ModelRunner(str(root / "model"), -1 if external else 1, 1, block_size, **blocks)
        self.driver = Driver(self.runner, block_size, NUM_BLOCKS)
        self.caches = self.external_caches(NUM_BLOCKS) if external else {}
        self._known: dict[bytes, np.ndarray] = {}

    def external_caches(self, blocks: int) -> dict[str, object]:
        """As MindIE allocates them where npu_mem_size is -1 (generator_ms.py)."""
        shape = (blocks, self.driver.block_size, self.config.num_kv_heads, self.config.head_dim)
        keys, values = ([ms.ops.zeros(shape, ms.float32) for _ in range(self.config.num_layers)] for _ in range(2))
        return {"key_cache": ms.mutable(keys), "value_cache": ms.mutable(values)}

    def logits(self, ids: np.ndarray, call_lens: np.ndarray | int = 0) -> np.ndarray:
        """[length, vocabulary] for tokens computed in calls of these context lengths."""
        lens = np.maximum(np.broadcast_to(call_lens, len(ids)), self.config.training_seqlen)
        key = np.asarray(ids).tobytes() + lens.tobytes()
        if key not in self._known:
            with mock.patch.object(reference, "rotate", partial(rotate, lens=lens)):
                self._known[key] = reference.logits(self._weights, self.config, np.asarray(ids))
        return self._known[key]


def rotate(x: np.ndarray, config: TelechatConfig, lens: np.ndarray) -> np.ndarray:
    """The published rotary embedding of x [length, heads, head_dim], with Dynamic NTK's L for each token."""
    length, _, head_dim = x.shape
    alpha = np.maximum(2 ** np.ceil(np.log2(lens / config.base_seqlen) + 1) - 1, 1)
    scale = 0.1 * np.log(lens / config.training_seqlen) + 1
    theta = config.rope_theta * alpha ** (head_dim / (head_dim - 2))
    angles = np.arange(length)[:, None] * theta[:, None] ** (-np.arange(0, head_dim, 2) / head_dim)
    cos, sin = (scale[:, None, None] * table[:, None] for table in (np.cos(angles), np.sin(angles)))
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Scenario:
    """Four sequences that go on by whatever mode comes next; one that has come far makes room for a new one.

    Lengths are random within few powers of two, and at most three sequences share a call: the CPU compiles a graph for
    each such bucket.

    Args:
        model: what computes them.
        seed: of all that is random.
        chunk: least and most tokens of a sequence where some of its tokens are in the cache.
    """

    def __init__(self, model: Model, seed: int, chunk: tuple[int, int] = (7, 8)) -> None:
        self.model = model
        self.rng = np.random.default_rng(seed)
        self.calls = MindIECalls(model.driver, self.rng, **model.caches)
        self.sequences = [self.arrival() for _ in range(4)]
        self._chunk = chunk

    def step(self, mode: str) -> None:
        if not self.running:
            self.prefill()
        getattr(self, mode)()

    def close(self) -> None:
        self.model.driver.release(np.unique(np.concatenate([s.table for s in self.sequences])))

    def prefill(self) -> None:
        chosen = self.some(self.waiting or [self.replace()])[:2]
        lengths = self.rng.integers(17, 33, len(chosen)).tolist()
        self.check(chosen, lengths, self.calls.prefill(chosen, lengths))

    def decode(self) -> None:
        chosen = self.some(self.running)
        lengths = [1] * len(chosen)
        self.check(chosen, lengths, self.calls.decode(chosen))

    def splitfuse(self) -> None:
        """Decodes, then chunks of prompts, first chunks among them."""
        chunked = self.some(self.waiting + self.running)
        decoding = [s for s in self.running if s not in chunked][: 3 - len(chunked)]
        lengths = [1] * len(decoding) + self.chunks(chunked)
        self.check(decoding + chunked, lengths, self.calls.splitfuse(decoding + chunked, lengths))

    def prefix_hit(self) -> None:
        """Prompts of which blocks are in the cache, another's first block among them, perhaps beside one without."""
        donors = [s for s in self.sequences if s.done >= BLOCK]
        if self.waiting and donors:
            self.share(donors[0], self.waiting[0])
        chosen = self.some(self.waiting + self.running)
        lengths = self.chunks(chosen)
        self.check(chosen, lengths, self.calls.prefix_hit(chosen, lengths))

    def memory_decoding(self) -> None:
        """The true tokens guessed. Some of them are kept; what was written beyond is overwritten later."""
        chosen = self.some(self.running)
        lengths = self.chunks(chosen)
        rows = self.calls.memory_decoding(chosen, lengths)
        wanted = [self.expected(s)[s.done : s.done + n] for s, n in zip(chosen, lengths, strict=True)]
        np.testing.assert_allclose(rows, np.concatenate(wanted), atol=TOLERANCE)
        for sequence, length in zip(chosen, lengths, strict=True):
            sequence.done += int(self.rng.integers(1, length + 1))

    def lookahead(self) -> None:
        """Tokens kept at the step before, which are computed again where their keys are of another branch; the next
        token; and guesses that branch from it, of which none is kept."""
        chosen = self.some(self.running)
        kept = [int(self.rng.integers(1, min(4, s.done + 1))) for s in chosen]
        drafts = [self.draft(sequence, count) for sequence, count in zip(chosen, kept, strict=True)]
        rows = self.calls.lookahead(chosen, drafts, MASK_DTYPES[self.rng.integers(3)])
        wanted = []
        for sequence, draft, count in zip(chosen, drafts, kept, strict=True):
            for row in range(len(draft.tokens)):
                ids = np.concatenate([sequence.ids[: sequence.done], draft.tokens[draft.path(row)]])
                wanted.append(self.model.logits(ids)[-1])
            sequence.done += count
        np.testing.assert_allclose(rows, np.array(wanted), atol=TOLERANCE)

    def draft(self, sequence: Sequence_, kept: int) -> Draft:
        """`kept` true tokens in a row, all but the last again, and a random tree below the last."""
        sequence.done -= kept - 1
        count = max(self.chunks([sequence])[0], kept)
        tokens = self.rng.integers(0, self.model.config.vocab_size, count)
        tokens[:kept] = sequence.ids[sequence.done :][:kept]
        below = [int(self.rng.integers(kept - 1, row)) for row in range(kept, count)]
        return Draft(tokens, [*range(-1, kept - 1), *below])

    def swap(self) -> None:
        """A sequence out to the host, its blocks to another's use, and back into other blocks, a call for each."""
        sequence, driver = self.running[0], self.model.driver
        host = self.rng.permutation(self.model.runner.cpu_num_blocks)[: len(sequence.table)]
        for pair in zip(sequence.table, host, strict=True):
            self.model.runner.swap(np.array([pair]), True)
        self.release(sequence)
        noise = Sequence_(self.rng.integers(0, self.model.config.vocab_size, 32), driver.table(32))
        self.calls.prefill([noise], [32])
        sequence.table = driver.table(LONGEST + 8)
        driver.release(noise.table)
        for pair in zip(host, sequence.table, strict=True):
            self.model.runner.swap(np.array([pair]), False)

    def share(self, donor: Sequence_, taker: Sequence_) -> None:
        """The first block is the donor's, and so are its tokens."""
        self.model.driver.release(taker.table[:1])
        taker.table[0] = donor.table[0]
        taker.ids[:BLOCK] = donor.ids[:BLOCK]
        taker.call_lens[:BLOCK] = donor.call_lens[:BLOCK]
        taker.done = BLOCK

    def arrival(self) -> Sequence_:
        ids = self.rng.integers(0, self.model.config.vocab_size, LONGEST)
        return Sequence_(ids, self.model.driver.table(LONGEST + 8))

    def replace(self) -> Sequence_:
        """A new sequence in the place of the one that has come farthest, on the blocks that this one leaves."""
        place = int(np.argmax([s.done for s in self.sequences]))
        self.release(self.sequences[place])
        self.sequences[place] = self.arrival()
        return self.sequences[place]

    def release(self, sequence: Sequence_) -> None:
        """Give back the blocks that no other sequence shares."""
        shared = np.concatenate([s.table for s in self.sequences if s is not sequence])
        self.model.driver.release(np.setdiff1d(sequence.table, shared))

    @property
    def waiting(self) -> list[Sequence_]:
        return [s for s in self.sequences if not s.done]

    @property
    def running(self) -> list[Sequence_]:
        return [s for s in self.sequences if 0 < s.done < LONGEST - 10]

    def chunks(self, sequences: list[Sequence_]) -> list[int]:
        return self.rng.integers(self._chunk[0], self._chunk[1] + 1, len(sequences)).tolist()

    def check(self, chosen: list[Sequence_], lengths: list[int], rows: np.ndarray) -> None:
        """One row for each sequence, of its last new token."""
        for sequence, length in zip(chosen, lengths, strict=True):
            sequence.done += length
        wanted = np.array([self.expected(sequence)[sequence.done - 1] for sequence in chosen])
        np.testing.assert_allclose(rows, wanted, atol=TOLERANCE)

    def expected(self, sequence: Sequence_) -> np.ndarray:
        return self.model.logits(sequence.ids, sequence.call_lens)

    def some(self, sequences: list[Sequence_]) -> list[Sequence_]:
        """One to three of them in any order."""
        order = self.rng.permutation(len(sequences))
        return [sequences[i] for i in order[: self.rng.integers(1, 4)]]
