"""How fast a GPU runs a training step in several forms, and GIN, in a minute or two.

python -m benchmarks.probe --device cuda
python -m benchmarks.probe --patch 16 --width 2 --depth 2 --repeats 1  # quickly, on a CPU

For each form it prints the seconds of the first call, which loads libraries, tries algorithms out
and compiles code, the median of the later calls, and the peak of the GPU's memory. If a form fails,
its error is printed and the next form follows.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.compare import parse
from benchmarks.gin_layer import sides
from federated import train_locally
from study.inference import mixed_precision
from unet3d import UNet3D, segmentation_loss


def clock(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def probe(
    name: str, make: Callable[[], Callable[[], object]], device: torch.device, repeats: int
) -> None:
    """Print how long the work takes that `make` returns, or how it fails."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        work = make()
        first, *others = (clock(work, device) for _ in range(1 + repeats))
    except Exception as error:  # no compiler or memory, for instance
        message = " ".join(str(error).split())[:200]
        print(f"{name}: failed, {type(error).__name__}: {message}", flush=True)
        return
    memory = f", {torch.cuda.max_memory_allocated() / 2**20:.0f} MB" if cuda else ""
    print(
        f"{name}: first {first:.3f} s, then {statistics.median(others):.4f} s{memory}", flush=True
    )


def step(
    args: argparse.Namespace,
    change: Callable[[nn.Module], object] = lambda model: None,
    dtype: torch.dtype | None = torch.bfloat16,
) -> Callable[[], object]:
    """A training step of a new model that `change` has been called on; dtype None is float32."""
    device = args.device
    torch.manual_seed(0)
    model = UNet3D(1, 6, args.width, args.depth).to(device)
    change(model)
    space = (args.patch,) * 3
    images = torch.randn(2, 1, *space, device=device)
    labels = torch.randint(6, (2, *space), dtype=torch.uint8, device=device)
    batch = images, (labels, None)
    loss = functools.partial(segmentation_loss, weight=torch.ones(6, device=device))
    return lambda: train_locally(model, [batch], loss, lr=1e-3, autocast=dtype)


def leave_out_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            for n in (1, 4):
                module[n] = nn.Identity()


def main() -> None:
    args = parse(__doc__, patch=96, width=32, depth=5, repeats=10)
    device = args.device
    if device.type == "cuda":
        cudnn, precision = torch.backends.cudnn.version(), mixed_precision(device) or torch.float32
        print(f"cuDNN {cudnn}, CUDA {torch.version.cuda}, fedgin.py computes in {precision}")
    channels_last = functools.partial(nn.Module.to, memory_format=torch.channels_last_3d)
    forms = {
        "bfloat16": functools.partial(step, args),
        "float32": functools.partial(step, args, dtype=None),
        "bfloat16, channels-last": functools.partial(step, args, channels_last),
        "bfloat16, without norms": functools.partial(step, args, leave_out_norms),
        "bfloat16, compiled": functools.partial(step, args, nn.Module.compile),
    }
    for name, make in forms.items():
        probe(f"step, {name}", make, device, args.repeats)
    with torch.no_grad():
        x = torch.randn(2, 1, args.patch, args.patch, args.patch, device=device)
        for name, work in sides(x, calls=5).items():
            probe(f"GIN, 5 calls, {name}", lambda work=work: work, device, args.repeats)


if __name__ == "__main__":
    main()
