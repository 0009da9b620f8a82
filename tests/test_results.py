"""The folder of a run and of its trainings: gone on with, shared, extended, refused; its tables."""

import csv
import dataclasses
import errno
import itertools
import json
import math
import os
import platform
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from tiny import assert_equal

import fedgin
from data import NORMALIZATION
from scans import files, phantom
from scans.cases import PreparedCase
from scans.files import DataError
from scripts import predict
from study import hospitals, results, tables
from study.config import VERSION, Checkpoint, Config, Round, Training
from study.console import Progress, Watched, count_steps
from study.hospitals import Hospital, load_hospitals
from study.inference import load_model
from study.results import RunFolder, TrainingFolder, environment
from unet3d import UNet3D

CPU = torch.device("cpu")
ORGANS = ("liver", "spleen")
ARMS = ["mri-only", "ct-only", "fl", "fedgin", "centralized+gin"]
FL, FEDGIN, FL2 = Training(1, "fl"), Training(1, "fedgin", p=1.0), Training(2, "fl")
FULL = OSError(errno.ENOSPC, "No space left on device")


def checkpoint(rounds, best=1):
    """After some rounds, with weights that tell of the round they are of."""
    history = tuple(
        Round(n, {"mri": 1.0 * n, "ct": 3.0 * n}, {"mri": 0.25} if n % 2 else {}, 2.125)
        for n in range(1, rounds + 1)
    )
    weights, best_weights = ({"w": torch.full((500,), float(n))} for n in (rounds, best))
    return Checkpoint(rounds, weights, best, 0.5, best_weights, history)


def plain(reached):
    """A checkpoint with its tensors as lists, to be compared."""
    both = {key: getattr(reached, key) or {} for key in ("weights", "best_weights")}
    return vars(reached) | {k: {n: w.tolist() for n, w in v.items()} for k, v in both.items()}


def case(id_, modality="mri", contents=""):
    unread = [np.ones(3), np.ones(3, bool), None, None]
    return PreparedCase(id_, modality, *unread, contents)


MRI = Hospital("mri", "mri", [case("a", contents="aa")], [], [case("b", contents="bb")])
OTHER = Hospital("far", "", [], [], [case("x", "ct")])


def scores(liver, spleen=None):
    """Scores of a case by organ: Dice d, HD95 10 d, NSD d / 2; None for an absent organ."""
    return {
        organ: {"outcome": "absent"}
        | ({} if d is None else {"outcome": "scored", "dice": d, "hd95": 10 * d, "nsd": d / 2})
        for organ, d in zip(ORGANS, (liver, spleen), strict=True)
    }


def train(folder, rounds=2, dice=0.5):
    """All that a training does with its folder, without training."""
    folder.begin({"mri": 2, "ct": 10}, CPU)
    for n in range(1, rounds + 1):
        folder.keep_round(checkpoint(n))
    folder.keep_model(checkpoint(rounds))
    folder.keep_scores(MRI, case("b"), scores(dice))
    folder.finish(checkpoint(rounds))


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def rows(path):
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def read(path):
    return json.loads(path.read_text())


