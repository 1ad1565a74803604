"""Types that pass between data, maskers, networks and callbacks.

Letters: B batch, M modalities, C channels, H W D space, N patches, K kept patches, P values per patch, E encoder width.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

from common.modalities import canonical_channels

#: Which image of a batch a method gets: a sample's own, or that of another patient.
ImageKey = Literal["image", "control_image"]


class MaskOutput(NamedTuple):
    """What a masker returns.

    Attributes:
        mask: bool ``(B, N)`` or ``(B, M, N)``, True = hidden from the encoder.
        ids_keep: long ``(B, K)``, the visible positions in drawn order; None if every token is encoded.
        ids_restore: long ``(B, N)``, undoes the order of visible positions followed by hidden ones; None likewise.
    """

    mask: Tensor
    ids_keep: Tensor | None = None
    ids_restore: Tensor | None = None

    @property
    def hides_nothing(self) -> bool:
        """Whether every token is visible, known from shapes without waiting for a device."""
        return self.ids_keep is not None and self.ids_keep.shape[1] == self.mask.shape[1]

    def hidden_index(self) -> Tensor | None:
        """Return the hidden positions, long ``(B, N - K)``; None, which means all, if nothing is hidden."""
        assert self.ids_keep is not None
        assert self.ids_restore is not None
        return None if self.hides_nothing else torch.argsort(self.ids_restore, dim=1)[:, self.ids_keep.shape[1] :]


class EncoderOutput(NamedTuple):
    """What an encoder returns.

    Attributes:
        tokens: ``(B, N, E)`` or ``(B, K, E)``, after the final normalisation.
        hidden: the residual stream ``(B, N, E)`` after each requested block, before the final normalisation.
    """

    tokens: Tensor
    hidden: list[Tensor]


class VolumeBatch(TypedDict, total=False):
    """A batch of multi-modal volumes.

    Attributes:
        image: float ``(B, M, H, W, D)``, RAS, absent modalities are 0.
        modality_mask: bool ``(B, M)``, True = acquired.
        key: int64 ``(B,)``, the seed of each sample's random draws.
        subject_id: one name per sample.
        place: six integers per sample: the first voxel of the crop, and the voxels of the whole case.
        label: ``(B, R, H, W, D)`` float, one channel per region.
        target: ``(B,)`` class index of a classification task.
        control_image: float ``(B, M, H, W, D)``, a crop of another patient.
    """

    image: Tensor
    modality_mask: Tensor
    key: Tensor
    subject_id: list[str]
    place: list[tuple[int, ...]]
    label: Tensor
    target: Tensor
    control_image: Tensor


class SequencePairBatch(TypedDict, total=False):
    """A batch of crops of one sequence each, with another sequence of the same study at the same place.

    Attributes:
        image: float ``(B, 1, H, W, D)``, the target sequence; for whole studies, on which the best constant is
            measured, ``(B, S, H, W, D)`` under the S canonical channels.
        modality_mask: bool ``(B, S)``, True = acquired; only for whole studies.
        partner: the same of another sequence, 0 where the study has none.
        paired: bool ``(B,)``, whether there is a partner.
        modality: long ``(B,)``, index of the target sequence among the data's channels.
        partner_modality: long ``(B,)``, of the partner; that of the target where there is none.
        place: one ``(modality, x, y, z)`` of integers per sample: where the crop begins in the atlas.
        key: int64 ``(B,)``, the seed of each sample's random draws.
        subject_id: one name per sample.
        lesion: bool ``(B, 1, H, W, D)``, voxels of a lesion, where it was asked for.
        control_image: a crop of the target sequence of another patient, ``control_partner`` and ``control_paired`` its
            partner.
    """

    image: Tensor
    modality_mask: Tensor
    partner: Tensor
    paired: Tensor
    modality: Tensor
    partner_modality: Tensor
    place: list[tuple[int, int, int, int]]
    key: Tensor
    subject_id: list[str]
    lesion: Tensor
    control_image: Tensor
    control_partner: Tensor
    control_paired: Tensor


class ImageTextBatch(TypedDict, total=False):
    """A batch of images with texts and hidden words; T is the longest text of the batch.

    Attributes:
        image: float ``(B, 1, H, W)``, standardised, 0 where there is none.
        modality_mask: bool ``(B, 2)``, whether image and text are present.
        key: int64 ``(B,)``, the seed of each sample's random draws.
        image_key: int64 ``(B,)``, equal for samples with the same image.
        subject_id: one name per sample.
        patient_id: one name per sample.
        input_ids: long ``(B, T)``, the class token first, hidden tokens replaced.
        attention_mask: long ``(B, T)``, 1 = token, 0 = padding.
        labels: long ``(B, T)``, the true token at hidden positions, -100 elsewhere.
        hidden_index: long ``(S,)``, hidden positions, indexing the flattened ``(B, T)``.
        hidden_ids: long ``(S,)``, the true tokens there.
        control_image: float ``(B, 1, H, W)``, the image of another patient.
        negative_image: float ``(B, 1, H, W)``, another image loaded as a mismatch for the text.
    """

    image: Tensor
    modality_mask: Tensor
    key: Tensor
    image_key: Tensor
    subject_id: list[str]
    patient_id: list[str]
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    hidden_index: Tensor
    hidden_ids: Tensor
    control_image: Tensor
    negative_image: Tensor


class ImageGenomeBatch(TypedDict, total=False):
    """A batch of images with genetics; F features, M kinds of genetics.

    Attributes:
        image: float ``(B, 3, H, W)``, standardised.
        genome: float ``(B, F)``, standardised by training subjects, 0 where unobserved.
        genome_observed: bool ``(B, F)``, features that were measured.
        modality_mask: bool ``(B, 1 + M)``, whether image and each kind of genetics are present.
        complete: Whether every sample has every kind, known before the batch reaches the device.
        key: int64 ``(B,)``, the seed of each sample's random draws.
        subject_id: one name per sample.
        patient_id: one name per sample.
        control_image: float ``(B, 3, H, W)``, the image of another person.
        lesion: bool ``(B, H, W)``, mask of a lesion for figures; in validation, if the archive has such masks.
    """

    image: Tensor
    genome: Tensor
    genome_observed: Tensor
    modality_mask: Tensor
    complete: bool
    key: Tensor
    subject_id: list[str]
    patient_id: list[str]
    control_image: Tensor
    lesion: Tensor


class LabelledBatch(TypedDict, total=False):
    """A batch of labelled images; K classes.

    Attributes:
        image: float ``(B, 1, H, W)``, standardised.
        target: float ``(B, K)``, 0 or 1.
        target_mask: bool ``(B, K)``, whether the target is known.
        subject_id: one name per sample.
        patient_id: one name per sample.
    """

    image: Tensor
    target: Tensor
    target_mask: Tensor
    subject_id: list[str]
    patient_id: list[str]


class ImageTextTaskBatch(TypedDict, total=False):
    """A batch of images with a text each; T is the longest text of the batch, C candidate texts of an image.

    Attributes:
        image: float ``(B, 3, H, W)``, standardised.
        image_key: int64 ``(B,)``, equal for samples with the same image.
        input_ids: long ``(B, T)``, the class token first.
        attention_mask: long ``(B, T)``, 1 = token, 0 = padding.
        candidate_ids: long ``(B, C, T)``, the true text first.
        candidate_mask: long ``(B, C, T)``.
        label: long ``(B,)``, the class; -1 = none of them.
        answers: what counts as right, one list per sample.
        kind: ``"open"`` or ``"closed"``, one per sample; empty: unknown.
        text: the text, one per sample.
        subject_id: one name per sample.
        patient_id: one name per sample.
    """

    image: Tensor
    image_key: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    candidate_ids: Tensor
    candidate_mask: Tensor
    label: Tensor
    answers: list[list[str]]
    kind: list[str]
    text: list[str]
    subject_id: list[str]
    patient_id: list[str]


class HiddenTokens(NamedTuple):
    """A method's predictions for the hidden words.

    Attributes:
        logits: ``(S, V)`` at the hidden positions.
        targets: long ``(S,)``, the true tokens.
        sample: long ``(S,)``, which sample of the batch each belongs to.
    """

    logits: Tensor
    targets: Tensor
    sample: Tensor


class Reconstruction(NamedTuple):
    """A masked reconstruction, in the form that the loss takes.

    Attributes:
        pred: ``(B, ..., P)``.
        target: ``(B, ..., P)``, in the units of the loss.
        mask: bool ``(B, ...)``, True = scored.
        groups: named subsets of ``mask``, such as positions where nothing was visible.
        unchanged: ``(B, ..., P)``, the prediction of a network that returns its input; None if hidden entries are left
            out of the input.
    """

    pred: Tensor
    target: Tensor
    mask: Tensor
    groups: dict[str, Tensor]
    unchanged: Tensor | None = None


class TokenFeatures(NamedTuple):
    """Token features of unmasked inputs, for the collapse diagnostics.

    Attributes:
        features: by tap, ``(B, N, E)``; the first entry is the representation that is transferred.
        keep: bool ``(B, N)``, tokens that are not empty.
    """

    features: dict[str, Tensor]
    keep: Tensor


class Panel(NamedTuple):
    """One row of a reconstruction figure, each image ``(H, W)``, or ``(H, W, 3)`` in [0, 1], in display orientation.

    Attributes:
        title: what the row shows (subject, slice).
        input: the true image.
        hidden: bool, where it was hidden from the encoder.
        prediction: the reconstruction, true values where they were visible.
        sides: what lies at the left and the right edge, such as the patient's right and left.
        filled: the encoder's input, if hidden parts were replaced; None if they were left out.
        scored: bool ``(H, W)``, where prediction and input are compared; None: where hidden.
        lesion: bool ``(H, W)``, what is outlined; None: nothing.
    """

    title: str
    input: Any
    hidden: Any
    prediction: Any
    sides: tuple[str, str] = ("", "")
    filled: Any = None
    scored: Any = None
    lesion: Any = None


def _plain(value: Any) -> Any:
    """Return lists and dicts of plain values, the form in YAML and checkpoints."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    return list(value) if isinstance(value, list | tuple) else value


