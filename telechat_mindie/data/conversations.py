"""What people keep conversations in, each form read as the messages that a chat template takes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from telechat_mindie.errors import InputError
from telechat_mindie.text.conversation import check_text

Message = dict[str, Any]


class Conversation(NamedTuple):
    """Messages as OpenAI has them, and the tools that were on offer."""

    messages: list[Message]
    tools: list[Any] | None = None


class Form(NamedTuple):
    """A form of record: the field that tells it, what it looks like, and how it is read."""

    field: str
    example: str
    read: Callable[[Mapping[str, Any]], Conversation]


def read_conversation(record: Mapping[str, Any], form: str | None = None) -> Conversation:
    """The conversation of a record.

    Args:
        record: an object of a data file.
        form: a name of FORMS; None for the first whose field the record has.

    Raises:
        InputError: a record of no form, or one that its form cannot have.
    """
    if form is None:
        form = next((name for name, known in FORMS.items() if known.field in record), None)
        if form is None:
            raise InputError(
                "is a record of an unknown form",
                expected="; or ".join(known.example for known in FORMS.values()),
                found=f"the fields {', '.join(map(repr, sorted(record)))}" if record else "no field",
            )
    return FORMS[form].read(record)


def _messages(record: Mapping[str, Any]) -> Conversation:
    """OpenAI's fine-tuning data."""
    messages = [dict(_object(message, f"messages[{at}]")) for at, message in enumerate(_list(record, "messages"))]
    return Conversation(messages, _tools(record))


SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
"""`from` of ShareGPT's turns, the last three as LLaMA-Factory has them, and the role of the message."""


def _sharegpt(record: Mapping[str, Any]) -> Conversation:
    messages = _system(record)
    for at, turn in enumerate(_list(record, "conversations")):
        where = f"conversations[{at}]"
        speaker = _object(turn, where).get("from")
        if speaker not in SHAREGPT_ROLES:
            raise InputError(
                "is unknown", where=f"{where}.from", expected=", ".join(SHAREGPT_ROLES), found=repr(speaker)
            )
        content = _text(turn, "value", where)
        if speaker == "function_call":
            calls = _json(content, f"{where}.value")
            calls = calls if isinstance(calls, list) else [calls]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        else:
            messages.append({"role": SHAREGPT_ROLES[speaker], "content": content})
    return Conversation(messages, _tools(record))


def _alpaca(record: Mapping[str, Any]) -> Conversation:
    """Stanford Alpaca's, with the `system` and `history` that LLaMA-Factory knows; `input` follows in a new line."""
    messages = _system(record)
    history = record.get("history")
    for at, pair in enumerate([] if history is None else _list(record, "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError("is not a question and its answer", where=f"history[{at}]", expected="a list of two texts")
        messages += _turn(*(check_text(text, f"history[{at}]") for text in pair))
    question = _text(record, "instruction")
    if record.get("input"):
        question += "\n" + _text(record, "input")
    return Conversation(messages + _turn(question, _text(record, "output")))


def _dialog(record: Mapping[str, Any]) -> Conversation:
    """TeleChat's own."""
    messages = _system(record)
    for at, message in enumerate(_list(record, "dialog")):
        messages.append(dict(_object(message, f"dialog[{at}]")))
    return Conversation(messages, _tools(record))


def _pair(record: Mapping[str, Any]) -> Conversation:
    """The recipe's: the last question in `input`, behind earlier turns in `<_user>` and `<_bot>`; its answer.

    Only markers that can be what they look like count as such: `<_bot>` after a question, `<_user>` after an answer.
    Any other is text, and trains no control token. White space, `<_pad>` and `<_start>` in front are dropped.
    """
    text = _text(record, "input")
    while (rest := text.lstrip()).startswith(_SKIPPED):
        text = rest[rest.index(">") + 1 :]
    messages = _system(record)
    if rest.startswith("<_system>"):
        if messages:
            raise InputError("stands beside another `system`", where="input", found="<_system>")
        system, marker, rest = rest.removeprefix("<_system>").partition("<_user>")
        if not marker:
            raise InputError("has no question", where="input", expected="<_user> behind <_system>")
        messages = [{"role": "system", "content": system.removesuffix("\n")}]
    elif rest.startswith("<_user>"):
        rest = rest.removeprefix("<_user>")
    else:
        rest = text
    pieces = list(_turns(rest))
    if len(pieces) % 2 == 0:
        if pieces[-1].strip():
            raise InputError("ends with an answer", where="input", expected="a question, whose answer is `output`")
        pieces.pop()  # <_bot> stands there to be answered
    for at, piece in enumerate(pieces):
        messages.append({"role": "assistant" if at % 2 else "user", "content": piece})
    return Conversation([*messages, {"role": "assistant", "content": _CLOSED.sub("", _text(record, "output"))}])


_SKIPPED = ("<_pad>", "<_start>")
_CLOSED = re.compile(r"<_end>\s*\Z")


def _turns(text: str) -> Iterator[str]:
    """Question, answer, question ... of a text whose first is a question."""
    marker = "<_bot>"
    while True:
        piece, found, text = text.partition(marker)
        yield _CLOSED.sub("", piece) if marker == "<_user>" else piece
        if not found:
            return
        marker = "<_user>" if marker == "<_bot>" else "<_bot>"


FORMS = {
    "messages": Form("messages", '{"messages": [{"role", "content"}, ...]}', _messages),
    "sharegpt": Form("conversations", '{"conversations": [{"from", "value"}, ...]}', _sharegpt),
    "dialog": Form("dialog", '{"system", "dialog": [{"role", "content"}, ...]}', _dialog),
    "alpaca": Form("instruction", '{"instruction", "input", "output"}', _alpaca),
    "pair": Form("input", '{"input", "output"}', _pair),
}
"""By the name that `--format` takes."""


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _system(record: Mapping[str, Any]) -> list[Message]:
    if not record.get("system"):
        return []
    return [{"role": "system", "content": _text(record, "system")}]


def _tools(record: Mapping[str, Any]) -> list[Any] | None:
    """A list of function descriptions, or its JSON as text."""
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "tools") if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise InputError("is not a list of function descriptions", where="tools", found=type(tools).__name__)
    return tools or None


def _text(record: Mapping[str, Any], field: str, where: str = "") -> str:
    name = f"{where}.{field}" if where else field
    if record.get(field) is None:
        raise InputError("is missing", where=name, expected="a text")
    return check_text(record[field], name)


def _list(record: Mapping[str, Any], field: str) -> list[Any]:
    value = record.get(field)
    if not isinstance(value, list) or not value:
        found = "nothing in it" if value == [] else type(value).__name__
        raise InputError("is not a list of turns", where=field, found=found)
    return value


def _object(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError("is not an object", where=where, found=type(value).__name__)
    return value


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InputError("is not valid JSON", where=where) from None