def cells(text):
    """Of the tables in a text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture
def config(tmp_path):
    return Config(organs=ORGANS, scenario="complete", seeds=(1, 2), out=str(tmp_path / "out"))


def opened(config, trainings=(FL, FEDGIN), by_seed=None):
    run = RunFolder(config, trainings, ARMS)
    run.open(by_seed or {1: [MRI], 2: [MRI]})
    return run


@pytest.fixture
def run(config):
    return opened(config)


@pytest.fixture
def kept(run):
    """A run with a finished training and one that has been stopped."""
    train(run.folder(FL))
    run.folder(FEDGIN).keep_round(checkpoint(1))
    return run


def again(folder):
    """The folder as another process finds it."""
    return TrainingFolder(folder.config, folder.training)


def refused(config, by_seed=None):
    with pytest.raises(DataError) as caught:
        opened(config, by_seed=by_seed)
    return str(caught.value).removeprefix(f"{config.out}/")


# ------------------------------------------------------------------------------------- a training


def test_a_training_leaves_what_it_promises(run):
    folder = run.folder(FEDGIN)
    assert folder.path == run.out / "fedgin-p1-seed1"
    assert folder.name == "fedgin p=1, seed 1"
    folder.begin({"mri": 2}, CPU)
    folder.keep_round(checkpoint(1))
    assert names(folder.path) == ["checkpoint.pt", "history.csv", "training.json"]
    assert not folder.is_trained()
    folder.keep_model(checkpoint(1))
    assert folder.is_trained()
    assert names(folder.path) == ["history.csv", "model.pt", "training.json"]
    folder.keep_scores(MRI, case("b"), scores(0.5))
    assert names(folder.path) == ["history.csv", "model.pt", "testing.json", "training.json"]
    assert not folder.is_finished()
    folder.finish(checkpoint(1))
    assert names(folder.path) == ["history.csv", "model.pt", "scores.json", "training.json"]
    assert again(folder).is_finished()


def test_what_it_is_is_written_once(run, monkeypatch):
    folder, began = run.folder(FEDGIN), environment(CPU)
    folder.begin({"mri": 2, "ct": 10.0}, CPU)
    monkeypatch.setattr(results, "VERSION", "9")
    again(folder).begin({"mri": 3}, CPU)
    training = {"seed": 1, "arm": "fedgin", "ratio": "", "p": 1.0}
    expected = {"training": training, "cases": {"mri": 2, "ct": 10.0}, "environment": began}
    assert read(folder.path / "training.json") == expected


def test_the_environment_is_what_may_change_the_last_digits(monkeypatch, tmp_path):
    found = environment(CPU)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"version": VERSION, "numpy": np.__version__, "threads": torch.get_num_threads()}
    assert found == {**versions, "device": "cpu", "modules": found["modules"]}
    assert list(results.MODULES) == sorted(path.stem for path in results.ROOT.glob("*.py"))
    for name in results.MODULES:
        shutil.copy(results.ROOT / f"{name}.py", tmp_path)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert environment(CPU) == found
    for path in tmp_path.iterdir():
        path.write_text(path.read_text() + "\n")
        assert environment(CPU)["modules"] != found["modules"]
        path.write_text(path.read_text()[:-1])


def test_it_goes_on_from_its_last_round(run):
    folder = run.folder(FL)
    assert folder.checkpoint() == Checkpoint()
    first = Checkpoint(1, {"w": torch.ones(2)}, history=(Round(1, {"mri": 2.0}, {}, 1.0),))
    for reached in (first, *map(checkpoint, (1, 2, 3))):  # the first was not validated
        folder.keep_round(reached)
        assert plain(again(folder).checkpoint()) == plain(reached)
    assert run.folder(FEDGIN).checkpoint() == Checkpoint()  # each has its own


def test_the_history_is_a_row_a_round(run):
    folder = run.folder(FEDGIN)
    assert folder.history() == []
    for rounds in (1, 2, 3):
        folder.keep_round(checkpoint(rounds))
        expected = [
            {"seed": "1", "arm": "fedgin", "ratio": "", "p": "1.0", "round": str(n)}
            | {"seconds": "2.12", "loss": f"{2.0 * n}", "val_dice_mri": "0.25" if n % 2 else ""}
            | {"val_dice_ct": "", "loss mri": f"{1.0 * n}", "loss ct": f"{3.0 * n}"}
            for n in range(1, rounds + 1)
        ]
        assert rows(folder.path / "history.csv") == again(folder).history() == expected
        assert list(folder.history()[0]) == list(expected[0])


def test_a_model_is_its_best_weights_and_what_predictions_need(tmp_path):
    settings = {"spacing": 9.0, "patch": 16, "width": 4, "depth": 3, "organs": ORGANS}
    config = Config(**settings, out=str(tmp_path))
    folder = TrainingFolder(config, Training(7, "fedgin", "1:5", 0.25))
    folder.keep_round(checkpoint(3, best=2))
    size = (folder.path / "checkpoint.pt").stat().st_size
    folder.keep_model(checkpoint(3, best=2))
    path = tmp_path / "fedgin-1-5-p0.25-seed7/model.pt"
    assert path.stat().st_size < size - 1500  # one of two times 2,000 bytes of weights is kept
    saved = torch.load(path, weights_only=True)
    for key in ("weights", "best_weights"):
        assert saved.pop(key)["w"].unique().tolist() == [2.0]
    settings |= {"normalization": NORMALIZATION, "phantoms": True}
    assert saved == {
        **{"arm": "fedgin 1:5 p=0.25", "seed": 7, "model": settings},
        **{"round": 3, "best_round": 2, "best_dice": 0.5},
        "history": [vars(done) for done in checkpoint(3).history],
    }
    expected = dataclasses.replace(checkpoint(3, best=2), weights=checkpoint(2).weights)
    assert plain(again(folder).checkpoint()) == plain(expected)


def test_the_checkpoint_goes_once_the_model_is_there(run, monkeypatch):
    folder = run.folder(FL)
    folder.keep_round(checkpoint(2))
    left = (folder.path / "checkpoint.pt").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space .*model\.pt"):
        patch.setattr(os, "fsync", Mock(side_effect=FULL))
        folder.keep_model(checkpoint(2))
    assert plain(again(folder).checkpoint()) == plain(checkpoint(2))
    folder.keep_model(checkpoint(2))
    (folder.path / "checkpoint.pt").write_bytes(left)  # killed between the two: the model counts
    assert again(folder).checkpoint().weights["w"][0] == 1
    again(folder).finish(checkpoint(2))
    assert names(folder.path) == ["history.csv", "model.pt", "scores.json"]


def test_scores_are_a_row_an_organ_and_go_on_after_the_last_case(run):
    cases = [(MRI, case("b"), 0.1 + 0.2), (OTHER, case("x", "ct"), 0.5), (OTHER, case("y"), 1.0)]
    for n, (hospital, tested, dice) in enumerate(cases):
        folder = run.folder(FEDGIN)
        folder.keep_scores(hospital, tested, scores(dice))
        assert folder.n_tested() == again(folder).n_tested() == n + 1
    assert run.folder(FL).n_tested() == 0
    folder.finish(checkpoint(2))
    found, training = again(folder).scores(), {"seed": 1, "arm": "fedgin", "ratio": "", "p": 1.0}
    liver = {"hospital": "mri", "scanner": "seen", "case": "b", "modality": "mri", "organ": "liver"}
    assert found[0] == {**training, **liver, **scores(0.1 + 0.2)["liver"]}
    spleen = {"hospital": "far", "scanner": "unseen", "case": "x", "modality": "ct"}
    spleen |= {**training, "organ": "spleen", "outcome": "absent"}
    assert {key: found[3][key] for key in spleen} == spleen
    assert all(math.isnan(found[3][metric]) for metric in ("dice", "hd95", "nsd"))
    order = [(score["case"], score["organ"]) for score in found]
    assert order == list(itertools.product("bxy", ORGANS))


def test_scores_may_come_from_several_machines(run):
    """Then all of them are kept, in place of those of this machine's test cases."""
    folder = run.folder(FL)
    folder.keep_scores(MRI, case("b"), scores(0.5, 0.25))
    own = folder.scores()
    other = [{**score, "hospital": "ct", "case": "case 0", "modality": "ct"} for score in own]
    folder.finish(checkpoint(2), [*own, *other])
    assert again(folder).scores() == [*own, *other]
    assert names(folder.path) == ["history.csv", "scores.json"]


