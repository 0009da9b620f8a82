"""Folders in, volumes out: what was written as NIfTI comes back, and bad files are named."""

import json
import shutil

import nibabel
import numpy as np
import pytest
import torch
from conftest import save, truncate, write_amos, write_nnunet, write_totalsegmentator
from scipy import ndimage

from data import (
    ORGANS,
    DataError,
    ahead,
    check_organs,
    find_cases,
    load_case,
    make_volume,
    normalize,
    patches,
    read_case,
    resample_labels,
    split_cases,
)
from phantom import SPACING, phantom


@pytest.mark.parametrize("layout", ["totalsegmentator", "nnunet", "amos"])
@pytest.mark.parametrize("modality", ["ct", "mri"])
def test_a_written_phantom_comes_back(layout, modality, tmp_path):
    write = {"nnunet": write_nnunet, "amos": write_amos, "totalsegmentator": write_totalsegmentator}
    write[layout](tmp_path, modality, 2)
    cases = find_cases(tmp_path, modality)
    assert {case.layout for case in cases} == {layout}
    assert [case.modality for case in cases] == [modality] * 2
    for index, case in enumerate(cases):
        image, labels = phantom(1, modality, index)
        volume = load_case(case, ORGANS, SPACING)
        np.testing.assert_array_equal(volume.labels, labels)
        np.testing.assert_array_equal(read_case(case, ORGANS)[1], labels)
        np.testing.assert_allclose(volume.image, normalize(image, modality), atol=1e-4)
        assert volume.labelled.all()


@pytest.mark.parametrize("codes", ["LPS", "ASR", "PIL", "SLA"])
def test_any_orientation_comes_back_canonical(codes, tmp_path):
    image, labels = phantom(1, "ct", 0)
    write_totalsegmentator(tmp_path, "ct", 1)
    for path in tmp_path.rglob("*.nii.gz"):
        nifti = nibabel.load(path)
        turn = nibabel.orientations.ornt_transform(
            nibabel.orientations.io_orientation(nifti.affine),
            nibabel.orientations.axcodes2ornt(tuple(codes)),
        )
        nibabel.save(nifti.as_reoriented(turn), path)
    volume = load_case(find_cases(tmp_path)[0], ORGANS, SPACING)
    np.testing.assert_array_equal(volume.labels, labels)
    np.testing.assert_allclose(volume.image, normalize(image, "ct"), atol=1e-4)


def test_resampling_agrees_with_scipy(tmp_path):
    """Anisotropic voxels onto a cubic grid: the same as map_coordinates at the cells' centres."""
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.normal(size=(20, 16, 9)), 1.5).astype(np.float32)
    write_totalsegmentator(tmp_path, "mri", 1)
    affine = np.diag([1.5, 2.5, 6.0, 1.0])
    for path in tmp_path.rglob("*.nii.gz"):
        save(path, image if path.name == "mri.nii.gz" else (image > 0.1).astype(np.uint8), affine)
    volume = load_case(find_cases(tmp_path)[0], ORGANS[:1], 3.0)
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
    scan, truth, _ = read_case(find_cases(tmp_path)[0], ORGANS[:1])
    assert truth.shape == image.shape
    assert scan.spacing == pytest.approx((1.5, 2.5, 6.0))


def test_labels_survive_the_way_to_another_grid_and_back():
    labels = phantom(3, "ct", 0)[1]
    labels = labels.repeat(3, 0).repeat(3, 1).repeat(2, 2)

    def one_hot(labels):
        return torch.stack([torch.tensor(labels == label).float() for label in range(6)])

    coarse = resample_labels(one_hot(labels), (64, 70, 50))
    back = resample_labels(one_hot(coarse), labels.shape)
    liver = 2 * ((back == 1) & (labels == 1)).sum() / ((back == 1).sum() + (labels == 1).sum())
    assert liver > 0.97
    for label in range(1, 6):
        centre, there = (np.argwhere(x == label).mean(0) for x in (labels, back))
        np.testing.assert_allclose(there, centre, atol=1.0)


def test_normalization_by_modality():
    image = np.linspace(-1000, 1000, 2001, dtype=np.float32)
    ct = normalize(image, "ct")
    clipped = image.clip(-160, 240)
    np.testing.assert_allclose(ct, (clipped - clipped.mean()) / clipped.std(), rtol=1e-4, atol=1e-5)
    mri = normalize(image, "mri")
    low, high = np.sort(image)[[10, 1990]]  # 0.5 and 99.5 % of 2001 values
    clipped = image.clip(low, high)
    np.testing.assert_allclose(
        mri, (clipped - clipped.mean()) / clipped.std(), rtol=1e-4, atol=1e-5
    )
    assert np.isfinite(normalize(np.ones((3, 3), np.float32), "mri")).all()


