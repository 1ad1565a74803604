"""Names of a ViT's weights in other libraries: tables from ours to theirs; ``#`` is the number of a block."""

import re
from collections.abc import Mapping


def weight_names(modules: Mapping[str, str], in_blocks: Mapping[str, str], blocks: str = "blocks") -> dict[str, str]:
    """Return a table of weights and biases.

    Args:
        modules: Their names of our modules outside the blocks.
        in_blocks: Their names of our modules inside a block.
        blocks: Their name of the list of blocks.
    """
    names = dict(modules) | {f"blocks.#.{ours}": f"{blocks}.#.{theirs}" for ours, theirs in in_blocks.items()}
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in names.items() for kind in ("weight", "bias")}


def renamed(key: str, names: Mapping[str, str]) -> str:
    """Return the name of a weight that a table gives.

    Raises:
        ValueError: it is not in the table.
    """
    block = re.match(r"[a-z]+\.(\d+)\.", key)
    listed = names.get(key if block is None else key.replace(f".{block[1]}.", ".#.", 1))
    if listed is None:
        raise ValueError(f"There is no place for the weight {key!r}.")
    return listed if block is None else listed.replace("#", block[1])