def test_a_model_that_was_trained_anew_is_tested_anew(run):
    folder = run.folder(FL)
    folder.keep_model(checkpoint(2))
    folder.keep_scores(MRI, case("b"), scores(0.5))
    (folder.path / "model.pt").unlink()
    again(folder).keep_model(checkpoint(2))
    assert again(folder).n_tested() == 0


def test_names_may_be_no_utf_8(run):
    folder, odd = run.folder(FL), os.fsdecode(b's\xff, "x"')
    folder.begin({odd: 2}, CPU)
    folder.keep_scores(MRI._replace(name=odd), case(odd), scores(0.5))
    folder.finish(Checkpoint(1, history=(Round(1, {odd: 1.0}, {}, 1.0),)))
    assert [score["case"] for score in again(folder).scores()] == [odd, odd]
    run.report()
    assert [row["case"] for row in rows(run.out / "scores.csv")] == [odd, odd]
    assert rows(run.out / "history.csv")[0][f"loss {odd}"] == "1.0"
    assert os.fsencode(odd) in (run.out / "results.md").read_bytes()


# --------------------------------------------------------------------------- a run, and its tables


def test_a_run_leaves_what_it_promises(config):
    wanted = [Training(seed, arm.arm, p=arm.p) for seed in (1, 2) for arm in (FL, FEDGIN)]
    run = RunFolder(config, wanted, ARMS)
    assert run.describe() == f"{run.out}: 0 of 4 trainings finished"
    assert not run.out.exists()  # before it is opened
    run.open({1: [MRI, OTHER], 2: [MRI]})
    shared = ["cases-seed1.json", "cases-seed2.json", "config.json", "lock"]
    assert names(run.out) == shared
    for n, training in enumerate(wanted):
        assert run.unfinished() == wanted[n:]
        train(run.folder(training), dice=n / 4)
    report = run.report()
    of_each = ("history.csv", "model.pt", "scores.json", "training.json")
    shared += ["history.csv", "results.md", "scores.csv"]
    shared += [f"{training.folder}/{name}" for training in wanted for name in of_each]
    assert names(run.out) == sorted(shared)
    saved, all_ = read(run.out / "config.json"), json.loads(json.dumps(dataclasses.asdict(config)))
    assert (saved.pop("made by"), saved.pop("format")) == ("fedgin.py", 4)
    of_trainings = {"arms", "ratios", "gin_probability", "seeds", "out", "cache"}
    assert saved == {key: value for key, value in all_.items() if key not in of_trainings}
    cases = {"mri mri a": "train aa", "mri mri b": "test bb"}
    assert read(run.out / "cases-seed2.json") == cases
    assert read(run.out / "cases-seed1.json") == {**cases, "far ct x": "test"}
    order = [wanted[0], wanted[2], wanted[1], wanted[3]]  # arms as they follow one another, seeds
    found = rows(run.out / "scores.csv")
    assert list(found[0]) == list(tables.SCORE)
    assert [row["dice"] for row in found] == ["0.0", "", "0.5", "", "0.25", "", "0.75", ""]
    history = [row for training in order for row in run.folder(training).history()]
    assert rows(run.out / "history.csv") == history
    title = "complete scenario, seeds 1 2: PHANTOMS (synthetic volumes, not patients)"
    assert report.startswith(f"## Test Dice, {title}\n\n| Dice ")
    assert cells(report)[2:4] == [  # the liver's alone: 0 of seed 1, 0.5 of seed 2
        ["fl", "0.250 ± 0.354", "0"],
        ["fedgin p=1", "0.500 ± 0.354", "0"],
    ]
    assert report.endswith(f"\n\nAll tables: {run.out / 'results.md'}")
    text = (run.out / "results.md").read_text()
    assert text.startswith(report.rsplit("\n\n", 1)[0])
    assert "### Seen scanners: mri\n" in text
    cases = [f"    {t.label}, seed {t.seed}: {{'mri': 2, 'ct': 10}}\n" for t in order]
    assert text.endswith("Training cases:\n\n" + "".join(cases))


