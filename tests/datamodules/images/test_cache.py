import errno
import json
import multiprocessing
import os
import pickle
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import StorageError
from common.faults import SampleFaultError
from common.files import temporary_beside
from datamodules.images import cache as cache_module
from datamodules.images.cache import ImageCache, SourceImages
from datamodules.images.crops import cut_box
from datamodules.images.reading import COLOUR, ImageReader, read_colour, read_gray, read_header


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "archive"
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (60 + number, 80)).astype(np.uint8)
        path = root / f"p{number % 3}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


@pytest.fixture
def paths(root):
    return sorted(root.rglob("*.png"))


@pytest.fixture
def built(monkeypatch):
    """Collect the names of the images that are built."""
    names = []
    build = ImageCache.build
    monkeypatch.setattr(ImageCache, "build", lambda self, path: names.append(path.name) or build(self, path))
    return names


def manifest_of(cache, path):
    return cache.image_file(path).parent / "manifest.jsonl"


def manifest_lines(cache):
    return [json.loads(line) for file in cache.folder.glob("*/manifest.jsonl") for line in file.open()]


def damage(path, position=-1):
    """Flip a byte, the size and modification time as they were."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(bytes(content))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_copies_are_the_reduced_images(root, paths):
    cache = ImageCache(root, 40)
    assert cache.ensure(paths, workers=2, progress=False) == dict.fromkeys(paths)
    for path in paths:
        opened = cache.open(path)
        assert isinstance(opened, np.memmap)
        assert np.array_equal(opened, read_gray(path, 40))
    opened[:] = 0
    assert np.array_equal(cache.open(path), read_gray(path, 40))


def test_it_is_made_once_and_continued_after_an_interruption(root, paths, built):
    def interrupted(path, *rest):
        if path == paths[5]:
            raise KeyboardInterrupt
        return read_gray(path, *rest)

    with pytest.raises(KeyboardInterrupt):
        ImageCache(root, 40, reader=ImageReader("", 1, interrupted)).ensure(paths, progress=False)
    # Threads run a few images ahead of the one that failed.
    whole = {line["path"].split("/")[1] for line in manifest_lines(ImageCache(root, 40))}
    assert {path.name for path in paths[:5]} <= whole
    assert paths[5].name not in whole
    built.clear()
    ImageCache(root, 40).ensure(paths, progress=False)
    assert sorted(built) == sorted({path.name for path in paths} - whole)
    built.clear()
    ImageCache(root, 40).ensure(paths, progress=False)
    assert built == []


def test_an_interrupted_image_leaves_nothing(root, paths, monkeypatch):
    cache = ImageCache(root, 40)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.os, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            cache.build(paths[0])
    assert [path for path in cache.folder.rglob("*") if path.is_file()] == []


def test_what_a_dead_run_left_is_deleted_and_what_a_living_one_writes_is_not(root, paths):
    cache = ImageCache(root, 40)
    cache.ensure(paths[:1], progress=False)
    old, new = (temporary_beside(cache.folder / "tmp" / "image.npy") for _ in range(2))
    old = old.with_name(old.name.replace(f"-{os.getpid()}-", "-4194305-"))  # above the largest process id
    old.touch()
    new.touch()
    cache.ensure(paths, progress=False)
    assert not old.exists()
    assert new.exists()


def _fill(root, paths, queue):
    try:
        queue.put([fault for fault in ImageCache(root, 40).ensure(paths, 2, progress=False).values() if fault])
    except Exception as error:  # the parent says which
        queue.put(repr(error))


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_fill_a_cache_at_once(root, paths, monkeypatch, locks):
    if not locks:
        monkeypatch.setattr("datamodules.images.cache.sole_builder", nullcontext)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_fill, args=(root, paths, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=120) for _ in processes] == [[]] * 3
    for process in processes:
        process.join()
    cache = ImageCache(root, 40)
    assert set(cache.ensure(paths, progress=False, check="full").values()) == {None}
    assert list((cache.folder / "tmp").iterdir()) == []
    assert locks <= (len(manifest_lines(cache)) == len(paths))


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(root, paths, small_disk, built):
    cache = ImageCache(root, 40)
    cache.ensure(paths[:2], progress=False)
    with small_disk(1000), pytest.raises(StorageError, match="the disk or the quota is full"):
        cache.ensure(paths, progress=False)
    assert list((cache.folder / "tmp").iterdir()) == []
    built.clear()
    cache.ensure(paths, progress=False)
    assert len(built) == len(paths) - 2
    assert set(cache.ensure(paths, progress=False, check="full").values()) == {None}


def test_a_whole_cache_needs_no_permission(root, paths, monkeypatch):
    cache = ImageCache(root, 40)
    cache.ensure(paths, progress=False)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    for name in ("mkdir", "write_text", "unlink", "replace"):
        monkeypatch.setattr(Path, name, refuse)
    assert set(ImageCache(root, 40).ensure(paths, progress=False).values()) == {None}


def test_a_torn_last_line_costs_one_image(root, paths, built):
    cache = ImageCache(root, 40)
    cache.ensure(paths, progress=False)
    manifest = manifest_of(cache, paths[0])
    manifest.write_bytes(manifest.read_bytes()[:-9])
    built.clear()
    cache.ensure(paths, progress=False)
    assert len(built) == 1
    cache.ensure(paths, progress=False)
    assert len(built) == 1


def test_a_flipped_byte_is_found_by_a_full_check(root, paths, built):
    cache = ImageCache(root, 40)
    cache.ensure(paths, progress=False)
    damage(cache.image_file(paths[3]))
    built.clear()
    cache.ensure(paths, progress=False, check="off")
    assert built == []
    cache.ensure(paths, progress=False, check="full")
    assert built == [paths[3].name]
    assert np.array_equal(cache.open(paths[3]), read_gray(paths[3], 40))


def test_a_copy_of_another_size_is_built_again(root, paths, built):
    cache = ImageCache(root, 40)
    cache.ensure(paths, progress=False)
    file = cache.image_file(paths[3])
    file.write_bytes(file.read_bytes()[:-1])
    built.clear()
    cache.ensure(paths, progress=False)
    assert built == [paths[3].name]


@pytest.mark.parametrize(
    "harm",
    [
        Path.unlink,
        lambda file: file.write_bytes(b""),
        lambda file: damage(file, 20),
        lambda file: file.write_bytes(file.read_bytes().replace(b"|u1", b"|i1")),
    ],
    ids=["gone", "empty", "header", "dtype"],
)
def test_a_copy_that_breaks_during_a_run_is_built_again(root, paths, harm):
    cache = ImageCache(root, 40)
    cache.ensure(paths, progress=False)
    harm(cache.image_file(paths[3]))
    assert np.array_equal(cache.open(paths[3]), read_gray(paths[3], 40))


def test_a_changed_source_is_read_again(root, paths, built):
    cache = ImageCache(root, 40)
    cache.ensure(paths, progress=False)
    built.clear()
    Image.open(paths[1]).rotate(180).save(paths[1])
    paths[2].write_bytes(b"broken")
    faults = cache.ensure(paths, progress=False)
    assert sorted(built) == [paths[1].name, paths[2].name]
    assert np.array_equal(cache.open(paths[1]), read_gray(paths[1], 40))
    assert [path for path, fault in faults.items() if fault] == [paths[2]]
    assert not cache.image_file(paths[2]).exists()


def test_faults_are_remembered_until_the_source_is_mended(root, paths, built):
    paths[4].write_bytes(b"")
    paths[5].write_bytes(b"broken")
    good = paths[6].read_bytes()
    for _ in range(2):
        faults = ImageCache(root, 40).ensure(paths, progress=False)
        assert faults[paths[4]].kind == "unreadable"
        assert faults[paths[4]].path == faults[paths[4]].sample == str(paths[4])
        assert sum(fault is not None for fault in faults.values()) == 2
    assert len(built) == len(paths)
    other = ImageCache(root, 40)  # as on another rank, where nothing was ensured
    assert other.faults() == {paths[4]: faults[paths[4]], paths[5]: faults[paths[5]]}
    built.clear()
    with pytest.raises(SampleFaultError, match="empty"):
        other.open(paths[4])
    assert built == []
    cache = ImageCache(root, 40)
    cache.ensure(paths, progress=False)
    paths[4].write_bytes(good)
    assert cache.ensure(paths, progress=False)[paths[4]] is None
    assert cache.open(paths[4]).shape == cache.open(paths[6]).shape
    assert list(cache.faults()) == [paths[5]]


def test_a_source_out_of_reach_spoils_nothing(root, paths, built):
    """A mount that is gone for an hour must not cost the cache."""
    cache = ImageCache(root, 40)
    cache.ensure(paths, progress=False)
    root.rename(root.with_name("away"))
    faults = cache.ensure(paths, progress=False)
    assert {fault.kind for fault in faults.values()} == {"missing"}
    assert set(cache.faults()) == set(paths)
    with pytest.raises(SampleFaultError):
        cache.open(paths[0])
    root.with_name("away").rename(root)
    built.clear()
    assert cache.ensure(paths, progress=False) == dict.fromkeys(paths)
    assert built == []
    assert cache.faults() == {}


def test_open_builds_what_was_not_ensured(root, paths, built):
    cache = pickle.loads(pickle.dumps(ImageCache(root, 40)))
    for _ in range(2):
        assert np.array_equal(cache.open(paths[0]), read_gray(paths[0], 40))
    cache.ensure(paths[:1], progress=False)
    assert built == [paths[0].name]


def test_the_manifest_names_every_image(root, paths, tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(paths[0].read_bytes())
    cache = ImageCache(root, 40)
    cache.ensure([*paths, outside, paths[0]], workers=4, progress=False)
    lines = manifest_lines(cache)
    assert {line["path"] for line in lines} == {*(p.relative_to(root).as_posix() for p in paths), str(outside)}
    assert len(lines) == len(paths) + 1
    for line in lines:
        copy = np.load(cache.folder / line["file"])
        assert list(copy.shape) == line["shape"]
        assert (cache.folder / line["file"]).stat().st_size == line["file_size"]
        assert len(line["xxh3"]) == len(line["file_xxh3"]) == 32


def test_a_root_that_is_a_link_has_one_cache(root, paths, tmp_path, built):
    ImageCache(root, 40).ensure(paths, progress=False)
    (tmp_path / "link").symlink_to(root)
    built.clear()
    ImageCache(tmp_path / "link", 40).ensure([tmp_path / "link" / paths[0].relative_to(root), paths[1]], progress=False)
    assert built == []


def test_settings_have_caches_of_their_own(root, tmp_path):
    folders = {
        ImageCache(root, 40).folder,
        ImageCache(root, 41).folder,
        ImageCache(root.parent, 40).folder,
        ImageCache(root, 40, tmp_path / "elsewhere").folder,
    }
    assert len(folders) == 4
    with pytest.raises(ValueError, match="at least 1"):
        ImageCache(root, 0)


def test_without_a_cache_faults_show_when_an_image_is_read(root, paths):
    paths[0].write_bytes(b"broken")
    images = SourceImages()
    assert images.ensure(paths) == dict.fromkeys(paths)
    with pytest.raises(SampleFaultError) as error:
        images.crop(paths[0], whole, (16, 16))
    assert error.value.faults[0].sample == str(paths[0])


def whole(shape):
    return (0, 0, shape[1], shape[0])


def test_a_crop_is_decoded_at_no_more_pixels_than_it_needs(tmp_path, monkeypatch):
    rows, columns = np.mgrid[:640, :800]
    picture = (128 + 60 * np.sin(rows / 40) + 60 * np.cos(columns / 50)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "large.jpg", quality=95)
    decoded = []
    real = Image.Image.draft

    def draft(image, mode, size):
        decoded.append(size)
        return real(image, mode, size)

    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", draft)
    boxes = {"whole": whole, "part": lambda shape: (200, 100, 360, 260)}
    crops = {name: SourceImages().crop(tmp_path / "large.jpg", box, (80, 80)) for name, box in boxes.items()}
    assert decoded == [(80, 80), (320, 320)]
    for name, box in boxes.items():
        exact = cut_box(picture, box(picture.shape), (80, 80))
        assert (crops[name] - exact).abs().max() < 0.05


def test_size_estimate(root, paths, monkeypatch):
    cache = ImageCache(root, 40)
    cache.ensure(paths, progress=False)
    files = sum(cache.image_file(path).stat().st_size for path in paths)
    assert cache.estimated_bytes(paths) == files
    read = []
    monkeypatch.setattr(cache_module, "read_header", lambda path: read.append(path) or read_header(path))
    assert cache.estimated_bytes(paths[:1] * 999) == 999 * cache.image_file(paths[0]).stat().st_size
    assert len(read) <= cache_module.SAMPLED_HEADERS
    assert cache.estimated_bytes([]) == 0


def test_colour_has_a_cache_of_its_own(root, paths):
    gray, colour = ImageCache(root, 40), ImageCache(root, 40, reader=COLOUR)
    assert gray.folder != colour.folder
    assert colour.ensure(paths[:2], progress=False) == dict.fromkeys(paths[:2])
    assert np.array_equal(colour.open(paths[0]), read_colour(paths[0], 40))
    whole = colour.crop(paths[0], lambda shape: (0, 0, shape[1], shape[0]), (16, 16))
    assert whole.shape == (3, 16, 16)
    assert torch.equal(whole.flip(2), colour.crop(paths[0], lambda shape: (0, 0, shape[1], shape[0]), (16, 16), True))
    source = SourceImages(COLOUR).crop(paths[0], lambda shape: (0, 0, shape[1], shape[0]), (16, 16), degrees=90)
    assert source.shape == (3, 16, 16)
    assert colour.estimated_bytes(paths) > 2 * gray.estimated_bytes(paths)
