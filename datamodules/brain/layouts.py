"""Brain archives in their official layouts, with sequences under canonical names and labels by release.

A layout here is a pattern over the paths under a root. Whether an archive is in atlas space (skull-stripped, on the
atlas's grid) its volumes must show: see :attr:`datamodules.volumes.cases.Preprocessing.atlas`.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from common.errors import DataError
from common.modalities import CANONICAL, TEMPLATES, canonical_name
from datamodules.brain.manifest import find_manifest
from datamodules.brain.sequences import is_volume, patient_of, split_name
from datamodules.volumes.brats import find_cases as find_brats
from datamodules.volumes.cases import Case, Layout, Preprocessing
from datamodules.volumes.modalities import one_file_each

#: Voxels of the SRI24 atlas at 1 mm, on which BraTS, UCSF-PDGM and UPENN-GBM lie.
ATLAS = (240, 240, 155)
_MAX_DEPTH = 6
_LABEL_NAMES = ("seg", "label", "mask", "msk")

#: Regions of a glioma by the value of its enhancing part: 4 until 2021, 3 from 2023 on.
_GLIOMA_REGIONS = {value: {"TC": (1, value), "WT": (1, 2, value), "ET": (value,)} for value in (3, 4)}
#: Canonical sequences that no BraTS case has.
_BEYOND_GLIOMAS = frozenset(TEMPLATES) - {"flair", "t1", "t1c", "t2"}


@dataclass(frozen=True)
class Pattern:
    """How the files of an official layout are called, as regular expressions over paths under the root, in any case.

    Attributes:
        image: With the groups ``study`` and ``sequence``; ``patient`` where it is not the study, ``attribute`` for
            what else a path says.
        label: With the group ``study``.
        names: Sequence as written to canonical name, where it is no usual spelling.
        study: How the name of a study is made of the groups.
        attribute: Name of the attribute.
    """

    image: re.Pattern[str]
    label: re.Pattern[str] | None = None
    names: Mapping[str, str] | None = None
    study: str = "{study}"
    attribute: str = ""

    def find(self, root: Path) -> list[Case]:
        """List the studies under a root."""
        cases: dict[str, Case] = {}
        labels: dict[str, Path] = {}
        for path in walk(root):
            name = path.relative_to(root).as_posix()
            if self.label is not None and (match := self.label.search(name)):
                labels.setdefault(self.study.format(**match.groupdict()).lower(), path)
            elif match := self.image.search(name):
                self._add(cases, path, match.groupdict())
        return [case._replace(labels={"seg": labels[key.lower()]} if key.lower() in labels else {})
                for key, case in cases.items()]  # fmt: skip

    def _add(self, cases: dict[str, Case], path: Path, groups: dict[str, str]) -> None:
        given = groups.get("sequence", "")
        sequence = (self.names or {}).get(given.lower()) or given
        if canonical_name(sequence) not in CANONICAL:
            return
        study = self.study.format(**groups)
        facts = {self.attribute: groups["attribute"]} if groups.get("attribute") else {}
        case = cases.get(study) or Case(study, groups.get("patient") or study, {}, attributes=facts)
        images, surplus = one_file_each([*case.images.items(), (sequence, path)])
        cases[study] = case._replace(images=images, surplus=[*case.surplus, *surplus])


def walk(root: Path) -> Iterator[Path]:
    """Yield the NIfTI files under a root, at most six folders down, in the order of their names."""
    for folder, below, files in os.walk(root):
        depth = len(Path(folder).relative_to(root).parts)
        below[:] = sorted(name for name in below if not name.startswith(".")) if depth < _MAX_DEPTH else []
        named = [name for name in below if is_volume(Path(folder, name)) and not _holds_volumes(Path(folder, name))]
        yield from (path for name in sorted([*files, *named]) if is_volume(path := Path(folder, name)))


def _holds_volumes(folder: Path) -> bool:
    return any(is_volume(path) for path in folder.iterdir())


def find_gliomas(root: Path, new_names: bool | None = None) -> list[Case]:
    """List BraTS cases of any year; 2018 brings the grade of its folder."""
    cases = []
    for case in find_brats(root, new_names):
        folders = {part.upper() for path in case.images.values() for part in path.relative_to(root).parts[:-1]}
        grade = next((name for name in ("HGG", "LGG") if name in folders), None)
        cases.append(case._replace(attributes={"grade": grade} if grade else {}))
    return cases


def recognise_old_gliomas(root: Path) -> list[Case]:
    """List BraTS cases until 2021; none where a case folder holds a sequence that BraTS does not have.

    ``CASE/CASE_<sequence>`` is also how a generic folder is called, of which only four sequences would be read.
    """
    cases = find_gliomas(root, False)
    if cases and any(
        path.name.lower().startswith(path.parent.name.lower())
        and canonical_name(split_name(path)[1]) in _BEYOND_GLIOMAS
        for path in walk(root)
    ):
        return []
    return cases


def find_folder(root: Path) -> list[Case]:
    """List ``CASE/[CASE_]<sequence>.nii.gz``, files of one case in the root itself, or ``CASE_<sequence>`` there."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    cases = [_folder_case(folder.name, sorted(filter(is_volume, folder.iterdir()))) for folder in folders]
    flat = sorted(filter(is_volume, root.iterdir()))
    groups: dict[str, list[Path]] = {}
    for path in flat:
        groups.setdefault(split_name(path)[0], []).append(path)
    names = [split_name(path)[1].lower() for path in flat]
    if flat and len(set(names)) == len(names):
        cases.append(_folder_case(root.name, flat))
    else:
        cases += [_folder_case(name or root.name, paths) for name, paths in groups.items()]
    return [case for case in cases if case is not None]


