"""The loss of local training: cross-entropy + soft Dice, also where organs were never labelled.

Any network and any hospital's labels will do; this file needs torch alone:

    import torch
    from loss import segmentation_loss
    logits, labels = torch.randn(2, 3, 8, 8, 8), torch.randint(2, (2, 8, 8, 8))  # no label 2
    labelled = torch.tensor([[True, True, False]] * 2)  # since nobody looked for it
    print(segmentation_loss(logits, (labels, labelled), torch.ones(3)))
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def segmentation_loss(
    logits: Tensor, targets: tuple[Tensor, Tensor | None], weight: Tensor
) -> Tensor:
    """Cross-entropy + soft Dice over the organs: logits (B, classes, D, H, W) → scalar.

    targets: labels (B, D, H, W) and which organs each image's hospital labels, (B, classes), or
    None where all are. A voxel of an organ that was never labelled is background by its labels; so
    the probabilities of such organs are added to the background's first (the marginal loss, Shi et
    al. 2021, arXiv 2007.03868). weight: of each class in the cross-entropy.
    """
    labels, labelled = targets
    log_p = logits.log_softmax(dim=1)  # (B, classes, D, H, W)
    if labelled is not None:
        known = labelled[:, :, None, None, None]  # (B, classes, 1, 1, 1)
        merged = torch.cat([log_p[:, :1], log_p[:, 1:].masked_fill(known[:, 1:], -torch.inf)], 1)
        log_p = torch.cat([merged.logsumexp(dim=1, keepdim=True), log_p[:, 1:]], dim=1)
    p = log_p.exp() if labelled is None else log_p.exp() * known
    target = F.one_hot(labels, logits.shape[1]).movedim(-1, 1)  # (B, classes, D, H, W)
    overlap = (p * target).sum((0, 2, 3, 4))
    size = p.sum((0, 2, 3, 4)) + target.sum((0, 2, 3, 4))
    soft_dice = ((2 * overlap + 1) / (size + 1))[1:]
    counted = torch.ones_like(soft_dice) if labelled is None else labelled.any(dim=0)[1:]
    mean_dice = (soft_dice * counted).sum() / counted.sum()
    return F.nll_loss(log_p, labels, weight) + 1 - mean_dice
