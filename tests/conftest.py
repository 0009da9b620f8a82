"""Small data sets in the layouts that the program reads."""

import functools
import json
import os

os.environ["OMP_NUM_THREADS"] = "1"  # two tests at a time, and the commands that they start

import nibabel
import numpy as np
import pytest

import phantom as phantom_module
from data import ORGANS, TOTALSEGMENTATOR_MASKS

SPACING = phantom_module.SPACING
phantom = phantom_module.phantom = functools.cache(phantom_module.phantom)  # made once, read often

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


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def split_kidneys(labels):
    """The kidneys of a phantom as two masks: right (x below the middle) and left."""
    kidneys = labels == ORGANS.index("kidneys") + 1
    middle = labels.shape[0] // 2
    right, left = kidneys.copy(), kidneys.copy()
    right[middle:], left[:middle] = False, False
    return right, left


def write_totalsegmentator(root, modality, n, splits=None, seed=1, affine=None, organs=ORGANS):
    for i in range(n):
        image, labels = phantom(seed, modality, i)
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
        image, truth = phantom(seed, modality, i)
        save(root / "imagesTr" / f"case_{i:03d}_0000.nii.gz", image)
        save(root / "labelsTr" / f"case_{i:03d}.nii.gz", number_organs(truth))
    (root / "dataset.json").write_text(json.dumps({**names, "numTraining": n}))
    return root


def write_amos(root, modality, n, seed=1):
    """The first case in imagesTr, the others in imagesVa; numbers above 500 are MRI."""
    for i in range(n):
        image, truth = phantom(seed, modality, i)
        name, part = f"amos_{i + (1 if modality == 'ct' else 501):04d}.nii.gz", "Va" if i else "Tr"
        save(root / f"images{part}" / name, image)
        save(root / f"labels{part}" / name, number_organs(truth))
    dataset = {"training": [], "validation": [], "test": [], "labels": {"1": "spleen"}}
    (root / "dataset.json").write_text(json.dumps(dataset))
    return root


@pytest.fixture(scope="session")
def ct_folder(tmp_path_factory):
    splits = ["train", "train", "val", "test"]
    return write_totalsegmentator(tmp_path_factory.mktemp("totalseg") / "ct_set", "ct", 4, splits)


@pytest.fixture(scope="session")
def mri_folder(tmp_path_factory):
    return write_nnunet(tmp_path_factory.mktemp("nnunet") / "Dataset001_MRI", "mri", 4)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=20, help="of a run, at random moments (20)")
