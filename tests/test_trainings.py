"""The folder of a training: begun, gone on with, tested and finished; what is damaged is named."""

import csv
import json
import math
import os
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from data import NORMALIZATION, make_volume
from scans import files
from scans.cases import PreparedCase
from scans.files import DataError
from study import trainings
from study.config import VERSION, Best, Checkpoint, Config, Round, Training
from study.hospitals import Hospital
from study.results import RunFolder
from study.trainings import TrainingFolder, environment

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
ORGANS = ("liver", "spleen")
ORDER = ("mri-only", "ct-only", "fl", "fedgin", "centralized+gin")
FL, FEDGIN = Training(1, "fl"), Training(1, "fedgin", p=1.0)
OWN, OTHER = Hospital("mri", "mri", [], [], []), Hospital("far", "", [], [], [])


def checkpoint(rounds, best=1):
    """After some rounds, with weights that tell of the round they are of."""
    history = tuple(
        Round(n, {"mri": 1.0 * n, "ct": 3.0 * n}, {"mri": 0.25} if n % 2 else {}, 2.125)
        for n in range(1, rounds + 1)
    )
    chosen = Best(0.5, best, {"w": torch.full((2,), float(best))})
    return Checkpoint(rounds, {"w": torch.full((2,), float(rounds))}, chosen, history)


def plain(reached):
    """A checkpoint with its tensors as lists, to be compared."""

    def lists(weights):
        return weights and {key: w.tolist() for key, w in weights.items()}

    best = reached.best
    return (
        reached.round,
        lists(reached.weights),
        (best.val_dice, best.round, lists(best.weights)),
        reached.history,
    )


def case(id_, modality="mri"):
    labels = np.zeros((2, 2, 2), np.uint8)
    volume = make_volume(id_, modality, labels.astype(np.float32), labels, np.ones(3, bool))
    return PreparedCase(volume, lambda: pytest.fail("is not asked for"), [])


def scores(**dices):
    """Scores of a case by organ: Dice d, HD95 10 d, NSD d / 2; None for an absent organ."""
    return {
        organ: {"outcome": "scored", "dice": d, "hd95": 10 * d, "nsd": d / 2}
        if d is not None
        else {"outcome": "absent"}
        for organ, d in dices.items()
    }


def keep_cases(folder, *found, hospital=OWN):
    for id_, of_case in found:
        folder.keep_scores(hospital, case(id_), of_case)


TESTED = (("a", scores(liver=0.5, spleen=None)),)


def train(folder, rounds=2, cases=TESTED):
    """All that a training does with its folder, without training."""
    folder.begin({"mri": 2, "ct": 10}, CPU)
    for n in range(1, rounds + 1):
        folder.keep_round(checkpoint(n))
    folder.keep_model(checkpoint(rounds))
    keep_cases(folder, *cases)
    folder.finish(checkpoint(rounds))


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def config(tmp_path):
    return Config(organs=ORGANS, scenario="complete", out=str(tmp_path / "out"))


@pytest.fixture
def run(config):
    """An open run without hospitals."""
    folder = RunFolder(config, ORDER)
    folder.open([])
    return folder


def again(run, training):
    """The folder as another process finds it."""
    return TrainingFolder(run.config, run.id, training)


# ------------------------------------------------------------------------------- from begin to end


def test_a_training_leaves_what_it_promises(run):
    folder = run.folder(FEDGIN)
    assert folder.path == run.out / "fedgin-p1-seed1"
    assert folder.name == "fedgin p=1, seed 1"
    assert not (folder.is_begun() or folder.is_trained() or folder.is_finished())
    folder.begin({"mri": 2, "ct": 10}, CPU)
    assert names(folder.path) == ["training.json"]
    for n in (1, 2):
        folder.keep_round(checkpoint(n))
        assert names(folder.path) == ["checkpoint.pt", "history.csv", "training.json"]
    assert folder.is_begun()
    assert not folder.is_trained()
    folder.keep_model(checkpoint(2))
    assert folder.is_trained()
    assert names(folder.path) == ["history.csv", "model.pt", "training.json"]
    folder.keep_scores(OWN, case("a"), scores(liver=0.5, spleen=None))
    assert not folder.is_finished()
    assert names(folder.path) == ["history.csv", "model.pt", "testing.csv", "training.json"]
    folder.finish(checkpoint(2))
    assert folder.is_finished()
    assert again(run, FEDGIN).is_finished()
    assert names(folder.path) == ["history.csv", "model.pt", "scores.csv", "training.json"]


