"""The folder of a run: who trains what, what is refused, and the tables made of what is there."""

import csv
import dataclasses
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_trainings import CPU, FEDGIN, FL, ORDER, ORGANS, checkpoint, names, scores, train

import fedgin
from scans import files
from scans.files import DataError
from study import tables, trainings
from study.config import Config, Training
from study.console import Progress
from study.hospitals import load_hospitals
from study.results import NOT_SHARED, RunFolder

ROOT = Path(__file__).parent.parent
SPLIT = {"train": ["a", "b"], "val": [], "test": ["c"]}
MRI = {"hospital": "mri", "seed": 1, "cases": SPLIT, "files": {"a": [[3, 4]]}}


@pytest.fixture
def config(tmp_path):
    return Config(organs=ORGANS, scenario="complete", seeds=(1, 2), out=str(tmp_path / "out"))


def opened(config, *records):
    folder = RunFolder(config, ORDER)
    folder.open(records or [MRI])
    return folder


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


# ----------------------------------------------------------------------------------- what is left


def test_a_run_leaves_what_it_promises(config, tmp_path):
    out = tmp_path / "out"
    wanted = [Training(seed, arm.arm, p=arm.p) for seed in (1, 2) for arm in (FL, FEDGIN)]
    run = opened(config, MRI, MRI | {"seed": 2})
    assert names(out) == [
        "config.json",
        "hospitals/mri-seed1.json",
        "hospitals/mri-seed2.json",
        "lock",
    ]
    assert run.unfinished(wanted) == wanted
    for n, training in enumerate(wanted):
        train(run.folder(training), cases=[("a", scores(liver=n / 4, spleen=None))])
        assert run.unfinished(wanted) == wanted[n + 1 :]
    report = run.report(wanted)
    of_each = ["history.csv", "model.pt", "scores.csv", "training.json"]
    shared = ["config.json", "history.csv", "hospitals/mri-seed1.json", "hospitals/mri-seed2.json"]
    assert names(out) == sorted(
        [*shared, "lock", "results.md", "scores.csv"]
        + [f"{training.folder}/{name}" for training in wanted for name in of_each]
    )
    saved = json.loads((out / "config.json").read_text())
    assert saved.pop("made by") == "fedgin.py"
    assert saved.pop("format") == 3
    fields = dataclasses.asdict(config)
    assert saved == {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in fields.items()
        if key not in NOT_SHARED
    }
    assert set(NOT_SHARED) == {
        *("arms", "ratios", "gin_probability", "seeds", "out", "cache", "no_cache"),
    }
    assert json.loads((out / "hospitals/mri-seed2.json").read_text()) == MRI | {"seed": 2}
    order = [wanted[0], wanted[2], wanted[1], wanted[3]]  # arms as they follow one another, seeds
    found = rows(out / "scores.csv")
    assert list(found[0]) == list(tables.SCORE)
    assert [(int(row["seed"]), row["arm"]) for row in found[::2]] == [
        (t.seed, t.arm) for t in order
    ]
    assert [row["dice"] for row in found] == ["0.0", "", "0.5", "", "0.25", "", "0.75", ""]
    history = rows(out / "history.csv")
    assert [(int(r["seed"]), r["arm"], int(r["round"])) for r in history] == [
        (t.seed, t.arm, n) for t in order for n in (1, 2)
    ]
    assert [row for t in order for row in run.folder(t).history()] == history
    lines = report.splitlines()
    assert lines[0] == (
        "## Test Dice, complete scenario, seeds 1 2: PHANTOMS (synthetic volumes, not patients)"
    )
    assert [cells(line) for line in lines[2:6:1]] == [
        ["Dice", "MRI own", "missed"],
        ["-" * 10, "-" * 13, "-" * 6],
        ["fl", "0.250 ± 0.354", "0"],  # liver alone: 0 of seed 1, 0.5 of seed 2
        ["fedgin p=1", "0.500 ± 0.354", "0"],
    ]
    assert lines[-1] == f"All tables: {out / 'results.md'}"
    text = (out / "results.md").read_text()
    assert text.startswith(report.rsplit("\n\n", 1)[0])
    assert "### Scanners of the hospitals that train: mri\n" in text
    assert text.endswith(
        "Training cases:\n\n"
        + "".join(f"    {t.label}, seed {t.seed}: {{'mri': 2, 'ct': 10}}\n" for t in order)
    )


