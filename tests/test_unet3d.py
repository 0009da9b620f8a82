"""The U-Net and its loss against ones written by hand, MONAI's and PyTorch's; refusals; formats."""

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss
from monai.networks.nets import BasicUNet
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from unet3d import InstanceNorm, UNet3D, memory_format, segmentation_loss


def randomized(model):
    """The model with weights that leave nothing out, such as norms of scale 1 and shift 0."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def by_hand(model, x):
    """The forward pass, by torch's functions and the model's weights in the order of the paper."""
    weights = dict(model.named_parameters())

    def block(x, name):
        for n in (0, 3):
            x = F.conv3d(x, weights[f"{name}.{n}.weight"], padding=1)
            scale, shift = (weights[f"{name}.{n + 1}.{part}"] for part in ("weight", "bias"))
            x = F.instance_norm(x, weight=scale, bias=shift, eps=1e-5)
            x = F.leaky_relu(x, 0.01)
        return x

    depth, skips = len(model.encoders), []
    for level in range(depth - 1):
        skips.append(block(x, f"encoders.{level}"))
        x = F.max_pool3d(skips[-1], kernel_size=2, stride=2)
    x = block(x, f"encoders.{depth - 1}")
    for level in range(depth - 2, -1, -1):
        up = (weights[f"upsamplers.{level}.{part}"] for part in ("weight", "bias"))
        x = torch.cat([skips[level], F.conv_transpose3d(x, *up, stride=2)], dim=1)
        x = block(x, f"decoders.{level}")
    return F.conv3d(x, weights["head.weight"], weights["head.bias"])


@pytest.mark.parametrize(
    ("depth", "size"), [(1, (5, 1, 3)), (2, (4, 6, 2)), (3, (8, 4, 12)), (4, (24, 8, 16))]
)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last_3d])
def test_equals_a_forward_pass_by_hand(depth, size, form):
    """In training and in eval mode, because it keeps only parameters."""
    model = randomized(UNet3D(in_channels=2, out_channels=3, width=4, depth=depth)).double()
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    expected = by_hand(model, x)
    assert expected.shape == (2, 3, *size)
    model.to(memory_format=form)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-9, atol=1e-9)
    assert not list(model.buffers())


def test_equals_monais_basic_unet():
    """MONAI's last upsampling has twice the channels: those that it has more get zero weights."""
    model = randomized(UNet3D(in_channels=2, out_channels=3, width=2, depth=5))
    act = ("LeakyReLU", {"negative_slope": 0.01})
    peer = BasicUNet(3, 2, 3, features=(2, 4, 8, 16, 32, 2), act=act, bias=False)
    ups = [part[level] for level in (3, 2, 1, 0) for part in (model.upsamplers, model.decoders)]
    ours = [w for part in (*model.encoders, *ups, model.head) for w in part.parameters()]
    for w, source in zip(peer.parameters(), ours, strict=True):
        nn.init.zeros_(w)
        w.data[tuple(map(slice, source.shape))] = source.detach()
    x = torch.randn(1, 2, 16, 16, 32)
    torch.testing.assert_close(model(x), peer(x), rtol=1e-4, atol=1e-3)


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


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 20, 16, 16), "divide by 8; axis D has 20"),
        ((1, 1, 16, 20, 16), "divide by 8; axis H has 20"),
        ((1, 1, 16, 16, 20), "divide by 8; axis W has 20"),
        ((1, 1, 8, 0, 8), "axis H has 0"),
        ((1, 1, 8, 8, 8), "the lowest level would be one voxel"),
        ((1, 8, 8, 8), r"shape \(B, C, D, H, W\), not \(1, 8, 8, 8\)"),
    ],
)
def test_other_input_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        UNet3D(width=2, depth=4)(torch.zeros(shape))


@pytest.mark.parametrize("name", ["in_channels", "out_channels", "width", "depth"])
def test_a_network_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match="at least 1"):
        UNet3D(**{name: 0})


