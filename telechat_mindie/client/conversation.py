"""What was said in a chat."""

from __future__ import annotations

from dataclasses import dataclass, field

from telechat_mindie.client.dialects import Message


@dataclass
class Conversation:
    """A system text, None for the chat template's own, and the turns after it, user and assistant by turns."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def messages(self, question: str) -> list[Message]:
        """The messages that ask `question` next."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.turns, {"role": "user", "content": question}]

    def add(self, question: str, answer: str) -> None:
        self.turns.append({"role": "user", "content": question})
        self.turns.append({"role": "assistant", "content": answer})

    def reset(self) -> None:
        """Forget the turns; the system text stays."""
        self.turns.clear()
