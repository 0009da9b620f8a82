"""Ranks, a hospital each: the weights of one process, and how failures end."""

import csv
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from conftest import truncate, write_nnunet, write_totalsegmentator
from ranks import MODALITY, TINY, Launcher, start_server, together
from tiny import assert_equal

import data
import fedgin
from scans.cases import PreparedCase
from scans.files import DataError
from scans.organs import ORGANS
from scripts import multisite
from study.config import Checkpoint, Config, Training
from study.hospitals import Hospital, load_hospitals, validation_cases
from study.results import TrainingFolder

TRAINING = Training(42, "fedgin", p=1.0)
CPU = torch.device("cpu")
BOTH = [pytest.param("north", marks=pytest.mark.thorough), "west"]


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """Folders of three hospitals, with 2, 2 and 3 training cases."""
    root = tmp_path_factory.mktemp("sites")
    write_nnunet(root / "north", "mri", 4)
    write_totalsegmentator(root / "south", "mri", 3, seed=2)
    write_totalsegmentator(root / "west", "ct", 5)
    return root


@pytest.fixture(scope="module")
def server():
    with start_server() as process:
        yield process
        process.stdin.close()


@pytest.fixture
def start(tmp_path, sites, server):
    launcher = Launcher(server, tmp_path, sites)
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
        assert fedgin.main([*args, *folders, "--cache", str(sites / "cache")]) == 0
        return out

    return run


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory, sites, server):
    launcher = Launcher(server, tmp_path_factory.mktemp("three"), sites)
    ranks = launcher(names=MODALITY)
    assert_end(ranks, 0)
    yield ranks
    launcher.end()


def weights(out):
    return torch.load(out / TRAINING.folder / "model.pt", weights_only=True)["weights"]


def rows(file):
    with file.open(newline="") as content:
        return list(csv.DictReader(content))


def history(out, training=TRAINING):
    return rows(out / training.folder / "history.csv")


def tables(out):
    return (out / "results.md").read_text()


def assert_close(found, expected):
    """Within 1e-6 of each tensor's largest weight."""
    assert found.keys() == expected.keys()
    for key, w in expected.items():
        assert (found[key] - w).abs().max() <= 1e-6 * w.abs().max(), key


def assert_end(ranks, code):
    assert [rank.end() for rank in ranks] == [code] * len(ranks), [rank.error for rank in ranks]


def assert_finish(ranks, expected):
    """With the weights and tables of a run in one process, and each test case once."""
    assert_end(ranks, 0)
    for rank in ranks:
        assert_close(weights(rank.out), weights(expected))
        assert tables(rank.out) == tables(expected)
        hospitals = [row["hospital"] for row in rows(rank.out / "scores.csv")]
        assert hospitals == [row["hospital"] for row in rows(expected / "scores.csv")]


def wait_for(rank):
    """Until it has done what its patch says."""
    while not (rank.folder / "patched").exists():
        os.kill(rank.pid, 0)
        time.sleep(0.01)


# --------------------------------------------------------------------------- what ranks do together


@pytest.mark.slow
def test_torchrun_with_two_hospitals_gives_the_weights_of_one_process(start, one_process):
    assert_finish(start(torchrun=""), one_process("north", "west"))


