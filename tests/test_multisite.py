"""Ranks started by torchrun, a hospital each: the weights of one process, and how failures end."""

import csv
import functools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import truncate, write_nnunet, write_totalsegmentator
from ranks import alone, together

import data
import fedgin
from scans import files
from scans.cases import PreparedCase
from scans.files import DataError
from scans.layouts import ORGANS
from scripts import multisite
from study.config import Best, Checkpoint, Config, Training
from study.hospitals import Hospital, load_hospitals, validation_cases
from study.results import RunFolder

ROOT = Path(__file__).parent.parent
TINY = ["--rounds", "3", "--local-steps", "1", "--batch-size", "2", "--width", "2", "--depth", "2"]
TINY += ["--patch", "32", "--spacing", "12", "--val-every", "1", "--gin-probability", "1"]
MODALITY = {"north": "mri", "south": "mri", "west": "ct"}

TRAINING = Training(42, "fedgin", p=1.0)
CPU = torch.device("cpu")

# What a rank runs that is to fail: the command with an action before the n-th call of a function.
# The function's name is left in a file then: a patch that nobody calls would prove nothing.
WORKER = """
import os, runpy, signal, time
import federated, fedgin
from scans.files import DataError
from study import hospitals
from study.trainings import TrainingFolder

def before(owner, name, action, call=1):
    function, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            with open("patched", "a") as file:
                file.write(f"{{name}}\\n")
            action()
        return function(*args, **kwargs)
    setattr(owner, name, wrapper)

def wait(seconds):
    return lambda: time.sleep(seconds)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def hang():
    os.kill(os.getpid(), signal.SIGSTOP)

def lose_disk():
    raise OSError("the disk is gone")

def stumble():
    raise AttributeError("no such layer")

def refuse():
    raise DataError("west/s0004: cannot be read; fetch it again")

{patch}
runpy.run_module("scripts.multisite", run_name="__main__", alter_sys=True)
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def descendants(pid):
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has just ended
        return []
    return [p for child in map(int, children) for p in (child, *descendants(child))]


class Rank:
    """A torchrun and the worker that it starts, in a folder of its own with its own scans alone."""

    def __init__(self, folder, args, environment):
        self.folder, self.out = folder, folder / "out"
        self.streams = {name: (folder / name).open("w") for name in ("stdout", "stderr")}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        settings = {"cwd": folder, "env": environment, "start_new_session": True, **self.streams}
        self.process = subprocess.Popen(list(map(str, args)), **settings)

    @property
    def error(self):
        return (self.folder / "stderr").read_text()

    def own_error(self):
        """What the worker wrote to stderr, without torchrun's traceback for one that failed."""
        return self.error.split("] failed (exitcode")[0]

    def failure(self):
        """The line that says why the run failed."""
        lines = [line for line in self.error.splitlines() if ": the run failed: " in line]
        assert lines, self.error
        return lines[-1]

    def root_cause(self):
        """The last thing on the screen: what torchrun's summary says of the worker that failed."""
        *_, summary = self.error.split("Root Cause (first observed failure):")
        text, line, rest = summary.partition("\n====")
        assert line and not rest.strip("=\n"), self.error
        return text.split("traceback : ")[1]

    def end(self, seconds=60):
        """The exit code, once there is one."""
        return self.process.wait(seconds)

    def kill(self):
        if self.process.poll() is None:  # else its number may be another process's by now
            for pid in descendants(self.process.pid):
                os.kill(pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()
        for stream in self.streams.values():
            stream.close()


class Launcher:
    """Starts ranks, and ends those that a test left behind."""

    def __init__(self, root, sites):
        self.root, self.sites, self.ranks, self.patched = root, sites, [], []

    def __call__(
        self, *args, names=("north", "west"), own=None, patches=None, options=(), inside=None
    ):
        """Start a rank for each name; own: flags and patches: code by name; inside: see network."""
        address, port = ("127.0.0.1", free_port()) if inside is None else ("10.77.0.1", 29500)
        started = []
        for n, name in enumerate(names):
            folder = self.root / name
            folder.mkdir(exist_ok=True)
            if not (folder / name).exists():
                (folder / name).symlink_to(self.sites / name)
            program = ["-m", "scripts.multisite"]
            if name in (patches or {}):
                program = [folder / "worker.py"]
                program[0].write_text(WORKER.format(patch=patches[name]))
                called = re.findall(r"before\([\w.]+, '(\w+)'", patches[name])
                self.patched += [(folder / "patched", function) for function in called]
            prefix, environment = inside[n] if inside else ([], {})
            launcher = [*prefix, sys.executable, "-m", "torch.distributed.run"]
            launcher += ["--nnodes", len(names), "--node-rank", n, "--nproc-per-node", 1]
            launcher += ["--master-addr", address, "--master-port", port, *options]
            flags = [f"--{MODALITY[name]}", name, "--out", "out", *TINY, *args]
            flags += (own or {}).get(name, [])
            started.append(Rank(folder, [*launcher, *program, *flags], environment))
        self.ranks += started
        return started

    def end(self):
        for rank in self.ranks:
            rank.kill()
        for file, function in self.patched:
            assert function in file.read_text().splitlines(), f"{function} was not called"


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """Folders of three hospitals, with 2, 2 and 3 training cases."""
    root = tmp_path_factory.mktemp("sites")
    write_nnunet(root / "north", "mri", 4)
    write_totalsegmentator(root / "south", "mri", 3, seed=2)
    write_totalsegmentator(root / "west", "ct", 5)
    return root


@pytest.fixture
def start(tmp_path, sites):
    launcher = Launcher(tmp_path, sites)
    yield launcher
    launcher.end()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, sites):
    """A function: hospitals' names → the folder of the same run in one process."""
    root = tmp_path_factory.mktemp("one")

    @functools.cache
    def run(*names, arm="fedgin"):
        out = root / "-".join([arm, *names]) / "out"
        folders = []
        for m in ("mri", "ct"):
            own = [str(sites / name) for name in names if MODALITY[name] == m]
            folders += [f"--{m}", *own] if own else []
        args = [*TINY, "--scenario", "complete", "--arms", arm, "--out", str(out)]
        assert fedgin.main([*args, *folders]) == 0
        return out

    return run


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory, sites):
    launcher = Launcher(tmp_path_factory.mktemp("three"), sites)
    ranks = launcher(names=MODALITY)
    assert [rank.end() for rank in ranks] == [0, 0, 0], [rank.error for rank in ranks]
    yield ranks
    launcher.end()


