"""The command as a user meets it: arms, results, repeatability, and what it says of bad input."""

import csv
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import truncate, write_nnunet, write_totalsegmentator

import data
import evaluate
import fedgin
from federated import Ranks
from phantom import SPACING, phantom

TINY = ["--rounds", "2", "--local-steps", "2", "--batch-size", "2"]
TINY += ["--patch", "32", "--width", "2", "--depth", "2"]
ARMS = ["mri-only", "fedgin"]


def command(*words):
    return fedgin.main([*TINY, *map(str, words)])


def config(*words):
    return fedgin.parse([*TINY, *map(str, words)])


def hospitals(seed, *words):
    settings = config("--seeds", seed, *words)
    return fedgin.load_hospitals(settings, Ranks(fedgin.hospital_names(settings), 1))[seed]


@pytest.fixture(scope="module")
def phantom_run(tmp_path_factory):
    """Arms of each kind on phantoms, two ratios, two seeds."""
    out = tmp_path_factory.mktemp("run") / "results"
    words = ["--arms", *ARMS, "--ratios", "1:1", "all", "--seeds", "1", "2", "--out", out]
    assert command(*words) == 0
    return out


def test_a_run_leaves_what_it_promises(phantom_run):
    names = sorted(path.name for path in phantom_run.iterdir())
    assert not [name for name in names if name.endswith(".tmp")]
    assert {"config.json", "results.json", "results.md", "history.csv"} <= set(names)
    saved = json.loads((phantom_run / "config.json").read_text())
    assert saved["seeds"] == [1, 2]
    ct = json.loads((phantom_run / "hospitals/ct.json").read_text())
    assert len(ct["splits"]["1"]["train"]) == 12
    results = json.loads((phantom_run / "results.json").read_text())["results"]
    arms = {f"{arm} {ratio}" for arm in ARMS[1:] for ratio in ("1:1", "all")}
    assert {r["arm"] for r in results} == arms | {"mri-only"}
    assert len(results) == 3 * 2 * 2 * 8  # arms, seeds, modalities, test cases
    report = (phantom_run / "results.md").read_text()
    assert "PHANTOMS" in report.splitlines()[0]
    assert "| fedgin 1:1" in report
    with (phantom_run / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 2  # arms, seeds, rounds
    assert {row["round"] for row in rows} == {"1", "2"}
    assert all(np.isfinite(float(row["loss"])) for row in rows)
    assert all((row["val_dice_ct"] == "") == row["arm"].startswith("mri") for row in rows)


def test_a_checkpoint_gives_the_results_back(phantom_run):
    device = torch.device("cpu")
    model, needs = evaluate.load_model(phantom_run / "fedgin-1-1-seed2.pt", device)
    case = hospitals(2)[0].test[0]
    labels = evaluate.segment(model, case.image, needs["patch"], case.labels.shape)
    [saved] = [
        r["scores"]
        for r in json.loads((phantom_run / "results.json").read_text())["results"]
        if (r["arm"], r["seed"], r["case"]) == ("fedgin 1:1", 2, case.id) and r["modality"] == "mri"
    ]
    assert evaluate.score_case(labels, case.labels, needs["organs"], (SPACING,) * 3) == saved


def test_pictures_of_a_run(phantom_run, tmp_path):
    figures = runpy.run_path(str(Path(fedgin.__file__).parent / "docs/figures.py"))
    figures["main"]([str(phantom_run), str(tmp_path)])
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"validation.png", "predictions.png", "ratios.png"}
    assert all(5_000 < size < 300_000 for size in sizes.values())


def test_the_same_command_twice_is_bit_identical(tmp_path):
    for name in ("a", "b"):
        assert command("--out", tmp_path / name, "--rounds", 1, "--arms", "fl", "fedgin") == 0
    for arm in ("fl", "fedgin"):
        a, b = (torch.load(tmp_path / x / f"{arm}.pt", weights_only=True)["weights"] for x in "ab")
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert (tmp_path / "a/results.json").read_text() == (tmp_path / "b/results.json").read_text()
    fl = torch.load(tmp_path / "a/fl.pt", weights_only=True)["weights"]
    assert not all(torch.equal(a[key], fl[key]) for key in a)


def test_gin_probability_0_is_fl(tmp_path):
    words = ["--out", tmp_path, "--rounds", 1, "--arms", "fl", "fedgin", "--gin-probability", 0]
    assert command(*words) == 0
    fl, fedgin_ = (torch.load(tmp_path / f"{a}.pt", weights_only=True) for a in ("fl", "fedgin"))
    assert all(torch.equal(fl["weights"][key], fedgin_["weights"][key]) for key in fl["weights"])