def test_the_history_is_a_row_a_round(run):
    folder = run.folder(FEDGIN)
    folder.begin({}, CPU)
    assert folder.history() == []
    for rounds in (1, 2, 3):
        folder.keep_round(checkpoint(rounds))
        with (folder.path / "history.csv").open(newline="") as file:
            rows = list(csv.reader(file))
        assert rows[0] == [
            *("seed", "arm", "ratio", "p", "round", "seconds", "loss"),
            *("val_dice_mri", "val_dice_ct", "loss mri", "loss ct"),
        ]
        assert (
            rows[1:]
            == [
                [
                    "1",
                    "fedgin",
                    "",
                    "1.0",
                    str(n),
                    "2.12",
                    f"{2.0 * n}",
                    dice,
                    "",
                    f"{1.0 * n}",
                    f"{3.0 * n}",
                ]
                for n, dice in ((1, "0.25"), (2, ""), (3, "0.25"))
            ][:rounds]
        )
        assert [list(row.values()) for row in again(run, FEDGIN).history()] == rows[1:]


def test_what_it_is_stands_beside_it(run):
    folder = run.folder(FEDGIN)
    folder.begin({"mri": 2, "ct": 10.0}, CPU)
    about = json.loads((folder.path / "training.json").read_text())
    assert about.pop("checksum") == files.sha256(files.to_json(about))
    assert about == {
        "run": files.checksum(run.out / "config.json"),
        "training": {"seed": 1, "arm": "fedgin", "ratio": "", "p": 1.0},
        "cases": {"mri": 2, "ct": 10.0},
        "trained on": [environment(CPU)],
    }
    train(folder)
    finished = json.loads((folder.path / "training.json").read_text())
    assert {key: finished[key] for key in about} == about
    assert finished["finished files"] == {
        name: files.checksum(folder.path / name) for name in ("history.csv", "scores.csv")
    }
    assert finished["finished"][:2] == "20"


def test_where_it_was_trained_is_said_once_a_place(run, monkeypatch):
    for version in ("a", "a", "b", "a", "b"):
        monkeypatch.setattr(trainings, "VERSION", version)
        again(run, FL).begin({}, CPU)
    found = [place["version"] for place in again(run, FL).about["trained on"]]
    assert found == ["a", "b"]


def test_the_environment_is_what_may_change_the_last_digits(monkeypatch, tmp_path):
    found = environment(CPU)
    assert found.keys() == {"device", "threads", "version", "modules", "python", "torch", "numpy"}
    assert (found["device"], found["version"]) == ("cpu", VERSION)
    assert (found["python"], found["torch"]) == (platform.python_version(), torch.__version__)
    assert (found["numpy"], found["threads"]) == (np.__version__, torch.get_num_threads())
    six = sorted(path.stem for path in ROOT.glob("*.py"))
    assert list(trainings.MODULES) == six
    for name in six:
        (tmp_path / f"{name}.py").write_bytes((ROOT / f"{name}.py").read_bytes())
    monkeypatch.setattr(trainings, "ROOT", tmp_path)
    assert environment(CPU) == found
    for name in six:
        path = tmp_path / f"{name}.py"
        path.write_text(path.read_text() + "\n")
        assert environment(CPU)["modules"] != found["modules"]
        path.write_text(path.read_text()[:-1])
    assert environment(CPU) == found


def test_settings_that_changed_meanwhile_are_noticed_before_it_trains(run):
    config = run.out / "config.json"
    config.write_text(config.read_text().replace('"rounds": 20', '"rounds": 21'))
    with pytest.raises(DataError, match=f"^{config}: has just got other settings; choose another"):
        run.folder(FL).begin({}, CPU)
    assert not run.folder(FL).is_begun()


# ------------------------------------------------------------------------------------- its training


def test_it_goes_on_from_its_last_round(run):
    assert run.folder(FL).checkpoint() == Checkpoint()
    run.folder(FL).begin({}, CPU)
    for n in (1, 2, 3):
        run.folder(FL).keep_round(checkpoint(n))
        assert plain(again(run, FL).checkpoint()) == plain(checkpoint(n))
    assert again(run, FEDGIN).checkpoint() == Checkpoint()  # each has its own