def weights(out):
    return torch.load(out / TRAINING.folder / "model.pt", weights_only=True)["weights"]


def checkpoint(out):
    return out / TRAINING.folder / "checkpoint.pt"


def rows(file):
    with file.open(newline="") as content:
        return list(csv.DictReader(content))


def assert_close(found, expected):
    """Within 1e-6 of each tensor's largest weight."""
    assert found.keys() == expected.keys()
    for key, w in expected.items():
        assert (found[key] - w).abs().max() <= 1e-6 * w.abs().max(), key


def tables(out):
    return (out / "results.md").read_text()


def wait_for(path, rank):
    while not path.exists():
        assert rank.process.poll() is None, rank.error
        time.sleep(0.01)


def wait_for_text(text, file, rank):
    while text not in file.read_text():
        assert rank.process.poll() is None, rank.error
        time.sleep(0.01)


# --------------------------------------------------------------------------- what ranks do together


@pytest.mark.slow
def test_ranks_give_the_weights_and_tables_of_one_process(three_ranks, one_process):
    expected = one_process(*MODALITY)
    for rank in three_ranks:
        assert_close(weights(rank.out), weights(expected))
        assert tables(rank.out) == tables(expected)
    a, b, c = (weights(rank.out) for rank in three_ranks)
    assert all(torch.equal(a[key], b[key]) and torch.equal(a[key], c[key]) for key in a)


def history(out, training=TRAINING):
    return rows(out / training.folder / "history.csv")


@pytest.mark.slow
def test_the_history_has_everybodys_dice_and_a_ranks_own_loss(three_ranks, one_process):
    """In round 1 a hospital's loss is that of an arm in which it trains alone."""
    found, expected = (history(f) for f in (three_ranks[0].out, one_process(*MODALITY)))
    assert [row["round"] for row in found] == ["1", "2", "3"]
    for row, expected_row in zip(found, expected, strict=True):
        for key in ("val_dice_mri", "val_dice_ct"):
            assert float(row[key]) == pytest.approx(float(expected_row[key]), abs=1e-6)
    by_itself = one_process("north", arm="mri-only+gin")
    [first, *_] = history(by_itself, Training(42, "mri-only+gin", p=1.0))
    assert float(found[0]["loss"]) == pytest.approx(float(first["loss"]), rel=1e-6)
    assert float(found[0]["loss"]) != pytest.approx(float(expected[0]["loss"]), rel=1e-4)


@pytest.mark.slow
def test_each_rank_keeps_what_is_its_own(three_ranks, sites):
    own_files = ["training.json", "model.pt", "history.csv", "scores.csv", "lock"]
    names = [f"{TRAINING.folder}/{file}" for file in own_files]
    names += ["config.json", "lock", "results.md", "history.csv", "scores.csv"]
    ids = {"north": "case_", "south": "s0", "west": "s0"}
    for rank, name in zip(three_ranks, ids, strict=True):
        found = {str(p.relative_to(rank.out)) for p in rank.out.rglob("*") if p.is_file()}
        assert found == {*names, f"hospitals/{name}-seed42.json"}
        scores = rows(rank.out / "scores.csv")
        assert scores == rows(rank.out / TRAINING.folder / "scores.csv")
        assert [row["hospital"] for row in scores[:: len(ORGANS)]] == list(MODALITY)
        assert [row["organ"] for row in scores] == [*ORGANS] * 3
        for row in scores:
            own = row["hospital"] == name
            assert row["case"].startswith(ids[name]) if own else row["case"] == "case 0"
            assert row["modality"] == MODALITY[row["hospital"]]
        about = json.loads((rank.out / TRAINING.folder / "training.json").read_text())
        assert about["cases"] == {"north": 2, "south": 2, "west": 3}
        text = "".join(p.read_text() for p in rank.out.rglob("*") if p.suffix in (".json", ".csv"))
        for other in MODALITY.keys() - {name}:
            assert str(sites / other) not in text
        assert ids[name] in text
        foreign = "s00" if name == "north" else "case_"
        assert foreign not in text  # which the others' cases are called


