"""Which text is paired with which image for image-text matching (paper section III-B, Eq. 6)."""

from typing import NamedTuple

import torch
from torch import Tensor

from common.distributed import all_gather_rows, rank
from common.errors import UserError
from common.randomness import KeyedGenerator
from common.types import ImageTextBatch


class Pairs(NamedTuple):
    """The pairs of a batch.

    Attributes:
        image: long ``(B,)``, which sample's image each text is shown.
        label: long ``(B,)``, 1 = its own.
        valid: bool ``(B,)``, False where no image of another sample is left to be shown.
    """

    image: Tensor
    label: Tensor
    valid: Tensor


def matching_pairs(keys: Tensor, images: Tensor) -> Pairs:
    """Pair ``B // 2`` texts with their own image and the others with a different one, without a host sync.

    The keys decide which half keeps its image. The other half's images are rotated by one in drawn order, past those
    that are the text's own image under another sample; where its half has none, an image of the first half serves. A
    batch of one keeps its image.

    Args:
        keys: int64 ``(B,)``, one per sample of the whole batch over all ranks.
        images: int64 ``(B,)``, equal where two samples have the same image.
    """
    total = len(keys)
    kept = max(total // 2, 1 if total == 1 else 0)
    order = KeyedGenerator(keys, "pairs").rand((total, 1))[:, 0].argsort(dim=0, stable=True)
    index = torch.arange(total, device=keys.device)
    label = torch.zeros_like(keys).index_fill_(0, order[:kept], 1)
    others = torch.cat([order[kept:], order[:kept]])  # the half without its image first
    count = total - kept
    if not count:
        return Pairs(index, label, torch.ones_like(keys, dtype=torch.bool))
    rows = torch.arange(count, device=keys.device)[:, None]
    turns = (rows + torch.arange(1, count, device=keys.device)) % count
    rest = torch.arange(count, total, device=keys.device).expand(count, -1)
    candidates = others[torch.cat([turns, rest], dim=1)]
    allowed = images[candidates] != images[others[:count], None]
    first = allowed.long().argmax(1, keepdim=True)
    image = index.index_copy(0, others[:count], candidates.gather(1, first)[:, 0])
    valid = torch.ones_like(keys, dtype=torch.bool).index_copy(0, others[:count], allowed.any(1))
    return Pairs(image, label, valid)


def shown_pairs(batch: ImageTextBatch, loaded: bool, sync: bool) -> tuple[Pairs, Tensor]:
    """Return who is shown what, and the images ``(B, C, H, W)`` that are shown.

    Args:
        batch: A batch.
        loaded: Whether the images that are not a text's own were loaded for it, else they are others of the batch.
        sync: Whether they come from the batches of all ranks.

    Raises:
        UserError: images are wanted that the data do not load.
    """
    if loaded and "negative_image" not in batch:
        raise UserError("model.itm_negatives is 'dataset', but the data load none: "
                        "set data.samples.negative_images=true.")  # fmt: skip
    keys, images = (all_gather_rows(x) if sync else x for x in (batch["key"], batch["image_key"]))
    pairs = matching_pairs(keys, torch.arange(len(keys), device=keys.device) if loaded else images)
    begin = rank() * len(batch["key"]) if sync else 0
    pairs = Pairs(*(part[begin : begin + len(batch["key"])] for part in pairs))
    if loaded:
        own = pairs.label.bool()[:, None, None, None]
        return pairs, torch.where(own, batch["image"], batch["negative_image"])
    return pairs, (all_gather_rows(batch["image"]) if sync else batch["image"])[pairs.image]
