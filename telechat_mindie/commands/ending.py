"""How a command ends that cannot go on, always in one line: at a signal, a fault of the user's, or a fault of ours."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from telechat_mindie.errors import TelechatMindieError

REFUSED = 2
OWN_FAULT = 70
"""EX_SOFTWARE of sysexits.h."""

_SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "ended with its terminal"}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C. The chat and the load test go on behind it."""

    number = signal.SIGINT


class Terminated(SystemExit):
    """SIGTERM or SIGHUP: nothing goes on behind it."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(128 + number)
        self.number = number


def run(command: Callable[[], object]) -> NoReturn:
    """Run a command and leave with its exit code.

    Exit codes: the command's own, or 2 where the input is refused, 70 at a fault of this program, 130, 143 and 129 at
    Ctrl-C, SIGTERM and SIGHUP, and 141 where nobody reads the output any more.
    """
    _open_standard_streams()
    for number in _SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # not where nohup ignores it
            signal.signal(number, _on_signal)
    sys.unraisablehook = _on_unraisable
    try:
        try:
            command()
        finally:
            sys.stdout.flush()  # at Python's own end a full disk would be a traceback
        sys.exit(0)
    except BaseException as fault:
        _leave(fault)


def _open_standard_streams() -> None:
    """Give what the caller closed a place to go, and characters that the output does not know an escape."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # it was closed when Python began
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _on_signal(number: int, frame: FrameType | None) -> None:
    end = Interrupted() if number == signal.SIGINT else Terminated(signal.Signals(number))
    if _is_importing(frame):
        _leave_at_once(end)
    if "asyncio" in sys.modules:
        from asyncio import get_running_loop

        with contextlib.suppress(RuntimeError):
            get_running_loop().call_soon_threadsafe(_raise, end)  # between its tasks, not within one
            return
    raise end


def _raise(end: BaseException) -> NoReturn:
    raise end


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported. An exception there may leave a library half made: MindSpore's aborts."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _on_unraisable(arguments: sys.UnraisableHookArgs) -> None:
    if isinstance(arguments.exc_value, (Interrupted, Terminated)):  # it came where Python passes over exceptions
        _leave_at_once(arguments.exc_value)
    sys.__unraisablehook__(arguments)


def _leave_at_once(end: Interrupted | Terminated) -> NoReturn:
    if staging := sys.modules.get("telechat_mindie.staging"):
        staging.abandon_unfinished()
    _leave(end)


def _leave(fault: BaseException) -> NoReturn:
    """Say in one line on stderr why, and end. A signal has nothing to stop any more, and would spoil the exit code."""
    for number in _SIGNALS:
        if signal.getsignal(number) is _on_signal:
            signal.signal(number, signal.SIG_IGN)
    chain = list(_chain(fault))
    end = next((found for found in chain if isinstance(found, (Interrupted, Terminated))), None)
    if end is not None:
        _say(_ended(end.number))
        _exit(128 + end.number)
    # Our own output, not a socket's further up the chain: click makes a SystemExit of it.
    written = fault.__context__ if isinstance(fault, SystemExit) else fault
    if isinstance(written, OSError) and written.errno == errno.EPIPE:
        _exit(128 + signal.SIGPIPE)
    if isinstance(fault, SystemExit):
        raise fault
    if isinstance(fault, TelechatMindieError):
        _say(f"error: {fault}")
        sys.exit(REFUSED)
    if isinstance(fault, (OSError, MemoryError)) and (text := _system_fault(fault)):
        _say(f"error: {text}")
        _exit(REFUSED)
    _say(_own_fault(fault))
    _exit(OWN_FAULT)


def _chain(fault: BaseException | None) -> Iterator[BaseException]:
    """A fault and what it came of, as a traceback would show it."""
    while fault is not None:
        yield fault
        fault = fault.__cause__ or (None if fault.__suppress_context__ else fault.__context__)


def _ended(number: signal.Signals) -> str:
    text = _SIGNALS[number]
    staging = sys.modules.get("telechat_mindie.staging")
    if staging and staging.LEFT:
        again = shlex.join(["telechat-mindie", *(word for word in sys.argv[1:] if word != "--resume"), "--resume"])
        text += f"; what was complete is kept. Go on with: {again}"
    return f"\n{text}" if os.isatty(2) else text  # behind the terminal's ^C


def _system_fault(fault: OSError | MemoryError) -> str | None:
    """What the system refused; None for what is no matter of the user's machine."""
    if isinstance(fault, MemoryError):
        return "the memory of this machine does not suffice"
    if fault.filename is not None:
        return f"{fault.filename}: {fault.strerror}"
    if fault.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return f"the output cannot be written: {fault.strerror}"
    return None


def _own_fault(fault: BaseException) -> str:
    """The last resort: the fault in a line, and where a log has its traceback."""
    import platform
    import tempfile
    import traceback

    from telechat_mindie import __version__

    shown = " ".join(f"{type(fault).__name__}: {fault}".split())[:300]
    head = f"telechat-mindie {__version__}, Python {platform.python_version()}, {platform.platform()}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="telechat-mindie-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as log:
            log.write(f"{head}\n{shlex.join(sys.argv)}\n\n{''.join(traceback.format_exception(fault))}")
        told = f"Its traceback is in {log.name}; please report it with that file."
    except OSError as error:
        told = f"No log of it could be written: {error.strerror}."
    return f"error: a fault of telechat-mindie itself, {shown}. {told}"


def _say(line: str) -> None:
    # Not by print: a signal may have come in the middle of one.
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode(sys.stderr.encoding or "utf-8", "backslashreplace"))


def _exit(code: int) -> NoReturn:
    """End without Python's own end, where libraries that were stopped midway abort and a full output fails again."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
