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

    The GPU becomes the current one, and cuDNN tries its algorithms out, as patches have one size.
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
    """bfloat16 where the GPU computes in it, and rightly; None, that is float32, elsewhere.

    What speaks against bfloat16 is printed, once a process.
    """
    if device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    if problem := bfloat16_problem():
        print(f"{problem}: computing in float32, slower", file=sys.stderr)
        return None
    return torch.bfloat16


def bfloat16_problem() -> str:
    """What is wrong with 3D convolutions in bfloat16 on a GPU; "" if nothing is known to be.

    With cuDNN 9.8 to 9.14 large ones gave wrong numbers (pytorch#163539), for which PyTorch takes
    a way around cuDNN that is slow and large (pytorch#166122, #166643).
    """
    cudnn = torch.backends.cudnn.version() or 0
    if 90800 <= cudnn < 91500:
        version, cuda = f"{cudnn // 10000}.{cudnn // 100 % 100}", torch.version.cuda or "12"
        newer = f"pip install 'nvidia-cudnn-cu{cuda.split('.')[0]}>=9.16' mends them"
        return f"bfloat16 convolutions are wrong or slow with cuDNN {version}; {newer}"
    return ""


def segment(model: nn.Module, image: np.ndarray, patch: int, size: Sequence[int]) -> np.ndarray:
    """Label map of a normalized image (D, H, W), brought from the model's grid to `size` voxels.

    The model runs where it is, in mixed precision where that pays; the logits are put together
    there as well if its memory holds them, and on the CPU otherwise.
    """
    device = next(model.parameters()).device
    model.eval()
    if device.type != "cpu":
        try:
            return _segment(model, image, patch, size, device)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        torch.cuda.empty_cache()  # out here, where nothing holds the tensors of the attempt
    return _segment(model, image, patch, size, torch.device("cpu"))


def _segment(
    model: nn.Module, image: np.ndarray, patch: int, size: Sequence[int], blend_on: torch.device
) -> np.ndarray:
    device = next(model.parameters()).device
    dtype = mixed_precision(device)
    volume = torch.tensor(image)[None].to(blend_on)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        logits = sliding_window(lambda patches: model(patches.to(device)), volume, patch)
    return resample_labels(logits, size)


def copy_to_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of a network's weights, which leave a GPU in one piece."""
    if all(w.device.type == "cpu" for w in weights.values()):
        return {key: w.clone() for key, w in weights.items()}
    packed = torch.cat([w.flatten() for w in weights.values()]).cpu()
    parts = packed.split([w.numel() for w in weights.values()])
    return {k: part.view(w.shape) for (k, w), part in zip(weights.items(), parts, strict=True)}


def load_model(path: Path, device: torch.device) -> tuple[nn.Module, dict]:
    """The network of a trained arm, and its organs, spacing, patch, width, depth and label ("arm").

    Raises DataError for a file that is none of fedgin.py's. Opening one runs no code.
    """
    found = read_pt(path)
    with reading(path):
        metadata, weights = found["model"], found["weights"]
        organs, patch, depth = metadata["organs"], metadata["patch"], metadata["depth"]
        if type(patch) is not int or patch % 2 ** (depth - 1) or patch <= 2 ** (depth - 1):
            raise ValueError(f"patch {patch} does not fit depth {depth}")
        if not (organs and all(type(organ) is str for organ in organs)):
            raise ValueError(f"organs {organs}")
        if not 0 < metadata["spacing"] < float("inf"):
            raise ValueError(f"spacing {metadata['spacing']}")
        normalization = {key: tuple(value) for key, value in metadata["normalization"].items()}
        low, high = normalization["ct"]
        if normalization != {**NORMALIZATION, "ct": (low, high)} or not low < high:
            raise ValueError(f"it was trained with another normalization: {normalization}")
        if not all(w.dtype == torch.float32 and w.isfinite().all() for w in weights.values()):
            raise ValueError("weights that are not float32 or not finite")
        with torch.device("meta"):  # no memory before the weights are known to fit
            model = UNet3D(1, len(organs) + 1, metadata["width"], depth)
        model.load_state_dict(weights, assign=True)
    model.to(device, memory_format=memory_format(device))  # type: ignore[call-overload]
    arm = {"arm": found["arm"], "seed": found["seed"]}
    return model, {**metadata, **arm, "normalization": normalization}
