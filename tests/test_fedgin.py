"""Runs as a user meets them: who trains on what, the loss by hand, faults, the same bits again."""

import csv
import functools
import itertools
import json
import math
import re
import resource
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from conftest import truncate, write_nnunet, write_totalsegmentator
from tiny import assert_same, outcome
from torch import nn

import data
import fedgin
import predict
import resources
import results
from arms import ARMS, label_arms
from config import Config
from evaluate import dice, score_case
from gin import GIN, gin
from hospitals import Hospital, load_hospitals, validation_cases
from phantom import SPACING, phantom
from unet3d import UNet3D

TINY = ["--rounds", "2", "--local-steps", "2", "--batch-size", "2"]
TINY += ["--gin-probability", "1"]
TINY += ["--patch", "32", "--width", "2", "--depth", "2"]
CPU = torch.device("cpu")


def command(*args):
    return fedgin.main([*TINY, *map(str, args)])


def config(*args):
    return fedgin.parse([*TINY, *map(str, args)])


def hospitals(seed, *args):
    by_seed, notes = load_hospitals(config("--seeds", seed, *args))
    assert notes == []
    return [hospital for hospital in by_seed[seed] if hospital.modality]


def arm(label, *args):
    return label_arms(config("--ratios", "1:1", "1:2", "1:5", "all", *args))[label]


