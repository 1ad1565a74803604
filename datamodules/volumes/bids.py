"""BIDS: raw anatomical volumes of subjects and sessions, their tables, and the derivatives that the settings name.

The grammar of names is one regular expression (Brain Imaging Data Structure, schema ``rules.files.raw.anat``):
``sub-01[/ses-1]/anat/sub-01[_ses-1][_key-value...]_T1w.nii.gz``. Labels are text: ``01`` is not ``1``.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import NamedTuple

from common.errors import DataError
from datamodules.account import (
    ACQUISITION,
    DISAGREE,
    LISTED,
    MAP,
    MASK,
    PARAMETRIC,
    PART,
    PIPELINE,
    RUN,
    SOURCE,
    TIME,
)
from datamodules.files import read_lines
from datamodules.registry import (
    NO_SETTINGS,
    Evidence,
    Facts,
    FileRef,
    Layout,
    Listing,
    Record,
    Settings,
    described,
    shortened,
)
from datamodules.tables import read_table
from datamodules.tree import Tree, TreeFile
from datamodules.volumes.masks import all_values, chosen_masks

#: Suffix of a name to modality.
MODALITIES = {
    "T1w": "t1", "inplaneT1": "t1", "T2w": "t2", "inplaneT2": "t2", "FLAIR": "flair", "PDw": "pd", "PD": "pd",
    "T2starw": "t2star", "T2star": "t2star", "swi": "swi", "angio": "mra", "UNIT1": "unit1", "ct": "ct", "pet": "pet",
}  # fmt: skip
_MICROSCOPY = frozenset({
    "TEM", "SEM", "uCT", "BF", "DF", "PC", "DIC", "FLUO", "CONF", "PLI", "CARS", "2PE", "MPE", "SR", "NLO", "OCT",
    "SPIM", "XPCT",
})  # fmt: skip
_TIME = frozenset({"bold", "cbv", "sbref", "asl", "epi", "dwi", "m0scan", "aslcontext"})
_PARAMETRIC = frozenset({"PDT2", "MESE", "MEGRE", "VFA", "MP2RAGE", "MPM", "MTS", "MTR", "IRT1", "TB1TFL", "FLASH"})
_MAPS = frozenset({
    "T1map", "T2map", "T2starmap", "R1map", "R2map", "R2starmap", "PDmap", "MTRmap", "MTsat", "MWFmap", "Chimap",
    "M0map", "S0map", "TB1map", "RB1map", "defacemask",
})  # fmt: skip
_FOLDERS = frozenset({"func", "fmap", "eeg", "ieeg", "meg", "beh", "motion", "nirs", "mrs", "dwi", "perf"})
#: Entities of series in which a parameter of the acquisition varies.
_VARIED = ("echo", "inv", "flip", "mt")
_SOURCES = ("sourcedata", "code", "stimuli")
_NAME = re.compile(r"(?P<entities>(?:[A-Za-z]+-[A-Za-z0-9+]+_)+)(?P<suffix>[A-Za-z0-9]+)")
_PLACE = re.compile(r"sub-(?P<sub>[^/]+)/(?:ses-(?P<ses>[^/]+)/)?(?:(?P<kind>[a-z]+)/)?[^/]+")
_MASK = re.compile(rf"(?P<raw>(?:[A-Za-z]+-[A-Za-z0-9+]+_)+(?:{'|'.join(MODALITIES)}))_(?P<mask>[A-Za-z0-9-]+)")
_DESCRIPTION = "dataset_description.json"
_IGNORE = ".bidsignore"
_UNKNOWN = "n/a"
#: Share of volumes that must follow BIDS names if there is no dataset_description.json.
_MOSTLY = 0.9


class Name(NamedTuple):
    """The parts of a file name.

    Attributes:
        entities: Key to label.
        suffix: What follows the last ``_``.
    """

    entities: Mapping[str, str]
    suffix: str

    @property
    def case(self) -> str:
        """Subject and session: ``sub-01_ses-1``."""
        session = self.entities.get("ses")
        return f"sub-{self.entities.get('sub', '')}" + (f"_ses-{session}" if session else "")

    @property
    def modality(self) -> str | None:
        """Modality; None if the suffix does not name one."""
        name = MODALITIES.get(self.suffix)
        return "t1c" if name == "t1" and "ce" in self.entities else name

    @property
    def variant(self) -> str:
        """Entities that distinguish files of one modality, such as ``acq-hires_run-02``; empty if there are none."""
        return "_".join(f"{key}-{self.entities[key]}" for key in ("acq", "rec", "run") if key in self.entities)


def parsed(stem: str) -> Name | None:
    """Parse a name without its file suffix; None if it is not a BIDS name."""
    match = _NAME.fullmatch(stem)
    if match is None:
        return None
    entities = dict(part.split("-", 1) for part in match["entities"].strip("_").split("_"))
    return Name(entities, match["suffix"]) if "sub" in entities else None


def _plainness(name: Name) -> tuple[bool, int, str]:
    """Return the sort key for files of one modality: those without acquisition or reconstruction first, then by run."""
    digits = re.sub(r"\D", "", name.entities.get("run", "")) or "0"
    return ("acq" in name.entities or "rec" in name.entities, int(digits), name.variant)


class _Raw(NamedTuple):
    file: TreeFile
    name: Name


def _reason(name: Name, kind: str) -> str | None:
    """Return why a raw volume is not used; None if it may be used."""
    rules = (
        (name.suffix in _TIME or kind in ("dwi", "perf"), TIME),
        (kind in _FOLDERS, ACQUISITION),
        (name.suffix in _PARAMETRIC or any(key in name.entities for key in _VARIED), PARAMETRIC),
        (name.suffix in _MAPS, MAP),
        (name.entities.get("part") in ("phase", "real", "imag"), PART),
    )
    return next((reason for holds, reason in rules if holds), None)


class _Dataset:
    """The files of a BIDS data set by kind.

    Args:
        tree: The tree.
        settings: What the user says about it.
    """

    def __init__(self, tree: Tree, settings: Settings) -> None:
        self.tree, self.settings = tree, settings
        self.reasons: dict[str, list[str]] = {}
        self.raw: list[_Raw] = []
        self.derived: list[TreeFile] = []
        self.micrographs: list[_Raw] = []
        description = described(tree, _DESCRIPTION) or {}
        self._is_pipeline = description.get("DatasetType") == "derivative"
        patterns = read_lines(tree / _IGNORE) if tree.is_file(_IGNORE) else []
        self._patterns = [line.strip().lstrip("/") for line in patterns if line.strip() and not line.startswith("#")]
        for file in tree.images:
            self._sort(file)

    def leave(self, reason: str, file: TreeFile) -> None:
        """Set a file aside."""
        self.reasons.setdefault(reason, []).append(file.name)

    def _sort(self, file: TreeFile) -> None:
        top = file.name.partition("/")[0]
        if any(_ignored(file.name, pattern) for pattern in self._patterns):
            self.leave(LISTED, file)
        elif top in _SOURCES:
            self.leave(SOURCE, file)
        elif top == "derivatives":
            self.derived.append(file)
        elif (place := _PLACE.fullmatch(file.name)) and (name := parsed(file.stem)):
            self._sort_raw(file, name, place)
        elif place and _MASK.fullmatch(file.stem):
            self.derived.append(file)

    def _sort_raw(self, file: TreeFile, name: Name, place: re.Match[str]) -> None:
        """Sort a subject's file by kind; files of unknown kind are left for the account."""
        entities = name.entities
        if entities["sub"] != place["sub"] or (place["ses"] or "") != entities.get("ses", ""):
            self.leave(DISAGREE, file)
        elif reason := _reason(name, place["kind"] or ""):
            self.leave(reason, file)
        elif self._is_pipeline and (entities.get("desc") != "preproc" or name.modality is None):
            self.derived.append(file)
        elif file.kind == "volume" and name.modality is not None:
            self.raw.append(_Raw(file, name))
        elif file.kind == "image" and name.suffix in _MICROSCOPY:
            self.micrographs.append(_Raw(file, name))

    def volumes(self) -> list[_Raw]:
        """Return the volumes to use: the raw ones, or those of the chosen pipeline.

        Raises:
            DataError: there is no such pipeline, or it has volumes in several spaces.
        """
        if self.settings.pipeline is None:
            return self.raw
        start = f"derivatives/{self.settings.pipeline}/"
        within = [file for file in self.derived if file.name.startswith(start)]
        if not within:
            held = ", ".join(self.tree.folders("derivatives")) or "none"
            raise DataError(f"There is no pipeline {self.settings.pipeline} under {self.tree / 'derivatives'}; there "
                            f"are {held}.")  # fmt: skip
        named = [_Raw(file, name) for file in within if (name := parsed(file.stem)) and file.kind == "volume"]
        found = [raw for raw in named if raw.name.modality and raw.name.entities.get("desc") in ("preproc", None)]
        self.derived = [file for file in self.derived if file not in {raw.file for raw in found}]
        for raw in self.raw:
            self.leave(PIPELINE, raw.file)
        return _one_space(found, self.settings.pipeline)

    def masks(self) -> Iterator[tuple[str, str, str, TreeFile]]:
        """Yield case, modality that a mask was drawn on (or nothing), the mask's name, and its file."""
        for file in self.derived:
            if file.kind != "volume":
                self.leave(PIPELINE, file)
                continue
            match, name = _MASK.fullmatch(file.stem), parsed(file.stem)
            if match and (raw := parsed(match["raw"])):
                yield raw.case, raw.modality or "", match["mask"], file
            elif name and name.suffix in ("dseg", "mask", "probseg"):
                parts = [f"{key}-{name.entities[key]}" for key in ("label", "desc") if key in name.entities]
                yield name.case, "", "_".join([*parts, name.suffix]), file
            else:
                self.leave(PIPELINE, file)


