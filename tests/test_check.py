"""scripts.check as a user meets it: every problem in folders of scans, and what they hold."""

import os
import shutil

import nibabel
import numpy as np
import pytest
from conftest import (
    edit,
    make_forms_disagree,
    save,
    set_voxel,
    shift,
    truncate,
    write_amos,
    write_nnunet,
    write_totalsegmentator,
)

from scans.cases import load_cases
from scans.files import DataError
from scans.layouts import find_cases
from scans.organs import ORGANS
from scans.phantom import SPACING, make_phantom
from scripts import check
from study.config import Config
from study.hospitals import load_hospitals


def run(*args):
    return check.main([str(arg) for arg in args])


@pytest.fixture
def said(capsys):
    """A function: what was printed since it was last called."""
    return lambda: capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "spoil", "message"),
    [
        ("ct", truncate, "cannot be read"),
        ("ct", set_voxel(np.nan), "1 voxels that are NaN"),
        ("segmentations/spleen", lambda path: path.unlink(), "is missing"),
        ("segmentations/spleen", shift, "lies at another place than its scan"),
    ],
)
def test_it_finds_what_makes_a_case_useless(file, spoil, message, tmp_path, said):
    write_totalsegmentator(tmp_path / "set", "ct", 2)
    path = tmp_path / "set/s0000" / f"{file}.nii.gz"
    spoil(path)
    assert run(tmp_path / "set") == 1
    shown = said()
    [line] = [line for line in shown.splitlines() if message in line]
    assert line.startswith(f"  {path}: ")
    assert line.endswith("; the case cannot be used")
    assert "1 of 2 cases usable" in shown
    with pytest.raises(DataError, match=f"{path}: .*{message}"):  # training says the same
        load_cases(find_cases(tmp_path / "set"), ORGANS, SPACING, tmp_path / "cache")


def test_it_mentions_what_does_no_harm(tmp_path, said):
    labels = {"background": 0, "liver": 6, "liver tumor": 8, "other": [1, 2, 3, 4, 10]}
    write_nnunet(tmp_path, "mri", 3, labels=labels)
    set_voxel(77)(tmp_path / "labelsTr/case_000.nii.gz")
    edit(tmp_path / "labelsTr/case_001.nii.gz", np.zeros((32, 32, 32), np.uint8))
    make_forms_disagree(tmp_path / "imagesTr/case_002_0000.nii.gz")
    assert run(tmp_path) == 0
    shown = said()
    for message in (
        "its label map: has labels that the data set does not list: 77; they count as background",
        "imagesTr/case_001_0000.nii.gz: its labels hold none of liver",
        "case_002_0000.nii.gz: its sform and qform put it at different places; the sform is used",
        "dataset.json: labels liver tumor apart from the organs",
        "MRI: 3 of 3 cases usable",
    ):
        assert shown.count(message) == 1, message


def test_it_reads_all_folders(tmp_path, said):
    write_totalsegmentator(tmp_path / "a", "ct", 3)
    truncate(tmp_path / "a/s0000/ct.nii.gz")
    (tmp_path / "a/s0000/segmentations/liver.nii.gz").unlink()
    truncate(tmp_path / "a/s0002/segmentations/pancreas.nii.gz")
    write_amos(write_amos(tmp_path / "b", "ct", 1), "mri", 2)
    folders = [str(tmp_path / name) for name in ("a", "nowhere", "b")]
    assert run(*folders) == 1
    lines = said().splitlines()
    assert [line for line in lines if line[0] != " "] == folders
    assert sum("cannot be used" in line for line in lines) == 3
    assert lines[lines.index(folders[1]) + 1] == f"  {folders[1]}: no such folder"
    assert [line for line in lines if "usable" in line] == [
        "  CT: 1 of 3 cases usable",
        "  CT: 1 of 1 cases usable",
        "  MRI: 2 of 2 cases usable",
    ]


def test_it_sums_up_what_a_folder_holds(tmp_path, said):
    labels = {"background": 0, "liver": 6, "spleen": 1, "pancreas": 10, "rest": [2, 3, 4, 8]}
    write_nnunet(tmp_path, "ct", 3, labels=labels)
    for path in tmp_path.rglob("case_000*.nii.gz"):
        edit(path, np.asarray(nibabel.load(path).dataobj)[2:], np.diag([7.5, 9, 9, 1]))
    truncate(tmp_path / "imagesTr/case_001_0000.nii.gz")
    path = tmp_path / "labelsTr/case_002.nii.gz"
    array = np.asarray(nibabel.load(path).dataobj).copy()
    array[array == 10] = 0
    edit(path, array)
    assert run(tmp_path) == 1
    first, third = make_phantom(1, "ct", 0)[1][2:], make_phantom(1, "ct", 2)[1]
    low, high = sorted(((first == 1).sum(), (third == 1).sum()))
    lines = [line for line in said().splitlines() if "cannot be read" not in line]
    assert lines[1:4] == [
        "  CT: 2 of 3 cases usable",
        "    spacing      7.5…9 × 9 × 9 mm",
        "    size         30…32 × 32 × 32 voxels",
    ]
    assert lines[4] == f"    liver        2 of 2 cases, {low}…{high} voxels"
    assert lines[5] == "    kidneys      not labelled"
    assert lines[7] == f"    pancreas     1 of 2 cases, {(first == 4).sum()} voxels"
    assert lines[8] == "    gallbladder  not labelled"