def _frozen(value: Any) -> Any:
    """Return tuples in place of lists, the form in data modules."""
    if isinstance(value, Mapping):
        return {name: _frozen(entry) for name, entry in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _includes(given: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    """Whether the data contain all that a checkpoint stores; older checkpoints store less about their vocabulary."""
    return {name: value for name, value in given.items() if name in stored} == stored


class _Rule(NamedTuple):
    """How one field of the data's spec is compared with a checkpoint's.

    Attributes:
        filled: whether the checkpoint's value is used if the data have none.
        agree: whether two plain values are compatible.
        advice: what to do if they are not.
    """

    filled: bool = False
    agree: Callable[[Any, Any], bool] = operator.eq
    advice: str = "choose matching data, or start from its encoder with a fine-tuning configuration."


_OTHER_WORDS = "set data.text.tokenizer to the tokenizer.json of the checkpoint's run, and data.text.length to its own."

#: Other fields are not compared. An archive without labels can be predicted: the checkpoint stores its regions and
#: classes.
_RULES = {
    "channels": _Rule(),
    "image_size": _Rule(),
    "regions": _Rule(filled=True),
    "vocabulary": _Rule(agree=_includes, advice=_OTHER_WORDS),
    "classes": _Rule(filled=True),
    "genome": _Rule(),
}


class InputSpec(NamedTuple):
    """What a data module promises about its images, enough to build a network for them.

    Attributes:
        channels: the canonical names of the channels, in order.
        image_size: the size of one crop, in voxels or pixels.
        regions: label channel to the label values it is made of; empty without labels.
        preprocessing: what was done to the intensities and the grid, for the card of an exported encoder.
        vocabulary: size, length and fingerprint of the text's tokens; empty without text.
        classes: names of the classes that images are labelled with; empty without such labels.
        genome: features of each kind of genetics, by name and in order; empty without genetics.
        names: the archive's names of the channels, for figures and logs; empty: as ``channels``.
        absent: channels that no case has, delivered as absent.
        chosen: whether the configuration fixes the channels, so that none is added.
    """

    channels: tuple[str, ...]
    image_size: tuple[int, ...]
    regions: Mapping[str, tuple[int, ...]] = {}
    preprocessing: Mapping[str, Any] = {}
    vocabulary: Mapping[str, Any] = {}
    classes: tuple[str, ...] = ()
    genome: Mapping[str, int] = {}
    names: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    chosen: bool = False

    @property
    def shown(self) -> dict[str, str]:
        """The archive's name of each channel."""
        return dict(zip(self.channels, self.names or self.channels, strict=True))

    def only(self, fields: Sequence[str]) -> "InputSpec":
        """Return the spec with only these fields, the preprocessing and the archive's channel names."""
        kept = {name: getattr(self, name) for name in (*fields, "preprocessing", "names")}
        return InputSpec(**{"channels": (), "image_size": ()} | kept)

    def merge(self, stored: "InputSpec") -> "InputSpec":
        """Fill in what the data leave open from a checkpoint."""
        open_fields = [name for name, rule in _RULES.items() if rule.filled and not getattr(self, name)]
        return self._replace(**{name: getattr(stored, name) for name in open_fields})

    def difference(self, stored: "InputSpec") -> str | None:
        """Describe in one sentence how the data differ from a checkpoint's input; None if they do not.

        Fields missing from the checkpoint are not compared.
        """
        for name, rule in _RULES.items():
            given, known = _plain(getattr(self, name)), _plain(getattr(stored, name))
            if known and not rule.agree(given, known):
                return f"The model was made for {name} {known}, but the dataset has {given}: {rule.advice}"
        return None


class TaskState(NamedTuple):
    """What a checkpoint stores about a module besides its weights, to rebuild the network.

    Attributes:
        spec: the input of the network; None before it is built.
        encoder: architecture of the encoder, as :func:`common.checkpoint.build_encoder` takes it; None if the
            configuration defines it completely.
    """

    spec: InputSpec | None = None
    encoder: Mapping[str, Any] | None = None

    def plain(self) -> dict[str, Any]:
        """Return the state as plain values, for a checkpoint."""
        return {"spec": None if self.spec is None else _plain(self.spec._asdict()), "encoder": _plain(self.encoder)}

    @classmethod
    def read(cls, checkpoint: Mapping[str, Any]) -> "TaskState":
        """Return the state that a checkpoint holds, channels under canonical names; an empty one if it holds none."""
        stored = checkpoint.get("state") or {}
        spec = InputSpec(**_frozen(stored["spec"])) if stored.get("spec") else None
        if spec is not None:
            spec = spec._replace(channels=canonical_channels(spec.channels), names=spec.names or spec.channels)
        return cls(spec, stored.get("encoder"))


class HasInputSpec(Protocol):
    """A data module that knows what it will deliver."""

    @property
    def input_spec(self) -> InputSpec:
        """What the batches will hold; known once the root has been indexed."""
        ...
