"""GIN: redraw the intensities of images with random, untrained, shallow convolutional networks.

"Global Intensity Non-linear augmentation", Ouyang et al., IEEE TMI 2022 (arXiv 2111.12525), as
FedGIN uses it (arXiv 2508.05137): intensities and textures change, shapes and edges mostly stay (a
strong draw can hide an organ), labels are not touched. A model that trains on redrawn images cannot
rely on what tells CT from MRI.

    import torch
    from gin import gin
    scans = torch.randn(2, 1, 32, 32, 32)  # (B, C, D, H, W); 1D and 2D work just as well
    redrawn = gin(scans)  # (2, 1, 32, 32, 32), each image redrawn by its own network
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Generator = torch.Generator | None
CONVOLUTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}  # by the number of spatial axes
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


@torch.no_grad()
def gin(
    x: Tensor,
    *,
    n_layers: int = 4,
    hidden_channels: int = 2,
    kernel_sizes: tuple[int, ...] = (1, 3),
    generator: Generator = None,
) -> Tensor:
    """Blend every image of a batch with the output of a random network, and restore its norm.

        m = α · g(x) + (1 − α) · x,   α ~ U(0, 1) for each image
        output = m · ‖x‖ / (‖m‖ + 1e-5)   with Frobenius norms over channels and space

    g has n_layers convolutions, C → hidden_channels → … → C. Each layer draws its kernel size from
    kernel_sizes and, for each image, kernels and biases from N(0, 1); LeakyReLU follows every layer
    but the last. All draws come from `generator` (the CPU's default one if None), and none of them
    makes the accelerator wait. No gradient flows through.

    x: (B, C, *space) with 1 to 3 spatial axes, floating point. Returns the same shape, dtype and
    device; the arithmetic is float32, under autocast too (on CUDA, cuDNN makes that TF32, off by
    about 6e-4, unless torch.backends.cudnn.allow_tf32 is False). Raises ValueError for any other x
    or for even kernel sizes, which would shift the image.
    """
    if x.ndim - 2 not in CONVOLUTION or not x.is_floating_point() or x.numel() == 0:
        raise ValueError(
            f"gin needs floats of shape (B, C, *space), not {x.dtype} {tuple(x.shape)}"
        )
    _check(n_layers, hidden_channels, kernel_sizes)
    with torch.autocast(x.device.type, enabled=False):
        image = x.float()
        channels = [x.shape[1]] + [hidden_channels] * (n_layers - 1) + [x.shape[1]]
        drawn = _draw_all(image, channels, kernel_sizes, generator)
        *weights, alpha = _send(drawn, x.device)
        g = _network(image, weights)  # g(x)
        mixed = alpha * g + (1 - alpha) * image
        return (mixed * (_norm(image) / (_norm(mixed) + 1e-5))).to(x.dtype)


class GIN(nn.Module):
    """`gin` as a layer: redraws each image with probability p; does nothing in eval mode.

    The other arguments are gin's own. Input and output: (B, C, *space), same dtype and device.
    Raises ValueError for what gin would refuse.
    """

    def __init__(
        self,
        p: float = 1.0,
        n_layers: int = 4,
        hidden_channels: int = 2,
        kernel_sizes: tuple[int, ...] = (1, 3),
        generator: Generator = None,
    ) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p is a probability between 0 and 1, not {p}")
        _check(n_layers, hidden_channels, kernel_sizes)
        sizes = {"n_layers": n_layers, "hidden_channels": hidden_channels}
        self.p, self.settings = p, dict[str, Any](sizes, kernel_sizes=kernel_sizes)
        self.generator = generator

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in {"p": self.p, **self.settings}.items())

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        redrawn = gin(x, **self.settings, generator=self.generator)
        if self.p == 1:
            return redrawn
        shape = (len(x),) + (1,) * (x.ndim - 1)
        [drawn] = _send([_draw(torch.rand, shape, self.generator)], x.device)
        return torch.where(drawn < self.p, redrawn, x)


def _check(n_layers: int, hidden_channels: int, kernel_sizes: tuple[int, ...]) -> None:
    odd = kernel_sizes and all(k > 0 and k % 2 for k in kernel_sizes)
    if n_layers < 1 or hidden_channels < 1 or not odd:
        raise ValueError("gin needs n_layers ≥ 1, hidden_channels ≥ 1 and odd kernel sizes")


def _draw_all(
    x: Tensor, channels: list[int], kernel_sizes: tuple[int, ...], generator: Generator
) -> list[Tensor]:
    """The kernels and biases of each layer, for all images together, and α."""
    batch, axes, drawn = len(x), x.ndim - 2, []
    for c_in, c_out in itertools.pairwise(channels):
        k = kernel_sizes[int(_draw(torch.randint, (1,), generator, len(kernel_sizes)))]
        drawn.append(_draw(torch.randn, (batch * c_out, c_in) + (k,) * axes, generator))
        drawn.append(_draw(torch.randn, (batch * c_out,), generator))
    drawn.append(_draw(torch.rand, (batch,) + (1,) * (x.ndim - 1), generator))
    return drawn


def _network(h: Tensor, weights: list[Tensor]) -> Tensor:
    """Send each image of (B, C, *space) through its own convolutions and LeakyReLUs."""
    batch, channels, *space = h.shape
    # The images lie side by side as channels of one image, each in its own group: one call per
    # layer, and no kernel ever sees two images. On CPUs channels-last is the faster memory format.
    h = h.reshape(1, batch * channels, *space)
    if h.device.type == "cpu" and len(space) > 1:
        h = h.contiguous(memory_format=CHANNELS_LAST[len(space)])
    for layer, (kernels, biases) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
        if layer > 0:
            h = F.leaky_relu_(h, 0.01)
        padding = kernels.shape[-1] // 2
        h = CONVOLUTION[len(space)](h, kernels, biases, padding=padding, groups=batch)
    return h.reshape(batch, -1, *space).contiguous()


def _draw(sampler: Callable, shape: tuple[int, ...], generator: Generator, *bounds: int) -> Tensor:
    """Draw where the generator lives, so that one seed gives the same numbers on every device."""
    if generator is None:  # not passed on: torch.compile takes no generator beside a symbolic size
        return sampler(*bounds, shape, device="cpu")
    return sampler(*bounds, shape, generator=generator, device=generator.device)


def _send(drawn: list[Tensor], device: torch.device) -> list[Tensor]:
    """Bring tensors to a device in a single copy."""
    if drawn[0].device == device:
        return drawn
    packed = torch.cat([part.flatten() for part in drawn])
    # A copy to the CPU that is not waited for may be read before it has arrived.
    packed = packed.to(device, non_blocking=packed.device.type == "cpu")
    parts = packed.split([part.numel() for part in drawn])
    return [part.view(like.shape) for part, like in zip(parts, drawn, strict=True)]


def _norm(x: Tensor) -> Tensor:
    """Frobenius norm of each image over channels and space, shaped to broadcast over x."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
