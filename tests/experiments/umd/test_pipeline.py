"""The three stages through the commands: stopping, ranks, bad input, one question."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from common import commands
from common.checkpoint import load_encoder
from common.cli import execute
from common.errors import PreemptedError
from datamodules.synthetic.command import WRITERS
from experiments.umd.callbacks import GradientCoordination
from experiments.umd.module import UMDPretrain

pytestmark = pytest.mark.slow

CONFIGS = "experiments/umd/configs"
ENCODER = [f"--model.encoder.{name}" for name in (
    "vision.width=16", "vision.depth=1", "vision.heads=2", "text.width=16", "text.depth=1", "text.heads=2", "dim=16",
    "fusion_depth=2", "fusion_heads=2", "patch_size=16")]  # fmt: skip
SHORT = ["--data.image.size=[32,32]", "--data.cache.side=32", "--data.text.vocab_size=300", "--data.num_workers=0",
         "--trainer.enable_progress_bar=false", "--trainer.precision=32-true",
         "--trainer.log_every_n_steps=1"]  # fmt: skip
PRETRAIN = [*ENCODER, *SHORT, "--data.batch_size=4", "--data.loader.draws=1", "--data.split.fractions=[0.6,0.2,0.2]",
            "--model.decoder.decoder_dim=16", "--model.decoder.num_heads=2", "--trainer.max_steps=8",
            "--trainer.val_check_interval=4"]  # fmt: skip
TREES = {"vqa_rad": "vqa_rad", "slake": "slake", "vqa_med_2019": "vqa_med_2019", "roco_retrieval": "roco",
         "melinda": "melinda"}  # fmt: skip


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees")
    for name in {*TREES.values(), "medicat"}:
        WRITERS[name](folder / name, 4, 0)
    return folder


def pretrain_line(root, *more):
    configs = ["--config", f"{CONFIGS}/pretrain.yaml", "--config", f"{CONFIGS}/smoke.yaml"]
    return ["fit", *configs, f"--data.root={root}", *PRETRAIN, *more]


def task_line(run, task, root, *more):
    configs = ["--config", f"{CONFIGS}/finetune_{task}.yaml", "--config", f"{CONFIGS}/finetune_{task}.smoke.yaml"]
    batch = [] if run == "predict" else ["--data.batch_size=4"]
    return [run, *configs, *([f"--data.root={root}"] if root else []), *ENCODER, *SHORT, *batch, *more]


def weights(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def pretrained(trees, tmp_path_factory):
    """One pre-training run that several tests begin from."""
    before, folder = os.getcwd(), tmp_path_factory.mktemp("pretrained")
    os.chdir(folder)
    try:
        return (folder / execute(pretrain_line(trees / "medicat"))).resolve()
    finally:
        os.chdir(before)


def test_a_run_leaves_what_the_contract_asks_for(pretrained, tmp_path, capsys):
    events = EventAccumulator(str(pretrained))
    events.Reload()
    names = {f"{stage}/loss_{name}" for stage in ("train", "val")
             for name in ("mim", "mlm", "feature_image", "feature_text", "itm")}  # fmt: skip
    names |= {"train/loss", "val/loss", "lr", "collapse/floor_ratio", "collapse/floor_ratio_control",
              "collapse/text_floor_ratio", "collapse/effective_rank", "collapse/prediction_diversity",
              "umd/feat_std_img", "umd/feat_std_txt", "umd/teacher_distance", "val/itm_accuracy"}  # fmt: skip
    assert set(events.Tags()["scalars"]) >= names
    assert "reconstruction/image" in events.Tags()["images"]
    assert (pretrained / "tokenizer.json").is_file()
    commands.main(
        ["export", "--exp", "umd", "--ckpt", str(pretrained), "--format", "hf", "--out", str(tmp_path / "hf")]
    )
    assert (tmp_path / "hf/tokenizer.json").is_file()
    usage = (tmp_path / "hf/README.md").read_text().split("```python\n")[1].split("```")[0]
    encoder = load_encoder(pretrained).eval()
    images, ids = torch.randn(2, 3, 32, 32), torch.tensor([[2, 5, 6], [2, 7, 0]])
    values = {"images": images, "input_ids": ids, "attention_mask": (ids != 0).long()}
    torch.save(values, tmp_path / "hf/x.pt")
    code = f"import torch\nglobals().update(torch.load('x.pt'))\n{usage}\ntorch.save([tokens, words, fusion], 'y.pt')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "hf", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    tokens, words, fusion = torch.load(tmp_path / "hf/y.pt")
    assert torch.allclose(tokens, encoder.forward_features(images), atol=1e-5)
    mine = encoder.text(ids, values["attention_mask"])
    assert torch.allclose(words[0], mine[0], atol=1e-5)
    assert torch.equal(fusion["type_embedding.weight"], encoder.type_embedding.weight)
    assert "fusion.text_layers.1.fc2.weight" in fusion


def test_resumed_equals_uninterrupted_with_its_teacher(trees, monkeypatch):
    """Dropout is 0.1; the teacher moves once per optimiser step of two micro-batches."""
    for more in ([], ["--trainer.accumulate_grad_batches=2", "--data.num_workers=2"]):
        line = pretrain_line(trees / "medicat", *more, "--model.encoder.dropout=0.1")
        whole = weights(execute(line))
        step, done = UMDPretrain.training_step, []

        def wrapped(self, batch, batch_idx, step=step, done=done):
            if self.trainer.fit_loop.total_batch_idx == 4 and not done:
                done.append(os.kill(os.getpid(), signal.SIGTERM))
            return step(self, batch, batch_idx)

        with monkeypatch.context() as patch:
            patch.setattr(UMDPretrain, "training_step", wrapped)
            with pytest.raises(PreemptedError):
                execute(line)
        folder = max(Path("runs/umd/pretrain").iterdir(), key=lambda path: path.stat().st_mtime)
        execute([*line, "--ckpt_path", str(folder)])
        resumed = weights(folder)
        assert any(key.startswith("network.teacher.") for key in whole)
        assert max(float((value - resumed[key]).abs().max()) for key, value in whole.items()) == 0.0


def test_teacher_is_the_average_of_the_steps(trees, monkeypatch):
    """After 10 steps of 4 micro-batches the teacher is the closed form over the students of those steps."""
    students, plain = [], UMDPretrain.optimizer_step

    def noted(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        students.append(self.network.encoder.type_embedding.weight.detach().double().clone())

    monkeypatch.setattr(UMDPretrain, "optimizer_step", noted)
    line = pretrain_line(trees / "medicat", "--trainer.accumulate_grad_batches=4", "--trainer.max_steps=10",
                         "--data.loader.draws=4", "--model.features.teacher_decay=0.9")  # fmt: skip
    begin = []

    def started(self):
        begin.append(self.network.encoder.type_embedding.weight.detach().double().clone())

    monkeypatch.setattr(UMDPretrain, "on_train_start", started)
    teacher = weights(execute(line))["network.teacher.module.encoder.type_embedding.weight"].double()
    assert len(students) == 10
    closed = 0.9**10 * begin[0] + sum(0.1 * 0.9 ** (9 - i) * student for i, student in enumerate(students))
    assert torch.allclose(teacher, closed, atol=1e-6)


def test_the_three_stages_hand_on_and_answer_a_question(trees, pretrained, tmp_path, capsys, refusal):
    calibrated = execute(task_line("fit", "td_calib", trees / "vqa_rad", f"--model.pretrained={pretrained}",
                                   "--model.decoder.decoder_dim=16", "--model.decoder.num_heads=2",
                                   "--trainer.max_epochs=1"))  # fmt: skip
    said = capsys.readouterr().out
    assert "missing: none" in said
    assert "heads from" in said
    assert "mlm_head" in said
    state = weights(calibrated)
    assert torch.equal(state["network.itm_head.weight"], weights(pretrained)["network.itm_head.weight"])
    tuned = execute(task_line("fit", "vqa_rad", trees / "vqa_rad", f"--model.pretrained={calibrated}",
                              "--model.encoder.dropout=0.3", "--model.encoder.pool=cls", "--trainer.max_epochs=1",
                              "--trainer.check_val_every_n_epoch=1"))  # fmt: skip
    assert "dropout 0.3, pool cls" in capsys.readouterr().out
    encoder = load_encoder(tuned)
    assert encoder.pool_kind == "cls"
    assert {module.p for module in encoder.fusion.modules() if isinstance(module, nn.Dropout)} == {0.3}
    scalars = json.loads((tuned / "summary.json").read_text())["scalars"]
    assert {"gmcoord/rho_text", "gmcoord/k_text", "gmcoord/k_image", "gmcoord/noise_over_grad", "val/accuracy_open",
            "val/accuracy_closed", "val/accuracy"} <= scalars.keys()  # fmt: skip
    events = EventAccumulator(str(tuned))
    events.Reload()
    assert "attention/question_to_image" in events.Tags()["images"]
    assert "examples/answers/text_summary" in events.Tags()["tensors"]
    tested = execute(task_line("test", "vqa_rad", trees / "vqa_rad", f"--ckpt_path={tuned}"))
    metrics = json.loads((tested / "metrics.json").read_text())
    assert metrics["n"] == 16
    assert {"accuracy", "accuracy_open", "accuracy_closed", "accuracy_frequent_closed", "unseen"} <= metrics.keys()
    image = next((trees / "vqa_rad/images").iterdir())
    capsys.readouterr()
    asked = execute(task_line("predict", "vqa_rad", None, f"--ckpt_path={tuned}", f"--data.single.image={image}",
                              "--data.single.question=What shape is shown?"))  # fmt: skip
    (answered,) = json.loads((asked / "predictions.json").read_text())
    assert len(answered["answers"]) == 5
    assert answered["answers"][0]["answer"] in capsys.readouterr().out
    other = tmp_path / "other"
    WRITERS["melinda"](other, 2, 0)
    line = task_line("fit", "vqa_rad", trees / "vqa_rad", f"--model.pretrained={pretrained}")
    assert "tokenizer" in refusal([*line, f"--data.text.tokenizer={_learned(other)}"])


def _learned(root):
    out = root / "words.json"
    config = ["--config", f"{CONFIGS}/finetune_melinda.yaml"]
    commands.main(["tokenizer", *config, "--root", str(root), "--vocab-size", "290", "--out", str(out)])
    return out


@pytest.mark.parametrize("task", list(TREES))
def test_every_task_trains_and_is_scored(trees, task):
    root = trees / TREES[task]
    run = execute(task_line("fit", task, root, "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1"))
    tested = execute(task_line("test", task, root, f"--ckpt_path={run}"))
    assert json.loads((tested / "metrics.json").read_text())["n"] > 0
    assert (tested / "per_case.csv").is_file()


@pytest.mark.slow
def test_retrieval_is_learned(tmp_path):
    """Of 32 captions and as many images chance has the right one among the first five in 0.16 of the cases."""
    WRITERS["roco"](tmp_path / "roco", 32, 0)
    overlays = [f"{CONFIGS}/finetune_roco_retrieval{size}.yaml" for size in ("", ".smoke")]
    line = [*(f"--config={path}" for path in overlays), f"--data.root={tmp_path / 'roco'}"]
    run = execute(["fit", *line, "--trainer.enable_progress_bar=false"])
    scores = json.loads((execute(["test", *line, f"--ckpt_path={run}"]) / "metrics.json").read_text())
    assert scores["pool"] == 32
    assert min(scores["t2i_recall_at_5"], scores["i2t_recall_at_5"]) > 0.4


def test_a_teacher_missing_from_the_checkpoint(trees, pretrained, tmp_path, refusal):
    copy = shutil.copytree(pretrained, tmp_path / "run")
    path = copy / "checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {key: value for key, value in state.items() if ".teacher." not in key}
    torch.save(checkpoint, path)
    assert "holds no teacher" in refusal(pretrain_line(trees / "medicat", f"--ckpt_path={copy}"))


def test_longer_captions_and_gone_images(trees, tmp_path, capsys):
    root = shutil.copytree(trees / "medicat", tmp_path / "medicat")
    next((root / "release/figures").iterdir()).unlink()
    broken = sorted((root / "release/figures").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:200])
    folder = execute(
        pretrain_line(root, "--data.text.length=8", "--trainer.max_steps=2", "--data.loader.max_fault_fraction=0.5")
    )
    said = capsys.readouterr().out
    assert "have no image file" in said
    assert "longer than data.text.length 8" in said
    assert broken.name in (folder / "data_faults.csv").read_text()


#: One rank of two: runs command lines one after the other and notes what coordination did on this rank.
RANK = """
import json, os, sys
import torch
from common.cli import execute
from common.distributed import rank
from experiments.umd import callbacks
from experiments.umd.tasks import PairTask

