"""GIN beside its naive form, and its share of a training step.

python -m benchmarks.gin_layer [--device cuda]
"""

import torch
from torch.nn import functional as F

from benchmarks.compare import alternate, device_argument, report
from evaluate import mixed_precision
from federated import train_locally
from gin import gin
from unet3d import UNet3D, memory_format


def naive(x: torch.Tensor) -> torch.Tensor:
    """The formula as it is written: one grouped convolution a layer, in the default layout."""
    batch, channels = x.shape[:2]
    h, widths = x.reshape(1, batch * channels, *x.shape[2:]), [channels, 2, 2, 2, channels]
    for layer in range(4):
        k = (1, 3)[int(torch.randint(2, ()))]
        c_in, c_out = widths[layer], widths[layer + 1]
        kernel = torch.randn(batch * c_out, c_in, k, k, k, device=x.device)
        bias = torch.randn(batch * c_out, device=x.device)
        h = F.conv3d(h, kernel, bias, padding=k // 2, groups=batch)
        h = F.leaky_relu(h, 0.01) if layer < 3 else h
    alpha = torch.rand(batch, 1, 1, 1, 1, device=x.device)
    mixed = alpha * h.reshape(x.shape) + (1 - alpha) * x
    norm = {"dim": (1, 2, 3, 4), "keepdim": True}
    restored = torch.linalg.vector_norm(x, **norm)
    return mixed * restored / (torch.linalg.vector_norm(mixed, **norm) + 1e-5)


def seeded(function, x, calls):
    """A fixed number of calls from one seed, so that both sides draw the same kernel sizes."""
    torch.manual_seed(0)
    for _ in range(calls):
        function(x)


def main() -> None:
    device = device_argument(__doc__)
    for patch in (32, 48, 64, 96):
        x, calls = torch.randn(2, 1, patch, patch, patch, device=device), max(2, 20 * 32 // patch)
        sides = {
            "gin": lambda x=x, n=calls: seeded(gin, x, n),
            "naive": lambda x=x, n=calls: seeded(naive, x, n),
        }
        with torch.no_grad():
            report(f"GIN of 2 × 1 × {patch}³, {calls} calls", alternate(sides, device, repeats=9))
    autocast = mixed_precision(device)
    for name, width, depth, patch in (("phantoms", 8, 4, 32), ("scans", 32, 5, 96)):
        slow = patch == 96 and device.type == "cpu"
        calls, repeats = (2, 2) if slow else (20, 5)
        x = torch.randn(2, 1, patch, patch, patch, device=device)
        targets = torch.randint(6, (2, patch, patch, patch), device=device)
        model = UNet3D(1, 6, width, depth).to(device, memory_format=memory_format(device))

        def steps(m=model, batches=((x, targets),) * calls):
            train_locally(m, batches, F.cross_entropy, lr=1e-3, autocast=autocast)

        sides = {"gin": lambda x=x, n=calls: seeded(gin, x, n), "training steps": steps}
        times = alternate(sides, device, repeats)
        report(f"GIN's share at the defaults for {name}, {calls} batches", times)


if __name__ == "__main__":
    main()