# ------------------------------------------------------------------------------- who trains on what


def test_arms_and_ratios():
    mri_and_ct = hospitals(1)

    def shares(label, *words):
        chosen = fedgin.choose_clients(config(*words), label, mri_and_ct)
        return {name: (len(client.cases), client.steps) for name, client in chosen.items()}

    assert shares("mri-only") == {"mri": (2, 2)}
    assert shares("ct-only") == {"ct": (10, 2)}
    assert shares("fedgin") == shares("fl") == {"mri": (2, 2), "ct": (10, 2)}
    assert shares("centralized+gin") == {"pooled": (12, 4)}
    assert shares("fl 1:2", "--ratios", "1:1", "1:2") == {"mri": (2, 2), "ct": (4, 2)}
    assert shares("fl", "--ratios", "all") == {"mri": (2, 2), "ct": (12, 2)}
    assert shares("fl", "--mri-cases", 1) == {"mri": (1, 2), "ct": (5, 2)}
    assert shares("fl", "--scenario", "complete") == {"mri": (12, 2), "ct": (12, 2)}


def test_cases_come_from_the_hospitals_in_turns():
    settings = config("--mri-cases", 3, "--ratios", "1:1")
    mri, ct = hospitals(1)
    small = mri._replace(name="small", train=mri.train[5:6])
    chosen = fedgin.choose_clients(settings, "fl", [mri, small, ct])
    assert {name: len(c.cases) for name, c in chosen.items()} == {"mri": 2, "small": 1, "ct": 3}
    assert fedgin.choose_clients(settings, "centralized", [mri, small, ct])["pooled"].steps == 6


def test_sites_deal_the_same_cases_out():
    whole = hospitals(1)
    sites = hospitals(1, "--sites", 3)
    assert [site.name for site in sites] == ["mri-1", "mri-2", "mri-3", "ct-1", "ct-2", "ct-3"]
    for hospital in whole:
        for part in ("train", "val", "test"):
            dealt = [
                c.id for s in sites if s.modality == hospital.modality for c in getattr(s, part)
            ]
            assert sorted(dealt) == [case.id for case in getattr(hospital, part)]
    assert {len(site.train) for site in sites} == {4}
    with pytest.raises(fedgin.DataError, match="--sites 13: mri has 12 training cases, too few"):
        hospitals(1, "--sites", 13)


def test_an_arm_without_cases_is_refused():
    settings = config()
    only_mri = hospitals(1)[:1]
    with pytest.raises(fedgin.DataError, match="arm fl needs CT training cases .* --ct"):
        fedgin.choose_clients(settings, "fl", only_mri)
    only_ct = hospitals(1)[1:]
    assert len(fedgin.choose_clients(settings, "ct-only", only_ct)["ct"].cases) == 10


def test_pooling_other_ranks_scans_is_refused():
    mri, _ = hospitals(1)
    elsewhere = fedgin.Hospital("ct", "ct", range(12), (), (), here=False)
    chosen = fedgin.choose_clients(config(), "fl", [mri, elsewhere])
    assert {name: (len(c.cases), c.here) for name, c in chosen.items()} == {
        "mri": (2, True),
        "ct": (10, False),
    }
    with pytest.raises(fedgin.DataError, match="arm centralized pools the scans"):
        fedgin.choose_clients(config(), "centralized", [mri, elsewhere])


def test_ranks_with_other_flags_are_refused():
    class TwoRanks:
        def gather(self, value):
            sent = json.loads(json.dumps(value))
            return [sent, {**sent, "lr": 1.0, "seeds": [43]}]

    with pytest.raises(fedgin.DataError, match="started with different seeds, lr; only --out"):
        fedgin.check_alike(config(), TwoRanks())
    fedgin.check_alike(config("--out", "elsewhere"), Ranks(["mri", "ct"], 1))


def test_organs_are_renumbered():
    [mri, _] = hospitals(5, "--organs", "spleen", "liver")
    labels = phantom(5, "mri", 0)[1]
    np.testing.assert_array_equal(mri.train[0].labels == 1, labels == 3)
    np.testing.assert_array_equal(mri.train[0].labels == 2, labels == 1)


def small_case(labels, labelled):
    return data.make_volume("x", labels.astype(np.float32), labels, np.array(labelled))


def test_class_weights_and_loss_by_hand():
    """Weights 1 / √share, cross-entropy normalized by them, soft Dice of the organs alone."""
    labels = np.zeros((2, 2, 4), np.uint8)
    labels[0, 0] = 1  # a share of 4 in 16
    settings, labelled = config("--organs", "liver"), torch.ones(1, 2, dtype=torch.bool)
    loss = fedgin.segmentation_loss([small_case(labels, [True] * 2)], settings, torch.device("cpu"))
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
    value = loss(logits, (torch.tensor(labels)[None].long(), labelled)).item()
    assert value == pytest.approx(expected, rel=1e-5)


