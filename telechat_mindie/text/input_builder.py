"""What MindIE calls to turn a chat request into a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from telechat_mindie.text.conversation import read_conversation
from telechat_mindie.text.thoughts import without_thoughts

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
        """The ids of a conversation, as one flat list; without the thoughts of earlier answers where the model thinks.

        Args:
            rank: the caller's rank; every rank gets the same prompt.
            conversation: messages; MindIE appends the tools as a last message of the role `tools_call`.
            add_generation_prompt: end with `<_bot>`.
            adapt_to_max_length: accepted and ignored, as mindformers does; the server bounds the length itself.
            **options: `tools`, `chat_template_kwargs` and variables for `apply_chat_template`.

        Raises:
            InputError: a malformed conversation.
        """
        messages, offered = read_conversation(conversation)
        tools = offered if options.get("tools") is None else options["tools"]
        turns = without_thoughts(messages, self.tokenizer.template_for(tools))
        options |= {"tools": tools, "add_generation_prompt": add_generation_prompt, "tokenize": True}
        prompt = self.tokenizer.apply_chat_template(turns, **options)
        return list(prompt)