@pytest.mark.slow
def test_a_rank_may_be_slow(start, one_process):
    """Slower than the others by most of the timeout, again and again, in all that it does."""
    slow = "before(hospitals, 'load_hospitals', wait(4))\nbefore(fedgin, 'validate', wait(4))"
    also = "before(federated, 'train_locally', wait(4))\nbefore(fedgin, 'run_test', wait(4))"
    ranks = start("--timeout", 6, patches={"west": slow, "north": also})
    assert [rank.end() for rank in ranks] == [0, 0], [rank.error for rank in ranks]
    for rank in (0, 1):
        names = [f"rank {r} ({name})" for r, name in enumerate(["north", "west"])]
        lines = ranks[rank].error.splitlines()
        assert lines.count(f"{names[rank]} waits for {names[1 - rank]}") >= 2, lines
    for rank in ranks:
        assert_close(weights(rank.out), weights(one_process("north", "west")))


# ---------------------------------------------------------------------------------- ranks that fail


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(start, one_process):
    patch = "before(federated, 'train_locally', die, call=2)"
    ranks = start("--timeout", 30, patches={"west": patch})
    began = time.monotonic()
    assert [rank.end() for rank in ranks] == [1, 1]
    assert time.monotonic() - began < 25  # it is noticed at once
    saved = torch.load(checkpoint(ranks[0].out), weights_only=True)
    assert saved["round"] == 1
    assert ranks[0].failure().endswith("; the same commands go on")
    told = ranks[0].failure()
    again = start()
    assert [rank.end() for rank in again] == [0, 0], [rank.error for rank in again]
    for rank in again:
        assert_close(weights(rank.out), weights(one_process("north", "west")))
    assert "the run failed: rank 1 (west) was killed" in told


@pytest.mark.slow
@pytest.mark.thorough
def test_torchrun_goes_on_after_a_rank_was_killed(start, one_process):
    patch = "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
    patch += "    before(federated, 'train_locally', die, call=3)"
    ranks = start(patches={"north": patch}, options=["--max-restarts", 1])
    assert [rank.end() for rank in ranks] == [0, 0], [rank.error for rank in ranks]
    assert any("the run failed" in rank.error for rank in ranks)
    for rank in ranks:
        assert_close(weights(rank.out), weights(one_process("north", "west")))
        scores = rows(rank.out / "scores.csv")
        assert [row["hospital"] for row in scores[:: len(ORGANS)]] == ["north", "west"]
        assert len(scores) == 2 * len(ORGANS)
    assert [row["round"] for row in history(ranks[0].out)] == ["1", "2", "3"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("north", marks=pytest.mark.thorough), "west"])
def test_a_rank_that_hangs_ends_the_run_in_time(name, start, one_process):
    names = ["north", "west"]
    hanging = names.index(name)
    patches = {name: "before(federated, 'train_locally', hang, call=2)"}
    ranks = start("--timeout", 4, patches=patches)
    wait_for(checkpoint(ranks[0].out), ranks[0])
    began = time.monotonic()
    other = ranks[1 - hanging]
    while ": the run failed: " not in other.error:
        assert time.monotonic() - began < 4 + 8, other.error
        time.sleep(0.1)
    assert f"rank {hanging}" in other.failure().lower()
    [worker] = descendants(ranks[hanging].process.pid)
    os.kill(worker, signal.SIGKILL)
    assert [rank.end() for rank in ranks] == [1, 1]
    again = start()
    assert [rank.end() for rank in again] == [0, 0], [rank.error for rank in again]
    assert_close(weights(again[0].out), weights(one_process("north", "west")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("north", 8),
        pytest.param("north", 0, marks=pytest.mark.thorough),
        pytest.param("west", 0, marks=pytest.mark.thorough),
    ],
)
def test_a_bad_case_ends_all_ranks_with_its_reason(name, seconds, start, tmp_path, sites):
    """Also those that still read their own scans, and longer than the bad one's rank lives."""
    files = {"north": "imagesTr/case_001_0000.nii.gz", "west": "s0001/ct.nii.gz"}
    [other] = files.keys() - {name}
    shutil.copytree(sites / name, tmp_path / name / name)
    truncate(tmp_path / name / name / files[name])
    ranks = start(patches={other: f"before(hospitals, 'load_hospitals', wait({seconds}))"})
    assert [rank.end() for rank in ranks] == [1, 1]
    for rank in ranks:
        assert f"{files[name]}: cannot be read" in rank.error
        assert not rank.out.exists()
        reason = f"rank {['north', 'west'].index(name)} ({name}): {name}/{files[name]}: cannot be"
        assert rank.root_cause().startswith(reason)
    assert reason in {rank.folder.name: rank for rank in ranks}[other].failure()


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["north", "west"])
def test_a_fault_in_a_round_is_told_to_those_that_still_train(name, start):
    [other] = {"north", "west"} - {name}
    slow = "before(federated, 'train_locally', wait(8), call=2)"
    patches = {name: "before(federated, 'train_locally', lose_disk, call=2)", other: slow}
    ranks = start(patches=patches)
    assert [rank.end() for rank in ranks] == [1, 1]
    by_name = {rank.folder.name: rank for rank in ranks}
    assert f": round 2, hospital {name}: the disk is gone" in by_name[name].failure()
    reason = f"rank {['north', 'west'].index(name)} ({name}): the disk is gone"
    assert f"): the run failed: {reason}" in by_name[other].failure()  # without other's round
    assert [rank.root_cause() for rank in ranks] == [reason, reason]


