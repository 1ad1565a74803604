"""A warm start reads some of a cache; the rest is read while training goes on."""

import builtins
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from datamodules import checking, storage
from datamodules.checking import BackgroundCheck, CachedFile, check_files
from datamodules.storage import fingerprint
from datamodules.tree import Tree
from datamodules.volumes import cache as volume_cache
from datamodules.volumes.cache import VolumeCache


def written(folder, count):
    folder.mkdir()
    files = []
    for number in range(count):
        path = folder / f"{number}.npy"
        path.write_bytes(np.random.default_rng(number).bytes(100))
        files.append(CachedFile(f"case {number}", path, *fingerprint(path).values()))
    return files


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_successive_starts_go_through_all_files(tmp_path):
    files = written(tmp_path / "files", 200)
    seen = []
    for _ in range(4):
        checked = check_files(files, tmp_path, "sampled")
        assert (checked.read, checked.total, checked.broken) == (64, 200, frozenset())
        seen.append({file.owner for file in files} - {file.owner for file in checked.rest})
    assert set.union(*seen) == {file.owner for file in files}
    assert not seen[0] & seen[1]


def test_the_sample_ends_at_a_number_of_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "SAMPLED_BYTES", 250)
    assert check_files(written(tmp_path / "files", 10), tmp_path, "sampled").read == 2


def test_off_reads_nothing(tmp_path, monkeypatch):
    files = written(tmp_path / "files", 3)
    monkeypatch.setattr(checking, "is_whole", lambda file: pytest.fail("a file was read"))
    assert check_files(files, tmp_path, "off")[1:3] == ([], 0)
    assert check_files(files, tmp_path, "full").read == 3


def test_what_the_start_left_is_read_later_and_built_again(tmp_path):
    files = written(tmp_path / "files", 70)
    checked = check_files(files, tmp_path, "sampled")
    broken = checked.rest[2]
    damage(broken.path)
    built = []
    thread = BackgroundCheck(checked, built.append)
    assert thread.share == 64 / 70
    thread.start()
    thread.join(timeout=30)
    assert built == [broken.owner]
    assert thread.found.get() == broken
    assert thread.share == 1
    thread.stop()


@pytest.fixture
def many(brats_root, tmp_path, volumes_of, monkeypatch):
    """200 cases made of the files of one, which is prepared once."""
    root = tmp_path / "archive"
    shutil.copytree(brats_root / "BraTS-GLI-00000-000", root / "BraTS-GLI-00000-000")
    layout, (case,) = volumes_of(root)
    prepare = volume_cache.prepare_case
    prepared = prepare(case, layout, layout.modalities)
    small = prepared._replace(image=prepared.image[:, :4, :4, :4], label=prepared.label[:4, :4, :4])
    monkeypatch.setattr(volume_cache, "prepare_case", lambda *_: small)
    cases = [case._replace(case_id=f"case {number}") for number in range(200)]
    return VolumeCache(root, layout, tree=Tree(root)), cases


def counted(monkeypatch, owner, name, calls):
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **more: calls.append(args[0]) or function(*args, **more))


def test_a_warm_start_opens_no_record_and_reads_a_sample(many, monkeypatch):
    cache, cases = many
    cache.ensure(cases, progress=False)
    warm = VolumeCache(cache._tree.root, cache.layout, tree=cache._tree)
    read, opened, stats = [], [], []
    counted(monkeypatch, storage, "fingerprint", read)
    counted(monkeypatch, builtins, "open", opened)
    counted(monkeypatch, Path, "read_text", opened)
    with monkeypatch.context() as patch:
        counted(patch, os, "stat", stats)
        counted(patch, Path, "stat", stats)
        records = warm.ensure(cases, progress=False)
    assert len(records) == 200
    assert len(read) <= 64
    assert len({str(path) for path in stats}) <= 1.2 * len(cases) + 64
    assert [path for path in opened if "record.json" in str(path)] == []
    assert warm.checked.read / warm.checked.total == pytest.approx(64 / 600)
    monkeypatch.setattr(VolumeCache, "read_record", lambda *_: pytest.fail("a record was opened"))
    assert warm.known_record("case 7").usable


def test_a_full_check_finds_a_flipped_byte_at_once_and_a_manifest_never_hides_a_change(many):
    cache, cases = many
    cases = cases[:80]
    cache.ensure(cases, progress=False)
    file = cache.case_folder("case 5") / "image.npy"
    damage(file)
    again = VolumeCache(cache._tree.root, cache.layout, tree=cache._tree)
    again.ensure(cases, progress=False, check="off")
    assert again.checked.read == 0
    built = again.case_folder("case 5").stat().st_ino
    again.ensure(cases, progress=False, check="full")
    assert again.case_folder("case 5").stat().st_ino != built
    assert again.checked.read == again.checked.total
    (cache.case_folder("case 9") / "image.npy").unlink()  # the time of its folder tells
    last = VolumeCache(cache._tree.root, cache.layout, tree=cache._tree)
    last.ensure(cases, progress=False, check="off")
    assert (cache.case_folder("case 9") / "image.npy").is_file()


def test_a_source_that_changed_is_prepared_again(many):
    cache, cases = many
    cache.ensure(cases[:2], progress=False)
    source = next(iter(cases[0].images.values()))
    os.utime(source, ns=(1, 1))
    before = cache.case_folder("case 0").stat().st_ino
    warm = VolumeCache(cache._tree.root, cache.layout, tree=Tree(cache._tree.root))
    warm.ensure(cases[:2], progress=False)
    assert warm.case_folder("case 0").stat().st_ino != before
    record = json.loads((warm.case_folder("case 0") / "record.json").read_text())
    assert record["sources"][str(source)]["mtime_ns"] == 1


def test_a_copy_cut_short_is_built_again_when_it_is_opened(many):
    cache, cases = many
    cache.ensure(cases[:1], progress=False)
    file = cache.case_folder("case 0") / "image.npy"
    file.write_bytes(file.read_bytes()[:150])
    assert cache.open(cases[0]).image.shape[-3:] == (4, 4, 4)
