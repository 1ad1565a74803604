"""``medmim embed``: the features of every case, as Parquet."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from common.checkpoint import load_encoder
from common.downstream.encoder import mean_features, meet_encoder
from common.errors import DataError
from common.files import whole_file
from common.runtime.data_config import Archive
from common.runtime.reporting import print_line
from common.weights.channels import ChannelReport


@torch.no_grad()
def run(archive: Archive, ckpt: str, out: str) -> None:
    """Carry out ``medmim embed``: mean over the tokens of the central crop, one row per case.

    How channels were matched is logged, and kept in the file's metadata under ``channels``, as JSON.
    ``archive`` has all settings that training would have; ``ckpt`` is a run folder, a checkpoint or an export.

    Raises:
        DataError: the features of a case are not finite.
    """
    datamodule = archive.datamodule()
    datamodule.prepare_data()
    datamodule.setup("predict")
    spec = meet_encoder(datamodule, ckpt, "refuse")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    encoder = load_encoder(ckpt, image_size=spec.image_size, channels=spec.channels).eval().to(device)
    channels: ChannelReport | None = encoder.load_report.channels  # type: ignore[union-attr, assignment]
    if channels is not None:
        channels = channels.without(spec.absent)
        print_line(channels.line(spec.shown))
    rows = []
    for split in ("train", "val", "test"):
        for batch in datamodule.central_samples((split,)):
            features = mean_features(encoder, batch["image"].to(device)).cpu()
            texts = [name.encode("utf-8", "backslashreplace").decode() for name in batch["subject_id"]]
            finite = features.isfinite().all(1)
            if not bool(finite.all()):
                raise DataError(f"The features of {texts[int(finite.int().argmin())]} are not finite, so nothing is "
                                f"written. Check its image (`medmim prepare`) and the encoder in {ckpt}.")  # fmt: skip
            names = zip(texts, features.tolist(), strict=True)
            rows += [{"subject_id": name, "split": split, "feature": feature} for name, feature in names]
    facts = {} if channels is None else {"channels": json.dumps(channels.facts())}
    with whole_file(Path(out)) as temporary:
        pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(facts), temporary)
    print_line(f"embedded {len(rows)} cases, {encoder.num_features} features each, to {out}")
