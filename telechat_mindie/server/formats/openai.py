"""POST /v1/chat/completions and /v1/completions: the answers (single_req_vllm_openai_infer_interface.cpp:933-1200,
single_req_vllm_openai_completions_infer_interface.cpp)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from telechat_mindie.engine.output import Output
from telechat_mindie.engine.sampler import TokenLogprobs
from telechat_mindie.server.answers import Answer, Renderer
from telechat_mindie.server.fields import validate
from telechat_mindie.server.formats.chat_parts import ChatParts, message
from telechat_mindie.server.formats.logprobs import chat_content, completion_lists
from telechat_mindie.server.formats.openai_requests import (
    ChatRequest,
    CompletionRequest,
    check_logprobs,
    conversation,
    offered_tools,
    text_length,
)
from telechat_mindie.server.formats.tool_calls import ToolCallParser
from telechat_mindie.server.formats.vllm import count_sequences
from telechat_mindie.server.generation import Job
from telechat_mindie.server.http.errors import invalid
from telechat_mindie.server.service import Service
from telechat_mindie.text.thoughts import thought_parser

Fields = dict[str, Any]


class OpenAIRenderer(Renderer):
    """What both formats have around their choices.

    Args:
        service: for its settings and tokenizer.
        with_logprobs: report log probabilities.
    """

    end = b"data: [DONE]\n\n"
    kind: ClassVar[str]  # `object` of a whole answer

    def __init__(self, service: Service, with_logprobs: bool) -> None:
        super().__init__(service.settings.full_text)
        self._head: Fields = {"id": self.id, "object": self.kind, "created": int(time.time())}
        self._head["model"] = service.settings.model_name
        self._token_text = service.token_text if with_logprobs else None

    def _body(
        self, choices: Sequence[Fields], counted: Sequence[Answer] = (), thought_tokens: int | None = None
    ) -> Fields:
        """The whole answer, or an event; with the `usage` of the answers that are counted, and of their thoughts."""
        body = {**self._head, "choices": choices}
        return {**body, "usage": _usage(counted, thought_tokens)} if counted else body


class ChatRenderer(OpenAIRenderer):
    """A message, or its deltas.

    Args:
        parts: of each answer's text.
    """

    kind = "chat.completion"

    def __init__(self, service: Service, parts: Sequence[ChatParts], with_logprobs: bool) -> None:
        super().__init__(service, with_logprobs)
        self._parts = parts
        self._is_first = True
        self._reported = [0] * len(parts)  # tokens of each answer whose log probabilities were sent
        self._so_far: list[dict[str, str]] = [{} for _ in parts]  # texts of each answer, for fullTextEnabled

    def whole(self, answers: Sequence[Answer]) -> object:
        choices = []
        for index, (parts, answer) in enumerate(zip(self._parts, answers, strict=True)):
            content = message(parts, answer.text)
            logprobs = self._logprobs(answer, answer.logprobs)
            choices.append(_choice(index, "message", content, logprobs, _reason(answer, parts.has_called)))
        return self._body(choices, answers, self._thought_tokens(self._parts, answers))

    def events(self, index: int, output: Output, answers: Sequence[Answer]) -> Iterator[object]:
        if self._is_first:  # of all choices, as MindIE opens them together
            self._is_first = False
            self._head["object"] = "chat.completion.chunk"
            for choice in range(len(answers)):
                yield self._chunk(choice, {"content": ""})
        answer, parts = answers[index], self._parts[index]
        deltas = [self._shown(index, delta) for delta in parts.put(output.text, is_last=answer.is_finished)]
        if not deltas and parts.may_wait and not answer.is_finished:
            return
        *earlier, last = deltas or [self._shown(index, {"content": ""})]
        for delta in earlier:
            yield self._chunk(index, delta)
        logprobs = self._logprobs(answer, answer.logprobs[self._reported[index] :])
        self._reported[index] = len(answer.logprobs)
        if not answer.is_finished:
            yield self._chunk(index, last, logprobs)
            return
        event = self._chunk(index, last, logprobs, _reason(answer, parts.has_called), answer)
        yield event | {"full_text": answer.text} if self._full_text else event

    def _shown(self, index: int, delta: Fields) -> Fields:
        """The delta itself; with fullTextEnabled all of the text so far."""
        if not self._full_text or "tool_calls" in delta:
            return delta
        ((name, text),) = delta.items()
        texts = self._so_far[index]
        texts[name] = texts.get(name, "") + text
        return {name: texts[name]}

    def _chunk(
        self,
        index: int,
        delta: Fields,
        logprobs: object = None,
        reason: str | None = None,
        counted: Answer | None = None,
    ) -> Fields:
        choices = [_choice(index, "delta", {"role": "assistant", **delta}, logprobs, reason)]
        if counted is None:
            return self._body(choices)
        return self._body(choices, [counted], self._thought_tokens([self._parts[index]], [counted]))

    @staticmethod
    def _thought_tokens(parts: Sequence[ChatParts], answers: Sequence[Answer]) -> int | None:
        """As MindIE counts those of the models whose thoughts it parses; None where no thought is expected."""
        if not parts[0].may_think:
            return None
        pairs = zip(parts, answers, strict=True)
        return sum(part.thought_tokens(answer.lengths, answer.text) for part, answer in pairs)

    def _logprobs(self, answer: Answer, reports: Sequence[TokenLogprobs]) -> Fields | None:
        """Of the answer's last tokens, as many as there are reports."""
        if self._token_text is None:
            return None
        return {"content": chat_content(self._token_text, answer.token_ids, reports)}


