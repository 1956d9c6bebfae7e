"""The terminal chat: reads questions and commands, prints answers as they come."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable

from telechat_mindie.client.answers import Answers
from telechat_mindie.client.dialects import Message
from telechat_mindie.errors import InputError, TelechatMindieError
from telechat_mindie.text.thoughts import Piece, without_thought

HELP = """\
/system TEXT   set the system text; without a text, go back to the chat template's own
/history       print the conversation
/thought       print what the last answer thought before it spoke
/reset         forget the conversation; the system text stays
/help          print this
/exit          end, as Ctrl-D does
//...          a question that begins with a slash
\"""            begins a question of several lines, and ends it
Ctrl-C         stops an answer; what was said of it stays in the conversation"""

_FENCE = '"""'
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all of C0 but tab and line feed, and C1: escape sequences


class ChatLoop:
    """A chat on stdin and stdout.

    On a terminal it prompts, keeps to itself what a terminal would obey, says how fast an answer was, and goes on after
    an error or an interrupt. In a pipe it reads one question a line and prints the answers and nothing else; there an
    error or an interrupt ends it.

    Args:
        answers: who answers.
        system: the system text; None for the chat template's own.
    """

    def __init__(self, answers: Answers, system: str | None) -> None:
        self._answers = answers
        self._system = system
        self._turns: list[Message] = []  # user and assistant by turns, without thoughts
        self._thought = ""
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._commands: dict[str, Callable[[str], object]] = {
            "/system": self._set_system,
            "/history": self._print_history,
            "/thought": lambda _: print(self._shown(self._thought.strip())),
            "/reset": self._reset,
            "/help": lambda _: print(HELP),
        }

    def run(self) -> None:
        """Chat until /exit or the end of the input.

        Raises:
            TelechatMindieError: in a pipe, a command that does not exist, or a question without a whole answer.
        """
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  gives input() its line editing and history
            self._note(f"{self._answers.name}. /help lists the commands.")
        while True:
            try:
                text = self._read()
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                print()
                self._note("/exit or Ctrl-D ends the chat.")
                continue
            if text is None:
                if self._interactive:
                    print()
                return
            if text == "/exit":
                return
            try:
                if text.startswith("/") and not text.startswith("//"):
                    self._obey(text)
                elif text:
                    self._ask(text[1:] if text.startswith("//") else text)
            except TelechatMindieError as error:
                if not self._interactive:
                    raise
                print(self._shown(f"error: {error}"), file=sys.stderr)

    def _read(self) -> str | None:
        """The next question or command, without white space around it; None at the end of the input."""
        line = self._read_line("> ")
        if line is None:
            return None
        if not line.startswith(_FENCE):
            return line.strip()
        lines = [line.removeprefix(_FENCE)]
        while not (end := lines[-1].rstrip()).endswith(_FENCE):
            line = self._read_line(". ")
            if line is None:
                break
            lines.append(line)
        else:
            lines[-1] = end.removesuffix(_FENCE)
        return "\n".join(lines).strip()

    def _read_line(self, prompt: str) -> str | None:
        try:
            return input(prompt if self._interactive else "")
        except EOFError:
            return None
        except UnicodeDecodeError:
            raise InputError("is not UTF-8", where="the input") from None

    def _obey(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        command = self._commands.get(name)
        if command is None:
            raise InputError("is no command", where=name, advice="/help lists them.")
        command(argument.strip())

    def _ask(self, question: str) -> None:
        answer = ""
        thoughts: list[str] = []
        begin = time.monotonic()

        def emit(piece: Piece) -> None:
            nonlocal answer
            if piece.is_thought:
                if not thoughts:
                    self._fold("(thinking...)")
                thoughts.append(piece.text)
                return
            text = piece.text
            if thoughts and not answer:
                text = text.lstrip()  # the line ends behind the thought
                if text:
                    self._fold(f"\r(thought for {time.monotonic() - begin:.0f} s)\n")
            answer += text
            print(self._shown(text), end="", flush=True)

        try:
            figures = self._answers.answer([*self._opening(), {"role": "user", "content": question}], emit)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            print()
            self._note("stopped")
            figures = None
        except TelechatMindieError:
            if answer or (thoughts and self._interactive):
                print()
            raise
        else:
            print()
        self._thought = "".join(thoughts)
        answer = answer if thoughts else without_thought(answer)
        if answer:
            self._turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if figures is not None and self._interactive:
            self._note(str(figures))

    def _set_system(self, text: str) -> None:
        self._system = text or None
        self._note("the system text is set" if text else "the chat template's own system text is back")

    def _reset(self, _: str) -> None:
        self._turns.clear()
        self._note("the conversation is forgotten")

    def _print_history(self, _: str) -> None:
        for message in self._opening():
            print(self._shown(f"{message['role']}: {message['content']}"))

    def _opening(self) -> list[Message]:
        """What was said so far."""
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, *self._turns]

    def _fold(self, text: str) -> None:
        """Show a terminal what stands for a thought; a pipe gets answers alone."""
        if self._interactive:
            print(text, end="", flush=True)

    def _note(self, text: str) -> None:
        if self._interactive:
            print(self._shown(f"[{text}]"), file=sys.stderr)

    def _shown(self, text: str) -> str:
        return _CONTROLS.sub("\ufffd", text) if self._interactive else text
