"""Layouts on disk: which scans a folder holds, and where their labels are."""

import os
import shutil
import unicodedata

import numpy as np
import pytest
from conftest import save, write_amos, write_nnunet, write_totalsegmentator

from scans.cases import read_case
from scans.files import DataError
from scans.layouts import find_cases
from scans.organs import ORGANS
from scripts import check, predict
from study.config import Config
from study.hospitals import find_sources

WRITERS = {"totalsegmentator": write_totalsegmentator, "amos": write_amos, "nnunet": write_nnunet}
NOTHING = np.zeros((2, 2, 2), np.float32)


def ids(cases):
    return sorted(case.id for case in cases)


def write_scans(root, n, splits=()):
    """TotalSegmentator's layout without labels; splits: what meta.csv says of the first cases."""
    for i in range(n):
        save(root / f"s{i:04d}" / "mri.nii.gz", NOTHING)
    if splits:
        rows = ["image_id;split", *(f"s{i:04d};{split}" for i, split in enumerate(splits))]
        (root / "meta.csv").write_text("\n".join(rows), encoding="utf-8-sig")
    return root


def errors_of(root, **more):
    """What keeps each case of a folder from being used, by id."""
    return {case.id: read_case(case, ORGANS)[2] for case in find_cases(root, **more)}


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("modality", ["ct", "mri"])
def test_each_layout_is_told_from_what_the_folder_holds(layout, modality, tmp_path):
    WRITERS[layout](tmp_path, modality, 2)
    cases = find_cases(tmp_path)
    assert [case.modality for case in cases] == [modality] * 2
    assert [case.folder for case in cases] == [str(tmp_path)] * 2
    assert find_cases(tmp_path, modality) == find_cases(tmp_path, layout=layout) == cases
    for path in list(tmp_path.rglob("*")):  # what macOS leaves is not a case
        if path.is_file():
            (path.parent / f"._{path.name}").write_bytes(b"junk")
    (tmp_path / ".DS_Store").write_bytes(b"junk")
    shutil.copytree(tmp_path, tmp_path / "__MACOSX")
    assert find_cases(tmp_path) == cases


def test_totalsegmentators_files(tmp_path):
    write_totalsegmentator(tmp_path, "ct", 2, splits=["val", "train"], organs=["kidneys", "spleen"])
    case, other = find_cases(tmp_path)
    masks = tmp_path / "s0000/segmentations"
    assert (case.id, case.split, case.values) == ("s0000", "val", ())
    assert case.image == tmp_path / "s0000/ct.nii.gz"
    assert case.masks == {
        "kidneys": [(masks / "kidney_left.nii.gz", ()), (masks / "kidney_right.nii.gz", ())],
        "spleen": [(masks / "spleen.nii.gz", ())],
    }
    assert case.label_files(["spleen", "kidneys"]) == {
        masks / "spleen.nii.gz": [(1, ())],
        masks / "kidney_left.nii.gz": [(2, ())],
        masks / "kidney_right.nii.gz": [(2, ())],
    }
    assert (other.id, other.split) == ("s0001", "train")
    (tmp_path / "meta.csv").unlink()
    save(tmp_path / "s0002/mri.nii.gz", NOTHING)
    assert ids(find_cases(tmp_path)) == ["s0000", "s0001", "s0002"]
    assert ids(find_cases(tmp_path, "ct")) == ["s0000", "s0001"]
    assert ids(find_cases(tmp_path, "mri")) == ["s0002"]


def test_amos_files(tmp_path):
    write_amos(tmp_path, "ct", 2)
    write_amos(tmp_path, "mri", 1)
    save(tmp_path / "imagesTr/amos_0500.nii.gz", NOTHING)
    cases = {case.id: case for case in find_cases(tmp_path)}
    assert {id_: (case.modality, case.split) for id_, case in cases.items()} == {
        "amos_0001": ("ct", "train"),
        "amos_0002": ("ct", "val"),
        "amos_0500": ("ct", "train"),
        "amos_0501": ("mri", "train"),
    }
    case, labels = cases["amos_0002"], tmp_path / "labelsVa/amos_0002.nii.gz"
    assert case.image == tmp_path / "imagesVa/amos_0002.nii.gz"
    assert case.masks == {
        "liver": [(labels, (6,))],
        "kidneys": [(labels, (2, 3))],
        "spleen": [(labels, (1,))],
        "pancreas": [(labels, (10,))],
        "gallbladder": [(labels, (4,))],
    }
    assert case.values == tuple(range(16))
    assert case.label_files(["spleen", "kidneys"]) == {labels: [(1, (1,)), (2, (2, 3))]}  # once
    for part in ("images", "labels"):
        shutil.copy(tmp_path / f"{part}Tr/amos_0001.nii.gz", tmp_path / f"{part}Va")
    with pytest.raises(DataError, match="two cases have the id amos_0001; rename or remove one"):
        find_cases(tmp_path)


