"""HD95 and NSD of a liver in a 512 × 512 × 300 CT, compared with MONAI's.

python -m benchmarks.surface_metrics
"""

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

from benchmarks.compare import alternate, ellipsoid, parse, report
from evaluate import hd95_and_nsd

SHAPE, SPACING = (512, 512, 300), (0.8, 0.8, 2.5)


def main() -> None:
    device = parse(__doc__).device
    target = ellipsoid(SHAPE, (0.65, 0.5, 0.6), (0.22, 0.2, 0.14))
    prediction = ellipsoid(SHAPE, (0.655, 0.5, 0.605), (0.21, 0.205, 0.14))
    pair = [torch.from_numpy(mask)[None, None].to(device) for mask in (prediction, target)]

    def ours():
        return hd95_and_nsd(prediction, target, SPACING, tolerance=2.0)

    def monai():
        distance = compute_hausdorff_distance(*pair, percentile=95, spacing=SPACING)
        share = compute_surface_dice(*pair, [2.0], spacing=SPACING)
        return float(distance), float(share)

    np.testing.assert_allclose(ours(), monai(), rtol=1e-4)
    print("HD95 {:.3f} mm, NSD {:.4f}".format(*ours()))
    sides = {"ours": ours, "MONAI": monai}
    report("HD95 + NSD", alternate(sides, device, repeats=3, warm_up=0))


if __name__ == "__main__":
    main()
