"""What relation masking does, and the baselines for a reconstruction that hides nothing.

Letters: B batch, N patches, P values of a patch, F features of a genome, E width.
"""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from common.blocks.attention import Relations
from common.callbacks.floor_ratio import TargetMean
from common.callbacks.validation import ValidationCallback
from common.distributed import broadcast_object, gather_objects, reduce_sums
from common.losses.reconstruction import masked_error
from common.losses.relation import sample_relations
from common.module import SSLModule
from common.runtime.reporting import log_figure, log_scalars
from common.types import Reconstruction


class SumsCallback(ValidationCallback):
    """Collects sums and counts by name over a validation, and logs their ratios over all ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset for a new validation (Lightning hook)."""
        self._sums = {}

    def add(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """Add a sum and how many terms it has."""
        pair = torch.stack([total.double(), torch.as_tensor(count, dtype=torch.float64, device=total.device)])
        self._sums.setdefault(name, []).append(pair)

    def means(self) -> dict[str, float]:
        """Return sum over count of each name, over all ranks."""
        sums = {name: torch.stack(pairs).sum(0).tolist() for name, pairs in self._sums.items()}
        return reduce_sums({name: (total, count) for name, (total, count) in sums.items() if count})


class PatchMeanOracle(SumsCallback):
    """Logs ``collapse/patch_mean_ratio``: the error of every patch painted in its own mean colour, over the floor's.

    A reconstruction that is worse than this has learned nothing but colours. The floor is that of
    ``collapse/floor_ratio``: the mean training image, on the same patches.
    """

    def __init__(self) -> None:
        super().__init__()
        self._constant: Tensor | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the mean training image once (Lightning hook)."""
        super().on_validation_start(trainer, pl_module)
        if self._constant is None and isinstance(pl_module, SSLModule):
            mean = TargetMean()
            for batch in trainer.datamodule.reference_samples(256):  # type: ignore[attr-defined]
                mean.update(*pl_module.reconstruction_target(batch))
            self._constant = mean.value().to(pl_module.device)

    def observe(self, trainer: pl.Trainer, module: SSLModule, output: Reconstruction, batch: Any) -> None:
        """Add one batch."""
        assert self._constant is not None
        channels = batch["image"].shape[1]
        target = output.target
        colour = target.unflatten(-1, (channels, -1)).mean(-1, keepdim=True)
        painted = colour.expand(*target.shape[:-1], channels, target.shape[-1] // channels).flatten(-2)
        self.add("painted", *masked_error(painted, target, output.mask))
        self.add("floor", *masked_error(self._constant.expand_as(target), target, output.mask))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the ratio (Lightning hook)."""
        means = self.means()
        if "floor" in means:
            ratio = means["painted"] / max(means["floor"], 1e-12)
            log_scalars(pl_module, {"collapse/patch_mean_ratio": ratio})


def principal_components(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean ``(F,)`` and the first principal axes ``(count, F)`` of people ``(P, F)``, in float32.

    The decomposition is randomised (Halko et al. 2011) with a fixed seed: on 3,000 people with 27,000 features it
    finds the exact one's axes at an eleventh of its cost, which grows with the cube of the people.
    """
    mean = values.mean(0, dtype=np.float64).astype(np.float32)
    centred = values - mean
    _, _, axes = randomized_svd(centred, min(count, *centred.shape), n_oversamples=10, n_iter=4, random_state=0)
    return mean, axes


class GenomeFloor(SumsCallback):
    """Logs ``collapse/genome_floor_ratio``: the error of reconstructed genetics over that of the training mean.

    Beside it ``collapse/genome_pc_ratio``, the error of the people's own genetics projected on principal components of
    the training people: what knowing the ancestry alone explains. Both are over people not trained on, and features
    that were observed. Methods and archives without genetics log neither. Rank 0 fits the axes and broadcasts them.

    Args:
        components: Principal components.
        max_persons: Training people to fit them on, drawn by a hash of their names. 2,000 explain all but 0.03 % of
            what 3,000 do.
    """

    def __init__(self, components: int = 2, max_persons: int = 2000) -> None:
        super().__init__()
        self.components, self.max_persons = components, max_persons
        self._fitted: tuple[Tensor, Tensor] | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fit once, all ranks together, whether or not they have validation samples (Lightning hook)."""
        super().on_validation_start(trainer, pl_module)
        known = getattr(trainer.datamodule, "genome", None) is not None  # type: ignore[attr-defined]
        if self._fitted is None and known and hasattr(pl_module, "reconstruct_genome"):
            fitted: tuple[np.ndarray, np.ndarray] | None = None
            if trainer.is_global_zero:
                values = trainer.datamodule.training_genomes(self.max_persons)  # type: ignore[attr-defined]
                fitted = principal_components(values, self.components)
            mean, axes = broadcast_object(fitted)
            self._fitted = torch.from_numpy(mean).to(pl_module.device), torch.from_numpy(axes).to(pl_module.device)

    def observe(self, trainer: pl.Trainer, module: SSLModule, output: Reconstruction, batch: Any) -> None:
        """Add one batch."""
        if "genome" not in batch or self._fitted is None:
            return
        pred, target, observed = module.reconstruct_genome(batch)  # type: ignore[operator]
        if pred is None:
            return
        mean, axes = self._fitted
        projected = mean + (target - mean) @ axes.T @ axes
        for name, guess in (("loss", pred), ("pc", projected), ("floor", mean.expand_as(target))):
            self.add(name, *masked_error(guess[..., None], target[..., None], observed))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the ratios (Lightning hook)."""
        means = self.means()
        if "floor" in means:
            floor = max(means["floor"], 1e-12)
            scalars = {"genome_floor_ratio": means["loss"] / floor, "genome_pc_ratio": means["pc"] / floor}
            log_scalars(pl_module, {f"collapse/{name}": value for name, value in scalars.items()})


class RelationMass(SumsCallback):
    """Logs how much of each masked relation is removed, and how much of a row's weight is left.

    ``relation/zeroed_fraction_<name>`` is the share of entries removed, floor(tau n) / n without ties, and
    ``relation/kept_mass_<name>`` the mean sum of what is kept of a row. Names are ``image_self``, ``genome_self``,
    ``image_cross`` (rows of the image, columns of the genome), ``genome_cross``, and for images alone
    ``image_self_second``.
    """

    def observe(self, trainer: pl.Trainer, module: SSLModule, output: Reconstruction, batch: Any) -> None:
        """Add one batch."""
        for name, relations in _relations(module, batch).items():
            # Columns that are not real keys have no weight; they are neither removed nor kept.
            real = relations.weights > 0
            self.add(f"zeroed_fraction_{name}", (real & ~relations.keep).sum(), real.sum())
            kept = relations.weights.masked_fill(~relations.keep, 0).sum(-1)
            self.add(f"kept_mass_{name}", kept.sum(), kept.numel())

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the means (Lightning hook)."""
        log_scalars(pl_module, {f"relation/{name}": value for name, value in self.means().items()})


def _relations(module: Any, batch: Any) -> dict[str, Relations]:
    return module.relations(batch) if hasattr(module, "relations") else {}


class SampleRelations(ValidationCallback):
    """Draws the relations between validation samples, intact and masked, and logs how alike samples are.

    ``relation/samples`` shows the cosines of images, of genomes and of images with genomes, of the intact pass above
    and the masked one below. ``collapse/cosine_mean`` and ``collapse/cosine_std`` are over pairs of different images:
    relation matching can be satisfied by making all of them alike, which drives the mean to 1 and the spread to 0.

    Args:
        max_samples: Samples to use.
    """

    def __init__(self, max_samples: int = 64) -> None:
        self.max_samples = max_samples
        self._vectors: list[dict[str, Tensor]] = []

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset for a new validation (Lightning hook)."""
        self._vectors = []

    def observe(self, trainer: pl.Trainer, module: SSLModule, output: Reconstruction, batch: Any) -> None:
        """Collect the vectors of a batch."""
        share = -(-self.max_samples // trainer.world_size)
        seen = sum(len(part["image"]) for part in self._vectors)
        if hasattr(module, "pooled") and seen < share:
            vectors = module.pooled(batch)  # type: ignore[operator]
            self._vectors.append({name: x[: share - seen].float().cpu() for name, x in vectors.items()})

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the cosines and the picture (Lightning hook)."""
        parts = [part for rank in gather_objects(self._vectors) for part in rank]
        if not parts:
            return
        vectors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        cosines = sample_relations(vectors["image"], vectors["image"])
        others = cosines[~torch.eye(len(cosines), dtype=torch.bool)]
        if len(others):
            scalars = {"collapse/cosine_mean": float(others.mean()), "collapse/cosine_std": float(others.std())}
            log_scalars(pl_module, scalars)
        if trainer.is_global_zero:
            log_figure(trainer, "relation/samples", relations_figure(vectors))


def relations_figure(vectors: dict[str, Tensor]) -> Figure:
    """Draw the cosines between samples: a column per pair of modalities, a row per pass."""
    pairs = [("image", "image")]
    if "genome" in vectors:
        pairs += [("genome", "genome"), ("image", "genome")]
    passes = [("intact", ""), ("masked", "_masked")]
    passes = [(title, end) for title, end in passes if f"image{end}" in vectors]
    figure = Figure(figsize=(3.2 * len(pairs), 3.2 * len(passes)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(passes), len(pairs), squeeze=False))
    for row, (title, end) in enumerate(passes):
        for column, (one, other) in enumerate(pairs):
            cosines = sample_relations(vectors[one + end], vectors[other + end])
            shown = axes[row, column].imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
            axes[row, column].set(title=f"{one}, {other}: {title}", xticks=[], yticks=[])
            figure.colorbar(shown, ax=axes[row, column], shrink=0.7)
    return figure


class AttentionMaps(ValidationCallback):
    """Draws what the class token attends to in the first block, before and after masking: ``relation/attention``.

    Methods and encoders without a class token draw the mean over all rows.

    Args:
        num_samples: Images to draw.
    """

    def __init__(self, num_samples: int = 4) -> None:
        self.num_samples = num_samples
        self._drawn: list[tuple[str, Tensor, Tensor, Tensor]] = []

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset for a new validation (Lightning hook)."""
        self._drawn = []

    def observe(self, trainer: pl.Trainer, module: SSLModule, output: Reconstruction, batch: Any) -> None:
        """Keep the maps of the first samples of rank 0."""
        if not trainer.is_global_zero or len(self._drawn) >= self.num_samples:
            return
        relations = _relations(module, batch).get("image_self")
        encoder = module.network.encoder
        patches = encoder.patch_embed.num_patches
        if relations is None or relations.weights.shape[-1] != encoder.num_prefix_tokens + patches:
            return
        prefix = encoder.num_prefix_tokens
        rows = slice(0, 1) if prefix else slice(None)
        kept = relations.weights.masked_fill(~relations.keep, 0)
        maps = [x[:, :, rows, prefix:].mean((1, 2)).unflatten(1, encoder.grid_size) for x in (relations.weights, kept)]
        images = module.unit(batch["image"])  # type: ignore[operator]
        for index in range(min(len(images), self.num_samples - len(self._drawn))):
            picture = images[index].permute(1, 2, 0)
            self._drawn.append((batch["subject_id"][index], picture.cpu(), maps[0][index].cpu(), maps[1][index].cpu()))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Send the picture to the loggers (Lightning hook)."""
        if self._drawn:
            log_figure(trainer, "relation/attention", attention_figure(self._drawn))


def attention_figure(rows: list[tuple[str, Tensor, Tensor, Tensor]]) -> Figure:
    """Draw a row an image: itself, and over it the attention before masking and what is kept of it, on one scale."""
    figure = Figure(figsize=(7.5, 2.4 * len(rows) + 0.4), layout="constrained")
    figure.suptitle("attention to each patch, first block, mean of heads; bright = much, dark = none", fontsize=10)
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for row, (name, image, before, after) in enumerate(rows):
        top = float(before.max())
        height, width = image.shape[:2]
        for column, (title, weights) in enumerate(
            ((f"{name}: image", None), ("before masking", before), ("kept", after))
        ):
            cell = axes[row, column]
            pixels = image if weights is None else image.mean(-1)
            cell.imshow(pixels.float().numpy(), vmin=0, vmax=1, cmap="gray", interpolation="nearest")
            if weights is not None:
                edges = (-0.5, width - 0.5, height - 0.5, -0.5)
                style = {"vmin": 0, "vmax": top, "cmap": "magma", "alpha": 0.6, "interpolation": "nearest"}
                cell.imshow(weights.float().numpy(), extent=edges, **style)
            cell.set(title=title, xticks=[], yticks=[])
    return figure