@pytest.mark.slow
def test_ranks_give_the_weights_and_tables_of_one_process(three_ranks, one_process):
    assert_finish(three_ranks, one_process(*MODALITY))
    a, b, c = (weights(rank.out) for rank in three_ranks)
    assert_equal(a, b)
    assert_equal(a, c)


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
    names = ["training.json", "model.pt", "history.csv", "scores.json", "lock"]
    names = [f"{TRAINING.folder}/{name}" for name in names]
    names += ["config.json", "cases-seed42.json", "hospitals.json", "lock"]
    names += ["results.md", "history.csv", "scores.csv"]
    ids = {"north": "case_", "south": "s0", "west": "s0"}
    for rank, name in zip(three_ranks, ids, strict=True):
        found = {str(p.relative_to(rank.out)) for p in rank.out.rglob("*") if p.is_file()}
        assert found == set(names)
        scores = rows(rank.out / "scores.csv")
        assert [row["hospital"] for row in scores[:: len(ORGANS)]] == list(MODALITY)
        assert [row["organ"] for row in scores] == [*ORGANS] * 3
        for row in scores:
            own = row["hospital"] == name
            assert row["case"].startswith(ids[name]) if own else row["case"] == "case 0"
            assert row["modality"] == MODALITY[row["hospital"]]
        metadata = json.loads((rank.out / TRAINING.folder / "training.json").read_text())
        assert metadata["cases"] == {"north": 2, "south": 2, "west": 3}
        text = "".join(p.read_text() for p in rank.out.rglob("*") if p.suffix in (".json", ".csv"))
        for other in MODALITY.keys() - {name}:
            assert str(sites / other) not in text
        assert ids[name] in text
        foreign = "s00" if name == "north" else "case_"
        assert foreign not in text  # which the others' cases are called


# ---------------------------------------------------------------------------------- ranks that fail

DIE = "lambda: os.kill(os.getpid(), signal.SIGKILL)"
ROUND_2 = "before(multisite, 'train_locally', {}, call=2)"


def by_name(ranks, name):
    """The rank of this name, and the other one."""
    return sorted(ranks, key=lambda rank: rank.folder.name != name)


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_a_killed_rank_ends_the_other_at_once_and_the_run_goes_on(name, start, one_process):
    killed, other = by_name(start(patches={name: ROUND_2.format(DIE)}), name)
    began = time.monotonic()
    assert (other.end(), killed.end()) == (1, -signal.SIGKILL)
    assert time.monotonic() - began < 60  # of a timeout of 1800 s
    assert ": the run failed: another rank was stopped, is cut off or takes" in other.error
    assert other.failure().endswith("; the same commands go on")
    saved = torch.load(other.out / TRAINING.folder / "checkpoint.pt", weights_only=True)
    assert saved["round"] == 1
    assert_finish(start(), one_process("north", "west"))


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_a_rank_that_hangs_ends_the_run_in_time(name, start, one_process):
    hang = ROUND_2.format("lambda: os.kill(os.getpid(), signal.SIGSTOP)")
    hanging, other = by_name(start("--timeout", 4, patches={name: hang}), name)
    wait_for(hanging)
    began = time.monotonic()
    assert other.end() == 1
    assert time.monotonic() - began < 4 + 10
    assert "takes longer than --timeout 4 (" in other.failure()
    os.kill(hanging.pid, signal.SIGKILL)
    hanging.end()
    assert_finish(start(), one_process("north", "west"))


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_torchrun_shows_everybody_why_a_rank_failed(name, start, tmp_path, sites):
    """It is the last thing on each screen, also where scans are read for longer than on the other.

    A bad case is told before anything is written.
    """
    bad = {"north": "imagesTr/case_001_0000.nii.gz", "west": "s0001/ct.nii.gz"}
    shutil.copytree(sites / name, tmp_path / name / name)
    truncate(tmp_path / name / name / bad[name])
    [other] = bad.keys() - {name}
    slow = "before(multisite, 'load_hospitals', lambda: time.sleep(4))"
    ranks = start(torchrun="", patches={other: slow})
    assert_end(ranks, 1)
    reason = f"rank {['north', 'west'].index(name)} ({name}): {name}/{bad[name]}: cannot be read"
    for rank in ranks:
        assert not rank.out.exists()
        *_, summary = rank.error.split("Root Cause (first observed failure):")
        text, line, rest = summary.partition("\n====")
        assert text.split("traceback : ")[1].startswith(reason)
        assert line and not rest.strip("=\n"), rank.error


