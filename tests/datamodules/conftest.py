"""Fixtures of archives as people have them."""

from dataclasses import replace

import pytest

from datamodules import base


@pytest.fixture
def archive_file(monkeypatch):
    """Return a function that says something about an archive, as its ``archive.yaml`` does, and returns what opens it.

    One helper, so that it can write the file itself as soon as data modules take one.
    """
    opened, said = base.open_archive, {}

    def with_settings(root, layout="auto", needs=(), purpose="this", settings=None):
        settings = replace(settings, **said.get(str(root), {}))
        return opened(root, layout, needs, purpose, settings)

    def write(root, **settings):
        said[str(root)] = settings
        return root

    monkeypatch.setattr(base, "open_archive", with_settings)
    return write


@pytest.fixture
def counted():
    """Return a function that gives the count of files by class and reason of an account."""
    return lambda account: {(row.use, row.reason): row.count for row in account.rows}
