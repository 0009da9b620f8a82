"""What a run leaves, and what it refuses to go on from."""

import csv
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from tiny import assert_same, command, outcome

import results
from config import Config
from data import NORMALIZATION
from datasets import DataError
from results import check_out, open_run
from tables import title

ORGANS = ("liver", "spleen")
LABELS = ("fl", "fedgin p=1")
HOSPITALS = {"mri": {"splits": {1: {"train": ["a", "b"]}}, "files": {"a": [[3, 4]]}}}


@pytest.fixture
def config(tmp_path):
    choice = {"scenario": "complete", "arms": ("fl", "fedgin"), "seeds": (1, 2)}
    return Config(organs=ORGANS, **choice, out=str(tmp_path / "out"))


def state(seed, arm, rounds):
    """The state of a training after some rounds, whose weights are the round they are of."""
    weights = {"w": torch.full((2,), float(rounds))}
    best = {"val_dice": 0.5, "round": 1, "weights": {"w": torch.ones(2)}}
    columns = {"loss": 1.5, "val_dice_mri": 0.25, "val_dice_ct": "", f"loss {arm[:2]}": 1.5}
    history = [{"seed": seed, "arm": arm, "round": n + 1, **columns} for n in range(rounds)]
    training = {"seed": seed, "arm": arm, "round": rounds, "weights": weights}
    return {**training, "best": best, "history": history}


def score(case, **dices):
    """Scores of a case, by organ: Dice d, HD95 10 d, NSD d / 2; None for an absent organ."""
    scores = {
        organ: {"outcome": "scored", "dice": d, "hd95": 10 * d, "nsd": d / 2}
        if d is not None
        else {"outcome": "absent"}
        for organ, d in dices.items()
    }
    about = {"hospital": "mri", "scanner": "own", "modality": "mri"}
    return {**about, "case": case, "scores": scores}


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ----------------------------------------------------------------------------------- what is left