def _ignored(name: str, pattern: str) -> bool:
    """Whether ``.bidsignore`` excludes a file; its patterns match paths, names, or folders with everything below."""
    plain = pattern.rstrip("/").replace("**/", "*")
    return fnmatch(name, plain) or fnmatch(name.rpartition("/")[2], plain) or fnmatch(name, f"{plain}/*")


def _one_space(found: Sequence[_Raw], pipeline: str) -> list[_Raw]:
    """Keep the volumes of one space per case, preferring native space, whose files name no space.

    Raises:
        DataError: a case has volumes in several spaces and none in native space.
    """
    spaces: dict[str, set[str]] = {}
    for raw in found:
        spaces.setdefault(raw.name.case, set()).add(raw.name.entities.get("space", ""))
    for case, names in spaces.items():
        if len(names) > 1 and "" not in names:
            raise DataError(f"{pipeline} has {case} in the spaces {', '.join(sorted(names))}: name all but one under "
                            f"ignore, such as *space-{min(names)}*.")  # fmt: skip
    return [raw for raw in found if raw.name.entities.get("space", "") == min(spaces[raw.name.case])]


class _Visit(NamedTuple):
    """The volumes of one case by modality."""

    name: Name
    files: dict[str, _Raw]


def _visits(dataset: _Dataset, runs: str | None) -> dict[str, _Visit]:
    """Choose one file per modality and session; ``all`` makes each further run a case of its own."""
    found: dict[str, _Visit] = {}
    for raw in sorted(dataset.volumes(), key=lambda raw: (raw.name.case, _plainness(raw.name), raw.file.name)):
        modality = raw.name.modality or ""
        visit = found.setdefault(raw.name.case, _Visit(raw.name, {}))
        if modality not in visit.files:
            visit.files[modality] = raw
        elif runs == "all":
            key = f"{raw.name.case}_{raw.name.variant or raw.file.stem}"
            found.setdefault(key, _Visit(raw.name, {})).files.setdefault(modality, raw)
        else:
            shown = f" ({raw.name.variant})" if raw.name.variant else ""
            dataset.leave(f"{RUN} {modality}{shown}", raw.file)
    return found


