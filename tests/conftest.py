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
    """Write a file again with another array or affine."""
    nifti = nibabel.load(path)
    array = np.asarray(nifti.dataobj) if array is None else array
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


def set_floats(path, first, values):
    """Overwrite numbers in a file's header, from byte `first` on."""
    content = bytearray(nibabel.load(path).to_bytes())
    raw = np.array(values, "<f4").tobytes()
    content[first : first + len(raw)] = raw
    path.write_bytes(gzip.compress(bytes(content)))


def set_voxel_size(path, y):
    set_floats(path, 80, [2, y, 2])  # pixdim[1:4]


def save_without_affine(path):
    nifti = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.float32), None)
    nifti.header["pixdim"][1:4] = [2, 0, 2]
    nifti.to_filename(path)


def set_sform(path, rows):
    set_floats(path, 280, rows)  # srow_x, srow_y and srow_z


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


def save_rgb(path):
    save(path, np.zeros((32, 32, 32), np.dtype([(c, "u1") for c in "RGB"])))


# How a NIfTI file can be spoilt so that none of it can be used, and what is said of it.
UNREADABLE = {
    "missing": (lambda p: p.unlink(), "missing"),
    "truncated": (truncate, "cannot be read"),
    "corrupt": (lambda p: p.write_bytes(b"\x1f\x8b" + bytes(100)), "cannot be read"),
    "checksum": (spoil_checksum, "cannot be read (CRC"),
    "no gzip": (lambda p: p.write_bytes(b"no gzip at all"), "cannot be read"),
    "no NIfTI": (lambda p: p.write_bytes(gzip.compress(bytes(1000))), "cannot be read"),
    "empty": (lambda p: p.write_bytes(b""), "cannot be read"),
    "2-D": (lambda p: save(p, np.ones((4, 5), np.float32)), "(4, 5); expected one 3D volume"),
    "4-D": (lambda p: save(p, np.ones((4, 5, 6, 2), np.float32)), "expected one 3D volume"),
    "colours": (save_rgb, "expected one real number a voxel"),
    "complex": (lambda p: save(p, np.ones((4, 5, 6), np.complex64)), "expected one real number"),
    "zero voxel size": (lambda p: set_voxel_size(p, 0.0), "is not positive"),
    "negative voxel size": (lambda p: set_voxel_size(p, -1.0), "is not positive"),
    "NaN voxel size": (lambda p: set_voxel_size(p, np.nan), "is not positive"),
    "zero voxel size, no affine": (save_without_affine, "is not positive"),
    "flat": (lambda p: set_sform(p, [2, 0, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0]), "singular"),
    "NaN affine": (lambda p: set_sform(p, [np.nan]), "singular or not finite"),
    "metres": (lambda p: set_sform(p, [9000]), "288000 mm long; expected millimetres"),
    "NaN": (set_voxel(np.nan), "has 1 voxels that are NaN or infinite"),
    "infinite": (set_voxel(np.inf), "has 1 voxels that are NaN or infinite"),
}
# How a case can be spoilt by files that can be read.
UNFIT = {
    "affine": (shift, "lies at another place than its scan ct.nii.gz"),
    "shape": (lambda p: edit(p, np.asarray(nibabel.load(p).dataobj)[2:]), "(30, 32, 32)"),
}
OF_SCANS = UNFIT | {
    "no HU": (set_voxel(-9758.0), "no Hounsfield units"),
    "scale factor": (set_voxel(4e6), "no Hounsfield units"),
    "constant": (lambda p: edit(p, np.zeros((32, 32, 32), np.float32)), "every voxel is 0"),
}
SPOILT_CASES = [
    pytest.param(file, *ways[name], id=f"{name} {file}")
    for file, ways in (
        ("ct", UNREADABLE | OF_SCANS),
        ("segmentations/spleen", UNREADABLE | UNFIT),
    )
    for name in ways
    if (file, name) != ("ct", "missing")  # then there is no case
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
    """Let nothing but `pytest -m cuda` see a GPU: other tests demand equal bits, as of a CPU.

    PyTorch has not looked for GPUs by now.
    """
    if not re.search(r"(?<!not )\bcuda\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="sequences in test_killed.py (3)")
    parser.addoption("--first-kill", type=int, default=0, help="the seed of the first of them (0)")
