"""Structures by any name, and which of them folders label."""

import shutil

import pytest
from conftest import NNUNET_LABELS, write_amos, write_nnunet, write_totalsegmentator
from test_layouts import WRITERS

from scans.files import DataError
from scans.layouts import find_cases
from scans.organs import AMOS, ORGANS, check_organs, match, spelling

FEW, FULL = ["Spleen", "LIVER"], [name for name in NNUNET_LABELS if name != "background"]


@pytest.mark.parametrize(
    ("structures", "organs", "partial", "message"),
    [
        ({"few": FEW, "full": FULL}, ["spleen", "liver"], False, ""),
        ({"few": FEW, "full": FULL}, ORGANS, True, ""),
        ({"few": FEW, "full": FULL}, ORGANS, False, "few: Spleen, LIVER; full: .*; use --organs "),
        ({"few": FEW, "full": FULL}, ORGANS, False, "--organs liver spleen or --partial-labels, "),
        ({"few": FEW}, ORGANS, True, "no folder labels kidneys .*use --organs liver spleen$"),
        ({"few": ["liver"], "other": []}, ["liver"], False, "other: none.; use --partial-labels"),
        ({"a": ["liver"], "b": ["spleen"]}, ORGANS, False, "use folders that share an organ$"),
        ({"a": ["aorta"], "b": ["Liver"]}, ["lung"], False, r"labels lung \(a: aorta; b: Liver\)"),
        ({"a": ["liver"], "b": ["Aorta"]}, ["liver"], True, r"^b: labels none of liver .*; leave"),
    ],
)
def test_organs_that_a_folder_does_not_label(structures, organs, partial, message):
    if not message:
        check_organs(structures, organs, partial)
        return
    with pytest.raises(DataError, match=message):
        check_organs(structures, organs, partial)


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
    names = tuple(names.split(";"))
    ct, mri = find_cases(tmp_path, organs=names)
    file = tmp_path / "labelsTr/amos_0001.nii.gz"
    assert ct.masks == {name: [(file, (n,))] for n, name in enumerate(names, start=1)}
    assert tuple(mri.masks) == names[:13]  # the others are drawn in no MRI
    assert (ct.structures, mri.structures) == (names, names[:13])


@pytest.mark.parametrize(
    ("layout", "found", "structures"),
    [
        (
            "totalsegmentator",
            ["aorta.nii.gz", "kidney_left.nii.gz"],
            sorted({*ORGANS, "aorta", "vertebrae_L1", "kidney_left", "kidney_right"} - {"kidneys"}),
        ),
        ("nnunet", [(8,), (3,)], [name for name in NNUNET_LABELS if name != "background"]),
        ("amos", [(8,), (3,)], list(AMOS.values())),
    ],
)
def test_any_structure_is_found_in_any_layout(layout, found, structures, tmp_path):
    WRITERS[layout](tmp_path, "ct", 1)
    file = tmp_path / "s0000/segmentations/liver.nii.gz"
    if layout == "totalsegmentator":
        for name in ("aorta", "vertebrae_L1"):
            shutil.copy(file, file.with_name(f"{name}.nii.gz"))
    [case] = find_cases(tmp_path, organs=["Aorta", "Kidney_L", "brain"])
    assert list(case.masks) == ["Aorta", "Kidney_L"]
    assert [v or path.name for [(path, v)] in case.masks.values()] == found
    assert list(case.structures) == structures


def test_organs_that_share_voxels_are_refused(tmp_path):
    write_totalsegmentator(tmp_path / "ts", "ct", 1)
    message = r"kidneys and kidney_left share voxels .*leave one out of --organs"
    with pytest.raises(DataError, match=message):
        find_cases(tmp_path / "ts", organs=["kidneys", "kidney_left"])
    labels = {"background": 0, "liver": [1, 2], "liver tumor": 2}
    write_nnunet(tmp_path / "nnunet", "ct", 1, labels=labels)
    with pytest.raises(DataError, match=r"liver and liver tumor share voxels \(label 2\)"):
        find_cases(tmp_path / "nnunet", organs=["liver", "liver tumor"])


def test_one_kidney_is_not_the_kidneys(tmp_path):
    """Where no case has the other one, its voxels are not known to be background."""
    labels = {"background": 0, "liver": 6, "Kidney_L": 3}
    maps = write_nnunet(tmp_path / "maps", "ct", 2, labels=labels)
    masks = write_totalsegmentator(tmp_path / "masks", "ct", 2, organs=["liver", "kidneys"])
    (masks / "s0001/segmentations/kidney_right.nii.gz").unlink()  # a patient with one kidney
    assert list(find_cases(masks)[1].masks) == ["liver", "kidneys"]
    (masks / "s0000/segmentations/kidney_right.nii.gz").unlink()
    for root in (maps, masks):
        for case in find_cases(root, organs=["liver", "kidneys"]):
            assert list(case.masks) == ["liver"]
            with pytest.raises(
                DataError, match=r"labels kidneys \(left and right\) .*--organs liv"
            ):
                check_organs({"a": case.structures}, ["liver", "kidneys"], False)
        [case, _] = find_cases(root, organs=["left kidney"])
        assert list(case.masks) == ["left kidney"]
