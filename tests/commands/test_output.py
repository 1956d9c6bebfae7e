"""How progress in steps is told where no person watches."""

from __future__ import annotations

import pytest

from telechat_mindie.commands import output
from telechat_mindie.units import format_seconds


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (59.6, "1:00 min"), (425, "7:05 min"), (12000, "3:20 h")])
def test_seconds_as_people_read_them(seconds, text):
    assert format_seconds(seconds) == text


def test_a_line_now_and_then_and_the_time_left_without_the_first_step(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: clock[0])
    with output.step_progress("step", 20, 4, "compiles") as advance:
        for step in range(5, 21):
            clock[0] += 100 if step == 5 else 4
            advance(step, f"loss {step}")
    assert capsys.readouterr().err.splitlines() == [
        "step 5/20  compiles",
        "step 5/20  loss 5",
        "step 6/20  loss 6  56 s left",
        "step 9/20  loss 9  44 s left",
        "step 12/20  loss 12  32 s left",
        "step 15/20  loss 15  20 s left",
        "step 18/20  loss 18  8 s left",
        "step 20/20  loss 20",
    ]