def test_before_the_first_validation_there_is_no_best(run):
    folder = run.folder(FL)
    folder.begin({}, CPU)
    first = Checkpoint(1, {"w": torch.ones(2)}, Best(), (Round(1, {"mri": 2.0}, {}, 1.0),))
    folder.keep_round(first)
    assert plain(again(run, FL).checkpoint()) == plain(first)


def test_a_model_is_its_best_weights_and_what_predictions_need(tmp_path):
    settings = {"spacing": 9.0, "patch": 16, "width": 4, "depth": 3, "organs": ORGANS}
    run = RunFolder(Config(**settings, out=str(tmp_path / "out")), ORDER)
    run.open([])
    training = Training(7, "fedgin", "1:5", 0.25)
    folder = run.folder(training)
    folder.begin({}, CPU)
    folder.keep_round(checkpoint(3, best=2))
    folder.keep_model(checkpoint(3, best=2))
    saved = torch.load(tmp_path / "out/fedgin-1-5-p0.25-seed7/model.pt", weights_only=True)
    assert saved.pop("weights")["w"].tolist() == [2.0, 2.0]
    assert saved == {
        "run": run.id,
        "arm": "fedgin 1:5 p=0.25",
        "seed": 7,
        "model": {**settings, "normalization": NORMALIZATION, "phantoms": True},
        "round": 3,
        "best": {"val_dice": 0.5, "round": 2, "weights": None},
        "history": [vars(done) for done in checkpoint(3).history],
    }
    found = again(run, training).checkpoint()
    best = (0.5, 2, {"w": [2.0, 2.0]})
    assert plain(found) == (3, None, best, checkpoint(3).history)


def test_the_checkpoint_goes_once_the_model_is_there(run, monkeypatch):
    folder = run.folder(FL)
    folder.begin({}, CPU)
    folder.keep_round(checkpoint(2))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            folder.keep_model(checkpoint(2))
    assert plain(again(run, FL).checkpoint()) == plain(checkpoint(2))
    folder.keep_model(checkpoint(2))
    assert not (folder.path / "checkpoint.pt").exists()
    # Killed between the two: the model counts.
    files.write_pt(folder.path / "checkpoint.pt", {"run": "x"})
    assert again(run, FL).checkpoint().weights is None


# ----------------------------------------------------------------------------------------- its test


def test_scores_are_a_row_an_organ(run):
    folder = run.folder(FEDGIN)
    train(folder, cases=[("a", scores(liver=0.1 + 0.2, spleen=None))])
    with (folder.path / "scores.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        [
            *("seed", "arm", "ratio", "p", "hospital", "scanner", "case", "modality", "organ"),
            *("outcome", "dice", "hd95", "nsd"),
        ],
        [
            *("1", "fedgin", "", "1.0", "mri", "own", "a", "mri", "liver", "scored"),
            *("0.30000000000000004", "3.0000000000000004", "0.15000000000000002"),
        ],
        [*("1", "fedgin", "", "1.0", "mri", "own", "a", "mri", "spleen"), "absent", "", "", ""],
    ]
    liver, spleen = again(run, FEDGIN).scores()
    assert liver == {
        **{"seed": 1, "arm": "fedgin", "ratio": "", "p": 1.0, "hospital": "mri", "scanner": "own"},
        **{"case": "a", "modality": "mri", "organ": "liver", "outcome": "scored"},
        **{"dice": 0.1 + 0.2, "hd95": 10 * (0.1 + 0.2), "nsd": (0.1 + 0.2) / 2},
    }
    assert all(math.isnan(spleen[metric]) for metric in ("dice", "hd95", "nsd"))


def test_a_folder_that_is_only_tested_on_has_another_scanner(run):
    folder = run.folder(FL)
    folder.begin({}, CPU)
    folder.keep_scores(OTHER, case("x", "ct"), scores(liver=0.5, spleen=0.5))
    assert [(s["hospital"], s["scanner"], s["modality"], s["p"]) for s in folder.scores()] == [
        ("far", "other", "ct", None)
    ] * 2


