"""Ranks, one per hospital: the weights of one process, and how failures end."""

import csv
import functools
import json
import os
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

import fedgin
from scans.cases import PreparedCase
from scans.files import DataError
from scans.organs import ORGANS
from scripts import multisite
from study.config import Checkpoint, Config, Training
from study.hospitals import Hospital

TRAINING = Training(42, "fedgin", p=1.0)
CPU = torch.device("cpu")
BOTH = [pytest.param("north", marks=pytest.mark.thorough), "west"]
DIE = "lambda: os.kill(os.getpid(), signal.SIGKILL)"
ROUND_2 = "before(multisite, 'train_locally', {}, call=2)"


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
def three_ranks(tmp_path_factory, sites, server):
    launcher = Launcher(server, tmp_path_factory.mktemp("three"), sites)
    yield launcher(names=MODALITY)
    launcher.end()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, sites):
    """A function: hospitals' names → the folder of the same run in one process."""
    root = tmp_path_factory.mktemp("one")

    @functools.cache
    def run(*names, arm="fedgin"):
        out = root / "-".join([arm, *names])
        args = [*TINY, "--scenario", "complete", "--arms", arm, "--cache", sites / "cache"]
        args += [arg for name in names for arg in (f"--{MODALITY[name]}", sites / name)]
        assert fedgin.main([*map(str, args), "--out", str(out)]) == 0
        return out

    return run


def weights(out):
    return torch.load(out / TRAINING.folder / "model.pt", weights_only=True)["weights"]


def rows(file):
    with file.open(newline="") as content:
        return list(csv.DictReader(content))


def history(out, training=TRAINING):
    return rows(out / training.folder / "history.csv")


def contents(out):
    """The files of the training by name, and what is in them."""
    return {p.name: p.read_bytes() for p in (out / TRAINING.folder).iterdir()}


def by_name(ranks, name):
    """The rank of this name, and the other one."""
    return sorted(ranks, key=lambda rank: rank.folder.name != name)


def wait_for(rank):
    """Until it does what its patch says."""
    end = time.monotonic() + 60
    while not (rank.folder / "patched").exists():
        assert time.monotonic() < end, rank.error
        time.sleep(0.01)


def assert_end(ranks, code):
    assert [rank.end() for rank in ranks] == [code] * len(ranks), [rank.error for rank in ranks]


def assert_finish(ranks, expected):
    """With the weights and tables of a run in one process: to 1e-6 of a tensor's largest weight."""
    assert_end(ranks, 0)
    for rank in ranks:
        found = weights(rank.out)
        for key, w in weights(expected).items():
            assert (found.pop(key) - w).abs().max() <= 1e-6 * w.abs().max(), key
        assert found == {}
        assert (rank.out / "results.md").read_text() == (expected / "results.md").read_text()
        hospitals = [row["hospital"] for row in rows(rank.out / "scores.csv")]
        assert hospitals == [row["hospital"] for row in rows(expected / "scores.csv")]


# --------------------------------------------------------------------------- what ranks do together


@pytest.mark.slow
def test_torchrun_with_two_hospitals_gives_the_weights_of_one_process(start, one_process):
    assert_finish(start(torchrun=""), one_process("north", "west"))


@pytest.mark.slow
def test_ranks_give_the_weights_and_tables_of_one_process(three_ranks, one_process):
    assert_finish(three_ranks, one_process(*MODALITY))
    first, *others = (weights(rank.out) for rank in three_ranks)
    for other in others:
        assert_equal(first, other)


