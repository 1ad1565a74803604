"""Masks of volumes: which ones the settings name, and what their joined label means."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from common.errors import DataError
from datamodules.registry import FileRef

Regions = dict[str, tuple[int, ...]]


def chosen_masks(
    found: Sequence[Mapping[str, FileRef]], named: Mapping[str, Mapping[str, Any]], usual: Sequence[str] = ()
) -> tuple[list[dict[str, FileRef]], Regions, list[Path]]:
    """Choose the masks of cases.

    A single mask keeps its values. Several must each hold 0 and 1 and become the bits of one label.

    Args:
        found: The masks of each case by name.
        named: Region to ``name`` of its mask and ``values`` in it, as ``masks:`` of ``archive.yaml`` says.
        usual: Names to use if ``named`` is empty, in the order of their bits.

    Returns:
        The masks of each case, the meaning of their values, and the unused files.

    Raises:
        DataError: no case has one of the named masks.
    """
    wanted = list(dict.fromkeys(_name(region, rule) for region, rule in named.items()))
    present = {name for masks in found for name in masks}
    for name in wanted:
        if name not in present:
            held = ", ".join(sorted(present)[:6]) or "none"
            raise DataError(f"No case has the mask {name} that masks: names; the masks found are {held}.")
    names = wanted or [name for name in usual if name in present]
    used = [{name: masks[name] for name in names if name in masks} for masks in found]
    if len(wanted) > 1:  # a mask's position is its bit: with one missing, the others would change their meaning
        used = [masks if len(masks) == len(wanted) else {} for masks in used]
    left = [
        ref.path for masks, kept in zip(found, used, strict=True) for name, ref in masks.items() if name not in kept
    ]
    return used, _regions(named, wanted), left


def _name(region: str, rule: Mapping[str, Any]) -> str:
    return str(rule.get("name", region)).lower()


def _regions(named: Mapping[str, Mapping[str, Any]], wanted: Sequence[str]) -> Regions:
    """Return which values of the joined label make up each region."""
    if len(wanted) == 1:
        return {region: tuple(map(int, rule.get("values", (1,)))) for region, rule in named.items()}
    labels = [sum(bit << place for place, bit in enumerate(bits)) for bits in product((0, 1), repeat=len(wanted))]
    return {
        region: tuple(label for label in sorted(labels) if label >> wanted.index(_name(region, rule)) & 1)
        for region, rule in named.items()
    }


def all_values(regions: Mapping[str, Iterable[int]]) -> frozenset[int]:
    """Return all values a label with these regions may hold; empty (not checked) without regions."""
    return frozenset({0, *(value for values in regions.values() for value in values)}) if regions else frozenset()
