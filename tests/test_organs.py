"""Structures by any name, and which of them folders label."""

import shutil

import pytest
from conftest import (
    NNUNET_LABELS,
    write_amos,
    write_nnunet,
    write_totalsegmentator,
)
from test_layouts import WRITERS

from scans.files import DataError
from scans.layouts import find_cases
from scans.organs import check_organs, match, spelling


def test_organs_that_a_folder_does_not_label(tmp_path):
    labels = {"background": 0, "liver": 1, "spleen": 2}
    few = find_cases(write_nnunet(tmp_path / "few", "mri", 1, labels=labels))
    full = find_cases(write_nnunet(tmp_path / "full", "ct", 1))
    few, full = (set(cases[0].masks) for cases in (few, full))
    organs = ["liver", "kidneys", "spleen", "pancreas", "gallbladder"]
    check_organs({"few": few, "full": full}, ["spleen", "liver"], False)
    check_organs({"few": few, "full": full}, organs, partial=True)
    advice = r"few: liver, spleen; full: .*use --organs liver spleen or --partial-labels"
    with pytest.raises(DataError, match=advice):
        check_organs({"few": few, "full": full}, organs, partial=False)
    with pytest.raises(DataError, match=r"not one folder labels .*use --organs liver spleen"):
        check_organs({"few": few}, organs, partial=True)
    with pytest.raises(DataError, match=r"\(few: liver; other: none\); use --partial-labels"):
        check_organs({"few": {"liver"}, "other": set()}, ["liver"], partial=False)
    with pytest.raises(DataError, match=r"a: liver; b: spleen\); use folders that share an organ"):
        check_organs({"a": {"liver"}, "b": {"spleen"}}, organs, partial=False)


def test_a_folder_that_labels_none_of_the_organs_is_refused_even_with_partial_labels():
    labelled = {"a": {"liver", "spleen"}, "b": {"kidneys"}}
    with pytest.raises(DataError, match="b: labels none of liver, spleen .*; leave it out"):
        check_organs(labelled, ["liver", "spleen"], partial=True)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        *(("kidney_left", n) for n in ("Kidney_L", "left kidney", "KIDNEY-left", "l kidney")),
        *(("kidney_left", n) for n in ("Left Kidney", "leftKidney", "kidney (left)", "kidney.lt")),
        ("lung_upper_lobe_right", "right lung upper lobe"),
        ("lung_upper_lobe_right", "lung R upper-lobe"),
        ("gallbladder", "Gall Bladder"),
        ("vertebrae_L1", "vertebrae l1"),
        ("postcava", "inferior_vena_cava"),
        ("bladder", "urinary_bladder"),
    ],
)
def test_spellings_of_one_name(a, b):
    assert spelling(a) == spelling(b)
    assert match([a], [b]) == {a: [b]}
    assert match([b], [a]) == {b: [a]}


def test_names_that_differ():
    names = ["kidney_left", "kidney_right", "kidney", "liver", "vertebrae_L1", "vertebrae_L2"]
    names += ["kidney_cyst_left", "rib_left_1", "rib_left_11", "adrenal_gland_left", "bladder"]
    assert len({*map(spelling, names)}) == len(names)
    assert match(["kidneys"], names) == {"kidneys": ["kidney_left", "kidney_right", "kidney"]}
    assert match(["kidney_left", "rib 1 left", "brain"], names) == {
        "kidney_left": ["kidney_left"],
        "rib 1 left": ["rib_left_1"],
    }


def test_all_of_amos_is_known_by_number(tmp_path):
    write_amos(tmp_path, "ct", 1)
    write_amos(tmp_path, "mri", 1)
    names = "spleen;right kidney;left kidney;gallbladder;esophagus;liver;stomach;aorta;postcava;"
    names += "pancreas;right adrenal gland;left adrenal gland;duodenum;bladder;prostate or uterus"
    ct, mri = find_cases(tmp_path, organs=names.split(";"))
    file = tmp_path / "labelsTr/amos_0001.nii.gz"
    assert ct.masks == {name: [(file, (n,))] for n, name in enumerate(names.split(";"), start=1)}
    assert list(mri.masks) == names.split(";")[:13]  # the others are drawn in no MRI
    assert (ct.structures, mri.structures) == (
        tuple(names.split(";")),
        tuple(names.split(";")[:13]),
    )


@pytest.mark.parametrize("layout", WRITERS)
def test_any_structure_is_found_in_any_layout(layout, tmp_path):
    WRITERS[layout](tmp_path, "ct", 1)
    file = tmp_path / "s0000/segmentations/liver.nii.gz"
    if layout == "totalsegmentator":
        for name in ("aorta", "vertebrae_L1"):
            shutil.copy(file, file.with_name(f"{name}.nii.gz"))
    [case] = find_cases(tmp_path, organs=["Aorta", "Kidney_L", "brain"])
    expected = {"totalsegmentator": ["aorta", "kidney_left"], "amos": [(8,), (3,)]}
    expected["nnunet"] = expected["amos"]
    found = [
        path.name.removesuffix(".nii.gz") if layout == "totalsegmentator" else values
        for files in case.masks.values()
        for path, values in files
    ]
    assert (list(case.masks), found) == (["Aorta", "Kidney_L"], expected[layout])
    own = {
        "totalsegmentator": [
            "aorta",
            "gallbladder",
            "kidney_left",
            "kidney_right",
            "liver",
            "pancreas",
            "spleen",
            "vertebrae_L1",
        ],
        "nnunet": [name for name in NNUNET_LABELS if name != "background"],
    }
    assert list(case.structures) == own.get(layout, list(case.structures))


def test_organs_that_share_voxels_are_refused(tmp_path):
    write_totalsegmentator(tmp_path / "ts", "ct", 1)
    message = r"kidneys and kidney_left share voxels .*leave one out of --organs"
    with pytest.raises(DataError, match=message):
        find_cases(tmp_path / "ts", organs=["kidneys", "kidney_left"])
    labels = {"background": 0, "liver": [1, 2], "liver tumor": 2}
    write_nnunet(tmp_path / "nnunet", "ct", 1, labels=labels)
    with pytest.raises(DataError, match=r"liver and liver tumor share voxels \(label 2\)"):
        find_cases(tmp_path / "nnunet", organs=["liver", "liver tumor"])


def test_a_name_that_a_folder_lacks_is_refused_with_what_each_has():
    labelled = {"a": {"aorta"}, "b": set()}
    own = {"a": ("aorta", "kidney_left"), "b": ("Liver", "left kidney")}
    message = r"not every folder labels aorta \(a: aorta, kidney_left; b: Liver, left kidney\); use"
    with pytest.raises(DataError, match=message + " --partial-labels"):
        check_organs(labelled, ["aorta"], False, own)
    message = r"labels brain \(a: .*\); use --organs with names that all of them have"
    with pytest.raises(DataError, match=message):
        check_organs({"a": set(), "b": set()}, ["brain"], False, own)
