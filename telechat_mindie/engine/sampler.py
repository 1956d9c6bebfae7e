"""From logits to tokens, for a whole batch at once; no row's token depends on what other rows there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from telechat_mindie.engine.params import GenerationParams
from telechat_mindie.engine.penalties import TokenCounts, penalise
from telechat_mindie.engine.philox import uniforms
from telechat_mindie.engine.top_n import top_n

Floats: TypeAlias = NDArray[np.float32]
Doubles: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.int64]

NO_TOKEN = -1
"""Stands for the token of a row whose logits have no finite maximum: NaN, infinite, or all -inf."""

_SLAB = 1 << 18  # logits worked on at once: their copies stay in a core's cache, and malloc keeps their memory
_SHORT_SLAB = 1 << 22  # logits of which only the top_k are worked on
_CHUNK = 64  # tokens summed before a running sum is taken, which is several times slower a term
_FIRST_NUCLEUS = 64  # most likely tokens looked at first where only top_p restricts a draw


class SamplingState:
    """What the sampler needs to know of one request.

    Args:
        params: the request's draws.
        seed: of its draws, 64 bits; draw number n is a function of seed and n alone.
        prompt_ids: tokens that the repetition penalty counts as seen.
    """

    def __init__(self, params: GenerationParams, seed: int, prompt_ids: ArrayLike = ()) -> None:
        self.params = params
        self.seed = seed
        self.num_draws = 0
        self.seen = TokenCounts(prompt_ids) if params.penalised else None

    def observe(self, token: int) -> None:
        """Count a token of the answer."""
        self.num_draws += 1
        if self.seen is not None:
            self.seen.add(token)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities at one place of an answer, as the model gave them: before penalties,
    temperature and restrictions."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token, logprob) of the most likely tokens, best first


@dataclass(frozen=True, slots=True)
class _DrawParameters:
    """Of one draw for each of R requests, an array [R] each; `points` in [0, 1) say where in the mass it falls."""

    temperature: Floats
    top_k: Indices
    top_p: Doubles
    typical_p: Doubles
    points: Doubles

    @classmethod
    def of(cls, states: Sequence[SamplingState]) -> _DrawParameters:
        params = [state.params for state in states]
        return cls(
            temperature=np.array([one.temperature for one in params], np.float32),
            top_k=np.array([one.top_k for one in params]),
            top_p=np.array([one.top_p for one in params]),
            typical_p=np.array([one.typical_p for one in params]),
            points=uniforms(
                np.array([state.seed for state in states], np.uint64),
                np.array([state.num_draws for state in states], np.uint64),
            ),
        )


def sample(logits: Floats, states: Sequence[SamplingState]) -> tuple[list[int], list[TokenLogprobs | None]]:
    """One token for each row, and its log probabilities where the request wants them.

    Penalties come first, then temperature, top_k, top_p on what top_k left, typical_p on what both left, and the draw;
    MindIE's order (sampler.py and post_processing.cpp of MindIE-LLM), with typical_p last as in transformers.

    Args:
        logits: [B, V].
        states: B of them.

    Returns:
        Tokens, NO_TOKEN where the logits are unusable, and log probabilities, None where not wanted.
    """
    with np.errstate(all="ignore"):  # unusable logits are reported, row by row
        scores = _penalised(logits, states)
        tokens = scores.argmax(axis=1)
        peaks = scores[np.arange(len(scores)), tokens]
        usable = np.isfinite(peaks)
        vocab_size = logits.shape[1]
        is_drawn = usable & [not state.params.greedy for state in states]
        is_short = is_drawn & [0 < state.params.top_k < vocab_size for state in states]
        for rows in _slabs(np.flatnonzero(is_short), vocab_size, _SHORT_SLAB):
            first, last = rows[[0, -1]]
            listed = scores[first : last + 1] if last - first < len(rows) else scores[rows]  # a view, if it can be one
            tokens[rows] = _draw_from_top_k(listed, peaks[rows], _DrawParameters.of([states[row] for row in rows]))
        for rows in _slabs(np.flatnonzero(is_drawn & ~is_short), vocab_size):
            tokens[rows] = _draw(scores[rows], peaks[rows], _DrawParameters.of([states[row] for row in rows]))
        tokens[~usable] = NO_TOKEN
        token_ids: list[int] = tokens.tolist()
        return token_ids, _logprobs(logits, token_ids, states)


def _slabs(rows: Indices, vocab_size: int, logits: int = _SLAB) -> list[Indices]:
    """Rows in groups of at most so many logits."""
    size = max(1, logits // vocab_size)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _penalised(logits: Floats, states: Sequence[SamplingState]) -> Floats:
    penalised = [(row, state.params, state.seen) for row, state in enumerate(states) if state.seen is not None]
    if not penalised:
        return logits
    rows, params, seen = zip(*penalised, strict=True)
    return penalise(logits, rows, params, seen)


def _draw_from_top_k(scores: Floats, peaks: Floats, draws: _DrawParameters) -> Indices:
    """[R] tokens drawn from the top_k of each row of scores [R, V]; `peaks` [R] are their maxima."""
    values, indices = top_n(scores, draws.top_k)  # before the temperature, which changes no order
    weights = np.exp((values - peaks[:, None]) / draws.temperature[:, None], dtype=np.float64)
    reached = weights.cumsum(axis=1)
    weights = _restricted(weights, reached, draws.top_p * reached[:, -1], draws.typical_p)
    drawn: Indices = indices[np.arange(len(scores)), _invert(weights, draws.points)]
    return drawn


def _draw(scores: Floats, peaks: Floats, draws: _DrawParameters) -> Indices:
    """[R] tokens drawn from scores [R, V], which are overwritten, without top_k; `peaks` [R] are their maxima."""
    scores -= peaks[:, None]
    scores /= draws.temperature[:, None]
    top_p, typical_p, points = draws.top_p, draws.typical_p, draws.points
    is_free = (top_p == 1) & (typical_p == 1)
    if is_free.all():
        return _draw_from_all(scores, points)
    if not is_free.any():
        return _draw_from_best(scores, points, top_p, typical_p)
    tokens = np.empty(len(scores), np.int64)
    tokens[is_free] = _draw_from_all(scores[is_free], points[is_free])
    bound = ~is_free
    tokens[bound] = _draw_from_best(scores[bound], points[bound], top_p[bound], typical_p[bound])
    return tokens


def _draw_from_all(scores: Floats, points: Doubles) -> Indices:
    """[R] tokens drawn from the whole vocabulary: first a chunk of it, then a token of the chunk."""
    rows = np.arange(len(scores))
    weights = np.exp(scores, out=scores)
    sums = np.add.reduceat(weights, np.arange(0, weights.shape[1], _CHUNK), axis=1, dtype=np.float64)
    reached = sums.cumsum(axis=1)
    targets = points * reached[:, -1]
    chunk = _first_beyond(reached, targets)
    before = np.where(chunk > 0, reached[rows, chunk - 1], 0)
    tokens = (chunk * _CHUNK)[:, None] + np.arange(_CHUNK)
    inside = np.where(tokens < weights.shape[1], weights[rows[:, None], tokens % weights.shape[1]], 0)
    # What the target leaves over within the chunk; rounding must not let it reach the chunk's end.
    rest = ((targets - before) / sums[rows, chunk]).clip(0, np.nextafter(1, 0))
    drawn: Indices = tokens[rows, _invert(inside, rest)]
    return drawn


def _draw_from_best(scores: Floats, points: Doubles, top_p: Doubles, typical_p: Doubles) -> Indices:
    """[R] tokens drawn from the most likely ones that each row's restrictions leave."""
    vocab_size = scores.shape[1]
    tokens = np.empty(len(scores), np.int64)
    # The nucleus of top_p is nearly always a few tokens wide, so a narrow look comes before a sort of everything.
    width = np.where(typical_p < 1, vocab_size, min(_FIRST_NUCLEUS, vocab_size))
    is_narrow = width < vocab_size
    mass = np.zeros(len(scores))  # of the whole vocabulary, for rows that do not look at all of it
    mass[is_narrow] = np.exp(scores[is_narrow]).sum(axis=1, dtype=np.float64)
    pending = np.arange(len(scores))
    while pending.size:
        values, indices = top_n(scores if len(pending) == len(scores) else scores[pending], width[pending])
        weights = np.exp(values, dtype=np.float64)
        reached = weights.cumsum(axis=1)
        is_all = width[pending] == vocab_size
        wanted = top_p[pending] * np.where(is_all, reached[:, -1], mass[pending])
        weights = _restricted(weights, reached, wanted, typical_p[pending])
        picked = _invert(weights, points[pending])
        is_settled = is_all | (reached[:, -1] >= wanted)
        tokens[pending[is_settled]] = indices[is_settled, picked[is_settled]]
        pending = pending[~is_settled]
        width[pending] = np.minimum(width[pending] * 16, vocab_size)
    return tokens


