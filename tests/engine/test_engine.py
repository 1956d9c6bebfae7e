"""The engine over a model without weights whose every token depends on every cache slot before it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.checkpoints import make_checkpoint
from helpers.engine_checks import check_scheduler
from helpers.null_model import EOS_ID, ByteTokenizer, Call, NullRunner
from helpers.tiny_tokenizer import train_tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from telechat_mindie.engine import core
from telechat_mindie.engine.answer_text import AnswerText
from telechat_mindie.engine.config import EngineConfig
from telechat_mindie.engine.engine import Engine, EngineBusyError, EngineStoppedError
from telechat_mindie.engine.output import FinishReason, Output
from telechat_mindie.engine.params import GenerationParams
from telechat_mindie.errors import InputError
from telechat_mindie.model_dir.build import BuildOptions, build
from telechat_mindie.text.tokenizer import TelechatTokenizer

BLOCK = 4
TOKENIZER = ByteTokenizer()


def config(**changes: Any) -> EngineConfig:
    limits: dict[str, Any] = {
        "max_seq_len": 96,
        "max_input_token_len": 64,
        "max_iter_times": 64,
        "max_batch_size": 16,
        "max_prefill_batch_size": 8,
        "max_prefill_tokens": 128,
        "block_size": BLOCK,
    }
    return EngineConfig(**(limits | changes))


def engine(runner: NullRunner | None = None, **changes: Any) -> Engine:
    return Engine(runner or NullRunner(num_blocks=400), TOKENIZER, config(**changes))


@dataclass
class Answer:
    """All outputs of one request put together."""

    tokens: list[int]
    text: str
    reason: FinishReason | None
    logprobs: list[Any]
    last: Output


def collect(outputs: Iterable[Output]) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    for output in outputs:
        answer = answers.setdefault(output.request_id, Answer([], "", None, [], output))
        assert answer.reason is None, "an output came after the last one"
        answer.tokens += output.token_ids
        answer.text += output.text
        answer.logprobs += output.logprobs
        answer.reason = output.finish_reason
        answer.last = output
    return answers


def run_all(made: Engine) -> dict[str, Answer]:
    """Step until nothing is left, with a look at every block after each step."""
    outputs: list[Output] = []
    while made.has_work:
        outputs += made.step()
        check_scheduler(made._core.scheduler)
    return collect(outputs)


def answer_alone(prompt: ArrayLike, params: GenerationParams) -> Answer:
    made = engine()
    made.add(prompt, params, "alone")
    return run_all(made)["alone"]


def mixed_requests(count: int) -> list[tuple[list[int], GenerationParams]]:
    """Prompts of all lengths, some with a common beginning; greedy and seeded, with every restriction."""
    rng = np.random.default_rng(1)
    common = rng.integers(3, 259, 40).tolist()
    wishes: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.2},
        {"do_sample": True},
        {"do_sample": True, "top_k": 20, "temperature": 0.7},
        {"do_sample": True, "top_p": 0.8, "presence_penalty": 0.5},
        {"do_sample": True, "typical_p": 0.7, "frequency_penalty": 0.3},
        {"logprobs": 2},
        {"ignore_eos": True, "stop": ("a", "\ufffd\ufffd\ufffd")},
    ]
    requests = []
    for number in range(count):
        own = rng.integers(3, 259, rng.integers(1, 25)).tolist()
        prompt = common[: rng.integers(0, 40)] + own if number % 2 else own
        params = GenerationParams(max_new_tokens=int(rng.integers(1, 30)), seed=number, **wishes[number % len(wishes)])
        requests.append((prompt, params))
    return requests


MODES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "plain": ({"num_blocks": 400}, {}),
    "prefix cache": ({"num_blocks": 400}, {"prefix_cache": True}),
    "chunked": ({"num_blocks": 400}, {"chunked_prefill": True, "split_chunk_tokens": 20}),
    "recompute": ({"num_blocks": 32}, {}),
    "recompute in pieces": ({"num_blocks": 40}, {"max_prefill_tokens": 64, "max_iter_times": 32}),
    "swap": ({"num_blocks": 32, "num_host_blocks": 40}, {"max_preempt_count": 4}),
    "swap and recompute": ({"num_blocks": 32, "num_host_blocks": 12}, {"max_preempt_count": 1}),
    "everything": (
        {"num_blocks": 32, "num_host_blocks": 20},
        {"max_preempt_count": 1, "prefix_cache": True, "chunked_prefill": True, "split_chunk_tokens": 20},
    ),
}


@pytest.fixture(scope="module")
def alone() -> list[Answer]:
    return [answer_alone(*request) for request in mixed_requests(64)]


@pytest.mark.parametrize("mode", MODES)
def test_together_every_request_answers_as_alone(mode: str, alone: list[Answer]) -> None:
    runner_options, changes = MODES[mode]
    runner = NullRunner(**runner_options)
    made = engine(runner, **changes)
    for number, (prompt, params) in enumerate(mixed_requests(64)):
        made.add(prompt, params, str(number))
    together = run_all(made)
    for number, expected in enumerate(alone):
        found = together[str(number)]
        assert (found.tokens, found.text, found.reason) == (expected.tokens, expected.text, expected.reason)
        assert found.logprobs == expected.logprobs
    forms = {call.form for call in runner.calls}
    stats = made.stats()
    assert ("hit" in forms) == ("prefix" in mode or mode == "everything") == (stats.cached_tokens > 0)
    assert ("mixed" in forms) == (mode in ("chunked", "everything", "recompute in pieces"))
    assert (stats.preemptions > 0) == (runner_options["num_blocks"] < 100)
    assert bool(runner.swaps) == ("swap" in mode or mode == "everything")
    assert stats.blocks_used == stats.host_blocks_used == 0
    assert len(together) == 64
    assert stats.generated_tokens == sum(len(answer.tokens) for answer in alone)


def test_the_pool_is_used_to_the_last_block_under_pressure() -> None:
    made = engine(NullRunner(num_blocks=61), max_prefill_batch_size=16)
    for number in range(30):
        made.add([5 + number] * 12, GenerationParams(max_new_tokens=40, seed=number))
    use = []
    while made.stats().waiting:
        made.step()
        use.append(made.stats().block_use)
    assert max(use) == 1.0
    assert np.mean(use) > 0.9


def test_forward_gets_what_mindie_passes() -> None:
    """The null model checks every argument of every call; this says which calls a small scenario makes."""
    runner = NullRunner()
    made = engine(runner, prefix_cache=True)
    made.add(list(range(10, 20)), GenerationParams(max_new_tokens=3))
    made.step()
    made.add(list(range(10, 23)), GenerationParams(max_new_tokens=2))
    run_all(made)
    assert runner.calls == [
        Call("prefill", (10,), (10,)),
        Call("hit", (5,), (13,)),  # two of the blocks were known
        Call("decode", (1, 1), (11, 14)),
        Call("decode", (1,), (12,)),
    ]


def test_a_prefix_hit_builds_no_mask() -> None:
    """One of float64 [new tokens, context] would have half a GiB for 8192 tokens, and nobody reads it."""
    runner = NullRunner()
    calls: list[dict[str, Any]] = []
    runner.before_forward = calls.append
    made = engine(runner, prefix_cache=True)
    for own in ([7] * 3, [8] * 3):
        made.add([9] * 2 * BLOCK + own, GenerationParams(max_new_tokens=1))
        made.step()
    assert [call["position_ids"][0] for call in calls] == [0, 2 * BLOCK]
    assert [call["spec_mask"] for call in calls] == [None, None]


def test_logits_are_not_copied_on_their_way_to_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = NullRunner()
    given: list[NDArray[np.float32]] = []
    runner.after_forward = lambda arguments, logits: given.append(logits)
    honest = core.sample

    def sample(logits: NDArray[np.float32], states: Sequence[Any]) -> Any:
        assert np.shares_memory(logits, given[-1])
        return honest(logits, states)

    monkeypatch.setattr(core, "sample", sample)
    made = engine(runner)
    for first in (5, 6):
        made.add([first, 7], GenerationParams(max_new_tokens=3))
    assert {answer.reason for answer in run_all(made).values()} == {FinishReason.LENGTH}


def test_a_prompt_may_be_any_array_of_integers_and_stays_the_callers() -> None:
    expected = answer_alone([5, 6, 7], GenerationParams(max_new_tokens=9)).tokens
    for dtype in (np.int32, np.int64, np.uint16):
        prompt = np.array([5, 6, 7], dtype)
        assert answer_alone(prompt, GenerationParams(max_new_tokens=9)).tokens == expected
        assert prompt.tolist() == [5, 6, 7]


def test_chunks_and_decodes_share_a_forward() -> None:
    runner = NullRunner()
    made = engine(runner, chunked_prefill=True, split_chunk_tokens=8)
    made.add([9] * 3, GenerationParams(max_new_tokens=4))
    made.step()
    made.add([8] * 12, GenerationParams(max_new_tokens=1))
    run_all(made)
    assert runner.calls == [
        Call("mixed", (3,), (3,)),
        Call("mixed", (1, 7), (4, 7)),
        Call("mixed", (1, 5), (5, 12)),
        Call("decode", (1,), (6,)),
    ]


def test_a_hit_inside_a_mixed_batch_is_passed_as_the_prefix_cache_plugin_does() -> None:
    runner = NullRunner()
    made = engine(runner, chunked_prefill=True, prefix_cache=True, split_chunk_tokens=8)
    made.add([9] * 8, GenerationParams(max_new_tokens=3))
    made.step()
    made.add([9] * 8 + [7] * 9, GenerationParams(max_new_tokens=1))
    run_all(made)
    assert runner.calls[1:3] == [Call("hit", (1, 7), (9, 15)), Call("mixed", (1, 2), (10, 17))]


def text_of(answer: Answer) -> str:
    decoder = TOKENIZER.stream_decoder()
    return decoder.put(answer.tokens) + decoder.flush()


def test_end_of_sequence_ends_an_answer_unless_ignored() -> None:
    runner = NullRunner(eos_bias=14)  # the most likely token now and then
    made = engine(runner)
    made.add([5, 6, 7], GenerationParams(), "ends")
    made.add([5, 6, 7], GenerationParams(ignore_eos=True, max_new_tokens=40), "goes on")
    answers = run_all(made)
    assert answers["ends"].reason is FinishReason.EOS
    assert answers["ends"].tokens[-1] == EOS_ID and EOS_ID not in answers["ends"].tokens[:-1]
    assert answers["goes on"].reason is FinishReason.LENGTH
    assert len(answers["goes on"].tokens) == 40 and EOS_ID in answers["goes on"].tokens


@pytest.mark.parametrize("eos", [[EOS_ID, 299], (299, EOS_ID)])
def test_each_of_several_ends_of_sequence_ends_an_answer(eos: Sequence[int]) -> None:
    runner = NullRunner(eos_bias=14)
    runner.model_config.eos_token_id = eos
    made = engine(runner)
    made.add([5, 6, 7], GenerationParams(), "ends")
    expected = run_all(made)["ends"]
    assert expected.reason is FinishReason.EOS and expected.tokens[-1] == EOS_ID
    runner.model_config.eos_token_id = [298, expected.tokens[0]]
    made = engine(runner)
    made.add([5, 6, 7], GenerationParams(), "ends")
    assert run_all(made)["ends"].tokens == expected.tokens[:1]


def test_stop_tokens_end_an_answer_and_are_counted_but_not_shown() -> None:
    free = answer_alone([5, 6, 7], GenerationParams(max_new_tokens=20))
    at = next(
        place for place in range(3, 20) if free.tokens[place] >= 3 and free.tokens[place] not in free.tokens[:place]
    )
    stopped = answer_alone([5, 6, 7], GenerationParams(stop_token_ids=(free.tokens[at],)))
    shown = answer_alone(
        [5, 6, 7], GenerationParams(stop_token_ids=(free.tokens[at],), include_stop_str_in_output=True)
    )
    assert stopped.reason is shown.reason is FinishReason.STOP_ID
    assert stopped.tokens == shown.tokens == free.tokens[: at + 1]
    decoder = TOKENIZER.stream_decoder()
    assert stopped.text == decoder.put(free.tokens[:at]) + decoder.flush()
    assert shown.text == text_of(shown)


def test_a_stop_string_ends_an_answer_and_is_cut_off() -> None:
    free = answer_alone([5, 6, 7], GenerationParams(max_new_tokens=60))
    stop = free.text[10:13]
    assert free.text.find(stop) == 10
    stopped = answer_alone([5, 6, 7], GenerationParams(stop=("never there", stop)))
    shown = answer_alone([5, 6, 7], GenerationParams(stop=(stop,), include_stop_str_in_output=True))
    assert (stopped.text, stopped.reason) == (free.text[:10], FinishReason.STOP_STRING)
    assert (shown.text, shown.reason) == (free.text[:13], FinishReason.STOP_STRING)
    assert len(stopped.tokens) < 60


def test_length_and_room_end_an_answer() -> None:
    made = engine(max_seq_len=20, max_input_token_len=12, max_iter_times=15)
    made.add([5] * 10, GenerationParams(max_new_tokens=10), "both at once")
    made.add([5] * 12, GenerationParams(max_new_tokens=10), "room")
    made.add([5] * 2, GenerationParams(max_new_tokens=99), "iterations")
    made.add([5] * 2, GenerationParams(), "no wish")
    answers = run_all(made)
    assert {name: (answer.reason, len(answer.tokens)) for name, answer in answers.items()} == {
        "both at once": (FinishReason.LENGTH, 10),
        "room": (FinishReason.MAX_SEQ, 8),
        "iterations": (FinishReason.LENGTH, 15),
        "no wish": (FinishReason.LENGTH, 15),
    }


def test_the_cache_bounds_the_longest_sequence() -> None:
    made = engine(NullRunner(num_blocks=6))  # five may be used
    assert made.config.max_seq_len == 5 * BLOCK
    made.add([5] * 3, GenerationParams(), "a")
    answer = run_all(made)["a"]
    assert (answer.reason, len(answer.tokens)) == (FinishReason.MAX_SEQ, 17)
    assert engine(NullRunner(num_blocks=400, max_position_embedding=30)).config.max_seq_len == 30


@pytest.mark.parametrize(
    "prompt", [[], [300], [-1], [5] * 65, [1.5], "text", [[1], [2]], [[1], [2, 3]], [2**70]], ids=lambda p: str(p)[:12]
)
def test_a_bad_prompt_is_refused_and_hurts_nobody(prompt: Any) -> None:
    made = engine()
    made.add([5, 6], GenerationParams(max_new_tokens=3), "good")
    with pytest.raises(InputError, match="prompt"):
        made.add(prompt)
    assert run_all(made)["good"].reason is FinishReason.LENGTH


def test_an_id_may_be_used_again_only_after_its_request() -> None:
    made = engine()
    made.add([5], GenerationParams(max_new_tokens=1), "a")
    with pytest.raises(InputError, match="in use"):
        made.add([5], request_id="a")
    run_all(made)
    made.add([5], GenerationParams(max_new_tokens=1), "a")
    assert run_all(made)["a"].reason is FinishReason.LENGTH


def test_cancel_frees_blocks_at_once_in_every_state() -> None:
    runner = NullRunner(num_blocks=10, num_host_blocks=8)
    made = engine(runner, max_preempt_count=1)
    streams = [made.add([5 + number] * 11, GenerationParams(max_new_tokens=9), str(number)) for number in range(4)]
    made.step()
    while not made.stats().swapped:
        made.step()
    assert made.stats().running and made.stats().waiting
    for stream in streams:
        assert made.cancel(stream.request_id)
        check_scheduler(made._core.scheduler)
        assert not made.cancel(stream.request_id)
    assert (made.stats().blocks_used, made.stats().host_blocks_used) == (0, 0)
    assert [collect(stream)[stream.request_id].reason for stream in streams] == [FinishReason.CANCELLED] * 4


def test_cancel_during_a_forward_takes_effect_right_after_it() -> None:
    runner = NullRunner()
    made = engine(runner)
    stream = made.add([5] * 6)
    made.step()
    runner.before_forward = lambda arguments: made.cancel(stream.request_id)
    outputs = made.step()
    assert [(output.token_ids, output.finish_reason) for output in outputs] == [((), FinishReason.CANCELLED)]
    assert made.stats().blocks_used == 0


def test_the_computation_of_earlier_parts_of_a_prompt_is_no_wait() -> None:
    now = [100.0]

    def compute(_: object) -> None:
        now[0] += 7

    runner = NullRunner()
    runner.before_forward = compute
    made = Engine(runner, TOKENIZER, config(chunked_prefill=True, split_chunk_tokens=8), clock=lambda: now[0])
    made.add([9] * 20, GenerationParams(max_new_tokens=2))
    now[0] += 3
    outputs = []
    while made.has_work:
        outputs += made.step()
        now[0] += 1
    assert [call.form for call in runner.calls] == ["mixed"] * 3 + ["decode"]
    assert [output.wait for output in outputs] == [1, 1]  # not the seven seconds of each forward


def test_deadlines_end_running_and_waiting_requests() -> None:
    now = [100.0]
    made = Engine(NullRunner(), TOKENIZER, config(max_batch_size=1, max_prefill_batch_size=1), clock=lambda: now[0])
    made.add([5], GenerationParams(timeout=5, max_new_tokens=50), "runs")
    made.add([6], GenerationParams(timeout=9), "waits")
    made.add([7], GenerationParams(max_new_tokens=2), "patient")
    first = made.step()
    now[0] = 105.0
    outputs = first + made.step()
    assert [(o.request_id, o.finish_reason) for o in outputs] == [
        ("runs", None),
        ("runs", FinishReason.DEADLINE),
        ("waits", None),
    ]
    now[0] = 110.0
    made.add([8], GenerationParams(max_new_tokens=1), "waits too")
    answers = run_all(made)
    assert answers["waits"].reason is FinishReason.DEADLINE
    assert answers["patient"].reason is answers["waits too"].reason is FinishReason.LENGTH
    timings = answers["patient"].last.timings
    assert (timings.arrival, timings.first_token, timings.now) == (100.0, 110.0, 110.0)


def test_a_deadline_is_not_for_the_next_request_of_that_name() -> None:
    now = [0.0]
    made = Engine(NullRunner(), TOKENIZER, config(), clock=lambda: now[0])
    made.add([5], GenerationParams(timeout=5, max_new_tokens=1), "a")
    run_all(made)
    made.add([5], GenerationParams(timeout=50, max_new_tokens=2), "a")
    now[0] = 6.0
    assert run_all(made)["a"].reason is FinishReason.LENGTH


def test_a_deadline_lets_go_of_text_that_was_held_back() -> None:
    now = [0.0]
    made = Engine(NullRunner(), TOKENIZER, config(), clock=lambda: now[0])
    free = answer_alone([5, 6], GenerationParams(max_new_tokens=6))
    made.add([5, 6], GenerationParams(timeout=1, stop=(free.text[:2] + "no",)), "a")
    outputs = [output for _ in range(3) for output in made.step()]
    now[0] = 2.0
    answer = collect(outputs + made.step())["a"]
    assert answer.text == text_of(answer) != ""


def test_urgent_requests_run_first() -> None:
    made = engine(max_batch_size=1, max_prefill_batch_size=1)
    for name, priority in (("a", 5), ("b", 3), ("c", 1)):
        made.add([5], GenerationParams(max_new_tokens=1, priority=priority), name)
    assert list(run_all(made)) == ["c", "b", "a"]


def test_a_failing_forward_ends_its_batch_and_nothing_else() -> None:
    runner = NullRunner()
    made = engine(runner, max_prefill_batch_size=2, prefix_cache=True)
    for name in "abcd":
        made.add([5] * 9, GenerationParams(max_new_tokens=3), name)

    def fail_once(arguments: dict[str, Any]) -> None:
        runner.before_forward = lambda arguments: None
        raise MemoryError("no room\nfor it")

    runner.before_forward = fail_once
    answers = run_all(made)
    assert [(name, answer.reason) for name, answer in sorted(answers.items())] == [
        ("a", FinishReason.ERROR),
        ("b", FinishReason.ERROR),
        ("c", FinishReason.LENGTH),
        ("d", FinishReason.LENGTH),
    ]
    assert answers["a"].last.error == "MemoryError: no room for it"
    assert answers["c"].tokens == answer_alone([5] * 9, GenerationParams(max_new_tokens=3)).tokens
    assert made.stats().blocks_used == 0


def test_logits_of_another_shape_are_an_error_of_the_batch() -> None:
    runner = NullRunner()
    made = engine(runner)
    runner.logits = lambda history: np.zeros((len(history) + 1, 300), np.float32)  # type: ignore[method-assign]
    made.add([5], request_id="a")
    answer = run_all(made)["a"]
    assert answer.reason is FinishReason.ERROR and "[2, 300] instead of [1, 300]" in str(answer.last.error)


def test_a_failing_swap_ends_the_requests_it_moves() -> None:
    runner = NullRunner(num_blocks=10, num_host_blocks=8)
    made = engine(runner, max_preempt_count=1)
    for number in range(3):
        made.add([5 + number] * 11, GenerationParams(max_new_tokens=9), str(number))

    honest = runner.swap

    def fail_once(*_: Any) -> None:
        runner.swap = honest  # type: ignore[method-assign]
        raise OSError("bus")

    runner.swap = fail_once  # type: ignore[method-assign]
    outputs = []
    while runner.swap is fail_once:
        outputs = made.step()
    assert {output.error for output in outputs} == {"OSError: bus"}
    assert {output.request_id for output in outputs} == {"0", "1"}  # the batch, and the one that was to be moved
    assert made.stats().swapped == made.stats().host_blocks_used == 0


def test_nan_logits_end_only_their_own_request() -> None:
    runner = NullRunner()
    made = engine(runner)
    for name in "abc":
        made.add([ord(name)] * 3, GenerationParams(max_new_tokens=4, do_sample=True, seed=1), name)

    def spoil(arguments: dict[str, Any], logits: Any) -> None:
        if not arguments["prefill"] and len(logits) == 3:
            logits[1, 17] = np.nan

    runner.after_forward = spoil
    answers = run_all(made)
    assert [answers[name].reason for name in "abc"] == [FinishReason.LENGTH, FinishReason.ERROR, FinishReason.LENGTH]
    assert "NaN" in str(answers["b"].last.error) and len(answers["b"].tokens) == 1
    for name in "ac":
        expected = answer_alone([ord(name)] * 3, GenerationParams(max_new_tokens=4, do_sample=True, seed=1))
        assert answers[name].tokens == expected.tokens


def test_a_sampler_that_chokes_on_one_request_ends_only_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = core.sample

    def picky(logits: Any, states: Sequence[Any]) -> Any:
        if any(state.seed == 666 for state in states):
            raise ValueError("not this one")
        return honest(logits, states)

    monkeypatch.setattr(core, "sample", picky)
    made = engine()
    for name, seed in (("a", 1), ("b", 666), ("c", 2)):
        made.add([5], GenerationParams(max_new_tokens=2, seed=seed), name)
    answers = run_all(made)
    assert [answers[name].reason for name in "abc"] == [FinishReason.LENGTH, FinishReason.ERROR, FinishReason.LENGTH]
    assert answers["b"].last.error == "ValueError: not this one"


def test_a_decoder_or_receiver_that_raises_ends_only_its_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def put(self, ids: Iterable[int]) -> str:
            raise ValueError("cannot decode")

        def flush(self) -> str:
            raise ValueError("cannot decode")

    made = engine()
    made.add([5], GenerationParams(max_new_tokens=3), "good")
    monkeypatch.setattr(TOKENIZER, "stream_decoder", lambda *_: Broken())
    made.add([6], GenerationParams(max_new_tokens=3, timeout=1000), "undecodable")
    monkeypatch.undo()
    received = []

    def gone(output: Output) -> None:
        received.append(output)
        raise ConnectionError("client is gone")

    made.submit([7], GenerationParams(max_new_tokens=3), gone, "gone")
    answers = run_all(made)
    assert {name: answer.reason for name, answer in answers.items()} == {
        "good": FinishReason.LENGTH,
        "undecodable": FinishReason.ERROR,
        "gone": FinishReason.CANCELLED,
    }
    assert len(received) == 1
    assert made.stats().blocks_used == 0


def test_an_interrupted_step_can_be_repeated() -> None:
    runner = NullRunner()
    made = engine(runner)
    made.add([5] * 5, GenerationParams(max_new_tokens=6), "a")
    outputs = made.step()

    def interrupt(arguments: dict[str, Any]) -> None:
        runner.before_forward = lambda arguments: None
        raise KeyboardInterrupt

    runner.before_forward = interrupt
    with pytest.raises(KeyboardInterrupt):
        made.step()
    while made.has_work:
        outputs += made.step()
    assert collect(outputs)["a"].tokens == answer_alone([5] * 5, GenerationParams(max_new_tokens=6)).tokens


def test_what_was_cancelled_or_moved_by_an_interrupted_step_has_ended() -> None:
    runner = NullRunner(num_blocks=10, num_host_blocks=8)
    made = engine(runner, max_preempt_count=1)
    streams = [made.add([5 + number] * 11, GenerationParams(max_new_tokens=9), str(number)) for number in range(3)]

    def interrupt(*_: Any) -> None:
        made.cancel("0")
        raise KeyboardInterrupt

    runner.swap = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        while made.has_work:
            made.step()
    assert [collect(stream)[stream.request_id].reason for stream in streams[:2]] == [
        FinishReason.CANCELLED,
        FinishReason.ERROR,
    ]
    del runner.swap
    answer = run_all(made)["2"]
    assert answer.reason is FinishReason.LENGTH


def test_a_full_queue_refuses_and_recovers() -> None:
    made = engine(max_waiting=2)
    made.add([5], GenerationParams(max_new_tokens=1))
    made.add([5], GenerationParams(max_new_tokens=1))
    with pytest.raises(EngineBusyError, match="too many"):
        made.add([5])
    run_all(made)
    made.add([5], GenerationParams(max_new_tokens=1))


def test_outputs_tell_usage_seed_and_log_probabilities() -> None:
    made = engine(prefix_cache=True)
    made.add(list(range(10, 22)), GenerationParams(max_new_tokens=1), "first")
    first = run_all(made)["first"]
    made.add(list(range(10, 22)), GenerationParams(max_new_tokens=2, logprobs=3, seed=42), "second")
    outputs = made.step() + made.step()
    last = outputs[-1]
    assert (last.prompt_tokens, last.cached_tokens, last.generated_tokens, last.seed) == (12, 8, 2, 42)
    for output in outputs:
        (report,) = output.logprobs
        assert report.token_id == output.token_ids[0] == report.top[0][0]
        assert len(report.top) == 3 and report.logprob == report.top[0][1] < 0
    stats = made.stats()
    assert stats.prefix_hit_rate == 8 / 24
    assert stats.generated_tokens == 3
    assert [first.reason, last.finish_reason] == [FinishReason.LENGTH] * 2 and not made.has_work


def test_without_a_seed_every_request_draws_differently() -> None:
    made = engine()
    for name in "ab":
        made.add([5], GenerationParams(do_sample=True, max_new_tokens=20), name)
    answers = run_all(made)
    assert answers["a"].tokens != answers["b"].tokens
    again = answer_alone([5], GenerationParams(do_sample=True, max_new_tokens=20, seed=answers["a"].last.seed))
    assert again.tokens == answers["a"].tokens


def test_each_token_is_a_draw_of_its_own_and_seen_by_the_next() -> None:
    runner = NullRunner()
    runner.logits = lambda history: np.zeros((len(history), 300), np.float32)  # type: ignore[method-assign]
    made = engine(runner)
    made.add([5], GenerationParams(do_sample=True, max_new_tokens=30, ignore_eos=True), "drawn")
    made.add([5], GenerationParams(presence_penalty=1, max_new_tokens=30, ignore_eos=True), "penalised")
    answers = run_all(made)
    assert len(set(answers["drawn"].tokens)) > 20
    assert answers["penalised"].tokens == list(range(30))


def test_generate_answers_in_this_thread_and_cleans_up_when_left() -> None:
    params = GenerationParams(max_new_tokens=5)
    made = engine()
    (answer,) = collect(made.generate([5, 6], params)).values()
    assert answer.tokens == answer_alone([5, 6], params).tokens
    unfinished = made.generate([5, 6], params)
    next(unfinished)
    unfinished.close()
    assert not made.has_work


def test_the_packages_own_tokenizer_streams_the_answer(tmp_path: Path) -> None:
    tokenizer = TelechatTokenizer(train_tiny_tokenizer(tmp_path))
    made = Engine(NullRunner(vocab_size=tokenizer.vocab_size, num_blocks=100), tokenizer, config())
    made.add(tokenizer.encode("生抽"), GenerationParams(max_new_tokens=60, do_sample=True, seed=3), "a")
    answer = run_all(made)["a"]
    assert answer.text == tokenizer.decode(answer.tokens, skip_special_tokens=True) != ""


def test_the_real_runner_answers_together_as_alone(tmp_path: Path) -> None:
    """The model's own kernels under prefix hits, chunks, preemption, swaps and decodes in changing company."""
    make_checkpoint(tmp_path / "checkpoint")
    build(tmp_path / "model", tmp_path / "checkpoint", BuildOptions(dtype="float32"))
    from telechat_mindie import ModelRunner

    rng = np.random.default_rng(2)
    common = rng.integers(22, 500, 20).tolist()
    prompts = [common[: 5 * (number % 4)] + rng.integers(22, 500, 3 + number).tolist() for number in range(12)]
    runner = ModelRunner(str(tmp_path / "model"), 1, 1, 8, num_blocks=17)

    def answers(changes: dict[str, Any], batches: list[list[int]]) -> tuple[list[list[int]], Engine]:
        made = Engine(runner, runner.tokenizer, config(block_size=8, max_seq_len=64, max_input_token_len=40, **changes))
        found: dict[str, Answer] = {}
        for batch in batches:
            for number in batch:
                params = GenerationParams(max_new_tokens=12, ignore_eos=True, do_sample=number % 2 > 0, seed=number)
                made.add(prompts[number], params, str(number))
            found |= collect(output for _ in iter(lambda: made.has_work, False) for output in made.step())
        return [found[str(number)].tokens for number in range(12)], made

    expected, _ = answers({}, [[number] for number in range(12)])
    limits = {"chunked_prefill": True, "split_chunk_tokens": 16, "prefix_cache": True, "max_preempt_count": 1}
    found, made = answers(limits, [list(range(12))])
    assert found == expected
    stats = made.stats()
    assert stats.preemptions and stats.cached_tokens and len(expected[0]) == 12
    assert answers({"max_preempt_count": 8}, [list(range(12))])[0] == expected