@pytest.mark.slow
def test_a_bug_keeps_its_traceback_and_is_told_to_the_others(start):
    ranks = start(patches={"west": "before(federated, 'train_locally', stumble)"})
    assert [rank.end() for rank in ranks] == [1, 1]
    for part in ("Traceback", "AttributeError: no such layer", "round 1, hospital west"):
        assert part in ranks[1].own_error()
        assert part in ranks[1].root_cause()
    assert "the run failed" not in ranks[1].own_error()
    assert "rank 1 (west): no such layer" in ranks[0].failure()
    assert ranks[0].root_cause() == "rank 1 (west): no such layer"


@pytest.mark.slow
@pytest.mark.thorough
def test_a_scan_that_cannot_be_read_in_the_test_is_told_to_the_others(start):
    ranks = start(patches={"west": "before(fedgin, 'run_test', refuse)"})
    assert [rank.end() for rank in ranks] == [1, 1]
    reason = "west/s0004: cannot be read; fetch it again"
    assert f"\nmultisite (rank 1, west): {reason}\n" in ranks[1].error
    assert [rank.root_cause() for rank in ranks] == [f"rank 1 (west): {reason}"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags", "reason"),
    [
        ("west", ["--rate", 1], "unrecognized arguments: --rate 1"),
        pytest.param(
            "north",
            ["--name", "../x"],
            "'../x' is no name for a hospital's files; give another --name",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_a_wrong_flag_is_told_to_the_others(name, flags, reason, start):
    ranks = start("--timeout", 40, own={name: flags})
    [wrong] = [rank for rank in ranks if rank.folder.name == name]
    wait_for_text(reason, wrong.folder / "stderr", wrong)
    began = time.monotonic()
    assert [rank.end() for rank in ranks] == [1, 1]
    assert time.monotonic() - began < 30
    reason = f"rank {['north', 'west'].index(name)}: {reason}"
    assert [rank.root_cause() for rank in ranks] == [reason, reason]
    assert not any(rank.out.exists() for rank in ranks)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["north", "west"])
def test_a_rank_that_is_stopped_stops_the_others(name, start):
    ranks = start("--rounds", 1000)
    wait_for(checkpoint(ranks[0].out), ranks[0])
    stopped = ["north", "west"].index(name)
    ranks[stopped].process.send_signal(signal.SIGINT)
    assert [rank.end() for rank in ranks] == [1, 1]
    title = f"multisite (rank {stopped}, {name})"
    assert f"{title}: stopped; the same commands go on\n" in ranks[stopped].error
    assert f"rank {stopped} ({name}): was stopped" in ranks[1 - stopped].failure()


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["north", "west"])
def test_a_folder_of_something_else_is_told_to_the_others(name, start, tmp_path):
    (tmp_path / name / "out").mkdir(parents=True)
    (tmp_path / name / "out" / "config.json").write_text("{}")
    ranks = start("--timeout", 20)
    for rank in ranks:
        wait_for_text("FedGIN on scans", rank.folder / "stdout", rank)
    began = time.monotonic()
    assert [rank.end() for rank in ranks] == [1, 1]
    for rank in ranks:
        assert "out/config.json: no run's; choose another --out" in rank.root_cause()
    assert time.monotonic() - began < 15


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["north", "west"])
def test_a_network_device_that_is_not_there_is_told_to_the_others(name, start):
    patch = "os.environ['GLOO_SOCKET_IFNAME'] = 'nonsense9'"
    ranks = start("--timeout", 20, patches={name: patch})
    for rank in ranks:
        wait_for_text("FedGIN on scans", rank.folder / "stdout", rank)
    began = time.monotonic()
    assert [rank.end() for rank in ranks] == [1, 1]
    for rank in ranks:
        assert "nonsense9" in rank.failure()
        assert "Traceback" not in rank.own_error()
    assert time.monotonic() - began < 15


@pytest.mark.slow
@pytest.mark.thorough
def test_other_settings_are_named_by_all(start, tmp_path):
    ranks = start(own={"west": ["--lr", 0.1, "--seed", 7, "--no-cache"]})
    assert [rank.end() for rank in ranks] == [1, 1]
    for rank in ranks:
        assert "ranks 0 and 1 were started with different seeds, lr" in rank.error
        assert not rank.out.exists()


def contents(out):
    """The files of a training by name, and what is in them."""
    return {p.name: p.read_bytes() for p in (out / TRAINING.folder).iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["north", pytest.param("west", marks=pytest.mark.thorough)])
