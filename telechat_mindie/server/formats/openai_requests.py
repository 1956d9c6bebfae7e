"""What OpenAI's two routes take, and the rules between fields (single_req_vllm_openai_infer_interface.cpp:41-600,
single_req_vllm_openai_completions_infer_interface.cpp)."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from telechat_mindie.server.fields import RequestBody, TokenIds, utf16_length
from telechat_mindie.server.formats.vllm import VllmSampling
from telechat_mindie.server.http.errors import invalid

MAX_TOP_LOGPROBS = 20
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_\u4e00-\u9fa5-]{1,64}$")]
Filled = Annotated[str, Field(min_length=1)]


class Function(RequestBody):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(RequestBody):
    type: Literal["function"]
    function: Function


class CalledFunction(RequestBody):
    name: ToolName
    arguments: str = Field(description="JSON text")


class ToolCall(RequestBody):
    id: str
    type: Literal["function"]
    function: CalledFunction


class NamedFunction(RequestBody):
    name: ToolName


class ToolChoice(RequestBody):
    type: Literal["function"]
    function: NamedFunction


class TextPart(RequestBody):
    type: Literal["text"]
    text: str


class Message(RequestBody):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = Field(default=None, description="an assistant's thought; for the chat template")
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Filled | None = None

    @property
    def text(self) -> str | None:
        if self.content is None or isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class TemplateVariables(RequestBody):
    """For the chat template; MindIE looks at the one that is named here."""

    model_config = ConfigDict(extra="allow")

    enable_thinking: bool | None = Field(default=None, description="for templates that can open or omit a thought")


class ChatRequest(VllmSampling):
    model: Filled
    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = Field(
        default=None, description="a named function alone is offered; that it is called cannot be enforced"
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    use_beam_search: bool = Field(default=False, description="refused: the engine has no beam search")
    chat_template_kwargs: TemplateVariables = TemplateVariables()


class CompletionRequest(VllmSampling):
    model: Filled
    prompt: Filled | TokenIds = Field(examples=["生抽与老抽的区别？"])
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    use_beam_search: bool = Field(default=False, description="refused: the engine has no beam search")


def conversation(messages: list[Message]) -> list[dict[str, Any]]:
    """The messages as the chat template takes them.

    Raises:
        ApiError: 422, a rule between a message's fields is broken.
    """
    turns = []
    for index, message in enumerate(messages):
        where, text = f"Parameter messages.{index}", message.text
        if message.role == "tool" and message.tool_call_id is None:
            raise invalid(f"{where}.tool_call_id is missing, which the role tool needs.")
        has_more = message.role == "assistant" and (message.tool_calls or message.reasoning_content)
        if not has_more and (text is None or (message.role == "assistant" and not text)):
            raise invalid(f"{where}.content is missing or empty.")
        # OpenAI's clients have another name for the system's role, which templates do not know.
        role = "system" if message.role == "developer" else message.role
        turn: dict[str, Any] = {"role": role, "content": text or ""}
        if message.reasoning_content is not None:
            turn["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            turn["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        if message.tool_call_id is not None:
            turn["tool_call_id"] = message.tool_call_id
        turns.append(turn)
    return turns


def offered_tools(body: ChatRequest, raw_tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools that the prompt shows, as the client wrote them: all, none, or the one that tool_choice names."""
    if not raw_tools or body.tool_choice == "none":
        return []
    if isinstance(body.tool_choice, ToolChoice):
        name = body.tool_choice.function.name
        return [tool for tool in raw_tools if tool["function"]["name"] == name]
    return raw_tools


def text_length(turns: list[dict[str, Any]], tools: list[dict[str, Any]]) -> int:
    """Characters that the prompt of these has at least."""
    return sum(utf16_length(turn["content"]) for turn in turns) + (
        len(json.dumps(tools, ensure_ascii=False)) if tools else 0
    )


def check_logprobs(body: ChatRequest) -> int | None:
    """How many most likely tokens are to be reported with each; None for no report."""
    if body.logprobs is False and body.top_logprobs is not None:
        raise invalid("Parameter top_logprobs needs logprobs to be true or absent.")
    return body.top_logprobs if body.top_logprobs is not None else 0 if body.logprobs else None
