"""Brain MRI of one or many sources for BrainMVP's pre-training: crops of two sequences of one study.

Letters: S canonical sequences, H W D space.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from common.blocks.template_bank import place_of
from common.errors import DataError
from common.modalities import TEMPLATES, canonical_name
from common.pseudonyms import pseudonym, public_name
from common.randomness import numpy_generator, stable_hash
from common.runtime.reporting import print_line
from datamodules.base import ArchiveDataModule
from datamodules.brain.archive import BrainArchiveDataModule
from datamodules.controls import read_control
from datamodules.loading import Draw
from datamodules.volumes.cache import OpenCase
from datamodules.volumes.cases import Case, Layout
from datamodules.volumes.crops import cut, to_tensor
from datamodules.volumes.datamodule import Domain, VolumeDataset
from datamodules.volumes.profiles import ATLAS

#: Further passes over the training cases would not improve the floor's constant.
_MAX_REFERENCE_DRAWS = 64


class PairDataset(VolumeDataset):
    """Crops of one sequence of a study, with another there; see :class:`common.types.SequencePairBatch`.

    The target is drawn uniformly from the study's sequences, its partner uniformly from the others. Validation takes
    the targets in turn, so that a few crops cover all of them.

    Args:
        atlas: Voxels of the atlas.
        lesions: Whether samples include the lesion mask.
        *args: As :class:`VolumeDataset`.
        **options: As :class:`VolumeDataset`.
    """

    def __init__(self, *args: Any, atlas: Sequence[int] = ATLAS, lesions: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.atlas, self.lesions = tuple(atlas), lesions

    def read(self, draw: Draw) -> dict[str, Any]:
        """Return one sample; see :class:`common.types.SequencePairBatch`.

        Raises:
            SampleFaultError: the study has no usable sequence.
        """
        case = self.cases[draw.index]
        opened = self.store.open(case)
        generator = numpy_generator("crop", *self.draw_key(draw, self.domain == "train"))
        start, size = self._place(opened, generator)
        target, partner = self._choose(opened, draw, generator)
        sample: dict[str, Any] = {
            **self._pair(opened, start, target, partner, ""),
            "modality": _index(opened, target),
            "partner_modality": _index(opened, target if partner is None else partner),
            "place": place_of(_index(opened, target), start, opened.image.shape[-3:], self.atlas),
            "key": torch.tensor(stable_hash("mask", *self.draw_key(draw, self.domain == "train"))),
            "subject_id": pseudonym(case.case_id) if self.anonymise else case.case_id,
            "faults": opened.record.image_faults(),
        }
        if self.lesions:
            label = np.zeros(size, bool) if opened.label is None else cut(opened.label, start, size) > 0
            sample["lesion"] = torch.from_numpy(label)[None]
        if self.controls is not None:
            sample |= self._other_patient(case, draw, target_name=opened.record.modalities[target])
        return sample

    def _choose(self, opened: OpenCase, draw: Draw, generator: np.random.Generator) -> tuple[int, int | None]:
        """Choose target and partner among the usable channels."""
        usable = np.flatnonzero(opened.record.modality_mask)
        first = generator.integers(len(usable)) if self.domain == "train" else draw.draw % len(usable)
        others = np.delete(usable, first)
        partner = int(others[generator.integers(len(others))]) if len(others) else None
        return int(usable[first]), partner

    def _pair(
        self, opened: OpenCase, start: Sequence[int], target: int, partner: int | None, prefix: str
    ) -> dict[str, Any]:
        """Cut both sequences at the same place, each read separately."""
        image = to_tensor(cut(opened.image[target], start, self.crop_size))[None]
        other = None if partner is None else to_tensor(cut(opened.image[partner], start, self.crop_size))[None]
        return {
            f"{prefix}image": image,
            f"{prefix}partner": torch.zeros_like(image) if other is None else other,
            f"{prefix}paired": torch.tensor(other is not None),
        }

    def _other_patient(self, case: Case, draw: Draw, target_name: str) -> dict[str, Any]:
        """Cut a pair from another patient, with the same target if possible."""

        def read(other: Case) -> dict[str, Any]:
            opened = self.store.open(other)
            generator = numpy_generator("crop", "val", other.case_id, draw.draw)
            start, _ = self._place(opened, generator)
            target, partner = self._choose(opened, draw, generator)
            names = opened.record.modalities
            if target_name in names and opened.record.modality_mask[names.index(target_name)]:
                wanted = names.index(target_name)
                target, partner = wanted, target if target != wanted else partner
            return self._pair(opened, start, target, partner, "control_")

        same_target = partial(_shows, name=target_name)
        return read_control(case, draw, self.controls or (), read, same_target) or {}


def _shows(case: Case, name: str) -> bool:
    return name in case.images


def _index(opened: OpenCase, channel: int) -> int:
    """Return a channel's index among the canonical sequences."""
    return TEMPLATES.index(opened.record.modalities[channel])


