"""``medmim embed``: the features of every case, as Parquet."""

from pathlib import Path

import pandas as pd
import torch

from common.checkpoint import load_encoder
from common.downstream.encoder import mean_features
from common.files import whole_file
from common.runtime.data_config import Archive
from common.runtime.reporting import say


@torch.no_grad()
def run(archive: Archive, ckpt: str, out: str) -> None:
    """Carry out ``medmim embed``: mean over the tokens of the central crop, one row a case.

    Args:
        archive: The archive, with all settings that training would have.
        ckpt: Run folder, checkpoint or export.
        out: Parquet file to write.
    """
    datamodule = archive.datamodule()
    datamodule.prepare_data()
    datamodule.setup("predict")
    spec = datamodule.input_spec
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    encoder = load_encoder(ckpt, image_size=spec.image_size, channels=spec.channels).eval().to(device)
    rows = []
    for split in ("train", "val", "test"):
        for batch in datamodule.central_samples((split,)):
            features = mean_features(encoder, batch["image"].to(device)).cpu()
            names = zip(batch["subject_id"], features.tolist(), strict=True)
            rows += [{"subject_id": name, "split": split, "feature": feature} for name, feature in names]
    with whole_file(Path(out)) as temporary:
        pd.DataFrame(rows).to_parquet(temporary)
    say(f"embedded {len(rows)} cases, {encoder.num_features} features each, to {out}")