def weights(path):
    return torch.load(path, weights_only=True)["weights"]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def differ(a, b):
    return any(not torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def phantom_run(tmp_path_factory):
    """Arms of each kind on phantoms, two ratios, two seeds."""
    out = tmp_path_factory.mktemp("run") / "results"
    args = [
        "--arms",
        "mri-only",
        "fedgin",
        "--ratios",
        "1:1",
        "all",
        "--seeds",
        "1",
        "2",
        "--out",
        out,
    ]
    assert command(*args) == 0
    return out


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(phantom_run):
    names = sorted(path.name for path in phantom_run.iterdir())
    arms = {"mri-only", "fedgin 1:1 p=1", "fedgin all p=1"}
    models = {
        f"{name}-seed{n}.pt"
        for name in ("mri-only", "fedgin-1-1-p1", "fedgin-all-p1")
        for n in (1, 2)
    }
    left = {"config.json", "history.csv", "hospitals", "lock", "results.json", "results.md"}
    assert set(names) == models | left | {"scores.csv"}
    saved = json.loads((phantom_run / "config.json").read_text())
    assert saved["seeds"] == [1, 2]
    ct = json.loads((phantom_run / "hospitals/ct.json").read_text())
    assert len(ct["splits"]["1"]["train"]) == 12
    done = json.loads((phantom_run / "results.json").read_text())
    assert {r["arm"] for r in done["results"]} == arms
    # arms, seeds, modalities, test cases of hospitals and of another scanner
    assert len(done["results"]) == 3 * 2 * 2 * (8 + 8)
    assert sorted(done["finished"]) == sorted([seed, arm] for seed in (1, 2) for arm in arms)
    report = (phantom_run / "results.md").read_text()
    assert "PHANTOMS" in report.splitlines()[0]
    assert "| fedgin 1:1 p=1 " in report
    assert "### Scanners of others: other-scanner" in report
    with (phantom_run / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 2  # arms, seeds, rounds
    assert {row["round"] for row in rows} == {"1", "2"}
    assert all(np.isfinite(float(row["loss"])) for row in rows)
    assert all((row["val_dice_ct"] == "") == row["arm"].startswith("mri") for row in rows)
    assert all((row["loss ct"] == "") == row["arm"].startswith("mri") for row in rows)
    for row, kept in zip(rows, done["history"], strict=True):
        assert {key: value for key, value in row.items() if value} == {
            key: str(value) for key, value in kept.items() if value != ""
        }
        hospitals = [kept[key] for key in ("loss mri", "loss ct") if key in kept]
        assert kept["loss"] == pytest.approx(np.mean(hospitals))
        assert 0 < kept["seconds"] < 100


@pytest.mark.slow
def test_a_model_gives_the_results_back(phantom_run):
    model, about = predict.load_model(phantom_run / "fedgin-1-1-p1-seed2.pt", CPU)
    case = hospitals(2)[0].test[0]
    labels = predict.segment(model, case.image, about["patch"], case.labels.shape)
    [saved] = [
        r["scores"]
        for r in json.loads((phantom_run / "results.json").read_text())["results"]
        if (r["arm"], r["seed"], r["hospital"], r["case"]) == ("fedgin 1:1 p=1", 2, "mri", case.id)
    ]
    spacing = (SPACING,) * 3
    assert score_case(labels, case.labels, about["organs"], spacing, tolerance=SPACING) == saved


@pytest.mark.slow
def test_a_model_is_that_of_the_round_with_the_best_validation(phantom_run):
    """Its validation Dice, computed anew, is the highest in the history of its training."""
    saved = torch.load(phantom_run / "mri-only-seed1.pt", weights_only=True)
    history = json.loads((phantom_run / "results.json").read_text())["history"]
    dices = {
        row["round"]: row["val_dice_mri"]
        for row in history
        if (row["seed"], row["arm"]) == (1, "mri-only")
    }
    assert saved["val_dice"] == max(dices.values()) == dices[saved["round"]]
    model, about = predict.load_model(phantom_run / "mri-only-seed1.pt", CPU)
    by_organ = {organ: [] for organ in range(1, 6)}
    for case in hospitals(1)[0].val:
        labels = predict.segment(model, case.image, about["patch"], case.labels.shape)
        for organ, found in by_organ.items():
            found.append(dice(labels == organ, case.labels == organ))
    assert np.mean([np.mean(found) for found in by_organ.values()]) == pytest.approx(
        saved["val_dice"], abs=1e-9
    )


@pytest.mark.slow
def test_pictures_of_a_run(phantom_run, tmp_path):
    figures = runpy.run_path(str(Path(fedgin.__file__).parent / "docs/figures.py"))
    figures["main"]([str(phantom_run), "--out", str(tmp_path)])
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"validation.png", "predictions.png", "ratios.png"}
    assert all(5_000 < size < 300_000 for size in sizes.values())


@pytest.mark.slow
def test_the_same_command_twice_is_bit_identical(tmp_path):
    for name in ("a", "b"):
        assert command("--out", tmp_path / name, "--rounds", 1, "--arms", "fl", "fedgin") == 0
    assert_same(*(outcome(tmp_path / name) for name in "ab"))
    fl, fedgin = (weights(tmp_path / "a" / f"{n}-seed42.pt") for n in ("fl-1-5", "fedgin-1-5-p1"))
    assert differ(fl, fedgin)


@pytest.fixture
def quick(monkeypatch):
    """Training that moves the head by the learning rate, and a threshold instead of the network."""

    training = SimpleNamespace(rates=[], fails_at=0)

    def train(model, batches, loss_function, lr, autocast):
        training.rates.append(lr)
        if len(training.rates) == training.fails_at:
            raise OSError("the disk is gone")
        with torch.no_grad():
            model.head.bias += lr
        return lr

    monkeypatch.setattr(fedgin, "train_locally", train)
    monkeypatch.setattr(fedgin, "segment", lambda model, image, *_: (image > 0).astype(np.uint8))
    return training


def test_a_run_goes_on_where_it_stopped_and_is_never_begun_anew(
    tmp_path, quick, monkeypatch, capsys
):
    args = ["--arms", "fl", "mri-only", "--rounds", 3, "--seeds", 1, "--out"]
    assert command(*args, tmp_path / "calm") == 0
    assert len(quick.rates) == 3 * 2 + 3
    shown = capsys.readouterr()
    assert "FedGIN on PHANTOMS" in shown.out
    assert "ct: 12 cases to train, 4 to validate, 8 to test" in shown.out
    assert "no validation case holds an organ" not in shown.out
    assert shown.out.endswith(f"Everything is in {tmp_path}/calm/\n")
    lines = shown.err.splitlines()
    assert len(lines) == 3 + 3
    line = r"arm 1 of 2 \(fl 1:5\), round 3 of 3: loss 0.00, MRI 0\.\d\d, CT 0\.\d\d; 00:\d\d left"
    assert re.fullmatch(line, lines[2])
    assert re.fullmatch(
        r"arm 2 of 2 \(mri-only\), round 1 of 3: loss 0.00, MRI 0\.\d\d; .*", lines[3]
    )

    quick.rates.clear()
    quick.fails_at = 8
    assert command(*args, tmp_path / "out") == 1
    message = "seed 1, arm mri-only: round 2, hospital mri: the disk is gone"
    assert message in capsys.readouterr().err
    quick.rates.clear()
    quick.fails_at = 0
    assert command(*args, tmp_path / "out", "--resume") == 0
    assert len(quick.rates) == 2
    [line, _] = capsys.readouterr().err.splitlines()
    assert line.startswith("arm 2 of 2 (mri-only), round 2 of 3: ")
    assert_same(outcome(tmp_path / "calm"), outcome(tmp_path / "out"))

    monkeypatch.setattr(fedgin, "load_hospitals", lambda _: pytest.fail("scans are read"))
    assert command(*args, tmp_path / "out") == 2
    assert "holds a run; --resume continues or extends it" in capsys.readouterr().err


def test_a_run_says_that_nothing_could_be_validated(tmp_path, quick, monkeypatch, capsys):
    monkeypatch.setattr(fedgin, "validate", lambda *_: torch.zeros(2, 1, 5))
    assert command("--arms", "mri-only", "--rounds", 3, "--out", tmp_path) == 0
    assert "mri-only: no validation case holds an organ; the last" in capsys.readouterr().err
    assert torch.load(tmp_path / "mri-only-seed42.pt", weights_only=True)["round"] == 3


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
    assert "seed 42, arm mri-only: the disk is gone" in capsys.readouterr().err
    scored[:] = [None] * 20
    assert command(*args, tmp_path / "out", "--resume") == 0
    assert len(scored) == 20 + (8 + 8 + 16) - 10  # test cases of mri, ct and the other scanner
    assert_same(outcome(tmp_path / "calm"), outcome(tmp_path / "out"))


def test_a_finished_run_is_extended_and_trains_nothing_twice(tmp_path, quick, capsys):
    args = ["--rounds", 2, "--out"]
    assert command(*args, tmp_path / "a", "--arms", "fl", "--seeds", 1) == 0
    assert command(*args, tmp_path / "a", "--arms", "fl", "--seeds", 1, 2, "--resume") == 0
    ratios = ["--ratios", "1:5", "all"]
    more = ["--arms", "fl", "fedgin", "--seeds", 1, 2, *ratios]
    assert command(*args, tmp_path / "a", *more, "--resume") == 0
    assert len(quick.rates) == 2 * 2 * 2 * 4  # rounds, hospitals, seeds, arms with their ratios
    assert command(*args, tmp_path / "b", *more) == 0
    a, b = (outcome(tmp_path / name) for name in "ab")
    assert {name for name in a if name.endswith(".pt")} == {n for n in b if n.endswith(".pt")}
    a, b = (
        {
            (r["seed"], r["arm"], r["hospital"], r["modality"], r["case"]): r["scores"]
            for r in json.loads((tmp_path / name / "results.json").read_text())["results"]
        }
        for name in "ab"
    )
    assert a == b
    capsys.readouterr()
    assert command(*args, tmp_path / "a", *more, "--resume", "--rounds", 3) == 2
    assert "rounds cannot be added, as the learning rate falls" in capsys.readouterr().err


def test_what_could_not_run_is_refused_before_a_scan_is_read(
    tmp_path, ct_folder, mri_folder, capsys
):
    """The folders' scans cannot be read at all, and yet another thing is complained of."""
    for folder in (ct_folder, mri_folder):
        shutil.copytree(folder, tmp_path / folder.name)
    for path in tmp_path.rglob("*.nii.gz"):
        truncate(path)
    ct, mri = tmp_path / ct_folder.name, tmp_path / mri_folder.name
    args = ["--out", tmp_path / "out", "--ct", ct]
    assert command(*args) == 2
    assert "arm mri-only needs MRI training cases" in capsys.readouterr().err
    assert command(*args, "--mri", mri, "--sites", 3) == 2
    assert f"--sites 3: {mri} has 2 training cases, too few" in capsys.readouterr().err
    (ct / "meta.csv").write_text("image_id;split\n" + "".join(f"s000{i};test\n" for i in range(4)))
    assert command(*args, "--mri", mri) == 2
    assert "arm fl 1:5 needs CT training cases" in capsys.readouterr().err
    assert command(*args, "--mri", mri, "--arms", "mri-only") == 2
    assert "cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_test_folder_that_holds_what_is_trained_on_is_warned_of(
    tmp_path, quick, ct_folder, mri_folder, capsys
):
    shutil.copytree(ct_folder, tmp_path / "copy")
    args = ["--ct", ct_folder, "--mri", mri_folder, "--test", tmp_path / "copy", "--arms", "fl"]
    assert command(*args, "--spacing", 9, "--out", tmp_path / "out") == 0
    [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("WARNING")]
    copied = f"{tmp_path}/copy/s0000/ct.nii.gz is a copy of {ct_folder}/s0000/ct.nii.gz"
    assert line == f"WARNING: what is trained on is tested on: {copied}, and 3 others too"