class StudyDataset(VolumeDataset):
    """Crops of all sequences of a study under the canonical channels, ``(S, H, W, D)``, for the floor's constant."""

    def read(self, draw: Draw) -> dict[str, Any]:
        """Return image and modality mask of one crop.

        Raises:
            SampleFaultError: the study has no usable sequence.
        """
        opened = self.store.open(self.cases[draw.index])
        start, size = self._place(opened, numpy_generator("crop", *self.draw_key(draw, self.domain == "train")))
        piece = cut(opened.image, start, size)
        image = torch.zeros(len(TEMPLATES), *size)
        there = torch.zeros(len(TEMPLATES), dtype=torch.bool)
        for channel in np.flatnonzero(opened.record.modality_mask):
            index = _index(opened, int(channel))
            image[index], there[index] = to_tensor(piece[channel]), True
        return {"image": image, "modality_mask": there, "faults": opened.record.image_faults()}


class BrainDataModule(BrainArchiveDataModule):
    """Studies of one or many sources, each with the sequences it has, in atlas space, for pre-training.

    Args:
        root: The archive.
        modalities: Sequences to use, in any usual spelling; None: all. Studies without any of them are left
            out. The choice does not change the order of the templates.
        lesions: Whether validation samples include the lesion mask, for archives with labels.
        **options: As :class:`datamodules.brain.archive.BrainArchiveDataModule`.
    """

    def __init__(self, root: str, modalities: list[str] | None = None, lesions: bool = False, **options: Any) -> None:
        super().__init__(root, modalities=modalities, **options)
        self.lesions = lesions

    def resolve_layout(self, layout: Layout) -> Layout:
        """Keep each study's own sequences, or the requested ones among them, with BrainMVP's preprocessing."""
        layout = super().resolve_layout(layout)
        self._drop_unknown(layout)
        wanted = self._restrict(layout)
        names = tuple(name for name in TEMPLATES if any(name in case.images for case in self.cases))
        if not names:
            unknown = sorted({case.attributes.get("unknown", "") for case in self.cases} - {""})
            found = f"; its files are named {unknown[0]}" if unknown else ""
            raise DataError(f"No study under {self.root} has a sequence of a known name "
                            f"({', '.join(TEMPLATES)} and their usual spellings){found}.")  # fmt: skip
        self._report_names(layout)
        preparation = replace(
            layout.preprocessing,
            intensity=dict.fromkeys(wanted, "percentile_5_95"),
            spacing=(1.0, 1.0, 1.0),
            crop_foreground=True,
            centered=True,
            atlas=self.atlas,
            ragged=True,
        )
        return replace(layout, modalities=TEMPLATES, preprocessing=preparation)

    def _drop_unknown(self, layout: Layout) -> None:
        """Leave out sequences without a template; the case's attribute ``unknown`` lists them."""
        for index, case in enumerate(self.cases):
            unknown = ", ".join(layout.shown(name) for name in case.images if name not in TEMPLATES)
            if unknown:
                images = {name: path for name, path in case.images.items() if name in TEMPLATES}
                self.cases[index] = case._replace(images=images, attributes={**case.attributes, "unknown": unknown})

    def _restrict(self, layout: Layout) -> tuple[str, ...]:
        """Keep the requested sequences and the studies that have any of them; return their names."""
        if not self._modalities:
            return TEMPLATES
        unknown = [name for name in self._modalities if canonical_name(name) not in TEMPLATES]
        if unknown:
            raise DataError(f"data.modalities names {', '.join(unknown)}; pre-training knows {', '.join(TEMPLATES)}.")
        asked = {canonical_name(name) for name in self._modalities}
        wanted = tuple(name for name in TEMPLATES if name in asked)
        kept = []
        for case in self.cases:
            images = {name: path for name, path in case.images.items() if name in wanted}
            if images:
                kept.append(case._replace(images=images))
        if not kept:
            present = ", ".join(sorted({layout.shown(name) for case in self.cases for name in case.images}))
            raise DataError(f"No study under {self.root} has one of {', '.join(wanted)}, which data.modalities asks "
                            f"for; present are {present or 'none of a known name'}.")  # fmt: skip
        if len(kept) < len(self.cases):
            print_line(f"note: {len(self.cases) - len(kept)} of {len(self.cases)} studies have none of "
                f"{', '.join(wanted)} and are left out")  # fmt: skip
        self.cases = kept
        return wanted

    def _report_names(self, layout: Layout) -> None:
        strange = [case for case in self.cases if case.attributes.get("unknown")]
        if strange:
            print_line(f"note: {len(strange)} studies have sequences of unknown names, which are left out; first "
                f"{public_name(strange[0].case_id)}: {public_name(strange[0].attributes['unknown'])}")  # fmt: skip
        counts = {name: sum(name in case.images for case in self.cases) for name in TEMPLATES}
        shown = ", ".join(f"{layout.shown(name)} in {count}" for name, count in counts.items() if count)
        sources: dict[str, int] = {}
        for case in self.cases:
            source = case.attributes.get("source", "")
            sources[source] = sources.get(source, 0) + 1
        of = ", ".join(f"{count} of {name}" for name, count in sources.items() if name)
        print_line(f"sequences: {shown}{'; studies ' + of if of else ''}")

    def deliver(self, channels: Sequence[str]) -> None:
        """Check the channels, which are fixed: samples are single sequences numbered by template.

        Raises:
            DataError: other channels are requested.
        """
        ArchiveDataModule.deliver(self, channels)

    def _dataset(self, cases: Sequence[Case], domain: Domain, **options: Any) -> VolumeDataset:
        options = {
            name: value for name, value in options.items() if name not in ("flip_axes", "label_crop_probability")
        }
        return PairDataset(
            cases,
            self.store,
            self.crop_size,
            domain,
            self.seed,
            overhang=self.overhang,
            anonymise=self.ledger.anonymise,
            atlas=self.atlas,
            lesions=self.lesions and domain == "val",
            **options,
        )

    def reference_samples(self, count: int) -> Iterator[Any]:
        """Yield batches of whole studies with at least ``count`` crops of every sequence, if there are enough.

        Studies are chosen by a hash of their names, so that rare sequences are included without reading all of a large
        archive; each is used at most 64 times.
        """
        usable = sorted(self._usable(self.splits["train"]), key=lambda case: stable_hash("reference", case.case_id))
        chosen: dict[str, Case] = {}
        fewest = count
        for name in TEMPLATES:
            members = [case for case in usable if name in case.images][:count]
            chosen |= {case.case_id: case for case in members}
            fewest = min(fewest, len(members)) if members else fewest
        draws = min(-(-count // max(fewest, 1)), _MAX_REFERENCE_DRAWS)
        dataset = StudyDataset(list(chosen.values()), self.store, self.crop_size, "val", self.seed)
        for batch in self.evaluation_loader(dataset, draws, all_ranks=False):
            yield self.on_before_batch_transfer(batch, 0)

    def central_samples(self, splits: Sequence[str] = ("train", "val", "test")) -> Iterable[Any]:
        """Yield batches with the central crop of the first sequence of each case, for embeddings."""
        cases = [case for part in splits for case in self._usable(self.splits[part])]
        for batch in self.evaluation_loader(self._dataset(cases, "center"), all_ranks=False):
            yield self.on_before_batch_transfer(batch, 0)
