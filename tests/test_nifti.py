"""Files in, volumes on a grid, files out: against nibabel, SciPy and geometry done by hand."""

import gzip

import nibabel
import numpy as np
import pytest
import torch
from conftest import UNREADABLE, awkward_affine, make_forms_disagree, save
from nibabel.affines import apply_affine
from nibabel.filebasedimages import ImageFileError
from scipy import ndimage

import nifti
from cases import read_case
from data import load_case
from datasets import ORGANS, TOTALSEGMENTATOR_MASKS, find_cases
from evaluate import dice
from nifti import read_nifti, resample_image, resample_labels, write_nifti
from phantom import SIZE, phantom

AWKWARD = [((1, 1, 1), (0, 1, 2)), ((-1, -1, 1), (0, 1, 2)), ((1, -1, -1), (2, 0, 1))]


def noise(shape):
    rng = np.random.default_rng(0)
    return ndimage.gaussian_filter(rng.normal(size=shape), 1.5).astype(np.float32)


def one_hot(labels, classes):
    return (torch.from_numpy(labels == label).float() for label in range(classes))


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("codes", ["RAS", "LPS", "ASR", "PIL", "SLA"])
def test_any_orientation_is_read_as_canonical(codes, tmp_path):
    image, affine = noise((4, 5, 6)), np.diag([1.5, 2.0, 3.0, 1.0])
    affine[:3, 3] = [-7, 11, 13]
    canonical = nibabel.Nifti1Image(image, affine)
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(codes)
    )
    nibabel.save(canonical.as_reoriented(turn), tmp_path / "scan.nii.gz")
    assert "".join(nibabel.aff2axcodes(nibabel.load(tmp_path / "scan.nii.gz").affine)) == codes
    scan = read_nifti(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(scan.voxels, image)
    np.testing.assert_allclose(scan.affine, affine)
    assert scan.spacing == pytest.approx((1.5, 2.0, 3.0))
    assert scan.voxels.dtype == np.float32
    assert scan.voxels.flags.c_contiguous


@pytest.mark.parametrize(("flips", "order"), AWKWARD)
def test_each_voxel_is_where_its_file_puts_it(flips, order, tmp_path):
    affine = awkward_affine((1.0, 2.0, 4.0), flips, order)
    image = np.arange(5 * 6 * 7, dtype=np.float32).reshape(5, 6, 7)
    save(tmp_path / "scan.nii.gz", image, affine)
    scan = read_nifti(str(tmp_path / "scan.nii.gz"))
    places = {
        value: apply_affine(affine, np.argwhere(image == value)[0]) for value in (0, 17, 100, 209)
    }
    for value, place in places.items():
        [voxel] = np.argwhere(scan.voxels == value)
        np.testing.assert_allclose(apply_affine(scan.affine, voxel), place, atol=1e-4)
    assert nibabel.aff2axcodes(scan.affine) == ("R", "A", "S")
    np.testing.assert_allclose(scan.spacing, np.linalg.norm(scan.affine[:3, :3], axis=0), rtol=1e-6)
    assert sorted(scan.spacing) == pytest.approx([1, 2, 4])


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("endianness", "<>")
def test_every_kind_of_nifti_is_read_as_by_nibabel(name, kind, endianness, tmp_path):
    array = np.arange(-30, 30, dtype=np.int16).reshape(3, 4, 5)
    header = kind.header_class(endianness=endianness)
    header.set_data_dtype(np.int16)
    image = kind(array, np.diag([-2.0, 2, 3, 1]), header)
    image.header.set_slope_inter(0.5, -10)
    nibabel.save(image, tmp_path / name)
    scan = read_nifti(tmp_path / name)
    canonical = nibabel.as_closest_canonical(nibabel.load(tmp_path / name))
    assert type(nibabel.load(tmp_path / name)) is kind
    assert nibabel.load(tmp_path / name).header.endianness == endianness
    np.testing.assert_array_equal(scan.voxels, canonical.get_fdata())
    np.testing.assert_allclose(scan.voxels, array[::-1] * 0.5 - 10)
    np.testing.assert_allclose(scan.affine, canonical.affine)
    assert scan.problems == []


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_a_header_is_read_without_its_voxels(kind, name, tmp_path):
    affine = awkward_affine((1.0, 2.0, 4.0), (1, -1, 1), (1, 2, 0))
    file = kind(np.arange(5 * 6 * 70, dtype=np.int16).reshape(5, 6, 70), affine)
    file.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"x" * 1000))
    nibabel.save(file, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-500])  # within the voxels
    header = nifti.read_header(tmp_path / name)
    assert header.get_data_shape() == (5, 6, 70)
    assert header.get_data_dtype() == np.int16
    unpacked = len(file.to_bytes())
    assert header.get_data_offset() + 2 * 5 * 6 * 70 == unpacked
    np.testing.assert_allclose(header.get_best_affine(), affine, atol=1e-5)


