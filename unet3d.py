"""UNet3D: the segmentation network that the hospitals train together.

A plain 3D U-Net (Çiçek et al., MICCAI 2016, arXiv 1606.06650) with instance normalization: nothing
in it depends on other images or on running statistics, so averaging the weights of two models
averages the whole models. Skips leave the encoder at every resolution, the full one included.

    import torch
    from unet3d import UNet3D
    model = UNet3D(in_channels=1, out_channels=6, width=8, depth=4)
    print(model(torch.randn(2, 1, 32, 48, 40)).shape)  # torch.Size([2, 6, 32, 48, 40])
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UNet3D(nn.Module):
    """3D U-Net: images (B, in_channels, D, H, W) → logits (B, out_channels, D, H, W).

    The level i of `depth` has width · 2^i channels at 1 / 2^i of the resolution. D, H and W must
    divide by 2^(depth − 1); another size raises a ValueError, as nothing is ever resized silently.
    """

    def __init__(
        self, in_channels: int = 1, out_channels: int = 6, width: int = 32, depth: int = 5
    ) -> None:
        super().__init__()
        if min(in_channels, out_channels, width, depth) < 1:
            raise ValueError("in_channels, out_channels, width and depth must be at least 1")
        channels = [width * 2**i for i in range(depth)]
        self.encoders = nn.ModuleList(
            _block(c_in, c) for c_in, c in zip([in_channels, *channels], channels, strict=False)
        )
        self.upsamplers = nn.ModuleList(
            nn.ConvTranspose3d(2 * c, c, kernel_size=2, stride=2) for c in channels[:-1]
        )
        self.decoders = nn.ModuleList(_block(2 * c, c) for c in channels[:-1])
        self.head = nn.Conv3d(width, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        self._check_size(x)
        skips = []
        for encoder in self.encoders[:-1]:
            x = encoder(x)  # (B, C, D, H, W)
            skips.append(x)
            x = F.max_pool3d(x, 2)  # (B, C, D/2, H/2, W/2)
        x = self.encoders[-1](x)
        for level in reversed(range(len(skips))):
            x = self.upsamplers[level](x)  # (B, 2C, D/2, H/2, W/2) → (B, C, D, H, W)
            x = self.decoders[level](torch.cat([skips.pop(), x], dim=1))  # 2C → C
        return self.head(x)

    def _check_size(self, x: Tensor) -> None:
        divisor = 2 ** (len(self.encoders) - 1)
        if x.ndim != 5:
            raise ValueError(f"UNet3D needs images of shape (B, C, D, H, W), not {tuple(x.shape)}")
        for axis, size in zip("DHW", x.shape[2:], strict=True):
            if size == 0 or size % divisor:
                raise ValueError(
                    f"UNet3D with depth {len(self.encoders)} needs sizes that divide by {divisor}; "
                    f"axis {axis} has {size}"
                )
        if x.shape[2:].numel() == divisor**3:
            raise ValueError(
                f"UNet3D with depth {len(self.encoders)} needs more than {divisor} voxels along an "
                "axis: the lowest level would be one voxel, which normalization turns into zero"
            )


class InstanceNorm(nn.GroupNorm):
    """Instance normalization by what is fast on the device; on all of them with the same weights.

    GroupNorm with a channel in each group, which keeps a channels-last layout on a CPU, where
    PyTorch's instance_norm does not. On CUDA neither keeps it, and autocast runs group_norm in
    float32 (ATen/autocast_mode.h), so that every activation would be kept in float32 beside the
    convolutions' bfloat16; instance_norm computes its statistics in float32, and keeps bfloat16.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
        return super().forward(x)


def memory_format(device: torch.device) -> torch.memory_format:
    """The layout of weights in which UNet3D is fast: model.to(device, memory_format=…).

    Channels-last suits a CPU's convolutions. On CUDA every normalization would undo it and every
    convolution do it again (pytorch#59168: a U-Net with instance norms a third slower).
    """
    return torch.contiguous_format if device.type == "cuda" else torch.channels_last_3d


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two 3×3×3 convolutions, each normalized and followed by LeakyReLU."""
    layers: list[nn.Module] = []
    for c_in in (in_channels, out_channels):
        layers += [
            nn.Conv3d(c_in, out_channels, kernel_size=3, padding=1, bias=False),
            InstanceNorm(out_channels, out_channels),  # a group for each channel
            nn.LeakyReLU(0.01, inplace=True),
        ]
    return nn.Sequential(*layers)