def _folder_case(name: str, paths: list[Path]) -> Case | None:
    if not paths:
        return None
    found = [(split_name(path)[1], path) for path in paths]
    masks = [path for sequence, path in found if sequence.lower() in _LABEL_NAMES]
    images, surplus = one_file_each((sequence, path) for sequence, path in found if path not in masks)
    return Case(name, patient_of(name), images, {"seg": masks[-1]} if masks else {}, surplus=surplus)


#: BrainMVP's chain: 1 mm, cut symmetrically about the atlas's centre, 5th to 95th percentile to [0, 1].
ATLAS_CHAIN = Preprocessing(
    intensity=dict.fromkeys(TEMPLATES, "percentile_5_95"),
    spacing=(1.0, 1.0, 1.0),
    crop_foreground=True,
    centered=True,
    atlas=ATLAS,
)


def _layout(name: str, tree: str, find: object, labels: tuple[int, ...] = (), **more: object) -> Layout:
    settings = {"modalities": TEMPLATES, "regions": {}, "preprocessing": ATLAS_CHAIN, "crop_size": (96, 96, 96)} | more
    return Layout(name=name, tree=tree, find=find, label_values=frozenset(labels), **settings)  # type: ignore[arg-type]


def _pattern(
    name: str,
    tree: str,
    image: str,
    label: str | None = None,
    labels: tuple[int, ...] = (),
    names: Mapping[str, str] | None = None,
    study: str = Pattern.study,
    attribute: str = Pattern.attribute,
    **more: object,
) -> Layout:
    """Make a layout of a :class:`Pattern`, given as texts; further settings are those of the layout."""
    label_pattern = re.compile(label, re.IGNORECASE) if label else None
    pattern = Pattern(re.compile(image, re.IGNORECASE), label_pattern, names, study, attribute)
    return _layout(name, tree, pattern.find, labels, **more)


_END = r"\.nii(\.gz)?$"
_NATIVE = replace(ATLAS_CHAIN, atlas=None)