def test_float_masks_and_a_trailing_axis_are_read(tmp_path):
    write_totalsegmentator(tmp_path, "ct", 1)
    labels = phantom(1, "ct", 0)[1]
    for path in tmp_path.rglob("*.nii.gz"):
        nifti = nibabel.load(path)
        scale = 1 if path.name == "ct.nii.gz" else 1.0000000591
        save(path, (nifti.get_fdata() * scale)[..., None])
    np.testing.assert_array_equal(
        load_case(find_cases(tmp_path)[0], ORGANS, SPACING).labels, labels
    )


def test_macos_leftovers_are_no_cases(mri_folder, tmp_path):
    shutil.copytree(mri_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "imagesTr" / "._case_000_0000.nii.gz").write_bytes(b"junk")
    assert [case.id for case in find_cases(tmp_path)] == [f"case_00{i}" for i in range(4)]


# ------------------------------------------------------------------------------------------ splits


def ids(cases):
    return sorted(case.id for case in cases)


def test_the_split_of_the_data_set_is_honoured(ct_folder):
    parts = split_cases(find_cases(ct_folder), seed=1, test_elsewhere=False)
    assert ids(parts["train"]) == ["s0000", "s0001"]
    assert ids(parts["val"]) == ["s0002"]
    assert ids(parts["test"]) == ["s0003"]
    assert split_cases(find_cases(ct_folder), 1, test_elsewhere=True)["test"] == []


def test_other_cases_are_split_by_seed_and_id(tmp_path):
    for i in range(40):
        save(tmp_path / f"s{i:04d}" / "mri.nii.gz", np.zeros((2, 2, 2), np.float32))
    cases = find_cases(tmp_path)
    parts = split_cases(cases, seed=1, test_elsewhere=False)
    assert [len(parts[p]) for p in ("train", "val", "test")] == [29, 3, 8]
    assert ids(case for part in parts.values() for case in part) == ids(cases)
    assert split_cases(cases[::-1], 1, False) == parts  # the order of reading does not matter
    assert ids(split_cases(cases, 2, False)["test"]) != ids(parts["test"])
    few = [split_cases(cases[:n], 1, False) for n in (1, 2, 3, 4)]
    assert [[len(p[s]) for s in ("train", "val", "test")] for p in few] == [
        [1, 0, 0],
        [2, 0, 0],
        [2, 0, 1],
        [2, 1, 1],
    ]


def test_validation_is_carved_out_where_only_a_test_split_is_given(tmp_path):
    for i in range(30):
        save(tmp_path / f"s{i:04d}" / "mri.nii.gz", np.zeros((2, 2, 2), np.float32))
    rows = [f"s{i:04d};{'test' if i < 5 else 'train'}" for i in range(30)]
    (tmp_path / "meta.csv").write_text("\n".join(["image_id;split", *rows]), encoding="utf-8-sig")
    parts = split_cases(find_cases(tmp_path), seed=3, test_elsewhere=False)
    assert ids(parts["test"]) == [f"s{i:04d}" for i in range(5)]
    assert [len(parts["train"]), len(parts["val"])] == [23, 2]


# --------------------------------------------------------------------------------------- bad input


def test_bad_folders_are_named(tmp_path, mri_folder):
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        find_cases(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no labelled case found; expected"):
        find_cases(tmp_path)
    with pytest.raises(DataError, match=r"holds MRI scans only; give it with --mri"):
        find_cases(mri_folder, "ct")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"labels": {}}',
        '{"channel_names": {"0": "CT"}, "labels": [1], "file_ending": ".x"}',
    ],
)
def test_a_dataset_json_that_makes_no_sense_is_named(content, tmp_path):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=r"dataset.json: expected"):
        find_cases(tmp_path)


def test_amos_without_labelled_scans_is_not_taken_for_nnunet(tmp_path):
    write_amos(tmp_path, "ct", 1)
    (tmp_path / "imagesTr").rename(tmp_path / "imagesTs")
    with pytest.raises(DataError, match=r"no labelled case found; expected"):
        find_cases(tmp_path)


def test_several_channels_are_refused(tmp_path):
    dataset = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    with pytest.raises(DataError, match="has 2 channels"):
        find_cases(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.unlink(), "missing"),
        (truncate, "cannot be read"),
        (lambda p: p.write_bytes(b"no gzip at all"), "cannot be read"),
        (lambda p: save(p, np.zeros((4, 5, 6), np.float32)), r"\(4, 5, 6\)"),
        (lambda p: save(p, np.zeros((4, 5, 6, 2), np.float32)), "expected one 3D volume"),
        (lambda p: save(p, np.full((32, 32, 32), np.nan, np.float32)), "NaN"),
    ],
)
@pytest.mark.parametrize("name", ["ct", "segmentations/liver"])
def test_bad_files_are_named(spoil, message, name, tmp_path):
    write_totalsegmentator(tmp_path, "ct", 1)
    case = find_cases(tmp_path)[0]
    spoil(tmp_path / "s0000" / f"{name}.nii.gz")
    with pytest.raises(DataError, match=message) as error:
        load_case(case, ORGANS, SPACING)
    assert str(tmp_path / "s0000") in str(error.value)


