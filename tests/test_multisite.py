"""Ranks started by torchrun, a hospital each: the weights of one process, and how failures end."""

import csv
import functools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import truncate, write_nnunet, write_totalsegmentator
from torch import distributed

import data
import fedgin
import multisite
from config import Config
from datasets import ORGANS, DataError
from federated import weighted_average
from hospitals import Hospital
from multisite import PeerError, Peers

ROOT = Path(__file__).parent.parent
TINY = ["--rounds", "3", "--local-steps", "1", "--batch-size", "2", "--width", "2", "--depth", "2"]
TINY += ["--patch", "32", "--spacing", "12", "--val-every", "1", "--gin-probability", "1"]
MODALITY = {"north": "mri", "south": "mri", "west": "ct"}

# What a rank runs that is to fail: multisite.py with an action before the n-th call of a function.
WORKER = """
import os, runpy, signal, time
import fedgin, hospitals, results
from datasets import DataError

def before(owner, name, action, call=1):
    function, calls = getattr(owner, name), []
    def wrapper(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
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
runpy.run_path({script!r}, run_name="__main__")
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
        self.root, self.sites, self.ranks = root, sites, []

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
            script = ROOT / "multisite.py"
            if name in (patches or {}):
                text = WORKER.format(patch=patches[name], script=str(script))
                script = folder / "worker.py"
                script.write_text(text)
            prefix, environment = inside[n] if inside else ([], {})
            launcher = [*prefix, sys.executable, "-m", "torch.distributed.run"]
            launcher += ["--nnodes", len(names), "--node-rank", n, "--nproc-per-node", 1]
            launcher += ["--master-addr", address, "--master-port", port, *options, script]
            flags = [f"--{MODALITY[name]}", name, "--out", "out", *TINY, *args]
            flags += (own or {}).get(name, [])
            started.append(Rank(folder, [*launcher, *flags], environment))
        self.ranks += started
        return started

    def end(self):
        for rank in self.ranks:
            rank.kill()


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """Folders of three hospitals, with 2, 1 and 3 training cases."""
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
    return torch.load(out / "fedgin-p1-seed42.pt", weights_only=True)["weights"]


def assert_close(found, expected):
    """Within 1e-6 of each tensor's largest weight."""
    assert found.keys() == expected.keys()
    for key, w in expected.items():
        assert (found[key] - w).abs().max() <= 1e-6 * w.abs().max(), key


def tables(out):
    """results.md but for who trained on what, of which a rank knows itself alone."""
    return (out / "results.md").read_text().split("\n\n    ")[0]


def wait_for(path, rank):
    while not path.exists():
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


