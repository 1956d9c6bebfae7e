"""The terminal chat: reads questions and commands, prints answers as they come."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from telechat_mindie.client.answers import Answers
from telechat_mindie.client.chat_settings import SETTINGS, changed, described
from telechat_mindie.client.conversation import Conversation
from telechat_mindie.client.line_editor import LineEditor
from telechat_mindie.errors import InputError, TelechatMindieError
from telechat_mindie.text.thoughts import Piece, without_thought

LEAVE = ("/bye", "/exit", "/quit")

KEYS = (
    ("//...", "a question that begins with a slash"),
    ('"""', "begins a question of several lines, and ends it; a pasted text is one question anyway"),
    ("Ctrl-C", "stops an answer; what was said of it stays in the conversation"),
    ("Tab", "completes commands, names and files"),
)

_FENCE = '"""'
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all of C0 but tab and line feed, and C1: escape sequences


@dataclass(frozen=True, slots=True)
class _Command:
    """What a word with a slash does.

    Attributes:
        run: takes what stands behind the word.
        text: of /help.
        takes: what stands behind it, for /help.
        offer: what Tab offers for that.
    """

    run: Callable[[str], object]
    text: str
    takes: str = ""
    offer: Callable[[str], Iterable[str]] = lambda _: ()


class ChatLoop:
    """A chat on stdin and stdout.

    On a terminal it prompts, keeps to itself what a terminal would obey, says how fast an answer was, and goes on after
    an error or an interrupt. In a pipe it reads one question a line and prints the answers and nothing else; there an
    error or an interrupt ends it.

    Args:
        answers: who answers.
        system: the system text; None for the chat template's own.
        history: file in which a terminal's messages are remembered; None for nowhere.
    """

    def __init__(self, answers: Answers, system: str | None, history: Path | None = None) -> None:
        self._answers = answers
        self._conversation = Conversation(system)
        self._thought = ""
        self._question: str | None = None  # the last one
        self._is_answered = False
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._history = history
        self._editor: LineEditor | None = None
        self._commands = {
            "/retry": _Command(self._retry, "ask the last question again"),
            "/set": _Command(
                self._set,
                "set how answers are drawn; without a value as the model has it; alone: print all",
                "NAME VALUE",
                lambda word: _beginning((f"{name} " for name in SETTINGS), word),
            ),
            "/system": _Command(
                self._set_system, "set the system text; without a text, the chat template's own", "TEXT"
            ),
            "/history": _Command(self._print_history, "print the conversation"),
            "/thought": _Command(self._print_thought, "print what the last answer thought before it spoke"),
            "/reset": _Command(self._reset, "forget the conversation; the system text stays"),
            "/save": _Command(self._save, "write the conversation into a file", "FILE", _files),
            "/load": _Command(self._load, "go on with a conversation that was saved", "FILE", _files),
            "/help": _Command(self._print_help, "print this"),
        }

    def run(self) -> None:
        """Chat until /bye or the end of the input.

        Raises:
            TelechatMindieError: in a pipe, a command that does not exist, or a question without a whole answer.
        """
        if self._interactive:
            self._editor = LineEditor(self._offer, self._history)
            self._note(f"{self._answers.name}. /help lists the commands.")
        while True:
            try:
                entry = self._read()
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                print()
                self._note("/bye or Ctrl-D ends the chat.")
                continue
            if entry is None:
                if self._interactive:
                    print()
                return
            text, is_block = entry
            if text in LEAVE and not is_block:
                return
            try:
                if text:
                    self._ask(text) if is_block else self._take(text)
            except TelechatMindieError as error:
                if not self._interactive:
                    raise
                print(self._shown(f"error: {error}"), file=sys.stderr)

    def _read(self) -> tuple[str, bool] | None:
        """What was entered, without white space around it, and whether as a block; None at the end of the input."""
        line = self._read_line("> ")
        if line is None:
            return None
        if not line.startswith(_FENCE):
            self._remember(line.strip())
            return line.strip(), False
        lines = [line.removeprefix(_FENCE)]
        while not (end := lines[-1].rstrip()).endswith(_FENCE):
            line = self._read_line(". ")
            if line is None:
                break
            lines.append(line)
        else:
            lines[-1] = end.removesuffix(_FENCE)
        text = "\n".join(lines).strip()
        self._remember(f"{_FENCE}{text}{_FENCE}")
        return text, True

    def _read_line(self, prompt: str) -> str | None:
        try:
            return self._editor.read(prompt) if self._editor is not None else input()
        except EOFError:
            return None
        except UnicodeDecodeError:
            raise InputError("is not UTF-8", where="the input") from None

    def _remember(self, message: str) -> None:
        if self._editor is not None:
            self._editor.remember(message)

    def _take(self, text: str) -> None:
        """Obey a command, or ask a question. A slash in front means something in a single line only.

        Raises:
            InputError: a line with a slash that is no command.
        """
        name = text.split(maxsplit=1)[0]
        if (command := self._commands.get(name)) is not None:
            command.run(text.removeprefix(name).strip())
        elif "\n" in text or not text.startswith("/"):
            self._ask(text)
        elif text.startswith("//"):
            self._ask(text[1:])
        else:
            raise InputError("is no command", where=name, advice="/help lists them; // begins a question with a slash.")

    def _offer(self, before: str, word: str) -> Iterable[str]:
        """What Tab offers for `word` behind `before`; with a space where more is to come."""
        if not before.strip():
            if not word.startswith("/"):
                return ()
            names = (name + " " * bool(command.takes) for name, command in self._commands.items())
            return _beginning((*names, LEAVE[0]), word)
        command = self._commands.get(before.strip())
        return () if command is None else command.offer(word)

    def _ask(self, question: str) -> None:
        self._question, self._is_answered = question, False
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
            asked = [*self._conversation.messages, {"role": "user", "content": question}]
            figures = self._answers.answer(asked, emit)
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
            self._conversation.add(question, answer)
            self._is_answered = True
        if figures is not None and self._interactive:
            self._note(str(figures))

    def _retry(self, _: str) -> None:
        if self._question is None:
            raise InputError("has no question to ask again", where="/retry")
        if self._is_answered:
            self._conversation.drop_last()
        self._ask(self._question)

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        name, value = name.lstrip("-").replace("-", "_"), value.strip()
        if not name:
            for name, value in described(self._answers.sampling):
                print(name, value)
            return
        self._answers.use(changed(self._answers.sampling, name, value))
        self._note(f"{name} {value or 'as the model has it'}")

    def _set_system(self, text: str) -> None:
        self._conversation.system = text or None
        self._note("the system text is set" if text else "the chat template's own system text is back")

    def _reset(self, _: str) -> None:
        self._conversation.turns.clear()
        self._question, self._is_answered = None, False
        self._note("the conversation is forgotten")

    def _save(self, text: str) -> None:
        path = _named_file("/save", text)
        self._conversation.save(path)
        self._note(f"saved: {path}")

    def _load(self, text: str) -> None:
        path = _named_file("/load", text)
        self._conversation.load(path)
        turns = self._conversation.turns
        self._question, self._is_answered = (turns[-2]["content"], True) if turns else (None, False)
        self._note(f"{len(turns) // 2} questions and answers; /history prints them")

    def _print_history(self, _: str) -> None:
        for message in self._conversation.messages:
            print(self._shown(f"{message['role']}: {message['content']}"))

    def _print_thought(self, _: str) -> None:
        print(self._shown(self._thought.strip()))

    def _print_help(self, _: str) -> None:
        rows = [(f"{name} {command.takes}", command.text) for name, command in self._commands.items()]
        for left, right in (*rows, (", ".join(LEAVE), "end, as Ctrl-D does"), *KEYS):
            print(f"{left:<18}{right}")

    def _fold(self, text: str) -> None:
        """Show a terminal what stands for a thought; a pipe gets answers alone."""
        if self._interactive:
            print(text, end="", flush=True)

    def _note(self, text: str) -> None:
        if self._interactive:
            print(self._shown(f"[{text}]"), file=sys.stderr)

    def _shown(self, text: str) -> str:
        return _CONTROLS.sub("\ufffd", text) if self._interactive else text


def _named_file(command: str, text: str) -> Path:
    if not text:
        raise InputError("needs the name of a file", where=command)
    return Path(text).expanduser().absolute()


def _beginning(words: Iterable[str], begin: str) -> list[str]:
    return [word for word in words if word.startswith(begin)]


def _files(begin: str) -> list[str]:
    """Paths that begin so; folders end with a slash."""
    folder, slash, name = begin.rpartition("/")
    prefix = folder + slash
    try:
        found = [path for path in Path(prefix or ".").expanduser().iterdir() if path.name.startswith(name)]
    except (OSError, RuntimeError):  # no such folder, no such user
        return []
    return [f"{prefix}{path.name}{'/' * path.is_dir()}" for path in found]
