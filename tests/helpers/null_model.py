"""A model without weights: its next token depends on every token before, as read back from its paged cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

EOS_ID = 2
_KEYWORDS = {
    "input_ids",
    "valid_length_each_example",
    "block_tables",
    "slot_mapping",
    "prefill",
    "position_ids",
    "adapter_ids",
    "prefill_head_indices",
    "key_cache",
    "value_cache",
    "spec_mask",
    "q_seq_lens",
}
_POISON = np.uint64(0xDEADBEEFDEADBEEF)


class ContractError(Exception):
    """The engine passed what MindIE would not."""


@dataclass(frozen=True)
class Call:
    """What one forward was."""

    form: str  # "decode", "prefill", "hit" or "mixed"
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]


class NullRunner:
    """Obeys the contract of `ModelRunner`, checks that the caller does, and records the calls.

    The cache holds one 64-bit hash of (token, position) a slot. A sequence's logits are a hash of the sum over its
    slots, as its block table finds them, so a wrong table, slot, prefix hit or swap gives other tokens.

    Args:
        num_blocks: device blocks; the last one must never be used.
        num_host_blocks: blocks to swap to.
        block_size: tokens of a block.
        vocab_size: width of the logits.
        eos_bias: added to the logit of EOS_ID; -inf for answers that never end by themselves.
        max_position_embedding: tokens of the longest sequence.

    Attributes:
        before_forward: called with the keyword arguments of each forward; may raise.
        after_forward: called with them and the logits, which it may change.
    """

    use_legacy = False

    def __init__(
        self,
        num_blocks: int = 64,
        num_host_blocks: int = 0,
        block_size: int = 4,
        vocab_size: int = 300,
        eos_bias: float = -np.inf,
        max_position_embedding: int = 1 << 20,
    ) -> None:
        self.npu_num_blocks = num_blocks
        self.cpu_num_blocks = num_host_blocks
        self.model_config = SimpleNamespace(
            vocab_size=vocab_size, eos_token_id=EOS_ID, max_position_embedding=max_position_embedding
        )
        self.calls: list[Call] = []
        self.swaps: list[tuple[int, int, bool]] = []
        self.before_forward: Callable[[dict[str, Any]], object] = lambda arguments: None
        self.after_forward: Callable[[dict[str, Any], NDArray[np.float32]], object] = lambda arguments, logits: None
        self._block_size = block_size
        self._eos_bias = eos_bias
        self._cache = np.full(num_blocks * block_size, _POISON)
        self._host = np.full(max(num_host_blocks, 1) * block_size, _POISON)
        self._keys = np.arange(vocab_size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)

    def forward(self, **arguments: Any) -> tuple[NDArray[np.float32]]:
        """float32 [B, vocabulary]"""
        self.before_forward(arguments)
        query_lens = self._check(**arguments)
        tokens, positions = arguments["input_ids"], arguments["position_ids"]
        slots, context_lens = arguments["slot_mapping"], arguments["valid_length_each_example"]
        self._cache[slots] = _mix((tokens.astype(np.uint64) << np.uint64(32)) + positions.astype(np.uint64))
        width = arguments["block_tables"].shape[1] * self._block_size
        all_slots = (
            arguments["block_tables"].astype(np.int64)[:, :, None] * self._block_size + np.arange(self._block_size)
        ).reshape(len(context_lens), width)
        is_context = np.arange(width) < context_lens[:, None]
        content = np.where(is_context, self._cache[np.where(is_context, all_slots, 0)], np.uint64(0))
        history = content.sum(axis=1, dtype=np.uint64)
        self.calls.append(Call(_form(arguments), tuple(query_lens.tolist()), tuple(context_lens.tolist())))
        logits = self.logits(history)
        self.after_forward(arguments, logits)
        return (logits,)

    def logits(self, history: NDArray[np.uint64]) -> NDArray[np.float32]:
        """float32 [B, vocabulary] in [-8, 8)."""
        bits = _mix(_mix(history)[:, None] + self._keys)
        logits = ((bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 20) - 8).astype(np.float32)
        logits[:, EOS_ID] += self._eos_bias
        return logits

    def swap(self, block_tables: NDArray[np.int64], swap_type: bool) -> None:
        """Copy one block."""
        if type(swap_type) is not bool or block_tables.shape != (1, 2) or block_tables.dtype != np.int64:
            raise ContractError("swap")
        source, target = block_tables[0].tolist()
        self.swaps.append((source, target, swap_type))
        origin, destination = (self._cache, self._host) if swap_type else (self._host, self._cache)
        for array, block, limit in (
            (origin, source, self.cpu_num_blocks if not swap_type else self.npu_num_blocks - 1),
            (destination, target, self.cpu_num_blocks if swap_type else self.npu_num_blocks - 1),
        ):
            _require(0 <= block < limit and block * self._block_size < len(array), "swap outside the cache")
        size = self._block_size
        destination[target * size : (target + 1) * size] = origin[source * size : (source + 1) * size]
        if not swap_type:  # a device block may have other holders; a host block has none after its return
            origin[source * size : (source + 1) * size] = _POISON

    def _check(self, **arguments: Any) -> NDArray[np.int64]:
        """The new tokens of each sequence, after a look at every argument."""
        _require(arguments.keys() == _KEYWORDS, f"keywords {sorted(arguments.keys() ^ _KEYWORDS)}")
        form, prefill = _form(arguments), arguments["prefill"]
        _require(type(prefill) is bool, "prefill is no bool")
        context_lens, tables = arguments["valid_length_each_example"], arguments["block_tables"]
        index_dtype = np.int64 if form == "hit" else np.int32
        count = len(context_lens)
        for name, dtype, length in (
            ("input_ids", np.int64, None),
            ("slot_mapping", index_dtype, len(arguments["input_ids"])),
            ("position_ids", index_dtype, len(arguments["input_ids"])),
            ("valid_length_each_example", np.int32, count),
        ):
            array = arguments[name]
            _require(array.ndim == 1 and array.dtype == dtype, f"{name} is {array.dtype} {array.shape}")
            _require(length is None or len(array) == length, f"{name} has {len(array)} items")
        _require(tables.dtype == np.int32 and tables.ndim == 2 and len(tables) == count, "block_tables")
        _require(arguments["key_cache"] is None and arguments["value_cache"] is None, "caches from outside")
        _require(arguments["adapter_ids"] == (None if form == "mixed" else [None] * count), "adapter_ids")
        given = arguments["q_seq_lens"]
        _require(given is None or (isinstance(given, list) and all(type(item) is int for item in given)), "q_seq_lens")
        query_lens = np.array(given if given is not None else context_lens if prefill else [1] * count, np.int64)
        total = len(arguments["input_ids"])
        _require(query_lens.sum() == total and (query_lens > 0).all(), "q_seq_lens do not add up")
        heads = arguments["prefill_head_indices"]
        if prefill:
            _require(heads.dtype == np.int64 and heads.tolist() == (np.cumsum(query_lens) - 1).tolist(), "head indices")
        else:
            _require(heads is None, "head indices of a decode")
        # The engine sends no mask even after a hit: the plugin's says only what positions and lengths say already.
        _require(arguments["spec_mask"] is None, "spec_mask")
        self._check_places(query_lens, **arguments)
        return query_lens

    def _check_places(self, query_lens: NDArray[np.int64], **arguments: Any) -> None:
        """Positions follow on the history, slots are where the tables say, and nobody writes to another's block."""
        tables, context_lens = arguments["block_tables"], arguments["valid_length_each_example"]
        starts = context_lens - query_lens
        positions = np.concatenate([np.arange(a, b) for a, b in zip(starts, context_lens, strict=True)])
        rows = np.repeat(np.arange(len(tables)), query_lens)
        blocks = tables[rows, positions // self._block_size].astype(np.int64)
        _require(arguments["position_ids"].tolist() == positions.tolist(), "position_ids")
        expected = blocks * self._block_size + positions % self._block_size
        _require(arguments["slot_mapping"].tolist() == expected.tolist(), "slot_mapping")
        _require(len(set(expected.tolist())) == len(expected), "a slot is written twice")
        _require(tables.min() >= -1 and tables.max() < self.npu_num_blocks - 1, "block outside the pool")
        for row, context_len in zip(tables, context_lens, strict=True):
            used = -(-int(context_len) // self._block_size)
            _require((row[:used] >= 0).all(), "block missing")
        writers: dict[int, int] = {}
        for row_index, block in zip(rows.tolist(), blocks.tolist(), strict=True):
            _require(writers.setdefault(block, row_index) == row_index, "two sequences write one block")


class ByteTokenizer:
    """Tokens 3 to 258 are the bytes; the rest print nothing. Needs no file."""

    eos_token_id = EOS_ID

    def encode(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode()]

    def stream_decoder(self, skip_special_tokens: bool = True, keep: Iterable[str] = ()) -> _ByteDecoder:
        return _ByteDecoder()


class _ByteDecoder:
    def __init__(self) -> None:
        self._bytes = b""

    def put(self, ids: Iterable[int]) -> str:
        self._bytes += bytes(index - 3 for index in ids if 3 <= index < 259)
        for size in range(len(self._bytes), max(-1, len(self._bytes) - 4), -1):
            try:
                text = self._bytes[:size].decode()
            except UnicodeDecodeError:
                continue
            self._bytes = self._bytes[size:]
            return text
        return self.flush()

    def flush(self) -> str:
        text, self._bytes = self._bytes.decode(errors="replace"), b""
        return text


def _form(arguments: dict[str, Any]) -> str:
    if not arguments["prefill"]:
        return "decode"
    if arguments["q_seq_lens"] is None:
        return "prefill"
    return "mixed" if arguments["adapter_ids"] is None else "hit"


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _require(holds: Any, what: str) -> None:
    if not holds:
        raise ContractError(what)