@pytest.mark.slow
@pytest.mark.thorough
def test_torchrun_goes_on_after_a_rank_was_killed(start, one_process):
    patch = "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n    " + ROUND_2.format(DIE)
    ranks = start(torchrun="--max-restarts 1", patches={"north": patch})
    assert_finish(ranks, one_process("north", "west"))
    assert "another rank was stopped" in ranks[1].failure()


BAD_FOLDER = "os.mkdir('out'); open('out/config.json', 'w').write('{}')"
BAD_DEVICE = "os.environ.update(GLOO_SOCKET_IFNAME='lo,nonsense9', GROUP_RANK='0')"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "patch", "flags", "code", "reason"),
    [
        ("west", ROUND_2.format("lambda: fail(OSError('no disk'))"), [], 1, "(west): no disk"),
        ("north", "before(fedgin, 'run_test', lambda: fail(DataError('x')))", [], 2, "(north): x"),
        ("west", ROUND_2.format("lambda: fail(KeyboardInterrupt)"), [], 130, "(west): was stopped"),
        ("north", BAD_FOLDER, [], 2, "(north): out/config.json: is not of a run of version 3"),
        ("west", BAD_FOLDER, [], 2, "(west): out/config.json: is not of a run of version 3"),
        ("north", BAD_DEVICE, [], 1, "(north): GLOO_SOCKET_IFNAME=lo,nonsense9: "),
        ("west", BAD_DEVICE, [], 1, "(west): GLOO_SOCKET_IFNAME=lo,nonsense9: "),
        ("north", "", ["--rate", 1], 2, "(its flags): unrecognized arguments: --rate 1"),
        ("west", "", ["--name", "../x"], 2, "(its flags): '../x' is no name for a hospital's"),
    ],
)
def test_all_ranks_end_with_the_reason_of_the_one_that_failed(
    name, patch, flags, code, reason, start
):
    failed, other = by_name(start(patches={name: patch}, own={name: flags}), name)
    assert (failed.end(), other.end()) == (code, 1)
    reason = f"rank {['north', 'west'].index(name)} {reason}"
    assert f": the run failed: {reason}" in other.failure()  # without the other's round
    assert reason.split("): ")[1] in failed.error
    for rank in (failed, other):
        assert rank.summary().startswith(reason)
        assert "Traceback" not in rank.error


@pytest.mark.slow
def test_a_bug_keeps_its_traceback_and_is_told_to_the_others(start):
    bug = "before(multisite, 'train_locally', lambda: fail(AttributeError('no such layer')))"
    north, west = start(patches={"west": bug})
    assert_end([north, west], 1)
    for part in ("Traceback", "AttributeError: no such layer", "round 1, hospital west"):
        assert part in west.error
    assert "AttributeError: no such layer" in west.summary()
    assert "the run failed" not in west.error
    assert "rank 1 (west): no such layer" in north.failure()
    assert north.summary() == "rank 1 (west): no such layer"


@pytest.mark.slow
def test_other_settings_are_named_by_all_before_a_scan_is_read(start):
    patch = "multisite.load_hospitals = lambda *_: fail(AssertionError)"
    own = {"west": ["--lr", 0.1, "--seed", 7, "--skip-bad"]}
    ranks = start(own=own, patches={"north": patch, "west": patch})
    assert_end(ranks, 2)
    for rank in ranks:
        assert "ranks 0 and 1 were started with different seeds, lr" in rank.summary()
        assert not rank.out.exists()


