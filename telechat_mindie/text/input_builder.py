"""What MindIE calls to turn a chat request into a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from telechat_mindie.text.tokenizer import TelechatTokenizer


class InputBuilder:
    """The second thing that `get_model` returns; mindformers' class of this name has the same call."""

    def __init__(self, tokenizer: TelechatTokenizer) -> None:
        self.tokenizer = tokenizer

    def make_context(
        self,
        rank: int,
        conversation: object,
        add_generation_prompt: bool = True,
        adapt_to_max_length: bool = False,
        **options: Any,
    ) -> list[int]:
        """The ids of a conversation, as one flat list.

        Args:
            rank: the caller's rank; every rank gets the same prompt.
            conversation: messages; MindIE appends the tools as a last message of the role `tools_call`.
            add_generation_prompt: end with `<_bot>`.
            adapt_to_max_length: accepted and ignored, as mindformers does; the server bounds the length itself.
            **options: `tools`, `chat_template_kwargs` and variables for `apply_chat_template`.

        Raises:
            InputError: a malformed conversation.
        """
        prompt = self.tokenizer.apply_chat_template(
            conversation, add_generation_prompt=add_generation_prompt, **{**options, "tokenize": True}
        )
        return list(prompt)
