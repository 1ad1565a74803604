"""``medmim embed``: the features of every case, as Parquet."""

import argparse
from pathlib import Path

import pandas as pd
import torch

from common.checkpoint import load_encoder
from common.downstream.encoder import mean_features
from common.files import whole_file
from common.runtime.data_config import add_data_arguments, make_datamodule
from common.runtime.reporting import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``medmim embed``."""
    add_data_arguments(parser)
    parser.add_argument("--ckpt", required=True, help="run folder, checkpoint or export")
    parser.add_argument("--out", required=True, help="Parquet file to write: subject_id, split, feature")


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """Carry out ``medmim embed``: mean over the tokens of the central crop, one row a case."""
    datamodule = make_datamodule(args)
    datamodule.prepare_data()
    datamodule.setup("predict")
    spec = datamodule.input_spec
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    encoder = load_encoder(args.ckpt, image_size=spec.image_size, channels=spec.channels).eval().to(device)
    rows = []
    for split in ("train", "val", "test"):
        for batch in datamodule.central_samples((split,)):
            features = mean_features(encoder, batch["image"].to(device)).cpu()
            names = zip(batch["subject_id"], features.tolist(), strict=True)
            rows += [{"subject_id": name, "split": split, "feature": feature} for name, feature in names]
    with whole_file(Path(args.out)) as temporary:
        pd.DataFrame(rows).to_parquet(temporary)
    say(f"embedded {len(rows)} cases, {encoder.num_features} features each, to {args.out}")