@pytest.fixture
def two_networks():
    """Two network namespaces joined by a cable: how to be in each, and how to cut it."""
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
        inside = [
            f"ctypes.CDLL(None).setns(os.open('/run/netns/{name}', os.O_RDONLY), 0)\n"
            f"os.environ.update(MASTER_ADDR='10.77.0.1', GLOO_SOCKET_IFNAME='{name}')\n"
            for name in names
        ]
        cut = ["ip", "-n", b, "link", "set", b, "down"]
        yield inside, lambda: subprocess.run(cut, check=True)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "during", ["train_locally", pytest.param("load_hospitals", marks=pytest.mark.thorough)]
)
def test_a_cut_link_ends_both_ranks_within_the_timeout(during, two_networks, start):
    (a, b), cut = two_networks
    at_work = f"{b}before(multisite, '{during}', lambda: time.sleep(1))"
    north, west = start("--timeout", 4, patches={"north": a, "west": at_work})
    wait_for(west)
    cut()
    began = time.monotonic()
    assert_end([north, west], 1)
    assert time.monotonic() - began < 1 + 4 + 10
    for rank in (north, west):
        assert "another rank was stopped, is cut off or takes longer" in rank.failure()


# -------------------------------------------------------------------------------- ranks that go on


def contents(out):
    """The files of a training by name, and what is in them."""
    return {p.name: p.read_bytes() for p in (out / TRAINING.folder).iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_a_rank_that_dies_at_the_end_has_its_results_when_it_goes_on(name, start, one_process):
    """Killed when the other has written its own; nobody loses a case, or counts one twice."""
    late = "lambda: (time.sleep(1), os.kill(os.getpid(), signal.SIGKILL))"
    died, finished = by_name(
        start(patches={name: f"before(TrainingFolder, 'finish', {late})"}), name
    )
    assert (died.end(), finished.end()) == (-signal.SIGKILL, 1)
    kept = contents(finished.out)
    assert "scores.json" in kept
    again = start()
    assert_finish(again, one_process("north", "west"))
    assert [len(history(rank.out)) for rank in again] == [3, 3]
    assert contents(finished.out) == kept


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_a_rank_that_lost_its_folder_goes_on_with_the_others(name, start, one_process):
    """In the last of three rounds, with no round in any history twice; or with a finished model."""
    stop = "before(multisite, 'train_locally', lambda: fail(OSError('no disk')), call=3)"
    lost, other = by_name(start(patches={"west": stop}), name)
    assert_end([lost, other], 1)
    shutil.rmtree(lost.out)
    lost, other = by_name(start(), name)
    assert_finish([lost, other], one_process("north", "west"))
    assert [row["round"] for row in history(lost.out)] == ["3"]
    assert [row["round"] for row in history(other.out)] == ["1", "2", "3"]
    kept = contents(other.out)
    shutil.rmtree(lost.out)
    lost, other = by_name(start(), name)
    assert_finish([lost, other], one_process("north", "west"))
    assert contents(other.out) == kept
    assert_equal(weights(lost.out), weights(other.out))
    assert history(lost.out) == []
    (other.out / TRAINING.folder / "model.pt").unlink()
    shutil.rmtree(lost.out)
    lost, other = by_name(start(), name)
    assert (lost.end(), other.end()) == (1, 2)
    for rank in (lost, other):
        assert "its model is gone; delete the folder to train anew" in rank.summary()


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_hospitals(start, tmp_path):
    assert_end(start("--rounds", 1), 0)
    (tmp_path / "west").rename(tmp_path / "south")
    (tmp_path / "south" / "west").rename(tmp_path / "south" / "elsewhere")
    shutil.rmtree(tmp_path / "south" / "out")
    north, south = start("--rounds", 1, names=("north", "south"))
    assert (north.end(), south.end()) == (2, 1)
    expected = (
        "out/hospitals.json: was made with west 3, now None; south None, now 2. Give the same"
    )
    assert expected in north.error
    assert f"rank 0 (north): {expected}" in south.summary()


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
        ("--mri a --timeout inf", "argument --timeout: invalid int value: 'inf'"),
        ("--mri a --timeout 0", "--timeout must be a positive number of seconds, not 0"),
        ("--mri /", "'' is no name for a hospital's files; give another --name"),
        *(
            (f"--mri a --name={name}", f"{name!r} is no name for a hospital's files")
            for name in (
                "",
                ".",
                "..",
                ".hid",
                "../x",
                "/x",
                "a/b",
                "a/",
                "a\\b",
                "a\0b",
                "x" * 101,
            )
        ),
    ],
)
def test_bad_flags_take_one_line_and_exit_code_2(args, message, capsys, monkeypatch):
    monkeypatch.setattr(multisite, "run", lambda *_: pytest.fail("went on"))
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


