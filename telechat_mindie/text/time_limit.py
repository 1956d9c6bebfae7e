"""A function under a limit of processor time, whatever Python it runs."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

_limited = threading.local()
"""Its `now` is true in a thread whose function is under a limit."""


class _Stop(BaseException):
    """No Exception, so that nothing on the way takes it for an error of its own."""


def run_within(seconds: float, function: Callable[[], T]) -> T:
    """What a function gives or raises, run in a thread of its own, where what stops it can hit nothing else.

    The thread's processor time counts, so that a busy machine refuses nothing. One long call of C is not interrupted. A
    function that runs under a limit already stays under that one alone, and in its thread.

    Raises:
        TimeoutError: it took longer.
    """
    if getattr(_limited, "now", False):
        return function()
    made: list[T] = []
    failed: list[BaseException] = []
    clock: int | None = None  # of the thread's processor time, while the function runs
    end = threading.Lock()  # who holds it keeps the thread from ending, and its clock and its name from being another's

    def work() -> None:
        nonlocal clock
        _limited.now = True
        with suppress(_Stop):  # one that comes when the function is over
            clock = time.pthread_getcpuclockid(threading.get_ident())
            try:
                made.append(function())
            except BaseException as error:  # for the caller
                failed.append(error)
            with end:
                clock = None

    thread = threading.Thread(target=work, name="time limit", daemon=True)
    thread.start()
    assert thread.ident is not None
    thread.join(seconds)
    while thread.is_alive():
        with end:
            left = 0.01 if clock is None else seconds - time.clock_gettime(clock)
            if left <= 0:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_Stop))
        # Stopped again after a second: Python drops what is raised while it finalizes an object.
        thread.join(max(left, 0.01) if left > 0 else 1)
    if made:
        return made[0]
    if failed and not isinstance(failed[0], _Stop):
        raise failed[0]
    raise TimeoutError
