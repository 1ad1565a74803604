"""The COVID-19 image data collection: ``ROOT/images`` and ``ROOT/metadata.csv``, a table of X-rays with notes."""

from datamodules.files import first_line
from datamodules.images.table import records_of_table
from datamodules.registry import Evidence, Layout, Record
from datamodules.tree import Tree

_TABLE = "metadata.csv"
_COLUMNS = {"image": "filename", "folder": "folder", "text": "clinical_notes", "subject": "patientid", "view": "view"}
_MARKS = {"filename", "folder", "patientid", "modality"}


def _header(tree: Tree) -> set[str]:
    if not tree.is_file(_TABLE):
        return set()
    return {name.strip(' "') for name in first_line(tree / _TABLE).split(",")}


def find_covid(tree: Tree) -> list[Record]:
    """List the X-rays of the COVID-19 image data collection; empty if the root is another archive."""
    header = _header(tree)
    if not header >= _MARKS:
        return []
    columns = {role: name for role, name in _COLUMNS.items() if name in header}
    records = records_of_table(tree, tree / _TABLE, columns)
    return [record for record in records if record.images and record.images[0][0].parent.name == "images"]


def _recognise(tree: Tree) -> Evidence:
    if _header(tree) >= _MARKS:
        return Evidence(3, f"{_TABLE} with {', '.join(sorted(_MARKS))}")
    return Evidence(0, missing=f"{_TABLE} with filename and patientid", near=0.3 if tree.is_file(_TABLE) else 0.0)


COVID_CXR = Layout(
    name="covid_cxr",
    tree="ROOT/metadata.csv and ROOT/images/ (COVID-19 image data collection)",
    find=find_covid,
    evidence=_recognise,
    tables=(_TABLE,),
)