def test_a_rank_that_dies_at_the_end_has_its_results_when_it_goes_on(name, start, one_process):
    """Killed when the others have written theirs; nobody loses a case, nobody counts one twice."""
    patch = "before(TrainingFolder, 'finish', lambda: (time.sleep(1), die()))"
    ranks = start("--timeout", 5, patches={name: patch})
    for rank in ranks:
        rank.end()
    [finished] = [rank for rank in ranks if rank.folder.name != name]
    kept = contents(finished.out)
    assert "scores.csv" in kept
    again = start()
    assert [rank.end() for rank in again] == [0, 0], [rank.error for rank in again]
    expected = one_process("north", "west")
    for rank in again:
        assert_close(weights(rank.out), weights(expected))
        assert tables(rank.out) == tables(expected)
        scores = rows(rank.out / "scores.csv")
        assert [row["hospital"] for row in scores[:: len(ORGANS)]] == ["north", "west"]
        assert [row["round"] for row in history(rank.out)] == ["1", "2", "3"]
    assert contents(finished.out) == kept


@pytest.mark.slow
@pytest.mark.parametrize("name", ["north", pytest.param("west", marks=pytest.mark.thorough)])
def test_a_rank_that_lost_its_folder_goes_on_with_the_others(name, start, one_process):
    """In the last of three rounds, with no round in any history twice."""
    ranks = start("--timeout", 30, patches={"west": "before(federated, 'train_locally', die, 3)"})
    assert [rank.end() for rank in ranks] == [1, 1]
    [lost] = [rank.out for rank in ranks if rank.folder.name == name]
    shutil.rmtree(lost)
    again = start()
    assert [rank.end() for rank in again] == [0, 0], [rank.error for rank in again]
    expected = one_process("north", "west")
    for rank in again:
        assert_close(weights(rank.out), weights(expected))
        assert tables(rank.out) == tables(expected)
        rounds = ["3"] if rank.out == lost else ["1", "2", "3"]
        assert [row["round"] for row in history(rank.out)] == rounds


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["north", "west"])
def test_a_rank_that_lost_a_finished_training_gets_it_from_the_others(name, start, one_process):
    ranks = start()
    assert [rank.end() for rank in ranks] == [0, 0], [rank.error for rank in ranks]
    [lost] = [rank.out for rank in ranks if rank.folder.name == name]
    [other] = [rank.out for rank in ranks if rank.folder.name != name]
    kept = contents(other)
    shutil.rmtree(lost)
    again = start()
    assert [rank.end() for rank in again] == [0, 0], [rank.error for rank in again]
    assert contents(other) == kept
    assert all(torch.equal(w, weights(other)[key]) for key, w in weights(lost).items())
    assert tables(lost) == tables(other) == tables(one_process("north", "west"))
    assert history(lost) == []
    (other / TRAINING.folder / "model.pt").unlink()
    shutil.rmtree(lost)
    ranks = start()
    assert [rank.end() for rank in ranks] == [1, 1]
    for rank in ranks:
        assert "its model is gone; delete the folder to train anew" in rank.root_cause()


@pytest.fixture
def two_networks():
    """Two network namespaces joined by a cable: how to run in each, and how to cut it."""
    a, b = names = [f"fedgin{os.getpid() % 10**7}{side}" for side in "ab"]
    setup = [f"netns add {name}" for name in names]
    setup += [f"link add {a} netns {a} type veth peer name {b} netns {b}"]
    for i, name in enumerate(names):
        setup += [f"-n {name} addr add 10.77.0.{i + 1}/24 dev {name}"]
        setup += [f"-n {name} link set {device} up" for device in (name, "lo")]
    if not shutil.which("ip"):
        pytest.skip("network namespaces need iproute2's ip")
    try:
        for line in setup:
            done = subprocess.run(["ip", *line.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: ip {line}: {done.stderr.strip()}")
        inside = [(["ip", "netns", "exec", n], {"GLOO_SOCKET_IFNAME": n}) for n in names]
        cut = ["ip", "-n", b, "link", "set", b, "down"]
        yield inside, lambda: subprocess.run(cut, check=True)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_cut_link_in_a_round_ends_both_ranks_within_the_timeout(two_networks, start):
    inside, cut = two_networks
    ranks = start("--timeout", 4, "--rounds", 1000, inside=inside)
    wait_for(checkpoint(ranks[0].out), ranks[0])  # round 2 has begun
    cut()
    assert [rank.end(4 + 16) for rank in ranks] == [1, 1]  # torchrun takes its time to leave
    assert "rank 1" in ranks[0].failure().lower()
    assert "rank 0" in ranks[1].failure().lower()
    saved = torch.load(checkpoint(ranks[0].out), weights_only=True)
    assert saved["round"] >= 1


@pytest.mark.slow
@pytest.mark.thorough
def test_a_cut_link_in_preparation_ends_both_ranks_within_the_timeout(two_networks, start):
    inside, cut = two_networks
    patch = "before(hospitals, 'load_hospitals', lambda: (print('at work'), time.sleep(6)))"
    ranks = start("--timeout", 4, inside=inside, patches={"north": patch})
    while "waits for rank 0" not in ranks[1].error:
        assert ranks[1].process.poll() is None, ranks[1].error
        time.sleep(0.01)
    cut()
    assert [rank.end(6 + 4 + 16) for rank in ranks] == [1, 1]
    assert "rank 1" in ranks[0].failure().lower()
    assert "rank 0" in ranks[1].failure().lower()


# ------------------------------------------------------------------------ the parts, in one process


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", "name this hospital's folder, and no other, with --mri or --ct"),
        ("--mri a --ct b", "name this hospital's folder, and no other"),
        ("--mri a b", "name this hospital's folder, and no other"),
        ("--mri a", "must be started by torchrun; see docs/several-machines.md"),
        ("--mri a --seeds 1", "unrecognized arguments: --seeds 1"),
        ("--mri a --sites 2", "unrecognized arguments: --sites 2"),
        ("--mri a --scenario limited", "unrecognized arguments: --scenario limited"),
        ("--mri a --arm centralized", "argument --arm: invalid choice: 'centralized'"),
    ],
)
def test_bad_flags_take_one_line_and_exit_code_2(args, message, capsys):
    with pytest.raises(SystemExit) as end:
        multisite.main(args.split())
    assert end.value.code == 2
    usage, error = capsys.readouterr().err.strip().splitlines()
    assert usage.startswith("usage: torchrun ")
    assert usage.endswith("[options]")
    assert f"error: {message}" in error


