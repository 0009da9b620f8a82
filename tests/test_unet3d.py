"""The U-Net: shapes, full-resolution skips, instance normalization, sizes it refuses."""

import pytest
import torch
from torch import nn

from unet3d import UNet3D


@pytest.mark.parametrize(
    ("depth", "size"), [(1, (5, 7, 3)), (2, (6, 10, 2)), (3, (4, 12, 20)), (4, (24, 8, 40))]
)
def test_logits_have_the_size_of_the_image(depth, size):
    model = UNet3D(in_channels=2, out_channels=3, width=4, depth=depth)
    assert model(torch.randn(2, 2, *size)).shape == (2, 3, *size)


def test_default_architecture():
    """Channels 32 … 512 on five levels; parameters counted by hand, layer by layer."""
    channels = [32, 64, 128, 256, 512]
    expected = 0
    for c_in, c in zip([1, *channels], channels, strict=False):
        expected += 27 * c_in * c + 27 * c * c + 4 * c  # two convolutions, two affine norms
    for c in channels[:-1]:
        expected += 8 * 2 * c * c + c  # transposed convolution
        expected += 27 * 2 * c * c + 27 * c * c + 4 * c
    expected += 32 * 6 + 6
    assert sum(p.numel() for p in UNet3D().parameters()) == expected


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_size_that_does_not_divide_names_axis_and_divisor(axis):
    size = [16, 16, 16]
    size[axis] = 20
    with pytest.raises(ValueError, match=f"divide by 8; axis {'DHW'[axis]} has 20"):
        UNet3D(width=2, depth=4)(torch.zeros(1, 1, *size))


def test_other_input_is_refused():
    with pytest.raises(ValueError, match="one voxel"):
        UNet3D(width=2, depth=4)(torch.zeros(1, 1, 8, 8, 8))
    with pytest.raises(ValueError, match="shape"):
        UNet3D(width=2, depth=2)(torch.zeros(1, 8, 8, 8))
    with pytest.raises(ValueError, match="at least 1"):
        UNet3D(depth=0)


def test_normalizes_each_image_alone_and_without_running_statistics():
    torch.manual_seed(0)
    model = UNet3D(width=4, depth=3)
    assert not list(model.buffers())
    images = torch.randn(2, 1, 8, 8, 8)
    together = model(images)
    alone = torch.cat([model(images[:1]), model(images[1:])])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    model.eval()
    torch.testing.assert_close(model(images), together)


def test_norm_equals_pytorchs_instance_norm():
    torch.manual_seed(0)
    norm = next(m for m in UNet3D(width=4, depth=1).modules() if isinstance(m, nn.GroupNorm))
    x = torch.randn(2, 4, 5, 6, 7)
    torch.testing.assert_close(norm(x), nn.InstanceNorm3d(4)(x), rtol=1e-4, atol=1e-5)


def test_skips_have_full_resolution():
    """With all that comes from below cut off, one voxel still moves its own logit."""
    torch.manual_seed(0)
    model = UNet3D(width=4, depth=2)
    for parameter in model.upsamplers.parameters():
        nn.init.zeros_(parameter)
    image = torch.randn(1, 1, 8, 8, 8, requires_grad=True)
    model(image)[0, 1, 3, 4, 5].backward()
    assert image.grad[0, 0, 3, 4, 5].abs() > 1e-4


def test_every_parameter_learns():
    torch.manual_seed(0)
    model = UNet3D(width=2, depth=3)
    model(torch.randn(2, 1, 8, 8, 8)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_channels_last_gives_the_same():
    torch.manual_seed(0)
    model, image = UNet3D(width=4, depth=3), torch.randn(2, 1, 16, 8, 8)
    expected = model(image)
    model.to(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-4)