def test_a_voxel_size_of_zero_is_named(tmp_path):
    write_totalsegmentator(tmp_path, "ct", 1)
    path = tmp_path / "s0000" / "ct.nii.gz"
    nifti = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.float32), None)
    nifti.header["pixdim"][1:4] = [2, 0, 2]
    nifti.to_filename(path)
    with pytest.raises(DataError, match="ct.nii.gz"):
        load_case(find_cases(tmp_path)[0], ORGANS, SPACING)


def test_organs_that_a_folder_does_not_label(tmp_path):
    labels = {"background": 0, "liver": 1, "spleen": 2}
    few = find_cases(write_nnunet(tmp_path / "few", "mri", 1, labels=labels))
    full = find_cases(write_nnunet(tmp_path / "full", "ct", 1))
    few, full = (set(cases[0].masks) for cases in (few, full))
    check_organs({"few": few, "full": full}, ["spleen", "liver"], False)
    check_organs({"few": few, "full": full}, ORGANS, partial=True)
    advice = r"few: liver, spleen; full: .*use --organs liver spleen or --partial-labels"
    with pytest.raises(DataError, match=advice):
        check_organs({"few": few, "full": full}, ORGANS, partial=False)
    with pytest.raises(DataError, match=r"not one folder labels .*use --organs liver spleen"):
        check_organs({"few": few}, ORGANS, partial=True)


# ----------------------------------------------------------------------------------------- patches


def numbered_volume(shape, organ_at=()):
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    labels = np.zeros(shape, np.uint8)
    for label, voxel in enumerate(organ_at, start=1):
        labels[voxel] = label
    return make_volume("x", image, labels, np.array([True, True, False]))


def test_patches_are_windows_of_the_volume():
    volume = numbered_volume((10, 12, 9), [(1, 2, 3), (9, 9, 8)])
    generator = torch.Generator().manual_seed(0)
    for images, labels, labelled in patches([volume], 4, 3, 5, generator):
        assert images.shape == (3, 1, 4, 4, 4)
        assert labels.shape == (3, 4, 4, 4)
        assert labelled.tolist() == [[True, True, False]] * 3
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        for image, label in zip(images[:, 0].numpy(), labels.numpy(), strict=True):
            corner = np.unravel_index(int(image[0, 0, 0]), volume.image.shape)
            window = tuple(slice(c, c + 4) for c in corner)
            np.testing.assert_array_equal(image, volume.image[window])
            np.testing.assert_array_equal(label, volume.labels[window])


def test_half_of_the_patches_is_centred_on_organs_each_as_often():
    volume = numbered_volume((64, 64, 64), [(5, 5, 5), (40, 40, 40)])
    volume.labels[38:42, 38:42, 38:42] = 2  # the second organ is far larger
    volume = make_volume("x", volume.image, volume.labels, volume.labelled)
    seen = np.zeros(2)
    for _, labels, _ in patches([volume], 4, 10, 100, torch.Generator().manual_seed(0)):
        seen += [(labels == label).flatten(1).any(1).sum() for label in (1, 2)]
    np.testing.assert_allclose(seen / 1000, [0.25, 0.25], atol=0.05)


def test_small_volumes_are_padded_and_any_can_be_drawn():
    small, empty = numbered_volume((3, 8, 5), [(1, 1, 1)]), numbered_volume((8, 8, 8))
    small = small._replace(image=small.image + 7)
    generator = torch.Generator().manual_seed(0)
    sums = set()
    for images, labels, _ in patches([small, empty], 8, 1, 20, generator):
        if labels.any():
            assert images.min() == 7
            assert (images != 7).sum() <= small.image.size
        sums.add(float(images.sum()))
    assert len(sums) > 1


def test_patches_depend_on_the_generator_alone():
    volume = numbered_volume((20, 20, 20), [(3, 3, 3)])
    runs = [
        [
            x.sum().item()
            for x, *_ in patches([volume], 8, 2, 6, torch.Generator().manual_seed(seed))
        ]
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_drawing_ahead_changes_nothing_and_passes_errors_on():
    volume = numbered_volume((20, 20, 20), [(3, 3, 3)])

    def drawn(volumes):
        return patches(volumes, 8, 2, 6, torch.Generator().manual_seed(1))

    pairs = zip(drawn([volume]), ahead(drawn([volume]), pin=False), strict=True)
    assert all(
        torch.equal(a, b) for plain, early in pairs for a, b in zip(plain, early, strict=True)
    )
    poisoned = volume._replace(image=np.full_like(volume.image, np.nan))
    with pytest.raises(DataError, match="case x: .* NaN"):
        list(ahead(drawn([poisoned]), pin=False))
