"""What an answer's text is in OpenAI's chat: a thought, content and tool calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from telechat_mindie.server.formats.tool_calls import TAGS as CALL_TAGS
from telechat_mindie.server.formats.tool_calls import ToolCallParser
from telechat_mindie.text.thoughts import END as END_OF_THOUGHT
from telechat_mindie.text.thoughts import TAGS as THOUGHT_TAGS
from telechat_mindie.text.thoughts import ThoughtParser

Fields = dict[str, Any]


class ChatParts:
    """Takes an answer's text in pieces of any size; the deltas add up to the same message for all of them.

    Args:
        thoughts: tells the thought from the rest; a tool call in a thought is no call.
        calls: finds the tool calls behind it; None where no tools are offered.
    """

    def __init__(self, thoughts: ThoughtParser, calls: ToolCallParser | None) -> None:
        self._thoughts = thoughts
        self._calls = calls
        self._has_thought = False

    @property
    def may_think(self) -> bool:
        """Whether the answer may begin with a thought."""
        return self._thoughts.expected

    @property
    def may_wait(self) -> bool:
        """Whether text may be held back."""
        return self.may_think or self._calls is not None

    @property
    def kept_tokens(self) -> tuple[str, ...]:
        """The tags by which both are found, which are special tokens in some vocabularies."""
        return (THOUGHT_TAGS if self._thoughts.expected else ()) + (() if self._calls is None else CALL_TAGS)

    @property
    def has_called(self) -> bool:
        return self._calls is not None and self._calls.found

    def thought_tokens(self, lengths: Sequence[int], text: str) -> int:
        """Tokens of the whole answer before the tag that ends its thought.

        Args:
            lengths: characters of the answer with each of its tokens.
            text: the answer.
        """
        if not self._has_thought:
            return 0
        end = text.find(END_OF_THOUGHT)
        return len(lengths) if end < 0 else sum(length <= end for length in lengths)

    def put(self, text: str, *, is_last: bool) -> Iterator[Fields]:
        """The deltas that these characters let go: {reasoning_content}, {content} or {tool_calls}."""
        for piece in (*self._thoughts.put(text), *(self._thoughts.flush() if is_last else ())):
            if piece.is_thought:
                self._has_thought = True
                yield {"reasoning_content": piece.text}
            elif self._calls is None:
                yield {"content": piece.text}
            else:
                yield from map(_delta, self._calls.put(piece.text))
        if is_last and self._calls is not None:
            yield from map(_delta, self._calls.flush())


def message(parts: ChatParts, text: str) -> Fields:
    """The message of a whole answer; `reasoning_content` only where there is a thought, as in MindIE."""
    deltas = list(parts.put(text, is_last=True))

    def joined(name: str) -> str:
        return "".join(delta[name] for delta in deltas if name in delta)

    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    thought = joined("reasoning_content")
    return {
        "role": "assistant",
        "content": joined("content"),
        **({"reasoning_content": thought} if thought else {}),
        "tool_calls": [{key: value for key, value in call.items() if key != "index"} for call in calls],
    }


def _delta(piece: str | Fields) -> Fields:
    return {"content": piece} if isinstance(piece, str) else {"tool_calls": [piece]}
