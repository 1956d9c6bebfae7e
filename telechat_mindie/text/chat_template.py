"""From a conversation to a prompt, as transformers renders a chat template (4.46, utils/chat_template_utils.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from telechat_mindie.errors import InputError, TelechatMindieError, TokenizerError
from telechat_mindie.text.control_tokens import CONTROL_IDS
from telechat_mindie.text.conversation import check_text, read_conversation, read_tools
from telechat_mindie.text.masking import Mask, unmask
from telechat_mindie.text.time_limit import run_within

if TYPE_CHECKING:
    from telechat_mindie.text.template_environment import ChatEnvironment

TURN_MASK = Mask(frozenset().union(*CONTROL_IDS))
"""Where no other tokens are known."""

MAX_OUTPUT = 64 << 20
"""Characters of a prompt, and of what one operation of a template makes; a server bounds a request far below that."""
MAX_SECONDS = 20.0
"""Processor time for one prompt; a conversation of a megabyte takes a fraction of a second."""
_MAX_DEPTH = 64  # of JSON in tools and arguments; MindIE's own parser stops earlier


class RejectedError(InputError):
    """A conversation that a template refuses in its own words."""


def default_template() -> str:
    """The package's own Jinja template of the TeleChat2 chat format."""
    return resources.files(__package__).joinpath("chat_template.jinja").read_text(encoding="utf-8")


def render(
    template: str,
    conversation: object,
    tools: object = None,
    *,
    add_generation_prompt: bool = False,
    variables: Mapping[str, object] | None = None,
    constants: Mapping[str, object] | None = None,
    mask: Mask = TURN_MASK,
) -> str:
    """Render a conversation to a masked prompt; `telechat_mindie.text.masking` says why, its `unmask` undoes it.

    Args:
        template: Jinja source. It sees `messages`, `tools`, `add_generation_prompt`, the variables and constants, and
            what transformers gives a template: values that are not there are false and print nothing, `break` and
            `continue`, `{% generation %}`, `raise_exception(message)`, `strftime_now(format)`, and a `tojson` filter
            that keeps non-ASCII characters.
        conversation: OpenAI-style messages. `content` is a string or a list of text parts; an assistant's may be null
            beside `tool_calls` or `reasoning_content`; `arguments` of a tool call are an object or its JSON text. A
            last message of the role `tools_call` holds the tools, as MindIE sends them.
        tools: function descriptions, printed as they are; they win over a `tools_call` message.
        add_generation_prompt: end with the token that opens the bot's turn.
        variables: what the caller adds for the template, masked like content.
        constants: strings that may act as control tokens, such as `bos_token`.
        mask: of the characters of all tokens.

    Raises:
        InputError: a conversation, tool or variable that is not as above, or one that the template rejects.
        TokenizerError: a template that is not valid Jinja.
    """
    check_text(template, "chat template")
    messages, offered = read_conversation(conversation)
    context = {key: _masked(value, key, mask) for key, value in (variables or {}).items()}
    context |= constants or {}
    context["messages"] = _masked(messages, "messages", mask)
    for message in context["messages"]:
        message["role"] = unmask(message["role"])  # one of a few words, from which templates may make tokens
    context["tools"] = _masked(read_tools(offered if tools is None else tools), "tools", mask)
    context["add_generation_prompt"] = add_generation_prompt

    def make() -> str:
        compiled = _compiled(template, mask)
        return str(compiled.environment.concat(compiled.generate(context)))

    try:
        return run_within(MAX_SECONDS, make)
    except TelechatMindieError:
        raise
    except TimeoutError:
        raise InputError(f"takes more than {MAX_SECONDS:g} seconds", where="chat template") from None
    except Exception as error:  # a template can fail in any way that an expression can
        raise InputError(f"cannot be rendered: {unmask(str(error))}", where="chat template") from None


@lru_cache(maxsize=8)
def _compiled(source: str, mask: Mask) -> Any:
    import jinja2

    from telechat_mindie.text.template_environment import ChatEnvironment

    environment = ChatEnvironment(MAX_OUTPUT)
    environment.filters["tojson"] = _json_filter(environment, mask)
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TokenizerError(
            f"is not valid Jinja in line {error.lineno}: {error.message}",
            where="chat template",
            advice="Take tokenizer_config.json and chat_template.jinja from the checkpoint again.",
        ) from None


def _raise_exception(message: object) -> None:
    raise RejectedError(f"rejects the conversation: {unmask(str(message))}", where="chat template")


def _json_filter(environment: ChatEnvironment, mask: Mask) -> Callable[..., str]:
    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Unmasked first: the order of sorted keys and \u escapes must be those of the real strings.
        plain = _map_strings(environment.checked(value), unmask, "tojson")
        options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return mask(environment.json(plain, ensure_ascii=ensure_ascii, **options))

    return to_json


def _masked(value: object, where: str, mask: Mask) -> Any:
    return _map_strings(value, lambda text: mask(check_text(text, where)), where)


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