def test_unlabelled_organs_are_merged_into_background():
    """The marginal loss is that of a network whose background has the unlabelled organ's share."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (4, 4, 4)).astype(np.uint8)  # liver or nothing; spleen unlabelled
    target = torch.tensor(labels)[None].long()
    logits = torch.randn(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()
    cpu, known = torch.device("cpu"), [True, True, False]
    settings = config("--organs", "liver", "spleen")
    loss = fedgin.segmentation_loss([small_case(labels, known)], settings, cpu)
    value = loss(logits, (target, torch.tensor([known])))
    p = logits.detach().softmax(1)
    merged = torch.stack([p[:, 0] + p[:, 2], p[:, 1]], dim=1).log()
    plain_settings, both = config("--organs", "liver"), torch.ones(1, 2, dtype=torch.bool)
    plain = fedgin.segmentation_loss([small_case(labels, [True] * 2)], plain_settings, cpu)
    assert value.item() == pytest.approx(plain(merged, (target, both)).item(), rel=1e-5)
    value.backward()
    moved = logits.grad[:, [0, 2]]  # spleen is pushed exactly as background is
    ratio = moved[:, 1] / moved[:, 0]
    torch.testing.assert_close(ratio, (p[:, 2] / p[:, 0]), rtol=1e-3, atol=1e-4)


def test_draws_depend_on_seed_round_hospital_and_purpose_alone():
    keys = [
        (1, 1, "a", "gin"),
        (2, 1, "a", "gin"),
        (1, 2, "a", "gin"),
        (1, 1, "b", "gin"),
        (1, 1, "a", "x"),
    ]
    draws = [torch.rand(1, generator=fedgin.generator(*key)).item() for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws[0] == torch.rand(1, generator=fedgin.generator(*keys[0])).item()


# -------------------------------------------------------------------------------------- real scans


def test_a_run_on_folders(tmp_path, ct_folder, mri_folder, capsys):
    words = ["--ct", ct_folder, "--mri", mri_folder, "--spacing", 12, "--out", tmp_path / "out"]
    assert command(*words, "--arms", "fedgin", "mri-only") == 0
    shown = capsys.readouterr().out
    assert "PHANTOM" not in shown
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert {(r["hospital"], r["case"]) for r in results if r["modality"] == "ct"} == {
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
    words = ["--ct", ct_folder, "--mri", mri_folder, "--test", held_out, "--spacing", 12]
    assert command(*words, "--arms", "fl", "--out", tmp_path / "out") == 0
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert {(r["hospital"], r["case"]) for r in results} == {
        ("held_out", "s0000"),
        ("held_out", "s0001"),
    }
    held_out, ct_set = (
        json.loads((tmp_path / f"out/hospitals/{name}.json").read_text())["splits"]["42"]
        for name in ("held_out", "ct_set")
    )
    assert held_out["train"] == held_out["val"] == ct_set["test"] == []


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--scenario limitless", "invalid choice: 'limitless'"),
        ("--arms fedgan", "invalid choice: 'fedgan'"),
        ("--ratios 1:3", "invalid choice: '1:3'"),
        ("--rounds many", "invalid int value: 'many'"),
        ("--round 3", "unrecognized arguments: --round"),
        ("--rounds 0", "--rounds must be a positive number, not 0"),
        ("--lr nan", "--lr must be a positive number, not nan"),
        ("--gin-probability 1.5", "--gin-probability must lie between 0 and 1"),
        ("--seeds 1 1", "--seeds names something twice"),
        ("--patch 30 --depth 3", "--patch 30"),
        ("--test somewhere", "--test needs folders to train on"),
        ("--ct nowhere", "nowhere: no such folder"),
        ("--out README.md", "--out README.md is a file"),
    ],
)
def test_bad_flags_take_one_line_and_exit_code_2(words, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert fedgin.main(["--out", str(out), *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()


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


def test_a_run_is_never_overwritten(phantom_run, capsys):
    before = (phantom_run / "results.json").read_bytes()
    assert command("--out", phantom_run) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (phantom_run / "results.json").read_bytes() == before


def test_a_diverging_run_ends_with_exit_code_1(tmp_path, capsys):
    assert command("--lr", 1e30, "--arms", "fl", "--out", tmp_path / "out") == 1
    assert "round 1, hospital mri" in capsys.readouterr().err
