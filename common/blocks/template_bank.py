"""One learnable volume per sequence type, of the whole atlas, that crops look at (BrainMVP, modality templates).

Letters: S sequence types, B crops. A *place* is what a crop looks at: ``(type, x, y, z)`` with the first voxel of the
crop in the atlas, as Python integers, so that nothing waits for the accelerator.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from common.distributed import all_gather_rows, all_reduce_sum, control_group, world_size
from common.runtime.reporting import say

Place = tuple[int, int, int, int]
Box = tuple[slice, slice, slice]
#: How gradients of crops travel: those of all ranks as they are (``exact``) or in bfloat16 (``compact``), or added up
#: in whole templates in bfloat16 (``dense``), which has one size however many ranks there are.
Exchange = Literal["exact", "compact", "dense"]
#: Bytes of a step up to which the gradients of all ranks' crops travel as they are.
EXACT_BYTES = 32 << 20


class _Seen(NamedTuple):
    """A crop that was viewed: its place, and the leaf tensor that receives its gradient."""

    place: Place
    leaf: Tensor


def place_of(index: int, start: Sequence[int], volume: Sequence[int], atlas: Sequence[int]) -> Place:
    """Return the place of a crop of a volume that was cut symmetrically about the atlas's centre.

    ``floor((atlas - volume) / 2) + start`` per axis; negative where the volume is larger than the atlas.

    Args:
        index: Sequence type.
        start: First voxel of the crop in the volume.
        volume: Voxels of the volume.
        atlas: Voxels of the atlas.
    """
    x, y, z = ((size - dim) // 2 + first for size, dim, first in zip(atlas, volume, start, strict=True))
    return index, x, y, z


def _overlap(start: Sequence[int], size: Sequence[int], shape: Sequence[int]) -> tuple[Box, Box]:
    """Return where a crop meets a volume: the box in the volume and the same box in the crop."""
    low = [min(max(s, 0), n) for s, n in zip(start, shape, strict=True)]
    high = [max(min(s + c, n), a) for s, c, n, a in zip(start, size, shape, low, strict=True)]
    x, y, z = (slice(a, b) for a, b in zip(low, high, strict=True))
    i, j, k = (
        slice(min(max(a - s, 0), c), min(max(b - s, 0), c)) for a, b, s, c in zip(low, high, start, size, strict=True)
    )
    return (x, y, z), (i, j, k)


def crop_of(volume: Tensor, start: Sequence[int], size: Sequence[int]) -> Tensor:
    """Cut a crop from the last three axes of ``(..., H, W, D)``; beyond the volume it is 0."""
    shape = volume.shape[-3:]
    (x, y, z), within = _overlap(start, size, shape)
    piece = volume[..., x, y, z]
    padding = [edge for part, n in zip(reversed(within), reversed(size), strict=True)
               for edge in (part.start, n - part.stop)]  # fmt: skip
    return nn.functional.pad(piece, padding) if any(padding) else piece


class TemplateBank(nn.Module):
    """Templates, with an Adam that updates only the voxels that crops have viewed.

    Templates start at exactly 0 and stay in float32. A view is ``(T - min T) / max(max T - min T, 1e-3)``: the extremes
    are those of the whole template and carry no gradient, and the floor keeps the gradient finite while a template is
    still flat (divided by a range of 0 + 1e-9 it would be a billion times too large, and every voxel that ties for an
    extreme would get some). Beyond the atlas a view is 0.

    As dense parameters, templates would cost an all-reduce and an optimiser step over every voxel of every type at
    each step. Here a crop is a leaf of its own: :meth:`step` gathers the crops of all ranks, adds up what overlaps, and
    updates these voxels alone, with the moments and the bias correction of the steps in which each voxel was seen, and
    without weight decay. The optimiser's state is part of the module's.

    Args:
        num_templates: S.
        shape: Voxels of the atlas.
        betas: Adam's.
        eps: Adam's.
    """

    #: Range below which a template is not stretched to [0, 1].
    MIN_RANGE = 1e-3

    def __init__(
        self,
        num_templates: int,
        shape: Sequence[int],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        self.shape, self.betas, self.eps = tuple(shape), betas, eps
        size = (num_templates, *self.shape)
        # Parameters without gradient and no buffers: DDP would broadcast buffers at every step.
        self.weight = nn.Parameter(torch.zeros(size), requires_grad=False)
        self.mean = nn.Parameter(torch.zeros(size), requires_grad=False)
        self.square = nn.Parameter(torch.zeros(size), requires_grad=False)
        self.count = nn.Parameter(torch.zeros(size, dtype=torch.int32), requires_grad=False)
        self.extremes = nn.Parameter(torch.zeros(num_templates, 2), requires_grad=False)
        self._seen: list[_Seen] = []
        self._said = False

    def range(self) -> Tensor:
        """Return max - min of every template, ``(S,)``."""
        return self.extremes[:, 1] - self.extremes[:, 0]

    def view(self, places: Sequence[Place], size: Sequence[int], track: bool = False) -> Tensor:
        """Return what crops of ``size`` see, ``(B, 1, *size)``.

        Args:
            places: One per crop.
            size: Voxels of a crop.
            track: Whether gradients are kept for :meth:`step`.
        """
        scale = self.range().clamp(min=self.MIN_RANGE)
        views = []
        for place in places:
            index, *start = place
            inside, within = _overlap(start, size, self.shape)
            leaf = self.weight[(index, *inside)].detach().clone()
            if track:
                leaf.requires_grad_()
                self._seen.append(_Seen(place, leaf))
            scaled = (leaf - self.extremes[index, 0]) / scale[index]
            if leaf.shape != tuple(size):
                padding = [edge for part, n in zip(reversed(within), reversed(size), strict=True)
                           for edge in (part.start, n - part.stop)]  # fmt: skip
                scaled = nn.functional.pad(scaled, padding)
            views.append(scaled)
        return torch.stack(views)[:, None]

    def normalized(self) -> Tensor:
        """Return all templates, each stretched to [0, 1], ``(S, *shape)``."""
        low = self.extremes[:, 0, None, None, None]
        return (self.weight - low) / self.range().clamp(min=self.MIN_RANGE)[:, None, None, None]

    def forget(self) -> None:
        """Discard the crops viewed since the last step."""
        self._seen = []

    @torch.no_grad()
    def step(self, lr: float, size: Sequence[int], hold: Tensor | None = None) -> Tensor:
        """Update the voxels viewed since the last step; all ranks must call it with the same number of crops.

        The gradient is the mean over ranks, as DDP takes it for all other weights. A crop's gradient that is not finite
        keeps the whole of the template that it looked at as it is.

        Args:
            lr: Learning rate.
            size: Voxels of a crop.
            hold: 1 where all templates are to stay as they are, else 0, on the device.

        Returns:
            1 if a gradient was not finite, else 0, on the device: the same on all ranks.
        """
        places = [entry.place for entry in self._seen]
        gradients = [self._whole(entry, size) for entry in self._seen]
        self.forget()
        held_back = self.weight.new_zeros(())
        if not places:
            return held_back
        exchange = self._exchange(len(places), size)
        if exchange == "dense":
            every, summed = _all_places(places), self._sum_over_ranks(places, gradients)
            crops = _by_template(every, [crop_of(summed[place[0]], place[1:], size) for place in every])
        else:
            crops = _by_template(*_of_all_ranks(places, torch.stack(gradients), exchange == "compact"))
            summed = None
        for index, members in crops.items():
            whole = None if summed is None else summed[index]
            held_back = torch.maximum(held_back, self._update(index, members, lr, hold, whole))
        return held_back

    def _exchange(self, crops: int, size: Sequence[int]) -> Exchange:
        """Choose how gradients travel, and say so where they lose digits."""
        values = world_size() * crops * math.prod(size)
        if world_size() == 1 or values * self.weight.element_size() <= EXACT_BYTES:
            return "exact"
        chosen: Exchange = "dense" if 2 * self.weight.numel() < values else "compact"
        if not self._said:
            what = "sums over whole templates" if chosen == "dense" else "crops of all ranks"
            say(f"templates: gradients travel in bfloat16, as {what}")
        self._said = True
        return chosen

    def _sum_over_ranks(self, places: Sequence[Place], gradients: Sequence[Tensor]) -> Tensor:
        """Return the gradients of all ranks added up in whole templates, ``(S, *shape)``: of a rank in float32."""
        local = torch.zeros_like(self.weight)
        for (index, *start), gradient in zip(places, gradients, strict=True):
            inside, within = _overlap(start, gradient.shape, self.shape)
            local[(index, *inside)] += gradient[within]
        return all_reduce_sum(local.bfloat16()).to(local.dtype)

    def _whole(self, entry: _Seen, size: Sequence[int]) -> Tensor:
        """Return the gradient of a crop at its full size, 0 beyond the atlas."""
        gradient = torch.zeros_like(entry.leaf) if entry.leaf.grad is None else entry.leaf.grad
        if gradient.shape == tuple(size):
            return gradient
        whole = gradient.new_zeros(tuple(size))
        whole[_overlap(entry.place[1:], size, self.shape)[1]] = gradient
        return whole

    def _update(
        self,
        index: int,
        crops: Sequence[tuple[Place, Tensor]],
        lr: float,
        hold: Tensor | None = None,
        summed: Tensor | None = None,
    ) -> Tensor:
        """Take one step of Adam at the voxels of one template that crops looked at; return 1 if it was not finite.

        With ``summed``, ``(*shape)``, the gradients are added up already.
        """
        boxes = [_overlap(place[1:], gradient.shape, self.shape) for place, gradient in crops]
        edges = [(min(box[axis].start for box, _ in boxes), max(box[axis].stop for box, _ in boxes))
                 for axis in range(3)]  # fmt: skip
        x, y, z = (slice(low, high) for low, high in edges)
        weight, mean, square, count = (
            part[index, x, y, z] for part in (self.weight, self.mean, self.square, self.count)
        )
        gradient = torch.zeros_like(weight)
        seen = torch.zeros_like(weight, dtype=torch.bool)
        for (inside, within), (_, part) in zip(boxes, crops, strict=True):
            local = tuple(slice(a.start - low, a.stop - low) for a, (low, _) in zip(inside, edges, strict=True))
            if summed is None:
                gradient[local] += part[within] / world_size()
            seen[local] = True
        if summed is not None:
            gradient += summed[x, y, z] / world_size()
        finite = torch.isfinite(gradient).all()
        seen &= finite if hold is None else finite & (hold == 0)
        count += seen
        steps = count.to(weight.dtype)
        first, second = self.betas
        mean.copy_(torch.where(seen, mean.lerp(gradient, 1 - first), mean))
        square.copy_(torch.where(seen, square.lerp(gradient.square(), 1 - second), square))
        corrected = mean / (1 - first**steps)
        change = corrected / ((square / (1 - second**steps)).sqrt() + self.eps)
        weight -= torch.where(seen, lr * change, 0.0)
        self.extremes[index, 0], self.extremes[index, 1] = self.weight[index].aminmax()
        return finite.logical_not().to(weight.dtype)


def _by_template(places: Sequence[Place], gradients: Sequence[Tensor]) -> dict[int, list[tuple[Place, Tensor]]]:
    crops: dict[int, list[tuple[Place, Tensor]]] = {}
    for place, gradient in zip(places, gradients, strict=True):
        crops.setdefault(place[0], []).append((place, gradient))
    return crops


def _of_all_ranks(places: list[Place], gradients: Tensor, compact: bool) -> tuple[list[Place], list[Tensor]]:
    """Return the crops of all ranks, in rank order; every rank has equally many."""
    if world_size() == 1:
        return places, list(gradients)
    joined = _all_places(places)
    every = all_gather_rows(gradients.bfloat16() if compact else gradients)
    return joined, list(every.to(gradients.dtype))


def _all_places(places: list[Place]) -> list[Place]:
    rows = all_gather_rows(torch.tensor(places), control_group()).tolist()
    return [(int(s), int(x), int(y), int(z)) for s, x, y, z in rows]
