"""Images and slices of volumes, oriented as a radiologist views them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from common.types import Panel


def axial(volume: Tensor, index: int) -> NDArray:
    """Return an axial slice of a RAS volume ``(X, Y, Z)`` in radiological display.

    Rows run from anterior to posterior, columns from the patient's right to the left: the patient faces the reader.
    """
    return np.flipud(np.fliplr(volume[:, :, index].detach().float().cpu().numpy().T)).copy()


def fullest_slice(volume: Tensor) -> int:
    """Return the axial slice of ``(C, X, Y, Z)`` with the most foreground, the one nearest the middle on a tie."""
    count = (volume != 0).any(0).sum((0, 1)).double()
    middle = (volume.shape[-1] - 1) / 2
    offset = [abs(index - middle) for index in range(volume.shape[-1])]
    return int(max(range(volume.shape[-1]), key=lambda i: (float(count[i]), -offset[i])))


def _axial_panel(
    subject: str, index: int, target: Tensor, hidden: Tensor, prediction: Tensor, filled: Tensor | None = None
) -> Panel:
    """Cut an axial slice out of volumes ``(X, Y, Z)``."""
    title = f"{subject}, axial slice {index + 1} of {target.shape[-1]}"
    shown, guess = axial(target, index), axial(prediction, index)
    seen = None if filled is None else axial(filled, index)
    return Panel(title, shown, axial(hidden, index) > 0.5, guess, ("R", "L"), seen)


def image_panel(subject: str, target: Tensor, hidden: Tensor, prediction: Tensor) -> Panel:
    """Show an image as it is stored: for a frontal radiograph, the patient's right on the left.

    Args:
        subject: Name shown in the title.
        target: ``(H, W)``.
        hidden: bool ``(H, W)``.
        prediction: ``(H, W)``, true values where visible.
    """
    arrays = [x.detach().float().cpu().numpy() for x in (target, prediction)]
    return Panel(subject, arrays[0], hidden.detach().cpu().numpy().astype(bool), arrays[1])


def colour_panel(
    subject: str, target: Tensor, prediction: Tensor, hidden: Tensor | None = None, lesion: Tensor | None = None
) -> Panel:
    """Show a colour image; where nothing was hidden, all of it is compared.

    Args:
        subject: Name shown in the title.
        target: ``(3, H, W)`` in [0, 1].
        prediction: ``(3, H, W)`` in [0, 1].
        hidden: bool ``(H, W)``; None: nothing was hidden.
        lesion: bool ``(H, W)``, to be outlined; None: nothing.
    """
    truth, guess = (x.detach().float().cpu().permute(1, 2, 0).numpy() for x in (target, prediction))
    outlined = None if lesion is None else lesion.detach().cpu().numpy().astype(bool)
    if hidden is None:
        nothing = np.zeros(truth.shape[:2], dtype=bool)
        return Panel(subject, truth, nothing, guess, scored=~nothing, lesion=outlined)
    return Panel(subject, truth, hidden.detach().cpu().numpy().astype(bool), guess, lesion=outlined)


def volume_panels(
    subject: str, names: Sequence[str], acquired: Tensor, target: Tensor, hidden: Tensor, prediction: Tensor
) -> dict[str, Panel]:
    """Cut one axial slice out of each modality.

    Args:
        subject: Name shown in the title.
        names: Modalities.
        acquired: bool ``(C,)``; a modality that was not acquired gets no panel.
        target: ``(C, X, Y, Z)``, RAS.
        hidden: ``(C, X, Y, Z)``, nonzero where hidden.
        prediction: ``(C, X, Y, Z)``, true values where visible.
    """
    index = fullest_slice(target)
    volumes = zip(names, target, hidden, prediction, strict=True)
    return {name: _axial_panel(subject, index, *parts)
            for (name, *parts), there in zip(volumes, acquired.tolist(), strict=True) if there}  # fmt: skip


def filled_panel(subject: str, target: Tensor, hidden: Tensor, filled: Tensor, prediction: Tensor) -> Panel:
    """Cut one axial slice out of a sequence whose hidden parts were replaced by something else.

    Args:
        subject: Name shown in the title.
        target: ``(1, X, Y, Z)``, RAS.
        hidden: bool ``(1, X, Y, Z)``.
        filled: ``(1, X, Y, Z)``, what the encoder saw.
        prediction: ``(1, X, Y, Z)``, true values where visible.
    """
    return _axial_panel(subject, fullest_slice(target), target[0], hidden[0], prediction[0], filled[0])