OF_VOXELS = ("truncated", "checksum", "NaN", "infinite")


@pytest.mark.parametrize("way", [way for way in UNREADABLE if way not in OF_VOXELS])
def test_a_header_of_no_scan_is_refused(way, tmp_path):
    spoil, message = UNREADABLE[way]
    save(tmp_path / "scan.nii.gz", phantom(1, "ct", 0)[0])
    spoil(tmp_path / "scan.nii.gz")
    with pytest.raises(ImageFileError) as error:
        nifti.read_header(tmp_path / "scan.nii.gz")
    assert message in str(error.value) or way == "missing"


@pytest.mark.parametrize(("spoil", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_that_cannot_be_used_says_why(spoil, message, tmp_path):
    path = tmp_path / "scan.nii.gz"
    save(path, phantom(1, "ct", 0)[0])
    read_nifti(path)
    spoil(path)
    with pytest.raises(ImageFileError) as error:
        read_nifti(path)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("keep", [100, 348, 400, 352 + 4 * SIZE**3 - 1])
def test_an_uncompressed_file_is_read_whole_or_not_at_all(keep, tmp_path):
    save(tmp_path / "scan.nii", phantom(1, "ct", 0)[0])
    assert (tmp_path / "scan.nii").stat().st_size == 352 + 4 * SIZE**3
    (tmp_path / "short.nii").write_bytes((tmp_path / "scan.nii").read_bytes()[:keep])
    with pytest.raises(ImageFileError, match="cannot be read.*truncated"):
        read_nifti(tmp_path / "short.nii")
    assert read_nifti(tmp_path / "scan.nii").voxels.shape == (SIZE, SIZE, SIZE)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ImageFileError, match="missing"):
        read_nifti(tmp_path)


def test_trailing_axes_of_length_1_are_dropped_and_mentioned(tmp_path):
    image = phantom(1, "ct", 0)[0]
    save(tmp_path / "scan.nii.gz", image[..., None, None])
    scan = read_nifti(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(scan.voxels, image)
    [problem] = scan.problems
    assert str(problem) == (
        f"{tmp_path / 'scan.nii.gz'}: has shape (32, 32, 32, 1, 1); axes of length 1 are dropped"
    )
    assert problem.usable


def test_the_sform_counts_where_the_qform_differs(tmp_path):
    path = tmp_path / "scan.nii.gz"
    save(path, phantom(1, "ct", 0)[0])
    affine = nibabel.load(path).affine
    make_forms_disagree(path)
    assert abs(nibabel.load(path).get_qform() - affine).max() == 100
    scan = read_nifti(path)
    np.testing.assert_allclose(scan.affine, affine)
    [problem] = scan.problems
    assert "sform and qform put the volume at different places; the sform is used" in str(problem)
    assert problem.usable


def test_corners_are_apart_beyond_half_of_the_smallest_voxel_size():
    affine = np.diag([1.0, 2.0, 4.0, 1.0])
    for distance, apart in ((0.45, False), (0.55, True)):
        for axis in range(3):
            moved = affine.copy()
            moved[axis, 3] -= distance
            assert nifti.corners_apart(affine, moved, (10, 10, 10)) is apart
            stretched = affine.copy()
            stretched[axis, axis] += distance / 9  # the far corner is nine steps away
            assert nifti.corners_apart(affine, stretched, (10, 10, 10)) is apart


# ------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("spacing", [(9.0, 9.0, 9.0), (7.0, 9.0, 12.0)])
@pytest.mark.parametrize(("flips", "order"), AWKWARD)
def test_a_label_sent_to_the_models_grid_and_back_is_in_its_place(spacing, flips, order, tmp_path):
    """The label itself as the prediction, through files with awkward affines; by voxel and mm."""
    image, labels = phantom(4, "ct", 0)
    image, labels = (np.transpose(a, order)[3:, :, 2:] for a in (image, labels))
    affine = awkward_affine(spacing, flips, order)
    save(tmp_path / "s1/ct.nii.gz", image, affine)
    for organ, names in TOTALSEGMENTATOR_MASKS.items():
        for name in names:
            mask = labels == ORGANS.index(organ) + 1
            save(tmp_path / f"s1/segmentations/{name}.nii.gz", mask.astype(np.uint8), affine)
    [case] = find_cases(tmp_path)
    scan, _, problems = read_case(case, ORGANS)
    assert problems == []
    volume = load_case(case, ORGANS, spacing=4.0)
    restored = resample_labels(one_hot(volume.labels, 6), scan.voxels.shape)
    write_nifti(tmp_path / "out.nii.gz", restored, scan)
    written = nibabel.load(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(written.affine, affine, atol=1e-4)
    voxels = np.asarray(written.dataobj)
    assert voxels.shape == labels.shape
    assert dice(voxels == 1, labels == 1) >= 0.97
    for n in range(1, 6):
        centres = [apply_affine(affine, np.argwhere(v == n)).mean(0) for v in (voxels, labels)]
        np.testing.assert_allclose(*centres, atol=2.0)  # mm


@pytest.mark.parametrize("form", ["sform", "qform"])
@pytest.mark.parametrize("trailing", [(), (1,)])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize(("flips", "order"), AWKWARD)
def test_labels_are_written_voxel_by_voxel_onto_the_file_they_are_of(
    flips, order, kind, trailing, form, tmp_path
):
    """Labels that tell of each voxel's value, so that any turn or flip shows; scaled integers."""
    array = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7, *trailing)
    source = kind(array, awkward_affine((1.0, 2.0, 4.0), flips, order))
    source.header.set_slope_inter(2.0, -100.0)
    source.header.set_xyzt_units("mm", "sec")
    source.set_sform(source.affine, int(form == "sform"))
    source.set_qform(source.affine, int(form == "qform"))
    nibabel.save(source, tmp_path / "scan.nii.gz")
    scan = read_nifti(tmp_path / "scan.nii.gz")
    write_nifti(tmp_path / "out.nii.gz", ((scan.voxels + 100) / 2).astype(np.uint8), scan)
    written = nibabel.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), array.reshape(5, 6, 7))
    np.testing.assert_allclose(written.affine, source.affine, atol=1e-4)
    assert written.get_data_dtype() == np.uint8
    assert (written.dataobj.slope, written.dataobj.inter) == (1, 0)
    assert written.header.get_xyzt_units()[0] == "mm"
    assert [path.name for path in tmp_path.glob("tmp-*")] == []


