"""Files in, volumes, files out: against nibabel, SimpleITK and geometry done by hand."""

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
    set_header,
)
from nibabel.affines import apply_affine

from data import resample_labels
from evaluate import dice
from scans.cases import load_cases, read_case
from scans.files import DataError
from scans.layouts import ORGANS, find_cases
from scans.nifti import corners_apart, read_nifti, to_nifti
from scans.phantom import SIZE, make_phantom

AWKWARD = [((1, 1, 1), (0, 1, 2)), ((-1, -1, 1), (0, 1, 2)), ((1, -1, -1), (2, 0, 1))]
AFFINES = {str(way): awkward_affine((2.0, 4.0, 8.0), *way) for way in AWKWARD}


def volume(shape=(5, 6, 7)):
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


def turned(codes):
    """The affine of an array whose axes run along these directions."""
    affine = np.eye(4)
    affine[:3, :3] = [[2**j * (code == d) for j, code in enumerate(codes, 1)] for d in "RAS"]
    affine[:3, :3] -= [[2**j * (code == d) for j, code in enumerate(codes, 1)] for d in "LPI"]
    return affine


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    "affine", [*AFFINES.values(), *map(turned, ("RAS", "LPS", "ASR", "PIL", "SLA"))]
)
def test_each_voxel_is_where_its_file_puts_it(affine, tmp_path):
    save(tmp_path / "scan.nii.gz", volume(), affine)
    scan = read_nifti(tmp_path / "scan.nii.gz")
    places = np.argsort(scan.voxels.ravel())  # the file's voxels in order, by their values
    found = np.stack(np.unravel_index(places, scan.voxels.shape), axis=-1)
    expected = apply_affine(affine, np.argwhere(volume() >= 0))
    np.testing.assert_allclose(apply_affine(scan.affine, found), expected, atol=1e-4)
    assert nibabel.aff2axcodes(scan.affine) == ("R", "A", "S")
    np.testing.assert_allclose(scan.spacing, np.linalg.norm(scan.affine[:3, :3], axis=0), rtol=1e-6)
    assert sorted(scan.spacing) == pytest.approx([2, 4, 8])
    assert scan.voxels.dtype == np.float32
    assert scan.voxels.flags.c_contiguous


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("endianness", "<>")
@pytest.mark.parametrize("trailing", [(), (1, 1)])
def test_every_kind_of_nifti_is_read_as_by_nibabel(name, kind, endianness, trailing, tmp_path):
    array = np.arange(-30, 30, dtype=np.int16).reshape(3, 4, 5, *trailing)
    header = kind.header_class(endianness=endianness)
    header.set_data_dtype(np.int16)
    image = kind(array, np.diag([-6.0, 6, 9, 1]), header)
    image.header.set_slope_inter(0.5, -10)
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"x" * 1000))
    nibabel.save(image, tmp_path / name)
    scan, theirs = read_nifti(tmp_path / name), nibabel.load(tmp_path / name)
    assert type(theirs) is kind
    assert theirs.header.endianness == endianness
    canonical = nibabel.as_closest_canonical(nibabel.funcs.squeeze_image(theirs))
    np.testing.assert_array_equal(scan.voxels, canonical.get_fdata())
    np.testing.assert_allclose(scan.voxels, array.reshape(3, 4, 5)[::-1] * 0.5 - 10)
    np.testing.assert_allclose(scan.affine, canonical.affine)
    assert scan.warnings == []


