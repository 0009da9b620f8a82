"""What the screen shows of a run, on a terminal and in a pipe."""

import io
import sys

import pytest
from test_fedgin import config, hospitals

import fedgin
import progress
from progress import Progress, count_steps, name_training


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


ROW = {"loss": 0.756, "val_dice_mri": 0.25, "val_dice_ct": ""}


def test_in_a_pipe_each_round_is_a_line_with_the_time_left(clock, capsys):
    with Progress(total=8) as run:
        run.name = "arm 1 of 2 (fl)"
        for item in run.watch("ab", "round 1 of 4"):
            clock[0] += 10
            assert item in "ab"
        run.show_round(ROW)
        list(run.watch("cd", "round 2 of 4"))
        run.show_round(ROW | {"val_dice_mri": "", "val_dice_ct": 0.5})
        run.say("fl: a word")
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "arm 1 of 2 (fl), round 1 of 4: loss 0.76, MRI 0.25; 01:00 left",
        "arm 1 of 2 (fl), round 2 of 4: loss 0.76, CT 0.50; 00:20 left",
        "fl: a word",
    ]
    assert out == ""
    assert "\r" not in err


def test_on_a_terminal_there_is_one_bar_that_moves_with_every_step(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress(total=4) as run:
        run._bar.mininterval, run._bar.dynamic_ncols = 0, lambda _: (100, 24)
        run.name = "arm 1 of 2 (centralized+gin 1:5 p=0.5), seed 1 of 3"
        list(run.watch(range(2), "round 20 of 20"))
        run.show_round(ROW | {"val_dice_ct": 0.5})
        list(run.watch(range(2), "testing"))
    shown = [line for line in screen.getvalue().split("\r") if line.strip()]
    assert all(len(line.rstrip("\n")) <= 100 for line in shown)
    assert "arm 1/2 (centralized+gin 1:5 p=0.5), seed 1/3, round 20/20 |" in shown[1]
    assert "MRI 0.25, CT 0.50" in shown[-1]
    assert "testing |" in shown[-1]
    assert "00:00 left" in shown[-1]


def test_steps_are_the_batches_and_cases_that_a_training_asks_for():
    """Counted by a look at what passes through watch, from the start and from round 1 of 3 on."""
    settings = config("--rounds", 3, "--val-every", 2, "--arms", "fl")
    seen, everyone, label = [], hospitals(1), "fl 1:5"

    def watch(items, what):
        for item in items:
            seen.append(what)
            yield item

    start = fedgin.new_state(1, label)
    expected = count_steps(settings, start, everyone)
    states = fedgin.train_arm(settings, start, everyone, fedgin.CPU, watch=watch)
    first = next(states)
    list(states)
    model = fedgin.make_model(settings, 1)
    list(fedgin.test(settings, model, everyone, watch=watch))
    assert len(seen) == expected
    assert set(seen) == {"round 1 of 3", "round 2 of 3", "round 3 of 3", "testing"}
    in_round_1 = seen.count("round 1 of 3")
    assert count_steps(settings, first, everyone) == expected - in_round_1


def test_a_training_has_its_number():
    settings = config("--arms", "fl", "fedgin", "--gin-probability", 1, 0.5)
    assert (
        name_training(settings, fedgin.new_state(42, "fedgin 1:5 p=0.5"))
        == "arm 3 of 3 (fedgin 1:5 p=0.5)"
    )
    settings = config("--arms", "fl", "--seeds", 7, 5)
    assert (
        name_training(settings, fedgin.new_state(5, "fl 1:5")) == "arm 1 of 1 (fl 1:5), seed 2 of 2"
    )
