"""``medmim init``: look at an archive, say how it was understood, and write that down as an ``archive.yaml``.

Nothing is written under the archive, and nothing over a file of the person's without ``--force``.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from common.errors import DataError, UserError
from common.files import write_text
from common.names import safe_name
from common.runtime.data_config import Archive as Configured
from common.runtime.experiments import experiment_names
from common.runtime.reporting import print_line
from datamodules.account import Account
from datamodules.archive_file import ArchiveFile, parsed, settings_of
from datamodules.base import ArchiveDataModule
from datamodules.commands import proposals
from datamodules.commands.dicom_series import propose_series
from datamodules.commands.looks import look_at, propose_voxels
from datamodules.commands.proposals import Proposal
from datamodules.examination import spread
from datamodules.images.plain import pictures
from datamodules.registry import Archive, entry_of, open_archive, recognise, shortened
from datamodules.splits import assign_splits
from datamodules.tree import Tree
from datamodules.volumes.checks import check_bytes
from datamodules.volumes.datamodule import VolumeDataModule

#: Characters of a line, and of why an experiment cannot use an archive.
_WIDTH, _REASON = 300, 70
#: Members up to which an archive is examined as doctor does it, and with how many threads.
_EXAMINED, _WORKERS = 2000, 4
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


class Understood(NamedTuple):
    """How an archive was understood.

    Attributes:
        tree: Its files; where a table names images under one of its folders, those of that folder.
        proposal: What is proposed to say of it.
        because: What speaks for its layout.
        archive: What it holds; None where a question is open.
    """

    tree: Tree
    proposal: Proposal
    because: str
    archive: Archive | None


def run(directory: str, exp: str | None, table: str | None, out: str | None, force: bool) -> None:
    """Carry out ``medmim init``; its options are those of the command.

    Raises:
        DataError: nothing of it can be used.
        UserError: the file is there already, or would lie in the archive.
    """
    if exp is not None and exp not in experiment_names():
        raise UserError(f"There is no experiment {exp}; there are {', '.join(experiment_names())}.")
    tree = Tree(directory)
    target = Path(out or Path("archives") / f"{safe_name(tree.root.resolve().name)}.yaml")
    if tree.root.resolve() in (target.resolve(), *target.resolve().parents):
        raise UserError(f"{target} would lie in the archive, where nothing is written: give --out, or start elsewhere.")
    with contextlib.redirect_stdout(io.StringIO()):  # what is said while an archive is tried in many ways
        tree.report_content()
        understood = understand(tree, table)
        lines, fits = _report(understood, [exp] if exp else experiment_names(), target)
    _heading(tree, understood)
    for line in lines:
        print_line(f"  {shortened(line, _WIDTH)}")
    done = _write(target, understood.proposal.text(), force)
    if understood.proposal.open:
        print_line(done)
        raise DataError(f"{target} holds a question that only you can answer ({understood.proposal.open}): keep one of "
                        f"its lines, then make doctor EXP={exp or 'NAME'} DATA={target}.")  # fmt: skip
    print_line(f"{done}; next: make doctor {fits}")


def _write(target: Path, text: str, force: bool) -> str:
    """Write the file, unless another one is there; return what was done, in words."""
    if target.exists() and target.read_text(encoding="utf-8") == text:
        return f"{target} is there already, the same"
    if target.exists() and not force:
        raise UserError(f"{target} is there already and says something else: give --force to write over it, or --out.")
    write_text(target, text)
    return f"wrote {target}"


def understand(tree: Tree, table: str | None) -> Understood:
    """Find out what an archive is, and what has to be said of it.

    Raises:
        DataError: nothing of it can be used.
    """
    layout, because = "", ""
    refusal: DataError | None = None
    if table is None:
        try:
            found, evidence = recognise(tree, frozenset())
            layout, because = found.name, evidence.because
        except DataError as error:
            refusal = error
    if layout in ("", "images", "class_folders", "dicom") and (named := proposals.table_of(tree, table)):
        return _of_table(tree, *named)
    if refusal is not None:
        raise refusal
    return _of_layout(tree, layout, because)


def _of_table(tree: Tree, path: Path, rows: pd.DataFrame, image: str, folder: str) -> Understood:
    """Return an archive as its table says what it holds."""
    place = tree.sub(folder) if folder else tree
    proposal = proposals.begun(place, "table")
    inside = path.resolve().parent == place.root.resolve()
    proposals.propose_columns(Path(path.name) if inside else path.resolve(), rows, image, proposal)
    return _opened(place, proposal, f"{path.name}, whose column {image} names images")


def _of_layout(tree: Tree, layout: str, because: str) -> Understood:
    """Return an archive of a layout that needs no table to be named."""
    proposal = proposals.begun(tree, layout)
    if layout in ("images", "class_folders"):
        names = [file.name for file in pictures(tree)]
        if layout == "class_folders" and proposals.looks_like_people(names):
            proposals.ask_for_people(proposal)
        else:
            proposals.propose_subject(names, proposal, layout == "class_folders")
    if layout == "dicom":
        because = propose_series(tree, proposal)
    if layout == "folder":
        try:
            entry_of(layout).load().read(tree)
        except DataError as error:
            proposals.propose_patterns(tree, proposal)
            if "modalities" not in proposal.said:
                hint = "; medmim init DIR proposes a pattern."
                raise DataError(str(error).replace(hint, f", and none is to be seen in {tree}.")) from error
    return _opened(tree, proposal, because)


def _opened(tree: Tree, proposal: Proposal, because: str) -> Understood:
    """List what an archive holds; where a question is open, nothing."""
    if proposal.open:
        return Understood(tree, proposal, because, None)
    said = parsed(proposal.text(), tree)
    archive = open_archive(tree, said["layout"], settings=settings_of(said))
    return Understood(tree, proposal, because, archive)


def _heading(tree: Tree, understood: Understood) -> None:
    total = sum(max(file.size, 0) for file in tree.files)
    unit = min((len(str(total)) - 1) // 3, len(_UNITS) - 1)
    size = f"{total / 1000**unit:.{1 if unit else 0}f} {_UNITS[unit]}"
    layout = understood.proposal.said["layout"]
    print_line(f"{shortened(str(tree), 120)}  {len(tree):,} files, {size}: {layout} ({understood.because})")


def _report(understood: Understood, experiments: Sequence[str], target: Path) -> tuple[list[str], str]:
    """Complete the proposal, and return what to print and the experiment to go on with."""
    archive, proposal = understood.archive, understood.proposal
    if archive is None:
        return [f"open     {proposal.open}"], ""
    lines = [*_used(archive, proposal), *_ignored(archive, proposal), _patients(archive, proposal)]
    if "volumes" in archive.gives:
        look = look_at(archive.records, proposal.said["modalities"])
        if masks := proposals.propose_masks(archive, proposal, look.values):
            shown = ", ".join(f"{name} in {count}" for name, count in masks.most_common(4))
            lines.insert(1, f"masks    {shown} (not used: name one under masks:)")
        lines.append(f"voxels   {propose_voxels(look, proposal)}")
        proposals.propose_visits(archive, proposal)
    fits = _fits(understood, experiments)
    if fits[0].reason:
        why = shortened("; ".join(f"{fit.name}: {fit.reason}" for fit in fits), 190)
        raise DataError(f"Nothing can be trained on {shortened(str(understood.tree), 70)}: {why}.")
    targets = ", ".join(proposal.said.get("targets", {}))
    short = [fit.reason if len(fit.reason) <= _REASON else f"{fit.reason[:_REASON]}..." for fit in fits]
    words = [f"{fit.name} not ({why})" if why else f"{fit.name} {fit.more}".strip()
             for fit, why in zip(fits, short, strict=True)]  # fmt: skip
    lines.append(f"fits     {'; '.join(words)}" + (f"; targets: {targets}" if targets else ""))
    return lines, " ".join(filter(None, (f"EXP={fits[0].name}", f"DATA={target}", fits[0].more)))


def _used(archive: Archive, proposal: Proposal) -> list[str]:
    """Say what is used, and write down what it is called."""
    records, words = archive.records, []
    if "volumes" in archive.gives:
        counts = proposals.propose_modalities(archive, proposal)
        total = sum(bool(record.volumes) for record in records)
        words.append(f"{', '.join(f'{name} in {count}' for name, count in counts.items())} of {total} cases")
    if "images" in archive.gives:
        words.append(f"{sum(len(record.images) for record in records)} images")
    if "text" in archive.gives:
        words.append(f"{sum(bool(record.text) for record in records)} texts")
    if masks := Counter(name for record in records for name in record.masks):
        words.append("masks " + ", ".join(f"{name} in {count}" for name, count in masks.most_common(4)))
    if "columns" in proposal.said:
        words.append("columns " + ", ".join(f"{name} = {role}" for role, name in proposal.said["columns"].items()))
    if not archive.layout.public:
        words += filter(None, [", ".join(proposals.propose_targets(records, proposal)[:6])])
    return [f"used     {'; '.join(words)}"]


def _ignored(archive: Archive, proposal: Proposal) -> list[str]:
    account = Account(archive)
    rows = [row for row in account.rows if row.use == "ignored"]
    shown = "; ".join(f"{row.count} {row.reason}" for row in rows[:5]) or "nothing"
    unknown = proposals.propose_ignore(account, proposal)
    return [f"ignored  {shown}" + (f"; unknown: {unknown}" if unknown else "")]


def _patients(archive: Archive, proposal: Proposal) -> str:
    """Say how many patients and cases there are, and who would be held out."""
    records = archive.records
    patients, split = len({record.patient_id for record in records}), proposals.propose_split(archive, proposal)
    sessions = ", several cases of a patient stay in one split" if patients < len(records) else ""
    counts = ""
    if split.startswith("no split"):
        with contextlib.suppress(DataError):
            parts = assign_splits(records, (0.8, 0.1, 0.1), 0)
            held = Counter({record.patient_id: parts[record.case_id] for record in records}.values())
            counts = f" {'/'.join(str(held[name]) for name in ('train', 'val', 'test'))}"
    return f"patients {patients}, cases {len(records)}{sessions}; {split}{counts}"


class _Fit(NamedTuple):
    """Why an experiment cannot use an archive, or what ``make`` needs besides, and how many kinds and files it uses."""

    name: str
    reason: str = ""
    more: str = ""
    uses: tuple[int, int] = (0, 0)


def _fits(understood: Understood, experiments: Sequence[str]) -> list[_Fit]:
    """Try every experiment's pre-training on an archive; the most fitting one comes first."""
    file = ArchiveFile(Path("archive.yaml"), understood.tree.root.resolve(),
                       parsed(understood.proposal.text(), "the proposal"))  # fmt: skip
    found = [_fit(name, file, understood.archive) for name in experiments]
    return sorted(found, key=lambda fit: (bool(fit.reason), bool(fit.more), -fit.uses[0], -fit.uses[1], fit.name))