def test_run_does_what_the_command_does(tmp_path, quick):
    assert command("--rounds", 2, "--out", tmp_path / "command") == 0
    settings = {"rounds": 2, "local_steps": 2, "width": 2, "depth": 2, "gin_probability": 1.0}
    fedgin.run(Config(**settings, out=str(tmp_path / "call")))
    assert_same(outcome(tmp_path / "command"), outcome(tmp_path / "call"))


def test_gin_probability_0_is_fl(tmp_path):
    args = ["--out", tmp_path, "--rounds", 1, "--arms", "fl", "fedgin", "--gin-probability", 0]
    assert command(*args) == 0
    names = "fl-1-5-seed42.pt", "fedgin-1-5-p0-seed42.pt"
    assert_equal(*(weights(tmp_path / name) for name in names))


# ------------------------------------------------------------------------------- who trains on what


@pytest.mark.parametrize("flag", ["--scenario", "--arms", "--ratios"])
def test_other_choices_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        config(flag, "another")
    assert f"argument {flag}: invalid choice: 'another'" in capsys.readouterr().err


@pytest.mark.parametrize("with_gin", ["fedgin", "mri-only+gin", "ct-only+gin", "centralized+gin"])
def test_arms_differ_by_gin_alone(with_gin):
    """Each has a twin that trains on the same patches, untransformed."""
    plain = {"fedgin": "fl"}.get(with_gin, with_gin.removesuffix("+gin"))
    both = (ARMS[name]._replace(ratio=5) for name in (plain, with_gin))
    sides = [fedgin.make_clients(config(), 1, arm, hospitals(1), CPU) for arm in both]
    assert sides[0].keys() == sides[1].keys()
    for name, client in sides[0].items():
        found, redrawn = list(client.batches(1)), list(sides[1][name].batches(1))
        assert client.n_k == sides[1][name].n_k
        drawn = data.generator(1, 1, name, "gin")
        for (images, (labels, _)), (others, (same, _)) in zip(found, redrawn, strict=True):
            assert torch.equal(labels, same)
            assert torch.equal(others, gin(images, generator=drawn))


