"""Scans and their labels: what was written comes back, what is wrong is named, all is prepared."""

import contextlib
import re
import shutil
import threading
import time

import nibabel
import numpy as np
import pytest
from conftest import (
    SPOILT_CASES,
    awkward_affine,
    edit,
    make_forms_disagree,
    save,
    set_voxel,
    truncate,
    write_amos,
    write_nnunet,
    write_totalsegmentator,
)
from scipy import ndimage

from data import normalize
from scans import cases as cases_module
from scans.cases import Volumes, load_cases, read_case, read_usable
from scans.files import DataError
from scans.layouts import find_cases
from scans.phantom import ORGANS, SPACING, make_phantom

WRITERS = [write_totalsegmentator, write_nnunet, write_amos]


def load(cases, organs, spacing, folder, **settings):
    """The prepared cases, in order."""
    return [*load_cases(cases, organs, spacing, folder / "cache", **settings)[0].values()]


# ----------------------------------------------------------------------------------- what is there


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("modality", ["ct", "mri"])
def test_a_written_phantom_comes_back_and_is_prepared(write, modality, tmp_path):
    cases = find_cases(write(tmp_path / "set", modality, 2), modality)
    assert [case.modality for case in cases] == [modality] * 2
    prepared = load(cases, ORGANS, SPACING, tmp_path)
    for index, case in enumerate(cases):
        image, target = make_phantom(1, modality, index)
        scan, labels, errors, warnings = read_case(case, ORGANS)
        assert (errors, warnings) == ([], [])
        np.testing.assert_array_equal(scan.voxels, image)
        np.testing.assert_array_equal(labels, target)
        assert labels.dtype == np.uint8
        assert scan.spacing == pytest.approx((SPACING,) * 3)
        volume = Volumes(prepared)[index]
        assert (volume.id, volume.modality) == (case.id, modality)
        np.testing.assert_array_equal(volume.labels, target)
        np.testing.assert_allclose(volume.image, normalize(image, modality), atol=1e-4)
        np.testing.assert_array_equal(prepared[index].counts, np.bincount(target.ravel()))
        assert prepared[index].labelled.all()


@pytest.mark.parametrize("write", WRITERS)
def test_labels_follow_their_scan_through_awkward_affines(write, tmp_path):
    write(tmp_path / "set", "mri", 1)
    order, flips = (1, 2, 0), (-1, 1, -1)
    affine = awkward_affine((SPACING,) * 3, flips, order)
    for path in tmp_path.rglob("*.nii.gz"):
        save(path, np.transpose(np.asarray(nibabel.load(path).dataobj), order), affine)
    cases = find_cases(tmp_path / "set")
    scan, labels = read_usable(cases[0], ORGANS)
    # Canonical again, except for the flips: column j of the affine runs along ±x of axis order[j].
    image, target = (np.flip(array, (0, 2)) for array in make_phantom(1, "mri", 0))
    np.testing.assert_array_equal(scan.voxels, image)
    np.testing.assert_array_equal(labels, target)
    [prepared] = load(cases, ORGANS, SPACING, tmp_path)
    np.testing.assert_array_equal(prepared.read_volume().labels, target)


def test_organs_are_numbered_as_asked_for_and_those_that_nobody_labelled_are_known(tmp_path):
    labels = {"background": 0, "liver": 6, "spleen": 1, "rest": [2, 3, 4, 8, 10]}
    [case] = find_cases(write_nnunet(tmp_path / "mri", "mri", 1, labels=labels))
    target = make_phantom(1, "mri", 0)[1]
    organs = ["spleen", "pancreas", "liver"]
    expected = np.select([target == 1, target == 3], [3, 1])  # the pancreas is not labelled there
    np.testing.assert_array_equal(read_case(case, organs)[1], expected)
    [prepared] = load([case], organs, SPACING, tmp_path)
    np.testing.assert_array_equal(prepared.read_volume().labels, expected)
    np.testing.assert_array_equal(prepared.read_volume().labelled, [True, True, False, True])
    np.testing.assert_array_equal(prepared.labelled, [True, True, False, True])


