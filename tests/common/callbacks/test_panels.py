import numpy as np
import torch

from common.callbacks.reconstruction_panels import _row, panel_figure
from common.panels import axial, fullest_slice, volume_panels
from common.types import Panel


def test_the_patient_faces_the_reader():
    """In RAS, +x is the patient's right and +y anterior: right must be on the left, anterior on top."""
    volume = torch.zeros(4, 6, 1)
    volume[3, 5, 0] = 1
    picture = axial(volume, 0)
    assert picture.shape == (6, 4)
    assert np.argwhere(picture).tolist() == [[0, 0]]


def test_the_slice_with_most_tissue_is_shown():
    volume = torch.zeros(2, 4, 4, 5)
    volume[1, :2, :2, 3] = 1
    assert fullest_slice(volume) == 3
    assert fullest_slice(torch.ones(1, 2, 2, 5)) == 2


def test_absent_modalities_get_no_picture():
    volumes = [torch.rand(2, 4, 4, 4) for _ in range(3)]
    panels = volume_panels("case", ["t1", "t2"], torch.tensor([True, False]), *volumes)
    assert list(panels) == ["t1"]
    assert panels["t1"].title == "case, axial slice 2 of 4" or panels["t1"].title == "case, axial slice 3 of 4"
    assert panels["t1"].sides == ("R", "L")


def test_a_mosaic_has_a_row_per_sample_and_names_its_columns():
    rng = np.random.default_rng(0)
    rows = [
        Panel(f"case {i}", rng.random((32, 32)), rng.random((32, 32)) > 0.5, rng.random((32, 32)), ("R", "L"))
        for i in range(3)
    ]
    figure = panel_figure("t1c", rows)
    words = [text.get_text() for text in figure.axes[0].texts]
    assert sum(word.startswith("case ") for word in words) == 3
    assert words.count("R") == words.count("L") == 3
    assert len([w for w in words if not w.startswith("case") and w not in "RL"]) == 4
    figure.canvas.draw()


def test_no_name_of_a_subject_is_a_formula_or_breaks_a_line():
    picture = np.random.default_rng(0).random((32, 32))
    figure = panel_figure("$t_1\\frac$", [Panel("a$\\frac{$\n\udcff", picture, picture > 0.5, picture)])
    figure.canvas.draw()
    assert any(text.get_text().startswith("a$\\frac{$\\n\\udcff; grey") for text in figure.axes[0].texts)


def test_nothing_hidden_is_said():
    picture = np.full((32, 32, 3), 0.5)
    figure = panel_figure("image", [Panel("eye", picture, np.zeros((32, 32), dtype=bool), picture)])
    words = [text.get_text() for text in figure.axes[0].texts]
    assert "visible (nothing is hidden)" in words
    assert not any("grey" in word for word in words)


def test_a_lesion_is_outlined_and_its_error_said():
    lesion = np.zeros((32, 32), dtype=bool)
    lesion[8:16, 8:16] = True
    truth = np.full((32, 32, 3), 0.5)
    guess = np.where(lesion[..., None], 0.75, truth)
    row = Panel("eye", truth, np.zeros_like(lesion), guess, scored=np.ones_like(lesion), lesion=lesion)
    (image, *_), text = _row(row)
    assert text.endswith("mean error 0.016, in the lesion (outlined) 0.250")
    colour = np.any(image != 0.5, axis=-1)
    assert colour[8 * 7 - 1, 8 * 7 : 16 * 7].all()
    assert not colour[8 * 7 : 16 * 7, 8 * 7 : 16 * 7].any()
    assert "outlined" not in _row(row._replace(lesion=np.zeros_like(lesion)))[1]
