"""Runs as a user meets them: who trains on what, the loss by hand, faults, the same bits again."""

import collections
import csv
import itertools
import json
import math
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from conftest import truncate, write_nnunet, write_totalsegmentator
from tiny import Forks, assert_equal, assert_same, outcome
from torch import nn

import data
import fedgin
import study.hospitals
from evaluate import dice, score_case
from fedgin import ARMS, RATIOS, SCENARIOS, choose_cases, make_clients, plan
from gin import GIN, gin
from scans import files, machine
from scans.cases import PreparedCase
from scans.files import DataError
from scans.phantom import SPACING, make_phantom
from study.config import Checkpoint, Config, Round, Training, make_parser, to_config
from study.hospitals import Hospital, load_hospitals, validation_cases
from study.inference import load_model, segment
from unet3d import UNet3D

TINY = ["--rounds", "2", "--local-steps", "2", "--batch-size", "2"]
TINY += ["--patch", "32", "--width", "2", "--depth", "2", "--val-every", "1"]
CPU = torch.device("cpu")
FL = Training(1, "fl", "1:5")
FEDGIN = Training(1, "fedgin", "1:5", 1.0)


def flags(*args):
    """Those of a tiny run and these; a flag of several values that is given twice adds up."""
    own = [] if "--gin-probability" in args else ["--gin-probability", "1"]
    return [*TINY, *own, *map(str, args)]


def command(*args):
    return fedgin.main(flags(*args))


def config(*args):
    parser = make_parser(None, {"scenario": SCENARIOS, "arms": ARMS, "ratios": RATIOS})
    return to_config(parser, parser.parse_args(flags(*args)))


def hospitals(seed, *args):
    by_seed, notes = load_hospitals(config("--seeds", seed, *args))
    assert notes == []
    return [hospital for hospital in by_seed[seed] if hospital.modality]


def volumes(cases):
    return [case.read_volume() for case in cases]


def labels_of_plan(*args):
    return [training.label for training in plan(config(*args))]


