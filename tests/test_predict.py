"""scripts.predict as a user meets it: a checkpoint and scans in, label maps and scores out."""

import csv
import json
import os
import re
import socket
from pathlib import Path

import nibabel
import numpy as np
import pytest
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

import fedgin
from data import to_model_grid
from evaluate import dice
from scans import files
from scans.files import DataError, lock
from scans.layouts import ORGANS, find_cases
from scans.nifti import read_nifti
from scans.phantom import SPACING, make_phantom
from scripts import predict
from study.inference import load_model, segment

CPU = torch.device("cpu")
TINY = ["--rounds", "1", "--local-steps", "1", "--batch-size", "2"]
TINY += ["--patch", "32", "--width", "2", "--depth", "2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    assert fedgin.main([*TINY, "--arms", "fl", "--out", str(out)]) == 0
    return out / "fl-1-5-seed42/model.pt"


def run(checkpoint, images, out, *args):
    paths = ["--checkpoint", checkpoint, "--images", *np.atleast_1d(images), "--out", out]
    return predict.main([str(arg) for arg in (*paths, *args)])


def test_a_checkpoint_runs_no_code_and_must_be_one(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save({"weights": Evil(), "model": {}}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    for name in ("evil.pt", "text.pt", "junk.pt", "empty.pt", "other.pt", "missing.pt"):
        assert run(tmp_path / name, tmp_path, tmp_path / "out") == 2
        shown = capsys.readouterr()
        path = re.escape(str(tmp_path / name))
        said = f"predict: {path}: (cannot be read|is not as this program left it) \\(.*\\).*\n"
        assert re.fullmatch(said, shown.err)
        assert "code ran" not in shown.out
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------- which scans


def write_empty(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def found(paths, modality=None, layout=None):
    """{name of the label map: (modality, scan)}"""
    out = Path("out")
    scans = predict.find_scans([str(path) for path in paths], out, modality, layout)
    names = {path.relative_to(out): case for path, case in scans.items()}
    assert all(name.name == f"{case.id}.nii.gz" for name, case in names.items())
    return {
        str(name).removesuffix(".nii.gz"): (case.modality, case.image)
        for name, case in names.items()
    }


def test_files_and_folders_of_files_are_found(tmp_path):
    write_empty(tmp_path, "in/a.nii.gz", "in/b_0000.nii", "in/._c.nii.gz", "in/notes.txt", "d.nii")
    assert found([tmp_path / "in"], "mri") == {
        "a": ("mri", tmp_path / "in/a.nii.gz"),
        "b": ("mri", tmp_path / "in/b_0000.nii"),
    }
    assert found([tmp_path / "in", tmp_path / "d.nii"], "mri") == {
        "in/a": ("mri", tmp_path / "in/a.nii.gz"),
        "in/b": ("mri", tmp_path / "in/b_0000.nii"),
        "d": ("mri", tmp_path / "d.nii"),
    }
    with pytest.raises(DataError, match="a.nii.gz: CT or MRI\\? Say so with --modality"):
        found([tmp_path / "in"])


def test_totalsegmentators_file_names_tell_the_modality_and_their_folder_the_id(tmp_path):
    write_empty(tmp_path, "s1/ct.nii.gz", "s2/mri.nii.gz")
    files = {"s1": ("ct", tmp_path / "s1/ct.nii.gz"), "s2": ("mri", tmp_path / "s2/mri.nii.gz")}
    assert found([tmp_path / "s1/ct.nii.gz", tmp_path / "s2/mri.nii.gz"]) == files
    assert list(found([tmp_path / "s1", tmp_path / "s2"])) == ["s1/s1", "s2/s2"]
    assert found([tmp_path]) == files
    assert found([tmp_path], "mri") == {"s2": files["s2"]}


def test_a_folder_in_a_known_layout_comes_with_its_labels(tmp_path):
    write_amos(tmp_path, "ct", 1)
    scans = predict.find_scans([str(tmp_path)], Path("out"), None, None)
    assert list(scans.values()) == find_cases(tmp_path)
    write_totalsegmentator(tmp_path, "ct", 1)
    with pytest.raises(DataError, match="--layout"):
        found([tmp_path])
    assert list(found([tmp_path], layout="totalsegmentator")) == ["s0000"]


def test_scans_of_one_name_and_paths_without_scans_are_refused(tmp_path):
    write_empty(tmp_path, "a/x.nii.gz", "b/x_0000.nii")
    with pytest.raises(DataError, match="b/x_0000.nii: there is another scan named x"):
        found([tmp_path / "a/x.nii.gz", tmp_path / "b/x_0000.nii"], "ct")
    assert list(found([tmp_path / "a", tmp_path / "b"], "ct")) == ["a/x", "b/x"]
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        found([tmp_path / "nowhere"], "ct")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no labelled case found; expected"):
        found([tmp_path / "empty"], "ct")


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
    model, about = load_model(checkpoint, CPU)
    assert about["spacing"] == SPACING
    with (tmp_path / "out/scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["organ"] for row in rows] == [*ORGANS, *ORGANS]
    for case in find_cases(tmp_path / "scans"):
        source = nibabel.load(case.image)
        written = nibabel.load(tmp_path / f"out/{case.id}.nii.gz")
        assert written.shape == source.shape
        assert written.get_data_dtype() == np.uint8
        np.testing.assert_allclose(written.affine, source.affine)
        scan = read_nifti(case.image)
        image = to_model_grid(scan.voxels, scan.spacing, "mri", SPACING)
        labels = segment(model, image, 32, scan.voxels.shape)
        back = nibabel.as_closest_canonical(written)
        np.testing.assert_array_equal(np.asarray(back.dataobj), labels)
        liver = nibabel.load(case.image.parent / "segmentations/liver.nii.gz")
        score = dice(np.asarray(written.dataobj) == 1, np.asarray(liver.dataobj) == 1)
        [row] = [r for r in rows if (r["case"], r["organ"]) == (case.id, "liver")]
        assert float(row["dice"]) == score
        assert row["modality"] == "mri"


def label_maps(out):
    return {path.name: path.stat().st_mtime_ns for path in out.rglob("*.nii.gz")}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_command_again_goes_on_with_what_is_missing(checkpoint, tmp_path, capsys):
    scans, out = tmp_path / "scans", tmp_path / "out"
    write_totalsegmentator(scans, "mri", 3)
    assert run(checkpoint, scans, out) == 0
    scores, before = (out / "scores.csv").read_text(), label_maps(out)
    (out / "s0001.nii.gz").unlink()
    left = out / files.TEMPORARY / "x/file"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of a killed process")
    (out / "tmp-notes").write_bytes(b"mine")
    assert run(checkpoint, scans, out) == 0
    assert "3 of 3 scans segmented" in capsys.readouterr().out
    again = label_maps(out)
    assert again.keys() == before.keys()
    assert {name for name in again if again[name] != before[name]} == {"s0001.nii.gz"}
    assert (out / "scores.csv").read_text() == scores
    assert not left.exists()
    assert (out / "tmp-notes").read_bytes() == b"mine"


def test_another_checkpoint_does_not_go_on(checkpoint, tmp_path, capsys):
    write_totalsegmentator(tmp_path / "scans", "mri", 1)
    assert run(checkpoint, tmp_path / "scans", tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    content = torch.load(checkpoint, weights_only=True)
    content["weights"]["head.bias"] += 1
    torch.save(content, tmp_path / "other.pt")
    assert run(tmp_path / "other.pt", tmp_path / "scans", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"predict: {tmp_path / 'out'}: holds predictions of others (checkpoint " in error
    assert error.endswith("; choose another --out\n")
    assert contents(tmp_path / "out") == before


def test_no_scan_and_no_label_is_overwritten(checkpoint, tmp_path, capsys):
    write_nnunet(tmp_path / "set", "ct", 1)
    save(tmp_path / "flat/pat.nii.gz", make_phantom(1, "ct", 0)[0])
    before = contents(tmp_path)
    for images, out in (
        ("flat", "flat"),
        ("flat", "flat/below"),
        ("flat/pat.nii.gz", "flat"),
        ("set", "set/labelsTr"),
        ("set", "set/imagesTr/below"),
    ):
        assert run(checkpoint, tmp_path / images, tmp_path / out, "--modality", "ct") == 2
        assert "which holds scans or labels" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    for name in ("scores.csv", "labels.json", "config.json"):
        (tmp_path / "out" / name).write_bytes(b"of somebody else")
        assert run(checkpoint, tmp_path / "flat", tmp_path / "out", "--modality", "ct") == 2
        assert f"out/{name}: is there, and no predictions; choose" in capsys.readouterr().err
        assert (tmp_path / "out" / name).read_bytes() == b"of somebody else"
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out/lock").unlink()
    assert contents(tmp_path) == before


def test_a_label_map_that_somebody_has_worked_on_is_left(checkpoint, tmp_path, capsys):
    write_nnunet(tmp_path / "in", "ct", 2)
    out = tmp_path / "out"
    assert run(checkpoint, tmp_path / "in", out) == 0
    before = contents(out)
    path = out / "case_000.nii.gz"
    for content in (b"of somebody else", before[out / "case_001.nii.gz"]):
        path.write_bytes(content)
        capsys.readouterr()
        assert run(checkpoint, tmp_path / "in", out) == 1
        shown = capsys.readouterr()
        said = f"predict: {path}: is not as this command made it, and is left; move it away"
        assert shown.err.startswith(said)
        assert "1 of 2 scans segmented" in shown.out
        assert path.read_bytes() == content
    path.unlink()
    assert run(checkpoint, tmp_path / "in", out) == 0
    assert contents(out) == before


def test_a_label_map_of_another_scan_is_made_anew(checkpoint, tmp_path, capsys):
    write_nnunet(tmp_path / "in", "ct", 1)
    out = tmp_path / "out"
    assert run(checkpoint, tmp_path / "in", out) == 0
    first = contents(out)
    save(tmp_path / "in/imagesTr/case_000_0000.nii.gz", make_phantom(2, "ct", 0)[0])
    capsys.readouterr()
    assert run(checkpoint, tmp_path / "in", out) == 0
    assert "case_000.nii.gz: was made of another scan or modality" in capsys.readouterr().err
    assert contents(out)[out / "case_000.nii.gz"] != first[out / "case_000.nii.gz"]
    assert run(checkpoint, tmp_path / "in", out) == 0
    assert "another scan" not in capsys.readouterr().err


def test_one_process_at_a_time_is_at_work_in_a_folder(checkpoint, tmp_path, capsys):
    write_nnunet(tmp_path / "in", "ct", 1)
    out = tmp_path / "out"
    with lock(out / "lock") as held:
        assert held
        assert run(checkpoint, tmp_path / "in", out) == 2
    own = f"{socket.gethostname()}, process {os.getpid()}"
    said = f"predict: {out}: {own} is at work there; choose another --out\n"
    assert capsys.readouterr().err == said
    assert [path.name for path in out.iterdir()] == ["lock"]
    assert run(checkpoint, tmp_path / "in", out) == 0


def test_scores_are_of_all_scans_whichever_call_has_segmented_them(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    for n in (1, 2):
        assert run(checkpoint, write_nnunet(tmp_path / "in", "ct", n), out) == 0
    with (out / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["case_000"] * 5 + ["case_001"] * 5
    assert list(rows[0]) == ["case", "modality", "organ", "outcome", "dice", "hd95", "nsd"]


def test_another_tolerance_does_not_go_on(checkpoint, tmp_path, capsys):
    write_nnunet(tmp_path / "in", "ct", 1)
    assert run(checkpoint, tmp_path / "in", tmp_path / "out") == 0
    assert run(checkpoint, tmp_path / "in", tmp_path / "out", "--nsd-tolerance", 3) == 2
    assert "predictions of others (nsd_tolerance 2.0, now 3.0)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        OSError(28, "No space left on device"),
    ],
)
def test_a_scan_that_fails_does_not_keep_the_others(
    error, checkpoint, tmp_path, monkeypatch, capsys
):
    write_nnunet(tmp_path / "in", "ct", 3)
    segment, calls = predict.segment, []

    def fails_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return segment(*args)

    monkeypatch.setattr(predict, "segment", fails_second)
    assert run(checkpoint, tmp_path / "in", tmp_path / "out") == 1
    shown = capsys.readouterr()
    assert f"case_001_0000.nii.gz: {error}" in shown.err
    assert "2 of 3 scans segmented" in shown.out
    assert run(checkpoint, tmp_path / "in", tmp_path / "out") == 0
    assert len(label_maps(tmp_path / "out")) == 3


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (OSError, 1)])
def test_stopped_while_it_writes_it_leaves_no_half_file(
    stop, code, checkpoint, tmp_path, monkeypatch, capsys
):
    write_nnunet(tmp_path / "in", "ct", 2)

    seen, fsync = [], os.fsync

    def stops(descriptor):
        """On the disk are the names of the map's scan and, half, the map."""
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        content = target.read_bytes()
        if content[:2] == b"\x1f\x8b":
            seen.append(target.name)
            raise stop
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", stops)
    assert run(checkpoint, tmp_path / "in", tmp_path / "out") == code
    goes_on = "the same command goes on with what is missing" in capsys.readouterr().err
    assert goes_on == (code == 130)
    assert len(seen) == (1 if code == 130 else 2)
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["labels.json", "lock", "predictions.json"]
    monkeypatch.undo()
    assert run(checkpoint, tmp_path / "in", tmp_path / "out") == 0


def test_a_bug_in_the_network_is_not_a_failed_scan(checkpoint, tmp_path, monkeypatch):
    write_nnunet(tmp_path / "in", "ct", 1)

    def bug(*args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(predict, "segment", bug)
    with pytest.raises(RuntimeError, match="mat1"):
        run(checkpoint, tmp_path / "in", tmp_path / "out")


def test_folders_with_equal_ids_have_folders_of_their_own(checkpoint, tmp_path):
    write_totalsegmentator(tmp_path / "ct_set", "ct", 1)
    write_totalsegmentator(tmp_path / "mri_set", "mri", 1)
    images = ["--images", str(tmp_path / "ct_set"), str(tmp_path / "mri_set")]
    out = tmp_path / "out"
    assert predict.main(["--checkpoint", str(checkpoint), "--out", str(out), *images]) == 0
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*.nii.gz"))
    assert found == ["ct_set/s0000.nii.gz", "mri_set/s0000.nii.gz"]
    with (out / "scores.csv").open() as file:
        assert {row["case"] for row in csv.DictReader(file)} == {"ct_set/s0000", "mri_set/s0000"}


def test_organs_that_a_data_set_does_not_label_are_not_scored(checkpoint, tmp_path):
    labels = {"background": 0, "liver": 6, "spleen": 1, "rest": [2, 3, 4, 8, 10]}
    write_nnunet(tmp_path / "in", "ct", 1, labels=labels)
    assert run(checkpoint, tmp_path / "in", tmp_path / "out", "--nsd-tolerance", 9) == 0
    with (tmp_path / "out/scores.csv").open() as file:
        rows = {row["organ"]: row for row in csv.DictReader(file)}
    assert {organ for organ in ORGANS if rows[organ]["outcome"] == "unlabelled"} == {
        "kidneys",
        "pancreas",
        "gallbladder",
    }
    assert rows["kidneys"]["dice"] == ""
    assert 0 <= float(rows["liver"]["dice"]) <= 1


def test_files_without_labels_and_odd_sizes(checkpoint, tmp_path, capsys):
    save(tmp_path / "in/tiny.nii.gz", np.random.default_rng(0).normal(-300, 400, (3, 40, 9)))
    save(tmp_path / "in/flat.nii", np.random.default_rng(0).normal(-300, 400, (50, 20, 1)))
    assert run(checkpoint, tmp_path / "in", tmp_path / "out") == 2
    assert "--modality" in capsys.readouterr().err
    assert run(checkpoint, tmp_path / "in", tmp_path / "out", "--modality", "ct") == 0
    assert nibabel.load(tmp_path / "out/tiny.nii.gz").shape == (3, 40, 9)
    assert np.asarray(nibabel.load(tmp_path / "out/flat.nii.gz").dataobj).shape[:2] == (50, 20)
    assert not (tmp_path / "out/scores.csv").exists()


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("imagesTr/case_000_0000.nii.gz", truncate, "cannot be read"),
        ("labelsTr/case_000.nii.gz", shift, "lies at another place than its scan"),
    ],
)
def test_one_bad_scan_does_not_keep_the_others(checkpoint, name, spoil, message, tmp_path, capsys):
    write_nnunet(tmp_path / "in", "ct", 2)
    spoil(tmp_path / "in" / name)
    assert run(checkpoint, tmp_path / "in", tmp_path / "out") == 1
    shown = capsys.readouterr()
    assert f"predict: {tmp_path / 'in' / name}: {message}" in shown.err
    assert "1 of 2 scans segmented" in shown.out
    assert sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == ["case_001.nii.gz"]


def test_a_bad_scan_without_labels_is_named(checkpoint, tmp_path, capsys):
    save(tmp_path / "in/good.nii.gz", make_phantom(1, "ct", 0)[0])
    save(tmp_path / "in/bad.nii.gz", make_phantom(1, "ct", 0)[0])
    truncate(tmp_path / "in/bad.nii.gz")
    assert run(checkpoint, tmp_path / "in", tmp_path / "out", "--modality", "ct") == 1
    shown = capsys.readouterr()
    assert f"predict: {tmp_path / 'in/bad.nii.gz'}: cannot be read" in shown.err
    assert "1 of 2 scans segmented" in shown.out
    assert (tmp_path / "out/good.nii.gz").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "the following arguments are required: --checkpoint, --images, --out"),
        (["--modality", "pet"], "argument --modality: invalid choice: 'pet'"),
        (["--nsd-tolerance", "far"], "argument --nsd-tolerance: invalid"),
        (["--nsd-tolerance", "-1"], "argument --nsd-tolerance: must be a positive number"),
        (["--nsd-tolerance", "0"], "argument --nsd-tolerance: must be a positive number"),
        (["--nsd-tolerance", "nan"], "argument --nsd-tolerance: must be a positive number"),
        (["--check", "x"], "--checkpoint"),  # flags are not abbreviated
    ],
)
def test_bad_flags_end_with_exit_code_2(args, message, capsys):
    with pytest.raises(SystemExit) as end:
        predict.main(args)
    assert end.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    command = "python -m scripts.predict --checkpoint FILE --images PATH … --out DIR [options]"
    assert usage == f"usage: {command}"
    assert message in error