def test_rows_follow_arms_ratio_p_and_seed_whatever_was_trained_first(config):
    kinds = [("mri-only", "", None), *(("fl", ratio, None) for ratio in ("1:1", "1:5", "all"))]
    kinds += [("fedgin", ratio, p) for ratio in ("1:1", "1:5") for p in (1.0, 0.5, 0.25)]
    expected = [Training(seed, *kind) for kind in kinds for seed in (1, 10)]
    shuffled = [expected[(7 * n) % 20] for n in range(20)]
    run = opened(config, shuffled)
    for training in shuffled:
        train(run.folder(training), rounds=1)
    assert [folder.training for folder in run.begun()] == expected
    labels = list(dict.fromkeys(training.label for training in expected))
    assert [row[0] for row in cells(run.report())[2:12]] == labels


def test_tables_and_a_line_tell_how_far_a_run_has_come(config):
    run = opened(config, [FL, FEDGIN, FL2, Training(2, "fedgin", p=1.0)])
    assert "; NOT FINISHED: 4 of the trainings\n" in run.report()
    assert rows(run.out / "scores.csv") == []
    train(run.folder(FL))
    stopped, tested = run.folder(FEDGIN), run.folder(FL2)
    for folder in (stopped, tested):
        folder.begin({}, CPU)
        folder.keep_round(checkpoint(3))
    tested.keep_model(checkpoint(20))
    stop = "fedgin p=1, seed 1 after round 3, fl, seed 2 after round 3"
    assert run.describe() == f"{run.out}: 1 of 4 trainings finished, {stop}"
    assert "; NOT FINISHED: 3 of the trainings\n" in run.report()
    assert {row["arm"] for row in rows(run.out / "scores.csv")} == {"fl"}
    found = [(row["arm"], row["seed"]) for row in rows(run.out / "history.csv")]
    assert list(dict.fromkeys(found)) == [("fl", "1"), ("fl", "2"), ("fedgin", "1")]
    run = opened(config, [FL])  # which asks for one; two more have begun
    assert "; NOT FINISHED: 2 of the trainings\n" in run.report()
    for folder in (stopped, tested):
        train(folder)
    assert "NOT FINISHED" not in run.report()


