"""The loss beside MONAI's Dice and PyTorch's cross-entropy, and where labels are partial."""

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss
from torch.nn import functional as F

from loss import segmentation_loss


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
