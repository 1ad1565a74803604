"""Weights of BrainMVP's released checkpoints under the names used here, and back.

Released files hold ``state_dict`` with ``encoder.uniformer.*``, ``decoder.decoder{5,4,3,2}.transp_conv.*``,
``decoder.out_1.*`` and ``rep_template``, perhaps behind ``module.``; those of downstream networks leave ``uniformer.``
out and call the head ``decoder.out``; those of the UNet have no prefixes. The released UniFormer computes on axes D, H,
W and ours on H, W, D, so its kernels are turned. The residual blocks of the released decoder were never trained.
"""

import re
from collections.abc import Mapping

from torch import Tensor

_UP = re.compile(r"^decoder\.decoder([5432])\.transp_conv\.(?:conv\.)?weight$")
_OUT = re.compile(r"^decoder\.out(?:_1)?\.(?:conv\.)*(weight|bias)$")
_UNET = {
    "conv1a": "encoder.stem",
    "conv1b": "encoder.levels.0.0",
    "up1conv": "decoder.out",
    **{f"ds{level}": f"encoder.down.{level - 1}" for level in (1, 2, 3)},
    **{f"conv{level}{'abcd'[block]}": f"encoder.levels.{level - 1}.{block}"
       for level, depth in ((2, 2), (3, 2), (4, 4)) for block in range(depth)},
    **{f"up{level}conva": f"decoder.reduce.{4 - level}" for level in (4, 3, 2)},
    **{f"up{level}convb": f"decoder.blocks.{4 - level}" for level in (4, 3, 2)},
}  # fmt: skip


def _turned(weight: Tensor, back: bool = False) -> Tensor:
    """Turn a kernel ``(O, I, D, H, W)`` to ``(O, I, H, W, D)``, or back; anything else stays."""
    if weight.ndim != 5:
        return weight
    return weight.permute(0, 1, 4, 2, 3) if back else weight.permute(0, 1, 3, 4, 2)


def _renamed(key: str, value: Tensor) -> tuple[str, Tensor] | None:
    """Return our name of a released weight, or None if it is not used."""
    if key == "rep_template":
        return "templates", value
    if match := _UP.match(key):
        return f"decoder.up.{5 - int(match.group(1))}.weight", value
    if match := _OUT.match(key):
        return f"decoder.out.{match.group(1)}", value
    if key.startswith("encoder."):
        return f"encoder.{key.removeprefix('encoder.').removeprefix('uniformer.')}", _turned(value)
    first, _, rest = key.partition(".")
    return (f"{_UNET[first]}.{rest}", value) if first in _UNET else None


def from_released(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename released weights to ``encoder.*``, ``decoder.*`` and ``templates``.

    Returns:
        The weights, and the released names that are not used here.
    """
    result: dict[str, Tensor] = {}
    unused = []
    for name, value in state.items():
        renamed = _renamed(name.removeprefix("module."), value)
        if renamed is None:
            unused.append(name)
        else:
            result[renamed[0]] = renamed[1]
    return result, unused


def to_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights ``encoder.*``, ``decoder.*`` and ``templates`` to those of a released checkpoint."""
    unet = {ours: theirs for theirs, ours in _UNET.items()}
    result = {}
    for name, value in state.items():
        ours = next((prefix for prefix in unet if name.startswith(f"{prefix}.")), None)
        if name == "templates":
            result["rep_template"] = value
        elif name.startswith("decoder.up."):
            result[f"decoder.decoder{5 - int(name.split('.')[2])}.transp_conv.conv.weight"] = value
        elif ours is not None and ("encoder.stem.weight" in state):
            result[f"{unet[ours]}.{name[len(ours) + 1 :]}"] = value
        elif name.startswith("decoder.out."):
            result[f"decoder.out_1.conv.conv.{name.rpartition('.')[2]}"] = value
        elif name.startswith("encoder."):
            result[f"encoder.uniformer.{name.removeprefix('encoder.')}"] = _turned(value, back=True)
    return result