def test_nothing_is_written_before_it_is_opened(config, tmp_path):
    run = RunFolder(config, ORDER)
    assert run.unfinished([FL, FEDGIN]) == [FL, FEDGIN]
    assert run.describe([FL, FEDGIN]) == f"{run.out}: 0 of 2 trainings finished"
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_of_a_run_is_described(config):
    run = opened(config)
    train(run.folder(FL))
    stopped, tested = run.folder(FEDGIN), run.folder(Training(2, "fl"))
    stopped.begin({}, CPU)
    for n in (1, 2, 3):
        stopped.keep_round(checkpoint(n))
    tested.begin({}, CPU)
    tested.keep_model(checkpoint(20))
    last = Training(2, "fedgin", p=1.0)
    every = [FL, FEDGIN, tested.training, last]
    assert run.describe(every) == (
        f"{run.out}: 1 of 4 trainings finished, fedgin p=1, seed 1, in round 4 of 20, "
        "fl, seed 2, in its test"
    )
    day = run.folder(FL).about["finished"]
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d", day)
    version = trainings.VERSION
    assert run.describe([FL]) == (
        f"{run.out}: 1 of 1 trainings finished, the last one on {day}, by version {version}"
    )


def test_rows_follow_arms_ratio_p_and_seed_whatever_was_trained_first(tmp_path):
    config = Config(organs=ORGANS, out=str(tmp_path / "out"))
    run = opened(config, MRI, MRI | {"seed": 10})
    expected = [
        *(Training(seed, "mri-only") for seed in (1, 10)),
        *(Training(seed, "fl", ratio) for ratio in ("1:1", "1:5", "all") for seed in (1, 10)),
        *(
            Training(seed, "fedgin", ratio, p)
            for ratio in ("1:1", "1:5")
            for p in (1.0, 0.5, 0.25)
            for seed in (1, 10)
        ),
        Training(1, "centralized+gin", "1:5", 1.0),
    ]
    shuffled = [expected[(8 * n) % len(expected)] for n in range(len(expected))]
    assert set(shuffled) == set(expected)
    for training in shuffled:
        train(run.folder(training), rounds=1)
    found = RunFolder(config, ORDER).begun()
    assert [folder.training for folder in found] == expected
    report = run.report([])
    labels = list(dict.fromkeys(training.label for training in expected))
    shown = [cells(line)[0] for line in report.splitlines() if line.startswith("|")]
    assert shown[2 : 2 + len(labels)] == labels
    assert list(dict.fromkeys(row["seed"] for row in rows(run.out / "scores.csv"))) == ["1", "10"]


def test_tables_are_made_of_what_is_there_and_say_what_is_not(config):
    run = opened(config)
    train(run.folder(FL))
    begun = run.folder(FEDGIN)
    begun.begin({}, CPU)
    begun.keep_round(checkpoint(1))
    report = run.report([FL, Training(2, "fl")])
    assert report.splitlines()[0].endswith(
        "; NOT FINISHED: 2 trainings"
    )  # one begun, one asked for
    assert {row["arm"] for row in rows(run.out / "scores.csv")} == {"fl"}
    assert [row["arm"] for row in rows(run.out / "history.csv")] == ["fl", "fl", "fedgin"]
    train(begun)
    assert "NOT FINISHED" not in run.report([FL])


def test_tables_of_a_run_without_any_finished_training(config):
    run = opened(config)
    lines = run.report([FL]).splitlines()
    assert lines[0].endswith("not patients); NOT FINISHED: 1 trainings")
    assert rows(run.out / "scores.csv") == []


@pytest.mark.parametrize("settings", [{"ct": ("a",)}, {"scenario": "limited", "mri": ("b",)}])
def test_titles(settings, config):
    run = opened(dataclasses.replace(config, **settings))
    train(run.folder(Training(2, "fl")))
    train(run.folder(Training(1, "fl")))
    title = run.report([]).splitlines()[0]
    scenario = settings.get("scenario", "complete")
    assert title == f"## Test Dice, {scenario} scenario, seeds 1 2: scans"


