"""One training step, U-Net forward, backward and optimizer, compared with MONAI's.

python -m benchmarks.training_step [--device cuda]
"""

import functools

import torch
from monai.networks.nets import BasicUNet
from torch.nn import functional as F

from benchmarks.compare import alternate, parse, report
from federated import train_locally
from study.inference import mixed_precision
from unet3d import UNet3D, memory_format

CASES = ((16, 48, 8), (32, 48, 4), (16, 64, 4), (16, 96, 2), (32, 96, 2))  # width, patch, repeats


def baseline_step(model, batch, optimizer, autocast):
    """The same loss, clipping and optimizer in a plain loop, with PyTorch's defaults."""
    inputs, targets = batch
    with torch.autocast(inputs.device.type, dtype=autocast, enabled=autocast is not None):
        logits = model(inputs)
    optimizer.zero_grad()
    F.cross_entropy(logits.float(), targets).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def main() -> None:
    device = parse(__doc__).device
    autocast = mixed_precision(device)
    for width, patch, repeats in CASES:
        x = torch.randn(2, 1, patch, patch, patch, device=device)
        batch = x, torch.randint(6, (2, patch, patch, patch), device=device)
        ours = UNet3D(1, 6, width, depth=5).to(device, memory_format=memory_format(device))
        # BasicUNet does not halve the channels of its last upsampling. With 3/4 of the width after
        # it, its forward pass has 1.4 % fewer multiply-adds than ours.
        features = [width * 2**i for i in range(5)] + [width * 3 // 4]
        eager, tuned = (BasicUNet(3, 1, 6, features).to(device) for _ in range(2))
        tuned.to(memory_format=torch.channels_last_3d)
        channels_last = x.to(memory_format=torch.channels_last_3d), batch[1]
        plain = torch.optim.AdamW(eager.parameters())
        fused = torch.optim.AdamW(tuned.parameters(), fused=True)
        step = functools.partial(train_locally, lr=1e-3, autocast=autocast)
        sides = {
            "ours": functools.partial(step, ours, [batch], F.cross_entropy),
            "BasicUNet": functools.partial(baseline_step, eager, batch, plain, autocast),
            "BasicUNet, channels-last, fused": functools.partial(
                baseline_step, tuned, channels_last, fused, autocast
            ),
        }
        repeats *= 5 if device.type == "cuda" else 1
        times = alternate(sides, device, repeats, warm_up=3 if device.type == "cuda" else 1)
        report(f"width {width}, 2 × {patch}³", times)


if __name__ == "__main__":
    main()
