"""Segmentation loss over exclusive classes, with pixels that can be ignored.

Letters: B batch, K classes (0 is the background).
"""

import torch
from monai.losses import MaskedDiceLoss
from monai.networks import one_hot
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from common.distributed import all_reduce_sum
from common.runtime.precision import at_least_float32

#: Label of ignored pixels.
IGNORED = 255


class FocalDice(nn.Module):
    """Focal loss (Lin et al. 2017) plus soft Dice, as used by masked record modeling for pneumothorax.

    The focal term takes a sigmoid per class, with alpha for the class that is true and 1 - alpha for the others, and
    the mean over pixels and classes. The Dice term of a class is ``1 - (2 sum p t + 1) / (sum p^2 + sum t^2 + 1)`` with
    p from a softmax; those of the classes but the background are summed, divided by K, and averaged over samples. The
    published code leaves ignored pixels in the denominator; here they are in none.

    Across ranks sums and counts are added before they are divided, with gradients.

    Args:
        focal_weight: Weight of the focal term.
        dice_weight: Weight of the Dice term.
        gamma: Exponent of the focal term.
        alpha: Share of the true class in the focal term.
    """

    def __init__(
        self, focal_weight: float = 2.0, dice_weight: float = 1.0, gamma: float = 2.0, alpha: float = 0.5
    ) -> None:
        super().__init__()
        self.focal_weight, self.dice_weight = focal_weight, dice_weight
        self.gamma, self.alpha = gamma, alpha
        self.dice = MaskedDiceLoss(
            include_background=False, softmax=True, squared_pred=True, smooth_nr=1.0, smooth_dr=1.0, reduction="none"
        )

    def forward(self, logits: Tensor, label: Tensor, sync: bool = True) -> Tensor:
        """Compare logits with classes, in float32 (float64 stays).

        Args:
            logits: ``(B, K, H, W)``.
            label: ``(B, 1, H, W)``, a class or ``IGNORED``.
            sync: Whether to reduce over ranks.
        """
        with torch.autocast(logits.device.type, enabled=False):
            logits = at_least_float32(logits)
            classes = logits.shape[1]
            real = label != IGNORED
            target = one_hot(label.where(real, 0), classes, logits.dtype)
            focal = sigmoid_focal_loss(logits, target, self.alpha, self.gamma) * real
            dice = self.dice(logits, target, real)
            sums = torch.stack([focal.sum(), dice.sum()])
            counts = torch.stack([real.sum(), torch.full_like(real.sum(), len(logits))]) * classes
            if sync:
                sums, counts = all_reduce_sum(sums), all_reduce_sum(counts)
            focal_mean, dice_mean = sums / counts.clamp(min=1)
            return self.focal_weight * focal_mean + self.dice_weight * dice_mean
