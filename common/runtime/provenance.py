"""Code and machine of a run, for run folders, results and export cards."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash

_PACKAGES = ("torch", "lightning", "torchmetrics", "timm", "transformers", "monai", "numpy")


def _git(*arguments: str) -> str | None:
    """Ask git about the checkout that contains this code; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def source_state() -> dict[str, Any]:
    """Return this code's commit and whether files differ from it; None outside a checkout."""
    status = _git("status", "--porcelain")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def source_digest() -> str:
    """Return what changes whenever this code does: commit and uncommitted changes, or the installed version."""
    changes = _git("diff", "HEAD")
    state = version("medmim") if changes is None else f"{_git('rev-parse', 'HEAD')} {changes}"
    return xxhash.xxh3_64_hexdigest(state.encode())


def cpu_name() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def environment(device: torch.device) -> dict[str, Any]:
    """Describe code, versions and machine."""
    return {
        **source_state(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in _PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }
