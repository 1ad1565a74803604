"""The RSNA Pneumonia Detection Challenge: chest radiographs with boxes around opacities."""

from datamodules.labelled.layout import LabelLayout, LabelledImage, labelled_set, need_columns, need_file
from datamodules.labelled.tables import column_names, column_targets
from datamodules.registry import marked
from datamodules.tables import read_table
from datamodules.tree import Tree

TABLE = "stage_2_train_labels.csv"
IMAGES = "stage_2_train_images"


class RSNAPneumonia(LabelLayout):
    """Training images of the second stage; the test images have no labels.

    An image has pneumonia if any of its rows says so; otherwise it is normal or shows something else.
    """

    name = "RSNA Pneumonia"
    tree = f"ROOT/{{{TABLE}, {IMAGES}/<patientId>.dcm}}"
    classes = ("Pneumonia",)

    def _find(self, root: Tree) -> list[LabelledImage]:
        """List the images of the table; each belongs to a different patient.

        Raises:
            DataError: the table or a column is missing, a name is invalid, or a target is not 0 or 1.
        """
        path = need_file(root, [TABLE], self)
        table = read_table(path)
        need_columns(path, table, ["patientId", "Target"])
        names = column_names(path, table, "patientId")
        targets = column_targets(path, table, "Target", {"0": 0.0, "1": 1.0}, names)
        highest: dict[str, float] = {}
        for name, target in zip(names, targets, strict=True):
            highest[name] = max(highest.get(name, 0.0), target)
        return [LabelledImage(name, name, root / IMAGES / f"{name}.dcm", (target,)) for name, target in highest.items()]


RSNA = labelled_set("rsna_pneumonia", RSNAPneumonia(), marked(TABLE, IMAGES), [TABLE])