def test_in_what_trainings_differ_is_said(config, monkeypatch):
    run = opened(config)
    train(run.folder(FL))
    assert "NOTE" not in run.report([])
    monkeypatch.setattr(trainings, "VERSION", "3.0.0")
    train(run.folder(FEDGIN))
    (run.folder(FL).path / "model.pt").unlink()
    report = run.report([])
    versions = ", ".join(sorted(["3.0.0", "2.0.0"]))
    assert f"NOTE: trainings differ in version: {versions}\n" in report
    assert "NOTE: the model of fl, seed 1 is gone" in report
    assert "differ in torch" not in report
    assert report.split("\n\nAll tables")[0] in (run.out / "results.md").read_text()
    by = f"by version {' and '.join(sorted(['3.0.0', '2.0.0']))}"
    assert run.describe([FL, FEDGIN]).endswith(by)


# ------------------------------------------------------------------------------------------ by whom


def test_each_training_is_taken_in_turn_and_finished_ones_are_not(config):
    run, wanted = opened(config), [FL, FEDGIN, Training(2, "fl")]
    train(run.folder(FEDGIN))
    taken = []
    for folder in run.take(wanted):
        taken.append(folder.training)
        assert (
            files.holder(folder.path / "lock") == f"{socket.gethostname()}, process {os.getpid()}"
        )
        train(folder)
    assert taken == [FL, Training(2, "fl")]
    assert all(files.holder(run.folder(t).path / "lock") == "" for t in wanted)
    assert list(run.take(wanted)) == []


def test_the_tables_are_written_after_each_training(config):
    run, wanted = opened(config), [FL, FEDGIN]
    seen = []
    for folder in run.take(wanted):
        path = run.out / "results.md"
        seen.append(path.read_text().splitlines()[0][-29:] if path.exists() else "")
        if folder.training == FL:
            train(folder)
    assert seen == ["", "s); NOT FINISHED: 1 trainings"]
    text = (run.out / "results.md").read_text()
    assert "under way elsewhere" not in text  # the one that did not finish is held by nobody


HOLD = """
import sys
from pathlib import Path
from scans.files import lock
with lock(Path(sys.argv[1])) as held:
    print(held, flush=True)
    sys.stdin.read()
"""


def test_what_another_process_is_at_work_on_is_left_to_it(config):
    run, wanted = opened(config), [FL, FEDGIN]
    run.folder(FL).path.mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    args = [sys.executable, "-c", HOLD, str(run.folder(FL).path / "lock")]
    with subprocess.Popen(args, **pipes) as other:
        assert other.stdout.readline() == "True\n"
        assert [folder.training for folder in run.take(wanted)] == [FEDGIN]
        elsewhere = f"under way elsewhere: fl, seed 1 ({socket.gethostname()}, process {other.pid})"
        assert elsewhere in run.report(wanted).splitlines()
        other.kill()
        other.wait()
    assert "elsewhere" not in run.report(wanted)
    assert [folder.training for folder in run.take(wanted)] == wanted


def test_who_fails_holds_nothing(config):
    run = opened(config)
    with pytest.raises(KeyError):
        for _ in run.take([FL]):
            raise KeyError
    assert [folder.training for folder in run.take([FL])] == [FL]


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name", ["history.csv", "scores.csv", "results.md", "hospitals/mri.json", "fl/training.json"]
)
def test_files_of_another_origin_are_not_overwritten(name, config, tmp_path):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("of somebody else")
    named = path.parent if name.startswith("hospitals") else path
    message = f"^{named}: is there, and no config.json of a run beside it; choose another --out$"
    with pytest.raises(DataError, match=message):
        RunFolder(config, ORDER)
    assert path.read_text() == "of somebody else"


