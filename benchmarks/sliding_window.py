"""Sliding-window inference compared with MONAI's: the same model, overlap and Gaussian blending.

python -m benchmarks.sliding_window [--device cuda]
"""

import torch
from monai.inferers import sliding_window_inference

from benchmarks.compare import alternate, parse, report
from evaluate import sliding_window
from study.inference import mixed_precision
from unet3d import UNet3D, memory_format

PATCH = 64  # both sides then place their windows at the same voxels of this volume


def main() -> None:
    device = parse(__doc__).device
    torch.manual_seed(0)
    model = UNet3D(1, 6, width=8, depth=4).to(device, memory_format=memory_format(device)).eval()
    volume = torch.randn(1, 256, 256, 160, device=device)
    dtype = mixed_precision(device)

    def ours():
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            return sliding_window(model, volume, PATCH)

    def monai():
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            return sliding_window_inference(
                volume[None], (PATCH,) * 3, 2, model, overlap=0.5, mode="gaussian"
            )[0]

    difference = (ours() - monai()).abs().max().item()
    print(f"largest difference of two logits: {difference:.2g}")
    report("256 × 256 × 160", alternate({"ours": ours, "MONAI": monai}, device, repeats=3))


if __name__ == "__main__":
    main()
