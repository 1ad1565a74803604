from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from common import commands
from common.errors import DataError
from common.faults import SampleFaultError
from common.losses.focal_dice import IGNORED
from datamodules.configs import CacheConfig, LoaderConfig, SplitConfig
from datamodules.labelled.layout import LabelledImage, LabelledTable
from datamodules.labelled.segmentation import (
    MaskedImageConfig,
    MaskedImageDataModule,
    fitted_size,
    read_mask,
    reduced_mask,
)
from datamodules.labelled.siim import SIIMPneumothorax, encode_runs
from datamodules.loading import Draw

SHAPES = ((48, 60), (64, 40), (56, 56))


def mask_of(number):
    """A box at the upper left of every third image, wider than high, on the grid of its file."""
    mask = np.zeros(SHAPES[number % 3], dtype=np.uint8)
    if number % 3 != 2:
        mask[6:14, 4:20] = 1
    return mask


@pytest.fixture
def root(tmp_path):
    """Thirty images of three shapes, bright where their region is; in every third there is none."""
    folder = tmp_path / "siim"
    (folder / "images").mkdir(parents=True)
    lines = ["ImageId, EncodedPixels"]
    for number in range(30):
        mask = mask_of(number)
        noise = np.random.default_rng(number).integers(0, 40, mask.shape)
        Image.fromarray((noise + 200 * mask).astype(np.uint8)).save(folder / f"images/{number:02}.png")
        lines.append(f"{number:02}, {encode_runs(mask)}")
    (folder / "train-rle.csv").write_text("\n".join(lines) + "\n")
    return folder


def module(root, **options):
    groups = {
        "image": MaskedImageConfig((32, 32)),
        "cache": CacheConfig(side=32),
        "split": SplitConfig((0.7, 0.15, 0.15)),
        "loader": LoaderConfig(),
    }
    made = {name: replace(group, **options.pop(name, {})) for name, group in groups.items()}
    return MaskedImageDataModule(str(root), SIIMPneumothorax(), **{"batch_size": 4, **options}, **made)


def ready(root, stage="fit", **options):
    datamodule = module(root, **options)
    datamodule.prepare_data()
    datamodule.setup(stage)
    return datamodule


def splits_of(root, **options):
    datamodule = module(root, **options)
    datamodule.index()
    return datamodule.splits


def dataset(datamodule, train=False):
    return datamodule._dataset([item for part in datamodule.splits.values() for item in part], train)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((1024, 1024), (512, 512)), ((1000, 800), (512, 410)), ((300, 600), (256, 512)), ((3000, 7), (512, 1))],
)
def test_the_longer_side_fits(shape, size):
    assert fitted_size(shape, (512, 512)) == size


def test_every_shape_fits_and_keeps_its_ratio():
    for height in range(32, 200, 7):
        for width in range(32, 200, 5):
            h, w = fitted_size((height, width), (64, 96))
            assert h == 64 or w == 96
            assert h <= 64
            assert w <= 96
            assert abs(h * width - w * height) <= max(height, width)


def test_a_sample(root):
    found = dataset(ready(root))
    for index in range(len(found)):
        sample = found[Draw(index, 0, 0)]
        mask, (h, w) = sample["region"], sample["size"]
        assert np.array_equal(mask, mask_of(int(sample["subject_id"])))
        assert sample["image"].shape == sample["label"].shape == (1, 32, 32)
        assert sample["image"].dtype == sample["label"].dtype == torch.float32
        inside = torch.zeros(32, 32, dtype=torch.bool)
        inside[:h, :w] = True
        assert (sample["label"][0][~inside] == IGNORED).all()
        assert (sample["image"][0][~inside] == 0).all()
        assert set(sample["label"][0][inside].unique().tolist()) <= {0.0, 1.0}
        pixels = sample["image"][0] * 0.2449 + 0.4978
        region = sample["label"][0] == 1
        assert bool(region.any()) == bool(mask.any())
        if region.any():
            assert pixels[region].mean() > 0.6
            assert pixels[inside & ~region].mean() < 0.3