def test_a_rank_is_named_by_its_folder(monkeypatch, tmp_path):
    called = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(multisite, "run", lambda *args: called.append(args))
    assert multisite.main(["--ct", f"{tmp_path}/west/", "--arm", "fl", "--seed", "7"]) == 0
    assert multisite.main(["--mri", "b", "--name", "north", "--timeout", "9", "--out", "c"]) == 0
    [(first, *named), (second, *also_named)] = called
    assert named == ["west", 1800]
    assert (first.scenario, first.arms, first.seeds) == ("complete", ("fl",), (7,))
    assert (first.ct, first.mri, first.out) == ((f"{tmp_path}/west/",), (), "runs/fl-west")
    assert (first.rounds, first.patch) == (100, 96)  # the defaults for scans
    assert also_named == ["north", 9]
    assert (second.arms, second.seeds, second.out) == (("fedgin",), (42,), "c")


def some_weights(n):
    config = Config(width=2, depth=2)
    return [fedgin.make_model(config, seed).state_dict() for seed in range(n)]


@pytest.mark.parametrize("furthest", [0, 1, 2])
def test_the_rank_that_came_furthest_tells_all_where_the_training_stands(furthest):
    last, best, other, *own = some_weights(6)
    reached = Checkpoint(3, last, 1, 0.5, best, history=("row 1", "row 2", "row 3"))
    behind = Checkpoint(1, other, 1, 0.9, other, history=("row 1",))
    starts = [Checkpoint(), behind, behind]
    starts[furthest] = reached

    def hear(peers):
        return multisite.share_checkpoint(starts[peers.rank], own[peers.rank], peers)

    for rank, found in enumerate(together(3, hear)):
        assert (found.round, found.best_round, found.best_dice) == (3, 1, 0.5)
        assert found.history == starts[rank].history
        assert_equal(found.weights, last)
        assert_equal(found.best_weights, best)


def test_a_new_training_starts_from_rank_0s_weights():
    own = some_weights(2)

    def hear(peers):
        return multisite.share_checkpoint(Checkpoint(), own[peers.rank], peers)

    for found in together(2, hear):
        assert (found.round, found.best_round, found.history) == (0, 0, ())
        assert found.best_dice == -math.inf
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
FOLDER = TrainingFolder(SMALL, TRAINING)


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
        return list(multisite.train(FOLDER, own, cases, CPU, start, peers))

    return together(len(everyone), train)


def test_rounds_of_ranks_are_those_of_one_process(phantoms):
    clients = fedgin.make_clients(SMALL, TRAINING, phantoms)
    held_out = validation_cases(42, phantoms, ("mri", "ct"))
    expected = list(fedgin.train_arm(SMALL, TRAINING, clients, held_out))
    apart = train_apart(phantoms)
    for name, found in zip(clients, apart, strict=True):
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours.round, ours.best_round) == (theirs.round, theirs.best_round)
            assert_close(ours.weights, theirs.weights)
            assert_close(ours.best_weights or {}, theirs.best_weights or {})
        for done, row in zip(found[-1].history, expected[-1].history, strict=True):
            assert done.round == row.round
            assert done.losses == pytest.approx({name: row.losses[name]}, rel=1e-6)
            assert done.val_dice == pytest.approx(row.val_dice, abs=1e-6)
    validated = [sorted(done.val_dice) for done in apart[0][-1].history]
    assert validated == [[], ["ct", "mri"], ["ct", "mri"]]


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
    clients = fedgin.make_clients(SMALL, TRAINING, phantoms[:1])

    def train(peers):
        trained = multisite.train(FOLDER, clients, [], CPU, Checkpoint(), peers)
        if not explodes:
            return next(trained)
        with pytest.raises(FloatingPointError, match="exploded; a lower --lr may help") as error:
            next(trained)
        assert error.value.__notes__ == ["round 1, hospital mri"]
        assert sent == []

    sent = []
    [reached] = together(1, train, sent=sent)
    assert explodes or reached.round == 1