@pytest.mark.parametrize("factor", [0.9, 1.0000000591])
def test_float_masks_and_a_trailing_axis_are_read(factor, tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "ct", 1))
    for path in case.label_files(ORGANS):
        edit(path, lambda labels: (labels * factor)[..., None])
    _, labels, errors, warnings = read_case(case, ORGANS)
    np.testing.assert_array_equal(labels, make_phantom(1, "ct", 0)[1])
    assert (errors, warnings) == ([], [])


# ----------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(("file", "spoil", "message"), SPOILT_CASES)
def test_what_keeps_a_case_from_being_used_is_named(file, spoil, message, tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "ct", 1))
    path = tmp_path / "s0000" / f"{file}.nii.gz"
    spoil(path)
    errors = read_case(case, ORGANS)[2]
    assert message in errors[0]
    assert path.name in errors[0]
    with pytest.raises(DataError) as error:
        read_usable(case, ORGANS)
    assert str(error.value) == "\n".join(errors)
    assert str(tmp_path / "s0000") in str(error.value)


def test_all_that_is_wrong_with_a_case_is_listed(tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "ct", 1))
    masks = tmp_path / "s0000/segmentations"
    edit(case.image, lambda image: image + 1024)
    make_forms_disagree(case.image)
    truncate(masks / "liver.nii.gz")
    (masks / "kidney_left.nii.gz").unlink()
    set_voxel(7)(masks / "spleen.nii.gz")
    _, _, errors, warnings = read_case(case, ORGANS)
    files = [case.image, masks / "liver.nii.gz", masks / "kidney_left.nii.gz"]
    assert [error.split(": ")[0] for error in errors] == [str(file) for file in files]
    assert [warning[:30] for warning in warnings] == [
        "its sform and qform put it at different places"[:30],
        "its mask spleen.nii.gz: has labels"[:30],
    ]
    case.image.unlink()
    assert [error.split(": ")[0] for error in read_case(case, ORGANS)[2]] == [*map(str, files)]


def odd_values(labels):
    labels[-1, -1, :7] = range(100, 107)
    return labels


def test_labels_that_the_data_set_does_not_list_are_mentioned(tmp_path):
    [case] = find_cases(write_amos(tmp_path / "amos", "ct", 1))
    edit(tmp_path / "amos/labelsTr/amos_0001.nii.gz", odd_values)
    _, labels, errors, [warning] = read_case(case, ORGANS)
    assert (errors, warning) == (
        [],
        "its label map: has labels that the data set does not list: 100, 101, 102, 103, 104 and 2 "
        "more; they count as background",
    )
    np.testing.assert_array_equal(labels, make_phantom(1, "ct", 0)[1])
    [case] = find_cases(write_totalsegmentator(tmp_path / "ct", "ct", 1))
    edit(tmp_path / "ct/s0000/segmentations/liver.nii.gz", lambda mask: mask * 200)
    scan, labels = read_usable(case, ORGANS)
    assert scan.warnings == [
        "its mask liver.nii.gz: has labels that the data set does not list: 200; values above 0.5 "
        "count as organ"
    ]
    np.testing.assert_array_equal(labels, make_phantom(1, "ct", 0)[1])


def test_what_is_wrong_with_scan_and_labels_alike_is_said_once(tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path, "ct", 1))
    for path in tmp_path.rglob("*.nii.gz"):
        make_forms_disagree(path)
    expected = ["its sform and qform put it at different places; the sform is used"]
    assert read_case(case, ORGANS)[2:] == ([], expected)


# ------------------------------------------------------------------------------ on the model's grid