class CompletionRenderer(OpenAIRenderer):
    """A text, or its pieces; `count` answers."""

    kind = "text_completion"

    def __init__(self, service: Service, count: int, with_logprobs: bool) -> None:
        super().__init__(service, with_logprobs)
        self._offsets = [0] * count  # bytes of each answer that events have reported on

    def whole(self, answers: Sequence[Answer]) -> object:
        choices = [self._choice(index, answer, answer.text, answer.logprobs) for index, answer in enumerate(answers)]
        return self._body(choices, answers)

    def events(self, index: int, output: Output, answers: Sequence[Answer]) -> Iterator[object]:
        answer = answers[index]
        choice = self._choice(index, answer, self.piece(answer, output), output.logprobs)
        yield self._body([choice], [answer] if answer.is_finished else ())

    def _choice(self, index: int, answer: Answer, text: str, reports: Sequence[TokenLogprobs]) -> Fields:
        logprobs = None
        if self._token_text is not None:
            lists = completion_lists(self._token_text, answer.token_ids, reports, self._offsets[index])
            logprobs, self._offsets[index] = lists
        return _choice(index, "text", text, logprobs, _reason(answer), stop_reason=None)


def _usage(answers: Sequence[Answer], thought: int | None) -> Fields:
    last = answers[0].last
    prompt, cached = (0, 0) if last is None else (last.prompt_tokens, last.cached_tokens)
    generated = sum(len(answer.token_ids) for answer in answers)
    return {
        "prompt_tokens": prompt,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens": generated,
        **({} if thought is None else {"completion_tokens_details": {"reasoning_tokens": thought}}),
        "total_tokens": prompt + generated,
    }


def _choice(index: int, name: str, content: object, logprobs: object, reason: str | None, **more: object) -> Fields:
    return {"index": index, name: content, "logprobs": logprobs, **more, "finish_reason": reason}


def _reason(answer: Answer, called: bool = False) -> str | None:
    """OpenAI's word for why an answer ended."""
    reason = answer.finish_reason
    if reason in ("eos_token", "stop_sequence"):
        return "tool_calls" if called else "stop"
    return reason


def _check(service: Service, body: ChatRequest | CompletionRequest) -> None:
    if body.model != service.settings.model_name:
        raise invalid(f"Model {body.model} not found: this is {service.settings.model_name}.")
    if body.use_beam_search:
        raise invalid("Parameter use_beam_search is not supported.")


def read_chat(service: Service, data: Fields) -> Job:
    if "chat_template_kwargs" in data and data["chat_template_kwargs"] is None:
        raise invalid("Parameter chat_template_kwargs must be an object, got null.")
    body = validate(ChatRequest, data)
    _check(service, body)
    tools = offered_tools(body, data.get("tools") or [])
    template = service.tokenizer.template_for(tools)
    turns = conversation(body.messages, with_tools=bool(body.tools))
    count = count_sequences(body, equal_in_streams=True)
    top_logprobs = check_logprobs(body)
    options: Fields = {"chat_template_kwargs": body.chat_template_kwargs.model_dump(exclude_unset=True)}
    if tools:
        options["tools"] = tools
    prompt = service.encode_chat(turns, options, text_length(turns, tools))
    parts = [
        ChatParts(thought_parser(service.tokenizer, prompt, template), ToolCallParser() if tools else None)
        for _ in range(count)
    ]
    renderer = ChatRenderer(service, parts, top_logprobs is not None)
    kept = parts[0].kept_tokens
    return service.job(prompt, body, body.max_tokens, renderer, body.stream, count, top_logprobs, kept_tokens=kept)


def read_completion(service: Service, data: Fields) -> Job:
    body = validate(CompletionRequest, data)
    _check(service, body)
    count = count_sequences(body, equal_in_streams=True)
    prompt = service.encode(body.prompt, "prompt") if isinstance(body.prompt, str) else service.cut(body.prompt)
    renderer = CompletionRenderer(service, count, body.logprobs is not None)
    return service.job(prompt, body, body.max_tokens, renderer, body.stream, count, body.logprobs)