# --- threads ---


def test_many_threads_are_served_by_one() -> None:
    made = engine(NullRunner(num_blocks=60), prefix_cache=True)
    requests = mixed_requests(24)
    answers: dict[int, Answer] = {}

    def ask(number: int) -> None:
        stream = made.add(*requests[number])
        answers[number] = collect(stream)[stream.request_id]

    made.start()
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    made.stop()
    for number, request in enumerate(requests):
        expected = answer_alone(*request)
        assert (answers[number].tokens, answers[number].text) == (expected.tokens, expected.text)
    assert made.stats().blocks_used == 0


@pytest.mark.timeout(60)
def test_a_hundred_clients_that_leave_in_mid_stream_leave_no_block_behind() -> None:
    made = engine(NullRunner(num_blocks=60), max_iter_times=60)
    made.start()
    streams = [made.add([5 + number] * 8) for number in range(100)]
    for stream in streams[:50]:
        made.cancel(stream.request_id)
    for stream in streams[50:]:
        next(stream)
        made.cancel(stream.request_id)
    for stream in streams:
        assert list(stream)[-1].finish_reason in (FinishReason.CANCELLED, FinishReason.LENGTH)
    assert made.stats().blocks_used == 0 and not made.has_work
    made.stop()


def test_stop_drains_or_cancels_and_refuses_new_requests() -> None:
    draining, hasty = engine(), engine()
    for made in (draining, hasty):
        assert not made.is_running
        made.start()
        assert made.is_running
    kept = draining.add([5], GenerationParams(max_new_tokens=60))
    dropped = [hasty.add([5], GenerationParams(max_new_tokens=60)) for _ in range(40)]
    draining.stop(drain=True)
    hasty.stop(drain=False)
    assert not draining.is_running and not hasty.is_running
    assert list(kept)[-1].finish_reason is FinishReason.LENGTH
    reasons = {list(stream)[-1].finish_reason for stream in dropped}
    assert FinishReason.CANCELLED in reasons and reasons <= {FinishReason.CANCELLED, FinishReason.LENGTH}
    with pytest.raises(EngineStoppedError):
        draining.add([5])
    with pytest.raises(InputError, match="started"):
        draining.start()


