"""Phantoms: the same arguments, the same case; the same anatomy for both, another contrast."""

import numpy as np
import pytest

from phantom import ORGANS, SIZE, phantom


def test_shape_dtype_and_determinism():
    for modality in ("ct", "mri"):
        image, labels = phantom(42, modality, 3)
        again, _ = phantom(42, modality, 3)
        assert image.shape == labels.shape == (SIZE,) * 3
        assert (image.dtype, labels.dtype) == (np.float32, np.uint8)
        assert np.array_equal(image, again)
        assert np.isfinite(image).all()


def test_cases_differ_by_seed_modality_and_index():
    cases = [phantom(*a)[1] for a in ((1, "ct", 0), (2, "ct", 0), (1, "mri", 0), (1, "ct", 1))]
    for i in range(4):
        for j in range(i):
            assert (cases[i] != cases[j]).any()


def test_every_case_has_every_organ_at_a_plausible_size():
    for modality in ("ct", "mri"):
        for index in range(24):
            counts = np.bincount(phantom(42, modality, index)[1].ravel(), minlength=len(ORGANS) + 1)
            assert (counts > 0).all()
            assert counts[0] > 0.8 * SIZE**3
            assert counts[1] == counts[1:].max()  # the liver is the largest


def test_anatomy_has_one_distribution():
    """Mean organ volumes of the modalities agree within what chance allows."""
    counts = {
        m: np.stack([np.bincount(phantom(7, m, i)[1].ravel(), minlength=6) for i in range(40)])
        for m in ("ct", "mri")
    }
    for label in range(1, 6):
        a, b = counts["ct"][:, label], counts["mri"][:, label]
        standard_error = np.sqrt(a.var() / len(a) + b.var() / len(b))
        assert abs(a.mean() - b.mean()) < 4 * standard_error


def test_ct_is_in_hounsfield_units_and_mri_swaps_the_order_of_organs():
    liver_minus_spleen = []
    for index in range(24):
        image, labels = phantom(42, "ct", index)
        assert 60 < image[labels == 1].mean() < 160
        assert image[0, 0, 0] < -900
        image, labels = phantom(42, "mri", index)
        assert image.min() >= 0
        liver_minus_spleen.append(image[labels == 1].mean() - image[labels == 3].mean())
    brighter = np.sum(np.array(liver_minus_spleen) > 0)
    assert 4 <= brighter <= 20


def test_another_modality_is_refused():
    with pytest.raises(ValueError, match="modality"):
        phantom(1, "pet", 0)