def history(out):
    with (out / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_history_has_everybodys_dice_and_a_ranks_own_loss(three_ranks, one_process):
    """In round 1 a hospital's loss is that of an arm in which it trains alone."""
    found, expected = (history(f) for f in (three_ranks[0].out, one_process(*MODALITY)))
    assert [row["round"] for row in found] == ["1", "2", "3"]
    for row, expected_row in zip(found, expected, strict=True):
        for key in ("val_dice_mri", "val_dice_ct"):
            assert float(row[key]) == pytest.approx(float(expected_row[key]), abs=1e-6)
    [alone, *_] = history(one_process("north", arm="mri-only+gin"))
    assert float(found[0]["loss"]) == pytest.approx(float(alone["loss"]), rel=1e-6)
    assert float(found[0]["loss"]) != pytest.approx(float(expected[0]["loss"]), rel=1e-4)


@pytest.mark.slow
def test_each_rank_keeps_what_is_its_own(three_ranks, sites):
    files = ["config.json", "fedgin-p1-seed42.pt", "lock", "results.json", "results.md"]
    files += ["history.csv", "scores.csv"]
    ids = {"north": "case_", "south": "s0", "west": "s0"}
    for rank, name in zip(three_ranks, ids, strict=True):
        found = {str(p.relative_to(rank.out)) for p in rank.out.rglob("*") if p.is_file()}
        assert found == {*files, f"hospitals/{name}.json"}
        for r in json.loads((rank.out / "results.json").read_text())["results"]:
            own = r["hospital"] == name
            assert r["case"].startswith(ids[name] if own else "case 0")
            assert r["modality"] == MODALITY[r["hospital"]]
        for path in rank.out.rglob("*.json"):
            for other in MODALITY.keys() - {name}:
                assert str(sites / other) not in path.read_text()
    foreign = "".join(p.read_text() for p in three_ranks[0].out.rglob("*.json"))
    assert "s00" not in foreign  # no case of the other two, which number theirs so


@pytest.mark.slow
def test_a_rank_may_be_slow(start, one_process):
    """Slower than the others by most of the timeout, again and again, in all that it does."""
    slow = "before(hospitals, 'load_hospitals', wait(4))\nbefore(fedgin, 'validate', wait(4))"
    also = "before(fedgin, 'train_locally', wait(4))\nbefore(fedgin, 'test', wait(4))"
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
    patch = "before(fedgin, 'train_locally', die, call=2)"
    ranks = start("--timeout", 30, patches={"west": patch})
    began = time.monotonic()
    assert [rank.end() for rank in ranks] == [1, 1]
    assert time.monotonic() - began < 25  # it is noticed at once
    saved = torch.load(ranks[0].out / "checkpoint.pt", weights_only=True)
    assert saved["round"] == 1
    assert "--resume goes on" in ranks[0].error
    told = ranks[0].failure()
    again = start("--resume")
    assert [rank.end() for rank in again] == [0, 0], [rank.error for rank in again]
    for rank in again:
        assert_close(weights(rank.out), weights(one_process("north", "west")))
    assert "the run failed: rank 1 (west) was killed" in told


@pytest.mark.slow
@pytest.mark.thorough
def test_torchrun_goes_on_after_a_rank_was_killed(start, one_process):
    patch = "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
    patch += "    before(fedgin, 'train_locally', die, call=3)"
    ranks = start("--resume", patches={"north": patch}, options=["--max-restarts", 1])
    assert [rank.end() for rank in ranks] == [0, 0], [rank.error for rank in ranks]
    assert any("the run failed" in rank.error for rank in ranks)
    for rank in ranks:
        assert_close(weights(rank.out), weights(one_process("north", "west")))
        found = json.loads((rank.out / "results.json").read_text())
        assert [r["hospital"] for r in found["results"]] == ["north", "west"]
        assert {r["arm"] for r in found["results"]} == {"fedgin p=1"}
    assert [row["round"] for row in history(ranks[0].out)] == ["1", "2", "3"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("north", marks=pytest.mark.thorough), "west"])
def test_a_rank_that_hangs_ends_the_run_in_time(name, start, one_process):
    names = ["north", "west"]
    hanging = names.index(name)
    patches = {name: "before(fedgin, 'train_locally', hang, call=2)"}
    ranks = start("--timeout", 4, patches=patches)
    wait_for(ranks[0].out / "checkpoint.pt", ranks[0])
    began = time.monotonic()
    other = ranks[1 - hanging]
    while ": the run failed: " not in other.error:
        assert time.monotonic() - began < 4 + 8, other.error
        time.sleep(0.1)
    assert f"rank {hanging}" in other.failure().lower()
    [worker] = descendants(ranks[hanging].process.pid)
    os.kill(worker, signal.SIGKILL)
    assert [rank.end() for rank in ranks] == [1, 1]
    again = start("--resume")
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
    slow = "before(fedgin, 'train_locally', wait(8), call=2)"
    patches = {name: "before(fedgin, 'train_locally', lose_disk, call=2)", other: slow}
    ranks = start(patches=patches)
    assert [rank.end() for rank in ranks] == [1, 1]
    by_name = {rank.folder.name: rank for rank in ranks}
    assert f": round 2, hospital {name}: the disk is gone" in by_name[name].failure()
    reason = f"rank {['north', 'west'].index(name)} ({name}): the disk is gone"
    assert f"): the run failed: {reason}" in by_name[other].failure()  # without other's round
    assert [rank.root_cause() for rank in ranks] == [reason, reason]


