import errno
import json
import multiprocessing
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from common.errors import StorageError
from common.faults import SampleFaultError
from common.names import case_twins
from datamodules.volumes.cache import VolumeCache
from datamodules.volumes.modalities import with_modalities
from datamodules.volumes.prepare import prepare_case
from datamodules.volumes.voxels import VoxelConfig


@pytest.fixture
def archive(brats_root, tmp_path, volumes_of):
    root = tmp_path / "archive"
    for name in ("BraTS-GLI-00000-000", "BraTS-GLI-00001-000"):
        shutil.copytree(brats_root / name, root / name)
    layout, cases = volumes_of(root)
    return root, layout, cases


@pytest.mark.parametrize("format", ["npy", "b2nd"])
def test_crops_equal_the_prepared_case(archive, format):
    root, layout, cases = archive
    cache = VolumeCache(root, layout, format)
    cache.ensure(cases, progress=False)
    prepared = prepare_case(cases[0], layout, layout.modalities)
    opened = cache.open(cases[0])
    assert opened.image.dtype == np.float16
    assert np.array_equal(opened.image[:, 3:9, 2:8, 5:11], prepared.image[:, 3:9, 2:8, 5:11].astype(np.float16))
    assert np.array_equal(opened.label[3:9, 2:8, 5:11], prepared.label[3:9, 2:8, 5:11])
    value, *voxel = opened.label_voxels[0]
    assert opened.label[tuple(voxel)] == value


def test_a_crop_reads_only_its_own_voxels(archive):
    root, layout, cases = archive
    cache = VolumeCache(root, layout)
    cache.ensure(cases, progress=False)
    assert isinstance(cache.open(cases[0]).image, np.memmap)


def test_it_is_made_once_and_continued_after_an_interruption(archive, monkeypatch):
    root, layout, cases = archive
    cache = VolumeCache(root, layout)
    built = []
    build = VolumeCache.build
    monkeypatch.setattr(VolumeCache, "build", lambda self, case: built.append(case.case_id) or build(self, case))
    cache.ensure(cases[:1], progress=False)
    cache.ensure(cases, progress=False)
    cache.ensure(cases, progress=False)
    assert built == [cases[0].case_id, cases[1].case_id]


def test_an_interrupted_case_leaves_nothing(archive, monkeypatch):
    root, layout, cases = archive
    cache = VolumeCache(root, layout)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("datamodules.volumes.cache.fingerprint", fail)
        with pytest.raises(KeyboardInterrupt):
            cache.build(cases[0])
    assert cache.read_record(cases[0].case_id) is None
    assert [path for path in cache.folder.rglob("*") if path.name not in ("cases", "tmp")] == []


NAMES = ("./../../../victim", "../../victim", "{tmp}/victim", "sub-01/ses-1", "key.json", "a\nb", "a\0b", ".", "..",
         "a.", "a ", "n" * 250, "n" * 300, "Case", "case", "caf\u00e9", "cafe\u0301", "\ud800", "")  # fmt: skip


def test_no_name_of_a_case_leads_out_of_the_cache(archive, tmp_path):
    """Two levels up lies the cache itself, three the folder that it is in: each holds a folder of the user's."""
    root, layout, cases = archive
    names = [name.format(tmp=tmp_path) for name in NAMES]
    victims = [folder / "victim" / "file" for folder in (tmp_path, tmp_path / "cache", tmp_path / "cache/volumes")]
    for victim in victims:
        victim.parent.mkdir(parents=True)
        victim.write_text("mine")
    cache = VolumeCache(root, layout, twins=case_twins(names))
    strange = [cases[number % 2]._replace(case_id=name) for number, name in enumerate(names)]
    records = cache.ensure(strange, workers=2, progress=False)
    assert [victim.read_text() for victim in victims] == ["mine"] * 3
    assert set(records) == set(names)
    assert len({path.name.lower() for path in (cache.folder / "cases").iterdir()}) == len(names)
    for case in strange:
        assert str(case.images["t1c"]) in cache.open(case).record.sources


def test_a_folder_that_was_put_in_the_place_of_a_case_by_a_link_stays(archive, tmp_path):
    root, layout, cases = archive
    cache = VolumeCache(root, layout)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/file").write_text("mine")
    cache.ensure(cases[1:], progress=False)
    cache.case_folder(cases[0].case_id).symlink_to(tmp_path / "victim")
    cache.ensure(cases, progress=False)
    assert (tmp_path / "victim/file").read_text() == "mine"
    assert cache.open(cases[0]).record.usable
    outside = cache.folder.rename(tmp_path / "moved")
    cache.folder.mkdir()
    (cache.folder / "cases").symlink_to(outside / "cases")
    with pytest.raises(StorageError, match="does not lie inside"):
        cache.build(cases[0])


