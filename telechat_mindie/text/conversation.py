"""What a conversation may hold, and the form in which a template sees it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from telechat_mindie.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "bot", "tool", "function", "observation")
"""Roles of a message. `bot` is the published files' name for `assistant`; the last two are older names of `tool`."""

ANSWER_ROLES = ("assistant", "bot")

_TOOLS_ROLE = "tools_call"  # MindIE appends {"role": "tools_call", "tools": [...], "content": ""} to the conversation


def check_text(text: object, where: str) -> str:
    """`text` itself, if it is a string that UTF-8 can carry.

    Raises:
        InputError: not a string, or one with a lone surrogate (half of a UTF-16 pair).
    """
    if not isinstance(text, str):
        raise InputError("is not a text", where=where, expected="a string", found=type(text).__name__)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"holds a character that UTF-8 cannot carry at position {error.start}",
            where=where,
            found=f"lone surrogate U+{ord(text[error.start]):04X}",
        ) from None
    return text


def read_conversation(conversation: object) -> tuple[list[dict[str, Any]], object]:
    """The messages, each with the fields a template may rely on, and the tools that MindIE put behind them."""
    if not isinstance(conversation, Sequence) or isinstance(conversation, (str, bytes)):
        raise InputError("is not a list of messages", where="messages", found=type(conversation).__name__)
    messages, tools = list(conversation), None
    if messages and isinstance(messages[-1], Mapping) and messages[-1].get("role") == _TOOLS_ROLE:
        tools = messages.pop().get("tools")
    if not messages:
        raise InputError("is empty", where="messages", expected="at least one message")
    return [_read_message(message, index) for index, message in enumerate(messages)], tools


def _read_message(message: object, index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise InputError("is not a message", where=where, expected="an object", found=type(message).__name__)
    role = message.get("role")
    if role not in ROLES:
        raise InputError("has an unknown role", where=where, expected=f"one of {', '.join(ROLES)}", found=repr(role))
    read = dict(message)
    if role in ANSWER_ROLES:
        if calls := message.get("tool_calls"):
            if not isinstance(calls, (list, tuple)):
                raise InputError("is not a list", where=f"{where}.tool_calls", found=type(calls).__name__)
            read["tool_calls"] = [_read_call(call, f"{where}.tool_calls[{at}]") for at, call in enumerate(calls)]
        if (calls or message.get("reasoning_content")) and message.get("content") is None:
            read["content"] = ""
    read["content"] = _read_content(read.get("content"), f"{where}.content")
    return read


def _read_content(content: object, where: str) -> str:
    if not isinstance(content, (list, tuple)):
        if content is None:
            raise InputError("is missing", where=where, expected="a text")
        return check_text(content, where)
    texts = []
    for index, part in enumerate(content):
        # MindIE's own reader drops the type of a text part.
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise InputError("is not text", where=f"{where}[{index}]", expected="a text part", found=repr(kind))
        texts.append(check_text(part.get("text"), f"{where}[{index}].text"))
    return "".join(texts)


def _read_call(call: object, where: str) -> dict[str, Any]:
    """A tool call with `arguments` as an object, so that they are printed in the spacing the model was trained on.

    Clients send back the model's own words; arguments that are not valid JSON therefore stay the text they are.
    """
    if not isinstance(call, Mapping):
        raise InputError("is not a tool call", where=where, expected="an object", found=type(call).__name__)
    function = call.get("function", call)
    if not isinstance(function, Mapping) or "name" not in function or "arguments" not in function:
        raise InputError("is not a tool call", where=where, expected="a function with name and arguments")
    check_text(function["name"], f"{where}.name")
    read = dict(function)
    if isinstance(read["arguments"], str):
        try:
            parsed = json.loads(read["arguments"])
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict):
            read["arguments"] = parsed
    return {**call, "function": read} if "function" in call else read


def read_tools(tools: object) -> object:
    """The tools, or None."""
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InputError("are not a list of function descriptions", where="tools", expected="a list of objects")
    return tools
