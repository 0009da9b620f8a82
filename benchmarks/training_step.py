"""One training step, U-Net forward, backward and optimizer, beside MONAI's BasicUNet.

python -m benchmarks.training_step [--device cuda]
"""

import torch
from monai.networks.nets import BasicUNet
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.compare import alternate, device_argument, report
from federated import train_locally
from study.inference import mixed_precision
from unet3d import UNet3D, memory_format

CASES = ((16, 48, 8), (32, 48, 4), (16, 64, 4), (16, 96, 2), (32, 96, 2))  # width, patch, repeats


def peer_step(model, batch, optimizer, autocast):
    """What a plain loop does: the same loss, clipping and optimizer, in PyTorch's defaults."""
    inputs, targets = batch
    with torch.autocast(inputs.device.type, dtype=autocast, enabled=autocast is not None):
        logits = model(inputs)
    optimizer.zero_grad()
    F.cross_entropy(logits.float(), targets).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def multiply_adds(model, inputs) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    return counter.get_total_flops() / 2


def main() -> None:
    device = device_argument(__doc__)
    autocast = mixed_precision(device)
    for width, patch, repeats in CASES:
        x = torch.randn(2, 1, patch, patch, patch, device=device)
        batch = x, torch.randint(6, (2, patch, patch, patch), device=device)
        ours = UNet3D(1, 6, width, depth=5).to(device, memory_format=memory_format(device))
        # BasicUNet does not halve the channels of its last upsampling; with 3/4 of the width behind
        # it, it has slightly fewer multiply-adds than ours.
        features = [width * 2**i for i in range(5)] + [width * 3 // 4]
        eager, tuned = (BasicUNet(3, 1, 6, features).to(device) for _ in range(2))
        tuned.to(memory_format=torch.channels_last_3d)
        channels_last = x.to(memory_format=torch.channels_last_3d), batch[1]
        plain = torch.optim.AdamW(eager.parameters())
        fused = torch.optim.AdamW(tuned.parameters(), fused=True)
        sides = {
            "ours": lambda m=ours, b=batch: train_locally(
                m, [b], F.cross_entropy, lr=1e-3, autocast=autocast
            ),
            "BasicUNet": lambda m=eager, b=batch, o=plain: peer_step(m, b, o, autocast),
            "BasicUNet, channels-last, fused": lambda m=tuned, b=channels_last, o=fused: peer_step(
                m, b, o, autocast
            ),
        }
        repeats *= 5 if device.type == "cuda" else 1
        times = alternate(sides, device, repeats, warm_up=3 if device.type == "cuda" else 1)
        giga = [multiply_adds(m, x) / 1e9 for m in (ours, eager)]
        what = f"width {width}, 2 × {patch}³, {giga[0]:.1f} against {giga[1]:.1f} G multiply-adds"
        report(what, times)


if __name__ == "__main__":
    main()
