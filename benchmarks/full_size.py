"""Scans of full size from file to score: what each stage takes of time, memory and disk.

python -m benchmarks.full_size [--device cuda]
python -m benchmarks.full_size --cases 1 --shape 96 96 60 --patch 32 --width 4 --steps 4  # a taste

The scans are phantoms enlarged to 256 × 256 × 160 voxels of 1.5 mm; settings are those for scans.
"""

import argparse
import functools
import json
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

import data
from benchmarks.compare import parse
from config import Config
from datasets import ORGANS, find_cases
from evaluate import dice, mixed_precision, score_case
from federated import train_locally
from fedgin import segmentation_loss
from gin import GIN
from nifti import resample_labels
from phantom import phantom
from predict import segment
from unet3d import UNet3D, memory_format

SCANS = Config(ct=("CT",), mri=("MRI",))  # for its defaults
MM = 1.5


class Stage(NamedTuple):
    name: str
    n: int  # of what it does
    seconds: float
    host: float  # MB, the most of the process up to its end
    device: float  # MB, the most that tensors took on the GPU during it


def measure(stages: list[Stage], name: str, n: int, work: Callable[[], Any]) -> Any:
    """Do the work of a stage and add what it took to the list."""
    cuda = torch.cuda.is_initialized()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - began  # all stages end in a result on the CPU
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    stages.append(
        Stage(name, n, seconds, host, torch.cuda.max_memory_allocated() / 2**20 if cuda else 0)
    )
    return result


def write_cases(folder: Path, modality: str, n: int, shape: Sequence[int]) -> None:
    """A data set in nnU-Net's layout: enlarged phantoms with some noise, as int16."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    rng, affine = np.random.default_rng(0), np.diag([MM, MM, MM, 1.0])
    for index in range(n):
        image, labels = phantom(0, modality, index)
        image = ndimage.zoom(image, np.divide(shape, image.shape), order=1)
        image += rng.normal(0, 10, shape).astype(np.float32)
        one_hot = (torch.from_numpy(labels == c).float() for c in range(len(ORGANS) + 1))
        arrays = {
            f"imagesTr/case_{index:03d}_0000": image.astype(np.int16),
            f"labelsTr/case_{index:03d}": resample_labels(one_hot, shape),
        }
        for name, array in arrays.items():
            nibabel.save(nibabel.Nifti1Image(array, affine), folder / f"{name}.nii.gz")
    names = {"background": 0, **{organ: n for n, organ in enumerate(ORGANS, start=1)}}
    about = {"channel_names": {"0": {"ct": "CT", "mri": "T2"}[modality]}, "labels": names}
    about |= {"numTraining": n, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(about))


def train(model: nn.Module, volumes: Sequence, steps: int, patch: int) -> float:
    """Some steps with GIN, as a hospital of fedgin.py does them."""
    device = next(model.parameters()).device
    drawn = data.patches(volumes, patch, SCANS.batch_size, steps, data.generator("patches"))
    augment = GIN(generator=data.generator("gin"))

    def batches():
        for images, labels, _ in data.prefetch(drawn, pin=device.type == "cuda"):
            images, labels = (part.to(device, non_blocking=True) for part in (images, labels))
            yield augment(images), (labels, None)

    weight = torch.ones(len(ORGANS) + 1, device=device)
    loss: Callable[..., Tensor] = functools.partial(segmentation_loss, weight=weight)
    return train_locally(model, batches(), loss, lr=1e-3, autocast=mixed_precision(device))


def run(folder: Path, device: torch.device, args: argparse.Namespace) -> None:
    stages: list[Stage] = []
    cases = [case for m in ("ct", "mri") for case in find_cases(folder / m)]
    load = functools.partial(data.load_cases, cases, ORGANS, args.spacing, folder / "cache")
    predicted = data.cache_bytes(cases, ORGANS, args.spacing)
    measure(stages, "preprocessing", len(cases), load)
    volumes = list(measure(stages, "opening the cache", len(cases), load)[0].values())

    torch.manual_seed(0)
    model: Any = UNet3D(1, len(ORGANS) + 1, args.width, args.depth)
    model.to(device, memory_format=memory_format(device))
    train(model, volumes, 2, args.patch)  # cuDNN tries its algorithms
    work = functools.partial(train, model, volumes, args.steps, args.patch)
    measure(stages, "training steps", args.steps, work)
    test(model, volumes, args, stages)

    total = sum(stage.seconds for stage in stages)
    print("| stage | n | seconds | share | seconds each | host, MB | GPU, MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, n, seconds, *memory in stages:
        times = f"{seconds:.2f} | {seconds / total:.0%} | {seconds / n:.3f}"
        print(f"| {name} | {n} | {times} | {' | '.join(f'{mb:.0f}' for mb in memory)} |")
    real = sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file())
    print(f"cache: {predicted / 1e6:.1f} MB predicted, {real / 1e6:.1f} MB written")


def test(model: nn.Module, volumes: Sequence, args: argparse.Namespace, stages: list) -> None:
    """Validate on the model's grid, segment on the scans' own, and score."""

    def validate():
        for v in volumes:
            found = segment(model, v.image, args.patch, v.labels.shape)
            for n in range(1, len(ORGANS) + 1):
                dice(found == n, v.labels == n)

    def segment_all():
        for v, (target, _) in zip(volumes, targets, strict=True):
            segment(model, v.image, args.patch, target.shape)

    def score():
        # Not what this network found, which has learnt nothing: specks all over the volume have
        # surfaces that take many times as long as organs'.
        for target, spacing in targets:
            score_case(np.roll(target, 2, axis=0), target, ORGANS, spacing)

    measure(stages, "validation", len(volumes), validate)
    read = functools.partial(data.read_target, spacing=args.spacing)
    targets = measure(stages, "unpacking the targets", len(volumes), lambda: [*map(read, volumes)])
    measure(stages, "segmentation", len(volumes), segment_all)
    measure(stages, "scoring", len(volumes), score)


def main() -> None:
    numbers = {"cases": 4, "steps": 20, "shape": (256, 256, 160)}
    numbers |= {name: getattr(SCANS, name) for name in ("spacing", "patch", "width", "depth")}
    device, args = parse(__doc__, **numbers)
    with tempfile.TemporaryDirectory() as folder:
        for modality in ("ct", "mri"):
            write_cases(Path(folder) / modality, modality, args.cases, args.shape)
        run(Path(folder), device, args)


if __name__ == "__main__":
    main()