def test_a_test_goes_on_after_its_last_case(run):
    found = [(f"case {n}", scores(liver=n / 8, spleen=None)) for n in range(4)]
    run.folder(FL).begin({}, CPU)
    for n in range(4):
        folder = again(run, FL)
        assert folder.n_tested() == n
        keep_cases(folder, found[n])
        assert folder.n_tested() == again(run, FL).n_tested() == n + 1
    assert again(run, FEDGIN).n_tested() == 0
    kept = again(run, FL).scores()
    assert [(s["case"], s["organ"]) for s in kept] == [
        (f"case {n}", organ) for n in range(4) for organ in ORGANS
    ]
    again(run, FL).finish(checkpoint(2))
    done = again(run, FL)
    assert str(done.scores()) == str(kept)  # as strings: NaN is no NaN's equal
    assert not (done.path / "testing.csv").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda whole: whole[: whole.rindex(b"1,fl")],  # without b's spleen
        lambda whole: whole[:-5],
        lambda whole: whole.replace(b"0.25", b"0.24"),
        lambda whole: b"",
    ],
)
def test_a_test_that_is_not_as_it_was_left_is_named(spoil, run):
    folder = run.folder(FL)
    folder.begin({}, CPU)
    both = [(id_, scores(liver=0.5, spleen=0.25)) for id_ in "ab"]
    keep_cases(folder, *both)
    path = folder.path / "testing.csv"
    whole = path.read_bytes()
    path.write_bytes(spoil(whole))
    message = f"^{path}: is not as this program left it, by training.json; delete it to test anew$"
    for use in (TrainingFolder.n_tested, TrainingFolder.scores):
        with pytest.raises(DataError, match=message):
            use(again(run, FL))
    path.unlink()  # as it is told
    assert again(run, FL).n_tested() == 0
    keep_cases(again(run, FL), *both)
    assert path.read_bytes() == whole
    assert again(run, FL).n_tested() == 2


@pytest.mark.parametrize("first", ["training.json", "testing.csv"])
def test_a_process_may_be_killed_while_it_keeps_a_case(first, run, monkeypatch):
    """Before either of the two files is written, that is, as often as one likes."""
    folder = run.folder(FL)
    folder.begin({}, CPU)
    keep_cases(folder, ("a", scores(liver=0.5, spleen=0.25)))
    write = files.write

    def killed(path, content, root=None):
        if path.name == first:
            raise KeyboardInterrupt
        write(path, content, root)

    for _ in range(3):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(files, "write", killed)
            keep_cases(again(run, FL), ("b", scores(liver=0.25, spleen=0.5)))
        assert again(run, FL).n_tested() == 1
    keep_cases(again(run, FL), ("b", scores(liver=0.25, spleen=0.5)))
    assert again(run, FL).n_tested() == 2


@pytest.mark.parametrize(
    "content",
    [
        "a,b\r\n1,2\r\n",
        "{header}\r\nx,fl,,,mri,own,a,mri,liver,scored,1,1,1\r\n",
        "{header}\r\n1,fl,,x,mri,own,a,mri,liver,scored,1,1,1\r\n",
        "{header}\r\n1,fl,,,mri,own,a,mri,liver,scored,much,1,1\r\n",
    ],
)
def test_scores_of_another_form_are_named(content, run):
    folder = run.folder(FL)
    folder.begin({}, CPU)
    header = "seed,arm,ratio,p,hospital,scanner,case,modality,organ,outcome,dice,hd95,nsd"
    path = folder.path / "testing.csv"
    path.write_text(content.replace("{header}", header), newline="")
    folder._note({**folder.about, "testing.csv": [files.checksum(path)]})
    with pytest.raises(DataError, match=r"testing.csv: is not as this program left it \("):
        folder.scores()


def test_names_of_cases_may_be_no_utf_8(run):
    folder = run.folder(FL)
    odd = os.fsdecode(b's\xff, "x"')
    train(folder, cases=[(odd, scores(liver=0.5, spleen=0.5))])
    assert [s["case"] for s in again(run, FL).scores()] == [odd, odd]
    run.report([FL])
    assert (
        odd.encode("utf-8", "surrogateescape").split(b",")[0]
        in (run.out / "scores.csv").read_bytes()
    )


# ---------------------------------------------------------------------------------- what is damaged


@pytest.mark.parametrize("name", ["history.csv", "scores.csv"])
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_a_finished_training_is_as_it_was_left(how, name, run):
    train(run.folder(FL))
    path = run.folder(FL).path / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + b"9\r\n")
    if how == "missing":
        path.unlink()
        if name == "scores.csv":  # then it is not finished: its test is done again
            assert not again(run, FL).is_finished()
            return
    message = (
        f"^{path}: is missing, or not as it was when the training finished; bring it back, or "
        f"delete {path.parent} to train anew$"
    )
    for look in (TrainingFolder.is_finished, TrainingFolder.scores):
        with pytest.raises(DataError, match=message):
            look(again(run, FL))
    with pytest.raises(DataError, match=message):
        run.unfinished([FL])
    path.write_bytes(whole)
    assert again(run, FL).is_finished()


