"""The members of each split of a run: stored with it, and compared when it is resumed, fine-tuned from or evaluated.

Names are those of the archive, or keyed pseudonyms where names are hidden (:mod:`common.pseudonyms`): whoever has the
key can still compare them. Contents are the check sums of a case's files, which tell a copy in another folder.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from common.errors import DataError
from common.pseudonyms import pseudonym, public_name
from common.randomness import stable_hash
from common.runtime.reporting import print_line
from datamodules.splits import SPLITS, Member

SeenPatients = Literal["report", "drop", "refuse"]
ChangedArchive = Literal["refuse", "use"]
#: Prefix of the split of a member that was assigned but left out, for example by a label fraction.
UNUSED = "unused "
#: Prefix of a mask's check sum: empty masks of different patients are equal.
MASK = "mask:"
#: Text whose pseudonym identifies the key.
_KEY_CHECK = "the key of a membership"
_REMEDY = "set data.changed_archive to use to go on with what is there, or restore the archive"


class Row(NamedTuple):
    """One member of an archive.

    Attributes:
        case_id: The case.
        patient_id: Its patient.
        split: Its split; begins with ``unused`` if it was left out.
        sources: Check sums of its files; empty if unknown.
    """

    case_id: str
    patient_id: str
    split: str
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Membership:
    """The members of a run's archive.

    Attributes:
        rows: One per case that was placed in a split.
        root: The archive.
        setting: How splits were made.
        key: Identifies the key of hidden names; empty if names are plain.
        before: Membership of the run whose encoder this one started from.
    """

    rows: tuple[Row, ...]
    root: str
    setting: str
    key: str = ""
    before: "Membership | None" = None

    @property
    def digest(self) -> str:
        """Check sum of all rows, independent of their order."""
        return f"{stable_hash(*sorted(repr(tuple(row)) for row in self.rows)):016x}"

    @property
    def counts(self) -> dict[str, int]:
        """Cases in each split."""
        return dict(Counter(row.split for row in self.rows))

    def plain(self) -> dict[str, Any]:
        """Return the membership as plain values, for a checkpoint."""
        return {
            "digest": self.digest,
            "counts": self.counts,
            "rows": [[row.case_id, row.patient_id, row.split, *row.sources] for row in self.rows],
            "root": self.root,
            "setting": self.setting,
            "key": self.key,
            "before": None if self.before is None else self.before.plain(),
        }

    @classmethod
    def read(cls, stored: Mapping[str, Any] | None) -> "Membership | None":
        """Return what a checkpoint holds; None if it holds none."""
        if not stored:
            return None
        rows = tuple(Row(case, patient, split, tuple(sources)) for case, patient, split, *sources in stored["rows"])
        return cls(rows, stored["root"], stored["setting"], stored["key"], cls.read(stored["before"]))

    def name(self, text: str) -> str:
        """Return a name as stored in the rows."""
        return pseudonym(text) if self.key else text

    def comparable(self) -> bool:
        """Whether names can be compared: they are plain, or hidden with the present key."""
        return self.key in ("", pseudonym(_KEY_CHECK))

    def same_root(self, root: str) -> bool:
        """Whether this is the archive at ``root``."""
        return self.root == self.name(_resolved(root))

    def chain(self) -> list["Membership"]:
        """Return this membership and those of the runs before it."""
        return [self, *([] if self.before is None else self.before.chain())]


def _resolved(root: str) -> str:
    return str(Path(root).expanduser().resolve())


def make_membership(
    rows: Iterable[Row], root: str, setting: str, hidden: bool, before: Membership | None = None
) -> Membership:
    """Record the members of an archive, under pseudonyms if names are hidden.

    Args:
        rows: With plain names.
        root: The archive.
        setting: How splits were made.
        hidden: Whether names are hidden.
        before: The membership of the run whose encoder this one starts from.
    """
    if not hidden:
        return Membership(tuple(rows), _resolved(root), setting, before=before)
    keyed = (row._replace(case_id=pseudonym(row.case_id), patient_id=pseudonym(row.patient_id)) for row in rows)
    return Membership(tuple(keyed), pseudonym(_resolved(root)), setting, pseudonym(_KEY_CHECK), before)


def resumed_parts(
    stored: Membership, cases: Sequence[Member], setting: str, changed_archive: ChangedArchive
) -> dict[str, str]:
    """Return the splits that a run began with; new cases get none.

    Args:
        stored: The run's membership.
        cases: The present cases.
        setting: How splits are made now.
        changed_archive: Whether to continue if a member is missing or the setting differs.

    Raises:
        DataError: a member is missing or splits are made differently, and ``changed_archive`` does not allow it; or
            no member is left.
    """
    if not stored.comparable():
        raise DataError("The run's membership is hidden with another key of pseudonyms: resume it where its key is.")
    split_of = {row.case_id: row.split.removeprefix(UNUSED) for row in stored.rows}
    present = {stored.name(case.case_id): case.case_id for case in cases}
    gone = [name for name in split_of if name not in present]
    reasons = (
        [f"{len(gone)} of its {len(split_of)} cases are gone, first {gone[0] if stored.key else public_name(gone[0])}"]
        if gone
        else []
    )
    if stored.setting != setting:
        reasons.append(f"it split by {stored.setting}, and the configuration by {setting}")
    if reasons and changed_archive == "refuse":
        raise DataError(f"The archive is not the one this run began with: {'; '.join(reasons)}. To resume, {_REMEDY}.")
    if len(gone) == len(split_of):
        raise DataError(f"This is another archive than the run began with: none of its {len(gone)} cases is there.")
    for reason in reasons:
        print_line(f"note: {reason}; the run goes on with what is there (data.changed_archive)")
    if new := len(present.keys() - split_of.keys()):
        print_line(f"note: {new} cases are new since this run began and are not used")
    return {case: split_of[name] for name, case in present.items() if name in split_of}


def inherited_parts(stored: Membership, cases: Sequence[Member], parts: Mapping[str, str]) -> dict[str, str]:
    """Keep the split that another run assigned to a patient; only new patients keep the given one.

    Args:
        stored: The other run's membership.
        cases: The cases.
        parts: Their splits otherwise.

    Raises:
        DataError: names cannot be compared.
    """
    if not stored.comparable():
        raise DataError("The membership of that run is hidden with another key of pseudonyms: use the key it was made "
                        "with, or give a split file.")  # fmt: skip
    split_of = {row.patient_id: row.split.removeprefix(UNUSED) for row in stored.rows}
    placed = {}
    for case in cases:
        if case.case_id in parts:
            placed[case.case_id] = split_of.get(stored.name(case.patient_id), parts[case.case_id])
    known = len({case.patient_id for case in cases if stored.name(case.patient_id) in split_of})
    print_line(f"split: {known} patients keep the one they had in that run")
    return placed


def check_contents(stored: Membership, rows: Iterable[Row], changed_archive: ChangedArchive) -> None:
    """Refuse members whose files have changed since a run began.

    Raises:
        DataError: the first changed member, with both check sums.
    """
    before = {row.case_id: row.sources for row in stored.rows}
    changed = []
    for row in rows:
        known = before.get(stored.name(row.case_id), ())
        if known and row.sources and sorted(known) != sorted(row.sources):
            changed.append((row.case_id, known, row.sources))
    if not changed:
        return
    name, old, new = changed[0]
    old_sum = next((value for value in old if value not in new), old[0])
    new_sum = next((value for value in new if value not in old), new[0])
    sentence = (f"{len(changed)} cases have other files than when this run began, first {public_name(name)} (check sum "
                f"{old_sum} then, {new_sum} now)")  # fmt: skip
    if changed_archive == "refuse":
        raise DataError(f"{sentence}. To resume, {_REMEDY}.")
    print_line(f"note: {sentence}; the run goes on with what is there (data.changed_archive)")


class Seen(NamedTuple):
    """Patients of a split seen by earlier training.

    Attributes:
        patients: Number of patients in the split.
        certain: Those with an equal file, or the same name in the same archive.
        possible: Those with the same name in another archive.
    """

    patients: int
    certain: frozenset[str]
    possible: frozenset[str]

    def facts(self) -> dict[str, int]:
        """Return the counts."""
        return {"patients": self.patients, "certain": len(self.certain), "possible": len(self.possible)}

    def words(self, split: str, where: str) -> str:
        """The result as text."""
        more = f"; {len(self.possible)} more have the name of one that was" if self.possible else ""
        return f"{len(self.certain)} of {self.patients} {split} patients were seen in {where}{more}"


def seen_patients(earlier: Membership, rows: Sequence[Row], root: str) -> Seen:
    """Find the patients of some rows that earlier runs were trained on.

    Args:
        earlier: Membership of the run whose weights are used; earlier runs count as well.
        rows: Rows of one split, with plain names.
        root: Their archive.
    """
    certain: set[str] = set()
    possible: set[str] = set()
    for run in earlier.chain():
        trained = [row for row in run.rows if row.split == "train"]
        contents = {source for row in trained for source in row.sources if not source.startswith(MASK)}
        names = {row.patient_id for row in trained} if run.comparable() else set()
        by_name = certain if run.same_root(root) else possible
        for row in rows:
            if contents.intersection(row.sources):
                certain.add(row.patient_id)
            elif run.name(row.patient_id) in names:
                by_name.add(row.patient_id)
    patients = len({row.patient_id for row in rows})
    return Seen(patients, frozenset(certain), frozenset(possible - certain))


def used_rows(
    cases: Sequence[Member],
    parts: Mapping[str, str],
    splits: Mapping[str, Sequence[Any]],
    sources: Mapping[str, tuple[str, ...]],
) -> list[Row]:
    """Return the rows of all assigned cases.

    Args:
        cases: The cases.
        parts: Their splits.
        splits: The cases in use.
        sources: Check sums of the files of each case.
    """
    used = {(name, case.patient_id) for name in SPLITS for case in splits.get(name, ())}
    return [
        Row(
            case.case_id,
            case.patient_id,
            ("" if (parts[case.case_id], case.patient_id) in used else UNUSED) + parts[case.case_id],
            sources.get(case.case_id, ()),
        )
        for case in cases
        if case.case_id in parts
    ]
