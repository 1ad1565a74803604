import pytest
import torch

from common.errors import CheckpointError
from common.weights.channels import Channels, fit_kernel, match_channels

OLD = Channels(4, ["t1c", "t1", "flair", "t2"], ["t1c", "t1n", "t2f", "t2w"])
KERNEL = torch.arange(2 * 4 * 3, dtype=torch.float32).reshape(2, 12)


def fit(wanted, start="refuse", stored=OLD, kernel=KERNEL):
    count = wanted if isinstance(wanted, int) else len(wanted)
    fresh = torch.full((2, count * 3), 99.0)
    channels = Channels(count, None if isinstance(wanted, int) else wanted)
    fitted, report = fit_kernel(kernel, fresh, stored, channels, start)
    return fitted.reshape(2, count, 3), report


def columns(*indices):
    return KERNEL.reshape(2, 4, 3)[:, list(indices)]


def test_the_same_set_in_another_order():
    fitted, report = fit(["flair", "t1", "t1c", "t2"])
    assert torch.equal(fitted, columns(2, 1, 0, 3))
    assert report.matched == {"t1c": "t1c", "t1": "t1n", "flair": "t2f", "t2": "t2w"}
    assert (report.permuted, report.new, report.dropped) == (["t1c", "flair"], [], [])
    assert report.line() == "channels: 4 of 4 matched (t1c, t1 = t1n, flair = t2f, t2 = t2w)"
    assert report.line({"t1": "T1w"}).endswith("(t1c, T1w = t1n, flair = t2f, t2 = t2w)")


def test_a_channel_more():
    wanted = ["swi", "t1", "t2"]
    with pytest.raises(CheckpointError, match=r"no kernel for swi \(it has t1c, t1n, t2f, t2w\): set data.modalities"):
        fit(wanted)
    fitted, report = fit(wanted, "mean")
    assert torch.equal(fitted[:, 1:], columns(1, 3))
    assert torch.equal(fitted[:, 0], columns(1, 3).mean(1))
    assert (report.new, report.dropped) == (["swi"], ["t1c", "flair"])
    assert report.line() == (
        "channels: 2 of 4 matched (t1 = t1n, t2 = t2w); swi start as the mean of the stored kernels; t1c, flair dropped"
    )
    fitted, report = fit(wanted, "fresh")
    assert (fitted[:, 0] == 99).all()
    assert "swi start at random" in report.line()


def test_nothing_matches():
    with pytest.raises(CheckpointError, match=r"None of the data's channels \(1h, xe\) .* use an encoder of these"):
        fit(["1h", "xe"])
    with pytest.raises(CheckpointError, match=r"set model\.new_channels to fresh"):
        fit(["1h", "xe"], "mean")
    fitted, report = fit(["1h", "xe"], "fresh")
    assert (fitted == 99).all()
    assert report.line().startswith("channels: 0 of 4 matched; 1h, xe start at random")


def test_weights_without_names():
    nameless = Channels(4)
    fitted, report = fit(["a", "b", "c", "d"], stored=nameless)
    assert torch.equal(fitted, columns(0, 1, 2, 3))
    assert "do not name theirs, so by position" in report.line()
    with pytest.raises(CheckpointError, match=r"do not name their 4 channels, and the data have 2 \(a, b\): frozen"):
        fit(["a", "b"], stored=nameless)
    fitted, report = fit(["a", "b"], "mean", nameless)
    assert torch.allclose(fitted.sum(1), columns(0, 1, 2, 3).sum(1))  # equal channels are answered as before
    assert torch.equal(fitted[:, 0], fitted[:, 1])
    assert "a, b start as the mean of the stored kernels" in report.line()


def test_one_kernel_for_channels_of_several_names():
    """BrainMVP's encoder sees one sequence at a time: the kernel knows every one of them, and others as well."""
    stored, kernel = Channels(1, ["flair", "t1", "t1c"]), KERNEL[:, :3]
    fitted, report = fit(["t1", "t1ir"], stored=stored, kernel=kernel)
    assert torch.allclose(fitted.sum(1), kernel)
    assert report.line() == "channels: one stored kernel shared out among 2 (t1, t1ir)"
    # A kernel that was trained on one name alone is that name's.
    with pytest.raises(CheckpointError, match="no kernel for t2"):
        fit(["t1", "t2"], stored=Channels(1, ["t1"]), kernel=kernel)


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_numbers_alone(count):
    """Without names on the new side the first channels are the same; what is beyond them is never random."""
    fitted, _ = fit(count)
    assert torch.equal(fitted[:, :4], columns(*range(min(count, 4))))
    assert not (fitted == 99).any()


def test_other_networks_are_refused():
    with pytest.raises(CheckpointError, match="differ in width or patch"):
        fit_kernel(KERNEL, torch.zeros(2, 8), OLD, Channels(4, OLD.names), "mean")


def test_convolutions():
    kernel = torch.rand(5, 4, 2, 2, 2)
    fitted, _ = fit_kernel(kernel, torch.zeros(5, 2, 2, 2, 2), OLD, Channels(2, ["t2", "t1c"]), "refuse")
    assert torch.equal(fitted, kernel[:, [3, 0]])


def test_matching_alone():
    report = match_channels(["t1", "t2"], ["t2", "t1"])
    assert report.permuted == ["t1", "t2"]
    assert report.facts()["matched"] == {"t1": "t1", "t2": "t2"}
