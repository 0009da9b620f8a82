"""Where a network runs, in which precision, and how it segments a whole scan."""

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data import NORMALIZATION, resample_labels
from evaluate import sliding_window
from scans.files import read_pt, reading
from scans.machine import is_out_of_memory
from unet3d import UNet3D, memory_format


def choose_device(index: int = 0) -> torch.device:
    """The GPU of this number, modulo the number of GPUs; without one, the CPU.

    The GPU becomes the current one. cuDNN benchmarks its algorithms: all patches have one size.
    Float32 is float32: TF32, which has 10 bits of mantissa, is PyTorch's default in convolutions,
    and its 3D ones are broken in cuDNN 9.10.2 to 9.15 (pytorch#167024).
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", index % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    return device


@functools.cache
def mixed_precision(device: torch.device) -> torch.dtype | None:
    """bfloat16 if the GPU computes in it, and correctly; otherwise None, which means float32.

    A problem with bfloat16 is printed, once per process.
    """
    if device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    if problem := bfloat16_problem():
        print(f"{problem}: computing in float32, which is slower", file=sys.stderr)
        return None
    return torch.bfloat16


def bfloat16_problem() -> str:
    """What is known to be wrong with 3D convolutions in bfloat16 here, and what helps; or "".

    Large ones gave wrong numbers with cuDNN 9.8 to 9.14 (pytorch#163539), which PyTorch then
    avoids, slowly and with more memory (pytorch#166122, #166643).
    """
    cudnn, cuda = torch.backends.cudnn.version() or 0, torch.version.cuda or "12"
    if not 90800 <= cudnn < 91500:
        return ""
    newer = f"pip install 'nvidia-cudnn-cu{cuda.split('.')[0]}>=9.16' fixes them"
    return f"bfloat16 convolutions are wrong or slow with cuDNN 9.{cudnn // 100 % 100}; {newer}"


def segment(model: nn.Module, image: np.ndarray, patch: int, size: Sequence[int]) -> np.ndarray:
    """Label map of a normalized image (D, H, W), brought from the model's grid to `size` voxels.

    The model runs where it is, in mixed precision where that pays; the logits are put together
    there as well if its memory holds them, and on the CPU otherwise.
    """
    device = next(model.parameters()).device
    dtype = mixed_precision(device)
    model.eval()

    def blend_on(place: torch.device) -> np.ndarray:
        volume = torch.tensor(image)[None].to(place)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            logits = sliding_window(lambda patches: model(patches.to(device)), volume, patch)
        return resample_labels(logits, size)

    if device.type != "cpu":
        try:
            return blend_on(device)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        torch.cuda.empty_cache()  # out here, where nothing holds the tensors of the attempt
    return blend_on(torch.device("cpu"))


def copy_to_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of a network's weights, which leave a GPU in one piece."""
    if all(w.device.type == "cpu" for w in weights.values()):
        return {key: w.clone() for key, w in weights.items()}
    packed = torch.cat([w.flatten() for w in weights.values()]).cpu()
    parts = packed.split([w.numel() for w in weights.values()])
    return {k: part.view(w.shape) for (k, w), part in zip(weights.items(), parts, strict=True)}


def load_model(path: Path, device: torch.device) -> tuple[nn.Module, dict]:
    """The network of a model.pt, and the settings, label ("arm") and seed that predictions need.

    Raises DataError for a file that is not one of fedgin.py's. Opening one runs no code.
    """
    found = read_pt(path)
    with reading(path):
        if "model" not in found:
            raise ValueError("it is not a model.pt, which a training writes after its last round")
        metadata, weights = found["model"], found["weights"]
        organs, patch, depth = metadata["organs"], metadata["patch"], metadata["depth"]
        if patch % 2 ** (depth - 1) or patch <= 2 ** (depth - 1):
            raise ValueError(f"patch {patch} does not fit depth {depth}")
        if not (organs and all(type(organ) is str for organ in organs)):
            raise ValueError(f"organs {organs}")
        if not 0 < metadata["spacing"] < float("inf"):
            raise ValueError(f"spacing {metadata['spacing']}")
        normalization = {key: tuple(value) for key, value in metadata["normalization"].items()}
        low, high = normalization["ct"]
        is_window = 0 < high - low < float("inf")
        if normalization != {**NORMALIZATION, "ct": (low, high)} or not is_window:
            raise ValueError(f"it was trained with another normalization: {normalization}")
        if not all(w.dtype == torch.float32 and w.isfinite().all() for w in weights.values()):
            raise ValueError("weights that are not float32 or not finite")
        with torch.device("meta"):  # no memory before the weights are known to fit
            model = UNet3D(1, len(organs) + 1, metadata["width"], depth)
        model.load_state_dict(weights, assign=True)
        metadata |= {"arm": found["arm"], "seed": found["seed"], "normalization": normalization}
    model.to(device, memory_format=memory_format(device))  # type: ignore[call-overload]
    return model, metadata
