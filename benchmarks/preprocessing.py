"""Preprocessing a 512 × 512 × 300 CT, from 0.8 × 0.8 × 2.5 mm to 2 mm, by ours and by scipy's zoom.

python -m benchmarks.preprocessing
"""

import numpy as np
import torch
from scipy import ndimage

from benchmarks.compare import alternate, ellipsoid, parse, report
from data import normalize, resample_labels, to_model_grid

SHAPE, SPACING, TARGET = (512, 512, 300), (0.8, 0.8, 2.5), 2.0
LABELS = 6


def main() -> None:
    device = parse(__doc__).device
    rng = np.random.default_rng(0)
    voxels = rng.normal(50, 100, SHAPE).astype(np.float32)
    labels = np.zeros(SHAPE, np.uint8)
    for label in range(1, LABELS):
        labels[ellipsoid(SHAPE, rng.uniform(0.3, 0.7, 3), rng.uniform(0.05, 0.2, 3))] = label
    factors = np.divide(SPACING, TARGET)

    def ours():
        return to_model_grid(voxels, SPACING, "ct", TARGET)

    def zoom(volume):
        return ndimage.zoom(volume, factors, order=1, grid_mode=True, mode="nearest")

    def scipys():
        return normalize(zoom(voxels), "ct")

    def our_labels():
        one_hot = (torch.from_numpy(labels == label).float() for label in range(LABELS))
        return resample_labels(one_hot, ours_size)

    def scipys_labels():
        """Class by class, like ours, because labels themselves cannot be interpolated linearly."""
        zoomed = [zoom((labels == n).astype(np.float32)) for n in range(LABELS)]
        return np.argmax(zoomed, axis=0)

    ours_size = ours().shape
    sides = {"ours": ours, "scipy.ndimage.zoom": scipys}
    report("image", alternate(sides, device, repeats=5))
    sides = {"ours": our_labels, "scipy.ndimage.zoom": scipys_labels}
    report(f"labels, {LABELS} classes", alternate(sides, device, repeats=2, warm_up=0))


if __name__ == "__main__":
    main()