BRATS2023 = _layout(
    "brats2023", "ROOT/BraTS-{GLI,MEN,SSA,MET,PED}-00000-000/...-{t1c,t1n,t2f,t2w[,seg]}.nii.gz",
    partial(find_gliomas, new_names=None), (0, 1, 2, 3),
    regions=_GLIOMA_REGIONS[3], recognise=partial(find_gliomas, new_names=True),
)  # fmt: skip
BRATS2021 = _layout(
    "brats2021", "ROOT/[HGG/,LGG/]CASE/CASE_{t1ce,t1,flair,t2[,seg]}.nii.gz (2017-2021, ET = 4)",
    partial(find_gliomas, new_names=None), (0, 1, 2, 4),
    regions=_GLIOMA_REGIONS[4], recognise=recognise_old_gliomas,
)  # fmt: skip
UCSF_PDGM = _pattern(
    "ucsf_pdgm", "ROOT/UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_{ADC,DWI,FLAIR,T1,T1c,T2[,tumor_segmentation]}.nii.gz",
    r"(?P<study>(?P<patient>UCSF-PDGM-\d+)(_FU\d+d)?)_nifti/[^/]*_(?P<sequence>ADC|DWI|FLAIR|T1|T1c|T2)" + _END,
    r"(?P<study>UCSF-PDGM-\d+(_FU\d+d)?)_nifti/[^/]*_tumor_segmentation" + _END, (0, 1, 2, 4),
    regions=_GLIOMA_REGIONS[4], prefer=1,
)  # fmt: skip
UPENN_GBM = _pattern(
    "upenn_gbm", "ROOT/images_structural/UPENN-GBM-00002_11/UPENN-GBM-00002_11_{T1,T1GD,T2,FLAIR}.nii.gz, images_segm/",
    r"images_structural/(?P<study>(?P<patient>UPENN-GBM-\d+)_\d+)/[^/]*_(?P<sequence>T1|T1GD|T2|FLAIR)" + _END,
    r"images_segm/(?P<study>UPENN-GBM-\d+_\d+)_segm" + _END, (0, 1, 2, 4), regions=_GLIOMA_REGIONS[4], prefer=1,
)  # fmt: skip
IXI = _pattern(
    "ixi", "ROOT/[FOLDER/]IXI002-Guys-0828-{T1,T2,PD,MRA}.nii.gz, registered to the atlas and skull-stripped",
    r"(?P<study>(?P<patient>IXI\d+)-(Guys|HH|IOP)-\d+)-(?P<sequence>[A-Za-z0-9]+)" + _END, prefer=1,
)  # fmt: skip
ISLES22 = _pattern(
    "isles22", "ROOT/sub-strokecase0001/ses-0001/{anat/*_FLAIR,dwi/*_dwi,dwi/*_adc}.nii.gz, derivatives/ with *_msk",
    r"(?P<study>(?P<patient>sub-strokecase\d+)_ses-\d+)_(?P<sequence>flair|dwi|adc)" + _END,
    r"(?P<study>sub-strokecase\d+_ses-\d+)_msk" + _END, (0, 1), modalities=("adc", "dwi", "flair"),
    regions={"lesion": (1,)}, preprocessing=replace(_NATIVE, reference="dwi"), prefer=1,
)  # fmt: skip
MRBRAINS13 = _pattern(
    "mrbrains13", "ROOT/{TrainingData,TestData}/1/{T1,T1_IR,T2_FLAIR,LabelsForTraining}.nii",
    r"(?P<attribute>Training|Test)Data/(?P<study>\d+)/(?P<sequence>T1|T1_IR|T2_FLAIR)" + _END,
    r"(?P<attribute>Training)Data/(?P<study>\d+)/LabelsForTraining" + _END, tuple(range(9)),
    names={"t1_ir": "t1ir", "t2_flair": "flair"}, study="{attribute}-{study}", attribute="part",
    modalities=("t1", "t1ir", "flair"), regions={"CSF": (5, 6), "GM": (1, 2), "WM": (3, 4)},
    preprocessing=replace(_NATIVE, intensity=dict.fromkeys(("t1", "t1ir", "flair"), "percentile_5_95")), prefer=1,
)  # fmt: skip
VSSEG = _pattern(
    "vsseg", "ROOT/vs_gk_1/{vs_gk_t1_refT1,vs_gk_seg_refT1}.nii.gz",
    r"(?P<study>vs_gk_\d+)/vs_gk_(?P<sequence>t1_refT1)" + _END, r"(?P<study>vs_gk_\d+)/vs_gk_seg_refT1" + _END,
    (0, 1), names={"t1_reft1": "t1c"}, modalities=("t1c",), regions={"tumour": (1,)}, preprocessing=_NATIVE, prefer=1,
)  # fmt: skip
ADNI = _pattern(
    "adni", "ROOT/ADNI/002_S_0295/SERIES/DATE/I40966/*.nii",
    r"(?P<patient>\d{3}_S_\d{4})/[^/]+/[^/]+/(?P<study>I\d+)/(?P<sequence>ADNI)_[^/]*" + _END,
    names={"adni": "t1"}, modalities=("t1",), preprocessing=_NATIVE, prefer=1,
)  # fmt: skip
INDI = _pattern(
    "indi", "ROOT/SITE/0050002/session_1/anat_1/mprage.nii.gz (ADHD-200, ABIDE-I)",
    r"(?P<attribute>[^/]+)/(?P<study>\d{5,7})/session_1/anat_1/(?P<sequence>mprage)" + _END,
    names={"mprage": "t1"}, attribute="site", modalities=("t1",), preprocessing=_NATIVE, prefer=1,
)  # fmt: skip
MANIFEST = _layout(
    "brain_manifest", "ROOT/datalist.json or ROOT/dataset_*.json with training, validation [, test]", find_manifest,
    prefer=4,
)  # fmt: skip
FOLDER = _layout(
    "folder", "ROOT/CASE/[CASE_]<sequence>.nii.gz on one atlas grid, skull-stripped", find_folder, prefer=-1
)

