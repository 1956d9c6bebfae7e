"""From a conversation to a prompt: validation, the chat template, and the wall between content and control tokens.

A chat message is data. Whatever it contains, it must not end a turn or open one, so the six control tokens of a
rendered prompt have to come from the template alone. `render` therefore masks every string it was given before the
template sees it, and its caller looks for control tokens in the masked prompt, and unmasks the text between them:

- `<` before `_`, and `<` at the end of a string, become U+D800; a leading `_` becomes U+D801. Both are lone surrogates,
  which no UTF-8 text contains and which are refused in the input: they cannot collide with content, and every
  unmasked string is restored exactly, since masking keeps lengths and positions.
- Every control token begins with `<_`. Suppose such a pair in the masked prompt had a character from an input string.
  If both are from one string, that string held `<_`, which was masked. If only the `<` is, it was the last character
  of its string, and masked. If only the `_` is, it was the first of its string, and masked. So both characters were
  written by the template: no control token begins in content, none begins in the template and is completed by a
  content's `_`, and contents that a template prints side by side cannot form one.
- The argument asks of a template only that it print strings whole, or cut them elsewhere than right behind a `<`.
  Comparisons such as `"</think>" in content` still work, since only those characters are replaced.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any

from telechat_mindie.errors import InputError, TelechatMindieError, TokenizerError

ROLES = ("system", "user", "assistant", "bot", "tool")
"""Roles of a message. `bot` is the published files' name for `assistant`."""

_TOOLS_ROLE = "tools_call"  # MindIE appends {"role": "tools_call", "tools": [...], "content": ""} to the conversation
_LESS, _UNDERSCORE = "\ud800", "\ud801"
_UNMASK = str.maketrans({_LESS: "<", _UNDERSCORE: "_"})
_MAX_DEPTH = 64  # of JSON in tools and arguments; MindIE's own parser stops earlier


def default_template() -> str:
    """The package's own Jinja template of the TeleChat2 chat format."""
    return resources.files(__package__).joinpath("chat_template.jinja").read_text(encoding="utf-8")


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


def unmask(text: str) -> str:
    """The text as the template would have printed it from unmasked strings."""
    return text.translate(_UNMASK)


def render(
    template: str,
    conversation: object,
    tools: object = None,
    *,
    add_generation_prompt: bool = False,
    variables: Mapping[str, object] | None = None,
    constants: Mapping[str, str] | None = None,
) -> str:
    """Render a conversation to a masked prompt (see the module's docstring; `unmask` gives the plain text).

    Args:
        template: Jinja source. It sees `messages`, `tools`, `add_generation_prompt`, the variables and constants, a
            `tojson` filter that keeps non-ASCII characters, and `raise_exception(message)`.
        conversation: OpenAI-style messages. `content` is a string or a list of text parts; an assistant's may be absent
            beside `tool_calls`; `arguments` of a tool call are an object or its JSON text. A last message of the role
            `tools_call` holds the tools, as MindIE sends them.
        tools: function descriptions, printed as they are; they win over a `tools_call` message.
        add_generation_prompt: end with the token that opens the bot's turn.
        variables: what the caller adds for the template, masked like content.
        constants: strings that may act as control tokens, such as `bos_token`.

    Raises:
        InputError: a conversation, tool or variable that is not as above, or one that the template rejects.
        TokenizerError: a template that is not valid Jinja.
    """
    check_text(template, "chat template")
    messages, offered = _read_conversation(conversation)
    context = {key: _masked(value, key) for key, value in (variables or {}).items()}
    context |= constants or {}
    context["messages"] = _masked(messages, "messages")  # masking leaves role names as they are
    context["tools"] = _masked(_read_tools(offered if tools is None else tools), "tools")
    context["add_generation_prompt"] = add_generation_prompt
    try:
        return str(_compiled(template).render(context))
    except TelechatMindieError:
        raise
    except Exception as error:  # a template can fail in any way that an expression can
        raise InputError(f"cannot be rendered: {error}", where="chat template") from None


@lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TokenizerError(
            f"is not valid Jinja in line {error.lineno}: {error.message}",
            where="chat template",
            advice="Remove chat_template from tokenizer_config.json to use the one of this package.",
        ) from None


def _raise_exception(message: object) -> None:
    raise InputError(f"rejects the conversation: {unmask(str(message))}", where="chat template")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unmasked first: the order of sorted keys and \u escapes must be those of the real strings.
    plain = _map_strings(value, unmask, "tojson")
    return _mask(
        json.dumps(plain, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    )


def _mask(text: str) -> str:
    masked = text.replace("<_", _LESS + "_")
    if masked.endswith("<"):
        masked = masked[:-1] + _LESS
    return _UNDERSCORE + masked[1:] if masked.startswith("_") else masked


def _masked(value: object, where: str) -> Any:
    return _map_strings(value, lambda text: _mask(check_text(text, where)), where)


def _map_strings(value: object, change: Callable[[str], str], where: str, depth: int = 0) -> Any:
    """A copy of a JSON value with `change` applied to every string in it, keys included."""
    if isinstance(value, str):
        return change(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if depth == _MAX_DEPTH:
        raise InputError(f"is nested deeper than {_MAX_DEPTH} levels", where=where)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError("has a key that is not a string", where=where, found=repr(key))
        return {change(key): _map_strings(item, change, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(item, change, where, depth + 1) for item in value]
    raise InputError("is not JSON", where=where, found=type(value).__name__)


def _read_conversation(conversation: object) -> tuple[list[dict[str, Any]], object]:
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
    if role == "system" and index:
        raise InputError("is a system message", where=where, advice="Only the first message may set the system text.")
    read = dict(message)
    if role in ("assistant", "bot"):
        calls = message.get("tool_calls") or []
        if not isinstance(calls, (list, tuple)):
            raise InputError("is not a list", where=f"{where}.tool_calls", found=type(calls).__name__)
        read["tool_calls"] = [_read_call(call, f"{where}.tool_calls[{at}]") for at, call in enumerate(calls)]
        if calls and message.get("content") is None:
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


def _read_tools(tools: object) -> object:
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InputError("are not a list of function descriptions", where="tools", expected="a list of objects")
    return tools