def weights(path):
    return torch.load(path, weights_only=True)["weights"]


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def differ(a, b):
    return any(not torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def phantom_run(tmp_path_factory):
    """Arms of each kind on phantoms, two ratios, two seeds."""
    out = tmp_path_factory.mktemp("run") / "results"
    args = ["--arms", "mri-only", "fedgin", "--ratios", "1:1", "all", "--seeds", 1, 2]
    assert command(*args, "--out", out) == 0
    return out


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(phantom_run):
    arms = {"mri-only", "fedgin-1-1-p1", "fedgin-all-p1"}
    trainings = {f"{arm}-seed{n}" for arm in arms for n in (1, 2)}
    left = {"config.json", "history.csv", "lock", "results.md", "scores.csv"}
    left |= {"cases-seed1.json", "cases-seed2.json"}
    assert {path.name for path in phantom_run.iterdir()} == trainings | left
    of_training = {"history.csv", "lock", "model.pt", "scores.json", "training.json"}
    for training in trainings:
        assert {path.name for path in (phantom_run / training).iterdir()} == of_training
    saved = json.loads((phantom_run / "config.json").read_text())
    assert saved["rounds"] == 2
    assert not saved.keys() & {"arms", "ratios", "seeds", "gin_probability", "out"}
    for seed in (1, 2):
        cases = json.loads((phantom_run / f"cases-seed{seed}.json").read_text())
        splits = [split for case, split in cases.items() if case.startswith("ct ")]
        assert collections.Counter(splits) == {"train": 12, "val": 4, "test": 8}
    about = json.loads((phantom_run / "fedgin-1-1-p1-seed2/training.json").read_text())
    assert about["training"] == {"seed": 2, "arm": "fedgin", "ratio": "1:1", "p": 1.0}
    assert about["cases"] == {"mri": 2, "ct": 2}
    scores = rows_of(phantom_run / "scores.csv")
    # arms, seeds, modalities, test cases of hospitals and of the unseen scanner, organs
    assert len(scores) == 3 * 2 * 2 * (8 + 8) * 5
    found = {(row["arm"], row["ratio"], row["p"]) for row in scores}
    assert found == {("mri-only", "", ""), ("fedgin", "1:1", "1.0"), ("fedgin", "all", "1.0")}
    assert {row["scanner"] for row in scores if row["hospital"] == "unseen-scanner"} == {"unseen"}
    history = rows_of(phantom_run / "history.csv")
    own = [row for t in trainings for row in rows_of(phantom_run / t / "history.csv")]
    whole, parts = (
        sorted(str({k: v for k, v in row.items() if v}) for row in rows) for rows in (history, own)
    )
    assert whole == parts
    report = (phantom_run / "results.md").read_text()
    assert "PHANTOMS" in report.splitlines()[0]
    assert "NOT FINISHED" not in report
    assert "| fedgin 1:1 p=1 " in report
    assert "### Unseen scanners: unseen-scanner" in report
    assert len(history) == 3 * 2 * 2  # arms, seeds, rounds
    assert {row["round"] for row in history} == {"1", "2"}
    for row in history:
        alone = row["arm"] == "mri-only"
        assert (row["val_dice_ct"] == "") == (row["loss ct"] == "") == alone
        losses = [float(row[key]) for key in ("loss mri", "loss ct") if row[key]]
        assert float(row["loss"]) == pytest.approx(np.mean(losses))
        assert 0 < float(row["seconds"]) < 1000


@pytest.mark.slow
def test_a_model_gives_the_results_back(phantom_run):
    model, about = load_model(phantom_run / "fedgin-1-1-p1-seed2/model.pt", CPU)
    case = hospitals(2)[0].test[0].read_volume()
    labels = segment(model, case.image, about["patch"], case.labels.shape)
    saved = {
        row["organ"]: row
        for row in rows_of(phantom_run / "scores.csv")
        if (row["arm"], row["ratio"], row["seed"]) == ("fedgin", "1:1", "2")
        and (row["hospital"], row["case"]) == ("mri", case.id)
    }
    expected = score_case(labels, case.labels, about["organs"], (SPACING,) * 3, tolerance=SPACING)
    assert saved.keys() == expected.keys()
    for organ, score in expected.items():
        found = saved[organ]
        assert found["outcome"] == score["outcome"]
        for metric in ("dice", "hd95", "nsd"):
            assert found[metric] == str(score.get(metric, ""))


@pytest.mark.slow
def test_a_model_is_that_of_the_round_with_the_best_validation(phantom_run):
    """Its validation Dice, computed anew, is the highest in the history of its training."""
    path = phantom_run / "mri-only-seed1/model.pt"
    best = torch.load(path, weights_only=True)
    dices = {
        int(row["round"]): float(row["val_dice_mri"])
        for row in rows_of(phantom_run / "mri-only-seed1/history.csv")
    }
    assert best["best_dice"] == max(dices.values()) == dices[best["best_round"]]
    model, about = load_model(path, CPU)
    by_organ = {organ: [] for organ in range(1, 6)}
    for case in volumes(hospitals(1)[0].val):
        labels = segment(model, case.image, about["patch"], case.labels.shape)
        for organ, found in by_organ.items():
            found.append(dice(labels == organ, case.labels == organ))
    mean = np.mean([np.mean(found) for found in by_organ.values()])
    assert mean == pytest.approx(best["best_dice"], abs=1e-9)


@pytest.mark.slow
def test_the_same_command_twice_is_bit_identical(tmp_path):
    for name in ("a", "b"):
        assert command("--out", tmp_path / name, "--rounds", 1, "--arms", "fl", "fedgin") == 0
    assert_same(*(outcome(tmp_path / name) for name in "ab"))
    folders = "fl-1-5-seed42", "fedgin-1-5-p1-seed42"
    assert differ(*(weights(tmp_path / "a" / name / "model.pt") for name in folders))


# ------------------------------------------------------------------------ runs that stop and go on


@pytest.fixture
def quick(monkeypatch):
    """Training that moves the head by the learning rate, and a threshold instead of the network."""
    training = SimpleNamespace(rates=[], fails_at=0, error=OSError("the disk is gone"))

    def train(model, batches, loss_function, lr, autocast):
        next(iter(batches))  # so that the screen knows the round
        training.rates.append(lr)
        if len(training.rates) == training.fails_at:
            raise training.error
        with torch.no_grad():
            model.head.bias += lr
        return lr

    monkeypatch.setattr(fedgin, "train_locally", train)
    monkeypatch.setattr(fedgin, "segment", lambda model, image, *_: (image > 0).astype(np.uint8))
    return training


@pytest.fixture
def few(monkeypatch):
    """Phantoms; each hospital validates on one and tests on one."""
    splits = {"train": range(12), "val": range(12, 13), "test": range(16, 17)}
    monkeypatch.setattr(study.hospitals, "PHANTOM_SPLITS", splits)


def refuse_to_read(monkeypatch):
    monkeypatch.setattr(
        study.hospitals, "load_hospitals", lambda *_, **__: pytest.fail("scans are read")
    )


def test_a_run_goes_on_where_it_stopped_and_is_never_begun_anew(tmp_path, quick, capsys):
    args = ["--arms", "fl", "mri-only", "--rounds", 3, "--seeds", 1, "--out"]
    assert command(*args, tmp_path / "calm") == 0
    assert len(quick.rates) == 3 * 2 + 3
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{tmp_path}/calm: 0 of 2 trainings finished\n")
    assert "FedGIN on PHANTOMS" in shown.out
    assert "ct: 12 cases to train, 4 to validate, 8 to test" in shown.out
    assert shown.out.endswith(f"All tables: {tmp_path}/calm/results.md\n")
    lines = shown.err.splitlines()
    assert len(lines) == 3 + 1 + 3 + 1
    figures = r"loss 0.00, MRI 0\.\d\d, CT 0\.\d\d; 00:\d\d left"
    line = rf"training 1 of 2 \(fl 1:5, seed 1\), round 3 of 3: {figures}"
    assert re.fullmatch(line, lines[2])
    kept = r"the weights of round [123], validation Dice 0\.\d\d are kept"
    assert re.fullmatch(rf"training 1 of 2 \(fl 1:5, seed 1\): {kept}", lines[3])
    figures = r"loss 0.01, MRI 0\.\d\d; 00:\d\d left"
    line = rf"training 2 of 2 \(mri-only, seed 1\), round 1 of 3: {figures}"
    assert re.fullmatch(line, lines[4])

    quick.rates.clear()
    quick.fails_at = 8
    assert command(*args, tmp_path / "out") == 1
    shown = capsys.readouterr()
    message = "mri-only, seed 1: round 2, hospital mri: the disk is gone"
    assert shown.err.splitlines()[-1] == f"FAILED: {message}"
    assert shown.out.splitlines()[-1] == message
    quick.rates.clear()
    quick.fails_at = 0
    assert command(*args, tmp_path / "out") == 0
    assert len(quick.rates) == 2
    shown = capsys.readouterr()
    state = "1 of 2 trainings finished, mri-only, seed 1 after round 1"
    assert shown.out.splitlines()[0] == f"{tmp_path}/out: {state}"
    [line, _, kept] = shown.err.splitlines()
    assert line.startswith("training 1 of 1 (mri-only, seed 1), round 2 of 3: ")
    assert kept.startswith("training 1 of 1 (mri-only, seed 1): the weights of round ")
    assert_same(outcome(tmp_path / "calm"), outcome(tmp_path / "out"))


def test_a_finished_run_prints_its_tables_and_reads_no_scan(
    tmp_path, quick, few, monkeypatch, capsys
):
    args = ["--arms", "fl", "fedgin", "--rounds", 1, "--out", tmp_path]
    assert command(*args) == 0
    first, left = capsys.readouterr().out, outcome(tmp_path)
    refuse_to_read(monkeypatch)
    quick.rates.clear()
    assert command(*args) == 0
    shown = capsys.readouterr()
    assert quick.rates == []
    assert shown.out.splitlines()[0] == f"{tmp_path}: 2 of 2 trainings finished"
    tables = shown.out[shown.out.index("## Test Dice") :]
    assert tables == first[first.index("## Test Dice") :]
    assert "| fl 1:5 " in tables
    assert shown.err == ""
    assert_same(left, outcome(tmp_path))


def test_a_training_that_fails_is_named_and_the_next_is_taken(tmp_path, quick, few, capsys):
    """One of three diverges in its second round, which does not affect the others."""
    args = ["--arms", "mri-only", "fl", "fedgin", "--rounds", 2, "--out"]
    assert command(*args, tmp_path / "calm") == 0
    quick.rates.clear()
    quick.fails_at, quick.error = (
        2 + 4,
        FloatingPointError("the loss is nan; a lower --lr may help"),
    )
    capsys.readouterr()
    assert command(*args, tmp_path / "out") == 1
    assert len(quick.rates) == 2 + 4 + 4
    shown = capsys.readouterr()
    message = "fl 1:5, seed 42: round 2, hospital ct: the loss is nan; a lower --lr may help"
    assert f"FAILED: {message}" in shown.err.splitlines()
    assert "Traceback" not in shown.err
    assert shown.out.splitlines()[-1] == message
    title = "## Test Dice, limited scenario, seeds 42: PHANTOMS (synthetic volumes, not patients)"
    assert f"{title}; NOT FINISHED: 1 of the trainings" in shown.out.splitlines()
    report = (tmp_path / "out/results.md").read_text()
    assert report.splitlines()[0] == f"{title}; NOT FINISHED: 1 of the trainings"
    assert "fedgin 1:5 p=1 − mri-only" in report
    assert "fl 1:5" not in report
    assert (tmp_path / "out/fl-1-5-seed42/checkpoint.pt").exists()
    quick.fails_at = 0
    assert command(*args, tmp_path / "out") == 0
    assert len(quick.rates) == 2 + 4 + 4 + 2
    assert_same(outcome(tmp_path / "calm"), outcome(tmp_path / "out"))


def test_where_nothing_could_be_validated_the_last_weights_are_kept(
    tmp_path, quick, monkeypatch, capsys
):
    monkeypatch.setattr(fedgin, "validate", lambda *_: (torch.zeros(1, 5), torch.zeros(1, 5)))
    assert command("--arms", "mri-only", "--rounds", 3, "--out", tmp_path) == 0
    *lines, last = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(", MRI nan;" in line for line in lines)
    kept = "no validation case holds an organ; the last weights are kept"
    assert last == f"training 1 of 1 (mri-only, seed 42): {kept}"
    model = torch.load(tmp_path / "mri-only-seed42/model.pt", weights_only=True)
    assert model["best_round"] == 3
    assert [row["val_dice_mri"] for row in rows_of(tmp_path / "history.csv")] == [""] * 3


def test_a_stop_while_testing_does_not_begin_the_test_again(tmp_path, quick, monkeypatch, capsys):
    args = ["--arms", "mri-only", "--rounds", 2, "--out"]
    assert command(*args, tmp_path / "calm") == 0
    score, scored = fedgin.score_case, []

    def failing(*args):
        scored.append(args)
        if len(scored) == 11:
            raise OSError("the disk is gone")
        return score(*args)

    monkeypatch.setattr(fedgin, "score_case", failing)
    assert command(*args, tmp_path / "out") == 1
    assert "FAILED: mri-only, seed 42: the disk is gone" in capsys.readouterr().err
    scored[:] = [None] * 20
    quick.rates.clear()
    assert command(*args, tmp_path / "out") == 0
    assert quick.rates == []
    assert "mri-only, seed 42 after round 2" in capsys.readouterr().out.splitlines()[0]
    assert len(scored) == 20 + (8 + 8 + 16) - 10  # test cases of mri, ct and the unseen scanner
    assert_same(outcome(tmp_path / "calm"), outcome(tmp_path / "out"))


@pytest.mark.slow
def test_a_finished_run_is_extended_and_trains_nothing_twice(
    tmp_path, quick, few, monkeypatch, capsys
):
    args = ["--rounds", 2, "--out"]
    assert command(*args, tmp_path / "a", "--arms", "fl", "--seeds", 1) == 0
    assert command(*args, tmp_path / "a", "--arms", "fl", "--seeds", 2, 1) == 0
    ratios = ["--ratios", "1:5", "all"]
    more = ["--arms", "fl", "fedgin", "--seeds", 1, 2, *ratios]
    probabilities = ["--gin-probability", 1, 0.5]
    assert command(*args, tmp_path / "a", *more) == 0
    assert len(quick.rates) == 2 * 2 * 2 * 4  # rounds, hospitals, seeds, arms with their ratios
    assert command(*args, tmp_path / "a", *more, *probabilities) == 0
    assert len(quick.rates) == 2 * 2 * 2 * 6
    assert command(*args, tmp_path / "b", *more, *probabilities) == 0
    assert_same(*(outcome(tmp_path / name) for name in "ab"))
    capsys.readouterr()
    refuse_to_read(monkeypatch)
    assert command(*args, tmp_path / "a", *more, "--rounds", 3) == 2
    assert "rounds 2, now 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (["--lr", 0.5], "lr 0.006, now 0.5"),
        (["--width", 3, "--mri-cases", 1], "mri_cases 2, now 1; width 2, now 3."),
        (["--organs", "liver"], "liver kidneys spleen pancreas gallbladder, now liver"),
        (["--scenario", "complete"], "scenario limited, now complete"),
    ],
)
def test_other_settings_are_refused_before_a_scan_is_read(
    other, message, tmp_path, quick, few, monkeypatch, capsys
):
    args = ["--arms", "mri-only", "--rounds", 1, "--out", tmp_path]
    assert command(*args) == 0
    left = outcome(tmp_path)
    capsys.readouterr()
    refuse_to_read(monkeypatch)
    assert command(*args, *other) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"fedgin.py: {tmp_path}/config.json: was made with ")
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    assert_same(left, outcome(tmp_path))


