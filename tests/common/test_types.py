import pytest
import torch

from common.maskers.random import RandomMasker
from common.types import InputSpec, MaskOutput, TaskState

DATA = InputSpec(
    ("t1", "t2"),
    (8, 8, 8),
    {"WT": (1, 2)},
    {"orientation": "RAS"},
    {"size": 9, "fingerprint": "x", "length": 4},
    ("a", "b"),
    {"snp": 3},
)


def stored(**fields):
    """What a checkpoint of the same inputs holds, with other values for some fields."""
    return TaskState.read({"state": TaskState(DATA._replace(**fields)).plain()}).spec


def test_a_state_comes_back_as_plain_values(tmp_path):
    state = TaskState(
        DATA.only(("channels", "image_size", "regions")), {"class_path": "x", "init_args": {"size": (1, 2)}}
    )
    torch.save({"state": state.plain()}, tmp_path / "file")
    read = TaskState.read(torch.load(tmp_path / "file", weights_only=True))
    assert read.spec.channels == ("t1", "t2")
    assert read.spec.regions == {"WT": (1, 2)}
    assert read.spec.preprocessing == {"orientation": "RAS"}
    assert read.spec.classes == ()
    assert read.encoder == {"class_path": "x", "init_args": {"size": [1, 2]}}
    assert DATA.difference(read.spec) is None
    assert TaskState.read({}) == TaskState()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("channels", ("t1",), "channels ['t1'], but the dataset has ['t1', 't2']: choose matching data"),
        ("image_size", (8, 8), "image_size [8, 8]"),
        ("regions", {"TC": (1,)}, "regions {'TC': [1]}"),
        ("vocabulary", {"size": 9, "fingerprint": "y"}, "set data.text.tokenizer"),
        ("classes", ("a",), "classes ['a']"),
        ("genome", {"snp": 4}, "genome {'snp': 4}"),
    ],
)
def test_each_field_that_differs_is_named(field, value, words):
    assert words in DATA.difference(stored(**{field: value}))
    assert DATA.difference(stored()) is None
    assert DATA.difference(DATA.only(("channels", "image_size"))) is None, "what a checkpoint lacks is not compared"


def test_a_checkpoint_may_know_less_of_its_vocabulary_than_the_data():
    assert DATA.difference(stored(vocabulary={"size": 9})) is None
    assert DATA._replace(vocabulary={}).difference(stored()) is not None


def test_labels_alone_are_filled_in_from_a_checkpoint():
    bare = InputSpec(("t1", "t2"), (8, 8, 8))
    merged = bare.merge(stored())
    assert merged.regions == {"WT": (1, 2)}
    assert merged.classes == ("a", "b")
    assert merged.vocabulary == merged.genome == merged.preprocessing == {}
    assert DATA.merge(stored(classes=("c",))).classes == ("a", "b"), "the data's own stay"


def test_hidden_positions_of_a_mask():
    mask = RandomMasker(0.75)(3, 8)
    hidden = mask.hidden_index()
    assert not mask.hides_nothing
    assert hidden.shape == (3, 6)
    assert torch.equal(torch.zeros(3, 8, dtype=torch.bool).scatter(1, hidden, True), mask.mask)
    nothing = RandomMasker(0.0)(3, 8)
    assert nothing.hides_nothing
    assert nothing.hidden_index() is None
    assert not MaskOutput(torch.ones(1, 2, 3, dtype=torch.bool)).hides_nothing
