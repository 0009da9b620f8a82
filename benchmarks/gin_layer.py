"""GIN compared with its plain form, and its time relative to a training step.

python -m benchmarks.gin_layer [--device cuda]
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.compare import alternate, parse, report
from federated import train_locally
from gin import _draw_all, gin
from study.inference import mixed_precision
from unet3d import UNet3D, memory_format


def naive(x: Tensor, sizes: list[int]) -> Tensor:
    """The formula as it is written: a grouped convolution per layer, default memory format."""
    batch, channels = x.shape[:2]
    h, widths = x.reshape(1, batch * channels, *x.shape[2:]), [channels, 2, 2, 2, channels]
    for layer, k in enumerate(sizes):
        c_in, c_out = widths[layer], widths[layer + 1]
        kernel = torch.randn(batch * c_out, c_in, k, k, k, device=x.device)
        bias = torch.randn(batch * c_out, device=x.device)
        h = F.conv3d(h, kernel, bias, padding=k // 2, groups=batch)
        h = F.leaky_relu(h, 0.01) if layer < 3 else h
    alpha = torch.rand(batch, 1, 1, 1, 1, device=x.device)
    mixed = alpha * h.reshape(x.shape) + (1 - alpha) * x
    norm_x, norm_m = (
        torch.linalg.vector_norm(y, dim=(1, 2, 3, 4), keepdim=True) for y in (x, mixed)
    )
    return mixed * norm_x / (norm_m + 1e-5)


def sides(x: Tensor, calls: int) -> dict[str, Callable[[], object]]:
    """For both forms a function that calls it `calls` times, with kernels of the same sizes."""
    torch.manual_seed(0)
    channels = [x.shape[1], 2, 2, 2, x.shape[1]]
    drawn = [_draw_all(x, channels, (1, 3), None) for _ in range(calls)]
    sizes = [[kernels.shape[-1] for kernels in parts[:-1:2]] for parts in drawn]

    def ours() -> None:
        torch.manual_seed(0)
        for _ in range(calls):
            gin(x)

    return {"gin": ours, "naive": lambda: [naive(x, each) for each in sizes]}


def main() -> None:
    device = parse(__doc__).device
    for patch in (32, 48, 64, 96):
        x, calls = torch.randn(2, 1, patch, patch, patch, device=device), max(2, 20 * 32 // patch)
        with torch.no_grad():
            times = alternate(sides(x, calls), device, repeats=9)
            report(f"GIN of 2 × 1 × {patch}³, {calls} calls", times)
    autocast = mixed_precision(device)
    for name, width, depth, patch in (("phantoms", 8, 4, 32), ("scans", 32, 5, 96)):
        slow = patch == 96 and device.type == "cpu"
        calls, repeats = (2, 2) if slow else (20, 5)
        x = torch.randn(2, 1, patch, patch, patch, device=device)
        targets = torch.randint(6, (2, patch, patch, patch), device=device)
        model = UNet3D(1, 6, width, depth).to(device, memory_format=memory_format(device))

        def steps(m=model, batches=((x, targets),) * calls):
            train_locally(m, batches, F.cross_entropy, lr=1e-3, autocast=autocast)

        both = {"gin": sides(x, calls)["gin"], "training steps": steps}
        times = alternate(both, device, repeats)
        report(f"GIN at the defaults for {name}, {calls} batches", times)


if __name__ == "__main__":
    main()