def test_a_run_leaves_what_it_promises(config, tmp_path):
    out = tmp_path / "out"
    trainings = [(seed, arm) for seed in config.seeds for arm in LABELS]
    with open_run(config, HOSPITALS) as run:
        for n, (seed, arm) in enumerate(trainings):
            assert not run.is_finished(seed, arm)
            for rounds in (1, 2):
                run.keep_round(state(seed, arm, rounds))
                with (out / "history.csv").open(newline="") as file:
                    rows = list(csv.reader(file))
                columns = ["seed", "arm", "round", "loss", "val_dice_mri", "val_dice_ct"]
                assert rows[0] == [*columns, "loss fl", "loss fe"][: 7 + (n > 0)]
                assert len(rows) == 1 + 2 * n + rounds
                others = ["1.5", ""] if arm == "fl" else ["", "1.5"]
                own = [str(seed), arm, str(rounds), "1.5", "0.25", "", *others]
                assert rows[-1] == own[: len(rows[0])]
            run.keep_model(state(seed, arm, 2))
            run.finish(state(seed, arm, 2), [score("a", liver=n / 4, spleen=None)])
            assert run.is_finished(seed, arm)
        report = run.report("who trained")
    models = [f"{arm}-seed{seed}.pt" for seed in (1, 2) for arm in ("fl", "fedgin-p1")]
    left = ["config.json", "history.csv", "hospitals/mri.json", "lock", "results.json"]
    assert names(out) == sorted([*models, *left, "results.md", "scores.csv"])
    saved = json.loads((out / "config.json").read_text())
    assert saved["seeds"] == [1, 2]
    assert saved["versions"]["torch"] == torch.__version__
    hospital = json.loads((out / "hospitals/mri.json").read_text())
    assert hospital["splits"]["1"]["train"] == ["a", "b"]
    found = json.loads((out / "results.json").read_text())
    assert found["finished"] == [list(training) for training in trainings]
    assert [(r["seed"], r["arm"], r["case"]) for r in found["results"]] == [
        (*training, "a") for training in trainings
    ]
    assert found["history"] == [row for t in trainings for row in state(*t, 2)["history"]]
    assert (out / "results.md").read_text() == f"{report}\n\n    who trained\n"
    assert report.splitlines()[0] == title(config, found["results"])
    assert "### Scanners of the hospitals that train: mri\n" in report
    assert "| fl         | 0.250 ± 0.354 |" in report  # liver alone: 0 of seed 1, 0.5 of seed 2
    assert "| fedgin p=1 | 0.500 ± 0.354 |" in report
    with (out / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * len(ORGANS)
    assert rows[2] | {"hd95": "", "nsd": ""} == {
        **{"seed": "1", "arm": "fedgin p=1", "hospital": "mri", "case": "a", "modality": "mri"},
        **{"organ": "liver", "outcome": "scored", "dice": "0.25", "hd95": "", "nsd": ""},
    }


def test_a_model_is_its_best_weights_and_what_predict_needs(config, tmp_path):
    one_seed = dataclasses.replace(config, seeds=(7,), spacing=9.0, patch=16, width=4, depth=3)
    with open_run(one_seed, HOSPITALS) as run:
        run.keep_model(state(7, "fedgin 1:5", 3))
    saved = torch.load(tmp_path / "out/fedgin-1-5-seed7.pt", weights_only=True)
    assert saved.pop("weights")["w"].tolist() == [1.0, 1.0]
    model = {"organs": ORGANS, "spacing": 9.0, "normalization": NORMALIZATION, "phantoms": True}
    assert saved == {
        "val_dice": 0.5,
        "round": 1,
        "format": results.FORMAT,
        "arm": "fedgin 1:5",
        "seed": 7,
        "model": {**model, "patch": 16, "width": 4, "depth": 3},
    }


def test_a_stopped_run_knows_where_it_stopped(config):
    with open_run(config, HOSPITALS) as run:
        assert run.checkpoint(1, "fl") == {}
        run.keep_round(state(1, "fl", 2))
        run.finish(state(1, "fl", 2), [score("a", liver=0.5, spleen=0.5)])
        run.keep_round(state(1, "fedgin p=1", 1))
        run.keep_round(state(1, "fedgin p=1", 2))
    with open_run(dataclasses.replace(config, resume=True), HOSPITALS) as run:
        assert run.is_finished(1, "fl")
        for unfinished in ((1, "fedgin p=1"), (2, "fl"), (2, "fedgin p=1")):
            assert not run.is_finished(*unfinished)
        assert run.checkpoint(1, "fl") == run.checkpoint(2, "fedgin p=1") == {}
        found, kept = run.checkpoint(1, "fedgin p=1"), state(1, "fedgin p=1", 2)
        for holder in (found, found["best"], kept, kept["best"]):
            holder["weights"] = holder["weights"]["w"].tolist()
        assert found == kept
        run.finish(state(1, "fedgin p=1", 2), [score("a", liver=1.0, spleen=1.0)])
        assert "| fl         | 0.500" in run.report("")  # of the first process


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    path = tmp_path / "results.json"
    results.write(path, b"old")
    monkeypatch.setattr(results.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        results.write(path, b"new")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    results.write(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["results.json"]


# -------------------------------------------------------------------------------- what is refused


def test_a_run_is_never_overwritten_unasked(config, tmp_path):
    resumed = dataclasses.replace(config, resume=True)
    check_out(config)
    check_out(resumed)
    with open_run(config, HOSPITALS) as run:
        check_out(config)  # with nothing trained there is nothing to lose
        run.keep_round(state(1, "fl", 1))
    with pytest.raises(
        DataError, match="out: holds a run; --resume continues or extends it, --out"
    ):
        check_out(config)
    check_out(resumed)


@pytest.mark.parametrize("name", ["history.csv", "results.json", "results.md", "fl.pt"])
def test_files_of_another_origin_are_not_overwritten(name, config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("of somebody else")
    for resume in (False, True):
        with pytest.raises(DataError, match=f"{name}: is there, and no run beside it"):
            check_out(dataclasses.replace(config, resume=resume))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named_at_once(config, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="cannot be written"):
        check_out(config)


def test_a_finished_arm_has_its_scores_and_its_history(config, tmp_path):
    tested = {"mri": {"splits": {1: {"test": ["a"]}, 2: {"test": ["a"]}}, "files": {}}}
    with open_run(config, tested) as run:
        run.keep_round(state(1, "fl", 2))
        run.finish(state(1, "fl", 2), [score("a", liver=0.5, spleen=0.5)])
    path = tmp_path / "out/results.json"
    whole = json.loads(path.read_text())
    for key in ("results", "history"):
        path.write_text(json.dumps(whole | {key: []}))
        message = "results.json: is not what a run leaves .* fl, seed 1"
        with pytest.raises(DataError, match=message), open_run(config, tested):
            pytest.fail("went on")
    assert (tmp_path / "out/checkpoint.pt").exists()
    path.write_text(json.dumps(whole))
    (tmp_path / "out/checkpoint.pt").unlink()
    with open_run(config, tested) as run:  # what is finished needs no checkpoint
        run.keep_round(state(1, "fedgin p=1", 1))
    with (tmp_path / "out/history.csv").open(newline="") as file:
        rounds = [row[1:3] for row in csv.reader(file)][1:]
    assert rounds == [["fl", "1"], ["fl", "2"], ["fedgin p=1", "1"]]


@pytest.mark.parametrize("content", [[], {}, {"round": 1}, 3, None, "NaN", "round", "history"])
@pytest.mark.parametrize("name", ["checkpoint.pt", "results.json", "config.json"])
def test_a_file_of_another_form_is_bad_input(name, content, config, tmp_path):
    with open_run(config, HOSPITALS) as run:
        run.keep_round(state(1, "fl", 2))
        run.finish(state(1, "fl", 2), [])
        run.keep_round(state(1, "fedgin p=1", 2))
    path = tmp_path / "out" / name
    if isinstance(content, str):
        if name != "checkpoint.pt":
            pytest.skip("of checkpoints")
        kept = state(1, "fedgin p=1", 2)
        if content == "NaN":
            kept["best"]["weights"]["w"][0] = math.nan
        else:
            del kept[content]
        content = kept
    if name == "checkpoint.pt":
        torch.save(content, path)
    else:
        path.write_text(json.dumps(content))
    message = f"{name}: |holds a run with other settings"
    with pytest.raises(DataError, match=message), open_run(config, HOSPITALS):
        pytest.fail("went on")


def refused(config, hospitals=HOSPITALS):
    with pytest.raises(DataError) as caught, open_run(config, hospitals):
        pytest.fail("went on")
    return str(caught.value).removeprefix(f"{config.out}: ")


def test_other_settings_and_other_data_are_refused_by_name(config, tmp_path):
    with open_run(config, HOSPITALS) as run:
        run.keep_round(state(1, "fl", 1))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")}
    other = dataclasses.replace(config, lr=1e-3, width=4, resume=True, cache="elsewhere")
    start, end = (
        "holds a run with other settings: ",
        ". Give its own settings, or choose another --out",
    )
    assert refused(other) == f"{start}lr 0.004, now 0.001; width 8, now 4{end}"
    longer = dataclasses.replace(config, rounds=30)
    why = "rounds cannot be added, as the learning rate falls to 0 over those planned"
    assert refused(longer) == f"{start}rounds 20, now 30; {why}{end}"
    [mri] = HOSPITALS.values()
    split = {"mri": mri | {"splits": {1: {"train": ["a", "c"]}}}, "ct": mri}
    assert refused(config, split) == f"{start}mri has other cases, or splits them otherwise{end}"
    changed = {"mri": mri | {"files": {"a": [[3, 5]]}}}
    assert refused(config, changed) == f"{start}files of mri have changed: a{end}"
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")} == before
    path = tmp_path / "out/config.json"
    saved = json.loads(before[path])
    for key, value, now in (("format", 0, results.FORMAT), ("lr", None, 0.004)):
        path.write_text(json.dumps({**saved, key: value}))
        assert refused(config) == f"{start}{key} {value}, now {now}{end}"
    del saved["lr"]
    path.write_text(json.dumps(saved))
    assert refused(config) == f"{start}lr None, now 0.004{end}"


def test_a_run_that_has_trained_nothing_may_change_its_settings_and_data(config, tmp_path):
    with open_run(config, HOSPITALS):
        pass
    other = dataclasses.replace(config, lr=1e-3, rounds=7)
    ct = {"ct": HOSPITALS["mri"]}
    with open_run(other, ct):
        saved = json.loads((tmp_path / "out/config.json").read_text())
        assert (saved["lr"], saved["rounds"]) == (1e-3, 7)
        assert names(tmp_path / "out/hospitals") == ["ct.json"]


def test_a_run_is_extended_by_seeds_arms_ratios_and_shares(config, tmp_path):
    for number, changes in enumerate(
        (
            {"seeds": (1,), "arms": ("fl",)},
            {"seeds": (2,), "arms": ("fl",)},
            {"seeds": (1,), "arms": ("fedgin",), "gin_probability": (0.25, 1.0)},
        )
    ):
        splits = {seed: {"train": ["a"]} for seed in changes["seeds"]}
        hospitals = {"mri": {"splits": splits, "files": {f"case{number}": [[1, 2]]}}}
        arm = ("fl", "fl", "fedgin p=0.25")[number]
        with open_run(dataclasses.replace(config, resume=True, **changes), hospitals) as run:
            seed = changes["seeds"][0]
            assert not run.is_finished(seed, arm)
            run.keep_round(state(seed, arm, 2))
            run.finish(state(seed, arm, 2), [score("a", liver=0.5, spleen=0.5)])
            report = run.report("")
    saved = json.loads((tmp_path / "out/config.json").read_text())
    assert (saved["seeds"], saved["arms"]) == ([1, 2], ["fl", "fedgin"])
    assert saved["gin_probability"] == [1.0, 0.25]
    mri = json.loads((tmp_path / "out/hospitals/mri.json").read_text())
    assert mri["splits"] == {"1": {"train": ["a"]}, "2": {"train": ["a"]}}
    assert list(mri["files"]) == ["case0", "case1", "case2"]
    assert "seeds 1 2: PHANTOMS" in report
    assert "| fl            | 0.500 ± 0.000 |" in report
    assert "| fedgin p=0.25 | 0.500  " in report


def test_a_training_that_stopped_must_be_named_again(config):
    with open_run(config, HOSPITALS) as run:
        run.keep_round(state(1, "fl", 3))
    for changes in ({"arms": ("fedgin",)}, {"seeds": (2,)}):
        other = refused(dataclasses.replace(config, resume=True, **changes))
        assert other == "arm fl, seed 1, stopped in round 3; name it too, or it would be lost"
    with open_run(config, HOSPITALS) as run:
        run.finish(state(1, "fl", 3), [])
    with open_run(dataclasses.replace(config, arms=("fedgin",)), HOSPITALS) as run:
        assert run.is_finished(1, "fl")


def test_a_test_goes_on_after_its_last_case(config):
    scores = [score("a", liver=0.5, spleen=None), score("b", liver=0.25, spleen=None)]
    with open_run(config, HOSPITALS) as run:
        assert run.tested(1, "fl") == []
        run.keep_round(state(1, "fl", 20))
        for n in (1, 2):
            run.keep_tested(1, "fl", scores[:n])
    with open_run(config, HOSPITALS) as run:
        assert run.tested(1, "fl") == scores
        assert run.tested(2, "fl") == run.tested(1, "fedgin p=1") == []
        run.finish(state(1, "fl", 20), scores)
        run.report("")
        assert not (run.out / "tested.json").exists()


def test_however_a_folder_is_written_it_is_the_same(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "ct_set")
    (tmp_path / "ct_set").mkdir()
    config = dataclasses.replace(config, ct=("ct_set",), mri=("other",))
    with open_run(config, HOSPITALS) as run:
        run.keep_round(state(1, "fl", 1))
    for same in ("ct_set/", "./ct_set", "link", str(tmp_path / "ct_set")):
        with open_run(dataclasses.replace(config, ct=(same,)), HOSPITALS):
            pass
    told = refused(dataclasses.replace(config, ct=("elsewhere",)))
    assert f"ct {tmp_path}/ct_set, now {tmp_path}/elsewhere" in told


def test_another_place_cache_and_version_do_not_matter(config, tmp_path):
    with open_run(config, HOSPITALS) as run:
        run.keep_round(state(1, "fl", 1))
    (tmp_path / "out").rename(tmp_path / "moved")
    file = tmp_path / "moved/config.json"
    versions = {"python": "3.10.1", "torch": "2.1"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "versions": versions}))
    changes = {"out": str(tmp_path / "moved"), "cache": "elsewhere", "no_cache": True}
    with open_run(dataclasses.replace(config, resume=True, **changes), HOSPITALS):
        assert json.loads(file.read_text())["versions"] == versions


@pytest.mark.parametrize(
    "name", ["config.json", "hospitals/mri.json", "results.json", "checkpoint.pt"]
)
def test_a_damaged_file_is_named(name, config, tmp_path):
    with open_run(config, HOSPITALS) as run:
        run.keep_round(state(1, "fl", 1))
        run.finish(state(1, "fl", 1), [])
    path = tmp_path / "out" / name
    whole = path.read_bytes()
    for content in (b"junk", b"", b"\xff\xfe", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError) as caught, open_run(config, HOSPITALS):
            pytest.fail("went on")
        assert str(caught.value).startswith(f"{path}: cannot be read (")
        assert len(str(caught.value).splitlines()) == 1
        assert path.read_bytes() == content
    path.write_bytes(whole)
    with open_run(config, HOSPITALS) as run:
        assert run.is_finished(1, "fl")


def test_a_checkpoint_runs_no_code(config, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    with open_run(config, HOSPITALS):
        torch.save({"weights": Evil()}, tmp_path / "out/checkpoint.pt")
    with pytest.raises(DataError, match="checkpoint.pt: cannot be read"), open_run(config, {}):
        pytest.fail("went on")
    assert "code ran" not in capsys.readouterr().out


HOLD = """
import fcntl, sys
with open(sys.argv[1], "a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_share_a_run(config, tmp_path):
    with open_run(config, HOSPITALS):
        message = "out: another process is at work on this run"
        with pytest.raises(DataError, match=message), open_run(config, HOSPITALS):
            pytest.fail("went on")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    args = [sys.executable, "-c", HOLD, str(tmp_path / "out/lock")]
    with subprocess.Popen(args, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(DataError, match=message), open_run(config, HOSPITALS):
            pytest.fail("went on")
        process.kill()
        process.wait()
        with open_run(config, HOSPITALS):
            pass
    with pytest.raises(KeyError), open_run(config, HOSPITALS):
        raise KeyError
    with open_run(config, HOSPITALS):
        pass


# -------------------------------------------------------------------- the same through the command


@pytest.mark.slow
def test_resume_refuses_other_settings_other_data_and_other_formats(tmp_path, capsys):
    out = tmp_path / "out"
    assert command("--out", out) == 0
    before = outcome(out)
    assert command("--out", out, "--resume") == 0  # nothing left to do
    assert_same(before, outcome(out))
    capsys.readouterr()
    assert command("--out", out) == 2
    assert "holds a run; --resume continues or extends it" in capsys.readouterr().err
    assert command("--out", out, "--resume", "--lr", "1e-3", "--width", "4") == 2
    assert "other settings: lr 0.004, now 0.001; width 2, now 4." in capsys.readouterr().err
    assert command("--out", out, "--resume", "--sites", "2") == 2
    assert "other settings: sites 1, now 2." in capsys.readouterr().err
    hospitals = sorted(path.name for path in (out / "hospitals").iterdir())
    assert hospitals == ["ct.json", "mri.json", "other-scanner.json"]
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "format": 0}))
    assert command("--out", out, "--resume") == 2
    assert f"other settings: format 0, now {results.FORMAT}." in capsys.readouterr().err
    (out / "config.json").write_text(json.dumps(config))
    assert_same(before, outcome(out))


def test_resume_names_a_damaged_file(tmp_path, capsys):
    assert command("--out", tmp_path, "--rounds", 1, "--arms", "fl") == 0
    torch.save({}, tmp_path / "checkpoint.pt")
    capsys.readouterr()
    for name in ("checkpoint.pt", "results.json", "config.json"):
        for content in (b"junk", (tmp_path / name).read_bytes()[:100]):
            (tmp_path / name).write_bytes(content)
            assert command("--out", tmp_path, "--rounds", 1, "--arms", "fl", "--resume") == 2
            error = capsys.readouterr().err
            assert f"{name}: cannot be read" in error
            assert len(error.splitlines()) == 1


def test_resume_refuses_files_that_changed(tmp_path, ct_folder, mri_folder, capsys):
    shutil.copytree(mri_folder, tmp_path / "mri")
    args = ["--ct", ct_folder, "--mri", tmp_path / "mri", "--spacing", 12, "--rounds", 1]
    args += ["--out", tmp_path / "out"]
    assert command(*args) == 0
    assert command(*args, "--resume") == 0
    path = tmp_path / "mri/labelsTr/case_000.nii.gz"
    os.utime(path, (1, 1))
    assert command(*args, "--resume") == 0  # touched, and the same
    path.write_bytes((path.parent / "case_001.nii.gz").read_bytes())
    assert command(*args, "--resume") == 2
    assert "files of mri have changed: case_000." in capsys.readouterr().err