@pytest.mark.slow
def test_a_bug_keeps_its_traceback_and_is_told_to_the_others(start):
    ranks = start(patches={"west": "before(fedgin, 'train_locally', stumble)"})
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
    ranks = start(patches={"west": "before(fedgin, 'test', refuse)"})
    assert [rank.end() for rank in ranks] == [1, 1]
    reason = "west/s0004: cannot be read; fetch it again"
    assert f"\nmultisite.py (rank 1, west): {reason}\n" in ranks[1].error
    assert [rank.root_cause() for rank in ranks] == [f"rank 1 (west): {reason}"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("north", marks=pytest.mark.thorough), "west"])
def test_a_wrong_flag_is_told_to_the_others(name, start):
    began = time.monotonic()
    ranks = start("--timeout", 40, own={name: ["--rate", 1]})
    assert [rank.end() for rank in ranks] == [1, 1]
    assert time.monotonic() - began < 30
    reason = f"rank {['north', 'west'].index(name)}: unrecognized arguments: --rate 1"
    assert [rank.root_cause() for rank in ranks] == [reason, reason]


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["north", "west"])
def test_a_rank_that_is_stopped_stops_the_others(name, start):
    ranks = start("--rounds", 1000)
    wait_for(ranks[0].out / "checkpoint.pt", ranks[0])
    stopped = ["north", "west"].index(name)
    ranks[stopped].process.send_signal(signal.SIGINT)
    assert [rank.end() for rank in ranks] == [1, 1]
    assert f"multisite.py (rank {stopped}, {name}): stopped\n" in ranks[stopped].error
    assert "the same command with --resume goes on" in ranks[stopped].error
    assert f"rank {stopped} ({name}): was stopped" in ranks[1 - stopped].failure()


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["north", "west"])
def test_a_folder_that_holds_a_run_is_told_to_the_others(name, start, tmp_path):
    (tmp_path / name / "out").mkdir(parents=True)
    for file in ("config.json", "checkpoint.pt"):
        (tmp_path / name / "out" / file).write_text("{}")
    ranks = start("--timeout", 20)
    began = time.monotonic()
    assert [rank.end() for rank in ranks] == [1, 1]
    for rank in ranks:
        assert "holds a run; --resume continues" in rank.root_cause()
    assert time.monotonic() - began < 15


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["north", "west"])
def test_a_network_device_that_is_not_there_is_told_to_the_others(name, start):
    patch = "os.environ['GLOO_SOCKET_IFNAME'] = 'nonsense9'"
    ranks = start("--timeout", 20, patches={name: patch})
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["north", pytest.param("west", marks=pytest.mark.thorough)])
def test_a_rank_that_dies_at_the_end_has_its_results_when_it_is_resumed(name, start, one_process):
    """Killed when the others have written theirs; nobody loses a case, nobody counts one twice."""
    patch = "before(results.Run, 'finish', lambda: (time.sleep(1), die()))"
    ranks = start("--timeout", 5, patches={name: patch})
    for rank in ranks:
        rank.end()
    again = start("--resume")
    assert [rank.end() for rank in again] == [0, 0], [rank.error for rank in again]
    expected = tables(one_process("north", "west"))
    for rank in again:
        found = json.loads((rank.out / "results.json").read_text())
        assert [r["hospital"] for r in found["results"]] == ["north", "west"]
        assert found["finished"] == [[42, "fedgin p=1"]]
        assert tables(rank.out) == expected


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
    wait_for(ranks[0].out / "checkpoint.pt", ranks[0])  # round 2 has begun
    cut()
    assert [rank.end(4 + 16) for rank in ranks] == [1, 1]  # torchrun takes its time to leave
    assert "rank 1" in ranks[0].failure().lower()
    assert "rank 0" in ranks[1].failure().lower()
    saved = torch.load(ranks[0].out / "checkpoint.pt", weights_only=True)
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
    assert usage.endswith("[options]")
    assert f"error: {message}" in error


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


