"""How progress in steps is told where no person watches."""

from __future__ import annotations

from telechat_mindie.commands import output


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
