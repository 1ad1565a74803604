"""Segmentation loss over overlapping regions."""

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import Tensor, nn

from common.distributed import all_reduce_sum
from common.runtime.precision import at_least_float32


class RegionDiceBCE(nn.Module):
    """Soft Dice plus binary cross-entropy, one sigmoid per region, averaged over regions.

    MONAI's ``DiceCELoss(sigmoid=True)`` takes a softmax over the channels for its cross-entropy, which is wrong where
    regions overlap (a whole tumour contains its core); this takes both terms per region.

    Args:
        dice_weight: Weight of the Dice term.
        bce_weight: Weight of the cross-entropy.
    """

    def __init__(self, dice_weight: float = 1.0, bce_weight: float = 1.0) -> None:
        super().__init__()
        self.dice = DiceLoss(sigmoid=True, smooth_nr=1.0, smooth_dr=1.0)
        self.bce = nn.BCEWithLogitsLoss()
        self.dice_weight = dice_weight
        self.bce_weight = bce_weight

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compare logits ``(B, R, *space)`` with targets of the same shape, in float32."""
        logits = logits.float()
        return self.dice_weight * self.dice(logits, target) + self.bce_weight * self.bce(logits, target)


class BatchDiceBCE(nn.Module):
    """Dice over the whole batch plus binary cross-entropy, one sigmoid per region, averaged over regions (BrainMVP).

    The Dice term of a region is ``1 - (2 sum p y + 1) / (sum p^2 + sum y^2 + 1)`` with the sums over batch and space.
    Across ranks sums and counts are added before they are divided, with gradients.

    Args:
        dice_weight: Weight of the Dice term.
        bce_weight: Weight of the cross-entropy.
    """

    def __init__(self, dice_weight: float = 0.7, bce_weight: float = 0.3) -> None:
        super().__init__()
        self.dice_weight, self.bce_weight = dice_weight, bce_weight

    def forward(self, logits: Tensor, target: Tensor, sync: bool | None = None) -> Tensor:
        """Compare logits ``(B, R, *space)`` with targets of the same shape, in float32 (float64 stays).

        Args:
            logits: ``(B, R, *space)``.
            target: ``(B, R, *space)``, 0 or 1.
            sync: Whether to reduce over ranks; None does in training, where all ranks take the same steps.
        """
        with torch.autocast(logits.device.type, enabled=False):
            logits = at_least_float32(logits)
            target = target.to(logits)
            axes = (0, *range(2, logits.ndim))
            p = logits.sigmoid()
            entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(axes)
            sums = torch.stack([(p * target).sum(axes), (p.square() + target.square()).sum(axes), entropy])
            count = torch.full_like(sums[0, 0], logits[:, 0].numel())
            if self.training if sync is None else sync:
                sums, count = all_reduce_sum(sums), all_reduce_sum(count)
            both, squares, entropy = sums
            dice = 1 - (2 * both + 1) / (squares + 1)
            return (self.dice_weight * dice + self.bce_weight * entropy / count).mean()