def test_other_files_may_lie_in_the_folder(config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    (tmp_path / "out/tmp-scores.csv").write_text("mine too")
    run = opened(config)
    train(run.folder(FL))
    run.report([])
    assert (tmp_path / "out/notes.txt").read_text() == "mine"
    assert (tmp_path / "out/tmp-scores.csv").read_text() == "mine too"


def test_a_folder_that_cannot_be_written_is_named_at_once(config, tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    with pytest.raises(DataError, match=f"^{tmp_path}: cannot be written; choose another --out"):
        RunFolder(config, ORDER)


def refused(config, *records):
    with pytest.raises(DataError) as caught:
        opened(config, *records)
    return str(caught.value).removeprefix(f"{config.out}: ")


def test_other_settings_and_other_data_are_refused_by_name(config, tmp_path):
    run = opened(config)
    run.folder(FL).begin({}, CPU)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")}
    other = dataclasses.replace(config, lr=1e-3, width=4, cache="elsewhere")
    start = "holds a run with other settings: "
    end = ". Give its own settings, or choose another --out"
    assert refused(other) == f"{start}lr 0.004, now 0.001; width 8, now 4{end}"
    longer = dataclasses.replace(config, rounds=30)
    why = "rounds cannot be added, as the learning rate falls to 0 over those planned"
    assert refused(longer) == f"{start}rounds 20, now 30; {why}{end}"
    organs = dataclasses.replace(config, organs=("liver",), ct=("x",), spacing=9.0)
    assert f"ct none, now {Path('x').resolve()}; " in refused(organs)
    assert "; organs liver spleen, now liver. " in refused(organs)
    path = tmp_path / "out/hospitals/mri-seed1.json"
    start, end = f"{path}: is not as this program left it (", "); choose another --out"
    splits = MRI | {"cases": SPLIT | {"train": ["a", "d"]}}
    assert refused(config, splits) == f"{start}mri has other cases, or splits them otherwise{end}"
    changed = MRI | {"files": {"a": [[3, 5]], "b": [[1, 1]]}}
    assert refused(config, changed) == f"{start}files of mri have changed: a{end}"
    elsewhere = changed | {"seed": 2}  # with another seed the files are the same
    assert refused(config, elsewhere) == f"{start}files of mri have changed: a{end}"
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"made by": "me"}, "is no run's"),
        ({"made by": None}, "is no run's"),
        ({"made by": None, "gin_probability": [1.0]}, "is of version 1, which must end it"),
    ],
)
def test_a_config_that_is_not_of_a_run_of_this_version_is_refused(change, message, config):
    run = opened(config)
    path = run.out / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert refused(config) == f"{path}: {message}; choose another --out"


@pytest.mark.parametrize(("key", "value"), [("format", 0), ("lr", None), ("format", "x")])
def test_a_run_of_another_format_is_refused(key, value, config):
    run = opened(config)
    run.folder(FL).begin({}, CPU)
    path = run.out / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, key: value}))
    now = {"format": 3, "lr": 0.004}[key]
    start = "holds a run with other settings: "
    end = ". Give its own settings, or choose another --out"
    assert refused(config) == f"{start}{key} {value}, now {now}{end}"
    del saved[key]
    path.write_text(json.dumps(saved))
    assert refused(config) == f"{start}{key} None, now {now}{end}"


def test_a_run_that_has_trained_nothing_may_change_its_settings_and_data(config):
    first = opened(config)
    other = dataclasses.replace(config, lr=1e-3, rounds=7)
    changed = MRI | {"files": {"a": [[9, 9]]}, "cases": SPLIT | {"train": ["x"]}}
    second = opened(other, changed, MRI | {"hospital": "ct"})
    saved = json.loads((second.out / "config.json").read_text())
    assert (saved["lr"], saved["rounds"]) == (1e-3, 7)
    assert json.loads((second.out / "hospitals/mri-seed1.json").read_text()) == changed
    with pytest.raises(DataError, match="has just got other settings"):
        first.folder(FL).begin({}, CPU)
    second.folder(FL).begin({}, CPU)
    opened(other, changed)
    assert "files of mri have changed: a" in refused(other, MRI)


def test_what_was_never_trained_with_is_not_compared_with(config):
    """A record of seed 1, of scans that were mended before anything was trained with seed 2."""
    opened(config, MRI)
    mended = MRI | {"seed": 2, "files": {"a": [[9, 9]]}}
    run = opened(config, mended)
    run.folder(Training(2, "fl")).begin({}, CPU)
    opened(config, mended)
    opened(config, mended | {"seed": 1})
    assert "files of mri have changed: a" in refused(config, MRI)


@pytest.mark.parametrize("added", list(itertools.permutations(range(3))))
def test_a_run_is_extended_in_any_order(added, config):
    parts = [
        ([FL], [MRI]),
        ([Training(2, "fl"), Training(2, "fedgin", p=1.0)], [MRI | {"seed": 2}]),
        ([Training(1, "fedgin", p=0.25)], [MRI]),
    ]
    for n in added:
        wanted, records = parts[n]
        run = opened(dataclasses.replace(config, seeds=(wanted[0].seed,)), *records)
        assert run.unfinished(wanted) == wanted
        stopped = run.folder(wanted[0])
        stopped.begin({}, CPU)
        stopped.keep_round(checkpoint(1))
    for wanted, records in parts:  # and none of those that stopped is lost
        run = opened(config, *records)
        assert run.folder(wanted[0]).checkpoint().round == 1
        for folder in run.take(wanted):
            train(folder)
    report = run.report([])
    assert "NOT FINISHED" not in report
    assert "seeds 1 2: PHANTOMS" in report
    shown = [cells(line)[:2] for line in report.splitlines() if line.startswith("|")][2:5]
    assert shown == [
        ["fl", "0.500 ± 0.000"],
        ["fedgin p=1", "0.500"],
        ["fedgin p=0.25", "0.500"],
    ]