def test_a_folder_of_two_layouts_is_ambiguous(tmp_path):
    write_totalsegmentator(tmp_path, "ct", 1)
    write_nnunet(tmp_path, "ct", 1)
    with pytest.raises(DataError, match="looks like totalsegmentator and nnunet; .*--layout"):
        find_cases(tmp_path)
    assert ids(find_cases(tmp_path, layout="nnunet")) == ["case_000"]
    assert ids(find_cases(tmp_path, layout="totalsegmentator")) == ["s0000"]
    with pytest.raises(DataError, match="no amos case found; expected"):
        find_cases(tmp_path, layout="amos")


def test_a_folder_without_cases_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        find_cases(tmp_path / "nowhere")
    nothing = r"no labelled case found; expected .*DICOM must be converted first"
    with pytest.raises(DataError, match=nothing):
        find_cases(tmp_path)
    write_amos(tmp_path, "ct", 1)
    (tmp_path / "imagesTr").rename(tmp_path / "imagesTs")  # and is not taken for nnU-Net's
    with pytest.raises(DataError, match=nothing):
        find_cases(tmp_path)


def test_a_scan_or_mask_that_totalsegmentators_folders_lack_is_named(tmp_path):
    write_totalsegmentator(tmp_path, "ct", 8, organs=["liver"])
    (tmp_path / "s0000/ct.nii.gz").unlink()  # masks without their scan
    (tmp_path / "s0001/ct.nii.gz").rename(tmp_path / "there.nii.gz")
    (tmp_path / "s0001/ct.nii.gz").symlink_to(tmp_path / "gone.nii.gz")
    (tmp_path / "s0002/ct.nii.gz").unlink()
    (tmp_path / "s0002/ct.nii.gz").symlink_to("ct.nii.gz")  # to itself
    shutil.rmtree(tmp_path / "s0003")
    (tmp_path / "s0003").symlink_to(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "s0004/segmentations")
    (tmp_path / "s0004/segmentations").symlink_to(tmp_path / "gone")
    (tmp_path / "s0005/segmentations/liver.nii.gz").unlink()
    (tmp_path / "s0005/segmentations/liver.nii.gz").symlink_to(tmp_path / "gone")
    (tmp_path / "s0006/segmentations/liver.nii.gz").unlink()
    (tmp_path / "s0008").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "readme.txt").write_text("")
    errors = errors_of(tmp_path)
    assert errors.pop("s0007") == []
    for id_ in ("s0000", "s0001", "s0002", "s0003", "s0008"):
        assert errors.pop(id_)[0] == f"{tmp_path / id_ / 'ct.nii.gz'}: is missing"
    for id_ in ("s0004", "s0005", "s0006"):
        mask = tmp_path / id_ / "segmentations/liver.nii.gz"
        assert errors.pop(id_) == [f"{mask}: is missing"]
    assert errors == {}


@pytest.mark.parametrize(
    ("write", "first", "image", "label"),
    [
        (write_amos, "amos_0001", "imagesVa/{}.nii.gz", "labelsVa/{}.nii.gz"),
        (write_nnunet, "case_000", "imagesTr/{}_0000.nii.gz", "labelsTr/{}.nii.gz"),
    ],
)
def test_a_scan_or_label_map_that_is_not_there_is_named(write, first, image, label, tmp_path):
    write(tmp_path, "ct", 5)
    _, second, third, fourth, fifth = (f"{first[:-1]}{int(first[-1]) + i}" for i in range(5))
    lacking = {id_: tmp_path / image.format(id_) for id_ in (second, fourth, fifth)}
    lacking[third] = tmp_path / label.format(third)
    for path in lacking.values():
        path.unlink()
    lacking[fourth].symlink_to("gone")
    save(lacking[fifth].with_name(f"{fifth}.nii"), NOTHING)  # under another name
    assert errors_of(tmp_path) == {first: []} | {
        id_: [f"{path}: is missing"] for id_, path in sorted(lacking.items())
    }


