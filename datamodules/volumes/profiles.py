"""Profiles: named ways of preparing volumes, independent of the archive's layout."""

from dataclasses import dataclass, replace

from common.errors import DataError
from datamodules.registry import Archive
from datamodules.volumes.cases import Layout, Preprocessing

#: Voxels of the SRI24 atlas at 1 mm, the space of BraTS, UCSF-PDGM and UPENN-GBM.
ATLAS = (240, 240, 155)


@dataclass(frozen=True)
class Profile:
    """A way of preparing volumes, chosen in an experiment's configuration.

    Attributes:
        preprocessing: The steps.
        rule: Intensity rule of modalities without one in ``preprocessing``.
        crop_size: Default crop size in voxels.
    """

    preprocessing: Preprocessing
    rule: str = "percentile"
    crop_size: tuple[int, int, int] = (128, 128, 128)


PROFILES = {
    "native": Profile(Preprocessing({}, crop_foreground=True)),
    # BrainMVP's chain: 1 mm, cut symmetrically about the atlas's centre, 5th to 95th percentile to [0, 1].
    "brain_atlas": Profile(
        Preprocessing({}, spacing=(1.0, 1.0, 1.0), crop_foreground=True, centered=True, atlas=ATLAS),
        "percentile_5_95",
        (96, 96, 96),
    ),
    # adc and hbv have another grid than t2w and are resampled to it.
    "pi_cai": Profile(
        Preprocessing(
            {"t2w": "minmax", "adc": "adc", "hbv": "minmax"},
            reference="t2w",
            spacing=(0.5, 0.5, 3.0),
            size=(160, 160, 20),
        ),
        crop_size=(160, 160, 32),
    ),
    "lung": Profile(Preprocessing({}), crop_size=(96, 96, 32)),
}


def prepared(archive: Archive, profile: str | None = None) -> Layout:
    """Combine an archive's facts with a profile's preprocessing.

    Args:
        archive: The archive.
        profile: Name of the profile; None: the one that suits the archive.

    Raises:
        DataError: unknown profile.
    """
    facts = archive.facts
    name = profile or facts.profile
    if name not in PROFILES:
        raise DataError(f"Unknown profile {name!r} (data.profile); known are {', '.join(PROFILES)}.")
    chosen = PROFILES[name]
    names = facts.modalities or tuple(sorted({name for record in archive.records for name in record.volumes}))
    settings = chosen.preprocessing
    preprocessing = replace(
        settings,
        intensity={name: settings.intensity.get(name, chosen.rule) for name in names},
        reference=settings.reference or facts.reference,
        atlas=None if facts.native else settings.atlas,
    )
    layout = archive.layout
    return Layout(
        layout.name, layout.tree, facts.modalities, facts.regions, facts.label_values, preprocessing, chosen.crop_size
    )
