"""The counters and logs that a resumed run goes on from."""

import csv

from common.callbacks.last_checkpoint import settle_progress
from common.runtime.loggers import RunCSVLogger


def progress(ready, completed, current, epoch, processed, over):
    def counts(ready, completed, processed):
        return {"ready": ready, "started": ready, "processed": processed, "completed": completed}

    return {
        "epoch_loop.batch_progress": {
            "total": counts(ready, completed, ready), "current": counts(current, completed - ready + current, current),
            "is_last_batch": over,
        },
        "epoch_loop.val_loop.batch_progress": {"total": counts(4, 4, 4), "current": counts(8, 8, 8)},
        "epoch_progress": {part: counts(epoch, epoch - 1, processed) for part in ("total", "current")},
    }  # fmt: skip


def test_the_last_step_of_an_epoch_is_resumed_from_as_the_end_of_the_epoch():
    at_the_step, at_the_end = progress(12, 11, 6, 2, 1, True), progress(12, 12, 6, 2, 2, True)
    for loop in (at_the_step, at_the_end):
        settle_progress(loop)
        assert loop["epoch_progress"]["current"] == {"ready": 2, "started": 2, "processed": 2, "completed": 1}
        assert loop["epoch_loop.batch_progress"]["total"]["completed"] == 12
    assert at_the_step == at_the_end


def test_a_step_inside_an_epoch_is_resumed_from_as_its_end_whatever_was_lost_on_the_way():
    loop = progress(22, 20, 4, 4, 3, False)
    settle_progress(loop)
    assert loop["epoch_loop.batch_progress"]["total"] == {
        "ready": 22, "started": 22, "processed": 22, "completed": 21}  # fmt: skip
    assert loop["epoch_loop.batch_progress"]["current"]["completed"] == 3
    assert loop["epoch_progress"]["total"] == {"ready": 4, "started": 4, "processed": 3, "completed": 3}
    assert set(loop["epoch_loop.val_loop.batch_progress"]["total"].values()) == {0}


def test_a_resumed_log_is_cut_at_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss\n4,1.0\n5,0.9\n6,0.8\n7,0.")
    path.write_text(path.read_text() + "\n8")
    logger = RunCSVLogger(str(tmp_path), first_step=6)
    logger.log_metrics({"train/loss": 0.75, "val/loss": 2.0}, 6)
    logger.save()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["train/loss"], row["val/loss"]) for row in rows] == [
        ("4", "1.0", ""), ("5", "0.9", ""), ("6", "0.75", "2.0")]  # fmt: skip
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.csv"]