def test_a_finished_training_without_its_description_is_named(run):
    train(run.folder(FL))
    (run.folder(FL).path / "training.json").unlink()
    with pytest.raises(DataError, match=r"training.json: cannot be read"):
        again(run, FL).is_finished()


@pytest.mark.parametrize("name", ["training.json", "checkpoint.pt", "model.pt"])
def test_a_damaged_file_is_named(name, run):
    folder = run.folder(FL)
    folder.begin({}, CPU)
    folder.keep_round(checkpoint(1))
    if name == "model.pt":
        folder.keep_model(checkpoint(1))
    path = folder.path / name
    whole = path.read_bytes()
    for content in (b"junk", b"", b"\xff\xfe", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            _ = again(run, FL).about if name == "training.json" else again(run, FL).checkpoint()
        assert str(caught.value).startswith(f"{path}: cannot be read (")
        assert len(str(caught.value).splitlines()) == 1
        assert path.read_bytes() == content
    path.write_bytes(whole)
    assert again(run, FL).checkpoint().round == 1


def without(key):
    return lambda content: {k: v for k, v in content.items() if k != key}


@pytest.mark.parametrize("name", ["checkpoint.pt", "model.pt"])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda content: {}, "KeyError"),
        (without("run"), "KeyError"),
        (without("weights"), "KeyError"),
        (without("best"), "KeyError"),
        (without("history"), "KeyError"),
        (lambda content: content | {"run": "other"}, "ValueError: it is of another run"),
        (lambda content: content | {"best": 3}, "TypeError"),
        (lambda content: content | {"best": {"dice": 1}}, "TypeError"),
        (lambda content: content | {"history": [1]}, "TypeError"),
        (lambda content: content | {"history": [{"round": 1}]}, "TypeError"),
        (lambda content: content | {"history": None}, "TypeError"),
    ],
)
def test_a_file_of_another_form_is_bad_input(change, what, name, run):
    folder = run.folder(FL)
    folder.begin({}, CPU)
    folder.keep_round(checkpoint(1))
    if name == "model.pt":
        folder.keep_model(checkpoint(1))
    path = folder.path / name
    torch.save(change(torch.load(path, weights_only=True)), path)
    with pytest.raises(DataError) as caught:
        again(run, FL).checkpoint()
    assert str(caught.value).startswith(f"{path}: is not as this program left it ({what}")
    assert str(caught.value).endswith("; choose another --out")


def test_a_checkpoint_runs_no_code(run, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    run.folder(FL).begin({}, CPU)
    torch.save({"weights": Evil()}, run.folder(FL).path / "checkpoint.pt")
    with pytest.raises(DataError, match="checkpoint.pt: cannot be read"):
        again(run, FL).checkpoint()
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("key", ["run", "training"])
def test_a_folder_of_another_run_or_training_is_refused(key, run):
    folder = run.folder(FL)
    folder.begin({}, CPU)
    path = folder.path / "training.json"
    about = without("checksum")(json.loads(path.read_text()))
    for other in (about | {key: "other"}, without(key)(about)):
        path.write_text(json.dumps({**other, "checksum": files.sha256(files.to_json(other))}))
        with pytest.raises(DataError, match=f"^{path}: is of another run or training; choose anot"):
            again(run, FL).begin({}, CPU)
        path.write_text(json.dumps(other))
        with pytest.raises(DataError, match=f"^{path}: is not as this program left it; choose"):
            again(run, FL).begin({}, CPU)
    assert json.loads(path.read_text()) == other


def test_scores_may_come_from_several_machines(run):
    """Then all of them are kept, in place of those of this machine's test cases."""
    folder = run.folder(FL)
    folder.begin({}, CPU)
    folder.keep_model(checkpoint(2))
    keep_cases(folder, ("a", scores(liver=0.5, spleen=0.25)))
    own = folder.scores()
    other = [{**score, "hospital": "ct", "case": "b", "modality": "ct"} for score in own]
    folder.finish(checkpoint(2), [*own, *other])
    assert again(run, FL).scores() == [*own, *other]
    assert not (folder.path / "testing.csv").exists()
