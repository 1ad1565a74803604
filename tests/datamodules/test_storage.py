import json
import multiprocessing
import os
import socket
import time

import numpy as np
import pytest

from common.errors import StorageError
from datamodules import storage
from datamodules.storage import file_is_good, fingerprint, save_array, sole_builder

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(storage, "LOOK", 0.01)


def sign(folder, **facts):
    """Put up the sign of another builder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "building.json").write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "other"} | facts))


def build(folder, events):
    with sole_builder(folder):
        events.put("in")
        time.sleep(0.05)
        events.put("out")


def test_one_process_at_a_time_builds(tmp_path):
    events = FORK.Queue()
    processes = [FORK.Process(target=build, args=(tmp_path / "cache", events)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [events.get(timeout=60) for _ in range(6)]
    for process in processes:
        process.join()
    assert found == ["in", "out"] * 3
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]
    holders = [f"process {process.pid} on {socket.gethostname()}" for process in processes]
    assert (tmp_path / "cache/.lock").read_text() in (*holders, "")


def test_a_file_system_without_locks_still_has_one_builder(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(storage.fcntl, "flock", fail)
    test_one_process_at_a_time_builds(tmp_path)


def test_another_machine_is_waited_for_as_long_as_it_gives_signs(tmp_path, monkeypatch, capsys):
    """By the waiting machine's own clock: that of the file's time stamps may be any, or go back."""
    monkeypatch.setattr(storage, "STALE", 0.2)
    sign(tmp_path)
    looks = iter(range(40))
    look = storage._Sign._look

    def beating(self):
        number = next(looks, None)
        if number is not None and (tmp_path / "building.json").exists():
            os.utime(tmp_path / "building.json", (10**9 - number, 10**9 - number))  # the clock goes back
        return look(self)

    monkeypatch.setattr(storage._Sign, "_look", beating)
    with sole_builder(tmp_path):
        assert next(looks, None) is None
        assert json.loads((tmp_path / "building.json").read_text())["pid"] == os.getpid()
    assert "waiting for process 1 on elsewhere, which builds" in capsys.readouterr().out
    assert not (tmp_path / "building.json").exists()


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_a_builder_that_died_is_not_waited_for_long(tmp_path, monkeypatch, content):
    """Of this machine at once, of another after a while, whatever it left in its sign."""
    if content is None:
        sign(tmp_path, host=socket.gethostname(), pid=4194305)
    else:
        monkeypatch.setattr(storage, "STALE", 0.05)
        (tmp_path / "building.json").write_text(content)
    with sole_builder(tmp_path):
        assert json.loads((tmp_path / "building.json").read_text())["pid"] == os.getpid()


def test_the_sign_of_whoever_took_over_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "HEARTBEAT", 0.01)
    with sole_builder(tmp_path):
        before = (tmp_path / "building.json").stat().st_mtime_ns
        for _ in range(1000):
            time.sleep(0.005)
            if (tmp_path / "building.json").stat().st_mtime_ns != before:
                break
        else:
            pytest.fail("no sign of life")
        sign(tmp_path)
    assert json.loads((tmp_path / "building.json").read_text())["token"] == "other"


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be made: Not a directory"), sole_builder(tmp_path / "file/cache"):
        pass


def test_a_file_is_good_or_not(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    facts = fingerprint(path)
    assert file_is_good(path, facts["size"], facts["xxh3"], full=True)
    path.write_bytes(b"Content")
    assert file_is_good(path, facts["size"], facts["xxh3"], full=False)
    assert not file_is_good(path, facts["size"], facts["xxh3"], full=True)
    path.unlink()
    assert not file_is_good(path, facts["size"], facts["xxh3"], full=False)


@pytest.mark.parametrize("shape", [(7, 5), (0, 4), (1,)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.int16])
def test_an_array_is_what_numpy_reads(tmp_path, shape, dtype):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    save_array(tmp_path / "a.npy", array.T)
    loaded = np.load(tmp_path / "a.npy", mmap_mode="r" if array.size else None)
    assert loaded.dtype == dtype
    assert np.array_equal(loaded, array.T)


@pytest.mark.parametrize("missing", [1, 500, 3000])
def test_a_disk_that_fills_up_with_the_last_bytes_is_an_error(tmp_path, small_disk, missing):
    """np.save writes such a file without a word."""
    array = np.ones(40_000, np.uint8)
    with small_disk(array.nbytes + 128 - missing), pytest.raises(OSError, match="File too large"):
        save_array(tmp_path / "a.npy", array)