def test_the_record_of_another_case_is_not_this_ones(archive):
    root, layout, cases = archive
    cache = VolumeCache(root, layout)
    cache.ensure(cases, progress=False)
    shutil.rmtree(cache.case_folder(cases[0].case_id))
    cache.case_folder(cases[1].case_id).rename(cache.case_folder(cases[0].case_id))
    assert cache.read_record(cases[0].case_id) is None
    assert str(cases[0].labels["seg"]) in cache.open(cases[0]).record.sources


def _ensure_rebuilds(cache, cases, monkeypatch):
    built = []
    build = VolumeCache.build
    with monkeypatch.context() as patch:
        patch.setattr(VolumeCache, "build", lambda self, case: built.append(case.case_id) or build(self, case))
        cache.ensure(cases, progress=False)
    return built


@pytest.mark.parametrize("format", ["npy", "b2nd"])
def test_a_flipped_byte_in_the_cache_is_never_trusted(archive, monkeypatch, format):
    """Not even with the old modification time: the check sum decides."""
    root, layout, cases = archive
    cache = VolumeCache(root, layout, format)
    cache.ensure(cases, progress=False)
    good = np.array(cache.open(cases[0]).image[:])
    path = cache.case_folder(cases[0].case_id) / f"image.{format}"
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert _ensure_rebuilds(cache, cases, monkeypatch) == [cases[0].case_id]
    assert np.array_equal(np.array(cache.open(cases[0]).image[:]), good)


def test_a_changed_source_is_read_again(archive, monkeypatch, volumes_of):
    root, layout, cases = archive
    cache = VolumeCache(root, layout)
    cache.ensure(cases, progress=False)
    os.utime(cases[1].images["t1c"], (1, 1))
    assert _ensure_rebuilds(cache, cases, monkeypatch) == [cases[1].case_id]
    cases[0].images["t2w"].unlink()
    _, fewer = volumes_of(root)
    assert _ensure_rebuilds(cache, fewer, monkeypatch) == [cases[0].case_id]
    assert cache.open(fewer[0]).record.modality_mask == [True, True, True, False]


def test_a_file_that_vanishes_during_a_run_is_made_again(archive):
    root, layout, cases = archive
    cache = VolumeCache(root, layout)
    cache.ensure(cases, progress=False)
    (cache.case_folder(cases[0].case_id) / "image.npy").unlink()
    assert cache.open(cases[0]).image.shape[0] == 4


def test_faults_are_remembered(archive):
    root, layout, cases = archive
    for path in cases[0].images.values():
        path.write_bytes(b"broken")
    cases[1].images["t2f"].write_bytes(b"broken")
    cache = VolumeCache(root, layout)
    for _ in range(2):
        records = cache.ensure(cases, progress=False)
        assert not records[cases[0].case_id].usable
        assert len(records[cases[0].case_id].all_faults()) == 4
        assert records[cases[1].case_id].modality_mask == [True, True, False, True]
    with pytest.raises(SampleFaultError):
        cache.open(cases[0])


def test_settings_have_caches_of_their_own(archive):
    root, layout, _ = archive
    folders = {
        VolumeCache(root, layout).folder,
        VolumeCache(root, layout, "b2nd").folder,
        VolumeCache(root, layout.with_voxels(VoxelConfig(intensity=dict.fromkeys(layout.modalities, "max")))).folder,
        VolumeCache(root.parent, layout).folder,
    }
    assert len(folders) == 4
    with pytest.raises(ValueError, match="'npy' or 'b2nd'"):
        VolumeCache(root, layout, "zip")


def test_the_record_names_every_file(archive):
    root, layout, cases = archive
    cache = VolumeCache(root, layout)
    cache.ensure(cases, progress=False)
    record = json.loads((cache.case_folder(cases[0].case_id) / "record.json").read_text())
    assert set(record["files"]) == {"image.npy", "label.npy", "label_voxels.npy"}
    assert all({"size", "xxh3"} <= entry.keys() for entry in record["files"].values())
    assert all({"size", "xxh3", "mtime_ns"} <= entry.keys() for entry in record["sources"].values())
    assert len(record["sources"]) == 5


def test_size_estimate_is_an_upper_bound(archive):
    root, layout, cases = archive
    cache = VolumeCache(root, layout)
    cache.ensure(cases, progress=False)
    images = sum((cache.case_folder(c.case_id) / "image.npy").stat().st_size for c in cases)
    assert images <= cache.estimated_bytes(cases) < 4 * images


def _fill(root, layout, cases, queue):
    torch.set_num_threads(1)  # after a fork, two threads that start PyTorch's pool at once would fail
    try:
        records = VolumeCache(root, layout).ensure(cases, workers=2, progress=False)
        queue.put(sorted(name for name, record in records.items() if record.usable))
    except Exception as error:  # the parent says which
        queue.put(repr(error))


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_fill_a_cache_at_once(archive, monkeypatch, locks):
    """In one of six rounds the second ended in OSError 39; without locks the first entry stays."""
    root, layout, cases = archive
    if not locks:
        monkeypatch.setattr("datamodules.volumes.cache.sole_builder", nullcontext)
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        queue = context.Queue()
        processes = [context.Process(target=_fill, args=(root, layout, cases, queue)) for _ in range(3)]
        for process in processes:
            process.start()
        found = [queue.get(timeout=120) for _ in processes]
        for process in processes:
            process.join()
        assert found == [sorted(case.case_id for case in cases)] * 3
        cache = VolumeCache(root, layout)
        assert {path.name for path in (cache.folder / "cases").iterdir()} == {case.case_id for case in cases}
        assert list((cache.folder / "tmp").iterdir()) == []
        shutil.rmtree(cache.folder)