def test_probabilities_that_differ_in_their_last_digits_are_two_trainings(tmp_path, quick, few):
    probabilities = "0.12345671", "0.12345672"
    args = ["--arms", "fedgin", "--rounds", 1, "--gin-probability", *probabilities]
    assert command(*args, "--out", tmp_path) == 0
    assert len(quick.rates) == 2 * 2
    for p in probabilities:
        folder = tmp_path / f"fedgin-1-5-p{p}-seed42"
        scores = json.loads((folder / "scores.json").read_text())["scores"]
        assert {row["p"] for row in scores} == {float(p)}
        assert f"| fedgin 1:5 p={p} |" in (tmp_path / "results.md").read_text()
    assert {row["p"] for row in rows_of(tmp_path / "scores.csv")} == {"0.12345671", "0.12345672"}


@pytest.mark.slow
def test_two_processes_share_the_trainings_of_a_run(tmp_path):
    """Each round and each test case of a training is done by one process only."""
    args = [*flags("--patch", 16), "--arms", "mri-only", "fl", "fedgin", "--seeds", 1, 2, "--out"]
    with Forks(tmp_path) as forks:
        assert forks.start(*args, tmp_path / "calm").end()[0] == 0
        alone = sorted(forks.notes.read_text().splitlines())
        forks.notes.unlink()
        both = [forks.start(*args, tmp_path / "out") for _ in range(2)]
        ends = [command.end() for command in both]
        assert [code for code, _ in ends] == [0, 0]
        together = sorted(forks.notes.read_text().splitlines())
    assert together == alone
    assert len(set(alone)) == len(alone) == 6 * (2 + 4)  # rounds and test cases of a training
    assert_same(outcome(tmp_path / "calm"), outcome(tmp_path / "out"))
    # Both were at work, and one has seen that the other still was.
    trained = [len(re.findall("round 2 of 2: ", shown)) for _, shown in ends]
    assert sum(trained) == 6
    assert min(trained) >= 1


def test_what_could_not_run_is_refused_before_a_scan_is_read(
    tmp_path, ct_folder, mri_folder, capsys
):
    """The folders' scans cannot be read at all, yet the message is about something else."""
    for folder in (ct_folder, mri_folder):
        shutil.copytree(folder, tmp_path / folder.name)
    for path in tmp_path.rglob("*.nii.gz"):
        truncate(path)
    ct, mri = tmp_path / ct_folder.name, tmp_path / mri_folder.name
    args = ["--out", tmp_path / "out", "--ct", ct]
    assert command(*args) == 2
    message = "there are no MRI training cases, and an arm needs some; give folders with --mri or"
    assert message in capsys.readouterr().err
    assert command(*args, "--mri", mri, "--arms", "mri-only") == 2
    assert "cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_test_folder_that_holds_what_is_trained_on_is_warned_of(
    tmp_path, quick, ct_folder, mri_folder, capsys
):
    shutil.copytree(ct_folder, tmp_path / "copy")
    args = ["--ct", ct_folder, "--mri", mri_folder, "--test", tmp_path / "copy", "--arms", "fl"]
    assert command(*args, "--spacing", 9, "--out", tmp_path / "out") == 0
    lines = capsys.readouterr().out.splitlines()
    [line] = [x for x in lines if x.startswith("WARNING") and "twice" in x]
    copies = [f"s000{i}/ct.nii.gz" for i in range(4)]
    copies = [f"{tmp_path}/copy/{name} is a copy of {ct_folder}/{name}" for name in copies]
    what = "4 scans are there twice, so training cases may be tested on"
    assert line == f"WARNING: {what}: {', '.join(copies)}"


# ------------------------------------------------------------------------------- who trains on what


def test_gin_probability_0_is_fl(tmp_path):
    args = ["--out", tmp_path, "--rounds", 1, "--arms", "fl", "fedgin", "--gin-probability", 0]
    assert command(*args) == 0
    folders = "fl-1-5-seed42", "fedgin-1-5-p0-seed42"
    assert_equal(*(weights(tmp_path / name / "model.pt") for name in folders))


@pytest.mark.parametrize("flag", ["--scenario", "--arms", "--ratios"])
def test_other_choices_are_refused(flag, capsys):
    with pytest.raises(SystemExit) as end:
        command(flag, "another")
    assert end.value.code == 2
    assert f"argument {flag}: invalid choice: 'another'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "table"),
    [
        ({"scenario": "another"}, SCENARIOS),
        ({"arms": ("another",)}, ARMS),
        ({"ratios": ("another",)}, RATIOS),
    ],
)
def test_a_plan_refuses_names_that_are_in_no_table(settings, table):
    with pytest.raises(DataError) as error:
        plan(Config(**settings))
    assert str(error.value) == f"'another' is not one of {', '.join(table)}"


def test_scenarios():
    limited = ["mri-only", "fl 1:5", "fedgin 1:5 p=1"]
    assert labels_of_plan("--scenario", "limited") == limited
    complete = ["mri-only", "ct-only", "fl", "fedgin p=1", "centralized+gin p=1"]
    assert labels_of_plan("--scenario", "complete") == complete
    assert labels_of_plan("--scenario", "complete", "--arms", "ct-only") == ["ct-only"]


def test_ratios_and_probabilities_stand_behind_the_arms_that_differ_by_them():
    args = ["--arms", "mri-only", "fl", "fedgin"]
    assert labels_of_plan(*args) == ["mri-only", "fl 1:5", "fedgin 1:5 p=1"]
    more = ["--ratios", "1:1", "all", "--gin-probability", 1, 0.5]
    labels = [
        *("mri-only", "fl 1:1", "fl all"),
        *("fedgin 1:1 p=1", "fedgin 1:1 p=0.5", "fedgin all p=1", "fedgin all p=0.5"),
    ]
    assert labels_of_plan(*args, *more) == labels
    found = plan(config(*args, *more, "--seeds", 3, 1))
    assert [training.label for training in found] == 2 * labels
    assert [training.seed for training in found] == 7 * [3] + 7 * [1]
    assert found[1] == Training(3, "fl", "1:1", None)
    assert found[4] == Training(3, "fedgin", "1:1", 0.5)
    assert labels_of_plan("--arms", "mri-only", "fl", "--scenario", "complete") == [
        "mri-only",
        "fl",
    ]