@pytest.mark.slow
def test_the_history_has_everybodys_dice_and_a_ranks_own_loss(three_ranks, one_process):
    """In round 1 a hospital's loss is that of an arm in which it trains alone."""
    assert_end(three_ranks, 0)
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
    assert_end(three_ranks, 0)
    names = "config.json cases-seed42.json hospitals.json lock results.md history.csv scores.csv "
    of_training = "training.json model.pt history.csv scores.json lock"
    names = {*names.split(), *(f"{TRAINING.folder}/{name}" for name in of_training.split())}
    ids = {"north": "case_", "south": "s0", "west": "s0"}
    for rank, name in zip(three_ranks, ids, strict=True):
        found = {str(p.relative_to(rank.out)) for p in rank.out.rglob("*") if p.is_file()}
        assert found == names
        scores = rows(rank.out / "scores.csv")
        assert [row["hospital"] for row in scores[:: len(ORGANS)]] == list(MODALITY)
        assert [row["organ"] for row in scores] == [*ORGANS] * 3
        for row in scores:
            own = row["hospital"] == name
            assert (
                row["case"].startswith(ids[name])
                if own
                else row["case"] == f"case {list(MODALITY).index(row['hospital'])}-0"
            )
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


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_a_killed_rank_ends_the_other_at_once_and_the_run_goes_on(name, start, one_process):
    killed, other = by_name(start(patches={name: ROUND_2.format(DIE)}), name)
    began = time.monotonic()
    assert (other.end(), killed.end()) == (1, -signal.SIGKILL)
    assert time.monotonic() - began < 60  # of a timeout of 1800 s
    assert ": the run failed: another rank was stopped, is cut off or takes" in other.error
    assert other.error.endswith("; repeat the commands to continue\n")
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
    assert "takes longer than --timeout 4 (" in other.error
    os.kill(hanging.pid, signal.SIGKILL)
    hanging.end()
    assert_finish(start(), one_process("north", "west"))


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_torchrun_shows_everybody_why_a_rank_failed(name, start, tmp_path, sites):
    """As the last thing on each screen, and before anything is written; the other rank reads on."""
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
    assert "the run failed: another rank was stopped" in ranks[1].error


BAD_FOLDER = "os.mkdir('out'); open('out/config.json', 'w').write('{}')"
BAD_DEVICE = "os.environ.update(GLOO_SOCKET_IFNAME='lo,nonsense9', GROUP_RANK='0')"
EXPLODE = "multisite.train_locally = lambda *_, **__: 28.0"  # ten times ln 6 + 1 is 27.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "patch", "flags", "code", "reason"),
    [
        ("west", ROUND_2.format("lambda: fail(OSError('no disk'))"), [], 1, "(west): no disk"),
        ("west", ROUND_2.format("lambda: fail(KeyboardInterrupt)"), [], 130, "(west): was stopped"),
        (
            "north",
            EXPLODE,
            [],
            1,
            "(north): the loss exploded ({'north': 28.0}); a lower --lr may help",
        ),
        ("north", "before(fedgin, 'run_test', lambda: fail(DataError('x')))", [], 2, "(north): x"),
        ("north", BAD_FOLDER, [], 2, "(north): out/config.json: is not of a run of version 3"),
        ("west", BAD_FOLDER, [], 2, "(west): out/config.json: is not of a run of version 3"),
        ("north", BAD_DEVICE, [], 1, "(north): GLOO_SOCKET_IFNAME=lo,nonsense9: "),
        ("west", BAD_DEVICE, [], 1, "(west): GLOO_SOCKET_IFNAME=lo,nonsense9: "),
        ("north", "", ["--rate", 1], 2, "(its flags): unrecognized arguments: --rate 1"),
        ("west", "", ["--name", "../x"], 2, "(its flags): '../x' cannot be used in file names"),
    ],
)
def test_all_ranks_end_with_the_reason_of_the_one_that_failed(
    name, patch, flags, code, reason, start
):
    failed, other = by_name(start(patches={name: patch}, own={name: flags}), name)
    assert (failed.end(), other.end()) == (code, 1)
    reason = f"rank {['north', 'west'].index(name)} {reason}"
    assert f": the run failed: {reason}" in other.error  # without the other's round
    assert reason.split("): ")[1].removeprefix("was ") in failed.error
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
    assert ": the run failed: " not in west.error
    assert north.summary() == "rank 1 (west): no such layer"
    assert ": the run failed: rank 1 (west): no such layer" in north.error


