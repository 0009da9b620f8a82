"""UNet3D: the segmentation network that the hospitals train together, and the loss they train on.

A plain 3D U-Net (Çiçek et al., MICCAI 2016, arXiv 1606.06650) with instance normalization: nothing
in it depends on other images or on running statistics, so averaging the weights of two models
averages the whole models. Skips leave the encoder at every resolution, the full one included.

The loss is cross-entropy + soft Dice, also where a hospital never labelled some of the organs.

    import torch
    from unet3d import UNet3D, segmentation_loss
    model = UNet3D(in_channels=1, out_channels=6, width=8, depth=4)
    logits = model(torch.randn(2, 1, 32, 48, 40))  # (2, 6, 32, 48, 40)
    labels = torch.randint(3, (2, 32, 48, 40))  # 0: background
    labelled = torch.tensor([[True] * 3 + [False] * 3] * 2)  # nobody looked for organs 3 to 5
    print(segmentation_loss(logits, (labels, labelled), weight=torch.ones(6)))
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UNet3D(nn.Module):
    """3D U-Net: images (B, in_channels, D, H, W) → logits (B, out_channels, D, H, W).

    The level i of `depth` has width · 2^i channels at 1 / 2^i of the resolution. D, H and W must
    divide by 2^(depth − 1); other sizes raise a ValueError, because nothing is resized silently.
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


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two 3×3×3 convolutions, each normalized and followed by LeakyReLU."""
    layers: list[nn.Module] = []
    for c_in in (in_channels, out_channels):
        layers += [
            nn.Conv3d(c_in, out_channels, kernel_size=3, padding=1, bias=False),
            InstanceNorm(out_channels, out_channels),  # one group per channel
            nn.LeakyReLU(0.01, inplace=True),
        ]
    return nn.Sequential(*layers)


class InstanceNorm(nn.GroupNorm):
    """Instance normalization by what is fast on the device, with the same weights on all devices.

    GroupNorm with one channel per group, which keeps channels-last memory format on a CPU, where
    PyTorch's instance_norm does not. On CUDA neither keeps it, and autocast runs group_norm in
    float32 (ATen/autocast_mode.h), so that every activation would be kept in float32 beside the
    convolutions' bfloat16; instance_norm computes its statistics in float32, and keeps bfloat16.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
        return super().forward(x)


def memory_format(device: torch.device) -> torch.memory_format:
    """The memory format of weights in which UNet3D is fast: model.to(device, memory_format=…).

    Channels-last suits a CPU's convolutions. On CUDA every normalization would undo it and every
    convolution redo it (pytorch#59168: a U-Net with instance norms a third slower).
    """
    return torch.contiguous_format if device.type == "cuda" else torch.channels_last_3d


def segmentation_loss(
    logits: Tensor, targets: tuple[Tensor, Tensor | None], weight: Tensor
) -> Tensor:
    """Cross-entropy + soft Dice over the organs: logits (B, classes, D, H, W) → scalar.

    targets: labels (B, D, H, W), integers of any width, and which organs each image's hospital
    labels, (B, classes), or None where all are. A voxel of an organ that was never labelled is
    background by its labels; so the probabilities of such organs are added to the background's
    first (the marginal loss, Shi et al. 2021, arXiv 2007.03868). weight: of each class in the
    cross-entropy, above 0. Raises ValueError for others, on a CPU only, because a GPU would wait.
    """
    if logits.is_cpu and not (weight > 0).all():
        raise ValueError(f"segmentation_loss needs weights above 0, not {weight.tolist()}")
    labels, labelled = targets[0].long(), targets[1]  # they travel as bytes
    log_p = logits.log_softmax(dim=1)  # (B, classes, D, H, W)
    if labelled is not None:
        known = labelled[:, :, None, None, None]  # (B, classes, 1, 1, 1)
        merged = torch.cat([log_p[:, :1], log_p[:, 1:].masked_fill(known[:, 1:], -torch.inf)], 1)
        log_p = torch.cat([merged.logsumexp(dim=1, keepdim=True), log_p[:, 1:]], dim=1)
    p = log_p.exp() if labelled is None else log_p.exp() * known
    classes = torch.arange(logits.shape[1], device=logits.device)
    target = (labels[..., None] == classes).movedim(-1, 1)  # (B, classes, D, H, W), one hot
    overlap = (p * target).sum((0, 2, 3, 4))
    size = p.sum((0, 2, 3, 4)) + target.sum((0, 2, 3, 4))
    soft_dice = ((2 * overlap + 1) / (size + 1))[1:]
    counted = torch.ones_like(soft_dice) if labelled is None else labelled.any(dim=0)[1:]
    mean_dice = (soft_dice * counted).sum() / counted.sum().clamp(min=1)
    return F.nll_loss(log_p, labels, weight) + 1 - mean_dice
