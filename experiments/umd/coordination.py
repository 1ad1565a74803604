"""Gradient coordination of two modalities (paper section III-D, Eqs. 10 to 13): pure functions, no trainer.

The modality that already predicts better has its gradients damped, and noise is added to gradients.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

NoiseScope = Literal["both", "damped", "none"]
#: Added to the standard deviation of the noise (published code).
_EPS = 1e-8


def modality_coefficients(
    image_contribution: Tensor, text_contribution: Tensor, beta: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Return what the gradients of each modality are multiplied by (Eqs. 11 and 12).

    With ``rho = sum(text) / sum(image)``, the modality whose ratio to the other is above 1 gets
    ``1 - tanh(beta ratio)`` and the other 1. Equal sums damp nobody; neither does a sum of zero, which no ratio can be
    formed with.

    Args:
        image_contribution: Any shape, summed: probability of the true class from the image alone, of each sample.
        text_contribution: The same from the text alone.
        beta: Strength, at least 0.

    Returns:
        ``(k_image, k_text)``, float64 scalars on the contributions' device; without a host sync.

    Raises:
        ValueError: ``beta`` is negative.
    """
    if beta < 0:
        raise ValueError(f"`beta` must be at least 0, got {beta}.")
    ratio = contribution_ratio(image_contribution, text_contribution)
    one = torch.ones_like(ratio)
    k_text = torch.where(ratio > 1, 1 - torch.tanh(beta * ratio), one)
    k_image = torch.where(ratio < 1, 1 - torch.tanh(beta / ratio), one)
    return k_image, k_text


def contribution_ratio(image_contribution: Tensor, text_contribution: Tensor) -> Tensor:
    """Return rho of the text, ``sum(text) / sum(image)`` (Eq. 11), float64; 1 where a sum is zero or no number."""
    image, text = (torch.as_tensor(x).detach().double().sum() for x in (image_contribution, text_contribution))
    usable = (image > 0) & (text > 0) & torch.isfinite(image) & torch.isfinite(text)
    one = torch.ones_like(image)
    return torch.where(usable, text, one) / torch.where(usable, image, one)


def true_class_probability(logits: Tensor, target: Tensor) -> Tensor:
    """Return what a modality contributes on each sample (Eq. 10): its probability of the true classes.

    Args:
        logits: ``(B, K)``, from this modality alone.
        target: ``(B, K)``, the weight of each true class; a row of zeros, which has none, contributes 0.

    Returns:
        ``(B,)`` float32, without a gradient.
    """
    return (logits.detach().float().softmax(-1) * target.float()).sum(-1)


class ContributionSums:
    """Sums of contributions over the micro-batches of one optimiser step, on the device."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, image: Tensor, text: Tensor) -> None:
        """Add the contributions of one micro-batch, of any shape."""
        sums = torch.stack([image.detach().double().sum(), text.detach().double().sum()])
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self) -> Tensor | None:
        """Return ``(image, text)`` and reset; None if nothing was added."""
        sums, self._sums = self._sums, None
        return sums


class Noise(NamedTuple):
    """How noise is added to gradients (Eq. 13).

    Attributes:
        scope: ``"both"`` modalities get it, as in the equation, also for k = 1; the ``"damped"`` one alone; or
            ``"none"``.
        scale: Standard deviation over that of the parameter's gradient.
        std_of: Whether that of the ``"raw"`` gradient or of the ``"damped"`` one.
    """

    scope: NoiseScope = "both"
    scale: float = 1.0
    std_of: Literal["raw", "damped"] = "raw"


@torch.no_grad()
def coordinate_gradients(
    gradients: Mapping[str, Sequence[Tensor]],
    coefficients: Mapping[str, Tensor],
    noise: Noise,
    generator: torch.Generator,
    damp: bool = True,
) -> Tensor:
    """Damp gradients and add noise, in place: ``g <- k g + N(0, var(g))`` (Eq. 13), per parameter.

    The variance is the unbiased one over the parameter's elements; a parameter of one element has none and gets no
    noise. If any gradient is not finite, as when float16 overflowed, all stay as they are: the step is skipped anyway.

    Args:
        gradients: By modality, in a fixed order.
        coefficients: By modality, scalars.
        noise: How noise is added.
        generator: Source of the noise, drawn in the order of ``gradients``; on the gradients' device.
        damp: Whether to multiply by k; without, only noise is added.

    Returns:
        Norm of the noise over that of the raw gradients, float64.
    """
    everything = [gradient for group in gradients.values() for gradient in group]
    norms = torch.stack(torch._foreach_norm(everything)).double()
    finite = torch.isfinite(norms).all()
    squared = torch.zeros((), dtype=torch.float64, device=norms.device)
    for name, group in gradients.items():
        k = torch.where(finite, coefficients[name].to(norms.device), 1.0)
        noisy = noise.scale > 0 and noise.scope != "none"
        active = finite if noise.scope == "both" else finite & (k < 1)
        spread = [g.float().std() if g.numel() > 1 and noisy else None for g in group]
        if damp:
            torch._foreach_mul_(list(group), k.to(group[0].dtype))
        for gradient, std in zip(group, spread, strict=True):
            if std is None:
                continue
            factor = k if noise.std_of == "damped" and damp else 1.0
            size = torch.where(active, (std * factor + _EPS) * noise.scale, 0.0).to(gradient.dtype)
            drawn = torch.randn(gradient.shape, generator=generator, device=gradient.device, dtype=gradient.dtype)
            drawn *= size
            gradient += drawn
            squared += drawn.double().square().sum()
    return squared.sqrt() / norms.norm().clamp(min=1e-30)
