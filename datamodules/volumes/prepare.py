"""Preparing a case: its files become one array on one grid, and every broken file is reported.

MONAI resamples; what is accepted and refused is decided here.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from common.faults import Fault, SampleFaultError
from datamodules.notes import note
from datamodules.volumes.cases import Case, Layout
from datamodules.volumes.headers import VolumeError, check_room
from datamodules.volumes.intensity import CLIPPED_AT_0, rescale
from datamodules.volumes.reading import Volume, read_volume
from datamodules.volumes.voxels import FACES, STRICT, VoxelConfig, background_of, negative_share

if TYPE_CHECKING:  # a quarter of a run's import time, needed only for resampling
    from monai.data import MetaTensor


class PreparedCase(NamedTuple):
    """A case on its final grid.

    Attributes:
        image: float32 ``(M, X, Y, Z)``, absent modalities 0.
        modality_mask: Per modality, whether it is usable.
        modalities: Their names: all of the layout's, or only the case's own.
        label: uint8 ``(X, Y, Z)``, or None.
        affine: ``(4, 4)`` of the final grid, RAS.
        source_shape: Shape of the reference volume in RAS, before cropping or resampling.
        source_affine: Its affine.
        file_affine: Its affine as stored in the file, before reorientation to RAS.
        offset: First voxel of the final grid in the reference grid; None where it was resampled.
        faults: Faults of images that the case is used without.
        label_faults: Faults of the label, which is then dropped.
        sources: Path to size and check sum, for usable images and labels.
    """

    image: NDArray[np.float32]
    modality_mask: list[bool]
    modalities: tuple[str, ...]
    label: NDArray[np.uint8] | None
    affine: NDArray[np.float64]
    source_shape: tuple[int, ...]
    source_affine: NDArray[np.float64]
    file_affine: NDArray[np.float64]
    offset: tuple[int, int, int] | None
    faults: list[Fault]
    label_faults: list[Fault]
    sources: dict[str, dict[str, Any]]


def read_image(path: Path, voxels: VoxelConfig = STRICT, place: int | None = None) -> Volume:
    """Read a volume and check that it is finite and not constant.

    Args:
        path: The file.
        voxels: How to handle unusual volumes.
        place: Which volume of a 4-D file; None: the file holds one volume.

    Raises:
        VolumeError: as :func:`datamodules.volumes.reading.read_volume`; or voxels are not finite, or all the same.
    """
    volume = read_volume(path, voxels, place)
    data = volume.data
    if data.dtype.kind == "f" and not np.isfinite(data).all():
        data = _without_nan(data, voxels)
    if data.min() == data.max():
        raise VolumeError("constant", f"every voxel is {data.flat[0]:g}")
    return volume._replace(data=data)


def _without_nan(data: NDArray, voxels: VoxelConfig) -> NDArray:
    missing = np.isnan(data)
    if voxels.nan == "zero" and not np.isinf(data).any():
        return np.where(missing, data.dtype.type(0), data)
    detail = f"{int((~np.isfinite(data)).sum())} voxels are not finite"
    if missing.any() and any(missing[face].any() for face in FACES):
        detail += "; NaN reaches the border, so it lies outside the body: set voxels.nan: zero"
    raise VolumeError("nan", detail)


def _rescaled(data: NDArray, rule: str, background: NDArray[np.bool_] | None) -> NDArray[np.float32]:
    """Scale the voxels on the final grid, which may be another part of the file than the one checked before."""
    if data.min() == data.max():
        raise VolumeError("grid", "no part of it lies on the grid that the case is brought to")
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = rescale(data, rule, background)
    if not np.isfinite(scaled).all() or scaled.min() == scaled.max():
        raise VolumeError("constant", f"nothing is left of it on the intensity scale {rule!r}")
    return scaled


def _check_sign(name: str, path: Path, data: NDArray, rule: str, background: float | None) -> None:
    """Refuse a volume that would lose much of its foreground to a rule that clips at 0; note a smaller loss."""
    share = negative_share(data, background)
    if share > _MAX_NEGATIVE and rule in CLIPPED_AT_0:
        hint = "it is CT: set voxels.intensity: {%s: ct}" if data.min() <= _AIR else (
            "it has been standardised already: set voxels.intensity: {%s: standardised}")  # fmt: skip
        raise VolumeError("intensity", f"{share:.0%} of {name}'s foreground is negative, {hint % name}")
    if share > _NOTED_NEGATIVE:
        note(f"more than {_NOTED_NEGATIVE:.0%} of the foreground of {name} is negative", path)


def _same_grid(a: Volume, b: Volume) -> bool:
    return a.data.shape == b.data.shape and np.allclose(a.affine, b.affine, atol=1e-2)


def _read_members(
    case: Case, layout: Layout, modalities: tuple[str, ...]
) -> tuple[dict[str, Volume], list[Fault], dict[str, Any]]:
    settings = layout.preprocessing
    volumes: dict[str, Volume] = {}
    faults, sources = [], {}
    for modality in modalities:
        if (path := case.images.get(modality)) is None:
            continue
        try:
            volume = read_image(path, settings.voxels, case.places.get(modality))
            background = background_of(volume.data)
            _check_sign(modality, path, volume.data, settings.intensity[modality], background)
        except VolumeError as error:
            faults.append(Fault(str(path), error.kind, error.detail, case.case_id))
        else:
            volumes[modality], sources[str(path)] = volume._replace(background=background), volume.source
    return volumes, faults, sources


def _describe(volume: Volume) -> str:
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    return f"{'x'.join(map(str, volume.data.shape))} voxels of {' x '.join(f'{s:.3g}' for s in spacing)} mm"


def _drop_other_grids(case: Case, volumes: dict[str, Volume]) -> tuple[dict[str, Volume], list[Fault]]:
    """Keep the volumes on the most common grid; a case without one cannot be stacked."""
    names = list(volumes)
    votes = Counter({name: sum(_same_grid(volumes[name], other) for other in volumes.values()) for name in names})
    reference, agreeing = votes.most_common(1)[0]
    if agreeing == 1 and len(names) > 1:
        grids = ", ".join(f"{name} {_describe(volume)}" for name, volume in volumes.items())
        detail = f"the modalities lie on different grids ({grids}); co-register and resample them to one grid first"
        raise SampleFaultError([Fault(str(case.images[reference].parent), "grid", detail, case.case_id)])
    kept = {name: volume for name, volume in volumes.items() if _same_grid(volume, volumes[reference])}
    where = f"{reference} ({_describe(volumes[reference])})"
    faults = [
        Fault(str(case.images[name]), "grid", f"{_describe(volumes[name])} at another place than {where}", case.case_id)
        for name in names
        if name not in kept
    ]
    return kept, faults


def _meta(data: NDArray, affine: NDArray, background: float | None = None) -> "MetaTensor":
    """Make a tensor whose background is 0, the value of voxels outside the volume."""
    from monai.data import MetaTensor

    shifted = np.ascontiguousarray(data, dtype=np.float32) - np.float32(background or 0)
    return MetaTensor(torch.as_tensor(shifted)[None], affine=torch.as_tensor(affine))


def _on_reference_grid(
    case: Case, volumes: dict[str, Volume], layout: Layout
) -> tuple[dict[str, "MetaTensor"], Volume]:
    """Resample all modalities to the reference's grid, then to the layout's spacing and size; background becomes 0.

    Raises:
        SampleFaultError: the header's voxel size would give too many voxels.
    """
    from monai.transforms import ResampleToMatch

    settings = layout.preprocessing
    reference = volumes[settings.reference or next(iter(volumes))]
    target = _meta(reference.data, reference.affine)
    images = {}
    for name, volume in volumes.items():
        image: Any = _meta(volume.data, volume.affine, volume.background)
        if not _same_grid(volume, reference):
            image = ResampleToMatch(mode="bilinear", padding_mode="zeros")(image, target)
        try:
            images[name] = _to_final_grid(image, layout, "bilinear")
        except VolumeError as error:
            raise SampleFaultError([Fault(str(case.images[name]), error.kind, error.detail, case.case_id)]) from error
    return images, reference


def _to_final_grid(image: Any, layout: Layout, mode: str) -> "MetaTensor":
    from monai.transforms import Resize, ResizeWithPadOrCrop, Spacing

    settings = layout.preprocessing
    if settings.spacing is not None:
        edges = np.linalg.norm(np.asarray(image.affine)[:3, :3], axis=0)
        check_room(np.asarray(image.shape[1:]) * edges / np.asarray(settings.spacing))
        padding = "border" if mode == "bilinear" else "zeros"
        image = Spacing(pixdim=settings.spacing, mode=mode, padding_mode=padding)(image)
    if settings.size is not None:
        image = ResizeWithPadOrCrop(settings.size)(image)
    if settings.resize is not None:
        image = Resize(settings.resize, mode="trilinear" if mode == "bilinear" else "nearest")(image)
    return image


def _label_volume(case: Case, layout: Layout, reference: Volume, sources: dict[str, Any]) -> NDArray[np.uint8]:
    """Read the label; several binary masks become the bits of one label."""
    merged: NDArray | None = None
    for bit, path in enumerate(case.labels.values()):
        volume = read_volume(path, VoxelConfig(header=layout.preprocessing.voxels.header))
        sources[str(path)] = volume.source
        rounded = np.rint(volume.data)
        if volume.data.dtype.kind == "f" and not (np.abs(volume.data - rounded) <= 1e-3).all():
            raise VolumeError("label", "some voxels are not integers")
        if not _same_grid(volume, reference):
            raise VolumeError("grid", f"the label has {_describe(volume)}, the image {_describe(reference)}")
        values = rounded.astype(np.int64)
        if len(case.labels) > 1 and not set(np.unique(values)) <= {0, 1}:
            raise VolumeError("label", f"a mask must hold 0 and 1 only, {path.name} holds {np.unique(values).tolist()}")
        merged = values if merged is None else merged | (values << bit)
    assert merged is not None
    found = set(np.unique(merged).tolist())
    if layout.label_values and not found <= layout.label_values:
        raise VolumeError(
            "label",
            f"holds the values {sorted(found)}, but {layout.name} allows {sorted(layout.label_values)} only"
            + (": is this another release of the data? LAYOUT= chooses one" if layout.name.startswith("brats") else "")
            + ("" if layout.regions else ": data.labels.regions must name every value"),
        )
    if min(found) < 0 or max(found) > np.iinfo(np.uint8).max:
        raise VolumeError("label", f"holds the values {min(found)} to {max(found)}; labels are 0 to 255")
    return merged.astype(np.uint8)


def _foreground_box(present: NDArray, centered: bool = False) -> tuple[slice, ...]:
    """Return the bounding box of the foreground, or the symmetric one around it."""
    box = []
    for axis in range(3):
        indices = np.flatnonzero(present.any(tuple(other for other in range(3) if other != axis)))
        low, high = (int(indices[0]), int(indices[-1]) + 1) if len(indices) else (0, present.shape[axis])
        box.append(centered_slice(present.shape[axis], low, high) if centered else slice(low, high))
    return tuple(box)


def centered_slice(size: int, low: int, high: int) -> slice:
    """Return the smallest slice around ``low:high`` that is symmetric about the middle of ``size`` voxels."""
    margin = min(low, size - high)
    return slice(margin, size - margin)


#: Negative share of the foreground that is noted, and the share at which a rule that clips at 0 does not fit.
_NOTED_NEGATIVE, _MAX_NEGATIVE = 0.01, 0.05
#: Hounsfield units that occur only in air.
_AIR = -500
#: Share of voxels that are 0 in every sequence; below it, skull and air have not been removed.
_MIN_AIR = 0.15
#: Limits for volumes in atlas space: longest edge in mm, ratio of edges, degrees between axes and the atlas's.
_MAX_EDGE, _MAX_RATIO, _MAX_TILT = 2.5, 1.02, 2.0


def native_space(affine: NDArray[np.float64]) -> str | None:
    """Return why a grid cannot be an atlas's, whatever its resolution; None if it can."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if spacing.max() > _MAX_EDGE or spacing.max() > _MAX_RATIO * spacing.min():
        return f"its voxels of {' x '.join(f'{s:.3g}' for s in spacing)} mm are those of a native scan"
    tilt = float(np.degrees(np.arccos(np.clip(np.abs(np.diag(affine)[:3]) / spacing, 0, 1))).max())
    return f"its axes are tilted by {tilt:.0f} degrees" if tilt > _MAX_TILT else None


