"""Settings: defaults for phantoms and for scans, what is refused, the help, and trainings."""

import dataclasses
import itertools
import sys
from pathlib import Path

import pytest

import fedgin
from scans.files import DataError
from scans.organs import ORGANS
from scripts import check, multisite, predict
from study.config import Checkpoint, Config, Training, make_parser, to_config

SCANS = {"ct": ("ct_set",), "mri": ("mri_set",)}
GPU_SIZED = {"patch": 96, "width": 32, "depth": 5, "rounds": 100, "local_steps": 50, "lr": 1e-3}
CPU_SIZED = {"patch": 32, "width": 8, "depth": 4, "rounds": 30, "local_steps": 10, "lr": 6e-3}
CHOICES = {"scenario": fedgin.SCENARIOS, "arms": fedgin.ARMS, "ratios": fedgin.RATIOS}


def parse(args):
    parser = make_parser(fedgin.__doc__, CHOICES)
    return to_config(parser, parser.parse_args(args.split()))


@pytest.mark.parametrize(
    ("flags", "folders", "defaults"),
    [
        ("", {}, {**CPU_SIZED, "spacing": 9.0, "nsd_tolerance": 9.0, "val_every": 3}),
        ("--ct ct_set --mri mri_set", SCANS, {**GPU_SIZED, "spacing": 2.0, "val_every": 5}),
        ("--ct ct_set", {"ct": ("ct_set",)}, {**GPU_SIZED, "nsd_tolerance": 2.0}),
        ("--mri mri_set", {"mri": ("mri_set",)}, {**GPU_SIZED, "spacing": 2.0}),
    ],
)
def test_phantoms_and_scans_have_defaults_of_their_own(flags, folders, defaults):
    config = Config(**folders)
    assert {name: getattr(config, name) for name in defaults} == defaults
    assert config.on_phantoms == (not folders)
    assert (config.seeds, config.organs, config.batch_size) == ((42,), ORGANS, 2)
    assert config.ct_window == (-160.0, 240.0)
    assert parse(flags) == config


def test_what_is_given_is_kept():
    config = Config(**SCANS, rounds=7, lr=0.1, spacing=9.0, width=8, ct_window=(-200.0, 1000.0))
    assert (config.rounds, config.lr, config.spacing, config.width) == (7, 0.1, 9.0, 8)
    assert (config.local_steps, config.patch) == (50, 96)
    flags = "--ct ct_set --mri mri_set --rounds 7 --lr 0.1 --spacing 9 --width 8"
    assert parse(f"{flags} --ct-window -200 1000") == config
    assert parse("--gin-probability 0 0.5").gin_probability == (0.0, 0.5)


def test_results_and_cache_lie_in_runs_unless_told_otherwise():
    assert (Config().out, Config().cache) == (str(Path("runs/limited")), str(Path("runs/cache")))
    assert Config(scenario="complete").out == str(Path("runs/complete"))
    assert Config(out="a/b/c").cache == str(Path("a/b/cache"))
    assert Config(out="a/b/c", cache="d").cache == "d"


def test_a_config_is_made_again_from_its_own_values():
    """As dataclasses.replace does; ratios are only for the limited scenario."""
    for config in (Config(), Config(scenario="complete"), Config(**SCANS, mri_cases=3)):
        assert dataclasses.replace(config) == Config(**dataclasses.asdict(config)) == config
        limited = config.scenario == "limited"
        assert (config.ratios, bool(config.mri_cases)) == (("1:5",) if limited else None, limited)