def test_case_ids_stay_at_their_rank():
    ids = [["s7", "s8"], ["amos_1"]]

    def share(peers):
        scores = [
            {"hospital": f"h{peers.rank}", "case": id_, "organ": organ, "dice": n}
            for n, id_ in enumerate(ids[peers.rank])
            for organ in ("liver", "spleen")
        ]
        return multisite.share_scores(scores, 2, peers)

    sent = []
    first, second = together(2, share, sent=sent)
    assert [score["case"] for score in first[::2]] == ["s7", "s8", "case 0"]
    assert [score["case"] for score in second[::2]] == ["case 0", "case 1", "amos_1"]
    for found in (first, second):
        assert [score["case"] for score in found[::2]] == [score["case"] for score in found[1::2]]
        assert [score["organ"] for score in found] == ["liver", "spleen"] * 3
        assert [score["hospital"] for score in found[::2]] == ["h0", "h0", "h1"]
        assert [score["dice"] for score in found[::2]] == [0, 1, 0]
    text = b"".join(bytes(numbers.flatten().byte().tolist()) for numbers in sent)
    assert b"liver" in text
    assert b"s7" not in text


def hospital(name, modality, labelled=(True,) * 5, cases=1):
    labels = np.zeros((2, 2, 2), np.uint8)
    known = np.array([True, *labelled])
    volume = data.make_volume("x", modality, labels.astype(np.float32), labels, known)
    case = PreparedCase(
        id="x",
        modality=modality,
        counts=volume.counts,
        labelled=known,
        read_volume=lambda: volume,
        read_target=lambda: (labels, (1.0,) * 3),
    )
    return Hospital(name, modality, [case] * cases, [], [])


def check_alike(*configs, names=("north", "west")):
    def check(peers):
        multisite.check_alike(configs[peers.rank], names[peers.rank], CPU, peers)

    together(len(configs), check)


def check_cases(configs, *hospitals):
    """hospitals: of each rank, its own first and then those that it only tests on."""

    def check(peers):
        return multisite.check_cases(configs[peers.rank], hospitals[peers.rank], peers)

    return together(len(configs), check)


MRI, CT = hospital("north", "mri"), hospital("west", "ct")


def test_ranks_that_agree_may_differ_in_what_is_their_own():
    a = Config(mri=("north",), out="a/out", arms=("fedgin",))
    own = {"out": "b/out", "cache": "c", "test": ("held_out",), "layout": "amos", "skip_bad": True}
    check_alike(a, Config(ct=("west",), arms=("fedgin",), **own))


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({"lr": 0.5}, "lr"),
        ({"seeds": (7,), "rounds": 9}, "seeds, rounds"),
        ({"arms": ("fl",)}, "arms"),
        ({"partial_labels": True}, "partial_labels"),
        ({"organs": ORGANS[::-1]}, "organs"),
        ({"spacing": 3.0}, "spacing"),
    ],
)
def test_settings_that_differ_are_named(more, names):
    a = Config(mri=("north",), arms=("fedgin",))
    b = Config(**{"ct": ("west",), "arms": ("fedgin",), **more})
    with pytest.raises(DataError, match=f"ranks 0 and 1 were started with different {names}$"):
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
    with pytest.raises(DataError, match="north: a --test folder has the same name; .* --name"):
        check_cases(configs, [MRI, hospital("north", "")])