def test_a_full_disk_leaves_the_older_file(tmp_path, monkeypatch):
    save(tmp_path / "scan.nii.gz", phantom(1, "ct", 0)[0])
    scan = read_nifti(tmp_path / "scan.nii.gz")
    labels = phantom(1, "ct", 0)[1]
    write_nifti(tmp_path / "out.nii.gz", labels, scan)

    def full(image, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nifti.nibabel, "save", full)
    with pytest.raises(OSError, match="No space"):
        write_nifti(tmp_path / "out.nii.gz", 0 * labels, scan)
    np.testing.assert_array_equal(read_nifti(tmp_path / "out.nii.gz").voxels, labels)


# --------------------------------------------------------------------------------------- resampling


def interpolate(volume, size):
    """Linear interpolation at the centres of `size` cells that fill the volume, by SciPy."""
    centres = [(np.arange(m) + 0.5) * n / m - 0.5 for n, m in zip(volume.shape, size, strict=True)]
    grid = np.stack(np.meshgrid(*centres, indexing="ij"))
    return ndimage.map_coordinates(volume, grid, order=1, mode="nearest")


@pytest.mark.parametrize(
    ("spacing", "target", "size"),
    [
        ((1.5, 2.5, 6.0), 3.0, (10, 13, 18)),  # 30 / 3, 40 / 3 and 54 / 3 mm
        ((1.5, 2.5, 6.0), 1.0, (30, 40, 54)),
        ((1.5, 2.5, 6.0), 3.5, (9, 11, 15)),  # 8.6, 11.4 and 15.4, rounded
        ((0.1, 0.1, 0.1), 9.0, (1, 1, 1)),
    ],
)
def test_images_are_resampled_as_by_scipy(spacing, target, size):
    image = noise((20, 16, 9))
    resampled = resample_image(image, spacing, target)
    assert resampled.shape == size
    assert resampled.dtype == np.float32
    np.testing.assert_allclose(resampled, interpolate(image, size), atol=1e-5)


