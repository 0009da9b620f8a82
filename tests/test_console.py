"""What the screen shows of a run, on a terminal and in a pipe, what ends it, and exit codes."""

import io
import itertools
import os
import re
import signal
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tqdm import tqdm

from federated import Client
from scans.cases import PreparedCase
from scans.files import DataError
from study.config import Checkpoint, Config, Round, Training
from study.console import (
    Progress,
    count_steps,
    describe,
    describe_hospitals,
    is_foreseen,
    run_command,
    use_any_characters,
)
from study.hospitals import Hospital
from study.results import TrainingFolder

SCANS = {"ct": ("ct_set",), "mri": ("mri_set",)}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def done(**val_dice):
    return Round(1, {"mri": 0.5, "ct": 1.012}, val_dice, 1.0)


# ---------------------------------------------------------------------------------------- progress


def test_in_a_pipe_each_round_is_a_line_with_the_time_left(capsys):
    clock = [0.0]
    with Progress({"fl, seed 1": 8, "fl, seed 2": 99}) as run:
        run.bar._time = lambda: clock[0]
        with run.attempt("fl, seed 1"):
            for item in run.watch("ab", "round 1 of 4"):
                clock[0] += 10
                assert item in "ab"
            run.show_round(done(mri=0.25))
            list(run.watch("cd", "round 2 of 4"))
            run.show_round(done(ct=0.5))
            run.show_round(done())
            run.show_choice(Checkpoint(best_round=7, best_dice=0.456))
            run.show_choice(Checkpoint(best_round=9, best_dice=float("nan")))
    out, err = capsys.readouterr()
    name = "training 1 of 2 (fl, seed 1)"
    assert err.splitlines() == [
        f"{name}, round 1 of 4: loss 0.76, MRI 0.25; 01:00 left",  # of this training alone
        f"{name}, round 2 of 4: loss 0.76, CT 0.50; 00:20 left",
        f"{name}, round 2 of 4: loss 0.76; 00:20 left",
        f"{name}: the weights of round 7, validation Dice 0.46 are kept",
        f"{name}: no validation case holds an organ; the last weights are kept",
    ]
    assert out == ""
    assert "\r" not in err


