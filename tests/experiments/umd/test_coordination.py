import math

import pytest
import torch

from experiments.umd.callbacks import GradientCoordination
from experiments.umd.coordination import (
    ContributionSums,
    Noise,
    contribution_ratio,
    coordinate_gradients,
    modality_coefficients,
    true_class_probability,
)

QUIET = Noise(scope="none")


def coefficients(image, text, beta=0.1):
    return tuple(float(k) for k in modality_coefficients(torch.tensor(image), torch.tensor(text), beta))


def test_case_of_the_specification():
    """R6: two samples of class 0."""
    text = true_class_probability(torch.tensor([[3.0, 1], [1, 1]]).log(), torch.tensor([[1.0, 0], [1, 0]]))
    image = true_class_probability(torch.tensor([[1.0, 1], [1, 3]]).log(), torch.tensor([[1.0, 0], [1, 0]]))
    assert text.tolist() == pytest.approx([0.75, 0.5])
    assert image.tolist() == pytest.approx([0.5, 0.25])
    assert float(contribution_ratio(image, text)) == pytest.approx(5 / 3)
    k_image, k_text = modality_coefficients(image, text)
    assert float(k_text) == pytest.approx(0.8348596, abs=1e-7)
    assert float(k_image) == 1


RATIOS = {1.25: 0.8756470, 2.0: 0.8026247, 5.0: 0.5378828, 10.0: 0.2384058, 20.0: 0.0359724}


@pytest.mark.parametrize(("ratio", "k"), RATIOS.items())
def test_damping_by_ratio(ratio, k):
    assert coefficients([1.0], [float(ratio)]) == pytest.approx((1, k), abs=1e-7)
    assert coefficients([float(ratio)], [1.0]) == pytest.approx((k, 1), abs=1e-7)


@pytest.mark.parametrize(("image", "text"), [([1.0], [1.0]), ([0.0], [0.0]), ([0.0], [2.0]), ([2.0], [0.0]),
                                             ([math.nan], [1.0]), ([math.inf], [1.0])])  # fmt: skip
def test_nobody_is_damped_without_a_ratio(image, text):
    assert coefficients(image, text) == (1, 1)


def test_sums_not_means_of_ratios():
    sums = ContributionSums()
    sums.add(torch.tensor([0.5, 0.25]), torch.tensor([0.75, 0.5]))
    sums.add(torch.tensor(1.6), torch.tensor(0.4))
    image, text = sums.take()
    assert float(contribution_ratio(image, text)) == pytest.approx(0.7021277, abs=1e-7)
    assert sums.take() is None


def test_negative_strength():
    with pytest.raises(ValueError, match="beta"):
        coefficients([1.0], [2.0], beta=-1)


def test_samples_without_a_class_contribute_nothing():
    logits, target = torch.zeros(2, 4), torch.tensor([[0, 0, 0, 0.0], [0.5, 0.5, 0, 0]])
    assert true_class_probability(logits, target).tolist() == [0, 0.25]


def run(values, k, noise=QUIET, damp=True, seed=0):
    gradients = {name: [torch.tensor(v, dtype=torch.float32) for v in group] for name, group in values.items()}
    ratio = coordinate_gradients(gradients, {name: torch.tensor(v).double() for name, v in k.items()}, noise,
                                 torch.Generator().manual_seed(seed), damp)  # fmt: skip
    return gradients, float(ratio)


def test_gradients_are_damped():
    gradients, ratio = run({"image": [[1.0, 2]], "text": [[1.0, 2, 3, 6]]}, {"image": 1.0, "text": 0.8348596})
    assert gradients["image"][0].tolist() == [1, 2]
    assert gradients["text"][0].tolist() == pytest.approx([0.8348596, 1.6697192, 2.5045788, 5.0091575])
    assert ratio == 0


def test_noise_has_the_spread_of_the_raw_gradient():
    raw = torch.tensor([1.0, 2, 3, 6]).repeat(5000).tolist()
    spread = torch.tensor(raw).std().item()
    assert torch.tensor([1.0, 2, 3, 6]).std().item() == pytest.approx(2.1602469)
    for std_of, expected in (("raw", spread), ("damped", 0.5 * spread)):
        gradients, ratio = run(
            {"image": [[0.0, 1]], "text": [raw]}, {"image": 1.0, "text": 0.5}, Noise("both", 1.0, std_of)
        )
        drawn = gradients["text"][0] - 0.5 * torch.tensor(raw)
        assert drawn.std().item() == pytest.approx(expected, rel=0.02)
        assert abs(drawn.mean().item()) < 0.1
        assert ratio > 0
    assert not torch.equal(gradients["image"][0], torch.tensor([0.0, 1]))