def _fit(experiment: str, file: ArchiveFile, archive: Archive | None) -> _Fit:
    """Try an experiment on an archive: as it is, in its small size, or with a batch that the archive can fill."""
    configs = [f"experiments/{experiment}/configs/pretrain.yaml"]
    try:
        datamodule = Configured(configs, said=file).datamodule()
        if archive is not None and (lacking := sorted(datamodule.needs - archive.gives)):
            return _Fit(experiment, f"no {' and no '.join(lacking)}")
        datamodule.index()
        more = "" if (count := _samples(datamodule)) >= datamodule.batch_size else f"ARGS=--data.batch_size={count}"
        if more:
            small = Configured([*configs, configs[0].replace("pretrain", "small")], said=file).datamodule()
            small.index()
            if _samples(small) >= small.batch_size:
                more, datamodule = "SIZE=small", small
            datamodule.batch_size = min(datamodule.batch_size, count)
        reason = "; ".join(_reasons(datamodule)) if count else "nothing is left to train on"
    except UserError as error:
        return _Fit(experiment, str(error).rstrip("."))
    return _Fit(experiment, reason, more, (len(datamodule.needs), len(list(datamodule.used_files()))))


def _samples(datamodule: ArchiveDataModule) -> int:
    """Return how many training samples there are in an epoch."""
    draws = getattr(datamodule, "crops_per_case", 0) or getattr(datamodule, "draws_per_image", 1)
    return len(datamodule.splits["train"]) * int(draws)


def _reasons(datamodule: ArchiveDataModule) -> list[str]:
    """Return why a doctor would refuse an archive; of a large one a few cases are tried alone."""
    members = [member for part in datamodule.splits.values() for member in part]
    if len(members) <= _EXAMINED or not isinstance(datamodule, VolumeDataModule):
        words = io.StringIO()
        with contextlib.redirect_stdout(words), contextlib.redirect_stderr(io.StringIO()):
            reasons = datamodule.examine(False, _WORKERS) if len(members) <= _EXAMINED else []
        faults = [line for line in words.getvalue().splitlines() if line.startswith("faults:") and reasons]
        return [*reasons, *(line.partition("First: ")[2] or line for line in faults)]
    layout = datamodule.index()
    found = [check_bytes(case, layout, False) for case in spread(datamodule.cases_in_use(), 3)]
    return [] if any(member.usable for member in found) else ["none of three cases can be used"]