def test_help_begins_with_the_lines_to_paste(capsys):
    with pytest.raises(SystemExit) as end:
        multisite.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: torchrun --nnodes 2 ")
    [first, second] = re.findall(r"^    (torchrun .*(?:\n        .*)?)$", text, re.MULTILINE)
    for line, side in ((first, "--mri DIR"), (second, "--ct DIR")):
        assert f"-m scripts.multisite --arm fedgin {side}" in line


NO_NAMES = ["", ".", "..", ".hidden", "../x", "/x", "a/b", "a/", "a\\b", "a\nb", "a\0b", "x" * 101]


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_could_be_no_file_is_refused(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(multisite, "run", lambda *_: pytest.fail("went on"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        multisite.main(["--mri", "a", f"--name={name}"])
    assert end.value.code == 2
    expected = f"error: {name!r} is no name for a hospital's files; give another --name\n"
    assert capsys.readouterr().err.endswith(expected)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_name_could_be_no_file_needs_another(capsys):
    with pytest.raises(SystemExit) as end:
        multisite.main(["--mri", "/"])
    assert end.value.code == 2
    assert "error: '' is no name for a hospital's files" in capsys.readouterr().err


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf"])
def test_a_timeout_must_be_a_positive_number(timeout, capsys, monkeypatch):
    monkeypatch.setattr(multisite, "run", lambda *_: pytest.fail("went on"))
    with pytest.raises(SystemExit) as end:
        multisite.main(["--mri", "a", f"--timeout={timeout}"])
    assert end.value.code == 2
    assert "--timeout must be a positive number" in capsys.readouterr().err


def test_a_rank_is_named_by_its_folder(monkeypatch, tmp_path):
    called = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(multisite, "run", lambda *args: called.append(args))
    assert multisite.main(["--ct", f"{tmp_path}/west/", "--arm", "fl", "--seed", "7"]) == 0
    assert multisite.main(["--mri", "b", "--name", "north", "--timeout", "9", "--out", "c"]) == 0
    [(first, *named), (second, *also_named)] = called
    assert named == ["west", 1800.0]
    assert (first.scenario, first.arms, first.seeds) == ("complete", ("fl",), (7,))
    assert (first.ct, first.mri, first.out) == ((f"{tmp_path}/west/",), (), "runs/fl-west")
    assert (first.rounds, first.patch) == (100, 96)  # the defaults for scans
    assert also_named == ["north", 9.0]
    assert (second.arms, second.seeds, second.out) == (("fedgin",), (42,), "c")


def some_weights(n):
    config = Config(width=2, depth=2)
    return [fedgin.make_model(config, seed).state_dict() for seed in range(n)]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key, w in a.items():
        assert torch.equal(w, b[key]), key


@pytest.mark.parametrize("furthest", [0, 1, 2])
def test_the_rank_that_came_furthest_tells_all_where_the_training_stands(furthest):
    last, best, other, *own = some_weights(6)
    reached = Checkpoint(3, last, Best(0.5, 1, best), history=("row 1", "row 2", "row 3"))
    behind = Checkpoint(1, other, Best(0.9, 1, other), history=("row 1",))
    starts = [Checkpoint(), behind, behind]
    starts[furthest] = reached

    def hear(peers):
        return multisite.share_checkpoint(starts[peers.rank], own[peers.rank], peers)

    for rank, found in enumerate(together(3, hear)):
        assert (found.round, found.best.round, found.best.val_dice) == (3, 1, 0.5)
        assert found.history == starts[rank].history
        assert_equal(found.weights, last)
        assert_equal(found.best.weights, best)


def test_a_new_training_starts_from_rank_0s_weights():
    own = some_weights(2)

    def hear(peers):
        return multisite.share_checkpoint(Checkpoint(), own[peers.rank], peers)

    for found in together(2, hear):
        assert (found.round, found.best.round, found.history) == (0, 0, ())
        assert found.best.val_dice == -math.inf
        assert_equal(found.weights, own[0])


SMALL = Config(
    scenario="complete",
    arms=("fedgin",),
    rounds=3,
    local_steps=1,
    width=2,
    depth=2,
    val_every=2,
    gin_probability=(1.0,),
)


@pytest.fixture(scope="module")
def phantoms():
    """An MRI and a CT hospital, with 2 and 3 training cases."""
    by_seed, _ = load_hospitals(SMALL)
    mri, ct, _ = by_seed[42]
    return [
        mri._replace(train=mri.train[:2], val=mri.val[:1]),
        ct._replace(train=ct.train[:3], val=ct.val[:2]),
    ]


def train_apart(everyone, starts=None):
    """The checkpoints of all rounds by rank, of which each has one hospital."""
    clients = [fedgin.make_clients(SMALL, TRAINING, [hospital]) for hospital in everyone]
    held_out = [validation_cases(42, [hospital], ("mri", "ct")) for hospital in everyone]
    # Threads that draw their initial weights at a time would disturb one another.
    new = Checkpoint(weights=fedgin.make_model(SMALL, 42).state_dict())

    def train(peers):
        own, cases = clients[peers.rank], held_out[peers.rank]
        start = starts[peers.rank] if starts else new
        return list(multisite.train(SMALL, TRAINING, own, cases, CPU, start, peers))

    return together(len(everyone), train)


def test_rounds_of_ranks_are_those_of_one_process(phantoms):
    clients = fedgin.make_clients(SMALL, TRAINING, phantoms)
    held_out = validation_cases(42, phantoms, ("mri", "ct"))
    expected = list(fedgin.train_arm(SMALL, TRAINING, clients, held_out))
    apart = train_apart(phantoms)
    for name, found in zip(clients, apart, strict=True):
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours.round, ours.best.round) == (theirs.round, theirs.best.round)
            assert_close(ours.weights, theirs.weights)
            assert_close(ours.best.weights or {}, theirs.best.weights or {})
        for done, row in zip(found[-1].history, expected[-1].history, strict=True):
            assert done.round == row.round
            assert done.losses == pytest.approx({name: row.losses[name]}, rel=1e-6)
            assert done.val_dice == pytest.approx(row.val_dice, abs=1e-6)
    assert [sorted(done.val_dice) for done in apart[0][-1].history] == [
        [],
        ["ct", "mri"],
        ["ct", "mri"],
    ]


def test_ranks_go_on_from_a_round_as_if_they_had_never_stopped(phantoms):
    at_once = train_apart(phantoms)
    stopped = train_apart(phantoms, starts=[found[0] for found in at_once])
    for a, b in zip(at_once, stopped, strict=True):
        assert [c.round for c in b] == [2, 3]
        assert_equal(a[-1].weights, b[-1].weights)
        assert [done.round for done in b[-1].history] == [1, 2, 3]


@pytest.mark.parametrize(("loss", "explodes"), [(27.9, False), (28.0, True)])
def test_a_loss_that_explodes_ends_a_rank_before_its_weights_are_sent(
    loss, explodes, phantoms, monkeypatch
):
    """Ten times that of chance, ln 6 + 1 = 2.79 with five organs."""
    monkeypatch.setattr(multisite, "train_locally", lambda *_, **__: loss)
    told = {}
    clients = fedgin.make_clients(SMALL, TRAINING, phantoms[:1])
    trained = multisite.train(SMALL, TRAINING, clients, [], CPU, Checkpoint(), alone(told))
    if explodes:
        with pytest.raises(FloatingPointError, match="exploded; a lower --lr may help") as error:
            next(trained)
        assert error.value.__notes__ == ["round 1, hospital mri"]
        assert told == {}
    else:
        assert next(trained).round == 1


@pytest.fixture
def run_folder(tmp_path):
    folder = RunFolder(Config(scenario="complete", out=str(tmp_path / "out")), list(fedgin.ARMS))
    folder.open([])
    return folder


def test_a_rank_holds_its_training_while_it_works(run_folder):
    with multisite.hold(run_folder, TRAINING, {"north": 2, "west": 3}, CPU) as folder:
        assert files.holder(folder.path / "lock")
        assert folder.about["cases"] == {"north": 2, "west": 3}
        with (
            pytest.raises(DataError, match="fedgin-p1-seed42: another process is at work on it"),
            multisite.hold(run_folder, TRAINING, {"north": 2, "west": 3}, CPU),
        ):
            pytest.fail("held twice")
    assert not files.holder(folder.path / "lock")


@pytest.mark.parametrize("others", [{"north": 2}, {"north": 2, "east": 3}, {"north": 2, "west": 4}])
def test_a_training_does_not_go_on_at_other_hospitals(others, run_folder):
    with multisite.hold(run_folder, TRAINING, {"north": 2, "west": 3}, CPU):
        pass
    with multisite.hold(run_folder, TRAINING, {"west": 3, "north": 2}, CPU):
        pass
    with (
        pytest.raises(DataError, match="'north': 2} cases, now .*; choose another --out"),
        multisite.hold(run_folder, TRAINING, others, CPU),
    ):
        pytest.fail("went on")


@pytest.mark.parametrize("everybodys", [None, []])
def test_a_training_without_a_test_case_finishes(everybodys, run_folder):
    with multisite.hold(run_folder, TRAINING, {"north": 2}, CPU) as folder:
        folder.finish(Checkpoint(), everybodys)
    assert folder.is_finished()
    assert folder.scores() == []


def test_case_ids_stay_at_their_rank():
    ids = [["s7", "s8"], ["amos_1"]]

    def share(peers):
        scores = [
            {"hospital": f"h{peers.rank}", "case": id_, "organ": organ, "dice": n}
            for n, id_ in enumerate(ids[peers.rank])
            for organ in ("liver", "spleen")
        ]
        return multisite.share_scores(scores, 2, peers)

    first, second = together(2, share)
    assert [score["case"] for score in first[::2]] == ["s7", "s8", "case 0"]
    assert [score["case"] for score in second[::2]] == ["case 0", "case 1", "amos_1"]
    for found in (first, second):
        assert [score["case"] for score in found[::2]] == [score["case"] for score in found[1::2]]
        assert [score["organ"] for score in found] == ["liver", "spleen"] * 3
        assert [score["hospital"] for score in found[::2]] == ["h0", "h0", "h1"]
        assert [score["dice"] for score in found[::2]] == [0, 1, 0]
    told = {}
    multisite.share_scores([{"case": "s7", "organ": "liver", "dice": 0.5}], 1, alone(told))
    assert "liver" in str(told)
    assert "s7" not in str(told)


def hospital(name, modality, labelled=(True,) * 5, cases=1):
    labels = np.zeros((2, 2, 2), np.uint8)
    known = np.array([True, *labelled])
    volume = data.make_volume("x", modality, labels.astype(np.float32), labels, known)
    case = PreparedCase(volume, lambda: (labels, (1.0,) * 3), files=[])
    return Hospital(name, modality, [case] * cases, [], [])


def check_alike(*configs, names=("north", "west")):
    def check(peers):
        multisite.check_alike(configs[peers.rank], names[peers.rank], peers)
        return peers.labels

    return together(len(configs), check)


def check_cases(configs, *hospitals):
    """hospitals: of each rank, its own first and then those that it only tests on."""

    def check(peers):
        return multisite.check_cases(configs[peers.rank], hospitals[peers.rank], peers)

    return together(len(configs), check)


MRI, CT = hospital("north", "mri"), hospital("west", "ct")


def test_ranks_that_agree_may_differ_in_what_is_their_own():
    a = Config(mri=("north",), out="a/out", arms=("fedgin",))
    own = {"out": "b/out", "cache": "c", "no_cache": True}
    own |= {"test": ("held_out",), "layout": "amos", "skip_bad": True}
    b = Config(ct=("west",), arms=("fedgin",), **own)
    assert check_alike(a, b) == [["rank 0 (north)", "rank 1 (west)"]] * 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lr": 0.5}, "ranks 0 and 1 were started with different lr"),
        ({"seeds": (7,), "rounds": 9}, "ranks 0 and 1 were started with different seeds, rounds"),
        ({"arms": ("fl",)}, "ranks 0 and 1 were started with different arms"),
        ({"partial_labels": True}, "ranks 0 and 1 were started with different partial_labels"),
        ({"organs": ORGANS[::-1]}, "ranks 0 and 1 were started with different organs"),
        ({"spacing": 3.0}, "ranks 0 and 1 were started with different spacing"),
    ],
)
def test_settings_that_differ_are_named(more, message):
    a = Config(mri=("north",), arms=("fedgin",))
    b = Config(**{"ct": ("west",), "arms": ("fedgin",), **more})
    with pytest.raises(DataError, match=message):
        check_alike(a, b)


