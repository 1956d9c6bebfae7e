"""What OpenAI's two routes take, and the rules between fields (single_req_vllm_openai_infer_interface.cpp:41-600,
single_req_vllm_openai_completions_infer_interface.cpp)."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from telechat_mindie.server.fields import AnyTokens, RequestBody, by_kind, utf16_length
from telechat_mindie.server.formats.vllm import VllmSampling
from telechat_mindie.server.http.errors import invalid
from telechat_mindie.text.conversation import ANSWER_ROLES

MAX_TOP_LOGPROBS = 20
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_\u4e00-\u9fa5-]{1,64}$")]
Filled = Annotated[str, Field(min_length=1)]


class Function(RequestBody):
    """Of an offered tool. All but its name goes to the prompt as it is."""

    name: ToolName
    description: Any = None
    parameters: Any = None


class Tool(RequestBody):
    type: Literal["function"]
    function: Function


class CalledFunction(RequestBody):
    name: ToolName
    arguments: str = Field(description="JSON text")


def _empty_list(value: object) -> object:
    """MindIE iterates, so that an empty object is as good as an empty list."""
    return [] if value == {} else value


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


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Tag("<parts>")],
    by_kind("a text or a list of text parts", text=str, parts=list),
]
TOOLS_ROLES = ("system", "user", "assistant", "tool")
"""Beside tools MindIE takes these roles (ValidMessagesArray), else what the tokenizer and its template take."""


class Message(RequestBody):
    role: str = Field(examples=["user"], description="system, developer, user, assistant or tool")
    content: Content | None = None
    reasoning_content: str | None = Field(default=None, description="an assistant's thought; for the chat template")
    tool_calls: Annotated[list[ToolCall], BeforeValidator(_empty_list)] | None = None
    tool_call_id: Filled | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_far_as_read(cls, data: Any) -> Any:
        """Of other roles MindIE reads neither calls nor their ids."""
        role = data.get("role") if isinstance(data, dict) else None
        unread = {*(() if role in ANSWER_ROLES else ("tool_calls",)), *(() if role == "tool" else ("tool_call_id",))}
        return {key: data[key] for key in data if key not in unread} if isinstance(role, str) else data

    @property
    def text(self) -> str | None:
        if self.content is None or isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class TemplateVariables(BaseModel):
    """For the chat template; MindIE looks at the one that is named here, which may be absent, but not null."""

    model_config = ConfigDict(strict=True, extra="allow")

    enable_thinking: bool = Field(default=False, description="for templates that open or omit a thought as this says")


Choice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")] | Annotated[ToolChoice, Tag("<tool>")],
    by_kind("'none', 'auto', 'required' or a tool", word=str, tool=dict),
]


class ChatRequest(VllmSampling):
    model: Filled
    messages: list[Message] = Field(min_length=1)
    tools: Annotated[list[Tool], BeforeValidator(_empty_list)] = Field(default_factory=list)
    tool_choice: Choice | None = Field(
        default=None, description="a named function alone is offered; that it is called cannot be enforced"
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    use_beam_search: bool = Field(default=False, description="refused: the engine has no beam search")
    chat_template_kwargs: TemplateVariables = TemplateVariables()


def _one_prompt(value: object) -> object:
    if isinstance(value, list) and any(isinstance(item, (str, list)) for item in value):
        raise PydanticCustomError("prompt", "must be one text or one list of tokens, since MindIE takes one prompt")
    return value


class CompletionRequest(VllmSampling):
    model: Filled
    prompt: Annotated[
        Annotated[Filled, Tag("<text>")] | Annotated[AnyTokens, Tag("<tokens>")],
        by_kind("one text or one list of tokens", text=str, tokens=list),
        BeforeValidator(_one_prompt),
    ] = Field(examples=["生抽与老抽的区别？"])
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    use_beam_search: bool = Field(default=False, description="refused: the engine has no beam search")


def conversation(messages: list[Message], *, with_tools: bool) -> list[dict[str, Any]]:
    """The messages as the chat template takes them.

    Args:
        with_tools: the request has tools, be they offered or not, for which MindIE's rules are stricter.

    Raises:
        ApiError: 422, a rule between a message's fields is broken.
    """
    turns = []
    for index, message in enumerate(messages):
        where, text = f"Parameter messages.{index}", message.text
        if message.role == "tool" and message.tool_call_id is None:
            raise invalid(f"{where}.tool_call_id is missing, which the role tool needs.")
        # OpenAI's clients have another name for the system's role, which templates do not know.
        role = "system" if message.role == "developer" else message.role
        if with_tools and role not in TOOLS_ROLES:
            raise invalid(f"{where}.role must be one of {', '.join(TOOLS_ROLES)} beside tools, got {role}.")
        if not _is_filled(message, text, with_tools):
            raise invalid(f"{where}.content is missing or empty.")
        turn: dict[str, Any] = {"role": role, "content": text or ""}
        if message.reasoning_content is not None:
            turn["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            turn["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        if message.tool_call_id is not None:
            turn["tool_call_id"] = message.tool_call_id
        turns.append(turn)
    return turns


def _is_filled(message: Message, text: str | None, with_tools: bool) -> bool:
    """Whether a message has what its role needs (ParseTextInput, ValidMessagesArray and ValidAssistantMessage)."""
    if message.role == "assistant":
        if message.tool_calls or message.reasoning_content:
            return True
        return text is not None and (text != "" or message.tool_calls is not None)
    return text is not None and (text != "" or message.role == "tool" or not with_tools)


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