_OFFICIAL = (BRATS2023, BRATS2021, UCSF_PDGM, UPENN_GBM, IXI, ISLES22, MRBRAINS13, VSSEG, ADNI, INDI)


def _read_source(folder: Path) -> tuple[str, list[Case]] | None:
    """Return the layout of one source and its studies; None where it has none that we know."""
    # Names of one archive may fit another's pattern too: the more particular layout wins.
    for layout in (*sorted(_OFFICIAL, key=lambda candidate: -candidate.prefer), MANIFEST, FOLDER):
        found = layout.recognised(folder)
        if layout is FOLDER:  # volumes that lie in the folder itself may be anything
            found = [case for case in found if case.images and folder not in {p.parent for p in case.images.values()}]
        if found:
            return layout.name, [case._replace(attributes={"source": layout.name, **case.attributes}) for case in found]
    return None


def find_sources(root: Path) -> list[Case]:
    """List the studies of a root whose folders are archives of different layouts; else none.

    Where one of them is a manifest that names splits, the studies of the others train.

    Raises:
        DataError: a folder beside the archives holds volumes, but is none.
    """
    parts: dict[str, list[Case]] = {}
    strange = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if (source := _read_source(folder)) is not None:
            parts.setdefault(source[0], []).extend(source[1])
        elif next(walk(folder), None) is not None:
            strange.append(folder.name)
    if len(parts) < 2 or any(
        layout.prefer > 0 and layout.name not in parts and layout.recognised(root) for layout in _OFFICIAL
    ):
        return []  # one archive, of which the folders are parts
    if strange:
        raise DataError(f"{root} holds archives ({', '.join(parts)}) and {strange[0]}, which has volumes but is of "
                        f"no known layout: bring it to {FOLDER.tree}, or move it.")  # fmt: skip
    cases = [case for found in parts.values() for case in found]
    named = any(case.split for case in cases)
    return [case._replace(split=case.split or "train") for case in cases] if named else cases


def recognise_sources(root: Path) -> list[Case]:
    """As :func:`find_sources`; a manifest in the root itself says what there is."""
    return [] if find_manifest(root) else find_sources(root)


SOURCES = _layout(
    "sources", "ROOT/{ARCHIVE,ARCHIVE,...}, each of another layout", find_sources, prefer=3, recognise=recognise_sources
)

BRAIN_LAYOUTS: tuple[Layout, ...] = (*_OFFICIAL, SOURCES, MANIFEST, FOLDER)
