"""The one list of layouts: what each gives, how a tree is recognised, and what an archive consists of.

A layout says what the files of an archive are; a profile says how they are prepared. A data module says what it needs,
and every layout that gives it can be read. A layout's module is imported only when it is used.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from common.errors import DataError
from common.runtime.reporting import contents
from datamodules.files import read_json
from datamodules.tree import Tree

#: What a layout gives and a data module needs.
VOCABULARY = ("volumes", "images", "text", "targets", "masks", "questions", "genetics", "views", "sessions")
#: Most characters of an error message.
MAX_SENTENCE = 300


class FileRef(NamedTuple):
    """The location of a file.

    Attributes:
        path: The file.
        volume: Which volume of a 4-D file, from 0; None: the file holds one.
        member: Name inside a zip archive; None for a plain file.
        series: UID of a DICOM series, whose folder is the path; None otherwise.
    """

    path: Path
    volume: int | None = None
    member: str | None = None
    series: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.volume is None else f"{self.path}[{self.volume}]"


class Record(NamedTuple):
    """One sample of an archive, whatever it holds: the output of all layouts and input of all data modules.

    Attributes:
        case_id: Unique name.
        patient_id: Splits are made by patient.
        session: Visit; empty if the archive has none.
        volumes: Modality, as the archive calls it, to file.
        images: Images with their views, such as ``PA``; an empty text means unknown.
        text: A report or caption, or its location; None: there is none.
        masks: Name to mask.
        targets: Possible targets, as text; empty: unknown.
        attributes: Further facts by name; empty: unknown.
        answers: The accepted answers, if the text is a question.
        split: ``train``, ``val`` or ``test`` where the archive defines one.
        surplus: Further files of a modality that already has one; data modules refuse them.
    """

    case_id: str
    patient_id: str
    session: str = ""
    volumes: Mapping[str, FileRef] = {}
    images: tuple[tuple[Path, str], ...] = ()
    text: str | FileRef | None = None
    masks: Mapping[str, FileRef] = {}
    targets: Mapping[str, str] = {}
    attributes: Mapping[str, str] = {}
    answers: tuple[str, ...] = ()
    split: str | None = None
    surplus: tuple[Path, ...] = ()

    def record(self) -> "Record":
        """Return itself."""
        return self

    def files(self) -> Iterable[tuple[str, Path]]:
        """Yield every file of the sample with its kind: volume, image, text or mask."""
        yield from (("volume", ref.path) for ref in self.volumes.values())
        yield from (("image", path) for path, _ in self.images)
        yield from (("volume", path) for path in self.surplus)
        yield from (("mask", ref.path) for ref in self.masks.values())
        if isinstance(self.text, FileRef):
            yield "text", self.text.path


class Sample(Protocol):
    """Protocol of the sample types: conversion to a record."""

    def record(self) -> Record:
        """Return the sample as a record."""
        ...


@dataclass(frozen=True)
class Facts:
    """Facts about a whole archive.

    Attributes:
        modalities: Channels in order; empty: those of the records.
        regions: Region to the label values that make it up.
        label_values: Every value a label may hold; empty: not checked.
        profile: Default profile, if the experiment names none.
        native: Whether volumes are known to lie in native space, so that no atlas is required.
        reference: Modality whose grid the others are resampled to; None: they share one.
        reader: How image files are decoded; None: as the data module's default.
        extract: Extracts the text to use from a report; takes the report, the part and whether redactions are kept.
        named: Whether its patients are the persons of a genetic archive.
        genome_files: Finds the genetics in a tree.
        genome_kinds: Reads genetics without files of their own kind, such as omics in a table.
        read_lesion: Reads the mask of a lesion, given its file, its image's and the shorter side.
        cut_validation: Whether to take validation patients from training, as the archive defines none.
        held_out: Split of test images in pre-training, which does not test.
    """

    modalities: tuple[str, ...] = ()
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    label_values: frozenset[int] = frozenset()
    profile: str = "native"
    native: bool = False
    reference: str | None = None
    reader: Any = None
    extract: Callable[[str, str, bool], str] | None = None
    named: bool = False
    genome_files: Callable[[Tree], Any] | None = None
    genome_kinds: Callable[[Tree], list[Any]] | None = None
    read_lesion: Callable[[Path, Path, int], Any] | None = None
    cut_validation: bool = False
    held_out: str = "test"


NO_FACTS = Facts()


@dataclass(frozen=True)
class Settings:
    """The user's settings for what a layout leaves open; the defaults say nothing.

    Attributes:
        modalities: Canonical name to the archive's.
        ignore: Patterns of files to ignore.
        masks: Name to the mask that is used, and its values.
        subject: How to find a file's owner: ``folder``, ``file``, ``study``, a column, or ``{"regex": ...}``.
        table: Name of the table under the root, or its path.
        columns: Columns of a table by role.
        pipeline: Folder under ``derivatives`` whose volumes are used.
        runs: ``"all"`` makes every run a case of its own.
        missing: ``"ignore"`` accepts table rows that name missing files.
        categories: Kinds of questions to read.
    """

    modalities: Mapping[str, str] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    masks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    subject: str | Mapping[str, str] | None = None
    table: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    pipeline: str | None = None
    runs: str | None = None
    missing: str | None = None
    categories: tuple[str, ...] = ()

    def said(self) -> list[str]:
        """Return the names of the settings that are given."""
        return [name for name, value in self.__dict__.items() if value]


NO_SETTINGS = Settings()


class Evidence(NamedTuple):
    """How clearly a tree has a layout.

    Attributes:
        score: 3 = a marker file whose content was checked, or names that only one public set has; 2 = at least 90 % of
            the image files are named as in the layout; 1 = generic; 0 = another layout.
        because: The reason for the score.
        missing: What is missing.
        near: Share of the layout that is present, 0 to 1, to name the nearest layout.
    """

    score: int
    because: str = ""
    missing: str = ""
    near: float = 0.0


@dataclass
class Archive:
    """What a layout found in a tree.

    Attributes:
        layout: The layout.
        tree: The tree.
        records: The samples.
        facts: What is known of the whole.
        reasons: Files that the layout ignores, by reason (see :mod:`datamodules.account`).
        tables: Tables and lists that were read.
        notes: Notes for the user.
    """

    layout: "Layout"
    tree: Tree
    records: list[Record]
    facts: Facts
    reasons: Mapping[str, Sequence[str]] = field(default_factory=dict)
    tables: Sequence[str] = ()
    notes: Sequence[str] = ()

    @cached_property
    def gives(self) -> frozenset[str]:
        """Kinds of data held by at least one sample."""
        found = set()
        for record in self.records:
            present = {
                "volumes": record.volumes,
                "images": record.images,
                "text": record.text,
                "targets": record.targets,
                "masks": record.masks,
                "questions": record.answers,
                "views": any(view for _, view in record.images),
                "sessions": record.session,
            }
            found |= {name for name, value in present.items() if value}
        return frozenset(found)


class Listing(NamedTuple):
    """Return value of a layout's ``find``, if there is more than samples.

    Attributes:
        samples: The samples.
        facts: Facts from the archive itself; None: those of the layout.
        reasons: Ignored files, by reason.
        tables: Tables that were read.
        notes: Notes for the user.
    """

    samples: Sequence[Sample]
    facts: Facts | None = None
    reasons: Mapping[str, Sequence[str]] = {}
    tables: Sequence[str] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Layout:
    """An arrangement of an archive's files.

    Attributes:
        name: Name for ``LAYOUT=``.
        tree: One line that shows the tree.
        find: Lists the samples of a tree; empty if it has another layout. Also takes the settings if ``takes``
            is not empty.
        evidence: Returns the evidence that a tree has this layout, from names and at most a few small files.
        facts: Facts about its archives.
        takes: Settings that it uses.
        tables: Patterns of the tables and lists that it reads.
        public: Whether it belongs to a public set, which may contain other image files; elsewhere those have no place,
            and many of them are refused.
        prefer: Among layouts with equal evidence the highest preference wins.
    """

    name: str
    tree: str
    find: Callable[..., Sequence[Any] | Listing]
    evidence: Callable[[Tree], Evidence]
    facts: Facts = NO_FACTS
    takes: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    public: bool = True
    prefer: int = 0

    def recognise(self, tree: Tree) -> Evidence:
        """Return the evidence that a tree has this layout."""
        return self.evidence(tree)

    def read(self, tree: Tree, settings: Settings = NO_SETTINGS) -> Archive:
        """List the content of a tree.

        Raises:
            DataError: unknown setting, damaged table, and the like.
        """
        strange = [name for name in settings.said() if name not in ("modalities", "ignore", *self.takes)]
        if strange:
            takes = f"it has {', '.join(self.takes)}" if self.takes else "it has none"
            raise DataError(f"{tree} is of the layout {self.name}, which has no setting {strange[0]}: {takes}.")
        found: Any = self.find(tree, settings) if self.takes else self.find(tree)
        listing = found if isinstance(found, Listing) else Listing(found)
        records = [sample.record() for sample in listing.samples]
        tables = [tree.name_of(path) for pattern in self.tables for path in tree.glob(pattern)]
        facts, tables = listing.facts or self.facts, [*tables, *listing.tables]
        return Archive(self, tree, records, facts, listing.reasons, tables, listing.notes)


def marked(*marks: str | tuple[str, ...], score: int = 3) -> Callable[[Tree], Evidence]:
    """Make the evidence function of a layout identified by its files: each mark is a pattern, or several alternatives.

    Args:
        *marks: Patterns, each of which must match a file or folder.
        score: Evidence if they do.
    """

    def evidence(tree: Tree) -> Evidence:
        found, missing = [], []
        for mark in marks:
            patterns = (mark,) if isinstance(mark, str) else mark
            path = tree.first(*patterns)
            if path is None:
                missing.append(" or ".join(patterns[:2]))
            else:
                found.append(tree.name_of(path))
        near = len(found) / len(marks)
        return Evidence(0 if missing else score, ", ".join(found), ", ".join(missing), near)

    return evidence


class Entry(NamedTuple):
    """One line of the list.

    Attributes:
        name: Name for ``LAYOUT=``.
        at: Module and name of the :class:`Layout`.
        gives: What it can give; an archive may give less.
        labels: Module and class of the labels for ``labels:``; empty: none.
        title: Name in messages; empty: ``name``.
    """

    name: str
    at: str
    gives: frozenset[str]
    labels: str = ""
    title: str = ""

    def load(self) -> Layout:
        """Import the layout."""
        module, _, name = self.at.partition(":")
        layout: Layout = getattr(import_module(module), name)
        return layout


def _entry(name: str, at: str, gives: str, labels: str = "", title: str = "") -> Entry:
    return Entry(name, f"datamodules.{at}", frozenset(gives.split()), labels and f"datamodules.{labels}", title)


#: Every layout, and the only list of them.
LAYOUTS: tuple[Entry, ...] = (
    _entry("brats2023", "volumes.brats:BRATS2023", "volumes masks", title="BraTS 2023"),
    _entry("brats2021", "volumes.brats:BRATS2021", "volumes masks", title="BraTS 2021"),
    _entry("pi_cai", "volumes.pi_cai:PI_CAI", "volumes masks targets", title="PI-CAI"),
    _entry("lung", "volumes.folder:LUNG", "volumes masks targets"),
    _entry("folder", "volumes.folder:FOLDER", "volumes masks targets sessions"),
    _entry("bids", "volumes.bids:BIDS", "volumes images masks targets sessions", title="BIDS"),
    _entry("msd", "volumes.decathlon:MSD", "volumes masks", title="Medical Decathlon"),
    _entry("nnunet", "volumes.decathlon:NNUNET", "volumes images masks", title="nnU-Net"),
    _entry("ucsf_pdgm", "brain.layouts:UCSF_PDGM", "volumes masks", title="UCSF-PDGM"),
    _entry("upenn_gbm", "brain.layouts:UPENN_GBM", "volumes masks", title="UPENN-GBM"),
    _entry("ixi", "brain.layouts:IXI", "volumes", title="IXI"),
    _entry("isles22", "brain.layouts:ISLES22", "volumes masks", title="ISLES 2022"),
    _entry("mrbrains13", "brain.layouts:MRBRAINS13", "volumes masks", title="MRBrainS13"),
    _entry("vsseg", "brain.layouts:VSSEG", "volumes masks", title="VSSeg"),
    _entry("adni", "brain.layouts:ADNI", "volumes", title="ADNI"),
    _entry("indi", "brain.layouts:INDI", "volumes", title="INDI"),
    _entry("sources", "brain.layouts:SOURCES", "volumes masks"),
    _entry("brain_manifest", "brain.layouts:MANIFEST", "volumes masks"),
    _entry("images", "images.plain:IMAGES", "images views sessions", title="plain image"),
    _entry("class_folders", "images.plain:CLASS_FOLDERS", "images targets views sessions", title="class folder"),
    _entry("mimic_cxr", "reports.mimic_cxr:MIMIC_CXR", "images text views targets", title="MIMIC-CXR"),
    _entry("open_i", "reports.open_i:OPEN_I", "images text", title="Open-I"),
    _entry("covid_cxr", "reports.covid_cxr:COVID_CXR", "images text views",
           "labelled.covid:CovidFindings", "COVID-19 image collection"),
    _entry("manifest", "images.table:MANIFEST", "images text views targets masks sessions"),
    _entry("table", "images.table:TABLE", "images text views targets masks sessions", "labelled.layout:LabelledTable"),
    _entry("medicat", "reports.medicat:MEDICAT", "images text", title="MedICaT"),
    _entry("medicat_all", "reports.medicat:MEDICAT_ALL", "images text", title="MedICaT"),
    _entry("roco", "reports.roco:ROCO", "images text", title="ROCO"),
    _entry("medicat_roco", "reports.roco:MEDICAT_ROCO", "images text"),
    _entry("melinda", "reports.melinda:MELINDA", "images text", title="MELINDA"),
    _entry("vqa_rad", "pairs.vqa:VQA_RAD", "images text questions", title="VQA-RAD"),
    _entry("slake", "pairs.vqa:SLAKE", "images text questions", title="SLAKE"),
    _entry("vqa_med_2019", "pairs.vqa:VQA_MED", "images text questions", title="VQA-Med-2019"),
    _entry("ukb", "genetics.ukb:UKB", "images genetics targets", "genetics.ukb:UKBRisk", "UK Biobank"),
    _entry("tcga_gbmlgg", "genetics.tcga:TCGA", "images genetics targets", "genetics.tcga:TCGAGrade", "TCGA GBM-LGG"),
    _entry("idrid", "labelled.fundus:IDRID", "images targets", "labelled.fundus:IDRiD", "IDRiD"),
    _entry("aptos2019", "labelled.fundus:APTOS", "images targets", "labelled.fundus:APTOS2019", "APTOS 2019"),
    _entry("eyepacs2015", "labelled.fundus:EYEPACS", "images targets", "labelled.fundus:EyePACS2015", "EyePACS 2015"),
    _entry("rfmid", "labelled.fundus:RFMID", "images targets", "labelled.fundus:RFMiD", "RFMiD"),
    _entry("palm", "labelled.palm:PALM", "images masks", "labelled.palm:PALMStructures", "PALM"),
    _entry("chexpert", "labelled.chexpert:CHEXPERT", "images targets views", "labelled.chexpert:CheXpert", "CheXpert"),
    _entry("nih_cxr14", "labelled.nih_cxr:NIH_CXR14", "images targets",
           "labelled.nih_cxr:NIHChestXray14", "NIH ChestX-ray14"),
    _entry("rsna_pneumonia", "labelled.rsna:RSNA", "images targets", "labelled.rsna:RSNAPneumonia", "RSNA Pneumonia"),
    _entry("siim_pneumothorax", "labelled.siim:SIIM", "images targets masks",
           "labelled.siim:SIIMPneumothorax", "SIIM-ACR"),
)  # fmt: skip


def entry_of(name: str) -> Entry:
    """Return the entry of a layout.

    Raises:
        DataError: unknown layout; the message names the nearest.
    """
    found = next((entry for entry in LAYOUTS if entry.name == name), None)
    if found is None:
        near = get_close_matches(name, [entry.name for entry in LAYOUTS], 3, 0.5)
        hint = f"; nearest are {', '.join(near)}" if near else ""
        raise DataError(f"Unknown layout {name!r}{hint}; without LAYOUT= it is recognised from the tree.")
    return found


def in_words(names: Iterable[str]) -> str:
    """Return names as an English list, ``volumes, masks and targets``, in the order of the vocabulary."""
    wanted = set(names)
    *first, last = [name for name in VOCABULARY if name in wanted] or ["nothing"]
    return f"{', '.join(first)} and {last}" if first else last


def unsuited(entry: Entry, gives: Iterable[str], needs: frozenset[str], purpose: str, root: object) -> DataError:
    """Return the error message for an archive that lacks required data."""
    missing = needs - set(gives)
    verb = "is" if missing == {"text"} else "are"
    title = entry.title or entry.name
    article = "An" if title[0].lower() in "aeiou" or title[:2] in ("MS", "NI", "RF", "RS") else "A"
    return DataError(f"{article} {title} archive gives {in_words(gives)}; {purpose} needs {in_words(needs)}, so "
                     f"{in_words(missing)} {verb} lacking in {shortened(str(root), 80)}.")  # fmt: skip


class _Match(NamedTuple):
    entry: Entry
    layout: Layout
    evidence: Evidence

    @property
    def rank(self) -> tuple[int, int]:
        """Rank of the evidence; the highest wins."""
        return self.evidence.score, self.layout.prefer


def _matches(tree: Tree, entries: Iterable[Entry]) -> list[_Match]:
    found = []
    for entry in entries:
        layout = entry.load()
        found.append(_Match(entry, layout, layout.recognise(tree)))
    return found


def _best(tree: Tree, matches: Sequence[_Match]) -> _Match | None:
    """Return the match with the strongest evidence; None without a match.

    Raises:
        DataError: several are equally strong.
    """
    found = [match for match in matches if match.evidence.score]
    if not found:
        return None
    highest = max(match.rank for match in found)
    first, *rest = [match for match in found if match.rank == highest]
    if rest:
        names = ", ".join(match.entry.name for match in (first, *rest))
        raise DataError(f"{tree} could be of several layouts ({names}): choose one with LAYOUT=.")
    return first


def recognise(tree: Tree, needs: frozenset[str], purpose: str = "this") -> tuple[Layout, Evidence]:
    """Recognise the layout of a tree, among those that give what is needed.

    Raises:
        DataError: unknown layout (the message names the nearest), an ambiguous one, or one that lacks what is needed.
    """
    suited = [entry for entry in LAYOUTS if needs <= entry.gives]
    matches = _matches(tree, suited)
    best = _best(tree, matches)
    if best is None or best.evidence.score == 1:
        others = _matches(tree, [entry for entry in LAYOUTS if entry not in suited])
        other = _best(tree, others)
        if other is not None and (best is None or other.evidence.score > 1):
            raise unsuited(other.entry, _given(other, tree), needs, purpose, tree)
        matches += others
    if best is None:
        raise DataError(_unknown(tree, matches))
    return best.layout, best.evidence


def _given(match: _Match, tree: Tree) -> frozenset[str]:
    """Return what an archive gives; what its layout can give, if reading it needs further settings."""
    try:
        return match.layout.read(tree).gives
    except DataError:
        return match.entry.gives


def _unknown(tree: Tree, matches: Sequence[_Match]) -> str:
    """Return the error for an unknown layout, with the nearest one and what it lacks."""
    nearest = max(matches, key=lambda match: (match.evidence.near, match.layout.prefer))
    lacks = f"nearest is {nearest.entry.name}, which lacks {shortened(nearest.evidence.missing, 70)}; "
    end = f"{lacks if nearest.evidence.near else ''}medmim init DIR shows every file."
    holds = shortened(contents(tree.root), 60)
    room = MAX_SENTENCE - 40 - len(holds) - len(end)
    return f"{shortened(str(tree), room)} is of no known layout (it holds {holds}): {end}"


def shortened(text: str, room: int) -> str:
    """Return a text shortened to a number of characters by leaving out the middle."""
    if len(text) <= room:
        return text
    half = max((room - 3) // 2, 1)
    return f"{text[:half]}...{text[-half:]}"


def open_archive(
    root: str | Path | Tree,
    layout: str = "auto",
    needs: Iterable[str] = (),
    purpose: str = "this",
    settings: Settings = NO_SETTINGS,
    optional: Iterable[str] = ("genetics", "masks", "targets"),
) -> Archive:
    """Walk a root, recognise its layout, and list its samples.

    Args:
        root: The archive.
        layout: A layout's name, or ``"auto"``.
        needs: What the archive must give, from :data:`VOCABULARY`.
        purpose: Who needs it, for error messages.
        settings: The user's settings for the archive.
        optional: What the layout must give, but this archive may lack.

    Raises:
        DataError: the root does not exist, its layout is unknown, ambiguous or not the requested one, it lacks what
            is needed, or its files are links without content.
    """
    wanted = frozenset(needs)
    if layout != "auto":
        entry = entry_of(layout)
        if not wanted <= entry.gives:
            raise unsuited(entry, entry.gives, wanted, purpose, root)
    tree = root if isinstance(root, Tree) else Tree(root)
    if settings.ignore:
        tree = tree.without(settings.ignore)
    tree.report_content()
    chosen = entry.load() if layout != "auto" else recognise(tree, wanted, purpose)[0]
    archive = chosen.read(tree, settings)
    if not archive.records:
        held = f"({shortened(chosen.tree, 110)}); it holds {shortened(contents(tree.root), 50)}"
        raise DataError(f"{shortened(str(tree), 80)} is not of the layout {chosen.name} {held}.")
    if missing := wanted - archive.gives - set(optional):
        raise unsuited(entry_of(chosen.name), archive.gives - missing, wanted, purpose, tree)
    return archive


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; numbers are kept as text.

    Raises:
        DataError: it cannot be read, or is not an object.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a JSON object.")
    return content


def described(tree: Tree, name: str, *keys: str) -> dict[str, Any] | None:
    """Return the object in a JSON file of a tree if it has all keys; otherwise None."""
    if not tree.is_file(name):
        return None
    try:
        content = read_object(tree / name)
    except DataError:
        return None
    return content if all(key in content for key in keys) else None


#: Share of DICOM among files that are not text, from which on a tree counts as DICOM.
_MOSTLY = 0.9


def foreign_marker(tree: Tree) -> str | None:
    """Return the file that excludes the generic layouts; None without one."""
    if described(tree, "dataset_description.json", "BIDSVersion"):
        return "dataset_description.json"
    for place in ("", *(f"{name}/" for name in tree.folders() if tree.is_dir(f"{name}/imagesTr"))):
        if tree.is_file(f"{place}dataset.json") and tree.is_dir(f"{place}imagesTr"):
            return f"{place}dataset.json"
    if tree.is_file("DICOMDIR"):
        return "DICOMDIR"
    data = [file for file in tree.files if file.kind not in ("text", "sidecar", "table") and not file.hidden]
    series = sum(file.kind == "series" for file in data)
    return f"{series} DICOM files" if series and series >= _MOSTLY * len(data) else None