def test_a_mask_that_was_reduced_and_unpadded_comes_back(root):
    """Enlarged on the way, so that no pixel is lost."""
    found = dataset(ready(root, image={"size": (128, 96)}, cache={"side": 96}))
    for index in range(len(found)):
        sample = found[Draw(index, 0, 0)]
        h, w = sample["size"]
        label = sample["label"][0, :h, :w].numpy().astype(np.uint8)
        shape = sample["region"].shape
        back = np.asarray(Image.fromarray(label).resize((shape[1], shape[0]), Image.Resampling.NEAREST))
        assert np.array_equal(back, sample["region"])


def test_reducing_takes_the_pixel_in_the_middle():
    mask = np.zeros((6, 9), dtype=np.uint8)
    mask[1, 4] = mask[4, 7] = 1
    assert reduced_mask(mask, (2, 3))[0].tolist() == [[0, 1, 0], [0, 0, 1]]
    assert reduced_mask(mask, (2, 3), mirror=True)[0].tolist() == [[0, 1, 0], [1, 0, 0]]


def test_a_flip_moves_the_label_with_the_image(root):
    datamodule = ready(root)
    training, plain = dataset(datamodule, train=True), dataset(datamodule)
    flipped = 0
    for index in range(len(training)):
        one, other = training[Draw(index, 3, 0)], plain[Draw(index, 0, 0)]
        h, w = other["size"]
        mirror = not torch.equal(one["image"], other["image"])
        flipped += mirror
        for name in ("image", "label"):
            expected = other[name].clone()
            if mirror:
                expected[:, :h, :w] = expected[:, :h, :w].flip(2)
            assert torch.equal(one[name], expected)
    assert 8 <= flipped <= 22


def test_flips_are_drawn_anew_every_epoch_and_only_in_training(root):
    datamodule = ready(root)
    training, plain = dataset(datamodule, train=True), dataset(datamodule)
    images = [training[Draw(0, epoch, 0)]["image"] for epoch in range(12)]
    assert len({image.sum(1).argmax().item() for image in images}) == 2
    assert torch.equal(images[5], training[Draw(0, 5, 0)]["image"])
    assert all(torch.equal(plain[Draw(0, 0, 0)]["image"], plain[Draw(0, epoch, 0)]["image"]) for epoch in range(12))
    still = dataset(ready(root, image={"flip": False}), train=True)
    assert all(torch.equal(still[Draw(0, epoch, 0)]["image"], plain[Draw(0, 0, 0)]["image"]) for epoch in range(12))


def test_batches(root):
    datamodule = ready(root)
    batch = next(iter(datamodule.train_dataloader()))
    assert batch["image"].shape == batch["label"].shape == (4, 1, 32, 32)
    assert "region" not in batch
    assert all(SHAPES[int(name) % 3] == mask.shape
               for batch in datamodule.val_dataloader()
               for name, mask in zip(batch["subject_id"], batch["region"], strict=True))  # fmt: skip
    spec = datamodule.input_spec
    assert spec.regions == {"Pneumothorax": (1,)}
    assert spec.classes == ()
    assert spec.image_size == (32, 32)


def test_splits_hold_out_images_with_and_without_a_region(root):
    datamodule = module(root)
    datamodule.index()
    assert [len(part) for part in datamodule.splits.values()] == [22, 4, 4]
    for part in datamodule.splits.values():
        assert 0 < sum(bool(item.masks) for item in part) < len(part)


def test_without_a_cache_the_same_is_seen(root):
    one, other = dataset(ready(root)), dataset(ready(root, cache={"format": "none"}))
    for index in range(len(one)):
        a, b = one[Draw(index, 0, 0)], other[Draw(index, 0, 0)]
        assert torch.equal(a["label"], b["label"])
        assert (a["image"] - b["image"]).abs().mean() < 0.05


