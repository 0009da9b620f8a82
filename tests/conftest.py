"""Small data sets in the layouts that the program reads, and ways to spoil their files."""

import functools
import gzip
import json
import os
import re
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # two tests at a time, and the commands that they start

import nibabel
import numpy as np
import pytest

from scans import phantom
from scans.organs import ORGANS

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & would have it ignored
SPACING = phantom.SPACING
make_phantom = phantom.make_phantom = functools.cache(phantom.make_phantom)  # made once, read often

TOTALSEGMENTATOR_MASKS = {organ: [organ] for organ in ORGANS}
TOTALSEGMENTATOR_MASKS["kidneys"] = ["kidney_left", "kidney_right"]
NNUNET_LABELS = {
    "background": 0,
    "spleen": 1,
    "kidney_right": 2,
    "left kidney": 3,
    "Gall Bladder": 4,
    "liver": [6, 7],
    "pancreas": 10,
    "aorta": 8,
}


def save(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([SPACING, SPACING, SPACING, 1.0]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def awkward_affine(spacing, flips, order):
    """Permuted and flipped axes, an oblique direction, anisotropic spacing and an offset."""
    oblique = nibabel.eulerangles.euler2mat(0.3, -0.2, 0.15)
    affine = np.eye(4)
    affine[:3, :3] = oblique @ np.diag(flips).astype(float)[:, order] @ np.diag(spacing)
    affine[:3, 3] = [-91.5, 33.25, 400.0]
    return affine


def split_kidneys(labels):
    """The kidneys of a phantom as two masks: right (x above the middle) and left."""
    kidneys = labels == ORGANS.index("kidneys") + 1
    middle = labels.shape[0] // 2
    right, left = kidneys.copy(), kidneys.copy()
    right[:middle], left[middle:] = False, False
    return right, left


def write_totalsegmentator(root, modality, n, splits=None, seed=1, affine=None, organs=ORGANS):
    for i in range(n):
        image, labels = make_phantom(seed, modality, i)
        folder = root / f"s{i:04d}"
        save(folder / f"{modality}.nii.gz", image.astype(np.float32), affine)
        right, left = split_kidneys(labels)
        for organ in organs:
            for name in TOTALSEGMENTATOR_MASKS[organ]:
                mask = {"kidney_left": left, "kidney_right": right}.get(name)
                if mask is None:
                    mask = labels == ORGANS.index(organ) + 1
                save(folder / "segmentations" / f"{name}.nii.gz", mask.astype(np.uint8), affine)
    if splits:
        rows = ["image_id;age;split"] + [f"s{i:04d};;{split}" for i, split in enumerate(splits)]
        (root / "meta.csv").write_text("\n".join(rows), encoding="utf-8-sig")
    return root


def number_organs(labels):
    """The labels of a phantom by AMOS22's numbers, with some aorta in a corner."""
    right, left = split_kidneys(labels)
    ids = np.zeros(labels.shape, np.uint8)
    for organ, value in (("liver", 6), ("spleen", 1), ("pancreas", 10), ("gallbladder", 4)):
        ids[labels == ORGANS.index(organ) + 1] = value
    ids[right], ids[left] = 2, 3
    ids[:2, :2, :2] = 8
    return ids


def write_nnunet(root, modality, n, seed=1, labels=NNUNET_LABELS):
    channel = {"ct": "CT", "mri": "T2"}[modality]
    names = {"channel_names": {"0": channel}, "labels": labels, "file_ending": ".nii.gz"}
    for i in range(n):
        image, target = make_phantom(seed, modality, i)
        save(root / "imagesTr" / f"case_{i:03d}_0000.nii.gz", image)
        save(root / "labelsTr" / f"case_{i:03d}.nii.gz", number_organs(target))
    (root / "dataset.json").write_text(json.dumps({**names, "numTraining": n}))
    return root


def write_amos(root, modality, n, seed=1):
    """The first case in imagesTr, the others in imagesVa; numbers above 500 are MRI."""
    for i in range(n):
        image, target = make_phantom(seed, modality, i)
        name, part = f"amos_{i + (1 if modality == 'ct' else 501):04d}.nii.gz", "Va" if i else "Tr"
        save(root / f"images{part}" / name, image)
        save(root / f"labels{part}" / name, number_organs(target))
    dataset = {"training": [], "validation": [], "test": [], "labels": {"1": "spleen"}}
    (root / "dataset.json").write_text(json.dumps(dataset))
    return root


# ---------------------------------------------------------------------------------- spoilt files


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path, array=None, affine=None):
    """Write a file again with another array, or a function of its array, or another affine."""
    nifti = nibabel.load(path)
    if array is None or callable(array):
        voxels = np.asarray(nifti.dataobj)
        array = array(voxels) if array else voxels
    nibabel.save(nibabel.Nifti1Image(array, nifti.affine if affine is None else affine), path)


def shift(path):
    affine = nibabel.load(path).affine.copy()
    affine[0, 3] += 40
    edit(path, affine=affine)


def make_forms_disagree(path):
    """Put the qform 100 mm away from the sform."""
    nifti = nibabel.load(path)
    affine = nifti.affine.copy()
    affine[2, 3] += 100
    nifti.set_qform(affine, code=1)
    nifti.set_sform(nifti.affine, code=1)
    nibabel.save(nifti, path)


def set_header(**fields):
    """A function that overwrites fields of a file's header: dim, pixdim, srow_x and so on."""

    def spoil(path):
        content = bytearray(nibabel.load(path).to_bytes())
        header = nibabel.Nifti1Header(bytes(content[:348]), check=False)
        for name, value in fields.items():
            header[name] = value
        content[:348] = header.binaryblock
        path.write_bytes(gzip.compress(bytes(content)))

    return spoil


def set_voxel(value):
    def spoil(path):
        array = np.asarray(nibabel.load(path).dataobj).astype(np.float32)
        array[1, 2, 3] = value
        edit(path, array)

    return spoil


def spoil_checksum(path):
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # of the CRC, which stands behind the last voxel
    path.write_bytes(content)


def save_ones(shape, dtype=np.float32):
    return lambda path: save(path, np.ones(shape, dtype))


def pixdim(*mm):
    return set_header(pixdim=[1, *mm, 0, 0, 0, 0])


def dim(*n):
    return set_header(dim=[3, *n, 1, 1, 1, 1])


# How a NIfTI file can be spoilt so that none of it can be used, and what is said of it.
UNREADABLE = {
    "missing": (lambda p: p.unlink(), "is missing"),
    "truncated": (truncate, "Compressed file ended"),
    "corrupt": (lambda p: p.write_bytes(b"\x1f\x8b" + bytes(100)), "cannot be read ("),
    "checksum": (spoil_checksum, "CRC check failed"),
    "no gzip": (lambda p: p.write_bytes(b"no gzip at all"), "truncated, or not a NIfTI file"),
    "no NIfTI": (lambda p: p.write_bytes(gzip.compress(bytes(1000))), "or not a NIfTI file"),
    "empty": (lambda p: p.write_bytes(b""), "truncated, or not a NIfTI file"),
    "2-D": (save_ones((4, 5)), "(4, 5); expected one 3D volume"),
    "4-D": (save_ones((4, 5, 6, 2)), "(4, 5, 6, 2); expected one 3D volume"),
    "no voxels": (dim(0, 4, 4), "expected one 3D volume"),
    "negative shape": (dim(-4, 4, 4), "expected one 3D volume"),
    "huge": (dim(32767, 32767, 32767), "truncated: 131424 bytes are too few for shape (32767,"),
    "no offset": (set_header(vox_offset=np.nan), "cannot be read ("),
    "colours": (save_ones((4, 4, 4), [(c, "u1") for c in "RGB"]), "expected one real number per"),
    "complex": (save_ones((4, 5, 6), np.complex64), "expected one real number per voxel"),
    "pointer": (
        lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        "it is a Git LFS pointer, not the file; `git lfs pull` fetches it",
    ),
    "page": (
        lambda p: p.write_bytes(b"\n<!DOCTYPE html>\n<html>Sign in</html>"),
        "it is a web page, not a NIfTI file; download it again",
    ),
    "zipped twice": (
        lambda p: p.write_bytes(gzip.compress(p.read_bytes())),
        "it was compressed by gzip twice; `gunzip` it once",
    ),
    "zero voxel size": (pixdim(2, 0, 2), "voxel size [2.0, 0.0, 2.0] mm is zero or not finite"),
    "NaN voxel size": (pixdim(2, np.nan, 2), "is zero or not finite"),
    "infinite voxel size": (pixdim(np.inf, 2, 2), "is zero or not finite"),
    "flat": (set_header(srow_z=[0, 2, 0, 0]), "singular or not finite"),
    "NaN affine": (set_header(srow_x=np.nan), "singular or not finite"),
    "no rotation": (
        set_header(qform_code=1, sform_code=0, quatern_b=2, quatern_c=2, quatern_d=2),
        "cannot be read (",
    ),
    "micrometres": (set_header(srow_x=[9000, 0, 0, 0]), "longest side is 2.88e+05 mm; are its"),
    "metres": (
        lambda p: edit(p, affine=np.diag([0.009, 0.009, 0.009, 1])),
        "its longest side is 0.288 mm; are its voxel sizes in mm?",
    ),
    "NaN": (set_voxel(np.nan), "has 1 voxels that are NaN or infinite"),
    "infinite": (set_voxel(np.inf), "has 1 voxels that are NaN or infinite"),
}
# How a case can be spoilt, and what is said of it; that read_nifti refuses is one way of many.
OF_ANY_FILE = {
    "truncated": UNREADABLE["truncated"],
    "affine": (shift, "lies at another place than its scan ct.nii.gz, by their"),
    "shape": (lambda p: edit(p, lambda a: a[2:]), "(30, 32, 32)"),
}
OF_SCANS = OF_ANY_FILE | {
    "no HU": (lambda p: edit(p, lambda a: a + 1024), "are not Hounsfield units"),
    "constant": (lambda p: edit(p, np.zeros_like), "almost every voxel is 0"),
}
OF_MASKS = OF_ANY_FILE | {"missing": UNREADABLE["missing"], "NaN": UNREADABLE["NaN"]}
SPOILT_CASES = [
    pytest.param(file, *way, id=f"{name} {file}")
    for file, ways in (("ct", OF_SCANS), ("segmentations/spleen", OF_MASKS))
    for name, way in ways.items()
]


# ------------------------------------------------------------------------------------- data sets


@pytest.fixture(scope="session")
def ct_folder(tmp_path_factory):
    splits = ["train", "train", "val", "test"]
    return write_totalsegmentator(tmp_path_factory.mktemp("totalseg") / "ct_set", "ct", 4, splits)


@pytest.fixture(scope="session")
def mri_folder(tmp_path_factory):
    return write_nnunet(tmp_path_factory.mktemp("nnunet") / "Dataset001_MRI", "mri", 4)


def pytest_configure(config):
    """Let only `pytest -m cuda` see a GPU: other tests demand equal bits, which a CPU gives.

    PyTorch has not looked for GPUs yet.
    """
    if not re.search(r"(?<!not )\bcuda\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="sequences in test_killed.py (3)")
    parser.addoption("--first-kill", type=int, default=0, help="the seed of the first of them (0)")