def test_the_memory_format_is_the_devices():
    assert memory_format(torch.device("cpu")) == torch.channels_last_3d
    assert memory_format(torch.device("cuda", 1)) == torch.contiguous_format


@torch.no_grad()
def test_on_cuda_normalization_keeps_bfloat16_where_group_norm_would_not():
    """By PyTorch's fake tensors, which know devices, dtypes and memory formats, and need no GPU."""
    found = {}
    with FakeTensorMode(), torch.device("cuda"):
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            for kind in (InstanceNorm, nn.GroupNorm):
                x = torch.empty(2, 8, 4, 6, 5, dtype=torch.bfloat16)
                x = x.to(memory_format=torch.channels_last_3d)
                y = kind(8, 8)(x)
                found[kind] = (y.shape == x.shape, y.dtype, y.is_contiguous())
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert found == {
        InstanceNorm: (True, torch.bfloat16, True),
        nn.GroupNorm: (True, torch.float32, True),
    }


# ----------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_loss_and_gradient_equal_monais_dice_and_pytorchs_cross_entropy(batch, classes):
    """MONAI's Dice by batch, smoothed as here, leaves the background out."""
    generator = torch.Generator().manual_seed(batch)
    logits = torch.randn(batch, classes, 4, 5, 6, generator=generator).double().requires_grad_()
    labels = torch.randint(classes, (batch, 4, 5, 6), generator=generator)
    form = {"include_background": False, "to_onehot_y": True, "softmax": True, "batch": True}
    soft_dice = DiceLoss(**form, smooth_nr=1, smooth_dr=1)(logits, labels[:, None])
    for weight in (torch.ones(classes), torch.rand(classes, generator=generator)):
        loss = segmentation_loss(logits, (labels, None), weight.double())
        as_bytes = segmentation_loss(logits, (labels.to(torch.uint8), None), weight.double())
        assert torch.equal(as_bytes, loss)
        expected = soft_dice + F.cross_entropy(logits, labels, weight.double())
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        gradients = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected))
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_unlabelled_organs_are_merged_into_background():
    """The marginal loss is that of a network whose background has the unlabelled organ's share."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (4, 4, 4)).astype(np.uint8)  # liver or nothing; spleen unlabelled
    target = torch.tensor(labels)[None].long()
    logits = torch.randn(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()
    weight, known = torch.tensor([0.2, 0.7, 5.0]), torch.tensor([[True, True, False]])
    value = segmentation_loss(logits, (target, known), weight)
    p = logits.detach().softmax(1)
    merged = torch.stack([p[:, 0] + p[:, 2], p[:, 1]], dim=1).log()
    plain = segmentation_loss(merged, (target, None), weight[:2])
    assert value.item() == pytest.approx(plain.item(), rel=1e-5)
    value.backward()
    moved = logits.grad[:, [0, 2]]  # spleen is pushed exactly as background is
    ratio = moved[:, 1] / moved[:, 0]
    torch.testing.assert_close(ratio, (p[:, 2] / p[:, 0]), rtol=1e-3, atol=1e-4)


def test_a_loss_without_any_labelled_organ_is_the_cross_entropy_of_background():
    """What no hospital of the batch labels has no Dice; its probability is the background's."""
    logits = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    labels = torch.zeros(2, 4, 4, 4, dtype=torch.uint8)
    labelled = torch.tensor([[True, False, False]] * 2)
    loss = segmentation_loss(logits, (labels, labelled), torch.ones(3))
    assert loss.item() == pytest.approx(1.0, abs=1e-6)  # all is background: no error, no Dice
    loss.backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("weight", [[0.0, 0.0], [1.0, 0.0], [-1.0, 1.0], [float("nan"), 1.0]])
def test_weights_that_are_not_above_0_are_refused(weight):
    logits, labels = torch.zeros(1, 2, 2, 2, 2), torch.zeros(1, 2, 2, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="needs weights above 0"):
        segmentation_loss(logits, (labels, None), torch.tensor(weight))