def test_clients_count_the_cases_that_they_train_on():
    clients = fedgin.make_clients(config(), 1, arm("fedgin 1:5 p=1"), hospitals(1), CPU)
    assert {name: client.n_k for name, client in clients.items()} == {"mri": 2, "ct": 10}
    clients = fedgin.make_clients(config(), 1, arm("centralized+gin 1:5 p=1"), hospitals(1), CPU)
    assert {name: client.n_k for name, client in clients.items()} == {"pooled": 12}
    assert len(list(clients["pooled"].batches(1))) == 4


# ----------------------------------------------------------------------------------- batches, draws


def draw_batches(name="mri", seed=1, p=0.0, round_=1, cases=None, *args):
    cases = cases or hospitals(1)[0].train[:2]
    return list(fedgin.batches(config(*args), seed, name, cases, 3, p, CPU, round_))


def test_batches_are_patches_of_the_cases_on_the_device():
    cases = hospitals(1)[0].train[:2]
    found = draw_batches("mri", 1, 0, 1, cases, "--patch", "16", "--batch-size", "3")
    assert len(found) == 3
    for images, (labels, labelled) in found:
        assert (images.shape, images.dtype) == ((3, 1, 16, 16, 16), torch.float32)
        assert (labels.shape, labels.dtype) == ((3, 16, 16, 16), torch.int64)
        assert labelled is None  # every organ of every image is
    whole = draw_batches(cases=cases)  # phantoms have 32 voxels, as a patch
    for images, (labels, _) in whole:
        for image, label in zip(images, labels, strict=True):
            [case] = [c for c in cases if np.array_equal(c.image, image[0])]
            np.testing.assert_array_equal(case.labels, label)


