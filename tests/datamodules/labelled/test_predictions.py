from types import SimpleNamespace

import torch

from datamodules.labelled.predictions import RunLengthWriter


def write(tmp_path, **more):
    writer = RunLengthWriter()
    trainer = SimpleNamespace(default_root_dir=str(tmp_path), is_global_zero=True, **more)
    mask = torch.zeros(4, 4, dtype=torch.uint8)
    mask[1:3, 1] = mask[1:4, 2] = 1
    batches = [[{"subject_id": "b", "region": mask}], [{"subject_id": "a", "region": torch.zeros(4, 4)}]]
    for index, batch in enumerate(batches):
        writer.write_on_batch_end(trainer, None, batch, None, None, index, 0)
    writer.on_predict_epoch_end(trainer, None)
    return batches


def test_the_table_holds_the_codes(tmp_path):
    """R8 of the specification; columns first, gaps from the end of the run before."""
    batches = write(tmp_path)
    assert (tmp_path / "predictions.csv").read_text().split() == ["ImageId,EncodedPixels", "a,-1", "b,5", "2", "2", "3"]
    assert batches[0] == [{"subject_id": "b", "code": "5 2 2 3"}]


def test_a_dry_run_writes_nothing(tmp_path):
    write(tmp_path, fast_dev_run=1)
    assert list(tmp_path.iterdir()) == []