def test_however_a_folder_is_written_it_is_the_same(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ct_set").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "ct_set")
    config = dataclasses.replace(config, ct=("ct_set",), mri=("other",))
    opened(config).folder(FL).begin({}, CPU)
    for same in ("ct_set/", "./ct_set", "link", str(tmp_path / "ct_set")):
        assert opened(dataclasses.replace(config, ct=(same,))).id == opened(config).id
    told = refused(dataclasses.replace(config, ct=("elsewhere",)))
    assert f"ct {tmp_path}/ct_set, now {tmp_path}/elsewhere" in told


def test_another_place_and_cache_do_not_matter(config, tmp_path):
    train(opened(config).folder(FL))
    (tmp_path / "out").rename(tmp_path / "moved")
    changes = {"out": str(tmp_path / "moved"), "cache": "elsewhere", "no_cache": True}
    run = opened(dataclasses.replace(config, **changes))
    assert run.unfinished([FL, FEDGIN]) == [FEDGIN]
    assert run.folder(FL).scores()[0]["dice"] == 0.5


# ------------------------------------------------------------------------------- what is damaged


@pytest.mark.parametrize(
    "name", ["config.json", "hospitals/mri-seed1.json", "fl-seed1/training.json"]
)
def test_a_damaged_file_is_named(name, config):
    run = opened(config)
    train(run.folder(FL))
    path = run.out / name
    whole = path.read_bytes()
    for content in (b"junk", b"", b"\xff\xfe", whole[: len(whole) // 2], b"[]", b"3", b"null"):
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            opened(config).report([])
        assert str(caught.value).startswith(f"{path}: cannot be read (")
        assert len(str(caught.value).splitlines()) == 1
        assert path.read_bytes() == content
    path.write_bytes(whole)
    assert opened(config).unfinished([FL]) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("hospitals/mri-seed1.json", {}),
        ("hospitals/mri-seed1.json", {"hospital": "mri"}),
        ("hospitals/mri-seed1.json", {"hospital": "mri", "files": 3}),
        ("hospitals/mri-seed1.json", {"hospital": "mri", "files": {}}),
        ("fl-seed1/training.json", {}),
        ("fl-seed1/training.json", {"training": {"seed": 1}}),
        ("fl-seed1/training.json", {"training": {"seed": 1, "arm": "fl", "lr": 1}}),
        ("fl-seed1/training.json", {"training": {"seed": 2, "arm": "fl"}}),
        ("fl-seed1/training.json", {"training": {"seed": 1, "arm": "fedsgd"}}),
    ],
)
def test_a_file_of_another_form_is_named(name, content, config):
    run = opened(config)
    run.folder(FL).begin({}, CPU)
    (run.out / name).write_text(json.dumps(content))
    told = refused(config)
    assert told.startswith(f"{run.out / name}: is not as this program left it (")
    assert told.endswith("; choose another --out")


def test_a_folder_that_was_renamed_is_named(config):
    run = opened(config)
    train(run.folder(FL))
    run.folder(FL).path.rename(run.out / "my-favourite")
    with pytest.raises(DataError, match="my-favourite/training.json: is not as this program left"):
        run.report([])


# --------------------------------------------------------------------------------- steps, and runs


@pytest.mark.slow
def test_steps_are_the_batches_and_cases_that_a_training_asks_for(tmp_path):
    """Counted as they pass, from round 1 of 3 on; by hand from the start and within the test."""
    config = Config(
        rounds=3,
        local_steps=2,
        val_every=2,
        width=2,
        depth=2,
        arms=("fl", "centralized"),
        out=str(tmp_path / "out"),
    )
    by_seed, _ = load_hospitals(config)
    few = [h._replace(train=h.train[:6], val=h.val[:2], test=h.test[:2]) for h in by_seed[42]]
    by_seed = {42: few}
    trainings_ = fedgin.plan(config)
    assert [t.arm for t in trainings_] == ["fl", "centralized"]
    run = RunFolder(config, list(fedgin.ARMS))
    run.open([])

    def counted(*wanted):
        chosen = {t: fedgin.choose_cases(config, t, few) for t in wanted}
        return run.count_steps(chosen, by_seed)

    # 3 rounds of 2 batches at 2 hospitals, validation of 4 cases in rounds 2 and 3, 6 test cases
    assert [counted(t) for t in trainings_] == [3 * 2 * 2 + 2 * 4 + 6] * 2
    assert counted(*trainings_) == 52
    for training in trainings_:
        folder = run.folder(training)
        folder.begin({}, CPU)
        clients = fedgin.make_clients(config, training, few)
        first = next(fedgin.train_arm(config, training, clients, []))
        folder.keep_round(first)
        expected = counted(training)
        assert expected == 26 - 4
        with Progress(expected) as progress:
            fedgin.run_training(folder, few, CPU, progress)
        assert progress.done == expected
        assert folder.is_finished()
    stopped = run.folder(dataclasses.replace(trainings_[0], arm="mri-only", ratio=""))
    stopped.begin({}, CPU)
    stopped.keep_model(checkpoint(3))
    assert counted(stopped.training) == 6
    scored = {organ: {"outcome": "absent"} for organ in config.organs}
    for hospital in few:
        stopped.keep_scores(hospital, hospital.test[0], scored)
    assert counted(stopped.training) == 3


TINY = ["--rounds", "2", "--local-steps", "1", "--batch-size", "1", "--patch", "32"]
TINY += ["--width", "2", "--depth", "2", "--arms", "mri-only"]


def command(*args):
    return fedgin.main([*TINY, *map(str, args)])


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.slow
def test_the_same_command_goes_on_and_others_are_refused(tmp_path, capsys):
    out = tmp_path / "out"
    assert command("--out", out) == 0
    before = contents(out)
    first = capsys.readouterr().out
    assert command("--out", out) == 0  # nothing left to do
    again = capsys.readouterr().out
    assert again.startswith(f"{out}: 1 of 1 trainings finished, the last one on ")
    assert again.split("\n\n", 1)[1] == first[first.index("## Test Dice") :]
    assert contents(out) == before
    assert command("--out", out, "--lr", "1e-3", "--width", "4") == 2
    assert "other settings: lr 0.004, now 0.001; width 2, now 4." in capsys.readouterr().err
    assert command("--out", out, "--sites", "2") == 2
    assert "other settings: sites 1, now 2." in capsys.readouterr().err
    hospitals = sorted(path.name for path in (out / "hospitals").iterdir())
    assert hospitals == [f"{name}-seed42.json" for name in ("ct", "mri", "other-scanner")]
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace('"format": 3', '"format": 0'))
    assert command("--out", out) == 2
    assert "other settings: format 0, now 3." in capsys.readouterr().err
    (out / "config.json").write_text(config)
    assert contents(out) == before


