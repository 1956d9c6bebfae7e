"""Rotary embedding tables, with the published Dynamic NTK extension, computed per sequence."""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache

import numpy as np

from telechat_mindie.computation import dynamic_ntk
from telechat_mindie.config import TelechatConfig
from telechat_mindie.dtypes import DTYPES


class RotaryTable:
    """Cosines and sines for tokens of sequences of given lengths.

    The published TeleChat2 code extends the context by Dynamic NTK: with L the sequence's length so far, but at least
    the training length, alpha = max(2^ceil(log2(L / base_seqlen) + 1) - 1, 1) stretches the model's theta to
    theta * alpha^(d / (d - 2)), and beyond the training length both tables are multiplied by
    0.1 * ln(L / training_seqlen) + 1 (modeling_telechat.py of Tele-AI/TeleChat2). With L up to base_seqlen =
    training_seqlen both are 1 and the table is the plain one.

    Args:
        head_dim: d, even.
        training_seqlen: tokens.
        base_seqlen: tokens.
        extend_method: "DYNAMIC_NTK"; "PI", which divides positions by scaling_factor; "NTK", which multiplies theta by
            it; or "None", the plain table at any length. Names and meanings are those of mindformers' yaml key
            (modules/layers.py, FreqsMgr).
        rotary_dtype: what the tables are rounded to; angles are always float32.
        scaling_factor: for PI and NTK.
        theta: the base of the angles, the config's rope_theta.
    """

    def __init__(
        self,
        head_dim: int,
        training_seqlen: int = 8192,
        base_seqlen: int = 8192,
        extend_method: str = "DYNAMIC_NTK",
        rotary_dtype: str = "float32",
        scaling_factor: float = 1.0,
        theta: float = TelechatConfig.rope_theta,
    ) -> None:
        self._head_dim = head_dim
        self._training_seqlen = training_seqlen
        self._base_seqlen = base_seqlen
        self._dynamic = extend_method == "DYNAMIC_NTK"
        self._theta = theta * (scaling_factor if extend_method == "NTK" else 1.0)
        self._interpolation = np.float32(scaling_factor if extend_method == "PI" else 1.0)
        self.dtype = rotary_dtype
        self._round = DTYPES[rotary_dtype].numpy

    @classmethod
    def of(
        cls,
        config: TelechatConfig,
        extend_method: str = "DYNAMIC_NTK",
        rotary_dtype: str = "float32",
        scaling_factor: float = 1.0,
    ) -> RotaryTable:
        """A model's, extended and rounded as its directory's yaml says; by default as `build` writes it."""
        lengths = config.training_seqlen, config.base_seqlen
        return cls(config.head_dim, *lengths, extend_method, rotary_dtype, scaling_factor, config.rope_theta)

    def tables(self, positions: np.ndarray, sequence_lens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines [T, head_dim / 2] in float32, rounded to the rotary dtype.

        Args:
            positions: [T] position of each token.
            sequence_lens: [T] length L, in tokens, of the sequence that the token belongs to, the new tokens included.
        """
        shortest, longest = int(sequence_lens.min()), int(sequence_lens.max())
        if self.extension(shortest) == self.extension(longest):  # both grow with the length
            return self._tables(positions, longest)
        cos = np.empty((len(positions), self._head_dim // 2), np.float32)
        sin = np.empty_like(cos)
        for length in np.unique(sequence_lens):
            chosen = sequence_lens == length
            cos[chosen], sin[chosen] = self._tables(positions[chosen], int(length))
        return cos, sin

    def _tables(self, positions: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """`tables` of tokens whose sequences all have the extension of `length` tokens."""
        scale = np.float32(self.extension(length)[1])
        # A copy only where there is something to round.
        cos, sin = ((part * scale).astype(self._round, copy=False) for part in self.unscaled(positions, length))
        return cos.astype(np.float32, copy=False), sin.astype(np.float32, copy=False)

    def unscaled(self, positions: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """[T, head_dim / 2] float32 with the alpha of `length` tokens, neither scaled nor rounded."""
        scaled = positions[:, None].astype(np.float32) / self._interpolation
        angles = scaled * _inverse_frequencies(self._head_dim, self._theta, self.extension(length)[0])
        return np.cos(angles), np.sin(angles)

    def extension(self, length: int) -> tuple[float, float]:
        """(alpha, scale of the tables) for a sequence of `length` tokens."""
        if not self._dynamic:
            return 1.0, 1.0
        return dynamic_ntk(length, self._training_seqlen, self._base_seqlen)

    def bounds(self, longest: int) -> list[int]:
        """The longest length with each alpha that sequences of up to `longest` tokens have."""
        found: list[int] = []
        while not found or found[-1] < longest:
            alpha = self.extension(found[-1] + 1 if found else 1)[0]
            lengths = range(1, longest + 1)  # alpha grows with the length
            found.append(bisect_right(lengths, alpha, key=lambda length: self.extension(length)[0]))
        return found


class ResidentRotary:
    """The tables of all sequences of up to `max_seq_len` tokens as two matrices that stay on a device.

    A sequence's alpha takes few values, a new one wherever its length passes twice the last bound; each has the rows of
    the positions below its bound, one after the other: less than three times `max_seq_len` rows, and one table where
    nothing is stretched. Beyond the training length both tables are scaled by a number for each sequence: then they are
    kept in float32 and unscaled, and a call brings its tokens' numbers.

    Attributes:
        cos, sin: [rows, head_dim] float32, both halves alike.
        has_scale: whether a call's rows are to be scaled.
    """

    def __init__(self, table: RotaryTable, max_seq_len: int) -> None:
        self._table = table
        self.has_scale = table.extension(max_seq_len)[1] != 1.0
        lasts = table.bounds(max_seq_len)
        self._bounds = np.array(lasts)
        self._starts = np.cumsum(self._bounds) - self._bounds
        made = [
            table.unscaled(np.arange(last), last) if self.has_scale else table.tables(np.arange(last), np.array([last]))
            for last in lasts
        ]
        self.cos, self.sin = (np.concatenate([np.tile(tables[side], 2) for tables in made]) for side in (0, 1))

    def rows(self, positions: np.ndarray, sequence_lens: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Each token's row [T] int32 and, with `has_scale`, its scale [T] float32.

        A token beyond the longest sequence is a draft that nobody will be given; it has the last row.

        Args:
            positions: [T] position of each token.
            sequence_lens: [T] length, in tokens, of the sequence that the token belongs to, the new tokens included.
        """
        if len(self._bounds) == 1 and not self.has_scale:
            return np.minimum(positions, np.int32(self._bounds[0] - 1), dtype=np.int32), None
        part = np.minimum(np.searchsorted(self._bounds, sequence_lens), len(self._bounds) - 1)
        found = self._starts[part] + np.minimum(positions, self._bounds[part] - 1)
        if not self.has_scale:
            return found.astype(np.int32), None
        lengths, of_token = np.unique(sequence_lens, return_inverse=True)
        scales = np.array([self._table.extension(int(length))[1] for length in lengths], np.float32)
        return found.astype(np.int32), scales[of_token]


@lru_cache(maxsize=64)
def _inverse_frequencies(head_dim: int, base: float, alpha: float) -> np.ndarray:
    """[head_dim / 2] float32."""
    theta = np.float32(base * alpha ** (head_dim / (head_dim - 2)))
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (np.float32(1.0) / theta**exponents).astype(np.float32)
