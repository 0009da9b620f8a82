"""scripts.predict as a user meets it: a checkpoint and scans in, label maps and scores out."""

import csv
import json
from pathlib import Path
from unittest import mock

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from conftest import (
    awkward_affine,
    save,
    shift,
    truncate,
    write_amos,
    write_nnunet,
    write_totalsegmentator,
)

from data import NORMALIZATION, to_model_grid
from evaluate import dice
from scans import files
from scans.files import DataError, lock
from scans.layouts import find_cases
from scans.nifti import read_nifti
from scans.organs import ORGANS
from scans.phantom import SPACING, make_phantom
from scripts import predict
from study.config import Checkpoint, Config, Training
from study.inference import load_model, segment
from study.results import TrainingFolder
from unet3d import UNet3D


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The model.pt of a training: without training, of a network that finds all organs."""
    torch.manual_seed(1)
    weights = UNet3D(1, 6, 2, 2).state_dict()
    config = Config(width=2, depth=2, out=str(tmp_path_factory.mktemp("run")))
    folder = TrainingFolder(config, Training(42, "fl", "1:5"))
    folder.keep_model(Checkpoint(1, weights, 1, 0.5, weights))
    return folder.path / "model.pt"


def run(checkpoint, images, out, *args):
    paths = ["--checkpoint", checkpoint, "--images", *np.atleast_1d(images), "--out", out]
    return predict.main([str(arg) for arg in (*paths, *args)])


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def maps(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*.nii.gz"))


def rows(out):
    with (out / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ----------------------------------------------------------------------------------- which scans


def write_empty(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def found(paths, modality=None, layout=None):
    """{name of the label map: (modality, scan)}"""
    scans = predict.find_scans([str(path) for path in paths], modality, layout, ORGANS)
    assert all(Path(name).name == case.id for name, case in scans.items())
    return {name: (case.modality, case.image) for name, case in scans.items()}


def test_files_and_folders_of_files_are_found(tmp_path):
    write_empty(tmp_path, "in/a.nii.gz", "in/b_0000.nii", "in/._c.nii.gz", "in/notes.txt", "d.nii")
    a, b = ("mri", tmp_path / "in/a.nii.gz"), ("mri", tmp_path / "in/b_0000.nii")
    assert found([tmp_path / "in"], "mri") == {"a": a, "b": b}
    both = found([tmp_path / "in", tmp_path / "d.nii"], "mri")
    assert both == {"in/a": a, "in/b": b, "d": ("mri", tmp_path / "d.nii")}
    # TotalSegmentator's names tell the modality, and their folder the id.
    ct, mri = tmp_path / "s1/ct.nii.gz", tmp_path / "s2/mri.nii.gz"
    write_empty(tmp_path, ct, mri)
    assert found([ct, mri]) == {"s1": ("ct", ct), "s2": ("mri", mri)}
    assert list(found([ct.parent, mri.parent])) == ["s1/s1", "s2/s2"]
    with mock.patch.object(Path, "resolve", lambda _: Path("/")):  # a map must not lie at /a
        assert list(found([ct.parent, tmp_path / "s2/mri.nii.gz"])) == ["root/s1", "s2"]


def test_a_folder_in_a_known_layout_comes_with_its_labels(tmp_path):
    write_amos(tmp_path, "ct", 2)
    scans = predict.find_scans([str(tmp_path)], None, None, ORGANS)
    assert list(scans.values()) == find_cases(tmp_path)
    (tmp_path / "labelsVa/amos_0002.nii.gz").unlink()
    scans = predict.find_scans([str(tmp_path)], None, None, ORGANS)
    assert [bool(case.masks) for case in scans.values()] == [True, False]
    write_totalsegmentator(tmp_path, "ct", 1)
    with pytest.raises(DataError, match="--layout"):
        found([tmp_path])
    assert list(found([tmp_path], layout="totalsegmentator")) == ["s0000"]


def test_folders_that_are_not_read_are_named(tmp_path):
    """A stray file makes a folder one of files; a test split has no labels, but may be meant."""

    def warnings(folder, modality=None):
        cases = predict.find_scans([str(folder)], modality, None, ORGANS).values()
        return {warning for case in cases for warning in case.warnings if "not read" in warning}

    more = "not read; name such a folder with --images too"
    stray = write_totalsegmentator(tmp_path / "stray", "ct", 2)
    assert not warnings(stray)
    assert not warnings(stray / "s0000")  # its masks are not scans
    write_empty(stray, "atlas.nii.gz")
    write_empty(stray, "odd.NII.GZ", "notes.txt")
    assert warnings(stray, "ct") == {f"{stray}/odd.NII.GZ, {stray}/s0000, {stray}/s0001: {more}"}
    root = write_nnunet(tmp_path / "set", "ct", 2)
    write_empty(root, "imagesTs/case_009_0000.nii.gz")
    assert warnings(root) == {f"{root}/imagesTs: {more}"}


def test_a_new_patient_without_a_row_in_the_table_is_segmented(tmp_path):
    root = write_totalsegmentator(tmp_path, "ct", 2)
    (root / "meta.csv").write_text("image_id,split\ns0000,train\n")
    assert list(found([root])) == ["s0000", "s0001"]


@pytest.mark.parametrize(
    ("names", "modality", "message"),
    [
        (["a/x.nii.gz", "b/x_0000.nii"], "ct", "b/x_0000.nii: .* another scan named x; give --mod"),
        (["nowhere"], "ct", "nowhere: no such file or folder"),
        (["empty"], "ct", "empty: no labelled case found; expected"),
        (["notes.txt"], "ct", "notes.txt: expected a NIfTI file, whose name ends in .nii"),
        (["a"], None, "a/x.nii.gz: CT or MRI\\? Say so with --modality"),
        (["s1/ct.nii.gz"], "mri", "ct.nii.gz: is CT by its name, but mri by --modality"),
        (["s2/mri.nii.gz"], "ct", "mri.nii.gz: is MRI by its name, but ct by --modality"),
        (["a/x.nii.gz", "s1"], "mri", "s1/ct.nii.gz: is CT by its name, but mri by --modality"),
        (["total"], "mri", "total: holds CT scans only, no mri"),
        (["amos"], "ct", "amos: holds MRI scans only, no ct"),
        (["nnunet"], "mri", "nnunet: holds CT scans only, no mri"),
    ],
)
def test_what_cannot_be_segmented_is_refused(names, modality, message, tmp_path):
    write_empty(tmp_path, "a/x.nii.gz", "b/x_0000.nii", "notes.txt", "s1/ct.nii.gz")
    write_empty(tmp_path, "s2/mri.nii.gz", "total/s0001/ct.nii.gz")
    write_amos(tmp_path / "amos", "mri", 1)
    write_nnunet(tmp_path / "nnunet", "ct", 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        found([tmp_path / name for name in names], modality)


# ----------------------------------------------------------------------------------- label maps


def test_predictions_lie_on_the_scans_own_grid(checkpoint, tmp_path, capsys):
    write_totalsegmentator(tmp_path / "scans", "mri", 2)
    order, affine = (2, 0, 1), awkward_affine((9, 8, 10), (1, -1, 1), (2, 0, 1))
    for path in (tmp_path / "scans").rglob("*.nii.gz"):
        save(path, np.transpose(np.asarray(nibabel.load(path).dataobj), order)[5:], affine)
    assert run(checkpoint, tmp_path / "scans", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "| fl 1:5 |" in shown
    assert f"{checkpoint} segments liver, kidneys, spleen, pancreas, gallbladder" in shown
    assert "WARNING: it was trained on PHANTOMS" in shown
    assert f"2 of 2 scans segmented, in {tmp_path / 'out'}" in shown
    ids = json.loads((tmp_path / "out/labels.json").read_text())
    assert ids == {"background": 0, **{organ: n for n, organ in enumerate(ORGANS, start=1)}}
    model, _ = load_model(checkpoint, torch.device("cpu"))
    scores = {(row["case"], row["organ"]): row for row in rows(tmp_path / "out")}
    assert list(scores) == [(case, organ) for case in ("s0000", "s0001") for organ in ORGANS]
    for case in find_cases(tmp_path / "scans"):
        written = nibabel.load(tmp_path / f"out/{case.id}.nii.gz")
        assert written.get_data_dtype() == np.uint8
        ours, theirs = map(SimpleITK.ReadImage, map(str, (written.get_filename(), case.image)))
        for place in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(ours, place)() == pytest.approx(getattr(theirs, place)())
        scan = read_nifti(case.image)
        image = to_model_grid(scan.voxels, scan.spacing, "mri", SPACING)
        labels = segment(model, image, 32, scan.voxels.shape)
        back = nibabel.as_closest_canonical(written)
        np.testing.assert_array_equal(np.asarray(back.dataobj), labels)
        assert len(np.unique(labels)) > 2
        liver = nibabel.load(case.image.parent / "segmentations/liver.nii.gz")
        score = dice(np.asarray(written.dataobj) == 1, np.asarray(liver.dataobj) == 1)
        assert float(scores[case.id, "liver"]["dice"]) == score
        assert scores[case.id, "liver"]["modality"] == "mri"


def test_a_checkpoint_of_version_2_makes_the_same_maps(checkpoint, tmp_path):
    save(tmp_path / "in/x.nii.gz", make_phantom(1, "ct", 0)[0])
    new = torch.load(checkpoint, weights_only=True)
    old = {"run": "c4c3432ab390e346", "arm": "fl 1:5", "seed": 42}  # as version 2.0.0 wrote it
    old["model"] = {"organs": ORGANS, "spacing": 9.0, "patch": 32, "width": 2, "depth": 2}
    old["model"] |= {"normalization": NORMALIZATION, "phantoms": True}
    old |= {"round": 1, "weights": new["weights"]}
    old["best"] = {"val_dice": 0.5, "round": 1, "weights": None}
    done = {"round": 1, "losses": {"mri": 3.0}, "val_dice": {"mri": 0.5}, "seconds": 1.0}
    torch.save({**old, "history": [done]}, tmp_path / "old.pt")
    for file, out in ((checkpoint, "new"), (tmp_path / "old.pt", "old")):
        assert run(file, tmp_path / "in", tmp_path / out, "--modality", "ct") == 0
    maps = [(tmp_path / out / "x.nii.gz").read_bytes() for out in ("new", "old")]
    assert maps[0] == maps[1]


def test_the_same_command_again_goes_on_with_what_is_missing(
    checkpoint, tmp_path, monkeypatch, capsys
):
    scans, out = write_totalsegmentator(tmp_path / "scans", "mri", 3), tmp_path / "out"
    assert run(checkpoint, scans, out) == 0
    before, made = contents(out), []
    (out / "s0001.nii.gz").unlink()
    monkeypatch.setattr(predict, "segment", lambda *args: made.append(1) or segment(*args))
    assert run(checkpoint, scans, out) == 0
    assert "3 of 3 scans segmented" in capsys.readouterr().out
    assert (contents(out), len(made)) == (before, 1)


def test_stopped_at_any_file_it_goes_on_to_the_same(checkpoint, tmp_path, monkeypatch, capsys):
    write_nnunet(tmp_path / "in", "ct", 1)
    assert run(checkpoint, tmp_path / "in", tmp_path / "whole") == 0
    replace = Path.replace
    for n in range(1, 6):  # the claim, the organs' ids, the scan of the map, the map, the scores
        for moved in (False, True):
            out, left = tmp_path / f"{n}{moved}", [n]

            def stopping(path, target, left=left, moved=moved):
                left[0] -= 1
                if left[0] or moved:
                    replace(path, target)
                if not left[0]:
                    raise KeyboardInterrupt

            monkeypatch.setattr(Path, "replace", stopping)
            assert run(checkpoint, tmp_path / "in", out) == 130
            assert "stopped; repeat the command to continue" in capsys.readouterr().err
            monkeypatch.undo()
            if maps(out):
                assert "case_000" in json.loads((out / "predictions.json").read_text())["scans"]
            assert run(checkpoint, tmp_path / "in", out) == 0
            assert contents(out) == contents(tmp_path / "whole")


def test_a_folder_is_claimed_for_one_checkpoint_and_modality(checkpoint, tmp_path, capsys):
    images, out = write_nnunet(tmp_path / "in", "ct", 1), tmp_path / "out"
    content = torch.load(checkpoint, weights_only=True)
    content["weights"]["head.bias"] += 1
    torch.save(content, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert run(checkpoint, images, out) == 0
    before = contents(out)
    for file, args, message in (
        (tmp_path / "other.pt", (), "out/predictions.json: was made with checkpoint "),
        (checkpoint, ("--modality", "ct"), "json: was made with modality None, now ct. Give the"),
        (tmp_path / "text.pt", (), "text.pt: cannot be read ("),
    ):
        assert run(file, images, out, *args) == 2
        assert message in capsys.readouterr().err
        assert contents(out) == before
    (out / "predictions.json").unlink()
    assert run(checkpoint, images, out) == 2
    assert (
        "out: holds case_000.nii.gz, labels.json, lock, scores.csv, which"
        in capsys.readouterr().err
    )


def test_a_folder_of_something_else_is_left_as_it_is(checkpoint, tmp_path, capsys):
    write_nnunet(tmp_path / "set", "ct", 1)
    save(tmp_path / "flat/pat.nii.gz", make_phantom(1, "ct", 0)[0])
    write_empty(tmp_path, *(f"{name}/{name}" for name in ("scores.csv", "labels.json", "notes")))
    before = contents(tmp_path)
    for out in (
        "flat",
        "set",
        "set/labelsTr",
        "set/imagesTr",
        "scores.csv",
        "labels.json",
        "notes",
    ):
        for images in ("set", "flat"):
            assert run(checkpoint, tmp_path / images, tmp_path / out, "--modality", "ct") == 2
            assert "which this command did not make; choose a new" in capsys.readouterr().err
    assert run(checkpoint, tmp_path / "set", tmp_path / "notes/notes") == 2
    assert "notes/notes: is a file; choose another --out" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_no_label_map_is_written_over(checkpoint, tmp_path, capsys):
    """Neither a file in its place, nor the map of a scan that is another one now."""
    write_nnunet(tmp_path / "in", "ct", 2)
    scan, out = tmp_path / "in/imagesTr/case_000_0000.nii.gz", tmp_path / "out"
    path, images, args = out / "case_000.nii.gz", tmp_path / "in/imagesTr", ("--modality", "ct")

    def refused():
        before = path.read_bytes()
        assert run(checkpoint, images, out, *args) == 1
        shown = capsys.readouterr()
        assert f"{path}: exists, but was not made from this scan by this command" in shown.err
        assert "1 of 2 scans segmented" in shown.out
        return path.read_bytes() == before

    assert run(checkpoint, images / "case_001_0000.nii.gz", out, *args) == 0
    path.write_bytes(b"of somebody else")
    assert refused()
    path.unlink()
    assert run(checkpoint, images, out, *args) == 0
    save(scan, make_phantom(2, "ct", 0)[0])
    assert refused()


def test_one_process_at_a_time_is_at_work_in_a_folder(checkpoint, tmp_path, capsys):
    write_nnunet(tmp_path / "in", "ct", 1)
    out = tmp_path / "out"
    with lock(out / "lock") as held:
        assert held
        assert run(checkpoint, tmp_path / "in", out) == 2
    said = f"predict: {out}: another process is at work there; choose another --out\n"
    assert capsys.readouterr().err == said
    assert [path.name for path in out.iterdir()] == ["lock"]
    assert run(checkpoint, tmp_path / "in", out) == 0


def test_scores_are_of_the_scans_named_at_the_tolerance_given(checkpoint, tmp_path):
    write_nnunet(tmp_path / "in", "ct", 2)
    assert run(checkpoint, tmp_path / "in", tmp_path / "out") == 0
    strict = rows(tmp_path / "out")
    assert [row["case"] for row in strict] == ["case_000"] * 5 + ["case_001"] * 5
    assert list(strict[0]) == ["case", "modality", "organ", "outcome", "dice", "hd95", "nsd"]
    assert run(checkpoint, tmp_path / "in", tmp_path / "out", "--nsd-tolerance", 30) == 0
    wide = rows(tmp_path / "out")
    assert [row["dice"] for row in wide] == [row["dice"] for row in strict]
    nsd = [(float(a["nsd"]), float(b["nsd"])) for a, b in zip(strict, wide, strict=True)]
    assert all(a <= b for a, b in nsd)
    assert any(a < b for a, b in nsd)


def test_organs_that_a_data_set_does_not_label_are_not_scored(checkpoint, tmp_path):
    labels = {"background": 0, "liver": 6, "spleen": 1, "rest": [2, 3, 4, 8, 10]}
    write_nnunet(tmp_path / "in", "ct", 1, labels=labels)
    assert run(checkpoint, tmp_path / "in", tmp_path / "out") == 0
    of_organs = {row["organ"]: row for row in rows(tmp_path / "out")}
    unlabelled = [organ for organ, row in of_organs.items() if row["outcome"] == "unlabelled"]
    assert unlabelled == ["kidneys", "pancreas", "gallbladder"]
    assert of_organs["kidneys"]["dice"] == ""
    assert 0 <= float(of_organs["liver"]["dice"]) <= 1


def test_folders_with_equal_ids_have_folders_of_their_own(checkpoint, tmp_path):
    folders = [write_totalsegmentator(tmp_path / f"{m}_set", m, 1) for m in ("ct", "mri")]
    assert run(checkpoint, folders, tmp_path / "out") == 0
    assert maps(tmp_path / "out") == ["ct_set/s0000.nii.gz", "mri_set/s0000.nii.gz"]
    assert {row["case"] for row in rows(tmp_path / "out")} == {"ct_set/s0000", "mri_set/s0000"}


def test_files_without_labels_and_odd_sizes(checkpoint, tmp_path):
    save(tmp_path / "in/tiny.nii.gz", np.random.default_rng(0).normal(-300, 400, (3, 40, 9)))
    save(tmp_path / "in/flat.nii", np.random.default_rng(0).normal(-300, 400, (50, 20, 1)))
    assert run(checkpoint, tmp_path / "in", tmp_path / "out", "--modality", "ct") == 0
    assert nibabel.load(tmp_path / "out/tiny.nii.gz").shape == (3, 40, 9)
    assert np.asarray(nibabel.load(tmp_path / "out/flat.nii.gz").dataobj).shape[:2] == (50, 20)
    assert not (tmp_path / "out/scores.csv").exists()


# ------------------------------------------------------------------------------------ what fails


@pytest.mark.parametrize(
    ("images", "name", "spoil", "message"),
    [
        ("in", "imagesTr/case_000_0000.nii.gz", truncate, "cannot be read"),
        ("in", "labelsTr/case_000.nii.gz", shift, "lies at another place than its scan"),
        ("in/imagesTr", "imagesTr/case_000_0000.nii.gz", truncate, "cannot be read"),
    ],
)
def test_one_bad_scan_does_not_keep_the_others(
    images, name, spoil, message, checkpoint, tmp_path, capsys
):
    write_nnunet(tmp_path / "in", "ct", 2)
    spoil(tmp_path / "in" / name)
    assert run(checkpoint, tmp_path / images, tmp_path / "out", "--modality", "ct") == 1
    shown = capsys.readouterr()
    assert f"FAILED: case_000: {tmp_path / 'in' / name}: {message}" in shown.err
    assert "1 of 2 scans segmented" in shown.out
    assert maps(tmp_path / "out") == ["case_001.nii.gz"]


def test_a_checkpoints_window_that_makes_a_ct_constant_is_refused(checkpoint, tmp_path, capsys):
    content = files.read_pt(checkpoint)
    content["model"]["normalization"]["ct"] = (3000.0, 4000.0)
    (tmp_path / "model.pt").write_bytes(files.to_pt(content))
    write_nnunet(tmp_path / "in", "ct", 1)
    assert run(tmp_path / "model.pt", tmp_path / "in", tmp_path / "out") == 1
    assert "the CT window 3000 … 4000 HU makes almost every voxel" in capsys.readouterr().err
    assert maps(tmp_path / "out") == []


def test_a_bug_in_the_network_is_not_a_failed_scan(checkpoint, tmp_path, monkeypatch):
    write_nnunet(tmp_path / "in", "ct", 1)
    monkeypatch.setattr(predict, "segment", lambda *args: args[len(args)])
    with pytest.raises(IndexError) as caught:
        run(checkpoint, tmp_path / "in", tmp_path / "out")
    assert caught.value.__notes__ == ["case_000"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", "the following arguments are required: --checkpoint, --images, --out"),
        ("--check a", "the following arguments are required: --checkpoint"),  # no abbreviation
        ("--modality pet", "argument --modality: invalid choice: 'pet'"),
        ("--nsd-tolerance far", "argument --nsd-tolerance: invalid float value: 'far'"),
        ("--checkpoint a --images b --out c --nsd-tolerance -1", "a positive number, not -1.0"),
        ("--checkpoint a --images b --out c --nsd-tolerance 0", "a positive number, not 0.0"),
        ("--checkpoint a --images b --out c --nsd-tolerance nan", "a positive number, not nan"),
    ],
)
def test_bad_flags_end_with_exit_code_2(args, message, capsys):
    with pytest.raises(SystemExit) as end:
        predict.main(args.split())
    assert end.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    command = "python -m scripts.predict --checkpoint FILE --images PATH … --out DIR [options]"
    assert usage == f"usage: {command}"
    assert message in error