def test_arms_and_ratios():
    mri_and_ct = hospitals(1)

    def shares(arm, ratio="", p=None, *args):
        """{who trains: (cases, batches per round)}"""
        clients = make_clients(config(*args), Training(1, arm, ratio, p), mri_and_ct)
        return {k: (client.n_k, len(list(client.batches(1)))) for k, client in clients.items()}

    assert shares("mri-only") == shares("mri-only+gin", "", 1.0) == {"mri": (2, 2)}
    assert shares("ct-only", "1:5") == shares("ct-only+gin", "1:5", 1.0) == {"ct": (10, 2)}
    both = {"mri": (2, 2), "ct": (10, 2)}
    assert shares("fedgin", "1:5", 1.0) == shares("fl", "1:5") == both
    pooled = {"pooled": (12, 4)}
    assert shares("centralized", "1:5") == shares("centralized+gin", "1:5", 1.0) == pooled
    assert shares("fl", "1:2") == {"mri": (2, 2), "ct": (4, 2)}
    assert shares("fl", "all") == {"mri": (2, 2), "ct": (12, 2)}
    assert shares("fl", "1:5", None, "--mri-cases", 1) == {"mri": (1, 2), "ct": (5, 2)}
    complete = config("--scenario", "complete")
    found = choose_cases(complete, Training(1, "fl"), mri_and_ct)
    assert {name: len(cases) for name, cases in found.items()} == {"mri": 12, "ct": 12}


def test_a_pool_holds_the_cases_that_the_hospitals_would_train_on(monkeypatch):
    settings, everyone = config(), hospitals(1)
    by_hospital = choose_cases(settings, FL, everyone)
    pools, make = [], fedgin.make_client

    def making(config, training, name, volumes, *args):
        pools.append((name, volumes))
        return make(config, training, name, volumes, *args)

    monkeypatch.setattr(fedgin, "make_client", making)
    make_clients(settings, Training(1, "centralized+gin", "1:5", 1.0), everyone)
    [(name, pool)] = pools
    expected = [(case.modality, case.id) for cases in by_hospital.values() for case in cases]
    assert name == "pooled"
    assert [(case.modality, case.id) for case in pool] == expected
    assert len(expected) == 12


def test_a_ratio_is_that_of_the_mri_cases_there_are():
    mri, ct = hospitals(1)
    few = [mri._replace(train=mri.train[:2]), mri._replace(name="b", train=mri.train[2:3]), ct]
    chosen = choose_cases(config("--mri-cases", 5), Training(1, "fl", "1:2"), few)
    assert {name: len(cases) for name, cases in chosen.items()} == {"mri": 2, "b": 1, "ct": 6}


def test_cases_come_from_the_hospitals_in_turns():
    settings = config("--mri-cases", 3)
    mri, ct = hospitals(1)
    small = mri._replace(name="small", train=mri.train[5:6])
    everyone = [mri, small, ct]
    chosen = choose_cases(settings, Training(1, "fl", "1:1"), everyone)
    ids = {name: [case.id for case in cases] for name, cases in chosen.items()}
    assert ids == {
        "mri": ["phantom1-00", "phantom1-01"],
        "small": ["phantom1-05"],
        "ct": ["phantom1-00", "phantom1-01", "phantom1-02"],
    }
    pooled = make_clients(settings, Training(1, "centralized+gin", "1:1", 1.0), everyone)["pooled"]
    assert len(list(pooled.batches(1))) == 2 * 3  # as many as three hospitals would train


def test_without_mri_cases_all_of_ct_train():
    """A limited ct-only arm at a hospital that has nothing else."""
    [ct] = hospitals(1)[1:]
    [(name, cases)] = choose_cases(config(), Training(1, "ct-only", "1:5"), [ct]).items()
    assert (name, len(cases)) == ("ct", 10)
    with pytest.raises(
        DataError, match="no MRI training cases, and an arm needs some; .* --mri or"
    ):
        study.hospitals.check_modalities({"mri"}, {"ct"})
    with pytest.raises(DataError, match="no CT training cases, and an arm needs some; .* --ct or"):
        study.hospitals.check_modalities(["mri", "ct"], {"mri"})
    study.hospitals.check_modalities({"ct"}, {"ct"})