OTHER = "the ranks were started with different "
OWN = "--skip-bad --cache c --layout totalsegmentator --test north"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (f"--lr 0.1 --seed 7 {OWN}", f"{OTHER}seeds: [42] / [7]; lr: 0.001 / 0.1"),
        ("--partial-labels --arm fl", f"{OTHER}arms: ['fedgin'] / ['fl']; partial_labels: False /"),
        ("--organs liver", f"{OTHER}organs: {[*ORGANS]} / ['liver']"),
        ("--name north", "hospitals north, north: two have one name; give one a --name"),
    ],
)
def test_ranks_that_do_not_fit_together_end_before_a_scan_is_read(flags, reason, start):
    unread = "multisite.load_hospitals = lambda *_: fail(AssertionError)"
    ranks = start(own={"west": flags.split()}, patches={"north": unread, "west": unread})
    assert_end(ranks, 2)
    for rank in ranks:
        assert f"): {reason}" in rank.summary()
        assert not rank.out.exists()


@pytest.fixture
def two_networks():
    """Two network namespaces joined by a cable: code to enter each, and how to cut it."""
    a, b = names = [f"fedgin{os.getpid() % 10**7}{side}" for side in "ab"]
    setup = f"ip netns add {a} && ip netns add {b} && "
    setup += f"ip link add {a} netns {a} type veth peer name {b} netns {b}"
    for i, name in enumerate(names):
        setup += f" && ip -n {name} addr add 10.77.0.{i + 1}/24 dev {name}"
        setup += f" && ip -n {name} link set {name} up && ip -n {name} link set lo up"
    enter = (
        "ctypes.CDLL(None).setns(os.open('/run/netns/{0}', os.O_RDONLY), 0)\n"
        "os.environ.update(MASTER_ADDR='10.77.0.1', GLOO_SOCKET_IFNAME='{0}')\n"
    )
    try:
        done = subprocess.run(setup, shell=True, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
        cut = ["ip", "-n", b, "link", "set", b, "down"]
        yield enter.format(a), enter.format(b), lambda: subprocess.run(cut, check=True)
    finally:
        subprocess.run(f"ip netns del {a}; ip netns del {b}", shell=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "during", ["train_locally", pytest.param("load_hospitals", marks=pytest.mark.thorough)]
)
def test_a_cut_link_ends_both_ranks_within_the_timeout(during, two_networks, start):
    enter_a, enter_b, cut = two_networks
    at_work = f"{enter_b}before(multisite, '{during}', lambda: time.sleep(1))"
    north, west = start("--timeout", 4, patches={"north": enter_a, "west": at_work})
    wait_for(west)
    cut()
    began = time.monotonic()
    assert_end([north, west], 1)
    assert time.monotonic() - began < 1 + 4 + 10
    for rank in (north, west):
        assert ": the run failed: another rank was stopped, is cut off or takes" in rank.error


# -------------------------------------------------------------------------------- ranks that go on


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_a_rank_that_dies_at_the_end_has_its_results_when_it_goes_on(name, start, one_process):
    """Killed when the other has written its own; nobody loses a case, or counts one twice."""
    die_late = "lambda: (time.sleep(1), os.kill(os.getpid(), signal.SIGKILL))"
    ranks = start(patches={name: f"before(TrainingFolder, 'finish', {die_late})"})
    died, finished = by_name(ranks, name)
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
    """In the last of three rounds, and when all is done; no history holds a round twice."""
    expected = one_process("north", "west")
    stop = "before(multisite, 'train_locally', lambda: fail(OSError('no disk')), call=3)"
    assert_end(start(patches={"west": stop}), 1)
    for rounds in (["3"], []):
        [lost, other] = by_name(start.ranks[-2:], name)
        shutil.rmtree(lost.out)
        kept = contents(other.out)
        assert_finish(start(), expected)
        assert [row["round"] for row in history(lost.out)] == rounds
        assert [row["round"] for row in history(other.out)] == ["1", "2", "3"]
    assert contents(other.out) == kept
    assert_equal(weights(lost.out), weights(other.out))
    (other.out / TRAINING.folder / "model.pt").unlink()
    shutil.rmtree(lost.out)
    lost, other = by_name(start(), name)
    assert (lost.end(), other.end()) == (1, 2)
    for rank in (lost, other):
        assert "its model is gone; delete the folder to train anew" in rank.summary()


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_hospitals(start):
    assert_end(start("--rounds", 1), 0)
    north, south = start("--rounds", 1, names=("north", "south"))
    assert (north.end(), south.end()) == (2, 1)
    reason = "rank 0 (north): out/hospitals.json: was made with west 3, now None; south None, now 2"
    for rank in (north, south):
        assert rank.summary().startswith(f"{reason}. Give the same, or another --out")


# ------------------------------------------------------------------------ the parts, in one process


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", "name this hospital's folder, and no other, with --mri or --ct"),
        ("--mri a --ct b", "name this hospital's folder, and no other"),
        ("--mri a b", "name this hospital's folder, and no other"),
        ("--ct a --ct b", "name this hospital's folder, and no other"),
        ("--mri a", "must be started by torchrun; see docs/several-machines.md"),
        ("--mri a --seeds 1", "unrecognized arguments: --seeds 1"),
        ("--mri a --sites 2", "unrecognized arguments: --sites 2"),
        ("--mri a --scenario limited", "unrecognized arguments: --scenario limited"),
        ("--mri a --arm centralized", "argument --arm: invalid choice: 'centralized'"),
        ("--mri a --timeout inf", "argument --timeout: invalid int value: 'inf'"),
        ("--mri a --timeout 0", "--timeout must be a positive number of seconds, not 0"),
        ("--mri /", "'' cannot be used in file names; give another --name"),
        *(
            (f"--mri a --name={name}", f"{name!r} cannot be used in file names")
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
    assert usage.startswith("usage: torchrun --nnodes 2 ") and usage.endswith("[options]")
    assert f"error: {message}" in error


def test_a_rank_is_named_by_its_folder(monkeypatch, tmp_path):
    called = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(multisite, "run", lambda *args: called.append(args))
    assert multisite.main(["--ct", f"{tmp_path}/west/", "--arm", "fl", "--seed", "7"]) == 0
    assert multisite.main(["--mri", "b", "--name", "north", "--timeout", "9", "--out", "c"]) == 0
    [(first, *named), (second, *also_named)] = called
    assert (named, also_named) == (["west", 1800], ["north", 9])
    assert (first.scenario, first.arms, first.seeds) == ("complete", ("fl",), (7,))
    assert (first.ct, first.mri, first.out) == ((f"{tmp_path}/west/",), (), "runs/fl-west")
    assert (first.rounds, first.patch) == (100, 96)  # the defaults for scans
    assert (second.arms, second.seeds, second.out) == (("fedgin",), (42,), "c")
    assert (first.gin_probability, second.gin_probability) == ((0.25,), (0.25,))


@pytest.mark.parametrize("furthest", [0, 1, 2])
def test_the_rank_that_came_furthest_tells_all_where_the_training_stands(furthest):
    config = Config(width=2, depth=2)
    last, best, other, *own = (fedgin.make_model(config, seed).state_dict() for seed in range(6))
    behind = Checkpoint(1, other, 1, 0.9, other, history=("row 1",))
    starts = [Checkpoint(), behind, behind]
    starts[furthest] = Checkpoint(3, last, 1, 0.5, best, history=("row 1", "row 2", "row 3"))

    def hear(peers):
        return multisite.share_checkpoint(starts[peers.rank], own[peers.rank], peers)

    for rank, found in enumerate(together(3, hear)):
        assert (found.round, found.best_round, found.best_dice) == (3, 1, 0.5)
        assert found.history == starts[rank].history
        assert_equal(found.weights, last)
        assert_equal(found.best_weights, best)


def test_case_ids_stay_at_their_rank():
    ids, sent = [["s7", "s8"], ["amos_1"]], []

    def share(peers):
        scores = [
            {"hospital": f"h{peers.rank}", "case": id_, "organ": organ, "dice": n}
            for n, id_ in enumerate(ids[peers.rank])
            for organ in ("liver", "spleen")
        ]
        return multisite.share_scores(scores, 2, peers)

    all_ids = ["s7", "s8", "case 1-0"], ["case 0-0", "case 0-1", "amos_1"]
    for found, expected in zip(together(2, share, sent=sent), all_ids, strict=True):
        assert [score["case"] for score in found[::2]] == expected
        assert [score["case"] for score in found[1::2]] == expected
        assert [score["organ"] for score in found] == ["liver", "spleen"] * 3
        assert [score["hospital"] for score in found[::2]] == ["h0", "h0", "h1"]
        assert [score["dice"] for score in found[::2]] == [0, 1, 0]
    text = b"".join(bytes(numbers.flatten().byte().tolist()) for numbers in sent)
    assert b"liver" in text and b"s7" not in text and b"amos" not in text


def hospital(name, modality, labelled=(True,) * 5):
    known = np.array([True, *labelled])
    case = PreparedCase("x", modality, known.astype(int), known, lambda: None, lambda: None)
    return Hospital(name, modality, [case], [], [])


MRI, CONFIG = hospital("north", "mri"), Config(mri=("north",), arms=("fedgin",))


@pytest.mark.parametrize(
    ("other", "error", "note"),
    [
        ({"version": "3.0.1"}, "version of FedGIN: 3.0.0 / 3.0.1", ""),
        ({"modules": "beef"}, "code of FedGIN: cafe / beef", ""),
        (
            {"torch": "2.5.0"},
            "",
            "NOTE: the ranks have different versions of PyTorch: 2.4.0, 2.5.0",
        ),
        ({"device": "H200", "python": "3.12"}, "", ""),
    ],
)
def test_ranks_with_another_program_are_refused(other, error, note, monkeypatch, capsys):
    """With another PyTorch, which may change the last digits, they are only told of it."""
    here = {"version": "3.0.0", "modules": "cafe", "torch": "2.4.0", "device": "cpu"}
    programs = [here, here | other]
    monkeypatch.setattr(multisite, "environment", lambda rank: programs[rank])

    def check(peers):
        multisite.check_alike(CONFIG, "abc"[peers.rank], peers.rank, peers)

    if error:
        with pytest.raises(DataError, match=f"the ranks were started with different {error}$"):
            together(2, check)
    else:
        together(2, check)
    assert capsys.readouterr().out == 2 * f"{note}\n" * bool(note)


def check_cases(config, *everyone):
    """everyone: of each rank, its own hospital first and then those that it only tests on."""
    return together(
        len(everyone), lambda peers: multisite.check_cases(config, everyone[peers.rank], peers)
    )


def test_organs_that_are_not_labelled_are_refused():
    few = hospital("west", "ct", labelled=(True, True, False, False, False))
    with pytest.raises(DataError, match=r"west: liver, kidneys\); use --organs liver kidneys or"):
        check_cases(CONFIG, [MRI], [few])
    partial = Config(mri=("north",), partial_labels=True)
    assert check_cases(partial, [MRI], [few]) == [{"north": 1, "west": 1}] * 2
    fewer = hospital("north", "mri", labelled=(False, True, True, True, False))
    with pytest.raises(DataError, match="no folder labels .*gallbladder"):
        check_cases(partial, [fewer], [few])


def test_a_rank_needs_training_cases_and_a_name_of_its_own():
    with pytest.raises(DataError, match="north has no training case"):
        check_cases(CONFIG, [MRI._replace(train=[])])
    check_cases(CONFIG, [MRI, hospital("held_out", "")])
    with pytest.raises(DataError, match="north: a --test folder has the same name; .* --name"):
        check_cases(CONFIG, [MRI, hospital("north", "")])
