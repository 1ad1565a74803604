"""Randomness as a pure function of its purpose, never of earlier draws.

Sampling order depends on (seed, epoch); crops, flips and masks on (seed, epoch, subject, draw number); dropout on
(seed, global step, micro-batch, rank). Nothing depends on a generator's history, so a resumed run continues exactly
and a run on two ranks draws what a run on one rank draws.
"""

import os
from collections.abc import Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

DEFAULT_SEED = 3407

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def stable_hash(*parts: object) -> int:
    """Hash the text of ``parts`` with xxh3 to 63 bits: the same on every machine, process and Python version."""
    text = "\x1f".join(str(part) for part in parts)
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) >> 1


def run_seed() -> int:
    """Return the seed of this run, which ``seed_everything`` left in the environment for all ranks and workers."""
    return int(os.environ.get("PL_GLOBAL_SEED", DEFAULT_SEED))


def numpy_generator(*parts: object) -> np.random.Generator:
    """Return a NumPy generator that is a function of ``parts`` alone."""
    return np.random.default_rng(stable_hash(*parts))


def seed_step(seed: int, global_step: int, micro_batch: int, rank: int) -> None:
    """Seed torch's default generators, which dropout draws from, for one training step."""
    torch.manual_seed(stable_hash("dropout", seed, global_step, micro_batch, rank))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 without copying the sign (torch's ``>>`` does)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix64(x: Tensor) -> Tensor:
    """Finalise int64 counters as splitmix64 does (Steele, Lea and Flood 2014)."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


class KeyedGenerator:
    """A counter-based generator with one key per sample: row ``b`` of a draw depends on ``keys[b]`` alone.

    It takes the place of a ``torch.Generator`` where a batch is drawn at once, yet every sample must get the numbers
    that belong to it, on any device, in any batch and on any rank. Successive draws are independent.

    Args:
        keys: ``(B,)`` int64, one key per sample, on the device where the numbers are wanted.
        purpose: Use of the numbers. Generators with the same keys and purpose draw the same numbers, those of
            different purposes independent ones: if a sample's patches are masked and something else is drawn with its
            key, one of the two must name its purpose.
    """

    def __init__(self, keys: Tensor, purpose: str = "") -> None:
        if keys.ndim != 1 or keys.dtype != torch.int64:
            raise ValueError(f"`keys` must be a 1-D int64 tensor, got {tuple(keys.shape)} of {keys.dtype}.")
        self.keys = _splitmix64(keys + stable_hash(purpose)) if purpose else keys
        self._draws = 0

    @property
    def device(self) -> torch.device:
        """Device on which the numbers are made."""
        return self.keys.device

    def rand(self, shape: Sequence[int]) -> Tensor:
        """Draw float32 uniforms in [0, 1).

        Args:
            shape: ``(B, ...)`` with B the number of keys.

        Returns:
            ``(B, ...)`` float32.
        """
        if len(shape) == 0 or shape[0] != len(self.keys):
            raise ValueError(f"`shape` must begin with {len(self.keys)}, one row per key, got {tuple(shape)}.")
        self._draws += 1
        stream = _splitmix64(self.keys + _signed(self._draws * _MIX_1 % (1 << 64)))
        count = int(np.prod(shape[1:], dtype=np.int64)) if len(shape) > 1 else 1
        steps = torch.arange(1, count + 1, device=self.device, dtype=torch.int64) * _signed(_GOLDEN)
        bits = _splitmix64(stream[:, None] + steps)
        return (_shift_right(bits, 40).to(torch.float32) * 2.0**-24).reshape(tuple(shape))


RandomSource = torch.Generator | KeyedGenerator | None


def uniform(shape: Sequence[int], generator: RandomSource = None, device: torch.device | str | None = None) -> Tensor:
    """Draw float32 uniforms in [0, 1) from any of the sources a masker takes.

    Args:
        shape: Shape of the result.
        generator: A torch generator, a :class:`KeyedGenerator` (then ``shape[0]`` is its number of keys), or None for
            torch's default generator.
        device: Where the numbers are wanted; None means the generator's device, else the CPU.
    """
    if isinstance(generator, KeyedGenerator):
        return generator.rand(shape).to(device or generator.device)
    source = generator.device if generator is not None else torch.device(device or "cpu")
    return torch.rand(tuple(shape), generator=generator, device=source).to(device or source)