def test_what_is_no_case_is_none_and_what_a_table_counts_more_is_not_missed(tmp_path):
    """The project's own download of a few cases keeps the tables of all."""
    nnunet = write_nnunet(tmp_path / "nnunet", "mri", 1)
    cases = find_cases(nnunet)
    for name in ("imagesTr/readme.txt", "labelsTr/a.json"):
        (nnunet / name).write_text("")
    text = (nnunet / "dataset.json").read_text().replace('"numTraining": 1', '"numTraining": 9')
    (nnunet / "dataset.json").write_text(text)
    assert find_cases(nnunet) == cases
    table = write_scans(tmp_path / "scans", 2, splits=["train", "test", "test", "val", "train"])
    found = find_cases(table)
    assert [case.split for case in found] == ["train", "test"]
    assert [case.warnings for case in [*cases, *found]] == [()] * 3


def test_a_folder_that_may_not_be_read_is_named_unless_it_is_somebody_elses(tmp_path, monkeypatch):
    write_scans(tmp_path, 2)
    (tmp_path / "lost+found").mkdir()
    closed, listdir = tmp_path / "lost+found", os.listdir

    def list_open(folder):
        return listdir(f"{folder} is closed" if folder == closed else folder)

    monkeypatch.setattr(os, "listdir", list_open)
    monkeypatch.setattr(os, "access", lambda path, _: path != closed)
    assert ids(find_cases(tmp_path)) == ["s0000", "s0001"]
    closed = tmp_path / "s0001"
    with pytest.raises((OSError, DataError), match="s0001"):
        find_cases(tmp_path)


def test_scans_of_another_name_beside_cases_are_not_left_out_in_silence(tmp_path):
    write_scans(tmp_path, 2)
    names = ["extra.nii.gz", "patient7/ct.nii", "patient8/CT.nii.gz", "s0001/ct_soft.nii.gz"]
    for name in [*names, "patient9/notes.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = find_cases(tmp_path)
    assert ids(found) == ["s0000", "s0001"]
    [warning] = found[0].warnings
    listed = ", ".join(str(tmp_path / name) for name in names)
    assert warning == f"{listed}: not read, because the layout has no such names"


def test_names_in_another_unicode_form_are_found(tmp_path):
    """Decomposed, as macOS writes them, and asked for in the composed form that is typed."""
    composed, decomposed = "Zoë é", unicodedata.normalize("NFD", "Zoë é")
    assert composed != decomposed
    scans = write_totalsegmentator(tmp_path / "scans", "mri", 1, organs=["liver"])
    (scans / "s0000/segmentations/liver.nii.gz").rename(
        scans / f"s0000/segmentations/{decomposed}.nii.gz"
    )
    (scans / "s0000").rename(scans / decomposed)
    maps = write_nnunet(tmp_path / "maps", "mri", 1, labels={"background": 0, decomposed: 6})
    (maps / "imagesTr/case_000_0000.nii.gz").rename(maps / f"imagesTr/{composed}_0000.nii.gz")
    (maps / "labelsTr/case_000.nii.gz").rename(maps / f"labelsTr/{decomposed}.nii.gz")
    for root in (scans, maps):
        for form in (composed, decomposed):
            (root / "meta.csv").write_text(f"image_id,split\n{form},test", encoding="utf-8")
            [case] = find_cases(root, organs=[composed])
            assert (case.id, case.split, list(case.masks)) == (composed, "test", [composed])
            _, labels, errors, _ = read_case(case, [composed])
            assert errors == []
            assert labels.any()


@pytest.mark.parametrize("modality", ["ct", "mri"])
def test_a_scan_is_what_its_layout_says(modality, tmp_path):
    """A modality that a folder does not hold is refused at each door."""
    other = {"ct": "mri", "mri": "ct"}[modality]
    for layout, write in WRITERS.items():
        root = write(tmp_path / layout, modality, 1)
        message = f"{layout}: holds {modality.upper()} scans only, no {other}"
        with pytest.raises(DataError, match=message):
            find_sources(Config(**{other: (str(root),)}))
        assert check.main([str(root), "--modality", other]) == 1
        with pytest.raises(DataError, match=message):
            predict.find_scans([str(root)], other, None, ORGANS)


def test_organs_that_share_a_number_of_amos22_are_refused(tmp_path):
    write_amos(tmp_path / "amos", "ct", 2)
    with pytest.raises(DataError, match="kidneys and left kidney share voxels"):
        find_cases(tmp_path / "amos", organs=("kidneys", "left kidney"))
