"""NIfTI volumes: read and verified, turned, and written on the grid they came from.

A scan is read in its closest canonical orientation: arrays run right, anterior, superior.
"""

import gzip
import io
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.arrayproxy import ArrayProxy

from scans.files import DataError, reading

KINDS = (nibabel.Nifti1Image, nibabel.Nifti2Image)
GZIP = b"\x1f\x8b"  # how such a file begins
GEOMETRY = (  # fields of a header
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
LONGEST, SHORTEST = 4000, 20  # mm of a scan's longest side; a file in metres is below
FOREIGN = {  # how files begin that stand in a scan's place, and what they are
    GZIP: "it was compressed by gzip twice; `gunzip` it once",
    b"version https://git-lfs": "it is a Git LFS pointer, not the file; `git lfs pull` fetches it",
    b"<": "it is a web page, not a NIfTI file; download it again",
}
SHEAR = 0.01  # cosine between two axes; more is not rounding
SILENT = logging.Logger("silent", logging.CRITICAL + 1)  # for what nibabel repairs


class Scan(NamedTuple):
    """A volume in closest canonical orientation, and what leads back to its own."""

    voxels: np.ndarray  # (R, A, S) float32
    spacing: tuple[float, ...]  # mm
    affine: np.ndarray  # from voxels to mm
    header: nibabel.Nifti1Header  # of the file
    warnings: list[str]  # what may be wrong with it


def read_nifti(path: Path) -> Scan:
    """Read a 3D NIfTI file; raises DataError, which says what is wrong, if it cannot be used.

    Every byte is read and, in a .gz, checked against its CRC: nibabel stops where the voxels end,
    before the CRC.
    """
    with reading(path), np.errstate(all="ignore"):  # what is not finite is found below
        if not path.exists():
            raise DataError(f"{path}: is missing")
        if not path.is_file():  # a pipe would keep its reader waiting forever
            raise DataError(f"{path}: is not a file but a folder, a pipe or a device")
        content = path.read_bytes()
        if content[:2] == GZIP:
            content = gzip.decompress(content)
        file = _parse(content)
        canonical = nibabel.as_closest_canonical(nibabel.funcs.squeeze_image(file))
        voxels = np.ascontiguousarray(canonical.get_fdata(dtype=np.float32, caching="unchanged"))
        n_odd = voxels.size - int(np.isfinite(voxels).sum())
        if n_odd:
            raise ValueError(f"it has {n_odd} voxels that are NaN or infinite")
        spacing = tuple(voxel_sizes(canonical.affine).tolist())
        return Scan(voxels, spacing, canonical.affine, file.header, _header_warnings(file))


def _parse(content: bytes) -> nibabel.Nifti1Image:
    """The image of a NIfTI file; raises ValueError for a header that no 3D scan of a person has."""
    kinds = [k for k in KINDS if k.header_class.may_contain_header(content[:540])]
    if not kinds:
        known = [text for start, text in FOREIGN.items() if content[:99].lstrip().startswith(start)]
        raise ValueError(known[0] if known else "it is truncated, or not a NIfTI file")
    header = kinds[0].header_class(content[: kinds[0].header_class.sizeof_hdr], check=False)
    pixdim = header["pixdim"][1:4].tolist()
    if not all(math.isfinite(mm) and mm != 0 for mm in pixdim):  # nibabel would repair a 0
        raise ValueError(f"voxel size {pixdim} mm is zero or not finite")
    header.check_fix(SILENT)
    if header.get_data_offset() < header.sizeof_hdr:
        raise ValueError("its voxels would begin inside its header (vox_offset)")
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if len(shape) < 3 or min(shape) < 1 or math.prod(shape) != math.prod(shape[:3]):
        raise ValueError(f"shape {shape}; expected one 3D volume")
    if dtype.kind not in "iuf":
        raise ValueError(f"it holds {dtype}; expected one real number per voxel")
    if header.get_data_offset() + math.prod(shape) * dtype.itemsize > len(content):
        raise ValueError(f"truncated: {len(content)} bytes are too few for shape {shape}")
    affine = header.get_best_affine()
    if not (np.isfinite(affine).all() and np.linalg.matrix_rank(affine) == 4):
        raise ValueError("its affine is singular or not finite")
    longest = max(voxel_sizes(affine) * shape[:3])
    if not SHORTEST <= longest <= LONGEST:
        raise ValueError(f"its longest side is {longest:.3g} mm; are its voxel sizes in mm?")
    # from_bytes would do the same, and print what it repairs without the file's name.
    return kinds[0](ArrayProxy(io.BytesIO(content), header), affine, header)


def _header_warnings(file: nibabel.Nifti1Image) -> list[str]:
    warnings, apart = [], False
    s_code, q_code = (int(file.header[key]) for key in ("sform_code", "qform_code"))
    if s_code > 0 and q_code > 0:
        try:
            apart = corners_apart(file.affine, file.get_qform(), file.shape[:3])
        except ValueError:  # a qform that is not a rotation
            apart = True
    if apart:
        warnings.append("its sform and qform put it at different places; the sform is used")
    if s_code <= 0 and q_code <= 0:
        warnings.append(
            "its header does not say where left and right are (sform and qform have code 0); its "
            "axes are taken for left, anterior, superior"
        )
    pixdim, sizes = file.header["pixdim"][1:4], voxel_sizes(file.affine)
    if (abs(pixdim - sizes) > 0.01 * sizes).any():
        stated, used = (" × ".join(f"{mm:.4g}" for mm in three) for three in (pixdim, sizes))
        warnings.append(f"its voxel sizes are {stated} mm by pixdim, {used} mm by the affine used")
    axes = file.affine[:3, :3] / sizes
    cosine = abs(axes.T @ axes - np.eye(3)).max()
    if cosine > SHEAR:
        angle = math.degrees(math.acos(cosine))
        warnings.append(
            f"its axes are {angle:.1f}° apart, not 90° (gantry tilt?); its distances are not exact"
        )
    return warnings


def corners_apart(a: np.ndarray, b: np.ndarray, shape: Sequence[int]) -> bool:
    """Whether two affines put a corner of the volume more than half a voxel apart."""
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in shape], [1], indexing="ij")).reshape(4, -1)
    distance = np.linalg.norm(((a - b) @ corners)[:3], axis=0).max()
    return bool(distance > 0.5 * np.linalg.norm(a[:3, :3], axis=0).min())


def to_nifti(labels: np.ndarray, scan: Scan) -> bytes:
    """The content of a .nii.gz of a label map on a scan's voxels, with the scan's own axes.

    labels: (R, A, S), as scan.voxels. Of the scan's header only its geometry is taken, because the
    rest may identify the patient.
    """
    own = nibabel.orientations.io_orientation(scan.header.get_best_affine())
    turn = nibabel.orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), own)
    turned = nibabel.orientations.apply_orientation(labels, turn).astype(np.uint8)
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.uint8)
    for field in GEOMETRY:
        header[field] = scan.header[field]
    file = nibabel.Nifti1Image(turned, None, header)
    return gzip.compress(file.to_bytes(), compresslevel=1, mtime=0)  # the same map, the same bytes