def _check_space(case: Case, images: dict[str, Any], reference: Volume, atlas: tuple[int, ...]) -> None:
    """Refuse volumes that are not in atlas space, where templates and their positions would be meaningless."""
    reasons = [reason] if (reason := native_space(reference.affine)) else []
    air = float(np.logical_and.reduce([image[0].numpy() == 0 for image in images.values()]).mean())
    if air < _MIN_AIR:
        reasons.append(f"only {air:.0%} of its voxels are exactly 0, so the skull is still on")
    if reasons:
        detail = (f"not in atlas space: {' and '.join(reasons)}; register it to the atlas "
                  f"({'x'.join(map(str, atlas))} voxels of 1 mm, such as SRI24) and strip the skull first")  # fmt: skip
        raise SampleFaultError([Fault(str(next(iter(case.images.values())).parent), "space", detail, case.case_id)])


def prepare_case(case: Case, layout: Layout, modalities: tuple[str, ...]) -> PreparedCase:
    """Read a case completely and bring it to its final grid and intensities.

    Raises:
        SampleFaultError: no usable modality, grids that cannot be stacked, or not in the required space.
    """
    settings = layout.preprocessing
    if settings.ragged:
        modalities = tuple(name for name in modalities if name in case.images)
    volumes, faults, sources = _read_members(case, layout, modalities)
    try:
        if volumes and settings.reference is None:
            volumes, grid_faults = _drop_other_grids(case, volumes)
            faults += grid_faults
        if not volumes or (settings.reference is not None and settings.reference not in volumes):
            raise SampleFaultError([] if faults else [_nothing_left(case, layout)])
        images, reference = _on_reference_grid(case, volumes, layout)
        if settings.atlas is not None:
            _check_space(case, images, reference, settings.atlas)
    except SampleFaultError as error:
        raise SampleFaultError([*faults, *error.faults]) from error
    levels = {name: volume.background for name, volume in volumes.items()}
    stack, there, constant = _rescaled_stack(case, layout, modalities, images, levels)
    faults += constant
    if not any(there):
        raise SampleFaultError(faults)
    final = next(iter(images.values()))
    label, label_faults = _prepare_label(case, layout, reference, stack, sources)
    affine, offset = np.asarray(final.affine, dtype=np.float64), None
    if settings.crop_foreground:
        present = (stack != 0).any(0) | (False if label is None else label > 0)
        box = _foreground_box(present, settings.centered)
        stack = stack[:, *box]
        label = None if label is None else label[box]
        start = [edge.start for edge in box]
        if final.shape[1:] == reference.data.shape and np.allclose(affine, reference.affine):
            offset = (start[0], start[1], start[2])
        shift = np.eye(4)
        shift[:3, 3] = start
        affine = affine @ shift
    return PreparedCase(
        image=stack,
        modality_mask=there,
        modalities=modalities,
        label=label,
        affine=affine,
        source_shape=reference.data.shape,
        source_affine=reference.affine,
        file_affine=reference.file_affine,
        offset=offset,
        faults=faults,
        label_faults=label_faults,
        sources=sources,
    )


