import multiprocessing
import os
import re
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import pseudonyms
from common.callbacks.run_record import _command
from common.cli import execute, main
from common.errors import StorageError
from common.pseudonyms import hide_names, key_file, pseudonym, public_name, share_key
from common.randomness import stable_hash
from common.runtime.reporting import contents

HIDDEN = ["--data.anonymise=true", "--data.layout=brats2021"]
NAME = re.compile(rb"SMITH|JANE|1961", re.IGNORECASE)


def test_a_pseudonym_is_the_same_for_the_same_key_and_no_other():
    first = pseudonym("1001")
    assert first == pseudonym("1001") != pseudonym("1002")
    assert re.fullmatch("subject-[0-9a-f]{16}", first)
    assert f"{stable_hash('pseudonym', '1001'):016x}" not in first
    assert pseudonym("\ud800") != pseudonym("")
    key_file().unlink()
    pseudonyms._stored_key.cache_clear()
    assert pseudonym("1001") != first


def test_the_key_is_the_users_alone(monkeypatch, tmp_path):
    pseudonym("1001")
    assert key_file() == tmp_path / "config/medmim/anonymise.key"
    assert stat.S_IMODE(key_file().stat().st_mode) == 0o600
    assert [path.name for path in key_file().parent.iterdir()] == ["anonymise.key"]
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert key_file() == Path.home() / ".config/medmim/anonymise.key"


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [("", 0o600, "is damaged"), ("ab" * 31, 0o600, "is damaged"), ("x" * 64, 0o600, "is damaged"),
     ("ab" * 32, 0o640, "Others may read")],
)  # fmt: skip
def test_a_key_that_cannot_be_trusted_is_one_sentence(content, mode, words):
    key_file().parent.mkdir(parents=True)
    key_file().write_text(content)
    key_file().chmod(mode)
    with pytest.raises(StorageError, match=words) as error:
        pseudonym("1001")
    assert len(str(error.value)) < 300


def test_a_key_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "config").write_text("")
    with pytest.raises(StorageError, match="cannot be made"):
        pseudonym("1001")


def _named(folder, barrier, queue):
    os.environ["XDG_CONFIG_HOME"] = folder
    barrier.wait()
    queue.put(pseudonym("1001"))


def test_processes_that_need_a_key_at_once_make_one(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_named, args=(str(tmp_path / "new"), barrier, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    found = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1
    assert len(list((tmp_path / "new/medmim").iterdir())) == 1


def _shared(folder):
    """Take part as one of two machines whose users have home folders, and keys, of their own."""
    os.environ["XDG_CONFIG_HOME"] = folder
    own = pseudonym("1001")
    share_key()
    shared = pseudonym("1001")
    del os.environ["MEDMIM_ANONYMISE_KEY"]
    return own, shared


@pytest.mark.ddp
def test_ranks_take_the_key_of_the_first(rank_pool, tmp_path):
    (own, shared), (other, same) = rank_pool.run(_shared, [(str(tmp_path / "a"),), (str(tmp_path / "b"),)])
    assert own == shared == same != other


def test_a_name_is_shown_or_hidden():
    assert public_name("SMITH\n") == "SMITH\\n"
    hide_names(True)
    assert public_name("SMITH\n") == pseudonym("SMITH\n")
    Path("root/SMITH-JANE").mkdir(parents=True)
    assert contents(Path("root")) == "1 entries"
    hide_names(False)
    assert contents(Path("root")) == "SMITH-JANE/"


def test_the_command_is_kept_without_what_is_personal(monkeypatch):
    words = [
        "lightning",
        "predict",
        "--data.single.image=/SMITH.png",
        "--data.init_args.single.question",
        "JANE?",
        "--data.root",
        "/a",
        '--data.single={"image": "/SMITH.png"}',
    ]
    monkeypatch.setattr("sys.argv", [*words])
    run = SimpleNamespace(datamodule=SimpleNamespace(personal=("single.image", "single.question")))
    assert _command(run) == words
    hide_names(True)
    words[2], words[4] = f"--data.single.image={pseudonym('/SMITH.png')}", pseudonym("JANE?")
    given = words[7].partition("=")[2]
    words[7] = f"--data.single={pseudonym(given)}"
    assert _command(run) == words


@pytest.fixture
def named_archive(brats_root, tmp_path):
    """Return an archive whose folders and files are called after people; two files are broken, in two ways."""
    root = tmp_path / "archive"
    for number, case in enumerate(sorted(path for path in brats_root.iterdir() if path.is_dir())):
        name = f"SMITH-JANE-1961020{number}"
        for path in case.iterdir():
            target = root / name / path.name.replace(case.name, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    broken = sorted(root.glob("*/*-t1c.nii.gz"))
    broken[0].write_bytes(b"")
    broken[1].write_bytes(broken[1].read_bytes()[:-9])
    return root


def test_nothing_of_a_name_remains_in_a_run(named_archive, pretrain_arguments, capsys, monkeypatch):
    arguments = pretrain_arguments(
        "--data.anonymise=true", "--data.layout=brats2021", "--trainer.max_epochs=1", root=named_archive
    )
    monkeypatch.setattr("sys.argv", ["lightning", *arguments])
    folder = execute(arguments)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"data_faults.csv", "config.yaml", "environment.json", "last.ckpt"}
    assert [path.name for path in files if NAME.search(path.read_bytes()) or NAME.search(path.name.encode())] == []
    key = key_file().read_bytes().strip()
    assert [
        path.name for path in files if key in path.read_bytes() or bytes.fromhex(key.decode()) in path.read_bytes()
    ] == []
    printed = capsys.readouterr()
    assert "faults: 2 of 8 samples" in printed.out
    assert not NAME.search((printed.out + printed.err).encode())


def test_nothing_of_a_name_remains_in_a_refusal(named_archive, pretrain_arguments, capsys):
    twins = sorted(named_archive.iterdir())
    split = Path("split.csv")
    split.write_text("case_id,split\n" + "".join(f"{path.name},train\n" for path in twins) + f"{twins[0].name},val\n")
    arguments = pretrain_arguments(
        "--data.anonymise=true", "--data.layout=brats2021", f"--data.split.file={split}", root=named_archive
    )
    with pytest.raises(SystemExit):
        main(arguments)
    line = capsys.readouterr().err
    assert f"puts {pseudonym(twins[0].name)} into both train and val" in line
    assert not NAME.search(line.encode())
