import pytest
import torch
from torch import nn

from common.ema import EMATeacher, need_teacher
from common.errors import CheckpointError


def student_of(value=0.0):
    student = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.BatchNorm1d(2))
    for parameter in student.parameters():
        nn.init.constant_(parameter, value)
    return student


def test_average_of_the_specification():
    """R4: three moving weights from 0, and 1 and 16 steps towards a constant."""
    student = student_of()
    teacher = EMATeacher(student, 0.995)
    for value in (1.0, 2.0, 3.0):
        student.apply(lambda m, v=value: [nn.init.constant_(p, v) for p in m.parameters(recurse=False)])
        teacher.update(student)
    assert teacher.module[0].weight[0, 0].item() == pytest.approx(0.029900125, rel=1e-5)
    student, counts = student_of(), {}
    teacher = EMATeacher(student, 0.995)
    student[0].weight.data.fill_(1.0)
    for step in range(1, 17):
        teacher.update(student)
        counts[step] = teacher.module[0].weight[0, 0].item()
    assert counts[1] == pytest.approx(0.005, rel=1e-5)
    assert counts[16] == pytest.approx(0.0770689, rel=1e-5)


def test_copy_mode_and_gradients():
    student = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    holder = nn.ModuleDict({"student": student, "teacher": EMATeacher(student, 0.9)}).train()
    teacher = holder["teacher"]
    x = torch.randn(4, 3)
    assert not teacher.module.training
    assert torch.equal(teacher(x), teacher(x)), "dropout is off"
    assert torch.equal(teacher(x), student.eval()(x))
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher(x).requires_grad
    assert float(teacher.distance(student)) == 0
    student[0].weight.data += 1
    assert float(teacher.distance(student)) > 0
    teacher.reset(student)
    assert float(teacher.distance(student)) == 0


def test_buffers_and_low_precision():
    student = student_of(1.0).bfloat16()
    teacher = EMATeacher(student, 0.5)
    assert all(p.dtype == torch.float32 for p in teacher.parameters())
    student[2].running_mean.fill_(3.0)
    student[0].bias.data.fill_(3.0)
    teacher.update(student)
    assert teacher.module[2].running_mean.tolist() == [3, 3]
    assert teacher.module[0].bias.tolist() == [2, 2]


def test_refusals():
    with pytest.raises(ValueError, match="decay"):
        EMATeacher(nn.Linear(1, 1), 1.0)
    with pytest.raises(ValueError, match="not those of the teacher"):
        EMATeacher(nn.Linear(1, 1), 0.9).update(nn.Linear(1, 1, bias=False))
    with pytest.raises(CheckpointError, match="holds no teacher"):
        need_teacher({"network.encoder.weight": torch.zeros(1)}, "network.teacher.")
    need_teacher({"network.teacher.module.weight": torch.zeros(1)}, "network.teacher.")