def test_two_hospitals_of_one_name_are_refused():
    configs = [Config(mri=("north",)), Config(ct=("north",))]
    with pytest.raises(DataError, match="hospitals north, north: two have one name; .* --name"):
        check_alike(*configs, names=["north", "north"])


def test_organs_that_are_not_labelled_are_refused():
    configs = [Config(mri=("north",)), Config(ct=("west",))]
    few = hospital("west", "ct", labelled=(True, True, False, False, False))
    with pytest.raises(DataError, match=r"west: liver, kidneys\); use --organs liver kidneys or"):
        check_cases(configs, [MRI], [few])
    partial = [Config(mri=("north",), partial_labels=True), Config(ct=("w",), partial_labels=True)]
    assert check_cases(partial, [MRI], [few]) == [{"north": 1, "west": 1}] * 2
    fewer = hospital("north", "mri", labelled=(False, True, True, True, False))
    with pytest.raises(DataError, match="not one folder labels .*gallbladder"):
        check_cases(partial, [fewer], [few])


def test_a_rank_without_training_cases_is_refused():
    with pytest.raises(DataError, match="north has no training case"):
        check_cases([Config(mri=("north",))], [MRI._replace(train=[])])


def test_a_hospital_and_its_test_folder_have_two_names():
    configs = [Config(mri=("north",), test=("held_out",))]
    check_cases(configs, [MRI, hospital("held_out", "")])
    with pytest.raises(DataError, match="north: so is a --test folder called too; .* --name"):
        check_cases(configs, [MRI, hospital("north", "")])
