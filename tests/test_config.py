"""Settings: defaults for phantoms and for scans, what is refused, the help, and exit codes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import arms
import fedgin
from config import Config, describe, how_to_go_on, make_parser, run_command, to_config
from datasets import ORGANS, DataError

SCANS = {"ct": ("ct_set",), "mri": ("mri_set",)}
GPU_SIZED = {"patch": 96, "width": 32, "depth": 5, "rounds": 100, "local_steps": 50, "lr": 1e-3}
CPU_SIZED = {"patch": 32, "width": 8, "depth": 4, "rounds": 20, "local_steps": 30, "lr": 4e-3}


def parse(args):
    return fedgin.parse(args.split())


# ----------------------------------------------------------------------------------------- defaults


@pytest.mark.parametrize(
    ("folders", "defaults"),
    [
        ({}, {**CPU_SIZED, "spacing": 9.0}),
        (SCANS, {**GPU_SIZED, "spacing": 2.0}),
        ({"ct": ("ct_set",)}, {**GPU_SIZED, "spacing": 2.0}),
        ({"mri": ("mri_set",)}, {**GPU_SIZED, "spacing": 2.0}),
    ],
)
def test_phantoms_and_scans_have_defaults_of_their_own(folders, defaults):
    config = Config(**folders)
    assert {name: getattr(config, name) for name in defaults} == defaults
    assert config.on_phantoms == (not folders)
    assert (config.seeds, config.organs, config.batch_size) == ((42,), ORGANS, 2)
    flags = [word for name, value in folders.items() for word in (f"--{name}", *value)]
    parsed = fedgin.parse(flags)
    assert {name: getattr(parsed, name) for name in defaults} == defaults


def test_what_is_given_is_kept():
    config = Config(**SCANS, rounds=7, lr=0.1, spacing=9.0, width=8)
    assert (config.rounds, config.lr, config.spacing, config.width) == (7, 0.1, 9.0, 8)
    assert (config.local_steps, config.patch) == (50, 96)
    assert parse("--ct a --mri b c --rounds 7 --lr 0.1 --spacing 9 --width 8") == Config(
        ct=("a",),
        mri=("b", "c"),
        rounds=7,
        lr=0.1,
        spacing=9.0,
        width=8,
    )


def test_results_and_cache_lie_in_runs_unless_told_otherwise():
    assert (Config().out, Config().cache) == (str(Path("runs/limited")), str(Path("runs/cache")))
    assert Config(scenario="complete").out == str(Path("runs/complete"))
    assert Config(out="a/b/c").cache == str(Path("a/b/cache"))
    assert Config(out="a/b/c", cache="d").cache == "d"


def test_a_value_stands_for_a_tuple_of_one():
    config = Config(ct="a", mri=["b", "c"], seeds=7, gin_probability=0.5, arms="fl", ratios=["1:1"])
    assert config.ratios == ("1:1",)
    assert (config.ct, config.mri, config.seeds) == (("a",), ("b", "c"), (7,))
    assert (config.gin_probability, config.arms) == ((0.5,), ("fl",))


# ------------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--scenario limitless", "argument --scenario: invalid choice: 'limitless'"),
        ("--arms fedgan", "argument --arms: invalid choice: 'fedgan'"),
        ("--ratios 1:3", "argument --ratios: invalid choice: '1:3'"),
        ("--organs brain", "argument --organs: invalid choice: 'brain'"),
        ("--layout bids", "argument --layout: invalid choice: 'bids'"),
        ("--arms", "argument --arms: expected at least one argument"),
        ("--rounds many", "argument --rounds: invalid int value: 'many'"),
        ("--lr fast", "argument --lr: invalid float value: 'fast'"),
        ("--round 3", "unrecognized arguments: --round"),
        ("--resume yes", "unrecognized arguments: yes"),
        ("--rounds 0", "--rounds must be a positive number, not 0"),
        ("--batch-size -1", "--batch-size must be a positive number, not -1"),
        ("--lr nan", "--lr must be a positive number, not nan"),
        ("--nsd-tolerance inf", "--nsd-tolerance must be a positive number, not inf"),
        ("--gin-probability 1.5", "--gin-probability must lie between 0 and 1, not 1.5"),
        ("--gin-probability nan", "--gin-probability must lie between 0 and 1, not nan"),
        ("--seeds 1 1", "--seeds names something twice: 1 1"),
        ("--ct a b a", "--ct names something twice: a b a"),
        ("--patch 30 --depth 3", "--patch 30 does not fit --depth 3: it must be a multiple of 4"),
        (
            "--patch 8 --depth 4",
            "--patch 8 does not fit --depth 4: it must be a multiple of 8, and",
        ),
        ("--test somewhere", "--test needs folders to train on"),
        ("--spacing 2", "--spacing is for scans; phantoms have voxels of 9 mm"),
        ("--out README.md", "--out README.md is a file"),
    ],
)
def test_bad_flags_take_one_line_and_exit_code_2(args, message, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        fedgin.main(["--out", str(out), *args.split()])
    assert end.value.code == 2
    usage, error = capsys.readouterr().err.strip().splitlines()
    assert usage.endswith("[options]")
    assert f"error: {message}" in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "--rounds must be a positive number"),
        ({"seeds": (3, 3)}, "--seeds names something twice"),
        ({"test": ("a",)}, "--test needs folders to train on"),
        ({"spacing": 2.0}, "--spacing is for scans"),
        ({**SCANS, "patch": 40}, "--patch 40 does not fit --depth 5"),
    ],
)
def test_python_gets_a_value_error(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_gin_may_have_any_probability():
    for p in (0, 0.0, 1, 0.5):
        assert Config(gin_probability=p).gin_probability == (p,)
    assert Config(spacing=9.0).spacing == 9.0  # it is the phantoms' own


# ------------------------------------------------------------------------------------- what is said


def test_help_has_every_flag_with_its_defaults(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    choices = {"scenario": arms.SCENARIOS, "arms": arms.ARMS, "ratios": arms.RATIOS}
    text = " ".join(make_parser(fedgin.__doc__, choices).format_help().split())
    for field in Config.__dataclass_fields__.values():
        assert f" --{field.name.replace('_', '-')} " in text
        assert field.metadata["text"].split("%")[0] in text
    for default in (
        "federated rounds (default: 20, on scans 100)",
        "to which scans are resampled (default: 9.0, on scans 2.0)",
        "(default: liver kidneys spleen pancreas gallbladder)",
        "mean ± deviation (default: 42)",
        f"of {', '.join(arms.ARMS)} (default: the scenario's)",
        "0.25 kinder to CT (default: 1.0 0.25)",
        "python fedgin.py --scenario limited",
    ):
        assert default in text
    assert text.startswith("usage: ")
    assert "None" not in text


def test_a_parser_may_leave_flags_out(capsys):
    parser = make_parser("about", leave_out=("seeds", "arms"))
    args = parser.parse_args(["--rounds", "3"])
    assert not {"seeds", "arms"} & vars(args).keys()
    config = to_config(parser, args, seeds=(5,), arms=("fl",))
    assert (config.seeds, config.arms, config.rounds, config.width) == ((5,), ("fl",), 3, 8)
    with pytest.raises(SystemExit):
        parser.parse_args(["--seeds", "1"])
    with pytest.raises(SystemExit):
        to_config(parser, args, seeds=(5, 5))
    assert "--seeds names something twice: 5 5" in capsys.readouterr().err


def test_a_run_is_described_by_its_data_and_its_settings():
    device = torch.device("cpu")
    lines = describe(Config(seeds=(1, 2)), device).splitlines()
    assert "PHANTOMS" in lines[0]
    assert "say nothing about patients" in lines[0]
    assert ["seeds", "1", "2"] in [line.split() for line in lines]
    assert ["rounds", "20"] in [line.split() for line in lines]
    assert lines[-1].split() == ["device", "cpu,", "torch", torch.__version__]
    lines = describe(Config(**SCANS), device).splitlines()
    assert lines[0] == "FedGIN on scans"
    assert ["ct", "ct_set"] in [line.split() for line in lines]


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


def test_work_that_is_done_gives_its_own_code():
    assert run_command("x.py", lambda: None) == 0
    assert run_command("x.py", lambda: 3) == 3


def test_bad_input_takes_one_line_and_exit_code_2(capsys):
    assert run_command("x.py", raising(DataError("a/b.nii.gz: missing"))) == 2
    assert capsys.readouterr().err == "x.py: a/b.nii.gz: missing\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DataError("case s1: cannot be read"), "case s1: cannot be read"),
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
    assert run_command("x.py", raising(error, *notes), lambda: "\nand so on") == 1
    said, hint = capsys.readouterr().err.splitlines()
    assert said.startswith(f"x.py: the run failed: {notes[1]}: {notes[0]}: {message}")
    assert hint == "and so on"


@pytest.mark.parametrize(
    "bug",
    [AttributeError("no such layer"), RuntimeError("mat1 and mat2"), ValueError("x"), KeyError()],
)
def test_a_bug_keeps_its_traceback(bug, capsys):
    with pytest.raises(type(bug)) as caught:
        run_command("x.py", raising(bug, "round 1, hospital mri"))
    assert caught.value is bug
    assert caught.value.__notes__ == ["round 1, hospital mri"]
    assert capsys.readouterr().err == ""


def wait_to_be_stopped():
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        time.sleep(0.01)
    pytest.fail("nobody stopped it")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_says_how_to_go_on(stop, capsys):
    timer = threading.Timer(0.2, os.kill, (os.getpid(), stop))
    timer.start()
    assert run_command("x.py", wait_to_be_stopped, lambda: "; and so on") == 130
    timer.join()
    assert capsys.readouterr().err.strip() == "x.py: stopped; and so on"


def test_only_a_run_that_can_be_resumed_says_so(tmp_path):
    config = Config(out=str(tmp_path / "out"))
    assert how_to_go_on(config) == ""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")
    assert "the same command with --resume goes on" in how_to_go_on(config)


def test_a_thread_may_run_a_command(capsys):
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(run_command("x.py", raising(DataError("bad"))))
    )
    thread.start()
    thread.join()
    assert codes == [2]


def test_the_help_is_all_that_help_does(tmp_path):
    args = [sys.executable, str(Path(fedgin.__file__)), "--help"]
    done = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: fedgin.py [options]\n\nFedGIN: ")
    assert list(tmp_path.iterdir()) == []
