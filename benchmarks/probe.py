"""What a GPU is good for here, in a minute or two: a training step in several forms, and GIN.

python -m benchmarks.probe --device cuda
python -m benchmarks.probe --patch 16 --width 2 --depth 2 --repeats 1  # a taste, on a CPU

Each form in turn, on its own: seconds of its first call, in which libraries are loaded, algorithms
tried out and code compiled, the median of those after it, and the peak of the GPU's memory. A form
that fails is named and the next one follows.
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
    """Time the work that is made; nothing of it is left in memory at the end."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        work = make()
        first, *others = (clock(work, device) for _ in range(1 + repeats))
    except Exception as error:  # no compiler, no memory: what the others take is still worth it
        what = " ".join(str(error).split())[:200]
        print(f"{name}: failed, {type(error).__name__}: {what}", flush=True)
        return
    memory = f", {torch.cuda.max_memory_allocated() / 2**20:.0f} MB" if cuda else ""
    print(
        f"{name}: first {first:.3f} s, then {statistics.median(others):.4f} s{memory}", flush=True
    )


def step(
    device: torch.device, args: argparse.Namespace, change: Callable | None, half: bool = True
) -> Callable[[], object]:
    """A training step of a new model that `change` has changed, in bfloat16 or float32."""
    torch.manual_seed(0)
    model = UNet3D(1, 6, args.width, args.depth).to(device)
    if change:
        change(model)
    shape = (2, args.patch, args.patch, args.patch)
    images, labels = torch.randn(2, 1, *shape[1:], device=device), torch.randint(6, shape)
    batch = images, (labels.to(device, torch.uint8), None)
    loss = functools.partial(segmentation_loss, weight=torch.ones(6, device=device))
    dtype = torch.bfloat16 if half else None
    return lambda: train_locally(model, [batch], loss, lr=1e-3, autocast=dtype)


def leave_out_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            for n in (1, 4):
                module[n] = nn.Identity()


def main() -> None:
    device, args = parse(__doc__, patch=96, width=32, depth=5, repeats=10)
    if device.type == "cuda":
        about = torch.backends.cudnn.version(), torch.version.cuda, mixed_precision(device)
        print("cuDNN {}, CUDA {}, the program computes in {}".format(*about))
    channels_last = functools.partial(nn.Module.to, memory_format=torch.channels_last_3d)
    forms = {
        "bfloat16": (None,),
        "float32": (None, False),
        "bfloat16, channels-last": (channels_last,),
        "bfloat16, without norms": (leave_out_norms,),
        "bfloat16, compiled": (nn.Module.compile,),
    }
    for name, form in forms.items():
        make = functools.partial(step, device, args, *form)
        probe(f"step, {name}", make, device, args.repeats)
    with torch.no_grad():
        x = torch.randn(2, 1, args.patch, args.patch, args.patch, device=device)
        for name, work in sides(x, calls=5).items():
            probe(f"GIN, 5 calls, {name}", lambda work=work: work, device, args.repeats)


if __name__ == "__main__":
    main()
