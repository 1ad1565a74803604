import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pytest
from torch import nn

import common
import experiments
from common.blocks.registry import HOMES, build_encoder, build_recorded, class_path, find_encoder, fits, registered
from common.errors import CheckpointError

SMALL = {"in_channels": 1, "image_size": [16, 16], "embed_dim": 8, "depth": 1, "num_heads": 2}
VIT = "common.blocks.vit.VisionTransformer"


def test_every_encoder_with_a_config_is_registered_and_has_its_home_in_the_list():
    """Whatever a checkpoint of ours can hold, it can be read back."""
    for package in (common, experiments):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            source = importlib.util.find_spec(module.name).loader.get_source(module.name)
            if "self.config: dict[str, Any]" in source:
                assert module.name in HOMES
    found = {(home, name) for home in HOMES for name, cls in vars(importlib.import_module(home)).items()
             if isinstance(cls, type) and hasattr(cls, "forward_features") and cls.__module__ == home}  # fmt: skip
    assert {name for _, name in found} == {
        "VisionTransformer", "UniFormer3D", "ResidualUNetEncoder", "UMDEncoder", "GreyHistogram", "ColourGrid",
        "ModalityTransformer", "MajorityClass"
    }  # fmt: skip
    for home, name in found:
        assert find_encoder(f"{home}.{name}").__name__ == name


@pytest.mark.parametrize(
    "path",
    ["common.commands.execute", "os.system", "common.blocks.vit.Missing", "common.blocks.vit.nn.Linear", "", "x" * 5000,
     "torch.nn.Linear", "common.blocks.vit.TransformerBlock", "experiments.umd.encoder.TextHead"],
)  # fmt: skip
def test_what_is_not_registered_is_never_built(path):
    with pytest.raises(CheckpointError, match="is not an encoder of this project: nothing was run") as refusal:
        build_encoder(path, {})
    assert len(str(refusal.value)) <= 320


def test_an_encoder_that_has_moved_is_found_under_its_old_name():
    assert find_encoder("experiments.umd.encoder.UMDEncoder").__name__ == "UMDEncoder"


def test_an_encoder_of_ones_own_is_built_once_it_is_registered():
    class Own(nn.Module):
        def __init__(self, in_channels: int, image_size: Sequence[int]) -> None:
            super().__init__()

    arguments = {"in_channels": 1, "image_size": [8, 8]}
    with pytest.raises(CheckpointError, match="registered"):
        build_encoder(class_path(Own), arguments)
    registered(Own)
    assert isinstance(build_encoder(class_path(Own), arguments), Own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": "common.commands.execute"}, "`depth` is 'common.commands.execute'"),
        ({"depth": True}, "`depth` is True"),
        ({"depth": 10**12}, "`depth` is 1000000000000"),
        ({"image_size": 16}, "`image_size` is 16"),
        ({"image_size": [16, "a"]}, "`image_size` is"),
        ({"patch_size": {"class_path": "os.system"}}, "`patch_size` is"),
        ({"mlp_ratio": float("nan")}, "`mlp_ratio` is nan"),
        ({"pos_embed": None}, "`pos_embed` is None"),
        ({"__class__": 1}, "'__class__' is not one of its arguments"),
        ({"num_heads": 3}, "`num_heads` must divide `embed_dim`"),
        ({"num_heads": 0}, "modulo"),
        ({"embed_dim": -8}, "can be built"),
    ],
)
def test_arguments_are_of_the_kinds_that_the_class_declares(change, message):
    with pytest.raises(CheckpointError, match="describes no VisionTransformer that can be built") as refusal:
        build_encoder(VIT, SMALL | change)
    assert message in str(refusal.value)
    with pytest.raises(CheckpointError, match="`image_size` is missing"):
        build_encoder(VIT, {"in_channels": 1})
    build_encoder(VIT, SMALL)


def test_a_record_of_another_form():
    assert build_recorded({"class_path": VIT, "init_args": SMALL, "templates": None}).num_features == 8
    for record in ({}, {"class_path": VIT}, {"class_path": 3, "init_args": {}}, {"class_path": VIT, "init_args": [1]}):
        with pytest.raises(CheckpointError, match="has no class_path or no init_args"):
            build_recorded(record)


def test_kinds():
    for value, kind in ((1, float), (1.5, float | None), (None, int | None), ((1, 2), Sequence[int]), ([], list[str]),
                        ("a", Literal["a", "b"]), ({"a": [1]}, Mapping[str, Sequence[int]]),
                        (False, bool)):  # fmt: skip
        assert fits(value, kind)
    for value, kind in ((1.5, int), (1, bool), ("ab", Sequence[str]), (len, Callable), (1, Any), (object(), object),
                        ("c", Literal["a"]), (1, Literal[True]), ({1: [1]}, Mapping[str, Sequence[int]]), (nn, None),
                        ([[1]], Sequence[int]), (float("inf"), float)):  # fmt: skip
        assert not fits(value, kind)