def test_resampling_agrees_with_scipy(tmp_path):
    """Anisotropic voxels onto a cubic grid: the same as map_coordinates at the cells' centres."""
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.normal(size=(20, 16, 9)), 1.5).astype(np.float32)
    write_totalsegmentator(tmp_path / "set", "mri", 1)
    affine = np.diag([1.5, 2.5, 6.0, 1.0])
    for path in tmp_path.rglob("*.nii.gz"):
        save(path, image if path.name == "mri.nii.gz" else (image > 0.1).astype(np.uint8), affine)
    [prepared] = load(find_cases(tmp_path / "set"), ORGANS[:1], 3.0, tmp_path)
    volume = prepared.read_volume()
    assert volume.image.shape == (10, 13, 18)  # 30 / 3, 40 / 3 and 54 / 3 mm
    centres = [
        (np.arange(m) + 0.5) * n / m - 0.5 for n, m in zip(image.shape, (10, 13, 18), strict=True)
    ]
    grid = np.stack(np.meshgrid(*centres, indexing="ij"))
    expected = ndimage.map_coordinates(image, grid, order=1, mode="nearest")
    np.testing.assert_allclose(volume.image, normalize(expected, "mri"), atol=1e-3)
    inside = ndimage.map_coordinates((image > 0.1).astype(float), grid, order=1, mode="nearest")
    clear = abs(inside - 0.5) > 1e-3
    np.testing.assert_array_equal(volume.labels[clear], (inside > 0.5)[clear])
    target, spacing = prepared.read_target()
    np.testing.assert_array_equal(target, image > 0.1)
    assert spacing == pytest.approx((1.5, 2.5, 6.0))


@pytest.mark.parametrize("factor", [1e-12, 1e9])
def test_the_scale_of_an_mri_does_not_matter(factor, tmp_path):
    [case] = find_cases(write_totalsegmentator(tmp_path / "mri", "mri", 1))
    [plain] = load([case], ORGANS, 11.0, tmp_path)
    edit(case.image, lambda image: image * np.float32(factor))
    [scaled] = load([case], ORGANS, 11.0, tmp_path)
    assert scaled.contents != plain.contents
    images = scaled.read_volume().image, plain.read_volume().image
    np.testing.assert_allclose(*images, atol=1e-5)


def test_a_ct_that_the_window_makes_constant_is_refused(tmp_path):
    cases = find_cases(write_totalsegmentator(tmp_path / "ct", "ct", 1))
    for window in ((2000.0, 3000.0), (-4000.0, -3000.0)):
        what = f"the CT window {window[0]:g} … {window[1]:g} HU makes almost every voxel the same"
        with pytest.raises(DataError, match=f"ct.nii.gz: {what}"):
            load(cases, ORGANS, SPACING, tmp_path, ct_window=window)
        with pytest.raises(DataError, match=what):
            read_usable(cases[0], ORGANS, window)
    assert load(cases, ORGANS, SPACING, tmp_path, ct_window=(-1100.0, -900.0))


@pytest.mark.parametrize("window", [(-160.0, 240.0), (-500.0, 900.0)])
def test_a_ct_is_clipped_to_the_window(window, tmp_path):
    cases = find_cases(write_totalsegmentator(tmp_path / "ct", "ct", 1))
    clipped = make_phantom(1, "ct", 0)[0].astype(np.float64).clip(*window)
    expected = (clipped - clipped.mean()) / clipped.std()
    [prepared] = load(cases, ORGANS, SPACING, tmp_path, ct_window=window)
    np.testing.assert_allclose(prepared.read_volume().image, expected, atol=1e-3)


def test_what_a_case_is_scored_on_is_kept_with_it(tmp_path):
    write_nnunet(tmp_path / "mri", "mri", 1)
    affine = awkward_affine((1.5, 2.5, 6.0), (-1, 1, -1), (1, 2, 0))
    for path in tmp_path.rglob("*.nii.gz"):
        save(path, np.asarray(nibabel.load(path).dataobj)[:30, :, 3:], affine)
    [case] = find_cases(tmp_path / "mri")
    scan, labels = read_usable(case, ORGANS)
    [prepared] = load([case], ORGANS, 12.0, tmp_path)
    shutil.rmtree(tmp_path / "mri")
    target, spacing = prepared.read_target()
    np.testing.assert_array_equal(target, labels)
    assert (target.dtype, spacing) == (np.uint8, scan.spacing)
    assert len(set(spacing)) == 3