def test_an_image_on_the_grid_stays_as_it_is():
    image = noise((20, 16, 9))
    np.testing.assert_array_equal(resample_image(image, (3.0, 3.0, 3.0), 3.0), image)


@pytest.mark.parametrize("size", [(10, 13, 18), (40, 31, 9), (20, 16, 9)])
def test_the_best_class_wins_at_each_voxel_as_by_scipy(size):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(4, 20, 16, 9)).astype(np.float32)
    interpolated = np.stack([interpolate(score, size) for score in logits])
    labels = resample_labels(torch.from_numpy(logits), size)
    assert labels.dtype == np.uint8
    first, second = np.sort(interpolated, axis=0)[[-1, -2]]
    clear = first - second > 1e-4
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(labels[clear], interpolated.argmax(0)[clear])


def test_labels_survive_the_way_to_another_grid_and_back():
    labels = phantom(3, "ct", 0)[1].repeat(3, 0).repeat(3, 1).repeat(2, 2)
    coarse = resample_labels(one_hot(labels, 6), (64, 70, 50))
    back = resample_labels(one_hot(coarse, 6), labels.shape)
    liver = 2 * ((back == 1) & (labels == 1)).sum() / ((back == 1).sum() + (labels == 1).sum())
    assert liver > 0.97
    for label in range(1, 6):
        centre, restored = (np.argwhere(x == label).mean(0) for x in (labels, back))
        np.testing.assert_allclose(restored, centre, atol=1.0)


# ------------------------------------------------------------------------------------------- fuzz


