"""Released weights, exports, and one channel becoming many."""

import json
from functools import partial

import pytest
import torch

from common import commands
from common.blocks.residual_unet import ResidualUNetDecoder, ResidualUNetEncoder
from common.blocks.uniformer import UniFormer3D, UpsamplingDecoder
from common.checkpoint import load_encoder, read_encoder
from common.checkpoint_io import atomic_save
from common.types import InputSpec
from common.weights.uniformer_keys import from_released, to_released
from experiments.brainmvp.module import BrainMVPPretrain

TINY = {"embed_dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "head_dim": 8}
CHANNELS = ["flair", "t1", "t1c", "t2", "mra", "pd", "dwi", "adc"]


@pytest.fixture
def run(tmp_path):
    """The checkpoint of an untrained network."""
    module = BrainMVPPretrain(encoder=partial(UniFormer3D, **TINY), template_shape=(20, 20, 20))
    module.build(InputSpec(CHANNELS, (16, 16, 16)))
    with torch.no_grad():
        module.network.templates.weight.uniform_(-3, 5)
        for index, template in enumerate(module.network.templates.weight):
            module.network.templates.extremes[index] = torch.stack(template.aminmax())
    content = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(content)
    atomic_save(content, tmp_path / "run/last.ckpt")
    return tmp_path / "run", module.eval()


def test_kernels_are_turned():
    """The released network computes on axes D, H, W."""
    ours = UniFormer3D(1, (16, 32, 16), **TINY).eval()
    released = to_released({f"encoder.{name}": value for name, value in ours.state_dict().items()})
    theirs = UniFormer3D(1, (16, 16, 32), **TINY).eval()
    theirs.load_state_dict({name.removeprefix("encoder.uniformer."): value for name, value in released.items()})
    x = torch.randn(1, 1, 16, 32, 16)
    with torch.no_grad():
        assert torch.allclose(theirs(x.permute(0, 1, 4, 2, 3)), ours(x).permute(0, 1, 4, 2, 3), atol=1e-5)


def test_names_there_and_back():
    encoder = UniFormer3D(1, (16, 16, 16), **TINY)
    unet = ResidualUNetEncoder(1, (16, 16, 16), width=8)
    for first, second in ((encoder, UpsamplingDecoder(encoder)), (unet, ResidualUNetDecoder(unet))):
        state = {f"encoder.{name}": value for name, value in first.state_dict().items()}
        state |= {f"decoder.{name}": value for name, value in second.state_dict().items()}
        state["templates"] = torch.rand(8, 4, 4, 4)
        released = to_released(state)
        assert len(released) == len(state)
        extra = {"decoder.decoder2.conv_block.conv1.conv.weight": torch.zeros(1)}
        again, unused = from_released({f"module.{name}": value for name, value in (released | extra).items()})
        assert unused == [f"module.{name}" for name in extra]
        assert again.keys() == state.keys()
        assert all(torch.equal(again[name], value) for name, value in state.items())


def test_one_channel_is_shared_out_among_many(run):
    folder, module = run
    encoder = load_encoder(folder, channels=["t1c", "t1", "flair", "t2"]).eval()
    x = torch.rand(2, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.allclose(encoder(x.expand(-1, 4, -1, -1, -1)), module.network.encoder(x), atol=1e-5)
    assert "one stored kernel shared out among 4 (t1c, t1, flair, t2)" in str(encoder.load_report)
    assert load_encoder(folder, in_channels=1, image_size=(32, 32, 32)).load_report.adapted == {}


@pytest.mark.slow
def test_exports(run, tmp_path, capsys):
    folder, module = run
    x = torch.rand(3, 1, 16, 16, 16)
    for name in ("torch", "released"):
        commands.main(["export", "--exp", "brainmvp", "--ckpt", str(folder), "--format", name, "--out",
                       str(tmp_path / name)])  # fmt: skip
    program = torch.export.load(tmp_path / "torch/model.pt2").module()
    with torch.no_grad():
        assert torch.allclose(program(x), module.network.encoder(x), atol=1e-5)
        again = load_encoder(tmp_path / "released").eval()
        assert torch.equal(again(x), module.network.encoder(x))
    stored = read_encoder(tmp_path / "released")
    assert torch.allclose(stored.rest["templates"], module.network.templates.normalized(), atol=1e-6)
    assert torch.equal(stored.rest["decoder.out.weight"], module.network.decoder.out.weight)
    assert json.loads((tmp_path / "released/config.json").read_text())["channels"] == CHANNELS
    with pytest.raises(SystemExit):
        commands.main(
            ["export", "--exp", "brainmvp", "--ckpt", str(folder), "--format", "monai", "--out", str(tmp_path)]
        )
    assert "valid formats: released, torch" in capsys.readouterr().err


def released_file(path, drop=()):
    """Write a file with the keys and shapes of the released UniFormer; tensors of one value take no room."""
    with torch.device("meta"):
        encoder = UniFormer3D(channels_last=False)
        decoder = UpsamplingDecoder(encoder)
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    state |= {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    state["templates"] = torch.empty(8, 240, 240, 155, device="meta")
    names = {name: tuple(value.shape) for name, value in to_released(state).items()}
    names |= {"decoder.decoder5.conv_block.conv1.conv.weight": (320, 640, 3, 3, 3), "decoder.proj1.norm.weight": (64,)}
    names = {name: shape for name, shape in names.items() if not any(part in name for part in drop)}
    content = {f"module.{name}": torch.tensor(0.01).expand(shape) for name, shape in names.items()}
    torch.save({"epoch": 1499, "state_dict": content}, path)


@pytest.mark.slow
def test_a_released_checkpoint_becomes_an_encoder(tmp_path, capsys):
    released_file(tmp_path / "uniformer.pt")
    given = [
        "convert",
        "--exp",
        "brainmvp",
        "--weights",
        str(tmp_path / "uniformer.pt"),
        "--out",
        str(tmp_path / "out"),
    ]
    commands.main(given)
    report = capsys.readouterr().out
    assert "encoder tensors loaded, re-initialised: none; unused: module.decoder.decoder5.conv_block" in report
    encoder = load_encoder(tmp_path / "out", channels=["t1c", "t1", "flair", "t2"])
    assert encoder.patch_embed1.proj.weight.shape == (64, 4, 2, 2, 2)
    assert encoder.blocks3[7].attn.qkv.weight[0, 0].item() == pytest.approx(0.01)
    assert read_encoder(tmp_path / "out").rest["templates"].shape == (8, 240, 240, 155)


@pytest.mark.slow
def test_what_is_no_released_checkpoint(tmp_path, capsys):
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "other.pt")
    released_file(tmp_path / "part.pt", drop=("blocks3.1.", "blocks3.2.", "blocks4.0", "blocks1.1"))
    for name, message in (("gone.pt", "There are no weights at"), ("other.pt", "holds neither BrainMVP's UniFormer"),
                          ("part.pt", "of the encoder's tensors; 90% are needed")):  # fmt: skip
        with pytest.raises(SystemExit):
            commands.main(["convert", "--exp", "brainmvp", "--weights", str(tmp_path / name), "--out", str(tmp_path)])
        assert message in capsys.readouterr().err
