import logging
import platform
import subprocess
import sys
import warnings

import pytest

from common.runtime.process import silence_advice


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_freed_memory_is_kept():
    """Large blocks cost no new pages once they were there."""
    code = """
from common.runtime.process import prepare_memory
prepare_memory()
import resource
block = b"medmim"
def touched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block * 2 * 10**7
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, again = touched(), touched()
assert again < first / 10, (first, again)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_advice_is_silent_and_warnings_are_not():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        silence_advice()
        warnings.warn("The 'val_dataloader' does not have many workers which may be a bottleneck.", stacklevel=1)
        warnings.warn("The loss is not finite.", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["The loss is not finite."]
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tip, fault = (log.makeRecord(log.name, logging.INFO, "", 0, text, (), None) for text in ("Tip: buy", "GPU lost"))
    assert not log.filter(tip)
    assert log.filter(fault)