def mutate(rng, content):
    """A gzip stream with a damaged byte, without its end, or of a file with a damaged header."""
    kind, blob = rng.integers(4), bytearray(content)
    if kind == 0:
        blob[rng.integers(len(blob))] ^= 1 << rng.integers(8)
    elif kind == 1:
        del blob[rng.integers(len(blob)) :]
    else:
        raw = bytearray(gzip.decompress(content))
        for _ in range(rng.integers(1, 4)):
            raw[rng.integers(352)] = rng.integers(256)
        if kind == 3:  # a field of four bytes, such as a voxel size or an offset
            start = 4 * rng.integers(88)
            raw[start : start + 4] = np.float32(rng.choice([0, -1, np.nan, np.inf, 1e30])).tobytes()
        blob = gzip.compress(bytes(raw))
    return bytes(blob)


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused_or_read_as_nibabel_reads_them(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "x.nii.gz"
    voxels = rng.normal(size=(7, 6, 5)).astype(np.float32)
    save(path, voxels, np.diag([-2.0, 3.0, 1.5, 1.0]))
    content, accepted = path.read_bytes(), 0
    for _ in range(200):
        path.write_bytes(mutate(rng, content))
        try:
            scan = read_nifti(path)
        except ImageFileError as error:
            assert str(error)
            continue
        accepted += 1
        expected = nibabel.as_closest_canonical(nibabel.funcs.squeeze_image(nibabel.load(path)))
        np.testing.assert_array_equal(scan.voxels, expected.get_fdata(dtype=np.float32))
    assert 20 < accepted < 180


def test_every_flipped_bit_of_a_compressed_file_is_noticed(tmp_path):
    path = tmp_path / "x.nii.gz"
    labels = np.zeros((16, 16, 16), np.uint8)
    labels[4:8, 4:8] = 3
    save(path, labels)
    content = path.read_bytes()
    after_header = 10 + content[10:].index(b"\x00") + 1 if content[3] & 8 else 10
    for byte in range(after_header, len(content)):
        blob = bytearray(content)
        blob[byte] ^= 1 << (byte % 8)
        path.write_bytes(bytes(blob))
        try:
            scan = read_nifti(path)
        except ImageFileError:
            continue
        np.testing.assert_array_equal(scan.voxels, labels)
    for missing in range(1, 9):  # of the trailer: CRC and length
        path.write_bytes(content[:-missing])
        with pytest.raises(ImageFileError, match="cannot be read"):
            read_nifti(path)


def rgb(path):
    array = np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)


def complex_(path):
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 4, 4), np.complex64), np.eye(4)), path)


def with_header(**fields):
    def write(path):
        image = nibabel.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4))
        blob = bytearray(image.to_bytes())
        for offset, value in fields.values():
            raw = np.asarray(value).tobytes()
            blob[offset : offset + len(raw)] = raw
        path.write_bytes(gzip.compress(bytes(blob)))

    return write


DIM, PIXDIM, VOX_OFFSET, SROW, CODES, QUATERN = 40, 76, 108, 280, 252, 256


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (rgb, "expected one real number a voxel"),
        (complex_, "expected one real number a voxel"),
        (with_header(dim=(DIM + 2, np.int16([0, 4, 4]))), "expected one 3D volume"),
        (with_header(dim=(DIM + 2, np.int16([-4, 4, 4]))), "expected one 3D volume"),
        (with_header(dim=(DIM + 2, np.int16([32767] * 3))), "truncated, .* too few for shape"),
        (with_header(offset=(VOX_OFFSET, np.float32(np.nan))), "cannot be read"),
        (with_header(pixdim=(PIXDIM + 4, np.float32([np.inf, 1, 1]))), "is not positive"),
        (with_header(pixdim=(PIXDIM + 4, np.float32([1, -1, 1]))), "is not positive"),
        (with_header(srow=(SROW, np.zeros(12, np.float32))), "its affine is singular"),
        (with_header(srow=(SROW, np.full(12, np.nan, np.float32))), "its affine is singular"),
        (
            with_header(codes=(CODES, np.int16([1, 0])), q=(QUATERN, np.float32([2, 2, 2]))),
            "cannot be read",
        ),
        (with_header(srow=(SROW, np.float32(4000 * np.eye(3, 4)))), "is 16000 mm long"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_whatever_is_wrong_with_a_file_is_that_files_problem(write, message, tmp_path):
    write(tmp_path / "x.nii.gz")
    with pytest.raises(ImageFileError, match=message):
        read_nifti(tmp_path / "x.nii.gz")


def test_other_formats_are_no_nifti(tmp_path):
    nibabel.save(nibabel.MGHImage(np.ones((4, 4, 4), np.float32), np.eye(4)), tmp_path / "x.mgz")
    with pytest.raises(ImageFileError, match="no NIfTI file"):
        read_nifti(tmp_path / "x.mgz")