@pytest.mark.parametrize(("spoil", "message"), UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.filterwarnings("ignore:.*cast")
def test_a_file_that_cannot_be_used_says_why(spoil, message, tmp_path):
    path = tmp_path / "scan.nii.gz"
    save(path, make_phantom(1, "ct", 0)[0])
    read_nifti(path)
    spoil(path)
    with pytest.raises(DataError) as error:
        read_nifti(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_another_format_is_not_nifti(tmp_path):
    nibabel.save(nibabel.MGHImage(np.ones((4, 4, 4), np.float32), np.eye(4)), tmp_path / "x.mgz")
    with pytest.raises(DataError, match="x.mgz: cannot be read .*not a NIfTI file"):
        read_nifti(tmp_path / "x.mgz")


@pytest.mark.parametrize("keep", [100, 348, 400, 352 + 4 * SIZE**3 - 1])
def test_an_uncompressed_file_is_read_whole_or_not_at_all(keep, tmp_path):
    save(tmp_path / "scan.nii", make_phantom(1, "ct", 0)[0])
    assert (tmp_path / "scan.nii").stat().st_size == 352 + 4 * SIZE**3
    (tmp_path / "short.nii").write_bytes((tmp_path / "scan.nii").read_bytes()[:keep])
    with pytest.raises(DataError, match="cannot be read.*truncated"):
        read_nifti(tmp_path / "short.nii")
    assert read_nifti(tmp_path / "scan.nii").voxels.shape == (SIZE, SIZE, SIZE)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # an address may not be long


@pytest.mark.parametrize(
    "make", [Path.mkdir, os.mkfifo, make_socket, lambda path: path.symlink_to("/dev/zero")]
)
def test_only_files_are_opened(make, tmp_path):
    make(tmp_path / "scan.nii.gz")
    with pytest.raises(DataError, match="gz: is not a file but a folder, a pipe or a device$"):
        read_nifti(tmp_path / "scan.nii.gz")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(DataError, match="link: is missing$"):
        read_nifti(tmp_path / "link")


@pytest.mark.parametrize("codes", [(1, 0), (0, 1)])
@pytest.mark.parametrize("pixdim", [(0, 2, 4, 8), (1, 2, 4, 8), (1, -2, 4, -8)])
def test_a_header_is_read_as_nibabel_mends_it(pixdim, codes, tmp_path, capsys):
    path, [affine, *_] = tmp_path / "scan.nii.gz", AFFINES.values()
    file = nibabel.Nifti1Image(volume(), None)
    file.set_qform(affine, codes[0])
    file.set_sform(affine, codes[1])
    nibabel.save(file, path)
    set_header(pixdim=[*pixdim, 0, 0, 0, 0])(path)
    scan = read_nifti(path)
    assert capsys.readouterr() == ("", "")  # nibabel would say so without naming the file
    expected = nibabel.as_closest_canonical(nibabel.load(path))
    np.testing.assert_allclose(expected.affine, affine, atol=1e-5)
    np.testing.assert_array_equal(scan.voxels, volume())
    np.testing.assert_array_equal(scan.affine, expected.affine)
    assert scan.warnings == []
    (tmp_path / "out.nii.gz").write_bytes(to_nifti(np.ones((5, 6, 7), np.uint8), scan))
    np.testing.assert_allclose(nibabel.load(tmp_path / "out.nii.gz").affine, affine, atol=1e-5)


def test_nibabels_own_warnings_are_not_shown_without_a_name(tmp_path, capsys, recwarn):
    """Of an extension whose size is not a multiple of 16, and of a slope that overflows."""
    save(tmp_path / "scan.nii", volume(), np.diag([2.0, 4.0, 8.0, 1.0]))
    content = bytearray((tmp_path / "scan.nii").read_bytes())
    extension = np.array([1, 30, 6], "<i4").tobytes() + bytes(30 - 8)  # its flag, size and code
    content[348:352] = extension
    content[108:112] = np.float32(352 + 30).tobytes()
    (tmp_path / "scan.nii").write_bytes(content)
    np.testing.assert_array_equal(read_nifti(tmp_path / "scan.nii").voxels, volume())
    set_header(scl_slope=1e38)(tmp_path / "scan.nii")
    with pytest.raises(DataError, match="NaN or infinite"):
        read_nifti(tmp_path / "scan.nii")
    assert capsys.readouterr() == ("", "")
    assert [w.message for w in recwarn if "nibabel/nifti1" not in str(w.filename)] == []


@pytest.mark.parametrize(("size", "named"), [(8.05, False), (8.1, True), (16, True)])
@pytest.mark.parametrize("codes", [(0, 1), (0, 2), (1, 1)])
def test_other_voxel_sizes_in_pixdim_than_in_the_affine_are_mentioned(codes, size, named, tmp_path):
    """SimpleITK reads the first where qform_code is 0, nibabel the second."""
    path, affine = tmp_path / "scan.nii.gz", [*AFFINES.values()][-1]
    file = nibabel.Nifti1Image(volume(), affine)
    file.set_qform(affine, codes[0])
    file.set_sform(affine, codes[1])
    nibabel.save(file, path)
    first, *others = file.header.get_zooms()
    assert sorted([first, *others]) == pytest.approx([2, 4, 8])
    changed = [size if mm == pytest.approx(8) else mm for mm in file.header["pixdim"]]
    set_header(pixdim=changed)(path)
    scan = read_nifti(path)
    assert sorted(scan.spacing) == pytest.approx([2, 4, 8], rel=1e-5)
    pixdim = " × ".join(f"{mm:.4g}" for mm in changed[1:4])
    own = " × ".join(f"{mm:.4g}" for mm in file.header["pixdim"][1:4])
    expected = f"its voxel sizes are {pixdim} mm by pixdim, {own} mm by the affine used"
    assert [w for w in scan.warnings if "pixdim" in w] == [expected] * named


def test_a_header_that_does_not_say_where_left_is_is_mentioned(tmp_path):
    path = tmp_path / "scan.nii.gz"
    file = nibabel.Nifti1Image(volume(), None)
    file.header["pixdim"][1:4] = [2, 4, 8]
    nibabel.save(file, path)
    assert nibabel.aff2axcodes(nibabel.load(path).affine) == ("L", "A", "S")
    scan = read_nifti(path)
    np.testing.assert_array_equal(scan.voxels, volume()[::-1])
    assert scan.warnings == [
        "its header does not say where left and right are (sform and qform have code 0); "
        "its axes are taken for left, anterior, superior"
    ]


@pytest.mark.parametrize(("tilt", "named"), [(0, False), (0.2, False), (1, True), (20, True)])
def test_a_sheared_grid_is_mentioned(tilt, named, tmp_path):
    """Slices one above the other that a gantry has tilted about x."""
    affine = np.diag([2.0, 4.0, 8.0, 1.0])
    affine[1, 2] = 8 * np.tan(np.radians(tilt))
    oblique = awkward_affine((1,) * 3, (1,) * 3, (0, 1, 2))
    save(tmp_path / "scan.nii.gz", volume(), oblique @ affine)
    expected = f"its axes are {90 - tilt:.1f}° apart, not 90° (gantry tilt?)"
    warnings = [w for w in read_nifti(tmp_path / "scan.nii.gz").warnings if "apart" in w]
    assert warnings == [f"{expected}; its distances are not exact"] * named


@pytest.mark.parametrize(
    "spoil", [make_forms_disagree, set_header(qform_code=1, quatern_b=2, quatern_c=2)]
)
def test_the_sform_counts_where_the_qform_differs_or_is_no_rotation(spoil, tmp_path):
    path = tmp_path / "scan.nii.gz"
    save(path, volume(), np.diag([2.0, 4.0, 8.0, 1.0]))
    spoil(path)
    np.testing.assert_array_equal(nibabel.load(path).affine, np.diag([2.0, 4.0, 8.0, 1.0]))
    scan = read_nifti(path)
    np.testing.assert_allclose(scan.affine, np.diag([2.0, 4.0, 8.0, 1.0]))
    assert scan.warnings == ["its sform and qform put it at different places; the sform is used"]


def test_corners_are_apart_beyond_half_of_the_smallest_voxel_size():
    affine = np.diag([1.0, 2.0, 4.0, 1.0])
    for distance, apart in ((0.45, False), (0.55, True)):
        for axis in range(3):
            moved = affine.copy()
            moved[axis, 3] -= distance
            assert corners_apart(affine, moved, (10, 10, 10)) is apart
            stretched = affine.copy()
            stretched[axis, axis] += distance / 9  # the far corner is nine steps away
            assert corners_apart(affine, stretched, (10, 10, 10)) is apart


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
    scan, _, errors, warnings = read_case(case, ORGANS)
    assert (errors, warnings) == ([], [])
    [prepared] = load_cases([case], ORGANS, 4.0, tmp_path / "cache")[0].values()
    one_hot = (torch.from_numpy(prepared.read_volume().labels == n).float() for n in range(6))
    restored = resample_labels(one_hot, scan.voxels.shape)
    (tmp_path / "out.nii.gz").write_bytes(to_nifti(restored, scan))
    written = nibabel.load(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(written.affine, affine, atol=1e-4)
    voxels = np.asarray(written.dataobj)
    assert voxels.shape == labels.shape
    assert dice(voxels == 1, labels == 1) >= 0.97
    for n in range(1, 6):
        centres = [apply_affine(affine, np.argwhere(v == n)).mean(0) for v in (voxels, labels)]
        np.testing.assert_allclose(*centres, atol=2.0)  # mm


@pytest.mark.parametrize("codes", [(1, 1), (2, 0), (0, 1), (4, 3)])
@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_a_label_map_is_where_its_scan_is_for_simpleitk_too(kind, affine, codes, tmp_path):
    """By a reader that is not nibabel, each voxel; the scan's header may name the patient."""
    q_code, s_code = codes
    array = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)
    file = kind(array, affine)
    file.set_qform(affine, q_code)
    file.set_sform(affine, s_code)
    file.header.set_slope_inter(2.0, -100.0)
    file.header.set_xyzt_units("mm", "sec")
    for field in ("descrip", "aux_file", "intent_name"):
        file.header[field] = b"Jane Doe"
    file.header["cal_max"], file.header["toffset"] = 77, 1985
    file.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"PatientName=Jane"))
    nibabel.save(file, tmp_path / "scan.nii.gz")
    scan = read_nifti(tmp_path / "scan.nii.gz")
    labels = ((scan.voxels + 100) / 2).astype(np.uint8)
    content = to_nifti(labels, scan)
    assert content == to_nifti(labels, scan)
    (tmp_path / "map.nii.gz").write_bytes(content)
    written = nibabel.load(tmp_path / "map.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), array)
    np.testing.assert_allclose(written.affine, file.affine, atol=1e-5)
    assert (written.get_data_dtype(), written.dataobj.slope) == (np.uint8, 1)
    if kind is nibabel.Nifti1Image:  # SimpleITK reads no other
        ours, theirs = (SimpleITK.ReadImage(tmp_path / f"{n}.nii.gz") for n in ("map", "scan"))
        for what in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(ours, what)() == getattr(theirs, what)(), what
        values = SimpleITK.GetArrayFromImage(theirs)
        np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(ours), (values + 100) / 2)
    for key in ("qform_code", "sform_code", "xyzt_units"):
        assert written.header[key] == file.header[key], key
    assert b"Jane" in gzip.decompress((tmp_path / "scan.nii.gz").read_bytes())
    assert b"Jane" not in gzip.decompress(content)
    assert (written.header["cal_max"], written.header["toffset"]) == (0, 0)


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
    save(path, voxels, np.diag([-6.0, 9.0, 4.5, 1.0]))
    content, accepted = path.read_bytes(), 0
    for _ in range(200):
        path.write_bytes(mutate(rng, content))
        try:
            scan = read_nifti(path)
        except DataError as error:
            assert str(error)
            continue
        accepted += 1
        expected = nibabel.as_closest_canonical(nibabel.funcs.squeeze_image(nibabel.load(path)))
        np.testing.assert_array_equal(scan.voxels, expected.get_fdata(dtype=np.float32))
        np.testing.assert_array_equal(scan.affine, expected.affine)
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
        except DataError:
            continue
        np.testing.assert_array_equal(scan.voxels, labels)
    for missing in range(1, 9):  # of the trailer: CRC and length
        path.write_bytes(content[:-missing])
        with pytest.raises(DataError, match="cannot be read"):
            read_nifti(path)


def test_voxels_that_would_begin_inside_the_header_are_refused(tmp_path):
    """nibabel reads such a file from byte 0, so that the header becomes voxels."""
    path = tmp_path / "scan.nii"
    nibabel.save(nibabel.Nifti1Image(np.ones((8, 8, 8), np.float32), np.diag([9, 9, 9, 1])), path)
    content = bytearray(path.read_bytes())
    content[108:112] = np.float32(0).tobytes()  # vox_offset
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"scan.nii: cannot be read \(its voxels would begin inside"
    ):
        read_nifti(path)
