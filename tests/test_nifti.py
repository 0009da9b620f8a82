"""Files in, volumes, files out: against nibabel, SciPy and geometry done by hand."""

import gzip
import math
import os
import socket
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from conftest import (
    TOTALSEGMENTATOR_MASKS,
    UNREADABLE,
    awkward_affine,
    make_forms_disagree,
    save,
    truncate,
    write_totalsegmentator,
)
from nibabel.affines import apply_affine
from nibabel.filebasedimages import ImageFileError
from scipy import ndimage

from data import resample_labels
from evaluate import dice
from scans import nifti
from scans.cases import load_case, read_case
from scans.layouts import ORGANS, find_cases
from scans.nifti import grid_voxels, read_nifti, to_nifti
from scans.phantom import SIZE, SPACING, make_phantom

AWKWARD = [((1, 1, 1), (0, 1, 2)), ((-1, -1, 1), (0, 1, 2)), ((1, -1, -1), (2, 0, 1))]


def noise(shape):
    rng = np.random.default_rng(0)
    return ndimage.gaussian_filter(rng.normal(size=shape), 1.5).astype(np.float32)


def write_nifti(path, labels, scan):
    path.write_bytes(to_nifti(labels, scan))


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
    save(tmp_path / "scan.nii.gz", make_phantom(1, "ct", 0)[0])
    spoil(tmp_path / "scan.nii.gz")
    with pytest.raises(ImageFileError) as error:
        nifti.read_header(tmp_path / "scan.nii.gz")
    assert message in str(error.value) or way == "missing"


@pytest.mark.parametrize("affine", [None, awkward_affine((1.5, 2.5, 6.0), (-1, 1, -1), (1, 2, 0))])
def test_the_header_tells_the_size_of_both_grids(affine, tmp_path):
    write_totalsegmentator(tmp_path, "ct", 1, affine=affine)
    [case] = find_cases(tmp_path)
    for spacing in (2.0, 7.3, SPACING):
        volume = load_case(case, ORGANS, spacing).volume
        assert grid_voxels(case.image, spacing) == (32**3, volume.image.size)
    assert grid_voxels(case.image, math.inf) == (32**3, 1)


def test_a_file_without_a_header_has_no_voxels(tmp_path):
    (tmp_path / "text.nii.gz").write_bytes(b"no NIfTI")
    save(tmp_path / "flat.nii.gz", np.ones((4, 5), np.float32))
    for name in ("missing", "text", "flat"):
        assert grid_voxels(tmp_path / f"{name}.nii.gz", 9.0) == (0, 0)
    save(tmp_path / "scan.nii.gz", make_phantom(1, "ct", 0)[0])
    truncate(tmp_path / "scan.nii.gz")  # behind the header
    assert grid_voxels(tmp_path / "scan.nii.gz", 9.0) == (32**3, 32**3)


@pytest.mark.parametrize(("spoil", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_that_cannot_be_used_says_why(spoil, message, tmp_path):
    path = tmp_path / "scan.nii.gz"
    save(path, make_phantom(1, "ct", 0)[0])
    read_nifti(path)
    spoil(path)
    with pytest.raises(ImageFileError) as error:
        read_nifti(path)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("keep", [100, 348, 400, 352 + 4 * SIZE**3 - 1])
def test_an_uncompressed_file_is_read_whole_or_not_at_all(keep, tmp_path):
    save(tmp_path / "scan.nii", make_phantom(1, "ct", 0)[0])
    assert (tmp_path / "scan.nii").stat().st_size == 352 + 4 * SIZE**3
    (tmp_path / "short.nii").write_bytes((tmp_path / "scan.nii").read_bytes()[:keep])
    with pytest.raises(ImageFileError, match="cannot be read.*truncated"):
        read_nifti(tmp_path / "short.nii")
    assert read_nifti(tmp_path / "scan.nii").voxels.shape == (SIZE, SIZE, SIZE)


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # an address may not be long


@pytest.mark.parametrize("read", [read_nifti, nifti.read_header])
@pytest.mark.parametrize(
    "make", [Path.mkdir, make_pipe, make_socket, lambda path: path.symlink_to("/dev/zero")]
)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_only_files_are_opened(make, read, tmp_path):
    make(tmp_path / "scan.nii.gz")
    with pytest.raises(ImageFileError, match="^is no file but a folder, a pipe or a device$"):
        read(tmp_path / "scan.nii.gz")
    assert grid_voxels(tmp_path / "scan.nii.gz", 9.0) == (0, 0)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ImageFileError, match="^missing$"):
        read(tmp_path / "link")


def save_header(path, array, affine, **fields):
    """With a qform only, and fields of the header as they are given."""
    file = nibabel.Nifti1Image(array, None)
    file.set_qform(affine, 1)
    file.set_sform(None, 0)
    content = bytearray(file.to_bytes())
    header = nibabel.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(content)))