def test_the_entry_that_was_there_first_stays(archive):
    root, layout, cases = archive
    cache = VolumeCache(root, layout)
    cache.build(cases[0])
    first = (cache.case_folder(cases[0].case_id) / "image.npy").stat().st_ino
    cache.build(cases[0])
    assert (cache.case_folder(cases[0].case_id) / "image.npy").stat().st_ino == first
    (cache.case_folder(cases[0].case_id) / "image.npy").write_bytes(b"")
    cache.build(cases[0])
    assert cache.open(cases[0]).image.shape[0] == 4
    assert list((cache.folder / "tmp").iterdir()) == []


@pytest.mark.parametrize("format", ["npy", "b2nd"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(archive, small_disk, format):
    root, layout, cases = archive
    cache = VolumeCache(root, layout, format)
    cache.ensure(cases[:1], progress=False)
    before = {path: path.read_bytes() for path in cache.folder.rglob("*") if path.is_file()}
    with small_disk(20_000), pytest.raises(StorageError, match="the disk or the quota is full") as error:
        cache.ensure(cases, progress=False)
    assert len(str(error.value)) <= 300
    assert {path: path.read_bytes() for path in cache.folder.rglob("*") if path.is_file()} == before
    assert cache.read_record(cases[1].case_id) is None
    cache.ensure(cases, progress=False)
    assert cache.open(cases[1]).record.usable


def test_a_whole_cache_needs_no_permission_and_an_incomplete_one_says_so(archive, monkeypatch):
    root, layout, cases = archive
    cache = VolumeCache(root, layout)
    cache.ensure(cases[:1], progress=False)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        for name in ("mkdir", "write_text", "unlink", "replace"):
            patch.setattr(Path, name, refuse)
        assert cache.ensure(cases[:1], progress=False)[cases[0].case_id].usable
        with pytest.raises(StorageError, match=r"cannot be made: permission denied\. Allow it"):
            cache.ensure(cases, progress=False)


def test_a_cache_that_was_moved_is_still_good(archive, monkeypatch, tmp_path):
    root, layout, cases = archive
    VolumeCache(root, layout).ensure(cases, progress=False)
    (tmp_path / "cache").rename(tmp_path / "moved")
    monkeypatch.setenv("MEDMIM_CACHE", str(tmp_path / "moved"))
    assert _ensure_rebuilds(VolumeCache(root, layout), cases, monkeypatch) == []
    assert not (tmp_path / "cache").exists()


def test_what_other_processes_write_is_left_to_them_whatever_the_clock_says(archive, monkeypatch):
    root, layout, cases = archive
    cache = VolumeCache(root, layout)
    cache.ensure(cases[:1], progress=False)
    mine, dead = cache.folder / "tmp" / ".x-1-0123abcd.case", cache.folder / "tmp" / ".x-4194305-0123abcd.case"
    monkeypatch.setattr("common.files.socket.gethostname", lambda: "x")
    for path in (mine, dead):
        path.mkdir()
    os.utime(mine, (1, 1))
    os.utime(dead, (2**33, 2**33))
    cache.ensure(cases, progress=False)
    assert list((cache.folder / "tmp").iterdir()) == [mine]


def test_voxels_beside_their_header_belong_to_a_source(tmp_path, volumes_of):
    (tmp_path / "root/c0").mkdir(parents=True)
    path = tmp_path / "root/c0/t1.mhd"
    voxels = np.random.default_rng(0).integers(1, 99, (6, 7, 8)).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path))
    layout, cases = volumes_of(tmp_path / "root")
    layout = with_modalities(layout, cases, None)
    cache = VolumeCache(tmp_path / "root", layout)
    record = cache.build(cases[0])
    assert cache.is_valid(cases[0], record)
    raw = path.with_suffix(".raw")
    raw.write_bytes(raw.read_bytes()[::-1])
    os.utime(raw, ns=(1, 1))
    assert not cache.is_valid(cases[0], record)


def test_how_odd_files_are_read_is_part_of_the_key(archive):
    root, layout, _ = archive
    folders = {
        VolumeCache(root, layout.with_voxels(voxels)).folder
        for voxels in (VoxelConfig(), VoxelConfig(nan="zero"), VoxelConfig(header="sform"),
                       VoxelConfig(intensity={"t1c": "standardised"}))
    }  # fmt: skip
    assert len(folders) == 4
