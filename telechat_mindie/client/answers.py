"""Where a chat's answers come from: a model directory opened in this process, or a service."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from telechat_mindie.client.dialects import Message, Sampling
from telechat_mindie.errors import InputError
from telechat_mindie.text.thoughts import TAGS, Piece, ThoughtParser, thought_parser

if TYPE_CHECKING:
    from telechat_mindie.engine.output import Output
    from telechat_mindie.engine.params import GenerationParams
    from telechat_mindie.model_dir.layout import ServingConfig

Emit = Callable[[Piece], object]
"""Takes the next piece of an answer, or of the thought before it."""


@dataclass(frozen=True, slots=True)
class Figures:
    """An answer in numbers.

    Attributes:
        first_seconds: from the question to the first text; to the end, if there was none.
        seconds: from the question to the end.
        generated_tokens: length of the answer; None where the service does not tell.
        prompt_tokens: length of the prompt, likewise.
        cut: the answer ended for its length, not by itself.
    """

    first_seconds: float
    seconds: float
    generated_tokens: int | None
    prompt_tokens: int | None
    cut: bool

    @classmethod
    def of(cls, last: Output) -> Figures:
        """Of an answer by the embedded engine, from its last output."""
        from telechat_mindie.engine.output import FinishReason

        timings = last.timings
        return cls(
            first_seconds=(timings.first_token or timings.now) - timings.arrival,
            seconds=timings.now - timings.arrival,
            generated_tokens=last.generated_tokens,
            prompt_tokens=last.prompt_tokens,
            cut=last.finish_reason in (FinishReason.LENGTH, FinishReason.MAX_SEQ),
        )

    @property
    def tokens_per_second(self) -> float | None:
        """Of those behind the first; None where there are none, or not known."""
        decode = self.seconds - self.first_seconds
        if self.generated_tokens is None or self.generated_tokens < 2 or decode <= 0:
            return None
        return (self.generated_tokens - 1) / decode

    def __str__(self) -> str:
        parts = []
        if self.prompt_tokens is not None:
            parts.append(f"{self.prompt_tokens} tokens in")
        if self.generated_tokens is not None:
            parts.append(f"{self.generated_tokens} out")
        parts.append(f"first after {self.first_seconds * 1000:.0f} ms")
        if (speed := self.tokens_per_second) is not None:
            parts.append(f"then {speed:.1f} tokens/s")
        if self.cut:
            parts.append("cut for its length")
        return ", ".join(parts)


class Answers(Protocol):
    """Answers messages.

    Attributes:
        name: who it is, for people.
        sampling: how answers are drawn.
    """

    name: str
    sampling: Sampling

    def use(self, sampling: Sampling) -> None:
        """Draw the next answers so.

        Raises:
            InputError: a value out of range. Nothing has changed then.
        """

    def answer(self, messages: Sequence[Message], emit: Emit) -> Figures:
        """Give the answer to `emit` as it comes, and its figures at the end. An interrupt ends it and passes through.

        Raises:
            TelechatMindieError: there is no answer, or only a part of one.
        """


def local_params(sampling: Sampling, defaults: ServingConfig) -> GenerationParams:
    """The embedded engine's for `sampling`; what that leaves out is as the model directory has it.

    The tags of a thought stay in the text, also where they are special tokens, lest thought and answer run together.
    """
    from telechat_mindie.engine.params import GenerationParams

    given = dataclasses.asdict(sampling)
    most = given.pop("max_tokens") or defaults.max_new_tokens
    return GenerationParams.with_defaults(defaults, max_new_tokens=most, kept_tokens=TAGS, **given)


class LocalAnswers:
    """The embedded engine on a model directory.

    Raises:
        ModelDirError, ConfigError, TokenizerError: the directory is incomplete or contradicts itself.
    """

    def __init__(self, model_path: Path, sampling: Sampling) -> None:
        from telechat_mindie.engine.local import open_local
        from telechat_mindie.model_dir.layout import ModelDir

        self.name = str(model_path)
        self._serving = ModelDir.open(model_path).serving
        self.use(sampling)  # refused before the weights are loaded
        self._local = open_local(model_path)

    def use(self, sampling: Sampling) -> None:
        self._params, self.sampling = local_params(sampling, self._serving), sampling

    def answer(self, messages: Sequence[Message], emit: Emit) -> Figures:
        tokenizer = self._local.tokenizer
        prompt_ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)
        thoughts = thought_parser(tokenizer, prompt_ids, tokenizer.chat_template)
        # Closed, so that an interrupt frees its blocks.
        with contextlib.closing(self._local.engine.generate(prompt_ids, self._params)) as outputs:
            for output in outputs:
                for piece in thoughts.put(output.text):
                    emit(piece)
        for piece in thoughts.flush():
            emit(piece)
        if output.error:
            raise InputError(output.error)
        return Figures.of(output)


class RemoteAnswers:
    """The chat route of a service, MindIE or another with OpenAI's.

    Args:
        url: its address.
        model: None for the first that it names.
        timeout: seconds without a byte after which an answer is given up.

    Raises:
        ServiceError: it cannot be reached, or names no model.
    """

    def __init__(
        self, url: str, sampling: Sampling, *, model: str | None, tls: ssl.SSLContext | None, timeout: float
    ) -> None:
        from telechat_mindie.client.client import MindieClient
        from telechat_mindie.client.dialects import OpenAIChat

        self._client = MindieClient(url, tls, timeout=None, idle_timeout=timeout)
        self.sampling = sampling
        self.model = asyncio.run(self._first_model()) if model is None else model
        self._dialect = OpenAIChat(self.model)
        self.name = f"{self.model} at {self._client.url}"

    def use(self, sampling: Sampling) -> None:
        self.sampling = sampling  # its range is the service's to know

    def answer(self, messages: Sequence[Message], emit: Emit) -> Figures:
        return asyncio.run(self._answer(messages, emit))

    async def _first_model(self) -> str:
        async with self._client as client:
            return await client.first_model()

    async def _answer(self, messages: Sequence[Message], emit: Emit) -> Figures:
        begin = time.monotonic()
        first = None
        thoughts = ThoughtParser()  # MindIE's ms backend leaves the tags in the text
        reason = prompt_tokens = generated_tokens = None
        async with (
            self._client as client,
            contextlib.aclosing(client.stream(self._dialect, messages, self.sampling)) as deltas,
        ):
            async for delta in deltas:
                if (delta.text or delta.thought) and first is None:
                    first = time.monotonic()
                if delta.thought:
                    emit(Piece(delta.thought, is_thought=True))
                for piece in thoughts.put(delta.text):
                    emit(piece)
                reason = delta.finish_reason or reason
                prompt_tokens = delta.prompt_tokens or prompt_tokens
                generated_tokens = delta.generated_tokens or generated_tokens
        for piece in thoughts.flush():
            emit(piece)
        end = time.monotonic()
        return Figures(
            first_seconds=(first or end) - begin,
            seconds=end - begin,
            generated_tokens=generated_tokens,
            prompt_tokens=prompt_tokens,
            cut=reason == "length",
        )