@pytest.mark.slow
def test_a_run_names_a_damaged_file(tmp_path, capsys):
    assert command("--out", tmp_path) == 0
    capsys.readouterr()
    for name, message in (
        ("mri-only-seed42/history.csv", "is missing, or not as it was when the training finished"),
        ("mri-only-seed42/training.json", "cannot be read"),
        ("config.json", "cannot be read"),
    ):
        whole = (tmp_path / name).read_bytes()
        for content in (b"junk", whole[:100]):
            (tmp_path / name).write_bytes(content)
            assert command("--out", tmp_path) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"fedgin.py: {tmp_path / name}: {message}")
            assert len(error.splitlines()) == 1
        (tmp_path / name).write_bytes(whole)
    assert command("--out", tmp_path) == 0


@pytest.mark.slow
def test_a_run_refuses_files_that_changed(tmp_path, mri_folder, ct_folder, capsys):
    shutil.copytree(mri_folder, tmp_path / "mri")
    args = ["--ct", ct_folder, "--mri", tmp_path / "mri", "--spacing", 12, "--depth", 2]
    args += ["--out", tmp_path / "out"]
    assert command(*args) == 0
    more = [*args, "--seeds", 42, 43]
    path = tmp_path / "mri/labelsTr/case_000.nii.gz"
    os.utime(path, (1, 1))  # touched, and the same
    assert command(*more) == 0
    more.append(44)
    path.write_bytes((path.parent / "case_001.nii.gz").read_bytes())
    capsys.readouterr()
    assert command(*more) == 2
    assert "files of mri have changed: case_000); choose another" in capsys.readouterr().err