@pytest.mark.parametrize("qfac", [0, 1])
def test_a_header_is_read_as_nibabel_mends_it(qfac, tmp_path):
    path, image = tmp_path / "scan.nii.gz", noise((5, 6, 7))
    affine = awkward_affine((1.0, 2.0, 4.0), (1, 1, 1), (0, 1, 2))
    save_header(path, image, affine, pixdim=[qfac, 1, 2, 4, 0, 0, 0, 0])
    expected = nibabel.as_closest_canonical(nibabel.load(path))
    np.testing.assert_allclose(expected.affine, affine, atol=1e-5)
    scan = read_nifti(path)
    np.testing.assert_array_equal(scan.voxels, image)
    np.testing.assert_array_equal(scan.affine, expected.affine)
    assert scan.problems == []
    assert nifti.read_header(path).get_data_shape() == (5, 6, 7)
    assert grid_voxels(path, 2.0) == (210, 2 * 6 * 14)
    write_nifti(tmp_path / "out.nii.gz", np.ones((5, 6, 7), np.uint8), scan)
    np.testing.assert_allclose(nibabel.load(tmp_path / "out.nii.gz").affine, affine, atol=1e-5)


@pytest.mark.parametrize("form", ["sform", "qform"])
@pytest.mark.parametrize(("unit", "factor"), [("meter", 1000.0), ("micron", 0.001), ("mm", 1.0)])
def test_stated_units_are_converted_and_kept_in_what_is_written(unit, factor, form, tmp_path):
    affine = awkward_affine((1.5, 2.5, 6.0), (-1, 1, -1), (1, 2, 0))
    own = affine.copy()
    own[:3] /= factor
    image = noise((20, 16, 9))
    for name, matrix, stated in (("a", affine, "mm"), ("b", own, unit)):
        file = nibabel.Nifti1Image(image, matrix)
        file.header.set_xyzt_units(stated)
        file.set_sform(matrix, int(form == "sform"))
        file.set_qform(matrix, int(form == "qform"))
        nibabel.save(file, tmp_path / f"{name}.nii.gz")
    expected, scan = (read_nifti(tmp_path / f"{name}.nii.gz") for name in "ab")
    np.testing.assert_array_equal(scan.voxels, expected.voxels)
    np.testing.assert_allclose(scan.affine, expected.affine, rtol=1e-4, atol=1e-4)
    assert scan.spacing == pytest.approx(expected.spacing, rel=1e-5)
    assert sorted(scan.spacing) == pytest.approx([1.5, 2.5, 6.0])
    assert scan.problems == []
    grids = [grid_voxels(tmp_path / f"{name}.nii.gz", 2.0) for name in "ab"]
    assert grids[0] == grids[1]
    write_nifti(tmp_path / "out.nii.gz", (scan.voxels > 0).astype(np.uint8), scan)
    written = nibabel.load(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(written.affine, own, rtol=1e-4, atol=1e-4 / factor)
    assert written.header.get_xyzt_units()[0] == unit
    np.testing.assert_array_equal(np.asarray(written.dataobj), image > 0)
    again = read_nifti(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(again.affine, scan.affine, rtol=1e-4, atol=1e-4)


def test_a_unit_that_cannot_be_is_named(tmp_path):
    file = nibabel.Nifti1Image(noise((20, 16, 9)), np.diag([1.5, 1.5, 3.0, 1.0]))
    file.header.set_xyzt_units("meter")
    nibabel.save(file, tmp_path / "scan.nii.gz")
    message = "is 30000 mm long; expected millimetres, and its header says metres"
    with pytest.raises(ImageFileError, match=message):
        read_nifti(tmp_path / "scan.nii.gz")


def test_a_header_that_does_not_say_where_left_is_is_mentioned(tmp_path):
    path, image = tmp_path / "scan.nii.gz", noise((5, 6, 7))
    file = nibabel.Nifti1Image(image, None)
    file.header["pixdim"][1:4] = [1, 2, 4]
    nibabel.save(file, path)
    assert nibabel.aff2axcodes(nibabel.load(path).affine) == ("L", "A", "S")
    scan = read_nifti(path)
    np.testing.assert_array_equal(scan.voxels, image[::-1])
    [problem] = scan.problems
    assert str(problem) == (
        f"{path}: its header does not say where left and right are (sform and qform have code 0); "
        "its axes are taken for left, anterior, superior"
    )
    assert problem.usable


@pytest.mark.parametrize(("tilt", "named"), [(0, False), (0.2, False), (1, True), (20, True)])
def test_a_sheared_grid_is_mentioned(tilt, named, tmp_path):
    """Slices one above the other that a gantry has tilted about x."""
    affine = np.diag([1.0, 2.0, 4.0, 1.0])
    affine[1, 2] = 4 * np.tan(np.radians(tilt))
    save(
        tmp_path / "scan.nii.gz",
        noise((5, 6, 7)),
        awkward_affine((1,) * 3, (1,) * 3, (0, 1, 2)) @ affine,
    )
    problems = read_nifti(tmp_path / "scan.nii.gz").problems
    assert [p.usable for p in problems] == [True] * named
    for problem in problems:
        what = f"its axes are {90 - tilt:.1f}° apart, not 90° (gantry tilt?)"
        assert problem.what == what
        assert problem.consequence == "distances in it are not exact"


def test_trailing_axes_of_length_1_are_dropped_and_mentioned(tmp_path):
    image = make_phantom(1, "ct", 0)[0]
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
    save(path, make_phantom(1, "ct", 0)[0])
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
    image, labels = make_phantom(4, "ct", 0)
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
    volume = load_case(case, ORGANS, spacing=4.0).volume
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
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["out.nii.gz", "scan.nii.gz"]


def test_of_the_scans_header_only_the_geometry_is_written(tmp_path):
    """The rest may tell who the patient is; and the same labels are the same bytes."""
    file = nibabel.Nifti1Image(
        noise((5, 6, 7)), awkward_affine((1.0, 2.0, 4.0), (1, 1, 1), (0, 1, 2))
    )
    for field in ("descrip", "aux_file", "intent_name", "db_name", "data_type"):
        file.header[field] = b"Jane Doe"
    file.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    file.header["cal_max"], file.header["toffset"] = 77, 1985
    nibabel.save(file, tmp_path / "scan.nii.gz")
    assert b"Jane Doe" in gzip.decompress((tmp_path / "scan.nii.gz").read_bytes())
    scan = read_nifti(tmp_path / "scan.nii.gz")
    labels = np.zeros((5, 6, 7), np.uint8)
    content = to_nifti(labels, scan)
    assert content == to_nifti(labels, scan)
    assert b"Jane" not in gzip.decompress(content)
    (tmp_path / "out.nii.gz").write_bytes(content)
    written = nibabel.load(tmp_path / "out.nii.gz").header
    assert (written["cal_max"], written["toffset"], len(written.extensions)) == (0, 0, 0)
    np.testing.assert_array_equal(written.get_best_affine(), scan.header.get_best_affine())


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


@pytest.mark.parametrize("codes", [(1, 1), (2, 0), (0, 1), (4, 3)])
def test_a_label_map_is_where_its_scan_is_for_simpleitk_too(codes, tmp_path):
    """By a reader that is not nibabel; of the scan's header nothing but geometry is left."""
    q_code, s_code = codes
    affine = awkward_affine((1.5, 2.0, 3.0), (1, -1, 1), (1, 0, 2))
    voxels = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    file = nibabel.Nifti1Image(voxels, affine)
    file.set_qform(affine, q_code)
    file.set_sform(affine, s_code)
    file.header["descrip"], file.header["intent_name"] = b"Jane Doe", b"Jane Doe"
    file.header["cal_min"], file.header["cal_max"] = 3, 7
    file.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"PatientName=Jane"))
    nibabel.save(file, tmp_path / "scan.nii.gz")
    scan = read_nifti(tmp_path / "scan.nii.gz")
    (tmp_path / "map.nii.gz").write_bytes(to_nifti(scan.voxels.astype(np.uint8), scan))
    ours, theirs = (SimpleITK.ReadImage(tmp_path / f"{name}.nii.gz") for name in ("map", "scan"))
    for what in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(ours, what)() == getattr(theirs, what)(), what
    np.testing.assert_array_equal(
        SimpleITK.GetArrayFromImage(ours), SimpleITK.GetArrayFromImage(theirs)
    )
    fields = {key: ours.GetMetaData(key) for key in ours.GetMetaDataKeys()}
    for key in ("qform_code", "sform_code", "xyzt_units"):
        assert fields[key] == theirs.GetMetaData(key), key
    assert (fields["descrip"], fields["intent_name"]) == ("", "")
    assert float(fields["cal_min"]) == float(fields["cal_max"]) == 0
    assert b"Jane" not in gzip.decompress((tmp_path / "map.nii.gz").read_bytes())