def test_in_what_trainings_differ_is_said(run, monkeypatch):
    train(run.folder(FL))
    assert "NOTE" not in run.report()
    monkeypatch.setattr(results, "VERSION", "9.0.0")
    train(run.folder(FEDGIN))
    path = run.folder(FL).path / "training.json"
    older = read(path)
    del older["environment"]["numpy"]  # as a version would leave it that did not know of it
    path.write_text(json.dumps(older))
    report = run.report()
    notes = [line for line in report.splitlines() if line.startswith("NOTE")]
    assert notes == [f"NOTE: trainings differ in version: {VERSION}, 9.0.0"]
    assert notes[0] in (run.out / "results.md").read_text()


def test_each_training_is_held_by_one_process_and_tables_follow(run, capsys):
    free, taken, done = map(run.folder, (FL, FEDGIN, FL2))
    train(done)
    with files.lock(taken.path / "lock"):
        for folder in (taken, done):
            with run.hold(folder) as held:
                assert held is False
        assert not (run.out / "results.md").exists()
        with run.hold(free) as held, run.hold(free) as twice:
            assert (held, twice) == (True, False)
            train(free)
    assert "; NOT FINISHED: 1 of the trainings\n" in (run.out / "results.md").read_text()
    work = "another process is at work on it\n"
    assert capsys.readouterr().err == f"fedgin p=1, seed 1: {work}fl, seed 1: {work}"
    with pytest.raises(KeyError), run.hold(taken):
        raise KeyError
    with run.hold(taken) as held:  # who fails holds nothing
        assert held is True


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name", ["history.csv", "scores.csv", "results.md", "predictions.json", "fl/training.json"]
)
def test_files_of_another_origin_are_not_overwritten(name, config):
    path = Path(config.out) / name
    path.parent.mkdir(parents=True)
    path.write_text("of somebody else")
    message = "exists, but there is no config.json beside it; choose another --out"
    assert refused(config) == f"{name}: {message}"
    assert path.read_text() == "of somebody else"
    path.rename(path.with_name("notes.txt"))
    train(opened(config).folder(FL))
    opened(config).report()
    assert path.with_name("notes.txt").read_text() == "of somebody else"