# --------------------------------------------------------------------------------------- many cases


def test_bad_cases_stop_the_loading_or_are_left_out(tmp_path):
    cases = find_cases(write_nnunet(tmp_path / "mri", "mri", 4))
    truncate(cases[1].image)
    cases[2].image.unlink()
    bad = f"{cases[1].image}: cannot be read"
    with pytest.raises(DataError, match=rf"{bad}(?s:.*)\(--skip-bad leaves such cases out\)"):
        load(cases, ORGANS, 12.0, tmp_path)
    found, left_out = load_cases(cases, ORGANS, 12.0, tmp_path / "cache", skip_bad=True)
    assert list(found) == [cases[0].image, cases[3].image]
    assert left_out[0].startswith(bad)
    assert left_out[1] == f"{cases[2].image}: is missing"


def test_the_first_bad_case_ends_the_reading_before_another_process_may_write(
    tmp_path, monkeypatch
):
    cases = find_cases(write_nnunet(tmp_path / "mri", "mri", 1)) * 1000
    cases = [case._replace(image=tmp_path / f"{i:03d}.nii.gz") for i, case in enumerate(cases)]
    read, running, left = [], [], []

    def read_slowly(case, *_):
        read.append(case.image.name)
        running.append(threading.get_ident())
        time.sleep(0.03 if len(read) > 1 else 0)
        running.remove(threading.get_ident())
        raise DataError(f"{case.image.name} is bad")

    @contextlib.contextmanager
    def only_writer(cache):
        try:
            yield
        finally:
            left.append(len(running))

    monkeypatch.setattr(cases_module, "read_usable", read_slowly)
    monkeypatch.setattr(cases_module, "only_writer", only_writer)
    with pytest.raises(DataError, match="000.nii.gz is bad"):
        load_cases(cases, ORGANS, 12.0, tmp_path)
    assert left == [0]
    assert len(read) < 100
    count = len(read)
    time.sleep(0.05)
    assert len(read) == count


def test_a_case_that_memory_does_not_hold_is_a_bad_one_and_a_bug_is_not(tmp_path, monkeypatch):
    cases = find_cases(write_nnunet(tmp_path / "mri", "mri", 1))
    errors = [MemoryError("too much"), RuntimeError("can't allocate memory: too much")]
    errors.append(RuntimeError("a bug"))

    def read(*_):
        raise errors.pop(0)

    monkeypatch.setattr(cases_module, "read_usable", read)
    for _ in range(2):
        with pytest.raises(DataError, match="0000.nii.gz: too large for this .*too much"):
            load(cases, ORGANS, 12.0, tmp_path)
    with pytest.raises(RuntimeError, match="a bug"):
        load(cases, ORGANS, 12.0, tmp_path, skip_bad=True)


def test_a_full_disk_under_the_cache_names_the_entry_and_its_scan(tmp_path, monkeypatch):
    """NumPy's own message is "14175 requested and 3968 written"."""

    def fail(*_):
        raise OSError("14175 requested and 3968 written")

    monkeypatch.setattr(np, "save", fail)
    [case] = find_cases(write_totalsegmentator(tmp_path / "set", "ct", 1))
    with pytest.raises(OSError, match="14175 requested") as caught:
        load_cases([case], ORGANS, SPACING, tmp_path / "cache")
    [note] = caught.value.__notes__
    assert re.fullmatch(f"writing {tmp_path}/cache/.*, for {case.image}", note)


def test_a_scan_too_large_for_memory_is_named(tmp_path, monkeypatch):
    [case, *_] = find_cases(write_totalsegmentator(tmp_path / "ct", "ct", 1))

    def fail(path):
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr(cases_module, "read_nifti", fail)
    _, _, errors, _ = read_case(case, ORGANS)
    reason = "too large for this machine's memory (Unable to allocate 9 GiB)"
    assert errors[0] == f"{case.image}: {reason}"
