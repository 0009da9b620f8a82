"""From raw downloads to predictions: geometry, the cache, bad files, `check`, evaluate.py."""

import csv
import gzip
import json
import shutil

import nibabel
import numpy as np
import pytest
import torch
from conftest import (
    save,
    truncate,
    write_amos,
    write_nnunet,
    write_totalsegmentator,
)

import data
import evaluate
import fedgin
from data import ORGANS, DataError, find_cases, load_case, load_cases, read_case, read_nifti
from phantom import SPACING, phantom

TINY = ["--rounds", "1", "--local-steps", "1", "--batch-size", "2"]
TINY += ["--patch", "32", "--width", "2", "--depth", "2"]
OBLIQUE = nibabel.eulerangles.euler2mat(0.3, -0.2, 0.15)


# ---------------------------------------------------------------------------------------- geometry


def awkward_affine(spacing, flips, order):
    """Permuted and flipped axes, an oblique direction, anisotropic spacing and an offset."""
    affine = np.eye(4)
    affine[:3, :3] = OBLIQUE @ np.diag(flips).astype(float)[:, order] @ np.diag(spacing)
    affine[:3, 3] = [-91.5, 33.25, 400.0]
    return affine


@pytest.mark.parametrize("spacing", [(9.0, 9.0, 9.0), (7.0, 9.0, 12.0)])
@pytest.mark.parametrize(
    ("flips", "order"),
    [((1, 1, 1), (0, 1, 2)), ((-1, -1, 1), (0, 1, 2)), ((1, -1, -1), (2, 0, 1))],
)
def test_a_label_sent_to_the_models_grid_and_back_is_in_its_place(spacing, flips, order, tmp_path):
    """The label itself as the prediction, through files with awkward affines; by voxel and mm."""
    image, labels = phantom(4, "ct", 0)
    image, labels = (np.transpose(a, order)[3:, :, 2:] for a in (image, labels))
    affine = awkward_affine(spacing, flips, order)
    save(tmp_path / "s1/ct.nii.gz", image, affine)
    for organ, names in data.TOTALSEGMENTATOR_MASKS.items():
        for name in names:
            mask = labels == ORGANS.index(organ) + 1
            save(tmp_path / f"s1/segmentations/{name}.nii.gz", mask.astype(np.uint8), affine)
    [case] = find_cases(tmp_path)
    scan, _, troubles = read_case(case, ORGANS)
    assert troubles == []
    volume = load_case(case, ORGANS, spacing=4.0)
    one_hot = (torch.tensor(volume.labels == n).float() for n in range(6))
    restored = data.resample_labels(one_hot, scan.voxels.shape)
    data.write_nifti(tmp_path / "out.nii.gz", data.to_scan_grid(restored, scan), scan)
    written = nibabel.load(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(written.affine, affine, atol=1e-4)
    voxels = np.asarray(written.dataobj)
    assert voxels.shape == labels.shape
    assert evaluate.dice(voxels == 1, labels == 1) >= 0.97
    for n in range(1, 6):
        centre = [
            nibabel.affines.apply_affine(affine, np.argwhere(v == n)).mean(0)
            for v in (voxels, labels)
        ]
        np.testing.assert_allclose(*centre, atol=2.0)  # mm


@pytest.mark.parametrize("write", [write_totalsegmentator, write_nnunet, write_amos])
def test_every_layout_comes_back_through_awkward_affines(write, tmp_path):
    write(tmp_path, "mri", 1)
    order, flips = (1, 2, 0), (-1, 1, -1)
    affine = awkward_affine((SPACING,) * 3, flips, order)
    for path in tmp_path.rglob("*.nii.gz"):
        save(path, np.transpose(np.asarray(nibabel.load(path).dataobj), order), affine)
    volume = load_case(find_cases(tmp_path)[0], ORGANS, SPACING)
    labels = phantom(1, "mri", 0)[1]
    # Canonical again, but for the flips: column j of the affine runs along ±x of axis order[j].
    turned = np.flip(labels, [axis for axis in range(3) if flips[axis] < 0])
    np.testing.assert_array_equal(volume.labels, turned)


# --------------------------------------------------------------------------------------- the cache


def test_the_cache_holds_what_would_be_read_and_notices_changes(tmp_path):
    write_totalsegmentator(tmp_path / "ct", "ct", 2)
    cases, cache = find_cases(tmp_path / "ct"), tmp_path / "cache"
    volumes, _ = load_cases(cases, ORGANS, 12.0, cache)
    for case in cases:
        plain, cached = load_case(case, ORGANS, 12.0), volumes[case.image]
        for name in ("image", "labels", "centres", "labelled"):
            np.testing.assert_array_equal(getattr(plain, name), getattr(cached, name))
        assert isinstance(cached.image, np.memmap)
    entries = sorted(path.name for path in cache.iterdir())
    assert len(entries) == 2

    stamps = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    load_cases(cases, ORGANS, 12.0, cache)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == stamps  # nothing written

    load_cases(cases, ORGANS, 11.0, cache)
    load_cases(cases, ORGANS[:2], 12.0, cache)
    assert len(list(cache.iterdir())) == 6
    mask = tmp_path / "ct/s0001/segmentations/liver.nii.gz"
    save(mask, np.zeros((32, 32, 32), np.uint8))
    again, _ = load_cases(cases, ORGANS, 12.0, cache)
    assert len(list(cache.iterdir())) == 7
    assert not (again[cases[1].image].labels == 1).any()


def test_a_full_disk_leaves_no_half_entry(tmp_path, monkeypatch):
    write_totalsegmentator(tmp_path / "ct", "ct", 1)
    cases, cache, save_array = find_cases(tmp_path / "ct"), tmp_path / "cache", np.save

    def full(path, array):
        if path.name == "labels.npy":
            raise OSError(28, "No space left on device")
        save_array(path, array)

    monkeypatch.setattr(data.np, "save", full)
    with pytest.raises(OSError, match="No space"):
        load_cases(cases, ORGANS, 12.0, cache)
    assert list(cache.iterdir()) == []


def test_several_processes_read_the_same(tmp_path):
    write_totalsegmentator(tmp_path / "ct", "ct", 16)
    cases = find_cases(tmp_path / "ct")
    volumes, _ = load_cases(cases, ORGANS, 12.0, tmp_path / "cache")
    assert list(volumes) == [case.image for case in cases]
    for index in (0, 15):
        plain = load_case(cases[index], ORGANS, 12.0)
        np.testing.assert_array_equal(volumes[cases[index].image].image, plain.image)


# -------------------------------------------------------------------------------------- bad cases


def edit(path, array=None, affine=None):
    nifti = nibabel.load(path)
    array = np.asarray(nifti.dataobj) if array is None else array
    nibabel.save(nibabel.Nifti1Image(array, nifti.affine if affine is None else affine), path)


def shift(path):
    affine = nibabel.load(path).affine.copy()
    affine[0, 3] += 40
    edit(path, affine=affine)


def disagree(path):
    nifti = nibabel.load(path)
    affine = nifti.affine.copy()
    affine[2, 3] += 100
    nifti.set_qform(affine, code=1)
    nifti.set_sform(nifti.affine, code=1)
    nibabel.save(nifti, path)


def zero_voxels(path, value=0.0):
    blob = bytearray(nibabel.load(path).to_bytes())
    blob[80:92] = np.array([2, value, 2], "<f4").tobytes()  # pixdim[1:4] of the NIfTI-1 header
    path.write_bytes(gzip.compress(bytes(blob)))


def voxel(value):
    def poison(path):
        array = np.asarray(nibabel.load(path).dataobj).copy()
        array[1, 2, 3] = value
        edit(path, array)

    return poison


FATAL = {
    "truncated": (truncate, "cannot be read"),
    "corrupt": (lambda p: p.write_bytes(b"\x1f\x8b" + bytes(100)), "cannot be read"),
    "shape": (lambda p: save(p, np.ones((4, 5, 6), np.float32)), r"(4, 5, 6)"),
    "4-D": (lambda p: save(p, np.ones((4, 5, 6, 2), np.float32)), "expected one 3D volume"),
    "affine": (shift, "lies at another place"),
    "zero voxel size": (zero_voxels, "is not positive"),
    "negative voxel size": (lambda p: zero_voxels(p, -1.0), "is not positive"),
    "NaN voxel size": (lambda p: zero_voxels(p, np.nan), "is not positive"),
    "NaN": (voxel(np.nan), "1 voxels that are NaN or infinite"),
    "infinite": (voxel(np.inf), "1 voxels that are NaN or infinite"),
    "no HU": (voxel(-9758.0), "no Hounsfield units"),
    "scale factor": (voxel(4e6), "no Hounsfield units"),
    "constant": (lambda p: edit(p, np.zeros((32, 32, 32), np.float32)), "every voxel is 0"),
    "missing": (lambda p: p.unlink(), "missing"),
}
OF_MASKS = ("truncated", "corrupt", "shape", "4-D", "affine", "zero voxel size", "missing")


@pytest.mark.parametrize(
    ("name", "trouble"),
    [("ct", name) for name in FATAL if name not in ("shape", "missing")]
    + [("segmentations/spleen", name) for name in OF_MASKS],
)
def test_check_finds_what_makes_a_case_useless(name, trouble, tmp_path, capsys):
    write_totalsegmentator(tmp_path, "ct", 1)
    file = tmp_path / "s0000" / f"{name}.nii.gz"
    spoil, message = FATAL[trouble]
    spoil(file)
    assert data.main(["check", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if message in line]
    assert lines
    assert f"{name.split('/')[-1]}" in lines[0]
    assert "the case cannot be used" in lines[0]
    assert "0 of 1 cases usable" in shown
    with pytest.raises(DataError, match=str(tmp_path)):
        load_case(find_cases(tmp_path)[0], ORGANS, SPACING)


def test_check_mentions_what_does_no_harm(tmp_path, capsys):
    write_nnunet(tmp_path, "mri", 4)
    labels, images = tmp_path / "labelsTr", tmp_path / "imagesTr"
    voxel(77)(labels / "case_000.nii.gz")
    edit(labels / "case_001.nii.gz", np.zeros((32, 32, 32), np.uint8))
    disagree(images / "case_002_0000.nii.gz")
    scan = np.asarray(nibabel.load(images / "case_003_0000.nii.gz").dataobj)
    edit(images / "case_003_0000.nii.gz", scan[..., None])
    assert data.main(["check", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for message in (
        "labelsTr/case_000.nii.gz: has labels that the data set does not list: 77; they count as",
        "imagesTr/case_001_0000.nii.gz: has no organ at all",
        "case_002_0000.nii.gz: its sform and qform put the volume at different places; the sform",
        "case_003_0000.nii.gz: has shape (32, 32, 32, 1); axes of length 1 are dropped",
        "MRI: 4 of 4 cases usable",
    ):
        assert message in shown


def test_rounding_in_affines_is_no_trouble(tmp_path, capsys):
    write_totalsegmentator(tmp_path, "ct", 1)
    path = tmp_path / "s0000/segmentations/liver.nii.gz"
    edit(path, affine=nibabel.load(path).affine + 1e-3 * np.eye(4) * [1, 1, 1, 0])
    assert data.main(["check", str(tmp_path)]) == 0
    assert "by their affines" not in capsys.readouterr().out


def test_check_reports_everything_in_one_pass(tmp_path, capsys):
    write_totalsegmentator(tmp_path / "a", "ct", 3)
    truncate(tmp_path / "a/s0000/ct.nii.gz")
    (tmp_path / "a/s0000/segmentations/liver.nii.gz").unlink()
    truncate(tmp_path / "a/s0002/segmentations/pancreas.nii.gz")
    write_amos(tmp_path / "b", "mri", 2)
    shutil.copytree(tmp_path / "b/imagesTr", tmp_path / "b/imagesVa", dirs_exist_ok=True)
    shutil.copytree(tmp_path / "b/labelsTr", tmp_path / "b/labelsVa", dirs_exist_ok=True)
    folders = [str(tmp_path / name) for name in ("a", "nowhere", "b")]
    assert data.main(["check", *folders]) == 1
    shown = capsys.readouterr().out
    assert "s0000/ct.nii.gz: cannot be read" in shown
    assert "s0000/segmentations/liver.nii.gz: missing" in shown
    assert "s0002/segmentations/pancreas.nii.gz: cannot be read" in shown
    assert "nowhere: no such folder" in shown
    assert "the id amos_0501 stands in this folder twice; only the first one can be used" in shown
    assert "CT: 1 of 3 cases usable" in shown
    assert data.main(["check", "--json", *folders]) == 1
    found = json.loads(capsys.readouterr().out)
    assert len(found[folders[0]]["troubles"]) == 4  # and s0001, known to be rotated
    [usable] = [case for case in found[folders[0]]["cases"] if case["usable"]]
    assert usable["spacing"] == [SPACING] * 3
    assert usable["voxels"]["liver"] == (phantom(1, "ct", 1)[1] == 1).sum()


def test_known_bad_cases_are_mentioned(tmp_path, capsys):
    write_totalsegmentator(tmp_path, "ct", 1)
    (tmp_path / "s0000").rename(tmp_path / "s0864")
    data.main(["check", str(tmp_path)])
    assert "s0864/ct.nii.gz: s0864 is corrupt" in capsys.readouterr().out


def test_a_folder_of_two_layouts_wants_a_word(tmp_path):
    write_totalsegmentator(tmp_path, "ct", 1)
    write_nnunet(tmp_path, "ct", 1)
    with pytest.raises(DataError, match="looks like totalsegmentator and nnunet; .*--layout"):
        find_cases(tmp_path)
    assert [case.id for case in find_cases(tmp_path, layout="nnunet")] == ["case_000"]
    assert [case.id for case in find_cases(tmp_path, layout="totalsegmentator")] == ["s0000"]


# ----------------------------------------------------------------------------- runs on such folders


def run(*words):
    return fedgin.main([*TINY, "--spacing", "12", *map(str, words)])


def test_a_bad_case_stops_the_run_or_is_left_out(tmp_path, ct_folder, mri_folder, capsys):
    shutil.copytree(mri_folder, tmp_path / "mri")
    truncate(tmp_path / "mri/imagesTr/case_001_0000.nii.gz")
    words = ["--ct", ct_folder, "--mri", tmp_path / "mri", "--arms", "fl"]
    assert run(*words, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "case_001_0000.nii.gz: cannot be read" in error
    assert "--skip-bad" in error
    assert not (tmp_path / "out").exists()
    assert run(*words, "--out", tmp_path / "out", "--skip-bad") == 0
    assert "left out: " in capsys.readouterr().out
    splits = json.loads((tmp_path / "out/hospitals/mri.json").read_text())["splits"]["42"]
    assert sorted(id_ for part in splits.values() for id_ in part) == [
        "case_000",
        "case_002",
        "case_003",
    ]


def test_one_scan_has_one_role(tmp_path, ct_folder, mri_folder, capsys):
    words = ["--ct", ct_folder, "--mri", mri_folder, "--test", ct_folder]
    assert run(*words, "--out", tmp_path / "out") == 2
    assert "is in two of the folders given" in capsys.readouterr().err


def test_partial_labels_train_each_hospital_on_what_it_has(tmp_path, ct_folder, capsys):
    labels = {"background": 0, "liver": 6, "spleen": 1, "other": [2, 3, 4, 8, 10]}
    few = write_nnunet(tmp_path / "few", "mri", 4, labels=labels)
    words = ["--ct", ct_folder, "--mri", few, "--arms", "fedgin", "centralized"]
    assert run(*words, "--out", tmp_path / "out") == 2
    assert "--partial-labels" in capsys.readouterr().err
    assert run(*words, "--out", tmp_path / "out", "--partial-labels") == 0
    for result in json.loads((tmp_path / "out/results.json").read_text())["results"]:
        outcomes = {organ: s["outcome"] == "unlabelled" for organ, s in result["scores"].items()}
        lacking = result["modality"] == "mri"
        assert outcomes == {o: lacking and o not in ("liver", "spleen") for o in ORGANS}
    assert "– / 0" in (tmp_path / "out/results.md").read_text()


def test_amos_is_the_test_set_of_both(tmp_path, ct_folder, mri_folder):
    write_amos(tmp_path / "amos", "ct", 2)
    write_amos(tmp_path / "amos", "mri", 2)
    words = ["--ct", ct_folder, "--mri", mri_folder, "--test", tmp_path / "amos", "--arms", "fl"]
    assert run(*words, "--out", tmp_path / "out") == 0
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert {(r["modality"], r["case"]) for r in results} == {
        ("ct", "amos_0001"),
        ("ct", "amos_0002"),
        ("mri", "amos_0501"),
        ("mri", "amos_0502"),
    }


# -------------------------------------------------------------------------- python evaluate.py


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    assert fedgin.main([*TINY, "--arms", "fl", "--out", str(out)]) == 0
    return out / "fl.pt"


def segment_files(*words):
    return evaluate.main([str(word) for word in words])


def test_predictions_lie_on_the_scans_own_grid(checkpoint, tmp_path, capsys):
    write_totalsegmentator(tmp_path / "scans", "mri", 2)
    order, affine = (2, 0, 1), awkward_affine((9, 8, 10), (1, -1, 1), (2, 0, 1))
    for path in (tmp_path / "scans").rglob("*.nii.gz"):
        save(path, np.transpose(np.asarray(nibabel.load(path).dataobj), order)[5:], affine)
    words = ["--checkpoint", checkpoint, "--images", tmp_path / "scans", "--out", tmp_path / "out"]
    assert segment_files(*words) == 0
    assert json.loads((tmp_path / "out/labels.json").read_text())["gallbladder"] == 5
    model, needs = evaluate.load_model(checkpoint, torch.device("cpu"))
    assert needs["spacing"] == SPACING
    for case in find_cases(tmp_path / "scans"):
        source = nibabel.load(case.image)
        written = nibabel.load(tmp_path / f"out/{case.id}.nii.gz")
        assert written.shape == source.shape
        assert written.get_data_dtype() == np.uint8
        np.testing.assert_allclose(written.affine, source.affine)
        scan = read_nifti(case.image)
        image = data.to_model_grid(scan, "mri", SPACING)
        labels = evaluate.segment(model, image, 32, scan.voxels.shape)
        back = nibabel.as_closest_canonical(written)
        np.testing.assert_array_equal(np.asarray(back.dataobj), labels)
    with (tmp_path / "out/scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["organ"] for row in rows] == [*ORGANS, *ORGANS]
    assert "| fl " in capsys.readouterr().out
    assert segment_files(*words) == 2
    assert "already holds predictions" in capsys.readouterr().err


def test_files_without_labels_and_odd_sizes(checkpoint, tmp_path, capsys):
    save(tmp_path / "in/tiny.nii.gz", np.random.default_rng(0).normal(size=(3, 40, 9)))
    save(tmp_path / "in/flat.nii", np.random.default_rng(0).normal(size=(50, 20, 1)))
    words = ["--checkpoint", checkpoint, "--images", tmp_path / "in", "--out", tmp_path / "out"]
    assert segment_files(*words) == 2
    assert "--modality" in capsys.readouterr().err
    assert segment_files(*words, "--modality", "ct") == 0
    assert nibabel.load(tmp_path / "out/tiny.nii.gz").shape == (3, 40, 9)
    assert np.asarray(nibabel.load(tmp_path / "out/flat.nii.gz").dataobj).shape[:2] == (50, 20)
    assert not (tmp_path / "out/scores.csv").exists()


def test_one_bad_scan_does_not_keep_the_others(checkpoint, tmp_path, capsys):
    write_nnunet(tmp_path / "in", "ct", 2)
    truncate(tmp_path / "in/imagesTr/case_000_0000.nii.gz")
    words = ["--checkpoint", checkpoint, "--images", tmp_path / "in", "--out", tmp_path / "out"]
    assert segment_files(*words) == 1
    shown = capsys.readouterr()
    assert "case_000_0000.nii.gz: cannot be read" in shown.err
    assert "1 of 2 scans segmented" in shown.out
    assert sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == ["case_001.nii.gz"]


def test_a_checkpoint_runs_no_code_and_must_be_one(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save({"weights": Evil(), "model": {}}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    for name in ("evil.pt", "text.pt", "junk.pt", "other.pt", "missing.pt"):
        words = ["--checkpoint", tmp_path / name, "--images", tmp_path, "--out", tmp_path / "out"]
        assert segment_files(*words) == 2
        shown = capsys.readouterr()
        assert f"{name}: no checkpoint of fedgin.py" in shown.err
        assert "code ran" not in shown.out
        assert len(shown.err.strip().splitlines()) == 1
