"""One answer for a caller that waits for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from telechat_mindie.engine.engine import Engine, Tokenizer
from telechat_mindie.engine.output import Output
from telechat_mindie.engine.params import GenerationParams
from telechat_mindie.engine.runner import Runner


def generate(
    engine: Engine | Runner, tokenizer: Tokenizer, prompt_ids: Sequence[int], params: GenerationParams | None = None
) -> Iterator[Output]:
    """Yield the outputs of one answer as they are computed, in this thread.

    Args:
        engine: an engine that no thread runs, or a runner with blocks of 128 tokens, for which one with the default
            limits is made.
        tokenizer: decodes the answer.
        prompt_ids: the prompt's tokens.
        params: what to do with it; by default a greedy answer.

    Raises:
        InputError: as `Engine.submit`.
    """
    if not isinstance(engine, Engine):
        engine = Engine(engine, tokenizer)
    stream = engine.add(prompt_ids, params)
    try:
        while True:
            for output in engine.step():
                if output.request_id == stream.request_id:
                    yield output
                    if output.finish_reason is not None:
                        return
    finally:
        engine.cancel(stream.request_id)