def test_organs_of_the_paper_are_known_in_any_spelling():
    organs = Config(organs=("Liver", "kidney", "gall bladder")).organs
    assert organs == ("liver", "kidneys", "gallbladder")
    others = ("vertebrae_L1", "Left Kidney")
    assert Config(**SCANS, organs=others).organs == others


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--scenario limitless", "argument --scenario: invalid choice: 'limitless'"),
        ("--arms fedgan", "argument --arms: invalid choice: 'fedgan'"),
        ("--ratios 1:3", "argument --ratios: invalid choice: '1:3'"),
        ("--layout bids", "argument --layout: invalid choice: 'bids'"),
        ("--arms", "argument --arms: expected at least one argument"),
        ("--rounds many", "argument --rounds: invalid int value: 'many'"),
        ("--lr fast", "argument --lr: invalid float value: 'fast'"),
        ("--nsd-tolerance far", "argument --nsd-tolerance: invalid float value: 'far'"),
        ("--round 3", "unrecognized arguments: --round"),
        ("--no-cache", "unrecognized arguments: --no-cache"),
        ("--organs brain", "--organs brain: phantoms have liver, kidneys, spleen, pancreas, gall"),
        ("--organs liver Liver", "--organs names something twice: liver liver"),
        ("--ct a --organs aorta Aorta", "--organs names something twice: aorta Aorta"),
        ("--ct a --organs _", "--organs '_': is not a structure's name"),
        ("--ct a --organs a\x07b", "--organs 'a\\x07b': is not a structure's name"),
        ("--ct a --organs Background", "--organs 'Background': is not a structure's name"),
        ("--ct-window 5", "argument --ct-window: expected 2 arguments"),
        ("--ct-window 240 -160", "--ct-window must be LOW below HIGH, in HU, not 240 -160"),
        ("--ct-window 5 5", "--ct-window must be LOW below HIGH, in HU, not 5 5"),
        ("--ct-window nan 5", "--ct-window must be LOW below HIGH, in HU, not nan 5"),
        ("--ct-window 0 inf", "--ct-window must be LOW below HIGH, in HU, not 0 inf"),
        ("--rounds 0", "--rounds must be a positive number, at most 1e+06, not 0"),
        ("--batch-size -1", "--batch-size must be a positive number, at most 1e+06, not -1"),
        ("--rounds 10000000", "--rounds must be a positive number, at most 1e+06, not 10000000"),
        ("--lr nan", "--lr must be a positive number, at most 1e+38, not nan"),
        (
            "--nsd-tolerance inf",
            "--nsd-tolerance must be a positive number, at most 1e+38, not inf",
        ),
        ("--gin-probability 1.5", "--gin-probability must lie between 0 and 1, not 1.5"),
        ("--gin-probability nan", "--gin-probability must lie between 0 and 1, not nan"),
        ("--seeds 1 1", "--seeds names something twice: 1 1"),
        ("--seeds -1", "--seeds -1: must lie in 0 … 2^63 - 1"),
        ("--seeds 9223372036854775808", "--seeds 9223372036854775808: must lie in 0 … 2^63 - 1"),
        ("--ct a b a", "--ct names something twice: a b a"),
        ("--ct a --cache= --mri=", "--mri has an empty name"),
        ("--patch 30 --depth 3", "--patch 30 does not fit --depth 3: it must be a multiple of 4"),
        ("--patch 8 --depth 4", "--patch 8 does not fit --depth 4: it must be a multiple of 8"),
        ("--ct a --patch 40", "--patch 40 does not fit --depth 5"),
        ("--test somewhere", "--test needs folders to train on"),
        ("--spacing 2", "--spacing is for scans; phantoms have voxels of 9 mm"),
        ("--out README.md", "--out README.md is a file"),
        ("--ct a --cache README.md", "--cache README.md is a file"),
        ("--scenario complete --ratios 1:1", "--ratios and --mri-cases are for --scenario limited"),
        ("--scenario complete --mri-cases 2", "--ratios and --mri-cases are for --scenario limite"),
    ],
)
def test_bad_flags_take_one_line_and_exit_code_2(args, message, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        fedgin.main(["--out", str(out), *args.split()])
    assert end.value.code == 2
    usage, error = capsys.readouterr().err.strip().splitlines()
    assert usage.endswith("[options]")
    assert f"error: {message}" in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratios": ("1:3",)}, "'1:3' is not one of 1:1, 1:2, 1:5, all"),
        ({"arms": ("fedgan",)}, "'fedgan' is not one of mri-only, ct-only, fl, fedgin"),
        ({"scenario": "limitless"}, "'limitless' is not one of limited, complete"),
    ],
)
def test_names_of_the_experiment_are_refused_where_it_is_planned(settings, message):
    with pytest.raises(DataError, match=message):
        fedgin.plan(Config(**settings))


@pytest.mark.parametrize(
    ("flag", "first", "second", "kept"),
    [
        ("--ct", "A B", "C", ("A", "B", "C")),
        ("--mri", "A", "B", ("A", "B")),
        ("--ct D --test", "A", "B", ("A", "B")),
        ("--arms", "fl", "fedgin", ("fl", "fedgin")),
        ("--ratios", "1:1", "all", ("1:1", "all")),
        ("--seeds", "1 2", "3", (1, 2, 3)),
        ("--organs", "liver", "spleen", ("liver", "spleen")),
        ("--organs", "liver", "", ("liver",)),  # they do not join the five defaults
        ("--gin-probability", "1", "0.5", (1.0, 0.5)),
        ("--ct-window", "-100 200", "-50 300", (-50.0, 300.0)),  # one window: the last one counts
    ],
)
def test_a_flag_of_several_values_given_twice_adds_up(flag, first, second, kept):
    name = flag.split()[-1]
    config = parse(f"{flag} {first} {name} {second}" if second else f"{flag} {first}")
    assert getattr(config, name.removeprefix("--").replace("-", "_")) == kept