def _masks(
    dataset: _Dataset, visits: Mapping[str, _Visit]
) -> tuple[list[dict[str, FileRef]], Mapping[str, Sequence[str]]]:
    """Return the masks of each visit by name; if several share a name, the one of its first modality."""
    order = {case: list(visit.files) for case, visit in visits.items()}
    found: dict[str, dict[str, tuple[int, TreeFile]]] = {case: {} for case in visits}
    spare: dict[str, list[str]] = {}
    for case, modality, mask, file in dataset.masks():
        names = order.get(case)
        if names is None or (modality and modality not in names):
            spare.setdefault(mask, []).append(file.name)
            continue
        rank = names.index(modality) if modality else len(names)
        known = found[case].get(mask.lower())
        if known is not None:
            spare.setdefault(mask, []).append(max(known, (rank, file))[1].name)
        found[case][mask.lower()] = min(known, (rank, file)) if known else (rank, file)
    masks = [{mask: FileRef(dataset.tree / file.name) for mask, (_, file) in found[case].items()} for case in visits]
    return masks, spare


def find_bids(tree: Tree, settings: Settings = NO_SETTINGS) -> Listing:
    """List the sessions of a BIDS data set, and its micrographs.

    Args:
        tree: The data set.
        settings: ``masks`` names masks among the derivatives; ``pipeline`` names a derivatives folder whose volumes
            replace the raw ones; ``runs: all`` makes every run a case.

    Raises:
        DataError: there is no such pipeline or mask, or a table is damaged.
    """
    dataset = _Dataset(tree, settings)
    visits = _visits(dataset, settings.runs)
    masks, spare = _masks(dataset, visits)
    used, regions, left = chosen_masks(masks, settings.masks)
    for names in spare.values():
        dataset.reasons.setdefault(MASK, []).extend(names)
    dataset.reasons.setdefault(MASK, []).extend(tree.name_of(path) for path in left)
    tables = _Tables(tree)
    records = [
        _record(tree, case, visit, labels, tables) for (case, visit), labels in zip(visits.items(), used, strict=True)
    ]
    records += [_micrograph(tree, raw, tables) for raw in dataset.micrographs]
    facts = Facts(regions=regions, label_values=all_values(regions))
    return Listing(
        records, facts, dataset.reasons, tables.read, tables.notes({record.patient_id for record in records})
    )


