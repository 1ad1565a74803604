import pytest
import torch

from common.downstream.probe import ProbeNetwork, folds_by_patient
from common.errors import DataError


class Encoder(torch.nn.Module):
    num_features = 3

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.drop = torch.nn.Dropout(0.5)

    def forward_features(self, x):
        return self.drop(x * self.scale)


def test_no_patient_is_in_two_folds_and_every_fold_holds_both_classes():
    targets = torch.tensor([0, 1] * 15)
    patients = [f"p{i // 3}" for i in range(30)]
    folds = folds_by_patient(targets, patients, 3, seed=0)
    for patient in set(patients):
        assert len({int(f) for f, p in zip(folds, patients, strict=True) if p == patient}) == 1
    for fold in range(3):
        assert set(targets[folds == fold].tolist()) == {0, 1}
    assert torch.equal(folds, folds_by_patient(targets, patients, 3, seed=0))
    assert not torch.equal(folds, folds_by_patient(targets, patients, 3, seed=1))


def test_too_few_patients_for_the_folds_are_refused():
    with pytest.raises(DataError, match="5 folds need as many patients of each class; there are 7 with 0 and 1 with 1"):
        folds_by_patient(torch.tensor([0] * 7 + [1]), [str(i) for i in range(8)], 5, seed=0)


def test_the_encoder_stays_frozen_and_in_evaluation_mode():
    network = ProbeNetwork(Encoder(), 2).train()
    assert not network.encoder.training
    assert not network.encoder.drop.training
    assert [name for name, p in network.named_parameters() if p.requires_grad] == ["weight", "bias"]
    x = torch.randn(4, 5, 3)
    assert torch.allclose(network.features(x), x.mean(1), atol=1e-6)


def test_each_head_standardises_on_its_own_training_cases():
    network, features = ProbeNetwork(Encoder(), 2), torch.randn(10, 3)
    members = torch.zeros(2, 10, dtype=torch.bool)
    members[0, :6] = members[1, 4:] = True
    network.fit_scale(features, members)
    torch.nn.init.ones_(network.weight)
    for head in range(2):
        own = features[members[head]]
        expected = ((features - own.mean(0)) / own.std(0, unbiased=False)).sum(1)
        assert torch.allclose(network(features)[:, head], expected, atol=1e-4)
