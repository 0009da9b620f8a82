"""NIfTI volumes: read and verified, turned, resampled, and written on the grid they came from.

A scan is read in its closest canonical orientation: arrays run right, anterior, superior.

    from nifti import read_nifti, resample_image
    scan = read_nifti("s0000/ct.nii.gz")
    image = resample_image(scan.voxels, scan.spacing, 2.0)  # cubic voxels of 2 mm
"""

import gzip
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import torch
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from torch import Tensor
from torch.nn import functional as F

GZIP = b"\x1f\x8b"  # how such a file begins
LONGEST = 4000  # mm along an axis; more is no scan of a person


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
    affine: np.ndarray  # of voxels
    header: nibabel.Nifti1Header  # of the file, as its affine
    file_affine: np.ndarray
    problems: list[Problem]  # that do not keep it from being used


# --------------------------------------------------------------------------------- reading, writing


def read_nifti(path: str | Path) -> Scan:
    """Read a 3D NIfTI file; raises ImageFileError, which says what is wrong, if that cannot be.

    Every byte is read and, in a .gz, checked against its CRC: nibabel stops where the voxels end,
    before it.
    """
    path = Path(path)
    if not path.is_file():
        raise ImageFileError("missing")
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
    spacing = tuple(voxel_sizes(canonical.affine).tolist())
    problems = _header_problems(path, file)
    return Scan(voxels, spacing, canonical.affine, file.header, file.affine, problems)


def read_header(path: Path) -> nibabel.Nifti1Header:
    """What a NIfTI file says of its voxels, without reading them; raises ImageFileError."""
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


def _parse_header(file: Any) -> tuple[Any, nibabel.Nifti1Header]:
    """The kind of NIfTI that an open file holds, and its header as it is."""
    start = file.read(540)
    file.seek(0)
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        if kind.header_class.may_contain_header(start):
            return kind, kind.header_class.from_fileobj(file, check=False)
    raise ImageFileError("cannot be read: truncated, or no NIfTI file")


def _verify(header: nibabel.Nifti1Header, n_bytes: float) -> None:
    """Raise ImageFileError for what a header of a file of n_bytes says and cannot be."""
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    pixdim = header["pixdim"][1:4].tolist()  # as it is: nibabel mends a 0
    affine = header.get_best_affine()
    problem = ""
    if not all(math.isfinite(mm) and mm > 0 for mm in pixdim):
        problem = f"voxel size {pixdim} mm is not positive"
    elif len(shape) < 3 or min(shape) < 1 or math.prod(shape) != math.prod(shape[:3]):
        problem = f"has shape {shape}; expected one 3D volume"
    elif dtype.kind not in "iuf":
        problem = f"holds {dtype}; expected one real number a voxel"
    elif header.get_data_offset() + math.prod(shape) * dtype.itemsize > n_bytes:
        problem = f"cannot be read: truncated, {n_bytes} bytes are too few for shape {shape}"
    elif not (np.isfinite(affine).all() and np.linalg.matrix_rank(affine) == 4):
        problem = "its affine is singular or not finite"
    elif max(voxel_sizes(affine) * shape[:3]) > LONGEST:
        problem = f"is {max(voxel_sizes(affine) * shape[:3]):.0f} mm long; expected millimetres"
    if problem:
        raise ImageFileError(problem)


def _header_problems(path: Path, file: nibabel.Nifti1Image) -> list[Problem]:
    problems = []
    if file.ndim > 3:
        what = f"has shape {file.shape}"
        problems.append(Problem(path, what, "axes of length 1 are dropped", True))
    (sform, s_code), (qform, q_code) = file.get_sform(coded=True), file.get_qform(coded=True)
    if s_code > 0 and q_code > 0 and corners_apart(sform, qform, file.shape[:3]):
        what = "its sform and qform put the volume at different places"
        problems.append(Problem(path, what, "the sform is used", True))
    return problems


def corners_apart(a: np.ndarray, b: np.ndarray, shape: Sequence[int]) -> bool:
    """Whether two affines put a corner of the volume more than half a voxel apart."""
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in shape], [1], indexing="ij")).reshape(4, -1)
    distance = np.linalg.norm(((a - b) @ corners)[:3], axis=0).max()
    return bool(distance > 0.5 * np.linalg.norm(a[:3, :3], axis=0).min())


def write_nifti(path: Path, labels: np.ndarray, scan: Scan) -> None:
    """Save a label map on a scan's voxels with the scan's own axes and header, whole or not at all.

    labels: (R, A, S), as scan.voxels.
    """
    own = nibabel.orientations.io_orientation(scan.file_affine)
    turn = nibabel.orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), own)
    turned = nibabel.orientations.apply_orientation(labels, turn).astype(np.uint8)
    header = scan.header.copy()
    header.set_data_dtype(np.uint8)
    temporary = path.with_name(f"tmp-{path.name}")
    try:
        nibabel.save(nibabel.Nifti1Image(turned, scan.file_affine, header), temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------- resampling


def resample_image(voxels: np.ndarray, spacing: Sequence[float], target: float) -> np.ndarray:
    """Resample a volume (D, H, W) with voxels of `spacing` mm to cubic ones of `target` mm."""
    size = resampled_size(voxels.shape, spacing, target)
    return _resample(torch.from_numpy(voxels), size).numpy()


def resampled_size(
    shape: Sequence[int], spacing: Sequence[float], target: float
) -> tuple[int, ...]:
    """Cubic voxels of `target` mm that cover what `shape` voxels of `spacing` mm do; at least 1."""
    return tuple(max(1, round(n * mm / target)) for n, mm in zip(shape, spacing, strict=True))


def resample_labels(scores: Iterable[Tensor], size: Sequence[int]) -> np.ndarray:
    """Interpolate one score map (D, H, W) a class linearly to `size`; return the best class, uint8.

    With one-hot labels as scores it resamples a label map, with logits it brings a prediction back
    to a scan's grid. Only one class is held at the new size beside the best so far.
    """
    resampled = (_resample(score, size) for score in scores)
    best = next(resampled)
    labels = torch.zeros(tuple(size), dtype=torch.uint8, device=best.device)
    for label, score in enumerate(resampled, start=1):
        better = score > best
        best = torch.where(better, score, best)
        labels[better] = label
    return labels.cpu().numpy()


def _resample(volume: Tensor, size: Sequence[int]) -> Tensor:
    """Trilinear (D, H, W) → size over the same extent, voxels taken as cells with a centre."""
    if tuple(volume.shape) == tuple(size):
        return volume
    return F.interpolate(volume[None, None], size=tuple(size), mode="trilinear")[0, 0]