def test_flags_of_other_commands_given_twice_add_up(monkeypatch, capsys):
    needed = ["--checkpoint", "model.pt", "--out", "out"]
    args = predict.parse([*needed, "--images", "A", "B", "--images", "C"])
    assert args.images == ["A", "B", "C"]
    asked = []
    monkeypatch.setattr(check, "run", asked.append)
    assert check.main(["A", "--organs", "aorta", "--organs", "liver", "spleen"]) == 0
    assert asked[0].organs == ["aorta", "liver", "spleen"]
    with pytest.raises(SystemExit):
        multisite.main(["--ct", "A", "--ct", "B"])
    assert "name this hospital's folder, and no other" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- what is said


def test_help_has_every_flag_with_its_defaults_and_does_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedgin.py", "--help"])
    with pytest.raises(SystemExit) as end:
        fedgin.main()
    shown = capsys.readouterr()
    assert (end.value.code, shown.err, list(tmp_path.iterdir())) == (0, "", [])
    assert shown.out.startswith("usage: fedgin.py [options]\n\nFedGIN: ")
    text = " ".join(shown.out.split())
    for field in Config.__dataclass_fields__.values():
        assert f" --{field.name.replace('_', '-')} " in text
        assert field.metadata["help"].split("%")[0] in text
    for default in (
        "federated rounds (default: 30, on scans 100)",
        "to which scans are resampled (default: 9.0, on scans 2.0)",
        "(default: liver kidneys spleen pancreas gallbladder)",
        "mean ± deviation (default: 42)",
        "--ct-window LOW HIGH range in HU to which CT is clipped (default: -160.0 240.0)",
        f"of {', '.join(fedgin.ARMS)} (default: those of the scenario)",
        "the paper uses 1; CT loses less with 0.25 (default: 1.0 0.25)",
        "python fedgin.py --scenario limited",
    ):
        assert default in text
    assert "None" not in text


def test_a_parser_may_leave_flags_out_and_have_help_texts_of_its_own(capsys):
    parser = make_parser("about", leave_out=("seeds", "arms"), texts={"out": "only (NAME)"})
    assert " only (NAME)\n" in parser.format_help()
    args = parser.parse_args(["--rounds", "3"])
    assert not {"seeds", "arms"} & vars(args).keys()
    config = to_config(parser, args, seeds=(5,), arms=("fl",))
    assert (config.seeds, config.arms, config.rounds, config.width) == ((5,), ("fl",), 3, 8)
    with pytest.raises(SystemExit):
        parser.parse_args(["--seeds", "1"])
    with pytest.raises(SystemExit):
        to_config(parser, args, seeds=(5, 5))
    assert "--seeds names something twice: 5 5" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- trainings


@pytest.mark.parametrize(
    ("training", "label", "folder"),
    [
        (Training(42, "fedgin", "1:5", 1.0), "fedgin 1:5 p=1", "fedgin-1-5-p1-seed42"),
        (Training(0, "fl"), "fl", "fl-seed0"),
        (Training(7, "fl", "all"), "fl all", "fl-all-seed7"),
        (Training(7, "mri-only+gin", p=0.25), "mri-only+gin p=0.25", "mri-only+gin-p0.25-seed7"),
        (Training(7, "fedgin", p=0.0), "fedgin p=0", "fedgin-p0-seed7"),
        (Training(7, "fedgin", p=1e-10), "fedgin p=1e-10", "fedgin-p1e-10-seed7"),
    ],
)
def test_a_training_knows_its_label_and_its_folders_name(training, label, folder):
    assert (training.label, training.folder) == (label, folder)


def test_no_two_trainings_share_a_label_or_a_folder():
    probabilities = (None, 0.0, 0.1, 0.1 + 1e-16, 0.3, 0.1 + 0.2, 0.25, 1.0, 1 - 2**-53)
    parts = (0, 1, 10, 11), fedgin.ARMS, ("", *fedgin.RATIOS), probabilities
    every = {Training(*values) for values in itertools.product(*parts)}
    folders = {training.folder for training in every}
    assert len(folders) == len(every)
    assert not any(set(name) & set('<>:"/\\|?*') for name in folders)  # for any file system
    assert len({(training.seed, training.label) for training in every}) == len(every)


def test_before_the_first_round_nothing_is_reached():
    start = Checkpoint()
    assert (start.round, start.weights, start.history) == (0, None, ())
    assert (start.best_round, start.best_weights) == (0, None)
    assert not start.best_dice >= -1e300


def test_a_folder_that_cannot_be_looked_at_ends_with_exit_code_2(capsys):
    parser = make_parser(None)
    with pytest.raises(SystemExit) as end:
        to_config(parser, parser.parse_args(["--out", "x" * 300]))
    assert end.value.code == 2
    assert "File name too long" in capsys.readouterr().err
