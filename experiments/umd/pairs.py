"""Which text is paired with which image for image-text matching (paper section III-B, Eq. 6)."""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from common.distributed import all_gather_rows, control_group, exchange_rows, rank, world_size
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


class Route(NamedTuple):
    """The pairs of a batch over all ranks, and the images that travel for them; plain numbers, known on the host.

    Attributes:
        label: Of this rank's texts, as in :class:`Pairs`.
        valid: Likewise.
        place: Where the image of each of its texts is among its own images and those that it receives.
        send: Which of its images each rank is to have.
        receive: How many images each rank sends.
    """

    label: list[int]
    valid: list[bool]
    place: list[int]
    send: list[list[int]]
    receive: list[int]


def make_route(keys: Tensor, images: Tensor, rank: int, world: int) -> Route:
    """Find out which images travel: those that a text is shown and its rank does not hold.

    Args:
        keys: As :func:`matching_pairs`, on the CPU.
        images: Likewise.
        rank: This rank.
        world: Number of ranks, which hold equally many samples each, in order.
    """
    pairs = matching_pairs(keys, images)
    size = len(keys) // world
    shown = pairs.image.view(world, size).tolist()

    def wanted(by: int, of: int) -> list[int]:
        return [image - of * size for image in shown[by] if image // size == of]

    others = [other for other in range(world) if other != rank]
    receive = {other: wanted(rank, other) for other in others}
    offsets = dict(zip(others, accumulate((len(receive[other]) for other in others), initial=size), strict=False))
    place = []
    for image in shown[rank]:
        holder, local = divmod(image, size)
        place.append(local if holder == rank else offsets[holder])
        if holder != rank:
            offsets[holder] += 1
    mine = slice(rank * size, (rank + 1) * size)
    return Route(
        pairs.label[mine].tolist(),
        pairs.valid[mine].tolist(),
        place,
        [wanted(other, rank) if other != rank else [] for other in range(world)],
        [len(receive.get(other, ())) for other in range(world)],
    )


def gather_route(batch: ImageTextBatch) -> Route:
    """Exchange the keys of a batch that is still on the host, and return its route."""
    keys, images = (all_gather_rows(batch[name].cpu(), control_group()) for name in ("key", "image_key"))
    return make_route(keys, images, rank(), world_size())


def _travelled(batch: ImageTextBatch, route: Route) -> tuple[Pairs, Tensor]:
    """Return this rank's pairs and the images that its texts are shown, in the precision that the encoder takes."""
    image = batch["image"]
    if torch.is_autocast_enabled(image.device.type):
        image = image.to(torch.get_autocast_dtype(image.device.type))  # which its first layer would do
    place, label = (torch.tensor(x, device=image.device) for x in (route.place, route.label))
    pairs = Pairs(place, label, torch.tensor(route.valid, device=image.device))
    return pairs, torch.cat([image, exchange_rows(image, route.send, route.receive)])[place]


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
    if sync and not loaded and world_size() > 1:
        return _travelled(batch, batch.get("route") or gather_route(batch))
    keys, images = (all_gather_rows(x) if sync else x for x in (batch["key"], batch["image_key"]))
    pairs = matching_pairs(keys, torch.arange(len(keys), device=keys.device) if loaded else images)
    begin = rank() * len(batch["key"]) if sync else 0
    pairs = Pairs(*(part[begin : begin + len(batch["key"])] for part in pairs))
    if loaded:
        own = pairs.label.bool()[:, None, None, None]
        return pairs, torch.where(own, batch["image"], batch["negative_image"])
    return pairs, batch["image"][pairs.image]
