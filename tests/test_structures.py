"""Two structures that are not the paper's, from two layouts, in a window of their own."""

import csv
import json

import nibabel
import numpy as np
import pytest
from conftest import SPACING, save, write_amos, write_nnunet, write_totalsegmentator

import fedgin
from scans.files import read_pt
from scans.layouts import find_cases
from scans.organs import ORGANS
from scans.phantom import make_phantom
from scripts import predict

WINDOW = (-500.0, 900.0)
NAMES = ["Segment Left", "spleen_tip"]  # as they are asked for


def halves(labels):
    """The lower half of the liver, and what is left of x = 8 of the spleen."""
    liver, spleen = labels == 1, labels == 1 + ORGANS.index("spleen")
    liver[:, :, 21:], spleen[8:] = False, False
    return liver, spleen


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """CT in TotalSegmentator's layout and MRI in nnU-Net's, with the names that each would use."""
    root = tmp_path_factory.mktemp("folders")
    ct = write_totalsegmentator(root / "ct", "ct", 4, ["train", "train", "val", "test"], seed=1)
    labels = {"background": 0, "L segment": 21, "Spleen-Tip": 22, "liver": 6}
    mri = write_nnunet(root / "mri", "mri", 4, seed=1, labels=labels)
    for i in range(4):
        lower, left = halves(make_phantom(1, "ct", i)[1])
        masks = ct / f"s{i:04d}/segmentations"
        save(masks / "segment_left.nii.gz", lower.astype(np.uint8))
        save(masks / "spleen_tip.nii.gz", left.astype(np.uint8))
        lower, left = halves(make_phantom(1, "mri", i)[1])
        numbers = np.zeros(lower.shape, np.uint8)
        numbers[lower], numbers[left] = 21, 22
        save(mri / f"labelsTr/case_{i:03d}.nii.gz", numbers)
    return ct, mri


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    ct, mri = folders
    out = tmp_path_factory.mktemp("run") / "out"
    flags = "--scenario complete --arms fl --rounds 2 --local-steps 2 --width 4 --depth 3"
    flags += f" --patch 16 --spacing {SPACING} --ct-window -500 900"
    words = ["--ct", str(ct), "--mri", str(mri), "--organs", *NAMES, "--out", str(out)]
    assert fedgin.main([*flags.split(), *words]) == 0
    return out


@pytest.mark.slow
def test_structures_of_two_layouts_are_trained_on_and_scored(run):
    with open(run / "scores.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["organ"] for row in rows} == {*NAMES}
    assert {row["modality"] for row in rows} == {"ct", "mri"}
    assert all(0 <= float(row["dice"]) <= 1 for row in rows if row["outcome"] != "absent")
    assert any(row["outcome"] in ("scored", "missed") for row in rows)
    metadata = read_pt(run / "fl-seed42/model.pt")["model"]
    assert metadata["organs"] == tuple(NAMES)
    assert metadata["normalization"] == {"ct": WINDOW, "mri": (0.5, 99.5)}
    assert json.loads((run / "config.json").read_text())["ct_window"] == [*WINDOW]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["totalsegmentator", "nnunet", "amos"])
def test_structures_are_predicted_in_all_layouts(layout, run, folders, tmp_path, monkeypatch):
    root = dict(zip(("totalsegmentator", "nnunet"), folders, strict=True)).get(layout)
    root = root or write_amos(tmp_path / "amos", "ct", 2)  # which lacks both
    images, segment = [], predict.segment

    def watched(model, image, *rest):
        images.append(image)
        return segment(model, image, *rest)

    monkeypatch.setattr(predict, "segment", watched)
    out = tmp_path / "out"
    args = ["--checkpoint", str(run / "fl-seed42/model.pt"), "--images", str(root)]
    assert predict.main([*args, "--out", str(out)]) == 0
    written = json.loads((out / "labels.json").read_text())
    assert written == {"background": 0, NAMES[0]: 1, NAMES[1]: 2}
    assert len(list(out.glob("*.nii.gz"))) == len(find_cases(root))
    assert (out / "scores.csv").exists() == (layout != "amos")
    # On the phantoms' own grid, so that only the normalization is between a file and the network.
    files = [case.image for case in find_cases(root)]
    for file, image in zip(files, images, strict=True):
        values = np.asarray(nibabel.load(file).dataobj, np.float64)
        low, high = np.percentile(values, (0.5, 99.5)) if layout == "nnunet" else WINDOW
        values = values.clip(low, high)
        np.testing.assert_allclose(image, (values - values.mean()) / values.std(), atol=1e-3)