@pytest.mark.slow
def test_the_screen_says_who_trains_on_what(tmp_path, quick, capsys):
    args = ["--ratios", "1:1", "1:5", "--mri-cases", 3, "--arms", "fl", "centralized"]
    assert command(*args, "--rounds", 1, "--seeds", 1, 2, "--out", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    first = lines.index("mri: 12 cases to train, 4 to validate, 8 to test")
    short = " (WARNING: not 1:5, because there are no more CT cases)"
    assert lines[first : first + 7] == [
        "mri: 12 cases to train, 4 to validate, 8 to test",
        "ct: 12 cases to train, 4 to validate, 8 to test",
        "unseen-scanner: 0 cases to train, 0 to validate, 16 to test",
        "fl 1:1:                     training cases: mri 3, ct 3",
        f"fl 1:5:                     training cases: mri 3, ct 12{short}",
        "centralized 1:1:            training cases: mri 3, ct 3",
        f"centralized 1:5:            training cases: mri 3, ct 12{short}",
    ]
    report = (tmp_path / "results.md").read_text()
    assert "    centralized 1:5, seed 2: {'pooled': 15}\n" in report


@pytest.mark.parametrize("with_gin", ["fedgin", "mri-only+gin", "ct-only+gin", "centralized+gin"])
def test_arms_differ_by_gin_alone(with_gin):
    """Each has a twin that trains on the same patches, which GIN does not redraw."""
    plain = {"fedgin": "fl"}.get(with_gin, with_gin.removesuffix("+gin"))
    everyone = hospitals(1)
    sides = [
        make_clients(config(), training, everyone)
        for training in (Training(1, plain, "1:5"), Training(1, with_gin, "1:5", 1.0))
    ]
    assert not ARMS[plain].gin
    assert ARMS[with_gin] == ARMS[plain]._replace(gin=True)
    assert sides[0].keys() == sides[1].keys()
    for name, client in sides[0].items():
        found, redrawn = list(client.batches(1)), list(sides[1][name].batches(1))
        assert client.n_k == sides[1][name].n_k
        drawn = data.generator(1, 1, name, "gin")
        for (images, (labels, _)), (others, (same, _)) in zip(found, redrawn, strict=True):
            assert torch.equal(labels, same)
            assert torch.equal(others, gin(images, generator=drawn))


# ----------------------------------------------------------------------------------- batches, draws


def draw_batches(name="mri", seed=1, p=0.0, round_=1, cases=None, *args):
    cases, training = cases or hospitals(1)[0].train[:2], Training(seed, "fl", "", p)
    client = fedgin.make_client(config(*args), training, name, cases, 3, CPU)
    return list(client.batches(round_))


def test_batches_are_patches_of_the_cases_on_the_device():
    cases = hospitals(1)[0].train[:2]
    found = draw_batches("mri", 1, 0, 1, cases, "--patch", "16", "--batch-size", "3")
    assert len(found) == 3
    for images, (labels, labelled) in found:
        assert (images.shape, images.dtype) == ((3, 1, 16, 16, 16), torch.float32)
        assert (labels.shape, labels.dtype) == ((3, 16, 16, 16), torch.uint8)
        assert labelled is None  # every organ of every image is
    whole = draw_batches(cases=cases)  # phantoms have 32 voxels, like a patch
    for images, (labels, _) in whole:
        for image, label in zip(images, labels, strict=True):
            [volume] = [v for v in volumes(cases) if np.array_equal(v.image, image[0])]
            np.testing.assert_array_equal(volume.labels, label)


def test_batches_say_which_organs_are_labelled():
    known = [v._replace(labelled=np.arange(6) < 3) for v in volumes(hospitals(1)[0].train[:2])]
    cases = [make_case(volume) for volume in known]
    for _, (_, labelled) in draw_batches(cases=cases):
        assert labelled.tolist() == [[True] * 3 + [False] * 3] * 2


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_gin_redraws_images_with_probability_p_and_nothing_else(p):
    cases = hospitals(1)[0].train[:2]
    redrawn = draw_batches("mri", 1, p, 1, cases, "--batch-size", 8)
    plain = data.patches(volumes(cases), 32, 8, 3, data.generator(1, 1, "mri", "patches"))
    layer, changed = GIN(p, generator=data.generator(1, 1, "mri", "gin")), []
    for (found, (labels, _)), (images, target, _) in zip(redrawn, plain, strict=True):
        assert torch.equal(labels, target)
        assert torch.equal(found, layer(images))
        changed += (found != images).flatten(1).any(dim=1).tolist()
    assert len(changed) == 24
    assert sum(changed) == 24 * p if p in (0, 1) else 6 < sum(changed) < 18


def test_validation_and_test_see_the_scans_as_they_are(monkeypatch):
    """Of the arm whose training images are all redrawn; a patch is as large as a phantom."""

    class Network(UNet3D):
        def forward(self, x):
            if not self.training:
                seen.extend(image.numpy().tobytes() for image in x)
            return super().forward(x)

    seen = []
    monkeypatch.setattr(fedgin, "UNet3D", Network)
    everyone, settings = hospitals(1), config("--rounds", 1)
    held_out = validation_cases(1, everyone, ("mri", "ct"))
    clients = make_clients(settings, FEDGIN, everyone)
    [checkpoint] = fedgin.train_arm(settings, FEDGIN, clients, held_out)
    assert set(seen) == {case.image.tobytes() for h in everyone for case in volumes(h.val)}
    seen.clear()
    model = fedgin.make_model(settings, 1, CPU, checkpoint.weights)
    cases = [(hospital, case) for hospital in everyone for case in hospital.test]
    tested = list(fedgin.run_test(settings, model, cases))
    assert [(hospital, case) for hospital, case, _ in tested] == cases
    assert set(seen) == {v.image.tobytes() for v in volumes(case for _, case in cases)}


@pytest.mark.parametrize("p", [0, 1])
def test_batches_depend_on_seed_round_and_hospital_alone(p):
    def first(*args):
        return draw_batches(*args)[0][0]

    same = first("mri", 1, p, 1)
    torch.rand(3)
    assert torch.equal(first("mri", 1, p, 1), same)
    for other in (("mri", 2, p, 1), ("mri", 1, p, 2), ("ct", 1, p, 1)):
        assert not torch.equal(first(*other), same)


def test_draws_depend_on_seed_round_hospital_and_purpose_alone():
    keys = [
        (1, 1, "a", "gin"),
        (2, 1, "a", "gin"),
        (1, 2, "a", "gin"),
        (1, 1, "b", "gin"),
        (1, 1, "a", "x"),
    ]
    draws = [torch.rand(1, generator=data.generator(*key)).item() for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws[0] == torch.rand(1, generator=data.generator(*keys[0])).item()


def test_all_arms_of_a_seed_start_from_the_same_weights():
    before = torch.get_rng_state()
    a, b, other = (fedgin.make_model(config(), seed).state_dict() for seed in (1, 1, 2))
    assert_equal(a, b)
    assert differ(a, other)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert_equal(a, UNet3D(1, 6, 2, 2).state_dict())


def test_the_first_round_starts_from_the_seeds_weights(monkeypatch):
    """In every arm, at every hospital."""
    begun = []

    def train(model, *_, **__):
        begun.append({key: w.clone() for key, w in model.state_dict().items()})
        return 0.5

    monkeypatch.setattr(fedgin, "train_locally", train)
    everyone, settings = hospitals(1), config("--rounds", 1)
    for training in (FL, FEDGIN, Training(1, "mri-only"), Training(1, "centralized+gin", "", 1.0)):
        clients = make_clients(settings, training, everyone)
        list(fedgin.train_arm(settings, training, clients, held_out=[]))
    assert len(begun) == 2 + 2 + 1 + 1
    for found in begun:
        assert_equal(found, fedgin.make_model(settings, 1).state_dict())


def train_arm(settings, training, start=None):
    """Train an arm at the phantoms' hospitals, from its checkpoint."""
    everyone = hospitals(training.seed)
    modalities = ARMS[training.arm].modalities
    held_out = validation_cases(training.seed, everyone, modalities)
    clients = make_clients(settings, training, everyone)
    return fedgin.train_arm(settings, training, clients, held_out, checkpoint=start)


def perfect(config, model, cases, modalities):
    """What validate gives where every organ of a case is found."""
    ones = torch.ones(len(modalities), len(config.organs), dtype=torch.float64)
    return ones, ones


def test_the_learning_rate_falls_by_a_polynomial(monkeypatch):
    rates = []

    def train(model, batches, loss_function, lr, autocast):
        rates.append(lr)
        return 0.5

    monkeypatch.setattr(fedgin, "train_locally", train)
    monkeypatch.setattr(fedgin, "validate", perfect)
    list(train_arm(config("--rounds", 10, "--lr", 0.02), FL))
    assert rates[::2] == rates[1::2]  # both hospitals'
    assert rates[::2] == pytest.approx([0.02 * (1 - t / 10) ** 0.9 for t in range(10)])


@pytest.mark.parametrize(
    ("losses", "explodes"), [((27.9, 27.9), False), ((0.1, 28.0), True), ((28.0, 0.1), True)]
)
def test_a_loss_ten_times_that_of_chance_is_refused(losses, explodes, monkeypatch):
    """Of equal probabilities it is ln 6 + 1 = 2.79 with five organs, and Dice next to nothing."""
    found = itertools.cycle(losses)
    monkeypatch.setattr(fedgin, "train_locally", lambda *_, **__: next(found))
    monkeypatch.setattr(fedgin, "validate", perfect)
    trained = train_arm(config(), FL)
    if explodes:
        with pytest.raises(
            FloatingPointError, match="loss exploded .*'mri': .*; a lower --lr"
        ) as error:
            next(trained)
        assert error.value.__notes__ == ["round 1"]
    else:
        assert [checkpoint.round for checkpoint in trained] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("training", [Training(1, "fl"), Training(1, "fedgin", "", 1.0)])
def test_training_learns(training):
    """Livers, in five rounds: validation Dice from a tenth to about a half, and less loss."""
    everyone = [
        h._replace(train=h.train[:4], val=h.val[:2]) for h in hospitals(1, "--organs", "liver")
    ]
    args = ["--organs", "liver", "--scenario", "complete", "--width", 4, "--depth", 3]
    settings = config(*args, "--rounds", 5, "--local-steps", 10, "--lr", 0.01)
    both = ("mri", "ct")
    cases = validation_cases(1, everyone, both)
    model = fedgin.make_model(settings, 1)
    untrained = fedgin.mean_dice(*fedgin.validate(settings, model, cases, both), both)
    clients = make_clients(settings, training, everyone)
    *_, checkpoint = fedgin.train_arm(settings, training, clients, cases)
    losses = [np.mean(list(done.losses.values())) for done in checkpoint.history]
    assert losses[-1] < 0.75 * losses[0]
    for modality, more in (("mri", 0.2), ("ct", 0.3)):
        found = [done.val_dice[modality] for done in checkpoint.history]
        assert max(found) > untrained[modality] + more


# ----------------------------------------------------------------------------------------- the loss


def test_organs_are_renumbered():
    [mri, _] = hospitals(5, "--organs", "spleen", "liver")
    labels = make_phantom(5, "mri", 0)[1]
    [found] = volumes(mri.train[:1])
    np.testing.assert_array_equal(found.labels == 1, labels == 3)
    np.testing.assert_array_equal(found.labels == 2, labels == 1)


def make_case(volume):
    what = volume.id, volume.modality, volume.counts, volume.labelled
    return PreparedCase(*what, lambda: volume, lambda: (volume.labels, (1.0, 1.0, 1.0)))


def small_case(labels, labelled, modality="mri", image=None):
    image = labels.astype(np.float32) if image is None else image
    return make_case(data.make_volume("x", modality, image, labels, np.array(labelled)))


def test_class_weights_and_loss_by_hand():
    """Weights 1 / √share, cross-entropy normalized by them, soft Dice of only the organs."""
    labels = np.zeros((2, 2, 4), np.uint8)
    labels[0, 0] = 1  # a share of 4 in 16
    settings = config("--organs", "liver", "--scenario", "complete")
    hospital = Hospital("mri", "mri", [small_case(labels, [True] * 2)], [], [])
    loss = make_clients(settings, Training(1, "mri-only"), [hospital])["mri"].loss_function
    logits = torch.randn(1, 2, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    p = torch.softmax(logits, 1)[0]
    weight = {0: (16 / 12) ** 0.5, 1: (16 / 4) ** 0.5}
    total, norm, overlap = 0.0, 0.0, 0.0
    for index in np.ndindex(labels.shape):
        label = int(labels[index])
        total -= weight[label] * float(p[(label, *index)].log())
        norm += weight[label]
        overlap += float(p[(1, *index)]) * (label == 1)
    soft_dice = (2 * overlap + 1) / (float(p[1].sum()) + 4 + 1)
    expected = total / norm + 1 - soft_dice
    target = torch.tensor(labels)[None].long()
    assert loss(logits, (target, None)).item() == pytest.approx(expected, rel=1e-5)
    everything = torch.ones(1, 2, dtype=torch.bool)
    assert loss(logits, (target, everything)).item() == pytest.approx(expected, rel=1e-5)


def test_a_pools_weights_are_those_of_all_its_cases():
    labels = [np.full((2, 2, 2), value, np.uint8) for value in (0, 0, 0, 1)]
    cases = [small_case(array, [True] * 2) for array in labels]
    settings = config("--organs", "liver", "--scenario", "complete")
    pair = [Hospital("a", "mri", cases[:2], [], []), Hospital("b", "ct", cases[2:], [], [])]

    def weight(arm):
        clients = make_clients(settings, Training(1, arm), pair)
        return {k: c.loss_function.keywords["weight"].tolist() for k, c in clients.items()}

    assert weight("centralized")["pooled"] == pytest.approx([24**-0.5, 8**-0.5])
    assert weight("fl")["a"] == pytest.approx([16**-0.5, 1.0])  # an organ it lacks: as if 1 voxel
    assert weight("fl")["b"] == pytest.approx([8**-0.5, 8**-0.5])


def plain_loss(logits, labels, labelled, weight):
    """Image by image: what a hospital does not label is background, in the network's answer too."""
    classes, total, norm = range(1, logits.shape[1]), 0, 0
    soft = {n: [0, 0] for n in classes if any(known[n] for known in labelled)}
    for image, target, known in zip(logits, labels, labelled, strict=True):
        p = image.exp() / image.exp().sum(0)
        p = {n: p[n] for n in classes if known[n]} | {
            0: p[0] + sum(p[n] for n in classes if not known[n])
        }
        for n, share in p.items():
            here = target == n
            total = total - weight[n] * share[here].log().sum()
            norm += weight[n] * here.sum()
            if n:
                soft[n][0] += 2 * share[here].sum()
                soft[n][1] += share.sum() + here.sum()
    return total / norm + 1 - sum((a + 1) / (b + 1) for a, b in soft.values()) / len(soft)


@pytest.mark.parametrize(
    "known", [["1111", "1111"], ["1111", "1010"], ["1110", "1010"], ["1100", "1100"]]
)
def test_a_pool_may_mix_what_its_hospitals_label(known):
    """Loss and gradient of a batch of both hospitals; an organ that neither labels is left out."""
    rng, pair = np.random.default_rng(0), []
    for name, flags in zip("ab", known, strict=True):
        labelled = [flag == "1" for flag in flags]
        labels = rng.integers(0, 4, (4, 4, 4)).astype(np.uint8)
        labels[~np.array(labelled)[labels]] = 0
        pair.append(
            Hospital(name, {"a": "mri", "b": "ct"}[name], [small_case(labels, labelled)], [], [])
        )
    args = ["--organs", "liver", "spleen", "pancreas", "--scenario", "complete", "--depth", 1]
    args += ["--patch", 4, "--batch-size", 4]
    clients = make_clients(config(*args), Training(1, "centralized"), pair)
    counts = sum(hospital.train[0].counts for hospital in pair)
    weight = 1 / np.sqrt(np.maximum(counts, 1))
    mixed = False
    for images, (labels, labelled) in clients["pooled"].batches(1):
        everything = torch.ones(len(images), 4, dtype=torch.bool)
        flags = everything if labelled is None else labelled
        mixed |= len(set(map(tuple, flags.tolist()))) == len(set(known))
        logits = torch.randn(4, 4, 4, 4, 4, generator=torch.Generator().manual_seed(2))
        logits.requires_grad_()
        loss = clients["pooled"].loss_function(logits, (labels, labelled))
        precise = logits.detach().double().requires_grad_()
        expected = plain_loss(precise, labels, flags, weight)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        gradients = (
            torch.autograd.grad(x, y)[0].double() for x, y in ((loss, logits), (expected, precise))
        )
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    assert mixed


# ------------------------------------------------------------------------- validation, best weights


def labels_of(*organs):
    labels = np.zeros((32, 32, 32), np.uint8)
    for n, organ in enumerate(organs):
        labels[4 * n : 4 * n + 4] = organ
    return labels


@pytest.fixture
def halved(monkeypatch):
    """Let the network predict the image, in which cases have their labels, and half of organ 2."""

    def segment(model, image, patch, size):
        prediction = image.astype(np.uint8)
        prediction[:, :16][prediction[:, :16] == 2] = 0
        return prediction

    monkeypatch.setattr(fedgin, "segment", segment)


def test_validation_is_the_mean_over_organs_of_the_means_over_cases(halved):
    """Dice is 1 for livers, 2 / 3 for halved spleens; training cases stand in for no validation."""
    settings = config("--organs", "liver", "spleen", "pancreas")
    known = [True] * 4
    both, liver = small_case(labels_of(1, 2), known), small_case(labels_of(1), known)
    nothing = small_case(labels_of(), known)
    false_alarm = small_case(labels_of(1), known, image=labels_of(1, 3).astype(np.float32))
    mri = Hospital("a", "mri", [nothing], [both, liver], [])
    more = Hospital("b", "mri", [false_alarm], [], [])
    ct_case = small_case(labels_of(), known, "ct")
    ct = Hospital("d", "ct", [], [ct_case], [])
    cases = validation_cases(1, [mri, more, ct], ("mri", "ct"))
    sums, counts = fedgin.validate(settings, nn.Identity(), cases, ("mri", "ct"))
    assert sums.tolist() == [[3, pytest.approx(2 / 3, rel=1e-12), 0], [0, 0, 0]]
    assert counts.tolist() == [[3, 1, 0], [0, 0, 0]]
    assert sums.dtype == counts.dtype == torch.float64
    means = fedgin.mean_dice(sums, counts, ("mri", "ct"))
    assert means["mri"] == pytest.approx((1 + 2 / 3) / 2)
    assert math.isnan(means["ct"])
    only_ct = fedgin.validate(settings, nn.Identity(), [ct_case], ("ct",))
    assert [part.tolist() for part in only_ct] == [[[0, 0, 0]], [[0, 0, 0]]]


def test_a_false_positive_does_not_make_an_organ_scorable(monkeypatch):
    settings = config("--organs", "liver")
    full, empty = (np.full((4, 4, 4), value, np.uint8) for value in (1, 0))
    known = [True, True]
    cases = [
        small_case(empty, known),
        small_case(full, known, "ct"),
        small_case(empty, known, "ct"),
    ]
    for prediction in (0, 1):
        monkeypatch.setattr(
            fedgin, "segment", lambda *_, p=prediction: np.full((4, 4, 4), p, np.uint8)
        )
        sums, counts = fedgin.validate(settings, None, cases, ["mri", "ct"])
        found = fedgin.mean_dice(sums, counts, ["mri", "ct"])
        assert math.isnan(found["mri"])
        assert found["ct"] == prediction


def keep_rounds(dices, losses):
    """The checkpoints of a training whose weights are the number of their round."""
    model, checkpoints = nn.Linear(1, 1, bias=False), [Checkpoint()]
    for round_, val_dice in enumerate(dices, start=1):
        nn.init.constant_(model.weight, round_)
        done = Round(round_, losses, val_dice, round_ / 8)
        checkpoints.append(fedgin.keep_round(checkpoints[-1], model, done))
    return checkpoints


def test_the_best_weights_are_those_of_the_best_mean_over_modalities():
    dices = [(0.1, 0.3), (0.4, 0.2), (0.2, 0.4), (0.1, 0.49), (0.5, 0.0)]
    dices = [{"mri": mri, "ct": ct} for mri, ct in dices]
    losses = {"mri": 1.0, "ct": 2.0}
    kept = keep_rounds(dices, losses)
    assert [checkpoint.round for checkpoint in kept] == [0, 1, 2, 3, 4, 5]
    assert [checkpoint.weights["weight"].item() for checkpoint in kept[1:]] == [1, 2, 3, 4, 5]
    assert [checkpoint.best_round for checkpoint in kept] == [0, 1, 2, 2, 2, 2]
    assert kept[-1].best_dice == pytest.approx(0.3)
    assert kept[-1].best_weights["weight"].item() == 2
    assert kept[-1].history == tuple(
        Round(n, losses, val_dice, n / 8) for n, val_dice in enumerate(dices, start=1)
    )
    assert kept[2].history == kept[-1].history[:2]
    [_, alone] = keep_rounds([{"ct": 0.5}], {"ct": 0.5})
    assert alone.history == (Round(1, {"ct": 0.5}, {"ct": 0.5}, 1 / 8),)
    assert alone.best_dice == 0.5


def test_a_round_without_validation_keeps_the_best_weights_so_far():
    dices = [{}, {"mri": 0.4}, {}, {"mri": math.nan}, {}]
    kept = keep_rounds(dices, {"mri": 1.0})
    assert [checkpoint.best_round for checkpoint in kept] == [0, 0, 2, 2, 4, 4]
    assert kept[1].best_weights is None
    assert [done.val_dice for done in kept[3].history] == [{}, {"mri": 0.4}, {}]


def test_validation_comes_every_few_rounds_and_after_the_last(monkeypatch):
    monkeypatch.setattr(fedgin, "train_locally", lambda *_, **__: 0.5)
    monkeypatch.setattr(fedgin, "validate", perfect)
    *_, checkpoint = train_arm(config("--rounds", 8, "--val-every", 3), FL)
    validated = {done.round: done.val_dice for done in checkpoint.history if done.val_dice}
    assert validated == {n: {"mri": 1.0, "ct": 1.0} for n in (3, 6, 8)}
    assert all(config("--rounds", 8).is_validated(n) for n in range(1, 9))


def test_a_modality_that_cannot_be_validated_does_not_count():
    dices = [{"mri": mri, "ct": math.nan} for mri in (0.2, 0.4, 0.3)]
    assert keep_rounds(dices, {"mri": 1.0})[-1].best_round == 2
    assert keep_rounds([{"mri": math.nan}] * 3, {"mri": 1.0})[-1].best_round == 3


@pytest.mark.slow
def test_an_arm_goes_on_in_the_round_in_which_it_stopped():
    settings = config("--rounds", 4)
    whole = list(train_arm(settings, FEDGIN))
    assert [checkpoint.round for checkpoint in whole] == [1, 2, 3, 4]
    again = list(train_arm(settings, FEDGIN, start=whole[1]))
    assert [checkpoint.round for checkpoint in again] == [3, 4]
    assert_equal(again[-1].weights, whole[-1].weights)
    assert_equal(again[-1].best_weights, whole[-1].best_weights)
    timeless = [
        [(done.round, done.losses, done.val_dice) for done in checkpoint.history]
        for checkpoint in (again[-1], whole[-1])
    ]
    assert timeless[0] == timeless[1]
    assert list(train_arm(settings, FEDGIN, start=whole[-1])) == []


# --------------------------------------------------------------------------------------- real scans


def test_a_run_on_folders(tmp_path, ct_folder, mri_folder, capsys):
    args = ["--ct", ct_folder, "--mri", mri_folder, "--spacing", 12, "--out", tmp_path / "out"]
    assert command(*args, "--arms", "fedgin", "mri-only") == 0
    shown = capsys.readouterr().out
    assert "PHANTOM" not in shown
    found = rows_of(tmp_path / "out/scores.csv")
    assert {(r["hospital"], r["case"]) for r in found if r["modality"] == "ct"} == {
        ("ct_set", "s0003")
    }
    cases = json.loads((tmp_path / "out/cases-seed42.json").read_text())
    splits = {case: split.split()[0] for case, split in cases.items() if case.startswith("ct_set")}
    assert splits == {
        "ct_set ct s0000": "train",
        "ct_set ct s0001": "train",
        "ct_set ct s0002": "val",
        "ct_set ct s0003": "test",
    }


def test_a_test_folder_is_only_tested_on(tmp_path, ct_folder, mri_folder):
    held_out = write_totalsegmentator(tmp_path / "held_out", "mri", 2, seed=9)
    args = ["--ct", ct_folder, "--mri", mri_folder, "--test", held_out, "--spacing", 12]
    assert command(*args, "--arms", "fl", "--out", tmp_path / "out") == 0
    found = rows_of(tmp_path / "out/scores.csv")
    assert {row["scanner"] for row in found} == {"unseen"}
    assert {(r["hospital"], r["case"]) for r in found} == {
        ("held_out", "s0000"),
        ("held_out", "s0001"),
    }
    cases = json.loads((tmp_path / "out/cases-seed42.json").read_text())
    tested = {case for case, split in cases.items() if split.startswith("test")}
    assert tested == {case for case in cases if case.startswith("held_out")}


def test_what_is_left_out_is_listed_a_line_each(tmp_path, ct_folder, mri_folder, capsys):
    shutil.copytree(mri_folder, tmp_path / "mri")
    for name in ("case_001", "case_002"):
        truncate(tmp_path / f"mri/imagesTr/{name}_0000.nii.gz")
    args = ["--ct", ct_folder, "--mri", tmp_path / "mri", "--spacing", 12, "--arms", "fl"]
    assert command(*args, "--skip-bad", "--rounds", 1, "--out", tmp_path / "out") == 0
    lines = capsys.readouterr().out.splitlines()
    left_out = [line for line in lines if line.startswith("left out: ")]
    assert [Path(line.split(": ")[1]).name for line in left_out] == [
        "case_001_0000.nii.gz",
        "case_002_0000.nii.gz",
    ]
    assert any(
        line.startswith("fl 1:5:  ") and "mri 2, ct_set 2 (WARNING: not 1:5" in line
        for line in lines
    )


# ---------------------------------------------------------------------------------------- bad input


def test_a_folder_that_is_not_there_takes_one_line_and_exit_code_2(tmp_path, capsys):
    assert command("--ct", "nowhere", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "nowhere: no such folder" in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_bad_scans_take_one_line_and_leave_nothing(tmp_path, ct_folder, capsys):
    mri = write_totalsegmentator(tmp_path / "mri", "mri", 3)
    truncate(mri / "s0001/segmentations/spleen.nii.gz")
    assert command("--ct", ct_folder, "--mri", mri, "--out", tmp_path / "out") == 2
    assert "s0001/segmentations/spleen.nii.gz: cannot be read" in capsys.readouterr().err
    few = write_nnunet(tmp_path / "few", "mri", 3, labels={"background": 0, "liver": 1})
    assert command("--ct", ct_folder, "--mri", few, "--out", tmp_path / "out") == 2
    assert "--organs liver" in capsys.readouterr().err
    assert command("--ct", ct_folder, "--out", tmp_path / "out") == 2
    assert "there are no MRI training cases, and an arm needs some" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_diverging_run_ends_with_exit_code_1(tmp_path, capsys):
    assert command("--lr", 1e30, "--arms", "fl", "--out", tmp_path / "out") == 1
    shown = capsys.readouterr()
    failed = "fl 1:5, seed 42: round 1, hospital mri: "
    assert f"FAILED: {failed}" in shown.err
    assert shown.out.splitlines()[-1].startswith(failed)
    assert "; NOT FINISHED: 1 of the trainings" in (tmp_path / "out/results.md").read_text()


def test_a_bug_in_the_network_is_not_swallowed(tmp_path, monkeypatch, capsys):
    def forward(self, x):
        raise AttributeError("no such layer")

    monkeypatch.setattr(UNet3D, "forward", forward)
    with pytest.raises(AttributeError, match="no such layer") as caught:
        command("--arms", "fl", "--out", tmp_path / "out")
    assert caught.value.__notes__ == ["round 1, hospital mri", "fl 1:5, seed 42"]
    shown = capsys.readouterr()
    assert "FAILED" not in shown.err
    assert "the run failed" not in shown.err
    assert "Test Dice" not in shown.out


@pytest.mark.slow
def test_a_bug_ends_the_program_with_its_traceback_and_notes(tmp_path):
    """As after a change to a line of the method, here of the loss."""
    changed = "import sys, fedgin; fedgin.segmentation_loss = lambda logits, targets, weight: "
    changed += "logits.no_such_method(); sys.exit(fedgin.main(sys.argv[1:]))"
    args = [*flags(), "--arms", "mri-only", "fl", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", changed, *args], cwd=tiny.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-3:] == [
        "AttributeError: 'Tensor' object has no attribute 'no_such_method'",
        "round 1, hospital mri",
        "mri-only, seed 42",
    ]
    assert "fl 1:5, seed 42" not in done.stderr  # the next training is not taken
    assert not list((tmp_path / "out").glob("fl-*"))


# ------------------------------------------------------------------------------------------- faults


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Two hospitals, and what an undisturbed run over them ends in."""
    root = tmp_path_factory.mktemp("scans")
    for modality in ("ct", "mri"):
        write_totalsegmentator(root / modality, modality, 4)
    args = ["--ct", root / "ct", "--mri", root / "mri", "--spacing", 12, "--mri-cases", 1]
    assert tiny.command(*args, "--out", root / "calm", "--cache", root / "calm-cache") == 0
    return args, root / "calm"


class After:
    """Let the n-th .pt file that is written (a checkpoint per round) be followed by a fault."""

    def __init__(self, monkeypatch, n, action):
        self.calls, write = 0, files.write

        def counting(path, content):
            write(path, content)
            self.calls += path.suffix == ".pt"
            if self.calls == n and path.suffix == ".pt":
                action()

        monkeypatch.setattr(files, "write", counting)


def fails_then_goes_on(args, calm, tmp_path, capsys, message, repair=lambda: None):
    """The first training fails as foreseen, with a line that has all parts of the message."""
    args = [*args, "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    assert tiny.command(*args) == 1
    shown = capsys.readouterr()
    line = next(x for x in shown.err.splitlines() if x.startswith("FAILED: ") or "run failed" in x)
    assert "Traceback" not in shown.err
    for part in message:
        assert part in line
    repair()
    assert tiny.command(*args) == 0
    assert_same(outcome(calm), outcome(tmp_path / "out"))


def cached(tmp_path, name):
    return sorted((tmp_path / "cache").glob(f"*/{name}.npy"))


@pytest.mark.slow
def test_a_file_that_turns_unreadable(scans, tmp_path, monkeypatch, capsys):
    """The preprocessed scans are truncated after round 3: the hospital at work names its case."""
    args, calm = scans
    copies = tmp_path / "copies"

    def spoil():
        shutil.copytree(tmp_path / "cache", copies)
        for path in cached(tmp_path, "image"):
            truncate(path)

    def repair():
        shutil.rmtree(tmp_path / "cache")
        shutil.copytree(copies, tmp_path / "cache")

    After(monkeypatch, 3, spoil)
    message = ["fl 1:5, seed 42: ", "round 4", "hospital mri", f"{tmp_path}/cache/"]
    fails_then_goes_on(args, calm, tmp_path, capsys, message, repair)


@pytest.mark.slow
def test_a_poisoned_volume(scans, tmp_path, monkeypatch, capsys):
    args, calm = scans
    good = {}

    def poison():
        for path in cached(tmp_path, "image"):
            good[path] = path.read_bytes()
            np.save(path, np.full_like(np.load(path), np.nan))

    def repair():
        for path, content in good.items():
            path.write_bytes(content)

    After(monkeypatch, 2, poison)
    message = ["fl 1:5, seed 42: ", "round 3", "hospital mri", "case s000", "NaN"]
    fails_then_goes_on(args, calm, tmp_path, capsys, message, repair)


@pytest.mark.slow
def test_a_scan_that_is_gone_when_it_is_tested(scans, tmp_path, monkeypatch, capsys):
    args, calm = scans
    kept = {path: path.read_bytes() for path in sorted(args[1].parent.rglob("liver.nii.gz"))}
    assert len(kept) == 8

    def spoil():
        """The labels that were kept for the test, and the files that they were read from."""
        for path in [*(tmp_path / "cache").rglob("target.npz"), *kept]:
            truncate(path)

    def restore():
        for path, content in kept.items():
            path.write_bytes(content)

    def repair():
        """As the message says: the entries are made again, for which the scans must be intact."""
        for path in list((tmp_path / "cache").rglob("target.npz")):
            shutil.rmtree(path.parent)
        where = ["--out", tmp_path / "out", "--cache", tmp_path / "cache"]
        assert tiny.command(*args, *where) == 2
        assert "liver.nii.gz: cannot be read" in capsys.readouterr().err
        restore()

    After(monkeypatch, 5, spoil)  # 4 rounds and the arm's model
    message = ["fl 1:5, seed 42: ", f"{tmp_path}/cache/", "cannot be read"]
    try:
        fails_then_goes_on(args, calm, tmp_path, capsys, message, repair)
    finally:
        restore()


@pytest.mark.slow
def test_a_full_disk(scans, tmp_path, monkeypatch, capsys):
    args, calm = scans
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    def repair():
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    After(monkeypatch, 2, full)
    try:
        message = ["fl 1:5, seed 42: ", "File too large"]
        fails_then_goes_on(args, calm, tmp_path, capsys, message, repair)
    finally:
        repair()


@pytest.mark.slow
def test_a_full_disk_while_preprocessing(scans, tmp_path, capsys):
    args, calm = scans
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    args = [*args, "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        assert tiny.command(*args) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the run failed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert tiny.command(*args) == 0
    assert_same(outcome(calm), outcome(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda x: torch.empty(2**62, dtype=torch.int8), ["hospital mri: ", "allocate"]),
        (lambda x: x * float("nan"), ["hospital mri: the loss is nan"]),
        (lambda x: x * float("inf"), ["hospital mri: the loss is"]),
        (lambda x: 1e6 * x, ["the loss exploded ({'mri': ", "; a lower --lr may help"]),
    ],
    ids=["memory", "NaN", "infinite", "exploding"],
)
def test_memory_and_losses(broken, message, scans, tmp_path, monkeypatch, capsys):
    """Out of memory, NaN, infinite and exploding losses in the network itself, from round 3 on."""
    args, calm = scans
    forward, sick = UNet3D.forward, []

    def sometimes(self, x):
        logits = forward(self, x)
        return broken(logits) if sick and self.training else logits

    monkeypatch.setattr(UNet3D, "forward", sometimes)
    After(monkeypatch, 2, lambda: sick.append(True))
    message = ["fl 1:5, seed 42: ", "round 3", *message]
    fails_then_goes_on(args, calm, tmp_path, capsys, message, sick.clear)


# -------------------------------------------------------------------------------------- determinism


@pytest.mark.slow
def test_more_arms_and_more_threads_change_nothing_in_the_others(tmp_path, monkeypatch):
    for modality in ("ct", "mri"):
        write_totalsegmentator(tmp_path / modality, modality, 8)
    args = ["--ct", tmp_path / "ct", "--mri", tmp_path / "mri", "--spacing", 12]
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0})
    assert tiny.command(*args, "--out", tmp_path / "one/out") == 0
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1, 2})
    arms = ["--arms", "mri-only", "centralized+gin", "fedgin"]
    assert tiny.command(*args, "--out", tmp_path / "two/out", *arms) == 0
    a, b = (
        torch.load(tmp_path / x / "out/fedgin-1-5-p1-seed42/model.pt", weights_only=True)
        for x in ("one", "two")
    )
    assert_equal(a["weights"], b["weights"])
    assert (a["best_round"], a["best_dice"]) == (b["best_round"], b["best_dice"])