def test_other_settings_and_other_data_are_refused_by_name(config, run):
    before = {path: path.read_bytes() for path in run.out.rglob("*.json")}
    end = ". Give the same, or another --out"
    for changes, differs in (
        ({"lr": 1e-3, "width": 4, "cache": "x"}, "width 8, now 4; lr 0.006, now 0.001"),
        ({"rounds": 20}, "rounds 30, now 20"),
        ({"organs": ("liver",), "sites": 2}, "sites 1, now 2; organs liver spleen, now liver"),
    ):
        told = refused(dataclasses.replace(config, **changes))
        assert told == f"config.json: was made with {differs}{end}"
    new = case("c", contents="cc")
    split, changed = MRI._replace(train=MRI.test, test=MRI.train), case("a", contents="cc")
    for hospital, differs in (
        (MRI._replace(train=[*MRI.train, new]), "mri mri c None, now train cc"),
        (MRI._replace(test=[]), "mri mri b test bb, now None"),
        (split, "mri mri a train aa, now test aa; mri mri b test bb, now train bb"),
        (MRI._replace(train=[changed]), "mri mri a aa, now cc"),
    ):
        told = refused(config, {1: [hospital]})
        assert told == f"cases-seed1.json: was made with {differs}{end}"
    # A new seed may split the scans in another way, but they must be the same.
    assert "mri mri a aa, now cc." in refused(config, {3: [MRI._replace(train=[changed])]})
    assert {path: path.read_bytes() for path in run.out.rglob("*.json")} == before
    opened(config, by_seed={3: [split]})


