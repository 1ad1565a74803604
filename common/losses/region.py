"""Segmentation loss over overlapping regions."""

from monai.losses import DiceLoss
from torch import Tensor, nn


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
