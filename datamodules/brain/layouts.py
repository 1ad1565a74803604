"""Official layouts of brain archives, with canonical names of sequences and the labels of each release.

A layout here is a pattern over the paths under a root. Whether an archive is in atlas space (skull-stripped, on the
atlas's grid) is decided from its volumes: see :attr:`datamodules.volumes.cases.Preprocessing.atlas`.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError
from common.modalities import CANONICAL, canonical_name
from datamodules.brain.manifest import find_manifest, recognise_manifest
from datamodules.registry import LAYOUTS, NO_FACTS, Evidence, Facts, Layout, Listing, Record
from datamodules.tree import Tree, TreeFile
from datamodules.volumes.cases import Case
from datamodules.volumes.modalities import one_file_each

#: Regions of a glioma by the label of the enhancing part, in the order of BrainMVP's outputs.
_GLIOMA = {"TC": (1, 4), "WT": (1, 2, 4), "ET": (4,)}
_GLIOMA_VALUES = frozenset({0, 1, 2, 4})
_MAX_DEPTH = 6
_SUFFIXES = (".nii.gz", ".nii")
#: With more folders than this, a root holds cases, not archives.
_MAX_SOURCES = 64
#: BIDS folders that belong to the archive next to them.
_NO_ARCHIVES = ("derivatives", "sourcedata", "code")


@dataclass(frozen=True)
class Pattern:
    """File names of an official layout, as case-insensitive regular expressions over paths under the root.

    Attributes:
        image: Has the groups ``study`` and ``sequence``; ``patient`` if it differs from the study; ``attribute`` for
            a further fact in the path.
        label: Has the group ``study``.
        names: Written to canonical name of a sequence, for unusual spellings.
        study: Template of a study's name from the groups.
        attribute: Name of the attribute.
        example: A name that the pattern matches.
    """

    image: re.Pattern[str]
    label: re.Pattern[str] | None = None
    names: Mapping[str, str] | None = None
    study: str = "{study}"
    attribute: str = ""
    example: str = ""

    def find(self, tree: Tree) -> list[Case]:
        """List the studies of a tree."""
        cases: dict[str, Case] = {}
        labels: dict[str, TreeFile] = {}
        for file in volumes(tree):
            if self.label is not None and (match := self.label.search(file.name)):
                labels.setdefault(self.study.format(**match.groupdict()).lower(), file)
            elif match := self.image.search(file.name):
                self._add(cases, tree / file.name, match.groupdict())
        return [case._replace(labels={"seg": tree / labels[key.lower()].name} if key.lower() in labels else {})
                for key, case in cases.items()]  # fmt: skip

    def recognise(self, tree: Tree) -> Evidence:
        """Return the evidence that a volume has a name used only by this public set."""
        found = next((file for file in volumes(tree) if self.image.search(file.name)), None)
        return Evidence(0, missing=self.example) if found is None else Evidence(3, f"names such as {found.name}")

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


def volumes(tree: Tree) -> Iterator[TreeFile]:
    """Yield the NIfTI files of a tree, at most six levels down, ordered by name."""
    return (file for file in tree.under("", _SUFFIXES) if not file.hidden and file.name.count("/") <= _MAX_DEPTH)


def _pattern(
    name: str,
    tree: str,
    image: str,
    label: str | None = None,
    facts: Facts = NO_FACTS,
    names: Mapping[str, str] | None = None,
    study: str = Pattern.study,
    attribute: str = Pattern.attribute,
) -> Layout:
    """Make a layout from a :class:`Pattern`, given as texts."""
    label_pattern = re.compile(label, re.IGNORECASE) if label else None
    example = tree.removeprefix("ROOT/").split("{", 1)[0]
    pattern = Pattern(re.compile(image, re.IGNORECASE), label_pattern, names, study, attribute, example)
    return Layout(name, tree, pattern.find, pattern.recognise, facts, prefer=1)


_END = r"\.nii(\.gz)?$"
_GLIOMA_FACTS = Facts(regions=_GLIOMA, label_values=_GLIOMA_VALUES)

UCSF_PDGM = _pattern(
    "ucsf_pdgm", "ROOT/UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_{ADC,DWI,FLAIR,T1,T1c,T2[,tumor_segmentation]}.nii.gz",
    r"(?P<study>(?P<patient>UCSF-PDGM-\d+)(_FU\d+d)?)_nifti/[^/]*_(?P<sequence>ADC|DWI|FLAIR|T1|T1c|T2)" + _END,
    r"(?P<study>UCSF-PDGM-\d+(_FU\d+d)?)_nifti/[^/]*_tumor_segmentation" + _END,
    _GLIOMA_FACTS,
)  # fmt: skip
UPENN_GBM = _pattern(
    "upenn_gbm", "ROOT/images_structural/UPENN-GBM-00002_11/UPENN-GBM-00002_11_{T1,T1GD,T2,FLAIR}.nii.gz, images_segm/",
    r"images_structural/(?P<study>(?P<patient>UPENN-GBM-\d+)_\d+)/[^/]*_(?P<sequence>T1|T1GD|T2|FLAIR)" + _END,
    r"images_segm/(?P<study>UPENN-GBM-\d+_\d+)_segm" + _END, _GLIOMA_FACTS,
)  # fmt: skip
IXI = _pattern(
    "ixi", "ROOT/[FOLDER/]IXI002-Guys-0828-{T1,T2,PD,MRA}.nii.gz, registered to the atlas and skull-stripped",
    r"(?P<study>(?P<patient>IXI\d+)-(Guys|HH|IOP)-\d+)-(?P<sequence>[A-Za-z0-9]+)" + _END,
)  # fmt: skip
ISLES22 = _pattern(
    "isles22", "ROOT/sub-strokecase0001/ses-0001/{anat/*_FLAIR,dwi/*_dwi,dwi/*_adc}.nii.gz, derivatives/ with *_msk",
    r"(?P<study>(?P<patient>sub-strokecase\d+)_ses-\d+)_(?P<sequence>flair|dwi|adc)" + _END,
    r"(?P<study>sub-strokecase\d+_ses-\d+)_msk" + _END,
    Facts(("adc", "dwi", "flair"), {"lesion": (1,)}, frozenset({0, 1}), native=True, reference="dwi"),
)  # fmt: skip
MRBRAINS13 = _pattern(
    "mrbrains13", "ROOT/{TrainingData,TestData}/1/{T1,T1_IR,T2_FLAIR,LabelsForTraining}.nii",
    r"(?P<attribute>Training|Test)Data/(?P<study>\d+)/(?P<sequence>T1|T1_IR|T2_FLAIR)" + _END,
    r"(?P<attribute>Training)Data/(?P<study>\d+)/LabelsForTraining" + _END,
    Facts(("t1", "t1ir", "flair"), {"CSF": (5, 6), "GM": (1, 2), "WM": (3, 4)}, frozenset(range(9)), native=True),
    names={"t1_ir": "t1ir", "t2_flair": "flair"}, study="{attribute}-{study}", attribute="part",
)  # fmt: skip
VSSEG = _pattern(
    "vsseg", "ROOT/vs_gk_1/{vs_gk_t1_refT1,vs_gk_seg_refT1}.nii.gz",
    r"(?P<study>vs_gk_\d+)/vs_gk_(?P<sequence>t1_refT1)" + _END, r"(?P<study>vs_gk_\d+)/vs_gk_seg_refT1" + _END,
    Facts(("t1c",), {"tumour": (1,)}, frozenset({0, 1}), native=True), names={"t1_reft1": "t1c"},
)  # fmt: skip
ADNI = _pattern(
    "adni", "ROOT/ADNI/002_S_0295/SERIES/DATE/I40966/*.nii",
    r"(?P<patient>\d{3}_S_\d{4})/[^/]+/[^/]+/(?P<study>I\d+)/(?P<sequence>ADNI)_[^/]*" + _END,
    facts=Facts(("t1",), native=True), names={"adni": "t1"},
)  # fmt: skip
INDI = _pattern(
    "indi", "ROOT/SITE/0050002/session_1/anat_1/mprage.nii.gz (ADHD-200, ABIDE-I)",
    r"(?P<attribute>[^/]+)/(?P<study>\d{5,7})/session_1/anat_1/(?P<sequence>mprage)" + _END,
    facts=Facts(("t1",), native=True), names={"mprage": "t1"}, attribute="site",
)  # fmt: skip
MANIFEST = Layout(
    "brain_manifest", "ROOT/datalist.json or ROOT/dataset_*.json with training, validation [, test]", find_manifest,
    recognise_manifest, prefer=4,
)  # fmt: skip


def _archives(tree: Tree) -> tuple[dict[str, tuple[Layout, Tree]], list[str]]:
    """Return the layout of each folder of a root, and the folders with volumes whose layout is unknown."""
    known = [entry.load() for entry in LAYOUTS if "volumes" in entry.gives and entry.name != "sources"]
    found: dict[str, tuple[Layout, Tree]] = {}
    strange = []
    folders = [name for name in tree.folders() if name.lower() not in _NO_ARCHIVES]
    for folder in folders if len(folders) <= _MAX_SOURCES else []:
        below = tree.sub(folder)
        plain = [(evidence.score, layout.prefer, layout) for layout in known
                 if (evidence := layout.recognise(below)).score]  # fmt: skip
        # Volumes directly in the folder may be anything, such as one case of a generic tree.
        plain = [entry for entry in plain if entry[0] > 1 or not any(file.kind == "volume" for file in below.listed())]
        if plain:
            found[folder] = max(plain, key=lambda entry: entry[:2])[2], below
        elif next(volumes(below), None) is not None:
            strange.append(folder)
    return found, strange


def find_sources(tree: Tree) -> Listing:
    """List the studies of a root whose folders are archives of different layouts; otherwise empty.

    If one of them is a manifest with splits, the studies of the others are for training.

    Raises:
        DataError: a folder next to the archives holds volumes but has no known layout.
    """
    found, strange = _archives(tree)
    parts: dict[str, list[Record]] = {}
    for layout, below in found.values():
        records = layout.read(below).records
        sources = [record._replace(attributes={"source": layout.name, **record.attributes}) for record in records]
        parts.setdefault(layout.name, []).extend(sources)
    if not _differ(tree, parts):
        return Listing([])
    if strange:
        raise DataError(f"{tree} holds archives ({', '.join(parts)}) and {strange[0]}, which has volumes but is of no "
                        f"known layout: bring it to the layout folder, or move it.")  # fmt: skip
    joined = [record for records in parts.values() for record in records]
    named = any(record.split for record in joined)
    return Listing([record._replace(split=record.split or "train") for record in joined] if named else joined)


def _differ(tree: Tree, names: Collection[str]) -> bool:
    """Whether folders are archives of different layouts, not parts of one public set."""
    public = (UCSF_PDGM, UPENN_GBM, IXI, ISLES22, MRBRAINS13, VSSEG, ADNI, INDI)
    return len(names) > 1 and not any(layout.name not in names and layout.recognise(tree).score for layout in public)


def _recognise_sources(tree: Tree) -> Evidence:
    """Return the evidence that folders are archives of different layouts; a manifest in the root takes precedence."""
    if recognise_manifest(tree).score:
        return Evidence(0, missing="folders that are archives")
    names = {layout.name for layout, _ in _archives(tree)[0].values()}
    if not _differ(tree, names):
        return Evidence(0, missing="folders that are archives of different layouts")
    return Evidence(3, f"folders of the layouts {', '.join(sorted(names))}")


SOURCES = Layout(
    "sources", "ROOT/{ARCHIVE,ARCHIVE,...}, each of another layout", find_sources, _recognise_sources, prefer=3
)
