"""The sampler against row-by-row references, and row against row."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from telechat_mindie.engine.params import GenerationParams
from telechat_mindie.engine.penalties import TokenCounts, penalise
from telechat_mindie.engine.philox import philox4x32, uniforms
from telechat_mindie.engine.sampler import NO_TOKEN, SamplingState, sample
from telechat_mindie.engine.top_n import top_n
from telechat_mindie.errors import InputError

VOCAB = 200


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB, spread: float = 3.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * spread).astype(np.float32)


def state(
    draw: int = 0, *, seed: int = 7, prompt: tuple[int, ...] = (), answer: tuple[int, ...] = (), **params: Any
) -> SamplingState:
    made = SamplingState(GenerationParams(**params), seed, prompt)
    for token in answer:
        made.observe(token)
    made.num_draws = draw
    return made


def softmax(values: NDArray[Any]) -> NDArray[np.float64]:
    weights = np.exp(values.astype(np.float64) - values.max())
    return weights / weights.sum()


def allowed(logits: NDArray[np.float32], params: GenerationParams) -> dict[int, float]:
    """Token -> probability of one row, the long way round."""
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    scaled = logits.astype(np.float64) / params.temperature
    kept = ranked[: params.top_k or len(ranked)]
    kept = kept[: nucleus(softmax(scaled[kept]), params.top_p)]
    probabilities = dict(zip(kept, softmax(scaled[kept]).tolist(), strict=True))
    entropy = -sum(p * math.log(p) for p in probabilities.values() if p > 0)
    if params.typical_p < 1:
        kept.sort(key=lambda token: abs(-math.log(probabilities[token]) - entropy))
        kept = kept[: nucleus([probabilities[token] for token in kept], params.typical_p)]
    total = sum(probabilities[token] for token in kept)
    return {token: probabilities[token] / total for token in kept}


def nucleus(probabilities: Any, mass: float) -> int:
    """How many from the front reach the mass."""
    reached = 0.0
    for count, probability in enumerate(probabilities, 1):
        reached += probability
        if reached >= mass:
            return count
    return len(probabilities)


def drawn(logits: NDArray[np.float32], params: GenerationParams, count: int) -> Counter[int]:
    """Tokens of many draws from one row."""
    states = []
    for number in range(count):
        states.append(SamplingState(params, 11))
        states[-1].num_draws = number
    tokens, _ = sample(np.repeat(logits[None], count, axis=0), states)
    return Counter(tokens)


def test_greedy_takes_the_largest_logit_and_of_equals_the_first() -> None:
    logits = random_logits(3)
    logits[1, [17, 90]] = 50
    tokens, reports = sample(logits, [state(), state(), state(do_sample=True, temperature=0)])
    assert tokens == [logits[0].argmax(), 17, logits[2].argmax()]
    assert reports == [None, None, None]


@pytest.mark.parametrize(
    "wishes",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": VOCAB + 5},
        {"top_p": 0.6},
        {"top_p": 1e-9},
        {"top_k": 20, "top_p": 0.8},
        {"typical_p": 0.5},
        {"typical_p": 0.9, "top_k": 30, "top_p": 0.9},
        {"temperature": 0.3},
        {"temperature": 4.0},
        {"temperature": 4.0, "top_p": 0.97},  # a nucleus wider than the first look
    ],
    ids=str,
)
def test_draws_follow_the_reference_distribution(wishes: dict[str, Any]) -> None:
    """Exactly the allowed tokens come out, in the allowed proportions (chi-squared, five standard deviations)."""
    params = GenerationParams(do_sample=True, **wishes)
    logits = random_logits(1, seed=5, spread=2)[0]
    expected = allowed(logits, params)
    count = 20_000
    seen = drawn(logits, params, count)
    assert set(seen) <= set(expected)
    likely = {token: share * count for token, share in expected.items() if share * count >= 5}
    chi_squared = sum((seen[token] - hope) ** 2 / hope for token, hope in likely.items())
    assert chi_squared < len(likely) + 5 * math.sqrt(2 * len(likely))


@given(seed=st.integers(0, 10_000), k=st.integers(1, VOCAB), levels=st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_top_n_is_a_stable_sort(seed: int, k: int, levels: int) -> None:
    """Also among equals, which few levels make many of, and with a different count for each row."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, (4, VOCAB)).astype(np.float32)
    scores[0, rng.integers(0, VOCAB, 20)] = -np.inf
    counts = np.array([k, 1, max(1, k // 2), VOCAB])
    values, indices = top_n(scores, counts)
    for row, count in enumerate(counts):
        order = np.argsort(-scores[row], kind="stable")[:count]
        assert indices[row, :count].tolist() == order.tolist()
        assert values[row, :count].tolist() == scores[row, order].tolist()
        assert (values[row, count:] == -np.inf).all()


def test_top_k_keeps_exactly_k_among_equals() -> None:
    logits = np.zeros(VOCAB, np.float32)
    assert set(drawn(logits, GenerationParams(do_sample=True, top_k=5), 500)) == {0, 1, 2, 3, 4}


def test_top_p_keeps_the_token_that_crosses_the_mass() -> None:
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[:4] = np.log([0.5, 0.25, 0.125, 0.125])
    assert set(drawn(logits, GenerationParams(do_sample=True, top_p=0.5), 500)) == {0}
    assert set(drawn(logits, GenerationParams(do_sample=True, top_p=0.51), 500)) == {0, 1}
    assert set(drawn(logits, GenerationParams(do_sample=True), 2000)) == {0, 1, 2, 3}


@given(
    vocab=st.integers(1, 300),
    seed=st.integers(0, 2**64 - 1),
    draw=st.integers(0, 2**40),
    top_k=st.integers(0, 320),
    top_p=st.floats(0.01, 1),
    typical_p=st.sampled_from([1.0, 0.4]),
    temperature=st.floats(1e-5, 100),
)
@settings(max_examples=150, deadline=None)
def test_a_draw_never_leaves_the_allowed_tokens(
    vocab: int, seed: int, draw: int, top_k: int, top_p: float, typical_p: float, temperature: float
) -> None:
    logits = random_logits(1, seed=vocab, vocab=vocab)
    logits[0, :: max(2, vocab // 3)] = -np.inf
    if vocab == 1:
        logits[0, 0] = 0
    wishes = {"top_k": top_k, "top_p": top_p, "typical_p": typical_p, "temperature": temperature}
    tokens, _ = sample(logits, [state(draw, seed=seed, do_sample=True, **wishes)])
    assert 0 <= tokens[0] < vocab
    assert np.isfinite(logits[0, tokens[0]])


WISHES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"do_sample": True},
    {"do_sample": True, "top_k": 9},
    {"do_sample": True, "top_p": 0.7, "temperature": 1.7},
    {"do_sample": True, "top_p": 0.999},
    {"do_sample": True, "typical_p": 0.6, "frequency_penalty": 1.0},
    {"do_sample": True, "top_k": 40, "top_p": 0.5, "presence_penalty": -1.0},
    {"logprobs": 3, "do_sample": True},
]


@given(st.lists(st.tuples(st.integers(0, len(WISHES) - 1), st.integers(0, 99)), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_a_row_does_not_depend_on_the_batch(rows: list[tuple[int, int]]) -> None:
    """The very same token and log probabilities alone and in any company."""
    logits = random_logits(len(rows), seed=len(rows), vocab=5000)

    def states() -> list[SamplingState]:
        return [state(number, prompt=(1, 2, 3), answer=(2, 2, 9), **WISHES[kind]) for kind, number in rows]

    tokens, reports = sample(logits, states())
    for row, alone in enumerate(states()):
        assert sample(logits[row : row + 1], [alone]) == ([tokens[row]], [reports[row]])


def test_a_big_batch_is_worked_on_in_slabs_with_the_same_result() -> None:
    logits = random_logits(70, vocab=5000)  # more than one slab
    states = [state(row, do_sample=True, top_p=0.9, logprobs=2) for row in range(70)]
    tokens, reports = sample(logits, states)
    for row in (0, 51, 52, 53, 69):
        assert sample(logits[row : row + 1], [states[row]]) == ([tokens[row]], [reports[row]])


def test_seed_and_number_of_the_draw_decide() -> None:
    logits = np.zeros((1, VOCAB), np.float32)

    def answer(seed: int) -> list[int]:
        return [sample(logits, [state(number, seed=seed, do_sample=True)])[0][0] for number in range(20)]

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)
    assert answer(1) != answer(1 + 2**40)  # all 64 bits count
    assert len(set(answer(1))) > 10


def test_philox_gives_the_published_numbers() -> None:
    """The known answers of the Random123 distribution (kat_vectors, philox4x32 10)."""
    counters = [[0] * 4, [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]]
    keys = [[0] * 2, [0xFFFFFFFF] * 2, [0xA4093822, 0x299F31D0]]
    words = philox4x32(np.array(counters, np.uint64).T, np.array(keys, np.uint64).T)
    assert words.T.tolist() == [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]


def test_uniforms_fill_the_unit_interval() -> None:
    points = uniforms(np.full(100_000, 3, np.uint64), np.arange(100_000, dtype=np.uint64))
    assert points.min() >= 0 and points.max() < 1
    counts = np.histogram(points, 50, (0, 1))[0]
    assert abs(counts - 2000).max() < 5 * math.sqrt(2000)


@pytest.mark.parametrize(
    ("wishes", "formula"),
    [
        # CTRL: divide what is positive, multiply what is negative; prompt and answer alike, once whatever the count.
        ({"repetition_penalty": 1.5}, lambda logit, count, seen: logit / 1.5 if logit > 0 else logit * 1.5),
        # OpenAI's API reference: logit - count * frequency - (count > 0) * presence, over the answer.
        ({"frequency_penalty": 0.7}, lambda logit, count, seen: logit - 0.7 * count),
        ({"presence_penalty": -1.2}, lambda logit, count, seen: logit + 1.2 * (count > 0)),
        (
            {"repetition_penalty": 0.5, "frequency_penalty": 0.25, "presence_penalty": 1.0},
            lambda logit, count, seen: (logit / 0.5 if logit > 0 else logit * 0.5) - 0.25 * count - (count > 0),
        ),
    ],
    ids=["repetition", "frequency", "presence", "all"],
)
def test_penalties_follow_their_formulas(wishes: dict[str, float], formula: Any) -> None:
    logits = random_logits(2, seed=3)
    prompt, answer = (5, 6, 6, 7), (7, 8, 8, 8, 190)
    seen = TokenCounts(prompt)
    for token in answer:
        seen.add(token)
    result = penalise(logits, [1], [GenerationParams(**wishes)], [seen])
    expected = logits.astype(np.float64)
    for token in set(prompt + answer):
        expected[1, token] = formula(expected[1, token], answer.count(token), True)
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)
    assert result[0].tolist() == logits[0].tolist()


@given(st.lists(st.integers(0, 30), max_size=20), st.lists(st.integers(0, 60), max_size=80))
def test_token_counts_are_those_of_a_counter(prompt: list[int], answer: list[int]) -> None:
    seen = TokenCounts(prompt)
    for token in answer:
        seen.add(token)
    counted = Counter(answer)
    assert dict(zip(seen.ids.tolist(), seen.counts.tolist(), strict=True)) == {
        token: counted[token] for token in {*prompt, *answer}
    }


def test_penalties_steer_a_greedy_answer() -> None:
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, :3] = [4, 3, 2]
    now = state(presence_penalty=1.5)
    answer = []
    for _ in range(3):
        answer.append(sample(logits, [now])[0][0])
        now.observe(answer[-1])
    assert answer == [0, 1, 0]  # 4; then 2.5 against 3; then 2.5 against 1.5 and 2
    assert logits[0, 0] == 4  # the model's logits are left alone


def test_penalties_bear_on_draws() -> None:
    seen = tuple(range(0, VOCAB, 2))
    states = [state(n, answer=seen, do_sample=True, presence_penalty=1.0, temperature=0.02) for n in range(200)]
    tokens, _ = sample(np.zeros((200, VOCAB), np.float32), states)
    assert not set(tokens) & set(seen)


def test_logprobs_are_the_models_own() -> None:
    """Of the whole vocabulary, before penalties, temperature and top_k."""
    logits = random_logits(3, seed=9)
    wishes: dict[str, Any] = {"do_sample": True, "temperature": 0.5, "top_k": 3, "repetition_penalty": 2.0}
    states = [state(prompt=(1,), logprobs=4, **wishes), state(logprobs=0), state()]
    tokens, reports = sample(logits, states)
    expected = np.log(softmax(logits[0]))
    best = np.argsort(-logits[0])[:4]
    report = reports[0]
    assert report is not None and report.token_id == tokens[0]
    assert report.logprob == pytest.approx(expected[tokens[0]], abs=1e-5)
    assert [token for token, _ in report.top] == best.tolist()
    assert [logprob for _, logprob in report.top] == pytest.approx(expected[best].tolist(), abs=1e-5)
    assert reports[1] is not None and reports[1].top == ()
    assert reports[2] is None


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("wishes", [{}, {"do_sample": True, "logprobs": 2}, {"repetition_penalty": 1.1}], ids=str)
def test_unusable_logits_give_no_token_and_leave_the_others_alone(poison: float, wishes: dict[str, Any]) -> None:
    logits = random_logits(3)
    clean, _ = sample(logits, [state(**wishes) for _ in range(3)])
    logits[1, 40] = poison
    tokens, reports = sample(logits, [state(**wishes) for _ in range(3)])
    assert tokens == [clean[0], NO_TOKEN, clean[2]]
    assert reports[1] is None


def test_a_row_of_minus_infinity_is_unusable() -> None:
    assert sample(np.full((1, VOCAB), -np.inf, np.float32), [state(do_sample=True)])[0] == [NO_TOKEN]


@pytest.mark.parametrize(
    "wish",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"typical_p": 0.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"presence_penalty": 2.1},
        {"frequency_penalty": math.nan},
        {"seed": -1},
        {"seed": 2**64},
        {"max_new_tokens": 0},
        {"stop": ("ab", "")},
        {"logprobs": -1},
        {"priority": 0},
        {"priority": 6},
        {"timeout": 0.0},
        {"timeout": math.nan},
    ],
    ids=str,
)
def test_wishes_out_of_range_are_refused_by_name(wish: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wish))):
        GenerationParams(**wish)