def _record(tree: Tree, case: str, visit: _Visit, masks: Mapping[str, FileRef], tables: "_Tables") -> Record:
    facts = tables.facts(visit.name, [raw.file for raw in visit.files.values()])
    volumes = {modality: FileRef(tree / raw.file.name) for modality, raw in visit.files.items()}
    split, session = facts.pop("split", "").lower() or None, visit.name.entities.get("ses", "")
    patient = f"sub-{visit.name.entities['sub']}"
    return Record(case, patient, session, volumes, masks=masks, targets=facts, split=split)


def _micrograph(tree: Tree, raw: _Raw, tables: "_Tables") -> Record:
    facts = tables.facts(raw.name, [raw.file])
    split, session = facts.pop("split", "").lower() or None, raw.name.entities.get("ses", "")
    return Record(raw.file.stem, f"sub-{raw.name.entities['sub']}", session, images=((tree / raw.file.name, ""),),
                  targets=facts, split=split)  # fmt: skip


class _Tables:
    """What the tables of a data set say about subjects, sessions and scans.

    Args:
        tree: The data set.
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.read: list[str] = []
        self._subjects: dict[str, dict[str, str]] = {}
        self._sessions: dict[str, dict[str, str]] = {}
        self._scans: dict[str, dict[str, str]] = {}
        self._listed: set[str] = set()
        for path in [*tree.glob("participants.tsv"), *tree.glob("phenotype/*.tsv")]:
            for key, row in self._rows(path.name, tree.name_of(path), "participant_id").items():
                self._subjects.setdefault(f"sub-{key.removeprefix('sub-')}", {}).update(row)
                if path.name == "participants.tsv":
                    self._listed.add(f"sub-{key.removeprefix('sub-')}")
        for path in tree.glob("sub-*/*_sessions.tsv"):
            for key, row in self._rows(path.name, tree.name_of(path), "session_id").items():
                self._sessions[f"{path.parent.name}_ses-{key.removeprefix('ses-')}"] = row
        for path in [*tree.glob("sub-*/*_scans.tsv"), *tree.glob("sub-*/ses-*/*_scans.tsv")]:
            folder = tree.name_of(path.parent)
            for key, row in self._rows(path.name, tree.name_of(path), "filename").items():
                self._scans[f"{folder}/{key}"] = row

    def _rows(self, what: str, name: str, key: str) -> dict[str, dict[str, str]]:
        """Return the rows of a table by key; ``n/a`` means unknown.

        Raises:
            DataError: the key is missing, or a key occurs twice.
        """
        path = self.tree / name
        table = read_table(path)
        self.read.append(name)
        if key not in table.columns:
            raise DataError(f"{path} has no column {key}; it has {shortened(', '.join(table.columns), 120)}.")
        found: dict[str, dict[str, str]] = {}
        for row in table.to_dict("records"):
            if row[key] in found:
                raise DataError(f"{path} lists {row[key]} twice; keep one row of it.")
            found[row[key]] = {
                column: "" if value == _UNKNOWN else value for column, value in row.items() if column != key
            }
        return found

    def facts(self, name: Name, files: Sequence[TreeFile]) -> dict[str, str]:
        """Return what the tables say about a session, its scans and its subject."""
        facts: dict[str, str] = {}
        for file in files:
            facts |= {key: value for key, value in self._scans.get(file.name, {}).items() if key not in facts}
        return {**self._subjects.get(f"sub-{name.entities['sub']}", {}), **facts, **self._sessions.get(name.case, {})}

    def notes(self, there: set[str]) -> list[str]:
        """Note how many subjects have no row and how many rows no subject."""
        if not self._listed:
            return []
        without, spare = len(there - self._listed), len(self._listed - there)
        if not without and not spare:
            return []
        return [f"participants.tsv: {without} of {len(there)} subjects have no row, {spare} of {len(self._listed)} "
                f"rows no subject with a usable file"]  # fmt: skip


def _recognise(tree: Tree) -> Evidence:
    volumes = [file for file in tree.images if file.kind in ("volume", "image")]
    raw = [file for file in volumes if file.name.partition("/")[0] not in ("derivatives", *_SOURCES)]
    named = [file for file in raw if _PLACE.fullmatch(file.name) and (parsed(file.stem) or _MASK.fullmatch(file.stem))]
    description = described(tree, _DESCRIPTION, "BIDSVersion")
    if description is not None and named:
        return Evidence(3, f"{_DESCRIPTION}, BIDSVersion {description['BIDSVersion']}")
    if named and len(named) >= _MOSTLY * len(raw):
        return Evidence(2, f"{len(named)} of {len(raw)} files are named as in BIDS")
    if description is not None:
        return Evidence(0, missing="files such as sub-01/anat/sub-01_T1w.nii.gz", near=0.7)
    return Evidence(0, missing=_DESCRIPTION, near=len(named) / len(raw) / 2 if raw else 0.0)


BIDS = Layout(
    name="bids",
    tree="ROOT/{dataset_description.json, participants.tsv, sub-01/[ses-1/]anat/sub-01[_ses-1]_{T1w,T2w,...}.nii.gz}",
    find=find_bids,
    evidence=_recognise,
    takes=("masks", "pipeline", "runs"),
    public=False,
)