def test_on_a_terminal_a_bar_moves_with_every_step(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress({"centralized+gin 1:5 p=0.5, seed 123": 4, **dict.fromkeys(range(11), 1)}) as run:
        run.bar.mininterval, run.bar.dynamic_ncols = 0, lambda _: (100, 24)
        with run.attempt("centralized+gin 1:5 p=0.5, seed 123"):
            list(run.watch(range(2), "round 20 of 20"))
            run.show_round(done(mri=0.25, ct=0.5))
            list(run.watch(range(2), "testing"))
            assert (run.bar.n, run.bar.total) == (4, 4)
        for name in (0, 1):
            with run.attempt(name):
                pass
    shown = [line for line in screen.getvalue().split("\r") if line.strip()]
    assert all(len(line.rstrip("\n")) <= 100 for line in shown)
    place = "training 1/12 (centralized+gin 1:5 p=0.5, seed 123), round 20/20 |"
    assert any(place in line for line in shown)
    *_, last, after = itertools.takewhile(lambda line: "training 3" not in line, shown)
    for text in ("MRI 0.25, CT 0.50", "testing |", "00:00 left"):
        assert text in last
    assert re.fullmatch(r"training 2/12 \(0\) \| +\| \? left *", after)


@pytest.mark.parametrize(
    ("n", "error"), [(4, None), (1, OSError("full")), (0, None), (2, None), (5, None)]
)
def test_the_bar_ends_with_each_training(n, error, monkeypatch):
    """One that fails, that another process does or has brought forward meanwhile, too."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress({"a": 4, "b": 3}) as run:
        with run.attempt("a"):
            assert (run.bar.n, run.bar.total) == (0, 4)
            list(run.watch(range(n)))
            if error:
                raise error
        assert (run.bar.n, run.bar.total) == (n, n)
        with run.attempt("b"):
            assert (run.bar.n, run.bar.total) == (0, 3)


def test_steps_are_counted_by_hand():
    """Batches of each hospital and round, validation cases of rounds 2, 4 and 5, test cases."""
    case = SimpleNamespace(counts=np.array([9, 1]))
    everyone = [
        Hospital("mri", "mri", [case] * 3, [case] * 10, [case] * 2),  # validated on eight
        Hospital("ct", "ct", [case] * 9, [case], [case] * 2),
        Hospital("far", "", [], [], [case] * 5),
    ]
    config = Config("complete", rounds=5, local_steps=3, val_every=2)
    for names, n_rounds, n_tested, expected in (
        (("mri", "ct"), 0, 0, 5 * 3 * 2 + 3 * 9 + 9),
        (("mri", "ct"), 2, 0, 3 * 3 * 2 + 2 * 9 + 9),
        (("mri",), 4, 0, 1 * 3 * 1 + 1 * 8 + 9),
        (("ct",), 5, 7, 2),
    ):
        folder = TrainingFolder(config, Training(1, "fl"))
        folder.history, folder.n_tested = lambda n=n_rounds: [{}] * n, lambda n=n_tested: n
        assert count_steps(folder, names, everyone) == expected


def test_a_step_is_counted_once_an_item_has_been_worked_on():
    with Progress({"a": 6}) as run:
        watched = run.watch("abc")
        for before in (0, 3):  # as validation cases in each round
            seen = [(item, run.bar.n - before) for item in watched]
            assert seen == [("a", 0), ("b", 1), ("c", 2)]
        assert run.bar.n == 6
        assert list(run.watch([])) == []


def test_batches_of_clients_are_steps(capsys):
    def batches(round_):
        return iter([f"{round_}a", f"{round_}b"])

    clients = {"mri": Client(3, batches, max), "ct": Client(7, batches, max)}
    with Progress({"fl": 20}) as run, run.attempt("fl"):
        watched = run.watch_clients(clients, rounds=5)
        parts = {name: (client.n_k, client.loss_function) for name, client in watched.items()}
        assert parts == {"mri": (3, max), "ct": (7, max)}
        assert list(watched["ct"].batches(4)) == ["4a", "4b"]
        assert list(watched["mri"].batches(2)) == ["2a", "2b"]
        assert run.bar.n == 4
        run.show_round(done())
    assert capsys.readouterr().err.startswith("training 1 of 1 (fl), round 2 of 5: ")


def test_what_fails_foreseeably_is_said_and_the_next_follows(capsys):
    errors = {
        "a": FloatingPointError("the loss is nan"),
        "b": None,
        "c": OSError(28, "No space left on device"),
        "d": torch.cuda.OutOfMemoryError("CUDA out of memory"),
        "e": DataError("x.npy: is damaged"),
    }
    errors["a"].add_note("round 3, hospital mri")
    with Progress(dict.fromkeys(errors, 1)) as run:
        for name, error in errors.items():
            with run.attempt(name):
                if error:
                    raise error
                tqdm.write(run.name, file=sys.stderr)
    a, said, *others = capsys.readouterr().err.splitlines()
    assert (a, said) == ("FAILED: a: round 3, hospital mri: the loss is nan", "training 2 of 5 (b)")
    assert others == [f"FAILED: {name}: {errors[name]}" for name in "cde"]
    assert run.failed == [line.removeprefix("FAILED: ") for line in (a, *others)]


@pytest.mark.parametrize("bug", [ValueError("x"), RuntimeError("mat1"), KeyError(1)])
def test_a_bug_ends_all_and_keeps_its_traceback_and_where_it_was(bug, capsys):
    def work():
        with Progress({"fl": 1}) as run, run.attempt("fl"):
            bug.add_note("round 1, hospital mri")
            raise bug

    with pytest.raises(type(bug)) as caught:
        run_command("x.py", work)
    assert caught.value is bug
    assert bug.__notes__ == ["round 1, hospital mri", "fl"]
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------- what is said


def test_a_run_is_described_by_its_data_and_its_settings():
    device = torch.device("cpu")
    first, *lines = describe(Config(seeds=(1, 2)), device).splitlines()
    assert "PHANTOMS" in first
    assert "say nothing about patients" in first
    settings = [line.split() for line in lines]
    for setting in (["seeds", "1", "2"], ["rounds", "30"], ["ratios", "1:5"]):
        assert setting in settings
    assert settings[-1] == ["device", "cpu,", "torch", torch.__version__]
    first, *lines = describe(Config(**SCANS, scenario="complete"), device).splitlines()
    assert first == "FedGIN on scans"
    assert ["ct", "ct_set"] in [line.split() for line in lines]
    assert not {"ratios", "mri_cases"} & {line.split()[0] for line in lines}


def test_it_is_said_who_trains_on_how_many_cases():
    def some(modality, n):
        return [PreparedCase("", modality, None, None, None, None)] * n

    mri, ct = some("mri", 3), some("ct", 9)
    everyone = [Hospital("mri", "mri", mri, [0], []), Hospital("ct", "ct", ct, [], [0] * 2)]
    chosen = {
        Training(1, "fl", "1:1"): {"mri": mri, "ct": ct[:3]},
        Training(2, "fl", "1:1"): {"mri": mri, "ct": ct[:3]},
        Training(1, "centralized+gin", "1:5", 0.25): {"mri": mri[:1], "ct": ct[:5]},
        Training(1, "fl", "1:5"): {"mri": mri, "ct": ct},  # 15 would be needed
        Training(1, "fl", "all"): {"mri": mri, "ct": ct},
        Training(1, "mri-only"): {"mri": mri},
    }
    assert describe_hospitals({1: everyone, 2: everyone}, chosen).splitlines() == [
        "mri: 3 cases to train, 1 to validate, 0 to test",
        "ct: 9 cases to train, 0 to validate, 2 to test",
        "fl 1:1:                     training cases: mri 3, ct 3",
        "centralized+gin 1:5 p=0.25: training cases: mri 1, ct 5",
        "fl 1:5:                     training cases: mri 3, ct 9"
        " (WARNING: not 1:5, because there are no more CT cases)",
        "fl all:                     training cases: mri 3, ct 9",
        "mri-only:                   training cases: mri 3",
    ]


def test_what_is_foreseen():
    foreseen = [DataError(), FloatingPointError(), OSError(), ConnectionError(), MemoryError()]
    assert all(map(is_foreseen, foreseen))
    bugs = [ValueError(), RuntimeError("x"), KeyError(), AssertionError(), ArithmeticError()]
    assert not any(map(is_foreseen, bugs))


def test_streams_print_what_a_terminal_cannot_show(monkeypatch):
    for name in ("stdout", "stderr"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding="ascii"))
        use_any_characters()
        print("s\udcff α", flush=True, file=getattr(sys, name))
        assert raw.getvalue() == b"s\\udcff \\u03b1\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # not a file: left alone
    use_any_characters()


# --------------------------------------------------------------------------------------- exit codes


@pytest.fixture(autouse=True)
def handlers():
    """run_command changes what SIGTERM does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def raising(error, *notes):
    def work():
        for note in notes:
            error.add_note(note)
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "code", "message"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (raising(DataError("a/b.nii.gz: missing")), 2, "x.py: a/b.nii.gz: missing\n"),
    ],
)
def test_bad_input_takes_one_line_and_exit_code_2(work, code, message, capsys):
    assert run_command("x.py", work) == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DataError("case s1: cannot be read"), "case s1: cannot be read"),  # for its notes
        (FloatingPointError("the loss is nan"), "the loss is nan"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (ConnectionError("rank 1 is gone"), "rank 1 is gone"),
        (MemoryError("no memory"), "no memory"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
        (RuntimeError("[enforce fail] can't allocate memory"), "[enforce fail] can't allocate"),
    ],
)
def test_a_run_that_failed_says_where_and_takes_exit_code_1(error, message, capsys):
    notes = "round 3, hospital mri", "seed 1, arm fl"
    assert run_command("x.py", raising(error, *notes), "\nand so on") == 1
    said, hint = capsys.readouterr().err.splitlines()
    assert said.startswith(f"x.py: the run failed: {notes[1]}: {notes[0]}: {message}")
    assert hint == "and so on"


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_says_how_to_go_on(stop, capsys):
    def work():
        with Progress({"fl": 1}) as run, run.attempt("fl"):
            os.kill(os.getpid(), stop)
            time.sleep(20)
            pytest.fail("nobody stopped it")

    assert run_command("x.py", work, "; and so on") == 130
    assert capsys.readouterr().err.strip() == "x.py: stopped; and so on"


def test_a_thread_may_run_a_command(capsys):
    codes = []
    work = raising(DataError("bad"))
    thread = threading.Thread(target=lambda: codes.append(run_command("x.py", work)))
    thread.start()
    thread.join()
    assert codes == [2]