notes = {"own": [], "coefficients": [], "gradients": [], "parameters": []}
reduce, coordinate, step = callbacks.all_reduce_sum, callbacks.coordinate_gradients, PairTask.optimizer_step

def reduced(sums):
    notes["own"].append(sums.clone())
    return reduce(sums)

def coordinated(gradients, coefficients, *rest):
    share = coordinate(gradients, coefficients, *rest)
    notes["coefficients"].append(torch.stack([coefficients["image"], coefficients["text"]]))
    notes["gradients"].append(torch.cat([g.flatten() for group in gradients.values() for g in group]))
    return share

def stepped(self, *args, **kwargs):
    step(self, *args, **kwargs)
    notes["parameters"].append(torch.cat([p.detach().flatten() for p in self.parameters()]))

callbacks.all_reduce_sum, callbacks.coordinate_gradients, PairTask.optimizer_step = reduced, coordinated, stepped
folders = [str(execute(line)) for line in json.loads(sys.argv[1])]
torch.save({"folders": folders, **notes}, f"rank{rank()}.pt")
"""


def _on_two_ranks(lines):
    """Run command lines on two ranks, one after the other in the same processes; return what each rank noted."""
    ddp = ["--data.batch_size=2", "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    command = [sys.executable, "-c", RANK, json.dumps([[*line, *ddp] for line in lines])]
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    ranks = [subprocess.Popen(command, env={**os.environ, **shared, "LOCAL_RANK": str(index)}, text=True,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for index in (0, 1)]  # fmt: skip
    try:
        for process in ranks:
            _, said = process.communicate(timeout=600)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(f"rank{index}.pt", weights_only=True) for index in (0, 1)]


@pytest.mark.ddp
def test_two_ranks_equal_one_and_each_other(trees):
    """Pre-training, and tuning with coordinated gradients: two steps, of one and of two micro-batches."""
    sgd = [
        "--model.optimization.optimizer=torch.optim.SGD",
        "--model.optimization.optimizer.lr=0.01",
        "--model.encoder.dropout=0",
    ]
    quick = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.num_sanity_val_steps=0"]
    lines = [
        pretrain_line(trees / "medicat", *sgd, *quick, "--trainer.val_check_interval=2"),
        task_line("fit", "vqa_rad", trees / "vqa_rad", *sgd, *quick, "--trainer.accumulate_grad_batches=2"),
    ]
    first, second = _on_two_ranks(lines)
    for line, folder in zip(lines, first["folders"], strict=True):
        alone, together = weights(execute(line)), weights(Path(folder))
        for key, value in alone.items():
            assert torch.allclose(value, together[key], rtol=1e-6, atol=2e-6), key
    assert len(first["coefficients"]) == len(first["parameters"]) == 2, "each optimiser step once, not each micro-batch"
    for name in ("coefficients", "gradients", "parameters"):
        for ours, theirs in zip(first[name], second[name], strict=True):
            assert torch.equal(ours, theirs), name
    for own, other in zip(first["own"], second["own"], strict=True):
        assert not torch.equal(own, other), "the ranks saw different questions, so equal coefficients mean something"
    assert not torch.equal(*first["gradients"]), "the noise is of the step"


def test_coordination_sees_each_step_once(trees, monkeypatch):
    """Four micro-batches a step: their contributions are summed, damped once; `update` scales the step itself."""
    seen, plain = [], GradientCoordination.on_before_optimizer_step

    def noted(self, trainer, module, optimizer):
        sums = module.contributions._sums
        seen.append((trainer.global_step, None if sums is None else float(sums.sum())))
        plain(self, trainer, module, optimizer)

    monkeypatch.setattr(GradientCoordination, "on_before_optimizer_step", noted)
    execute(
        task_line("fit", "vqa_rad", trees / "vqa_rad", "--trainer.accumulate_grad_batches=4", "--trainer.max_steps=3")
    )
    assert [step for step, _ in seen] == [0, 1, 2]
    assert all(total > 0 for _, total in seen)


@pytest.mark.real_data
def test_the_three_stages_on_real_questions(real_data):
    """VQA-RAD: questions as text, then without labels, then with them."""
    root = real_data("vqa_rad")
    steps = ["--trainer.max_steps=2", "--trainer.limit_val_batches=2"]
    first = execute(
        pretrain_line(root, *steps, "--data.split.fractions=[0.9,0.1,0.0]", "--trainer.val_check_interval=2")
    )
    second = execute(task_line("fit", "td_calib", root, *steps, f"--model.pretrained={first}/checkpoints/last.ckpt",
                               "--model.decoder.decoder_dim=16", "--model.decoder.num_heads=2",
                               "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1",
                               "--trainer.val_check_interval=2"))  # fmt: skip
    third = execute(task_line("fit", "vqa_rad", root, *steps, f"--model.pretrained={second}/checkpoints/last.ckpt",
                              "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1",
                              "--trainer.val_check_interval=2"))  # fmt: skip
    tested = execute(task_line("test", "vqa_rad", root, f"--ckpt_path={third}/checkpoints/last.ckpt"))
    metrics = json.loads((tested / "metrics.json").read_text())
    assert metrics["n"] == 451
    assert metrics["accuracy_frequent_closed"] > 0.4
    assert 0.05 < metrics["unseen"] < 0.3