def _rescaled_stack(
    case: Case, layout: Layout, modalities: tuple[str, ...], images: dict[str, Any], levels: Mapping[str, float | None]
) -> tuple[NDArray[np.float32], list[bool], list[Fault]]:
    """Scale the intensities of all modalities; if the cut is centred, using only the voxels inside it.

    Args:
        case: The case.
        layout: Its layout.
        modalities: Channels in order.
        images: Volumes on the final grid, their background at 0.
        levels: The background subtracted from each; None if it is not a single value.
    """
    settings = layout.preprocessing
    arrays = {name: image[0].numpy() for name, image in images.items()}
    shape = next(iter(arrays.values())).shape
    box: tuple[slice, ...] = (slice(None),) * 3
    if settings.centered:
        box = _foreground_box(np.logical_or.reduce([array != 0 for array in arrays.values()]), centered=True)
    stack = np.zeros((len(modalities), *shape), dtype=np.float32)
    there = [False] * len(modalities)
    faults = []
    for index, name in enumerate(modalities):
        if name not in arrays:
            continue
        try:
            stack[index][box] = _scale_member(arrays[name][box], settings.intensity[name], levels[name])
            there[index] = True
        except VolumeError as error:
            faults.append(Fault(str(case.images[name]), error.kind, error.detail, case.case_id))
    return stack, there, faults


