"""From a conversation to the tokens that a model is trained on, and which of them are its own words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from telechat_mindie.data.conversations import Conversation
from telechat_mindie.errors import InputError
from telechat_mindie.text.control_tokens import CONTROL_IDS
from telechat_mindie.text.conversation import ANSWER_ROLES
from telechat_mindie.text.tokenizer import TelechatTokenizer

TRAIN_ON = ("all", "last")
"""Which answers of a conversation a model learns."""

_BOT, _END = CONTROL_IDS["<_bot>"], CONTROL_IDS["<_end>"]


@dataclass(frozen=True)
class Example:
    """One conversation of n tokens."""

    token_ids: np.ndarray  # [n] int32
    trained: np.ndarray  # [n] bool: the answers and the <_end> that closes each

    def __len__(self) -> int:
        return len(self.token_ids)

    def cut(self, length: int) -> Example:
        """Its first `length` tokens."""
        return Example(self.token_ids[:length], self.trained[:length])


def encode(tokenizer: TelechatTokenizer, conversation: Conversation, train_on: str = "all") -> Example:
    """The chat template's own ids of a conversation, which are those that serving makes of it.

    Control tokens in a message stay text, as there. A template that shows earlier answers without their thoughts trains
    them without.

    Args:
        train_on: "all" answers, or the "last" alone.

    Raises:
        InputError: a conversation that the template does not take or that holds no answer, or an answer that the
            template does not put between `<_bot>` and `<_end>`.
    """
    answers = sum(message.get("role") in ANSWER_ROLES for message in conversation.messages)
    if not answers:
        raise InputError("has no answer to learn", where="conversation", expected="a message of the assistant")
    token_ids = np.array(tokenizer.apply_chat_template(conversation.messages, conversation.tools), np.int32)
    spans = answer_spans(token_ids)
    if len(spans) != answers:
        raise InputError(
            "does not frame each answer by <_bot> and <_end>",
            where="chat template",
            expected=f"{answers} answers",
            found=len(spans),
            advice="Train with the template that ships with TeleChat2.",
        )
    trained = np.zeros(len(token_ids), bool)
    for begin, end in spans if train_on == "all" else spans[-1:]:
        trained[begin:end] = True
    return Example(token_ids, trained)


def answer_spans(token_ids: np.ndarray) -> list[tuple[int, int]]:
    """[begin, end) of each answer: behind a `<_bot>`, to the next `<_end>` and with it. No content makes these ids."""
    ends = np.flatnonzero(token_ids == _END)
    spans = []
    for bot in np.flatnonzero(token_ids == _BOT):
        after = np.searchsorted(ends, bot)
        if after < len(ends):
            spans.append((int(bot) + 1, int(ends[after]) + 1))
    return spans
