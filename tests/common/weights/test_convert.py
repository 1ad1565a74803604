import pytest
import timm.models.vision_transformer as timm_vit
import torch

from common import commands
from common.checkpoint import load_encoder


def timm_weights(path, **more):
    torch.manual_seed(1)
    model = timm_vit.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0, **more
    )
    torch.save({"model": model.state_dict() | {"decoder_pred.weight": torch.zeros(2, 2)}}, path)
    return model.eval()


def test_published_weights_become_an_encoder(tmp_path, capsys):
    model = timm_weights(tmp_path / "weights.pth")
    given = ["convert", "--exp", "mrm_record", "--weights", str(tmp_path / "weights.pth"), "--num-heads", "3"]
    commands.main([*given, "--out", str(tmp_path / "encoder")])
    assert "unexpected: decoder_pred.weight" in capsys.readouterr().out
    encoder = load_encoder(tmp_path / "encoder").eval()
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(encoder.forward_features(image), model.forward_features(image), atol=1e-5)
    assert load_encoder(tmp_path / "encoder", image_size=(48, 48)).grid_size == (6, 6)


def test_what_is_no_encoder_is_refused(tmp_path, capsys):
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    timm_weights(tmp_path / "weights.pth")
    part = torch.load(tmp_path / "weights.pth", weights_only=True)["model"]
    torch.save({key: value for key, value in part.items() if key != "blocks.1.norm2.weight"}, tmp_path / "part.pth")
    part["norm.bias"][7] = torch.nan
    torch.save(part, tmp_path / "nan.pth")
    for name, more, message in (
        ("gone.pth", [], "There are no weights at"),
        ("other.pth", [], "holds no weights for this encoder"),
        ("part.pth", ["--num-heads", "3"], "lacks blocks.1.norm2.weight"),
        ("nan.pth", ["--num-heads", "3"], "holds NaN or infinity in norm.bias"),
        ("weights.pth", [], "does not divide into 0 heads: give --num-heads"),
    ):
        given = ["convert", "--exp", "mrm_record", "--weights", str(tmp_path / name), "--out", str(tmp_path / "out")]
        with pytest.raises(SystemExit):
            commands.main([*given, *more])
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
