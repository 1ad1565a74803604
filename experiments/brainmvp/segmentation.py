"""Segmentation with channels replaced by templates, deep supervision and consistency (BrainMVP's downstream recipe).

Letters: B batch, C channels, R regions, H W D space.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.blocks.registry import fits
from common.blocks.template_bank import crop_of, place_of
from common.blocks.uniformer import UniFormer3D
from common.checkpoint import StoredEncoder, read_encoder
from common.downstream.encoder import EncoderFactory
from common.downstream.segmentation import SegmentationModule, WindowMode
from common.errors import CheckpointError
from common.losses.region import BatchDiceBCE
from common.metrics import region_dice
from common.optim import OptimizerConfig
from common.randomness import KeyedGenerator
from common.runtime.reporting import print_line, write_rows
from common.types import InputSpec
from common.weights.channels import NewChannels
from experiments.brainmvp.export import normalized_templates
from experiments.brainmvp.segmentation_networks import segmenter

#: The template a channel uses if there is none under the channel's own name (MRBrainS13's T1-IR).
_TEMPLATE_OF = {"t1ir": "t1"}
#: Voxels along a side beyond any template's.
_LONGEST = 1024


def replaced_channels(keys: Tensor, channels: int, most: int = 3) -> Tensor:
    """Draw which channels of each sample are replaced, bool ``(B, C)``.

    Their number is uniform over 0 to ``most``, cut off at C - 1, so that one channel stays.

    Args:
        keys: ``(B,)`` int64, one per sample.
        channels: C.
        most: Highest number drawn.
    """
    generator = KeyedGenerator(keys)
    number = (generator.rand((len(keys), 1)) * (most + 1)).long().clamp(max=channels - 1)
    rank = generator.rand((len(keys), channels)).argsort(1).argsort(1)
    return rank < number


def augmented(
    keys: Tensor, images: Sequence[Tensor], label: Tensor, shift: float = 0.1, scale: float = 0.1
) -> tuple[list[Tensor], Tensor]:
    """Mirror along each axis with probability one half, and shift and scale intensities; all versions of a case alike.

    Args:
        keys: ``(B,)`` int64, one per sample.
        channels: C.
        images: Versions of the batch, each ``(B, C, H, W, D)``.
        label: ``(B, R, H, W, D)``.
        shift: Largest shift.
        scale: Largest relative change.
    """
    generator = KeyedGenerator(keys)
    draws = 2 * generator.rand((len(keys), 2)) - 1
    offset, factor = (draws[:, i, None, None, None, None].to(images[0]) for i in (0, 1))
    flips = generator.rand((len(keys), 3)) < 0.5
    versions = [image * (1 + scale * factor) + shift * offset for image in images]
    for axis in range(3):
        wanted = flips[:, axis, None, None, None, None]
        versions = [torch.where(wanted, x.flip(axis + 2), x) for x in versions]
        label = torch.where(wanted, label.flip(axis + 2), label)
    return versions, label


def subsets(channels: Sequence[str]) -> list[tuple[str, ...]]:
    """Return all sets of channels that may be there, but the empty one, largest first."""
    sizes = range(len(channels), 0, -1)
    return [names for size in sizes for names in itertools.combinations(channels, size)]


def templates_of(stored: StoredEncoder, channels: Sequence[str]) -> Tensor | None:
    """Return the templates of the given channels ``(C, H, W, D)``, 0 for unknown ones; None where there are none."""
    templates = normalized_templates(stored.rest)
    if templates is None:
        return None
    names = [_TEMPLATE_OF.get(name, name) for name in channels]
    known = stored.channels
    return torch.stack([templates[known.index(n)] if n in known else torch.zeros_like(templates[0]) for n in names])


class BrainSegmentation(SegmentationModule):
    """Fine-tunes on crops of which two versions have different channels replaced by templates.

    Decoder and templates come with the pre-trained encoder; templates stay as they are, and are 0 from scratch. An
    absent sequence is filled with its template, in training and in use. Testing adds ``missing_sequences.csv``: Dice
    of every region with every set of sequences.

    Args:
        pretrained: Run folder, checkpoint or export to start from; None trains from scratch.
        network: Makes the network from (encoder, regions).
        encoder: Makes the encoder from (channels, image size) where nothing is pre-trained.
        loss: Compares logits and targets ``(B, R, *space)``.
        replace: Most channels that are replaced; 0 replaces none and trains one version.
        consistency_weight: Weight of the squared difference between the two versions' quarter-resolution logits.
        augment: Whether to mirror crops and change their intensities.
        score_missing: Whether a test scores every set of sequences.
        overlap: Overlap of neighbouring windows.
        window_batch: Windows computed at once.
        window_mode: How overlapping windows are averaged: all voxels alike, or those in the middle of a window more.
        optimization: How the weights are updated.
        new_channels: How channels that the pre-trained encoder lacks are initialised: ``"mean"`` of those it has, or
            ``"fresh"``, at random.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        network: Callable[[Any, int], nn.Module] = segmenter,
        encoder: EncoderFactory = UniFormer3D,
        loss: nn.Module | None = None,
        replace: int = 3,
        consistency_weight: float = 0.1,
        augment: bool = True,
        score_missing: bool = True,
        overlap: float = 0.5,
        window_batch: int = 2,
        window_mode: WindowMode = "constant",
        optimization: OptimizerConfig = OptimizerConfig(),
        new_channels: NewChannels = "mean",
    ) -> None:
        super().__init__(
            pretrained,
            network,
            encoder,
            loss=loss or BatchDiceBCE(),
            overlap=overlap,
            window_batch=window_batch,
            window_mode=window_mode,
            optimization=optimization,
            new_channels=new_channels,
        )
        self.save_hyperparameters()
        self.replace, self.consistency_weight = replace, consistency_weight
        self.augment, self.score_missing = augment, score_missing

    def build_network(self, spec: InputSpec) -> nn.Module:
        """Make the network, and carry decoder and templates over."""
        resumed = self.state.encoder
        network: Any = super().build_network(spec)
        shape = None if resumed is None else resumed.get("templates")
        if not fits(shape, Sequence[int] | None) or (shape and (len(shape) != 3 or max(shape) > _LONGEST)):
            raise CheckpointError(f"The checkpoint's encoder record says that templates are {shape!r:.60}: it was "
                                  "not written by this project, or changed since.")  # fmt: skip
        # A single voxel of 0 represents no templates: beyond a template a view is 0.
        content = torch.zeros(len(spec.channels), *(shape or (1, 1, 1)))
        if self._pretrained and resumed is None:
            stored = read_encoder(self._pretrained)
            taken, found = network.take(stored.rest), templates_of(stored, spec.channels)
            templates = "no" if found is None else "yes"
            print_line(f"decoder from pre-training: {len(taken)} tensors; templates: {templates}")
            if found is not None:
                content, shape = found, list(found.shape[1:])
        self.state = self.state._replace(encoder={**(self.state.encoder or {}), "templates": shape})
        network.templates = nn.Parameter(content, requires_grad=False)
        return network

    def templates(self, places: Iterable[Sequence[int]], size: Sequence[int]) -> Tensor:
        """Return what the templates of all channels look like at the crops' places, ``(B, C, *size)``."""
        volume = self.network.templates
        starts = (place_of(0, place[:3], place[3:], volume.shape[1:])[1:] for place in places)
        return torch.stack([crop_of(volume, start, size) for start in starts])

    def inputs(self, batch: Any, present: Sequence[str] | None = None) -> Tensor:
        """Return the volumes ``(B, C, X, Y, Z)``, absent sequences filled with their templates.

        Args:
            batch: A batch.
            present: Sequences to pretend are the only ones there; None takes those that are.
        """
        image, there = batch["image"], batch["modality_mask"]
        if present is not None:
            wanted = [name in present for name in self.spec.channels]
            there = there & torch.tensor(wanted, device=there.device)
        views = self.templates(batch["place"], image.shape[2:]).to(image)
        return torch.where(there[..., None, None, None], image, views)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of both versions at all three resolutions, and their consistency (Lightning hook)."""
        keys, label = batch["key"], batch["label"]
        whole = self.inputs(batch)
        versions = [whole]
        if self.replace:
            views = self.templates(batch["place"], whole.shape[2:]).to(whole)
            count = whole.shape[1]
            masks = [replaced_channels(keys + 1 + version, count, self.replace) for version in (0, 1)]
            versions = [torch.where(mask[..., None, None, None], views, whole) for mask in masks]
        if self.augment:
            versions, label = augmented(keys, versions, label)
        outputs = self.network.deep(torch.cat(versions))
        target = label.repeat(len(versions), 1, 1, 1, 1)
        losses = {f"loss_level{level}": self.loss(logits, target) for level, logits in enumerate(outputs)}
        loss = torch.stack(list(losses.values())).sum()
        if len(versions) == 2 and self.consistency_weight:
            first, second = outputs[-1].float().chunk(2)
            losses["loss_consistency"] = F.mse_loss(first, second)
            loss = loss + self.consistency_weight * losses["loss_consistency"]
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=1)
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()}, batch_size=1)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Score one volume, with all its sequences and with every set of them (Lightning hook)."""
        first = len(self.rows)
        super().test_step(batch, batch_idx)
        if not self.score_missing:
            return
        for names in subsets(self.spec.channels):
            dice = region_dice(self.logits(self.inputs(batch, names)) > 0, batch["label"] > 0.5)
            for row, values in zip(self.rows[first:], dice.tolist(), strict=True):
                scores = dict(zip(self.regions, values, strict=True))
                row |= {f"with_{'+'.join(names)}_{region}": value for region, value in scores.items()}

    def further_scores(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return Dice by number of absent sequences, and write the table of all sets."""
        if not self.score_missing or not rows:
            return {}
        channels = list(self.spec.channels)
        table = []
        for names in subsets(channels):
            means = {region: sum(row[f"with_{'+'.join(names)}_{region}"] for row in rows) / len(rows)
                     for region in self.regions}  # fmt: skip
            table.append({"sequences": "+".join(names), "absent": len(channels) - len(names), "n": len(rows),
                          **{f"dice_{region}": value for region, value in means.items()},
                          "dice": sum(means.values()) / len(means)})  # fmt: skip
        if self.trainer.is_global_zero:
            path = Path(self.trainer.default_root_dir) / "missing_sequences.csv"
            write_rows(path, table)
            print_line(f"Dice by set of sequences, absent ones filled with their templates: {path}")
            for line in table:
                scores = ", ".join(f"{region} {100 * line[f'dice_{region}']:.1f}" for region in self.regions)
                print_line(f"  {line['sequences']}: {scores}")
        return _by_absent(table)


def _by_absent(table: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean Dice over all sets with equally many absent sequences, each under ``mean``."""
    groups: dict[int, list[float]] = {}
    for line in table:
        groups.setdefault(line["absent"], []).append(line["dice"])
    return {f"dice_absent_{count}": {"mean": sum(values) / len(values)} for count, values in groups.items()}