def _restricted(weights: Doubles, reached: Doubles, wanted: Doubles, typical_p: Doubles) -> Doubles:
    """Weights [R, W], largest first, without those behind the mass that is wanted and without untypical ones."""
    weights[reached - weights >= wanted[:, None]] = 0
    limited = np.flatnonzero(typical_p < 1)
    if limited.size:
        weights[limited] = _typical(weights[limited], typical_p[limited])
    return weights


def _typical(weights: Doubles, typical_p: Doubles) -> Doubles:
    """Weights [R, W] without the tokens whose surprise is far from the expected one.

    Those nearest to it stay, until their probabilities together reach typical_p (Meister et al., "Locally typical
    sampling", 2022). Weights need not add up to 1; 0 stands for a token that is out already.
    """
    probabilities: Doubles = weights / weights.cumsum(axis=1)[:, -1:]
    surprise = -np.log(probabilities, where=probabilities > 0, out=np.full_like(probabilities, np.inf))
    expected = np.multiply(probabilities, surprise, where=probabilities > 0, out=np.zeros_like(probabilities))
    order = np.argsort(np.abs(surprise - expected.cumsum(axis=1)[:, -1:]), axis=1, kind="stable")
    ordered = np.take_along_axis(probabilities, order, axis=1)
    chosen = ordered.cumsum(axis=1) - ordered < typical_p[:, None]
    np.put_along_axis(probabilities, order, np.where(chosen, ordered, 0), axis=1)
    return probabilities


