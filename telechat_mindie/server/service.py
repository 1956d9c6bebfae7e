"""What all routes share: the engine, the tokenizer, the bounds, and the requests that are under way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from telechat_mindie.errors import InputError
from telechat_mindie.server.answers import Renderer
from telechat_mindie.server.fields import RequestBody, utf16_length
from telechat_mindie.server.generation import Ended, Generation, Job, from_engine
from telechat_mindie.server.host import EngineHost
from telechat_mindie.server.http.body import BodyReader, parse
from telechat_mindie.server.http.errors import STOPPED, ApiError, invalid
from telechat_mindie.server.metrics import Metrics
from telechat_mindie.server.sampling import generation_params
from telechat_mindie.server.settings import ServerSettings
from telechat_mindie.text.detokenizer import CONTEXT
from telechat_mindie.text.input_builder import InputBuilder
from telechat_mindie.text.vocabulary import UNKNOWN_ID

Result = TypeVar("Result")
TokenText = Callable[[int, Sequence[int], int], str]
"""`Service.token_text`"""


class Service:
    """One server's state. All methods but `_prepare` and what it calls belong to the event loop."""

    def __init__(self, settings: ServerSettings, host: EngineHost) -> None:
        self.settings = settings
        self.limits = settings.limits
        self.host = host
        self.engine = host.engine
        self.tokenizer = host.tokenizer
        self.defaults = host.directory.serving
        self.metrics = Metrics(settings.model_name, host.engine.stats)
        self.bodies = BodyReader(settings.limits)
        self.started = int(time.time())
        self.is_stopping = False
        self.is_forced = False  # to stop without waiting for answers
        self.stop_wanted = asyncio.Event()  # a route asks the process to end
        self.running: dict[str, Generation] = {}  # by id
        self.named: dict[str, Generation] = {}  # by the id that the client knows
        self.in_flight = 0  # requests for an answer, from their first byte to their last
        self._threads = ThreadPoolExecutor(settings.threads, "telechat-request")

    async def in_thread(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run what takes long in one of the threads for it."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def begin(self, raw: bytes, read: Callable[[dict[str, Any]], Job]) -> Generation:
        """Parse a body and start what it asks for.

        Raises:
            ApiError: the body, or the engine, refuses.
        """
        generation = await self.in_thread(self._prepare, raw, read, asyncio.get_running_loop())
        if self.is_stopping:
            generation.cancel(Ended.SHUTDOWN)
        self.running[generation.id] = generation
        self.named[generation.job.renderer.id] = generation
        return generation

    def _prepare(
        self, raw: bytes, read: Callable[[dict[str, Any]], Job], loop: asyncio.AbstractEventLoop
    ) -> Generation:
        try:
            job = read(parse(raw))
        except InputError as error:
            raise invalid(str(error)) from None
        generation = Generation(self.engine, job, self.limits.token_seconds, loop)
        generation.submit()
        return generation

    def end(self, generation: Generation, by: Ended) -> None:
        """Forget a request that was answered, or whose client left."""
        generation.cancel(by)
        self.running.pop(generation.id, None)
        if self.named.get(generation.job.renderer.id) is generation:
            del self.named[generation.job.renderer.id]

    def check_model(self, name: str) -> None:
        """Refuse a path that names another model than the one that is served."""
        if name != self.settings.model_name:
            raise ApiError(404, f"Model {name} not found.")

    def refuse_if_stopping(self) -> None:
        if self.is_stopping:
            raise ApiError(503, STOPPED)

    def encode(self, text: str, where: str, keep: int | None = None) -> NDArray[np.int64]:
        """The tokens of a bare prompt, as MindIE's ms backend has them made (mf_tokenizer_wrapper.py:34).

        Args:
            where: the text's field.
            keep: only that many tokens of the end.

        Raises:
            ApiError: 422 no text, 424 one that is too long.
        """
        if not text:
            raise invalid(f"Parameter {where} must not be empty.")
        if keep is not None:
            text = text[-keep * self._longest_token :]
        elif self.settings.truncation:
            text = text[: self._longest_text]
        self._check_length(utf16_length(text))
        ids: NDArray[np.int64] = self.tokenizer([text], return_tensors="np")["input_ids"][0]
        return self.cut(ids if keep is None else ids[-keep:])

    def encode_chat(self, messages: list[dict[str, Any]], options: dict[str, Any], length: int) -> NDArray[np.int64]:
        """The tokens of a conversation, through the chat template; `length` is that of all its texts."""
        if not self.settings.truncation:
            self._check_length(length)
        return self.cut(InputBuilder(self.tokenizer).make_context(0, messages, **options))

    def cut(self, ids: ArrayLike) -> NDArray[np.int64]:
        """The prompt; with `truncation` the beginning of one that is too long (llm_manager_impl.cpp:1526).

        MindIE's check of the vocabulary lets negative ids pass (llm_manager_impl.cpp:1507); they are unknown tokens.
        """
        prompt = np.asarray(ids, np.int64)
        prompt = np.where(prompt < 0, UNKNOWN_ID, prompt)
        return prompt[: self.engine.config.longest_prompt] if self.settings.truncation else prompt

    def token_text(self, token: int, ids: Sequence[int], place: int, skip_special_tokens: bool = False) -> str:
        """What `token` adds to the text of `ids[:place]`, so that the texts of all tokens are that of the answer.

        A character of several tokens belongs to the last of them; the others have no text.
        """
        context = ids[max(0, place - CONTEXT) : place]
        # A slice of an array is read as a window of it: `Detokenizer.decode`.
        window = np.array([*context, token], np.int64)[len(context) :]
        return self.tokenizer.decode(window, skip_special_tokens=skip_special_tokens)

    def job(
        self,
        prompt_ids: NDArray[np.int64],
        fields: RequestBody,
        max_new_tokens: int | None,
        renderer: Renderer,
        stream: bool,
        count: int = 1,
        logprobs: int | None = None,
        kept_tokens: tuple[str, ...] = (),
    ) -> Job:
        """What to do for a body, or its `parameters`, which may have a `timeout` of their own."""
        timeout: int | None = getattr(fields, "timeout", None)
        seconds = min(timeout or self.limits.request_seconds, self.limits.request_seconds)
        params = generation_params(
            fields,
            self.defaults,
            max_new_tokens=max_new_tokens,
            timeout=seconds,
            count=count,
            logprobs=logprobs,
            kept_tokens=kept_tokens,
        )
        return Job(prompt_ids, params, renderer, stream, count, timeout is not None)

    @cached_property
    def _longest_token(self) -> int:
        """Characters."""
        return max(map(len, map(self.tokenizer.convert_ids_to_tokens, range(self.tokenizer.vocab_size))))

    @property
    def _longest_text(self) -> int:
        """Characters of a prompt within the engine's limits, if each of its tokens were the longest."""
        return self.engine.config.longest_prompt * self._longest_token

    def _check_length(self, length: int) -> None:
        """Refuse what is too long anyway before time is spent on tokenizing it."""
        if length > self._longest_text:
            most = self.engine.config.longest_prompt
            raise from_engine(InputError("is too long", where="prompt", expected=f"at most {most} tokens"))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