def test_a_run_goes_on_wherever_it_its_data_and_its_cache_are(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(config, ct=("here/ct_set",), mri=("mri",))
    train(opened(config).folder(FL))
    (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "linked").symlink_to(tmp_path / "moved")
    for out, folder in itertools.product(("moved", "linked"), ("ct_set/", "/else/where/ct_set")):
        changes = {"out": out, "ct": (folder,), "mri": ("./mri/.",), "cache": "elsewhere"}
        run = opened(dataclasses.replace(config, **changes))
        assert run.unfinished() == [FEDGIN]
        assert run.report().startswith("## Test Dice, complete scenario, seeds 1: scans; NOT ")
    told = refused(dataclasses.replace(config, out="moved", ct=("here/other",)))
    assert "ct ct_set, now other" in told


@pytest.mark.parametrize("added", list(itertools.permutations(range(3))))
def test_a_run_is_extended_in_any_order(added, config):
    parts = [[FL], [FL2, Training(2, "fedgin", p=1.0)], [Training(1, "fedgin", p=0.25)]]
    for n in added:
        run = opened(config, parts[n], {parts[n][0].seed: [MRI]})
        assert run.unfinished() == parts[n]
        stopped = run.folder(parts[n][0])
        stopped.begin({}, CPU)
        stopped.keep_round(checkpoint(1))
    for wanted in parts:  # and none of those that stopped is lost
        run = opened(config, wanted, {wanted[0].seed: [MRI]})
        assert run.folder(wanted[0]).checkpoint().round == 1
        for training in wanted:
            train(run.folder(training), rounds=1)
    report = run.report()
    assert "seeds 1 2: PHANTOMS (synthetic volumes, not patients)\n" in report
    shown = [["fl", "0.500 ± 0.000"], ["fedgin p=1", "0.500"], ["fedgin p=0.25", "0.500"]]
    assert [row[:2] for row in cells(report)[2:5]] == shown


# -------------------------------------------------------------------------------- what is damaged


def look(run):
    """All that a start, its trainings and its tables read."""
    opened(run.config)
    for training in (FL, FEDGIN):
        run.folder(training).checkpoint()
    run.report()


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "cases-seed1.json", "fl-seed1/training.json", "fl-seed1/scores.json"),
        *("fl-seed1/model.pt", "fedgin-p1-seed1/checkpoint.pt"),
    ],
)
def test_a_damaged_file_is_named(name, kept):
    look(kept)
    path, whole = kept.out / name, (kept.out / name).read_bytes()
    for content in (b"junk", b"", b"\xff\xfe", whole[: len(whole) // 2], b"[]", b"null", None):
        path.unlink()
        path.mkdir() if content is None else path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            look(kept)
        assert str(caught.value).startswith(f"{path}: cannot be read (")
        assert len(str(caught.value).splitlines()) == 1
        assert content is None or path.read_bytes() == content


def put(**changes):
    """Changes of a file's content; None: without the key."""
    return lambda kept: {k: v for k, v in {**kept, **changes}.items() if v is not None}


OTHER_FORMS = [
    ("checkpoint.pt", put(weights=None), "'weights'"),
    ("checkpoint.pt", lambda content: [], "list indices"),
    ("checkpoint.pt", put(history=[1]), "must be a mapping"),
    ("model.pt", put(best_dice=None), "'best_dice'"),
    ("model.pt", put(history=[{"round": 1}]), "required positional argument"),
    ("training.json", put(training=None), "'training'"),
    ("training.json", put(training={"seed": 1}), "missing 1 required"),
    ("training.json", put(training={"seed": 1, "arm": "fl", "lr": 1}), "unexpected keyword"),
    ("training.json", put(training={"seed": 2, "arm": "fl"}), "belongs to a folder fl-seed2"),
]


@pytest.mark.parametrize(("name", "change", "what"), OTHER_FORMS)
def test_a_file_of_another_form_is_named(name, change, what, kept):
    path = kept.folder(FEDGIN if name == "checkpoint.pt" else FL).path / name
    if path.suffix == ".pt":
        torch.save(change(torch.load(path, weights_only=True)), path)
    else:
        path.write_bytes(files.to_json(change(read(path))))
    with pytest.raises(DataError, match=f"^{path}: cannot be read .*{what}"):
        look(kept)


@pytest.mark.parametrize(("folder", "arm"), [("fl-seed1 (copy)", "fl"), ("sgd-seed1", "sgd")])
def test_a_copy_or_an_arm_that_is_unknown_is_named(folder, arm, run):
    """The one would count twice, the other nowhere."""
    path = run.out / folder / "training.json"
    files.write(path, files.to_json({"training": {"seed": 1, "arm": arm}}))
    for use in (run.report, lambda: opened(run.config)):
        with pytest.raises(DataError) as caught:
            use()
        assert str(caught.value).startswith(f"{path}: cannot be read (")


# --------------------------------------------------------------------------------- older versions


@pytest.mark.parametrize(
    "content",
    [
        {"made by": "fedgin.py", "format": 3, "rounds": 20},  # version 2
        {"gin_probability": [1.0], "rounds": 20},  # version 1
        {"name": "of something else"},
    ],
)
def test_a_run_of_another_version_is_refused_in_a_sentence(content, config):
    path = Path(config.out) / "config.json"
    files.write(path, files.to_json(content))
    what = "is not of a run of version 3; finish an older run with its own version"
    assert refused(config) == f"config.json: {what}, or choose another --out"
    assert read(path) == content
    assert names(path.parent) == ["config.json"]


def test_a_model_of_version_2_still_predicts(tmp_path, ct_folder):
    """With what version 2.0.0 wrote into it."""
    torch.manual_seed(1)
    weights = UNet3D(1, 3, 2, 2).state_dict()
    model = {"organs": ORGANS, "spacing": 9.0, "patch": 16, "width": 2, "depth": 2}
    model |= {"normalization": {"ct": (-160.0, 240.0), "mri": (0.5, 99.5)}, "phantoms": True}
    done = {"round": 2, "losses": {"mri": 2.9}, "val_dice": {"mri": 0.03}, "seconds": 2.0}
    content = {"run": "c4c3432ab390e346", "arm": "fl 1:1", "seed": 1, "model": model, "round": 2}
    content |= {"best": {"val_dice": 0.04, "round": 2, "weights": None}, "history": [done]}
    torch.save({**content, "weights": weights}, tmp_path / "model.pt")
    assert_equal(load_model(tmp_path / "model.pt", CPU)[0].state_dict(), weights)
    scan = next(ct_folder.rglob("ct.nii.gz"))
    args = ["--checkpoint", tmp_path / "model.pt", "--images", scan, "--out", tmp_path / "out"]
    assert predict.main([str(arg) for arg in args]) == 0
    assert (tmp_path / f"out/{scan.parent.name}.nii.gz").is_file()


# --------------------------------------------------------------------------------- steps, and runs


TINY = ["--rounds", "2", "--local-steps", "1", "--batch-size", "1", "--patch", "16"]
TINY += ["--width", "2", "--depth", "2", "--val-every", "1"]
TINY += ["--organs", "liver", "--arms", "mri-only"]


def command(*args):
    return fedgin.main([*TINY, *map(str, args)])


@pytest.fixture
def few(monkeypatch):
    """Phantoms that are few and small."""
    large, parts = phantom.make_phantom, {"train": range(3), "val": [3], "test": [4]}
    monkeypatch.setattr(hospitals, "PHANTOM_SPLITS", parts)
    monkeypatch.setattr(phantom, "make_phantom", lambda *a: [x[::2, ::2, ::2] for x in large(*a)])


@pytest.mark.slow
def test_a_training_takes_as_many_steps_as_are_counted(few, tmp_path, monkeypatch):
    """From round 2 of 3 on: 2 batches each, validation in rounds 2 and 3, and the test."""
    settings = {"rounds": 3, "local_steps": 2, "val_every": 2, "patch": 16, "width": 2, "depth": 2}
    config = Config(**settings, arms=("fl", "centralized"), out=str(tmp_path))
    everyone, steps = load_hospitals(config)[0][42], []
    counting = lambda watched: (steps.append(item) or item for item in watched.items)  # noqa: E731
    monkeypatch.setattr(Watched, "__iter__", counting)
    for training in fedgin.plan(config):
        folder = TrainingFolder(config, training)
        clients = fedgin.make_clients(config, training, everyone)
        folder.keep_round(next(fedgin.train_arm(config, training, clients, [])))
        chosen = fedgin.choose_cases(config, training, everyone)
        counted = count_steps(folder, chosen, everyone)
        with Progress({folder.name: counted}) as progress:
            fedgin.run_training(folder, everyone, CPU, progress)
        assert len(steps) == counted == 2 * 2 * 2 + 2 * 2 + 4
        steps.clear()


def test_a_start_reads_a_checkpoint_once(few, tmp_path, monkeypatch):
    assert command("--out", tmp_path) == 0
    folder = tmp_path / "mri-only-seed42"
    (folder / "scores.json").unlink()  # it is tested again, and three others are trained
    looked, read_pt = [], files.read_pt
    monkeypatch.setattr(files, "read_pt", lambda path: looked.append(path) or read_pt(path))
    for _ in range(2):
        assert command("--arms", "fl", "--seeds", 42, 43, "--out", tmp_path) == 0
    assert looked == [folder / "model.pt"]


@pytest.mark.parametrize("error", [FULL, PermissionError(errno.EACCES, "Permission denied")])
def test_a_folder_that_cannot_be_written_ends_in_a_line(error, few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "fsync", Mock(side_effect=error))
    assert command("--out", tmp_path) == 1
    what = f"{error.strerror}: '{tmp_path}/config.json'; repeat the command to continue"
    assert capsys.readouterr().err == f"fedgin.py: the run failed: [Errno {error.errno}] {what}\n"


@pytest.mark.slow
def test_files_that_changed_are_refused_and_moved_ones_not(tmp_path, mri_folder, ct_folder, capsys):
    shutil.copytree(mri_folder, tmp_path / "mri")
    moved = tmp_path / "elsewhere/mri"
    args = ["--ct", ct_folder, "--spacing", 12, "--out", tmp_path / "out", "--mri"]
    assert command(*args, tmp_path / "mri") == 0
    shutil.copytree(tmp_path / "mri", moved)  # with other times
    assert command(*args, moved, "--seeds", 42, 43) == 0
    labels = moved / "labelsTr/case_000.nii.gz"
    labels.write_bytes(labels.with_name("case_001.nii.gz").read_bytes())
    capsys.readouterr()
    for seeds in ((42, 44), (44,)):
        assert command(*args, moved, "--seeds", *seeds) == 2
        assert "json: was made with mri mri case_000 " in capsys.readouterr().err