def _invert(weights: Floats | Doubles, points: Doubles) -> Indices:
    """[R]: where each row's running sum of weights [R, W] passes the point, given as a fraction of the total.

    Sums run from left to right (numpy's `sum` pairs terms by the row's length), so that padding changes nothing.
    """
    reached = weights.cumsum(axis=1, dtype=np.float64)
    return _first_beyond(reached, points * reached[:, -1])


def _first_beyond(reached: Doubles, targets: Doubles) -> Indices:
    index: Indices = (reached > targets[:, None]).argmax(axis=1)
    return index


def _logprobs(logits: Floats, tokens: Sequence[int], states: Sequence[SamplingState]) -> list[TokenLogprobs | None]:
    reports: list[TokenLogprobs | None] = [None] * len(states)
    wanted = [
        state.params.logprobs is not None and token != NO_TOKEN for state, token in zip(states, tokens, strict=True)
    ]
    for rows in _slabs(np.flatnonzero(wanted), logits.shape[1]):
        counts = np.array([states[row].params.logprobs for row in rows])
        scores = logits[rows]
        scores -= scores.max(axis=1, keepdims=True)
        values, indices = top_n(scores, np.maximum(counts, 1))
        normalisers = np.log(np.exp(scores).sum(axis=1, dtype=np.float64))
        best = values - normalisers[:, None]
        for place, row in enumerate(rows.tolist()):
            own = float(scores[place, tokens[row]] - normalisers[place])
            top = zip(indices[place].tolist(), best[place].tolist(), strict=True)
            reports[row] = TokenLogprobs(tokens[row], own, tuple(top)[: counts[place]])
    return reports