def test_stop_gives_up_on_the_drain_after_its_timeout() -> None:
    runner = NullRunner()
    release = threading.Event()
    runner.before_forward = lambda arguments: release.wait(0.02)
    made = engine(runner)
    made.start()
    stream = made.add([5], GenerationParams(max_new_tokens=64))
    made.stop(drain=True, timeout=0.1)
    assert list(stream)[-1].finish_reason is FinishReason.CANCELLED


def test_stop_without_a_thread_finishes_the_work_itself() -> None:
    made = engine()
    stream = made.add([5], GenerationParams(max_new_tokens=3))
    made.stop()
    assert list(stream)[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.timeout(30)
def test_a_dying_engine_tells_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine()

    def fail() -> None:
        raise RuntimeError("lost a block")

    monkeypatch.setattr(made._core.scheduler, "schedule", fail)
    streams = [made.add([5]) for _ in range(3)]
    made.start()
    for stream in streams:
        (output,) = stream
        assert (output.finish_reason, output.error) == (FinishReason.ERROR, "the engine died of RuntimeError")
    with pytest.raises(EngineStoppedError):
        made.add([5])
    made.stop()
    assert not made.has_work and not made.is_running


def test_faults_are_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    runner = NullRunner()
    made = engine(runner)

    def fail(arguments: dict[str, Any]) -> None:
        raise MemoryError("no room\nfor it")

    runner.before_forward = fail
    made.add([5])
    made.step()
    (record,) = caplog.records
    assert record.getMessage() == "forward failed for 1 requests: MemoryError: no room for it"
    assert record.exc_info is None


def test_coroutines_read_their_own_outputs() -> None:
    made = engine()
    requests = mixed_requests(6)

    async def ask(number: int) -> Answer:
        stream = made.add_async(*requests[number])
        return collect([output async for output in stream])[stream.request_id]

    async def ask_all() -> list[Answer]:
        return await asyncio.gather(*map(ask, range(len(requests))))

    made.start()
    answers = asyncio.run(ask_all())
    for request, answer in zip(requests, answers, strict=True):
        assert answer.tokens == answer_alone(*request).tokens

    async def leave() -> str:
        return made.add_async([5], GenerationParams(max_new_tokens=64)).request_id

    asyncio.run(leave())  # the loop is closed before the answer has come
    made.stop()
    assert made.stats().blocks_used == 0


# --- the text of an answer ---


class Characters:
    """Token 1 is the first of the characters, and so on."""

    def __init__(self, text: str) -> None:
        self._text = text

    def put(self, ids: Iterable[int]) -> str:
        return "".join(self._text[index - 1] for index in ids)

    def flush(self) -> str:
        return ""


def expected_text(text: str, stops: list[str], include: bool) -> tuple[str, bool]:
    """One character after the other: the first stop string that is complete, and the longest of several."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end if include else end - max(map(len, ending))], True
    return text, False


@given(
    text=st.text("ab星", max_size=30),
    stops=st.lists(st.text("ab星", min_size=1, max_size=4), max_size=3),
    cuts=st.sets(st.integers(1, 29)),
    include=st.booleans(),
)
def test_stop_strings_do_not_depend_on_the_cut_into_tokens(
    text: str, stops: list[str], cuts: set[int], include: bool
) -> None:
    answer = AnswerText(Characters(text), stops, include)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    emitted = ""
    for start, end in pairwise(places):
        emitted += answer.put(range(start + 1, end + 1))
        assert include or not any(stop in emitted for stop in stops)
        held = len(text[:end]) - len(emitted)
        assert answer.stopped or held < max(map(len, stops), default=1)
    expected, stopped = expected_text(text, stops, include)
    assert (emitted + answer.flush(), answer.stopped) == (expected, stopped)


@given(st.text(max_size=20), st.sets(st.integers(1, 60)))
def test_a_character_is_never_split(text: str, cuts: set[int]) -> None:
    ids = TOKENIZER.encode(text)
    answer = AnswerText(TOKENIZER.stream_decoder())
    places = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    emitted = [answer.put(ids[start:end]) for start, end in pairwise(places)]
    assert "\ufffd" not in "".join(emitted) or "\ufffd" in text
    assert "".join(emitted) + answer.flush() == text
