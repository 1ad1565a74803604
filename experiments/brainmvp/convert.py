"""Released checkpoints of BrainMVP as an encoder that fine-tuning can start from: ``medmim convert --exp brainmvp``."""

from pathlib import Path
from typing import Any

from torch import Tensor

from common.blocks.registry import build_encoder, class_path
from common.blocks.residual_unet import ResidualUNetEncoder
from common.blocks.uniformer import UniFormer3D
from common.checkpoint import StoredEncoder, read_checkpoint
from common.errors import CheckpointError
from common.modalities import TEMPLATES
from common.runtime.reporting import print_line
from common.weights.uniformer_keys import from_released

#: Format of ``medmim export`` that the converted weights are kept in.
FORMAT = "released"
#: Share of the encoder's tensors that a file must hold.
MIN_SHARE = 0.9
_SIZE = [96, 96, 96]


def _architecture(state: dict[str, Tensor]) -> tuple[type, dict[str, Any]]:
    """Read class and arguments off the weights; the size of the crops, which no weight shows, is the paper's."""
    if "encoder.stem.weight" in state:
        width, channels = state["encoder.stem.weight"].shape[:2]
        return ResidualUNetEncoder, {"in_channels": channels, "image_size": _SIZE, "width": width}
    first = state.get("encoder.patch_embed1.proj.weight")
    if first is None:
        raise CheckpointError("It holds neither BrainMVP's UniFormer (encoder.uniformer.*) nor its UNet (conv1a.*).")
    widths = [len(state[f"encoder.patch_embed{stage}.norm.weight"]) for stage in range(1, 5)]
    depths = [
        1 + max(int(name.split(".")[2]) for name in state if name.startswith(f"encoder.blocks{stage}."))
        for stage in range(1, 5)
    ]
    return UniFormer3D, {
        "in_channels": first.shape[1],
        "image_size": _SIZE,
        "embed_dims": widths,
        "depths": depths,
        "head_dim": 64 if widths[2] % 64 == 0 else widths[2],
    }


def read_weights(path: Path, min_share: float = MIN_SHARE) -> StoredEncoder:
    """Read a released checkpoint, saying what was loaded, what keeps its initial value and what has no place.

    Args:
        path: The file.
        min_share: Share of the encoder's tensors that it must hold in the right shape.

    Raises:
        CheckpointError: it is missing, damaged, or holds less of an encoder than that.
    """
    if not path.is_file():
        raise CheckpointError(f"There are no weights at {path}: download them, and give the file.")
    loaded = read_checkpoint(path)
    state, unused = from_released(loaded.get("state_dict", loaded))
    try:
        cls, arguments = _architecture(state)
    except KeyError as error:
        raise CheckpointError(f"{path} is not a complete encoder: {error.args[0]} is missing.") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path} holds no weights of BrainMVP. {error}") from error
    encoder = build_encoder(class_path(cls), arguments)
    wanted = encoder.state_dict()
    given = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    found = [name for name in wanted if name in given and given[name].shape == wanted[name].shape]
    fresh = [name for name in wanted if name not in found]
    unused += [f"encoder.{name}" for name in given if name not in wanted]
    share = len(found) / len(wanted)
    print_line(f"released weights: {len(found)} of {len(wanted)} encoder tensors loaded, re-initialised: "
        f"{', '.join(fresh) or 'none'}; unused: {', '.join(unused) or 'none'}")  # fmt: skip
    if share < min_share:
        raise CheckpointError(f"{path} holds only {share:.0%} of the encoder's tensors; {min_share:.0%} are needed.")
    whole = wanted | {name: given[name] for name in found}
    rest = {name: value for name, value in state.items() if not name.startswith("encoder.")}
    preprocessing = {"source": path.name}
    return StoredEncoder(class_path(cls), arguments, whole, list(TEMPLATES), preprocessing, rest)