def test_noise_on_the_damped_modality_alone():
    gradients, _ = run({"image": [[0.0, 1]], "text": [[1.0, 2]]}, {"image": 1.0, "text": 0.5}, Noise("damped"))
    assert gradients["image"][0].tolist() == [0, 1]
    assert gradients["text"][0].tolist() != [0.5, 1]
    one, _ = run({"image": [[3.0]], "text": [[1.0, 2]]}, {"image": 1.0, "text": 0.5}, Noise("both"))
    assert one["image"][0].tolist() == [3], "one element has no variance"


def test_overflow_leaves_everything_alone():
    gradients, _ = run({"image": [[math.inf, 1]], "text": [[1.0, 2]]}, {"image": 1.0, "text": 0.5}, Noise("both"))
    assert gradients["text"][0].tolist() == [1, 2]
    assert gradients["image"][0].tolist() == [math.inf, 1]


def test_noise_is_a_function_of_the_seed():
    arguments = ({"image": [[0.0, 1]], "text": [[1.0, 2]]}, {"image": 1.0, "text": 0.5}, Noise("both"))
    (first, _), (again, _), (other, _) = run(*arguments), run(*arguments), run(*arguments, seed=1)
    assert torch.equal(first["text"][0], again["text"][0])
    assert not torch.equal(first["text"][0], other["text"][0])


@pytest.mark.parametrize(
    ("make", "factors", "noise", "expected"),
    [
        (torch.optim.SGD, [0.5], 0, 0.5),
        (torch.optim.AdamW, [0.5], 0, 1.0),
        (torch.optim.AdamW, [0.5, 1.0], 0, 0.75 / 0.625**0.5),
        (torch.optim.AdamW, [1.0], 1, 0.5**0.5),
    ],
)
def test_what_k_and_noise_do_to_the_way_travelled(make, factors, noise, expected):
    """7-C7, a gradient of 1 plus noise of its size: under AdamW a constant k changes nothing, noise does."""

    def distance(scales, size):
        generator = torch.Generator().manual_seed(0)
        parameter = torch.nn.Parameter(torch.zeros(400, dtype=torch.float64))
        optimizer = make([parameter], lr=1e-3, weight_decay=0)
        for step in range(600):
            drawn = torch.randn(400, generator=generator, dtype=torch.float64)
            parameter.grad = scales[step % len(scales)] * torch.ones(400, dtype=torch.float64) + size * drawn
            optimizer.step()
        return parameter.detach().mean().item()

    assert distance(factors, noise) / distance([1.0], 0) == pytest.approx(expected, abs=0.03)


class Module(torch.nn.Module):
    """Two weights of two modalities, and what the callback asks of a module."""

    def __init__(self):
        super().__init__()
        self.image, self.text = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
        self.contributions, self.device = ContributionSums(), torch.device("cpu")

    def modality_parameters(self):
        return {"image": [self.image], "text": [self.text]}

    def log_dict(self, values, batch_size):
        self.logged = {name: float(value) for name, value in values.items()}


@pytest.mark.parametrize(("apply_to", "way"), [("grad", 1.0), ("update", 0.8026247)])
def test_update_slows_adam_where_the_gradient_does_not(apply_to, way):
    """After one AdamW step the leading modality has gone k of its way with `update`, all of it with `grad`."""
    module = Module()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0)
    trainer = type("Trainer", (), {"optimizers": [optimizer], "global_step": 0})()
    callback = GradientCoordination(apply_to=apply_to, noise_scope="none")
    callback.on_train_start(trainer, module)
    for parameter in module.parameters():
        parameter.grad = torch.tensor([1.0, -2.0, 3.0])
    module.contributions.add(torch.tensor(1.0), torch.tensor(2.0))
    callback.on_before_optimizer_step(trainer, module, optimizer)
    optimizer.step()
    assert (module.text / module.image).tolist() == pytest.approx([way] * 3, rel=1e-5)
    assert module.logged["gmcoord/rho_text"] == 2
    assert module.contributions.take() is None
    optimizer.step()
    callback.on_train_end(trainer, module)
    assert not optimizer._optimizer_step_post_hooks


def test_window_and_options():
    module = Module()
    trainer = type("Trainer", (), {"optimizers": [], "global_step": 3})()
    callback = GradientCoordination(start_step=4)
    callback.on_train_start(trainer, module)
    module.text.grad = torch.ones(3)
    module.contributions.add(torch.tensor(1.0), torch.tensor(2.0))
    callback.on_before_optimizer_step(trainer, module, None)
    assert module.text.grad.tolist() == [1, 1, 1]
    assert module.contributions.take() is None, "the window's steps do not leak into it"
    for settings in ({"apply_to": "weights"}, {"noise_scope": "all"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            GradientCoordination(**settings)