class Together(Peers):
    """A rank in a thread of its own, which hears the others through a dict."""

    def __init__(self, rank, told, meeting):
        self.rank, self.size, self.told, self.meeting = rank, meeting.parties, told, meeting

    def exchange(self, key, value):
        self.told[key, self.rank] = json.dumps(value)
        self.meeting.wait(10)
        return [json.loads(self.told[key, rank]) for rank in range(self.size)]

    def add_up(self, numbers):
        self.told["numbers", self.rank] = numbers
        self.meeting.wait(10)
        return sum(self.told["numbers", rank] for rank in range(self.size))


def together(size, function):
    """function(peers) of each rank; raises what the first one raised."""
    told, meeting = {}, threading.Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: function(Together(rank, told, meeting)), range(size)))


def alone(told):
    """The only rank, which leaves in `told` what others would hear of it."""
    return Together(0, told, threading.Barrier(1))


@pytest.fixture
def ranks_in_threads(monkeypatch, tmp_path):
    """A function: what each rank does with its peers → their errors, and what torchrun would say.

    All hear of one another through a store in memory.
    """

    def start(*actions, timeout=10.0):
        store, ranks = distributed.HashStore(), []
        monkeypatch.setenv("WORLD_SIZE", str(len(actions)))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(store, 0, 0)]))
        for rank in range(len(actions)):
            monkeypatch.setenv("RANK", str(rank))
            ranks.append(Peers("abc"[rank], timeout))

        def act(peers):
            try:
                return actions[peers.rank](peers)
            except Exception as error:
                peers.leave(error)
                return error

        with ThreadPoolExecutor(len(actions)) as pool:
            return list(pool.map(act, ranks))

    return start


def test_all_ranks_end_with_the_reason_of_the_first_that_failed(ranks_in_threads, capsys):
    def fail(peers):
        time.sleep(1.5)
        raise DataError("no scan")

    def listen(peers):
        try:
            return peers.exchange("settings", 1)
        except PeerError as error:
            error.add_note("round 2, hospital a")
            raise

    def fail_later(peers):
        time.sleep(4)
        raise OSError("no disk")

    first, heard, own = ranks_in_threads(fail, listen, fail_later)
    assert (type(first), type(own), str(own)) == (DataError, OSError, "no disk")
    assert (type(heard), str(heard), heard.__notes__) == (PeerError, "rank 0 (a): no scan", [])
    waits = [line for line in capsys.readouterr().err.splitlines() if " waits for " in line]
    assert sorted(waits) == [
        "rank 0 (a): no scan; rank 0 (a) waits for rank 2",
        "rank 0 (a): no scan; rank 1 (b) waits for rank 2",
        "rank 1 (b) waits for rank 0, rank 2",
    ]


def test_a_rank_that_says_nothing_is_named_and_not_waited_for_again(ranks_in_threads):
    began = time.monotonic()
    a, _, c = ranks_in_threads(
        lambda peers: peers.exchange("x", 0),
        lambda peers: None,
        lambda peers: peers.exchange("x", 2),
        timeout=2,
    )
    for error in (a, c):
        assert str(error) == "rank 1 was killed, is cut off or takes longer than --timeout 2"
    assert time.monotonic() - began < 3.5


def test_what_ranks_exchange_comes_back_by_rank(ranks_in_threads):
    values = [{"liver": 0.5}, [1, None], "ü"]
    found = ranks_in_threads(*(lambda peers: peers.exchange("x", values[peers.rank]),) * 3)
    assert found == [values] * 3


def states(n):
    generator = torch.Generator().manual_seed(n)
    return {
        "conv": torch.randn(3, 2, generator=generator),
        "norm": torch.randn(4, generator=generator).double() * 1e3,
        "scale": torch.randn((), generator=generator),
    }