def _scale_member(shifted: NDArray, rule: str, level: float | None) -> NDArray[np.float32]:
    """Scale a volume whose background was subtracted; the background becomes 0 under every rule."""
    if level is None:
        return _rescaled(shifted, rule, None)
    background = shifted == 0
    scaled = _rescaled(shifted + np.float32(level), rule, background)
    return scaled if level == 0 else np.where(background, np.float32(0), scaled)


def _nothing_left(case: Case, layout: Layout) -> Fault:
    known = ", ".join(layout.modalities)
    found = [*map(layout.shown, case.images), *filter(None, [case.attributes.get("unknown")])]
    if layout.preprocessing.reference is not None:
        detail = f"the case has no {layout.shown(layout.preprocessing.reference)}"
    elif case.images:
        detail = f"the case has none of {', '.join(map(layout.shown, layout.modalities))}; it has {', '.join(found)}"
    else:
        detail = (
            f"the case has no sequence of a known name; it has {', '.join(found) or 'no image'}, and known are {known}"
        )
    return Fault(case.case_id, "missing", detail, case.case_id)


def _prepare_label(
    case: Case, layout: Layout, reference: Volume, image: NDArray, sources: dict[str, Any]
) -> tuple[NDArray[np.uint8] | None, list[Fault]]:
    if not case.labels:
        return None, []
    try:
        values = _label_volume(case, layout, reference, sources)
        resampled = _to_final_grid(_meta(values, reference.affine), layout, "nearest")[0].numpy()
        label = np.rint(resampled).astype(np.uint8)
        marked = label > 0
        outside = int((marked & (image == 0).all(0)).sum())
        if layout.preprocessing.crop_foreground and 2 * outside > int(marked.sum()):
            raise VolumeError(
                "label", f"{outside} of {int(marked.sum())} labelled voxels lie where every modality is 0"
            )
    except VolumeError as error:
        return None, [Fault(str(next(iter(case.labels.values()))), error.kind, error.detail, case.case_id)]
    return label, []
