"""NIfTI volumes: read and verified, turned, and written on the grid they came from.

A scan is read in its closest canonical orientation: arrays run right, anterior, superior.
"""

import gzip
import io
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError

from data import resampled_size

GZIP = b"\x1f\x8b"  # how such a file begins
GEOMETRY = (  # fields of a header
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
LONGEST = 4000  # mm along an axis; more is no scan of a person
SHEAR = 0.01  # cosine between two axes; more is no rounding
UNITS = {1: ("metres", 1000.0), 3: ("micrometres", 0.001)}  # by xyzt_units; others are taken for mm
SILENT = logging.Logger("silent", logging.CRITICAL + 1)  # nibabel's words name no file


class Problem(NamedTuple):
    """Something wrong with a file, and what follows for its case."""

    file: Path
    what: str
    consequence: str = "the case cannot be used"
    usable: bool = False

    def __str__(self) -> str:
        return f"{self.file}: {self.what}; {self.consequence}"


class Scan(NamedTuple):
    """A volume in closest canonical orientation, and what leads back to its own."""

    voxels: np.ndarray  # (R, A, S) float32
    spacing: tuple[float, ...]  # mm
    affine: np.ndarray  # of voxels, to mm
    header: nibabel.Nifti1Header  # of the file, as its affine, which may be in other units
    file_affine: np.ndarray
    problems: list[Problem]  # that do not keep it from being used


def read_nifti(path: str | Path) -> Scan:
    """Read a 3D NIfTI file; raises ImageFileError, which says what is wrong, if that cannot be.

    Every byte is read and, in a .gz, checked against its CRC: nibabel stops where the voxels end,
    before it.
    """
    path = Path(path)
    _check_file(path)
    try:
        content = path.read_bytes()
        if content[:2] == GZIP:
            content = gzip.decompress(content)
        kind, header = _parse_header(io.BytesIO(content))
        _verify(header, len(content))
        file = kind.from_bytes(content)
        canonical = nibabel.as_closest_canonical(nibabel.funcs.squeeze_image(file))
        voxels = np.ascontiguousarray(canonical.get_fdata(dtype=np.float32, caching="unchanged"))
    except ImageFileError:
        raise
    except Exception as error:  # zlib, NumPy and nibabel have dozens for a file that is not theirs
        raise ImageFileError(f"cannot be read ({error}): truncated, corrupt or no NIfTI") from error
    if not np.isfinite(voxels).all():
        n = int((~np.isfinite(voxels)).sum())
        raise ImageFileError(f"has {n} voxels that are NaN or infinite")
    affine = _to_mm(canonical.affine, file.header)
    spacing = tuple(voxel_sizes(affine).tolist())
    return Scan(voxels, spacing, affine, file.header, file.affine, _header_problems(path, file))


def grid_voxels(path: Path, spacing: float) -> tuple[int, int]:
    """Voxels of a scan, and of its grid of cubic voxels of `spacing` mm, by the header alone.

    None of either for a file that has no header: what is wrong with it is said when it is read.
    """
    try:
        header = read_header(path)
    except ImageFileError:
        return 0, 0
    shape = header.get_data_shape()[:3]
    affine = _to_mm(header.get_best_affine(), header)
    size = resampled_size(shape, voxel_sizes(affine), spacing)
    return math.prod(shape), math.prod(size)


def read_header(path: Path) -> nibabel.Nifti1Header:
    """What a NIfTI file says of its voxels, without reading them; raises ImageFileError."""
    _check_file(path)
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == GZIP
            file.seek(0)
            header = _parse_header(gzip.GzipFile(fileobj=file) if zipped else file)[1]
        _verify(header, math.inf)
    except ImageFileError:
        raise
    except Exception as error:  # as in read_nifti
        raise ImageFileError(f"cannot be read ({error})") from error
    return header


def _check_file(path: Path) -> None:
    """Raise ImageFileError for what is no file; a pipe would keep its reader waiting for ever."""
    if not path.exists():
        raise ImageFileError("missing")
    if not path.is_file():
        raise ImageFileError("is no file but a folder, a pipe or a device")


def _parse_header(file: Any) -> tuple[Any, nibabel.Nifti1Header]:
    """The kind of NIfTI that an open file holds, and its header as nibabel mends it."""
    start = file.read(540)
    file.seek(0)
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        if kind.header_class.may_contain_header(start):
            header = kind.header_class.from_fileobj(file, check=False)
            pixdim = header["pixdim"][1:4].tolist()
            if not all(math.isfinite(mm) and mm > 0 for mm in pixdim):  # nibabel mends a 0
                raise ImageFileError(f"voxel size {pixdim} mm is not positive")
            header.check_fix(SILENT)
            return kind, header
    raise ImageFileError("cannot be read: truncated, or no NIfTI file")


def _verify(header: nibabel.Nifti1Header, n_bytes: float) -> None:
    """Raise ImageFileError for what a header of a file of n_bytes says and cannot be."""
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    affine = _to_mm(header.get_best_affine(), header)
    problem = ""
    if len(shape) < 3 or min(shape) < 1 or math.prod(shape) != math.prod(shape[:3]):
        problem = f"has shape {shape}; expected one 3D volume"
    elif dtype.kind not in "iuf":
        problem = f"holds {dtype}; expected one real number a voxel"
    elif header.get_data_offset() + math.prod(shape) * dtype.itemsize > n_bytes:
        problem = f"cannot be read: truncated, {n_bytes} bytes are too few for shape {shape}"
    elif not (np.isfinite(affine).all() and np.linalg.matrix_rank(affine) == 4):
        problem = "its affine is singular or not finite"
    elif max(voxel_sizes(affine) * shape[:3]) > LONGEST:
        problem = f"is {max(voxel_sizes(affine) * shape[:3]):.0f} mm long; expected millimetres"
        problem += f", and its header says {_unit(header)[0]}" if _unit(header)[0] else ""
    if problem:
        raise ImageFileError(problem)


def _unit(header: nibabel.Nifti1Header) -> tuple[str, float]:
    return UNITS.get(int(header["xyzt_units"]) & 7, ("", 1.0))


def _to_mm(affine: np.ndarray, header: nibabel.Nifti1Header) -> np.ndarray:
    """An affine of a file, from the unit that its header states."""
    return affine * np.array([[_unit(header)[1]]] * 3 + [[1.0]])


def _header_problems(path: Path, file: nibabel.Nifti1Image) -> list[Problem]:
    problems = []
    if file.ndim > 3:
        what = f"has shape {file.shape}"
        problems.append(Problem(path, what, "axes of length 1 are dropped", True))
    (sform, s_code), (qform, q_code) = file.get_sform(coded=True), file.get_qform(coded=True)
    if s_code > 0 and q_code > 0 and corners_apart(sform, qform, file.shape[:3]):
        what = "its sform and qform put the volume at different places"
        problems.append(Problem(path, what, "the sform is used", True))
    if s_code <= 0 and q_code <= 0:
        what = "its header does not say where left and right are (sform and qform have code 0)"
        problems.append(
            Problem(path, what, "its axes are taken for left, anterior, superior", True)
        )
    axes = file.affine[:3, :3] / voxel_sizes(file.affine)
    cosine = abs(axes.T @ axes - np.eye(3)).max()
    if cosine > SHEAR:
        what = f"its axes are {math.degrees(math.acos(cosine)):.1f}° apart, not 90° (gantry tilt?)"
        problems.append(Problem(path, what, "distances in it are not exact", True))
    return problems


def corners_apart(a: np.ndarray, b: np.ndarray, shape: Sequence[int]) -> bool:
    """Whether two affines put a corner of the volume more than half a voxel apart."""
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in shape], [1], indexing="ij")).reshape(4, -1)
    distance = np.linalg.norm(((a - b) @ corners)[:3], axis=0).max()
    return bool(distance > 0.5 * np.linalg.norm(a[:3, :3], axis=0).min())


def to_nifti(labels: np.ndarray, scan: Scan) -> bytes:
    """The content of a .nii.gz of a label map on a scan's voxels, with the scan's own axes.

    labels: (R, A, S), as scan.voxels. Of the scan's header nothing but its geometry is taken, as
    the rest may tell who the patient is.
    """
    own = nibabel.orientations.io_orientation(scan.file_affine)
    turn = nibabel.orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), own)
    turned = nibabel.orientations.apply_orientation(labels, turn).astype(np.uint8)
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.uint8)
    for field in GEOMETRY:
        header[field] = scan.header[field]
    file = nibabel.Nifti1Image(turned, None, header)
    return gzip.compress(file.to_bytes(), compresslevel=1, mtime=0)  # the same map, the same bytes