def test_the_average_over_ranks_is_the_weighted_average():
    pairs = [(states(1), 8), (states(2), 1), (states(3), 40)]
    expected = weighted_average(pairs)
    for mean in together(3, lambda peers: peers.average(iter([pairs[peers.rank]]))):
        for key, w in expected.items():
            assert mean[key].dtype == w.dtype
            torch.testing.assert_close(mean[key], w, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    ("state", "n_k", "error"),
    [
        ({"w": torch.tensor([1.0, math.nan])}, 1, FloatingPointError),
        ({"w": torch.ones(2)}, 0, ValueError),
    ],
)
def test_a_rank_sends_no_weights_that_are_not_finite(state, n_k, error):
    told = {}
    with pytest.raises(error):
        alone(told).average([(state, n_k)])
    assert told == {}


def some_models(n):
    config = Config(width=2, depth=2)
    return [fedgin.make_model(config, seed, torch.device("cpu")) for seed in range(n)]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key, w in a.items():
        assert torch.equal(w, b[key]), key


def test_rank_0_tells_all_where_the_training_stands():
    last, best, *own = some_models(5)
    stopped = fedgin.new_state(1, "fedgin")
    stopped = fedgin.keep_round(stopped, best, {"mri": 1.0}, {"mri": 0.5}, 1.0)
    stopped = fedgin.keep_round(stopped, last, {"mri": 1.0}, {"mri": 0.2}, 1.0)

    def hear(peers):
        state = stopped if peers.rank == 0 else fedgin.new_state(1, "fedgin")
        return multisite.share_state(state, own[peers.rank], peers)

    for state in together(3, hear):
        assert (state["round"], state["best"]["round"]) == (2, 1)
        assert state["best"]["val_dice"] == 0.5
        assert_equal(state["weights"], last.state_dict())
        assert_equal(state["best"]["weights"], best.state_dict())


def test_a_new_training_starts_from_rank_0s_weights():
    own = some_models(2)

    def hear(peers):
        return multisite.share_state(fedgin.new_state(1, "fl"), own[peers.rank], peers)

    for state in together(2, hear):
        assert (state["round"], state["best"]["round"]) == (0, 0)
        assert state["best"]["val_dice"] == -math.inf
        assert_equal(state["weights"], own[0].state_dict())


def test_case_ids_stay_at_their_rank():
    ids = [["s7", "s8"], ["amos_1"]]

    def share(peers):
        scores = [
            {"hospital": f"h{peers.rank}", "modality": "ct", "case": id_, "scores": {"x": n}}
            for n, id_ in enumerate(ids[peers.rank])
        ]
        return multisite.share_scores(scores, peers)

    first, second = together(2, share)
    assert [score["case"] for score in first] == ["s7", "s8", "case 0"]
    assert [score["case"] for score in second] == ["case 0", "case 1", "amos_1"]
    for found in (first, second):
        assert [score["hospital"] for score in found] == ["h0", "h0", "h1"]
        assert [score["scores"] for score in found] == [{"x": 0}, {"x": 1}, {"x": 0}]
    told = {}
    multisite.share_scores([{"case": "s7", "scores": {"liver": 0.5}}], alone(told))
    assert "liver" in str(told)
    assert "s7" not in str(told)


def hospital(name, modality, labelled=(True,) * 5, cases=1):
    labels = np.zeros((2, 2, 2), np.uint8)
    known = np.array([True, *labelled])
    volume = data.make_volume("x", modality, labels.astype(np.float32), labels, known)
    return Hospital(name, modality, [volume] * cases, [], [])


def check_alike(*configs, names=("north", "west")):
    def check(peers):
        multisite.check_alike(configs[peers.rank], names[peers.rank], peers)
        return peers.labels

    return together(len(configs), check)


def check_cases(configs, *hospitals):
    """hospitals: of each rank, its own first and then those that it only tests on."""

    def check(peers):
        multisite.check_cases(configs[peers.rank], hospitals[peers.rank], peers)

    return together(len(configs), check)


MRI, CT = hospital("north", "mri"), hospital("west", "ct")


def test_ranks_that_agree_may_differ_in_what_is_their_own():
    a = Config(mri=("north",), out="a/out", arms=("fedgin",))
    own = {"out": "b/out", "cache": "c", "no_cache": True, "resume": True}
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
    check_cases(partial, [MRI], [few])
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