def damage(root, number, code="0 1 x"):
    lines = (root / "train-rle.csv").read_text().splitlines()
    lines[1 + number] = f"{number:02}, {code}"
    (root / "train-rle.csv").write_text("\n".join(lines) + "\n")


def test_a_damaged_code_is_a_fault_of_the_label(root):
    damage(root, 0)
    item = SIIMPneumothorax().find(root)[0]
    with pytest.raises(SampleFaultError) as error:
        read_mask(item)
    fault = error.value.faults[0]
    assert (fault.kind, fault.sample, fault.path) == ("label", "00", str(root / "images/00.png"))
    assert "not a whole number" in fault.detail


def test_a_damaged_code_is_replaced_in_training_and_left_out_of_scores(root):
    names = {part: next(item.case_id for item in items if item.masks) for part, items in splits_of(root).items()}
    for name in names.values():
        damage(root, int(name), "0 999999")
    datamodule = ready(root)
    assert {fault.sample for fault in datamodule.ledger.faults} == {names["val"], names["test"]}
    seen = [name for batch in datamodule.val_dataloader() for name in batch["subject_id"]]
    assert len(seen) == len(set(seen)) == len(datamodule.splits["val"]) - 1
    training = datamodule._dataset(datamodule.splits["train"], train=True)
    place = [item.case_id for item in training.images].index(names["train"])
    sample = training[Draw(place, 0, 0)]
    assert sample["subject_id"] != names["train"]
    assert [(fault.kind, fault.sample) for fault in sample["faults"]] == [("label", names["train"])]


def test_too_many_damaged_codes_stop_training(root):
    wide = {"split": {"fractions": (0.4, 0.3, 0.3)}}
    splits = splits_of(root, **wide)
    damaged = [item.case_id for part in ("val", "test") for item in splits[part] if item.masks]
    for name in damaged[:6]:
        damage(root, int(name))
    datamodule = ready(root, **wide)
    with pytest.raises(DataError, match=r"6 of 30 samples are faulty.*label 6"):
        datamodule.train_dataloader()


def test_settings_that_cannot_work(root, tmp_path):
    with pytest.raises(ValueError, match=r"`cache\.side` must be at least the smaller side of `image\.size`, 64"):
        module(root, image={"size": (64, 96)}, cache={"side": 63})
    module(root, image={"size": (64, 96)}, cache={"side": 8, "format": "none"})
    with pytest.raises(ValueError, match="a labelled table has 2 classes"):
        MaskedImageDataModule(str(root), LabelledTable(["one", "two"]))
    for number in range(30):
        damage(root, number, "-1")
    datamodule = module(root)
    datamodule.prepare_data()
    with pytest.raises(DataError, match=r"None of the 2\d training images .* has a region"):
        datamodule.setup("fit")


def test_an_image_that_is_gone_is_a_fault(tmp_path):
    with pytest.raises(SampleFaultError, match="not there"):
        read_mask(LabelledImage("a", "a", tmp_path / "a.png", masks=("0 1",)))


@pytest.fixture
def config(root, tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text(f"""
data:
  class_path: datamodules.labelled.segmentation.MaskedImageDataModule
  init_args:
    root: {root}
    labels: {{class_path: datamodules.labelled.siim.SIIMPneumothorax}}
""")
    return ["--config", str(path)]


def test_the_doctor_looks_at_masks(root, config, capsys):
    commands.main(["doctor", *config])
    assert "masks: 20 of 30 images have one" in capsys.readouterr().out
    for number in (0, 1, 3, 4, 6, 7):
        damage(root, number)
    with pytest.raises(SystemExit):
        commands.main(["doctor", *config])
    said = capsys.readouterr()
    assert "masks: 20 of 30 images have one, 6 of them damaged. By kind: label 6" in said.out
    assert "6 damaged masks, more than the 5 that are tolerated" in said.err