def test_it_looks_at_the_organs_that_are_asked_for(tmp_path, said):
    """A folder that labels none of them is not usable, whatever else it labels."""
    scan = make_phantom(1, "ct", 0)[0]
    save(tmp_path / "s0000/ct.nii.gz", scan)
    save(tmp_path / "s0000/segmentations/aorta.nii.gz", (scan > 40).astype(np.uint8))
    assert run(tmp_path) == 1
    none = "labels none of liver, kidneys, spleen, pancreas, gallbladder; it labels aorta\n"
    assert said() == f"{tmp_path}\n  {tmp_path}: {none}"
    assert run(tmp_path, "--organs", "Aorta", "--organs", "liver") == 0
    lines = said().splitlines()
    assert f"    Aorta        1 of 1 cases, {(scan > 40).sum()} voxels" in lines
    assert "    liver        not labelled" in lines
    assert run(tmp_path, "--organs", "Liver") == 1
    assert "labels none of liver; it labels aorta" in said()  # in the spelling of training
    truncate(tmp_path / "s0000/segmentations/aorta.nii.gz")
    assert run(tmp_path, "--organs", "aorta") == 1
    assert "aorta.nii.gz: cannot be read" in said()
    shutil.rmtree(tmp_path / "s0000/segmentations")
    assert run(tmp_path) == 1
    assert "gallbladder; it labels nothing" in said()
    amos = write_amos(write_amos(tmp_path / "amos", "ct", 1), "mri", 1)
    assert run(amos, "--organs", "bladder") == 0
    has_none, ct, mri = (line for line in said().splitlines() if "bladder" in line)
    assert has_none.endswith("amos_0001.nii.gz: its labels hold none of bladder")
    assert [" ".join(line.split()[1:]) for line in (ct, mri)] == ["0 of 1 cases", "not labelled"]


def test_flags_tell_what_folders_do_not(tmp_path, said):
    write_totalsegmentator(tmp_path, "ct", 1)
    text = (write_nnunet(tmp_path, "mri", 2) / "dataset.json").read_text()
    (tmp_path / "dataset.json").write_text(text.replace('"T2"', '"image"'))
    assert run(tmp_path, "--modality", "mri") == 1
    assert "looks like totalsegmentator and nnunet; say which with --layout" in said()
    assert run(tmp_path, "--layout", "nnunet") == 1
    assert "is channel 'image' CT or MRI?" in said()
    assert run(tmp_path, "--layout", "nnunet", "--modality", "mri") == 0
    assert "MRI: 2 of 2 cases usable" in said()


def test_bad_flags_end_with_exit_code_2(capsys):
    with pytest.raises(SystemExit, match="2"):
        run("x", "--json")
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "usage: python -m scripts.check DIR [DIR …] [options]"
    assert "unrecognized arguments: --json" in last


def test_a_name_that_is_no_utf_8_is_printed_all_the_same(tmp_path, capfdbinary):
    write_totalsegmentator(tmp_path / "set", "ct", 1)
    odd = os.fsencode(tmp_path / "set") + b"/s\xff"
    (tmp_path / "set/s0000").rename(os.fsdecode(odd))
    truncate(tmp_path / "set" / os.fsdecode(b"s\xff") / "ct.nii.gz")
    assert run(tmp_path / "set") == 1
    assert b"ct.nii.gz: cannot be read" in capfdbinary.readouterr().out


@pytest.mark.parametrize("name", ["segmentations/liver.nii", "segmentations.nii.gz"])
def test_masks_that_are_not_read_are_named(name, tmp_path, said, ct_folder):
    """By training too, with the refusal that follows from it."""
    root = write_totalsegmentator(tmp_path / "set", "ct", 2, organs=["liver"])
    for id_ in ("s0000", "s0001"):
        file = root / f"{id_}/segmentations/liver.nii.gz"
        mask = np.asarray(nibabel.load(file).dataobj)
        file.unlink()
        save(root / id_ / name, mask)
    files = f"{root}/s0000/{name}, {root}/s0001/{name}"
    warning = f"{files}: not read, because masks are sNNNN/segmentations/<organ>.nii.gz"
    assert run(root) == 1
    shown = said()
    assert f"  {warning}\n" in shown
    assert "gallbladder; it labels nothing" in shown
    with pytest.raises(DataError, match=f"^WARNING: {warning}\nnot every folder labels liver"):
        load_hospitals(Config(ct=(str(ct_folder), str(root)), cache=str(tmp_path / "cache")))


def test_it_warns_as_training_does(tmp_path, said, ct_folder):
    """Of a scan that is there twice, too."""
    root = write_totalsegmentator(tmp_path / "set", "ct", 4, seed=2)
    shutil.copy(ct_folder / "s0001/ct.nii.gz", root / "s0003/ct.nii.gz")
    make_forms_disagree(root / "s0001/ct.nii.gz")
    set_voxel(3)(root / "s0002/segmentations/liver.nii.gz")
    (root / "splits_final.json").write_text("[]")
    folders = (str(ct_folder), str(root))
    config = Config(ct=folders, spacing=12.0, cache=str(tmp_path / "cache"))
    expected = [note.removeprefix("WARNING: ") for note in load_hospitals(config)[1]]
    assert len(expected) == 4
    assert sum("are there twice" in warning for warning in expected) == 1
    assert run(*folders) == 0
    lines = [line.strip() for line in said().splitlines() if ": " in line]
    assert [line for line in lines if "cases usable" not in line] == expected