def test_batches_say_which_organs_are_labelled():
    cases = [c._replace(labelled=np.arange(6) < 3) for c in hospitals(1)[0].train[:2]]
    for _, (_, labelled) in draw_batches(cases=cases):
        assert labelled.tolist() == [[True] * 3 + [False] * 3] * 2


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_gin_redraws_a_share_p_of_the_images_and_nothing_else(p):
    cases = hospitals(1)[0].train[:2]
    redrawn = draw_batches("mri", 1, p, 1, cases, "--batch-size", 8)
    plain = data.patches(cases, 32, 8, 3, data.generator(1, 1, "mri", "patches"))
    layer, share = GIN(p, generator=data.generator(1, 1, "mri", "gin")), []
    for (found, (labels, _)), (images, target, _) in zip(redrawn, plain, strict=True):
        assert torch.equal(labels, target)
        assert torch.equal(found, layer(images))
        share += (found != images).flatten(1).any(dim=1).tolist()
    assert len(share) == 24
    assert sum(share) == 24 * p if p in (0, 1) else 6 < sum(share) < 18


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
    [state] = fedgin.train_arm(settings, fedgin.new_state(1, "fedgin 1:5 p=1"), everyone, CPU)
    assert set(seen) == {case.image.tobytes() for h in everyone for case in h.val}
    seen.clear()
    list(fedgin.test(settings, fedgin.make_model(settings, 1, CPU, state["weights"]), everyone))
    assert set(seen) == {case.image.tobytes() for h in everyone for case in h.test}


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
    assert fedgin.new_state(1, "fl") == {
        "seed": 1,
        "arm": "fl",
        "round": 0,
        "weights": None,
        "best": {"val_dice": -math.inf, "round": 0, "weights": None},
        "history": [],
    }
    before = torch.get_rng_state()
    a, b, other = (fedgin.make_model(config(), seed, CPU).state_dict() for seed in (1, 1, 2))
    assert_equal(a, b)
    assert differ(a, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_learning_rate_falls_by_a_polynomial(monkeypatch):
    rates = []

    def train(model, batches, loss_function, lr, autocast):
        rates.append(lr)
        return 0.5

    monkeypatch.setattr(fedgin, "train_locally", train)
    monkeypatch.setattr(fedgin, "validate", lambda *_: torch.ones(2, 2, 5))
    settings = config("--rounds", 10, "--lr", 0.02)
    list(fedgin.train_arm(settings, fedgin.new_state(1, "fl 1:5"), hospitals(1), CPU))
    assert rates[::2] == rates[1::2]  # both hospitals'
    assert rates[::2] == pytest.approx([0.02 * (1 - t / 10) ** 0.9 for t in range(10)])


@pytest.mark.parametrize(
    ("losses", "explodes"), [((27.9, 27.9), False), ((0.1, 28.0), True), ((28.0, 0.1), True)]
)
def test_a_loss_ten_times_that_of_chance_is_refused(losses, explodes, monkeypatch):
    """Of equal probabilities it is ln 6 + 1 = 2.79 with five organs, and Dice next to nothing."""
    found = itertools.cycle(losses)
    monkeypatch.setattr(fedgin, "train_locally", lambda *_, **__: next(found))
    monkeypatch.setattr(fedgin, "validate", lambda *_: torch.ones(2, 2, 5))
    trained = fedgin.train_arm(config(), fedgin.new_state(1, "fl 1:5"), hospitals(1), CPU)
    if explodes:
        with pytest.raises(FloatingPointError, match="round 1: .* exploded; a lower --lr"):
            next(trained)
    else:
        assert [state["round"] for state in trained] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("label", ["fl", "fedgin p=1"])
def test_training_learns(label):
    """Livers, in five rounds: validation Dice from a tenth to about a half, and less loss."""
    everyone = [
        h._replace(train=h.train[:4], val=h.val[:2]) for h in hospitals(1, "--organs", "liver")
    ]
    args = ["--organs", "liver", "--scenario", "complete", "--width", 4, "--depth", 3]
    settings = config(*args, "--rounds", 5, "--local-steps", 10, "--lr", 0.01)
    cases = validation_cases(1, everyone)
    sums = fedgin.validate(settings, fedgin.make_model(settings, 1, CPU), cases, ("mri", "ct"))
    untrained = fedgin.mean_dice(sums, ("mri", "ct"))
    *_, state = fedgin.train_arm(settings, fedgin.new_state(1, label), everyone, CPU)
    columns = ("loss", "val_dice_mri", "val_dice_ct")
    losses, mri, ct = ([row[column] for row in state["history"]] for column in columns)
    assert losses[-1] < 0.75 * losses[0]
    assert max(mri) > untrained["mri"] + 0.2
    assert max(ct) > untrained["ct"] + 0.3


# ----------------------------------------------------------------------------------------- the loss


def test_organs_are_renumbered():
    [mri, _] = hospitals(5, "--organs", "spleen", "liver")
    labels = phantom(5, "mri", 0)[1]
    np.testing.assert_array_equal(mri.train[0].labels == 1, labels == 3)
    np.testing.assert_array_equal(mri.train[0].labels == 2, labels == 1)


def small_case(labels, labelled):
    return data.make_volume("x", "mri", labels.astype(np.float32), labels, np.array(labelled))


def test_class_weights_and_loss_by_hand():
    """Weights 1 / √share, cross-entropy normalized by them, soft Dice of the organs alone."""
    labels = np.zeros((2, 2, 4), np.uint8)
    labels[0, 0] = 1  # a share of 4 in 16
    settings = config("--organs", "liver", "--scenario", "complete")
    hospital = Hospital("mri", "mri", [small_case(labels, [True] * 2)], [], [])
    loss = fedgin.make_clients(settings, 1, ARMS["mri-only"], [hospital], CPU)["mri"].loss_function
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

    def weight(label):
        clients = fedgin.make_clients(settings, 1, ARMS[label], pair, CPU)
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
    clients = fedgin.make_clients(config(*args), 1, ARMS["centralized"], pair, CPU)
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
    false_alarm = liver._replace(image=labels_of(1, 3).astype(np.float32))
    mri = Hospital("a", "mri", [nothing], [both, liver], [])
    more = Hospital("b", "mri", [false_alarm], [], [])
    ct = Hospital("d", "ct", [], [nothing], [])
    ct_case = nothing._replace(modality="ct")
    cases = validation_cases(1, [mri, more, ct._replace(val=[ct_case])])
    sums = fedgin.validate(settings, nn.Identity(), cases, ("mri", "ct"))
    assert sums.tolist() == [
        [[3, pytest.approx(2 / 3, rel=1e-12), 0], [0, 0, 0]],
        [[3, 1, 0], [0, 0, 0]],
    ]
    assert sums.dtype == torch.float64
    means = fedgin.mean_dice(sums, ("mri", "ct"))
    assert means["mri"] == pytest.approx((1 + 2 / 3) / 2)
    assert math.isnan(means["ct"])
    only_ct = fedgin.validate(settings, nn.Identity(), [ct_case], ("ct",))
    assert only_ct.tolist() == [[[0, 0, 0]], [[0, 0, 0]]]


def keep_rounds(arm, dices, losses):
    """The states of a training whose weights are the number of their round."""
    model, states = nn.Linear(1, 1, bias=False), [fedgin.new_state(7, arm)]
    for round_, val_dice in enumerate(dices, start=1):
        nn.init.constant_(model.weight, round_)
        states.append(fedgin.keep_round(states[-1], model, losses, val_dice, round_ / 8))
    return states


def test_the_best_weights_are_those_of_the_best_mean_over_modalities():
    dices = [(0.1, 0.3), (0.4, 0.2), (0.2, 0.4), (0.1, 0.49), (0.5, 0.0)]
    dices = [{"mri": mri, "ct": ct} for mri, ct in dices]
    states = keep_rounds("fl", dices, {"mri": 1.0, "ct": 2.0})
    assert [state["round"] for state in states] == [0, 1, 2, 3, 4, 5]
    assert [state["weights"]["weight"].item() for state in states[1:]] == [1, 2, 3, 4, 5]
    assert [state["best"]["round"] for state in states] == [0, 1, 2, 2, 2, 2]
    assert states[-1]["best"]["val_dice"] == pytest.approx(0.3)
    assert states[-1]["best"]["weights"]["weight"].item() == 2
    row = {"seed": 7, "arm": "fl", "round": 2, "seconds": 0.25, "loss": 1.5}
    row |= {"val_dice_mri": 0.4, "val_dice_ct": 0.2, "loss mri": 1.0, "loss ct": 2.0}
    assert states[-1]["history"][1] == row
    assert len(states[-1]["history"]) == 5
    [_, alone] = keep_rounds("ct-only", [{"ct": 0.5}], {"ct": 0.5})
    row = {"seed": 7, "arm": "ct-only", "round": 1, "seconds": 0.12, "loss": 0.5}
    assert alone["history"] == [row | {"val_dice_mri": "", "val_dice_ct": 0.5, "loss ct": 0.5}]


def test_a_round_without_validation_keeps_the_best_weights_so_far():
    dices = [{}, {"mri": 0.4}, {}, {"mri": math.nan}, {}]
    states = keep_rounds("mri-only", dices, {"mri": 1.0})
    assert [state["best"]["round"] for state in states] == [0, 0, 2, 2, 4, 4]
    assert states[1]["best"]["weights"] is None
    assert [row["val_dice_mri"] for row in states[3]["history"]] == ["", 0.4, ""]


def test_validation_comes_every_few_rounds_and_after_the_last(monkeypatch):
    monkeypatch.setattr(fedgin, "train_locally", lambda *_, **__: 0.5)
    monkeypatch.setattr(fedgin, "validate", lambda *_: torch.ones(2, 2, 5))
    settings = config("--rounds", 8, "--val-every", 3)
    *_, state = fedgin.train_arm(settings, fedgin.new_state(1, "fl 1:5"), hospitals(1), CPU)
    validated = [row["round"] for row in state["history"] if row["val_dice_mri"] != ""]
    assert validated == [3, 6, 8]


def test_a_modality_that_cannot_be_validated_does_not_count():
    dices = [{"mri": mri, "ct": math.nan} for mri in (0.2, 0.4, 0.3)]
    assert keep_rounds("fl", dices, {"mri": 1.0})[-1]["best"]["round"] == 2
    assert keep_rounds("fl", [{"mri": math.nan}] * 3, {"mri": 1.0})[-1]["best"]["round"] == 3


def test_an_arm_goes_on_in_the_round_in_which_it_stopped():
    settings = config("--rounds", 4)
    everyone = hospitals(1)
    train = functools.partial(fedgin.train_arm, settings, hospitals=everyone, device=CPU)
    states = list(train(fedgin.new_state(1, "fedgin 1:5 p=1")))
    assert [state["round"] for state in states] == [1, 2, 3, 4]
    again = list(train(states[1]))
    assert [state["round"] for state in again] == [3, 4]
    assert_equal(again[-1]["weights"], states[-1]["weights"])
    assert_equal(again[-1]["best"]["weights"], states[-1]["best"]["weights"])
    timeless = [
        [row | {"seconds": 0} for row in state["history"]] for state in (again[-1], states[-1])
    ]
    assert timeless[0] == timeless[1]
    assert list(train(states[-1])) == []


# --------------------------------------------------------------------------------------- real scans


def test_a_run_on_folders(tmp_path, ct_folder, mri_folder, capsys):
    args = ["--ct", ct_folder, "--mri", mri_folder, "--spacing", 12, "--out", tmp_path / "out"]
    assert command(*args, "--arms", "fedgin", "mri-only") == 0
    shown = capsys.readouterr().out
    assert "PHANTOM" not in shown
    found = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert {(r["hospital"], r["case"]) for r in found if r["modality"] == "ct"} == {
        ("ct_set", "s0003")
    }
    splits = json.loads((tmp_path / "out/hospitals/ct_set.json").read_text())["splits"]["42"]
    assert {part: set(ids) for part, ids in splits.items()} == {
        "train": {"s0000", "s0001"},
        "val": {"s0002"},
        "test": {"s0003"},
    }


def test_a_test_folder_is_only_tested_on(tmp_path, ct_folder, mri_folder):
    held_out = write_totalsegmentator(tmp_path / "held_out", "mri", 2, seed=9)
    args = ["--ct", ct_folder, "--mri", mri_folder, "--test", held_out, "--spacing", 12]
    assert command(*args, "--arms", "fl", "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert {(r["hospital"], r["case"]) for r in found} == {
        ("held_out", "s0000"),
        ("held_out", "s0001"),
    }
    held_out, ct_set = (
        json.loads((tmp_path / f"out/hospitals/{name}.json").read_text())["splits"]["42"]
        for name in ("held_out", "ct_set")
    )
    assert held_out["train"] == held_out["val"] == ct_set["test"] == []


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
    assert any(line.startswith("fl 1:5:  ") and line.endswith("mri 2, ct_set 2") for line in lines)


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
    assert "arm mri-only needs MRI training cases" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_diverging_run_ends_with_exit_code_1(tmp_path, capsys):
    assert command("--lr", 1e30, "--arms", "fl", "--out", tmp_path / "out") == 1
    assert "seed 42, arm fl 1:5: round 1, hospital mri: " in capsys.readouterr().err


def test_a_bug_in_the_network_is_not_swallowed(tmp_path, monkeypatch, capsys):
    def forward(self, x):
        raise AttributeError("no such layer")

    monkeypatch.setattr(UNet3D, "forward", forward)
    with pytest.raises(AttributeError, match="no such layer") as caught:
        command("--arms", "fl", "--out", tmp_path / "out")
    assert caught.value.__notes__ == ["round 1, hospital mri", "seed 42, arm fl 1:5"]
    assert "the run failed" not in capsys.readouterr().err


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
    """Let the n-th call of results.save (a checkpoint a round) be followed by something bad."""

    def __init__(self, monkeypatch, n, action):
        self.calls, save = 0, results.save

        def counting(path, content):
            save(path, content)
            self.calls += 1
            if self.calls == n:
                action()

        monkeypatch.setattr(results, "save", counting)


def fails_then_resumes(args, calm, tmp_path, capsys, message, repair=lambda: None):
    args = [*args, "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    assert tiny.command(*args) == 1
    error = capsys.readouterr().err
    line = next(line for line in error.splitlines() if "the run failed" in line)
    assert "Traceback" not in error
    for part in message:
        assert part in line
    assert "--resume goes on" in error.splitlines()[-1]
    repair()
    assert tiny.command(*args, "--resume") == 0
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
    message = ["seed 42", "arm fl", "round 4", "hospital mri", "case s000"]
    fails_then_resumes(args, calm, tmp_path, capsys, message, repair)


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
    message = ["seed 42", "arm fl", "round 3", "hospital mri", "case s000", "NaN"]
    fails_then_resumes(args, calm, tmp_path, capsys, message, repair)


@pytest.mark.slow
def test_a_scan_that_is_gone_when_it_is_tested(scans, tmp_path, monkeypatch, capsys):
    args, calm = scans
    copies = tmp_path / "scans"
    shutil.copytree(args[1].parent, copies, copy_function=shutil.copy2)
    args = [copies / arg.name if isinstance(arg, Path) else arg for arg in args]
    masks = sorted(copies.rglob("liver.nii.gz"))
    kept = {path: path.read_bytes() for path in masks}

    def spoil():
        """The labels that were kept for the test, and the files that they were read from."""
        for path in [*(tmp_path / "cache").rglob("target.npz"), *masks]:
            truncate(path)

    def repair():
        for path, content in kept.items():
            path.write_bytes(content)

    After(monkeypatch, 5, spoil)  # 4 rounds and the arm's model
    message = ["seed 42", "arm fl", "liver.nii.gz: cannot be read"]
    fails_then_resumes(args, calm, tmp_path, capsys, message, repair)


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
        message = ["seed 42", "arm fl", "File too large"]
        fails_then_resumes(args, calm, tmp_path, capsys, message, repair)
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
    assert tiny.command(*args, "--resume") == 0
    assert_same(outcome(calm), outcome(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda x: torch.empty(2**62, dtype=torch.int8), ["hospital mri: ", "allocate"]),
        (lambda x: x * float("nan"), ["hospital mri: the loss is nan"]),
        (lambda x: x * float("inf"), ["hospital mri: the loss is"]),
        (lambda x: 1e6 * x, ["'mri': ", "exploded; a lower --lr may help"]),
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
    message = ["seed 42, arm fl 1:5: ", "round 3", *message]
    fails_then_resumes(args, calm, tmp_path, capsys, message, sick.clear)


# -------------------------------------------------------------------------------------- determinism


@pytest.mark.slow
def test_more_arms_and_more_threads_change_nothing_in_the_others(tmp_path, monkeypatch):
    for modality in ("ct", "mri"):
        write_totalsegmentator(tmp_path / modality, modality, 8)
    args = ["--ct", tmp_path / "ct", "--mri", tmp_path / "mri", "--spacing", 12]
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda _: {0})
    assert tiny.command(*args, "--out", tmp_path / "one/out") == 0
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda _: {0, 1, 2})
    arms = ["--arms", "mri-only", "centralized+gin", "fedgin"]
    assert tiny.command(*args, "--out", tmp_path / "two/out", *arms) == 0
    a, b = (
        torch.load(tmp_path / x / "out/fedgin-1-5-p1-seed42.pt", weights_only=True)
        for x in ("one", "two")
    )
    assert_equal(a["weights"], b["weights"])
    assert a["val_dice"] == b["val_dice"]


# ------------------------------------------------------------------- validation that cannot score


def test_what_a_modality_without_organs_shows_does_not_choose_the_weights():
    """A modality whose validation cases hold no organ counts in no round, right or wrong there."""
    state = fedgin.new_state(1, "fl")
    for round_, (mri, ct) in enumerate([(math.nan, 0.95), (math.nan, 0.30)], start=1):
        model = torch.nn.Linear(1, 1)
        state = fedgin.keep_round(state, model, {"a": 1.0}, {"mri": mri, "ct": ct}, round_)
    assert (state["best"]["round"], state["best"]["val_dice"]) == (1, 0.95)


def test_a_false_positive_does_not_make_an_organ_scorable(monkeypatch):
    settings = config("--organs", "liver")
    empty = small_case(np.zeros((4, 4, 4), np.uint8), [True, True])
    held = small_case(np.ones((4, 4, 4), np.uint8), [True, True])
    cases = [empty, held._replace(modality="ct"), empty._replace(modality="ct")]
    for prediction in (0, 1):
        monkeypatch.setattr(
            fedgin, "segment", lambda *_, p=prediction: np.full((4, 4, 4), p, np.uint8)
        )
        found = fedgin.mean_dice(
            fedgin.validate(settings, None, cases, ["mri", "ct"]), ["mri", "ct"]
        )
        assert math.isnan(found["mri"])
        assert found["ct"] == prediction


def test_where_nothing_can_be_scored_the_last_weights_are_kept():
    state = fedgin.new_state(1, "fl")
    for round_ in (1, 2, 3):
        model = torch.nn.Linear(1, 1)
        state = fedgin.keep_round(state, model, {"a": 1.0}, {"mri": math.nan}, round_)
    assert state["best"]["round"] == 3
    assert torch.equal(state["best"]["weights"]["weight"], model.weight)
