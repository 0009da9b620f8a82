"""scripts.check as a user meets it: every problem of some folders, and what they hold."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import (
    SPOILT_CASES,
    edit,
    make_forms_disagree,
    set_voxel,
    truncate,
    write_amos,
    write_nnunet,
    write_totalsegmentator,
)

from scans.cases import load_case
from scans.files import DataError
from scans.layouts import ORGANS, find_cases
from scans.phantom import SPACING, make_phantom
from scripts import check


def run(*args):
    return check.main([str(arg) for arg in args])


@pytest.mark.parametrize(("file", "spoil", "message"), SPOILT_CASES)
def test_it_finds_what_makes_a_case_useless(file, spoil, message, tmp_path, capsys):
    write_totalsegmentator(tmp_path, "ct", 2)
    path = tmp_path / "s0000" / f"{file}.nii.gz"
    spoil(path)
    assert run(tmp_path) == 1
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if message in line]
    assert lines
    assert path.name in lines[0]
    assert "the case cannot be used" in lines[0]
    assert "s0000/" in lines[0]
    assert "1 of 2 cases usable" in shown
    with pytest.raises(DataError, match=str(tmp_path)):
        load_case(find_cases(tmp_path)[0], ORGANS, SPACING)


def test_it_mentions_what_does_no_harm(tmp_path, capsys):
    write_nnunet(tmp_path, "mri", 4)
    labels, images = tmp_path / "labelsTr", tmp_path / "imagesTr"
    set_voxel(77)(labels / "case_000.nii.gz")
    edit(labels / "case_001.nii.gz", np.zeros((32, 32, 32), np.uint8))
    make_forms_disagree(images / "case_002_0000.nii.gz")
    scan = np.asarray(nibabel.load(images / "case_003_0000.nii.gz").dataobj)
    edit(images / "case_003_0000.nii.gz", scan[..., None])
    assert run(tmp_path) == 0
    shown = capsys.readouterr().out
    for message in (
        "labelsTr/case_000.nii.gz: has labels that the data set does not list: 77; they count as",
        "imagesTr/case_001_0000.nii.gz: has no organ at all",
        "case_002_0000.nii.gz: its sform and qform put the volume at different places; the sform",
        "case_003_0000.nii.gz: has shape (32, 32, 32, 1); axes of length 1 are dropped",
        "MRI: 4 of 4 cases usable",
    ):
        assert message in shown


def test_it_takes_no_offence_at_rounding_in_affines(tmp_path, capsys):
    write_totalsegmentator(tmp_path, "ct", 1)
    path = tmp_path / "s0000/segmentations/liver.nii.gz"
    edit(path, affine=nibabel.load(path).affine + 1e-3 * np.eye(4) * [1, 1, 1, 0])
    assert run(tmp_path) == 0
    assert "by their affines" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("write", "name", "known", "what"),
    [
        (write_totalsegmentator, "s0000", "s0864", "is corrupt or has impossible values"),
        (write_totalsegmentator, "s0000", "s0001", "is rotated against its labels"),
        (write_totalsegmentator, "s0000", "s0044", "is rotated against its labels"),
        (write_totalsegmentator, "s0000", "s0067", "is rotated against its labels"),
        (write_amos, "amos_0501", "amos_0540", "has a scale factor"),
    ],
)
def test_it_mentions_cases_known_to_be_bad(write, name, known, what, tmp_path, capsys):
    write(tmp_path, "mri", 1)
    for path in list(tmp_path.rglob(f"{name}*")):
        path.rename(path.with_name(path.name.replace(name, known)))
    assert run(tmp_path) == 0
    shown = capsys.readouterr().out
    assert f": {known} {what}" in shown
    assert "; it is used if nothing else is wrong\n" in shown
    assert "MRI: 1 of 1 cases usable" in shown
    [case] = find_cases(tmp_path)
    assert check.inspect(case._replace(layout="nnunet"))["problems"] == []


def test_it_reports_everything_in_one_pass(tmp_path, capsys):
    write_totalsegmentator(tmp_path / "a", "ct", 3)
    truncate(tmp_path / "a/s0000/ct.nii.gz")
    (tmp_path / "a/s0000/segmentations/liver.nii.gz").unlink()
    truncate(tmp_path / "a/s0002/segmentations/pancreas.nii.gz")
    write_amos(tmp_path / "b", "mri", 2)
    shutil.copytree(tmp_path / "b/imagesTr", tmp_path / "b/imagesVa", dirs_exist_ok=True)
    shutil.copytree(tmp_path / "b/labelsTr", tmp_path / "b/labelsVa", dirs_exist_ok=True)
    folders = [str(tmp_path / name) for name in ("a", "nowhere", "b")]
    assert run(*folders) == 1
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line[0] != " "] == folders
    assert "s0000/ct.nii.gz: cannot be read" in shown
    assert "s0000/segmentations/liver.nii.gz: missing" in shown
    assert "s0002/segmentations/pancreas.nii.gz: cannot be read" in shown
    assert f"  {folders[1]}: no such folder; nothing of it can be used\n  no case" in shown
    assert "the id amos_0501 stands in this folder twice; only the first one can be used" in shown
    assert "CT: 1 of 3 cases usable" in shown
    assert run("--json", *folders) == 1
    found = json.loads(capsys.readouterr().out)
    assert list(found) == folders
    problems = found[folders[0]]["problems"]
    assert len(problems) == 4  # and s0001, known to be rotated
    assert problems[0].keys() == {"file", "what", "consequence", "usable"}
    assert problems[0]["file"] == str(tmp_path / "a/s0000/ct.nii.gz")
    [usable] = [case for case in found[folders[0]]["cases"] if case["usable"]]
    assert (usable["id"], usable["modality"]) == ("s0001", "ct")
    assert usable["spacing"] == [SPACING] * 3
    assert usable["size"] == [32, 32, 32]
    labels = make_phantom(1, "ct", 1)[1]
    assert usable["voxels"] == {o: (labels == n).sum() for n, o in enumerate(ORGANS, start=1)}
    [missing] = found[folders[1]]["problems"]
    assert (missing["what"], missing["usable"]) == ("no such folder", False)
    assert found[folders[1]]["cases"] == []


def test_it_sums_up_what_a_folder_holds(tmp_path, capsys):
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
    lines = [line for line in capsys.readouterr().out.splitlines() if "cannot be read" not in line]
    assert lines[1:4] == [
        "  CT: 2 of 3 cases usable",
        "    spacing      7.5…9 × 9 × 9 mm",
        "    size         30…32 × 32 × 32 voxels",
    ]
    assert lines[4] == f"    liver        2 of 2 cases, {low}…{high} voxels"
    assert lines[5] == "    kidneys      not labelled"
    assert lines[7] == f"    pancreas     1 of 2 cases, {(first == 4).sum()} voxels"
    assert lines[8] == "    gallbladder  not labelled"


def test_it_sums_up_each_modality_of_a_folder(tmp_path, capsys):
    write_amos(tmp_path, "ct", 1)
    write_amos(tmp_path, "mri", 2)
    assert run(tmp_path) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "usable" in line]
    assert lines == ["  CT: 1 of 1 cases usable", "  MRI: 2 of 2 cases usable"]


def test_an_ambiguous_folder_needs_a_layout(tmp_path, capsys):
    write_totalsegmentator(tmp_path, "ct", 1)
    write_nnunet(tmp_path, "ct", 2)
    assert run(tmp_path) == 1
    assert "looks like totalsegmentator and nnunet; say which with --layout" in (
        capsys.readouterr().out
    )
    assert run(tmp_path, "--layout", "nnunet") == 0
    assert "2 of 2 cases usable" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "the following arguments are required: DIR"),
        (["x", "--layout", "bids"], "argument --layout: invalid choice: 'bids'"),
        (["x", "--yaml"], "unrecognized arguments: --yaml"),
    ],
)
def test_bad_flags_end_with_exit_code_2(args, message, capsys):
    with pytest.raises(SystemExit) as end:
        run(*args)
    assert end.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert error[0] == "usage: python -m scripts.check DIR [DIR …] [options]"
    assert message in error[-1]


def test_a_name_that_is_no_utf_8_is_printed_all_the_same(tmp_path):
    write_totalsegmentator(tmp_path / "set", "ct", 1)
    odd = os.fsencode(tmp_path / "set") + b"/s\xff"
    (tmp_path / "set/s0000").rename(os.fsdecode(odd))
    (Path(os.fsdecode(odd)) / "ct.nii.gz").write_bytes(b"junk")
    args = [sys.executable, "-m", "scripts.check", str(tmp_path / "set")]
    done = subprocess.run(args, cwd=Path(__file__).parent.parent, capture_output=True)
    assert done.returncode == 1
    assert b"ct.nii.gz: cannot be read" in done.stdout
    assert b"Traceback" not in done.stderr


def test_ctrl_c_ends_it_without_a_traceback(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "check_folder", stop)
    assert check.main([str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\ncheck: stopped\n"


def test_who_has_seen_enough_of_it_may_close_the_pipe(ct_folder):
    """As `| head` does, which is no failed run."""
    command = [sys.executable, "-m", "scripts.check", str(ct_folder), "--json"]
    with subprocess.Popen(
        command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
