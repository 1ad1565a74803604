"""The channels of stored weights and of the data they meet: matched by canonical name, permuted, added, dropped.

Letters: E encoder width, C channels, P weights per channel of the first kernel.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from common.errors import CheckpointError
from common.types import InputSpec

#: What happens to channels that the stored weights lack: they are refused, start as the mean of those that match, or
#: start at random. Only a network that is trained may start at random.
NewChannels = Literal["refuse", "mean", "fresh"]
Rule = Literal["name", "position", "shared"]


class ChannelReport(NamedTuple):
    """How the channels of stored weights were matched with those of the data.

    Attributes:
        matched: Channel to the name that the weights' archive has for it.
        permuted: Matched channels whose position differs from that in the stored weights.
        new: Channels without a stored kernel.
        dropped: Stored channels that are not used.
        absent: Matched channels that no case of the data has; they are fed as absent.
        rule: Matched by ``"name"``, by ``"position"``, or one stored kernel ``"shared"`` by all.
        start: What new channels may start as.
    """

    matched: dict[str, str]
    permuted: list[str]
    new: list[str]
    dropped: list[str]
    absent: list[str] = []
    rule: Rule = "name"
    start: NewChannels = "refuse"

    def line(self, shown: Mapping[str, str] | None = None) -> str:
        """Describe in one line what was matched.

        Args:
            shown: What the data's archive calls each channel.
        """
        ours = {name: (shown or {}).get(name, name) for name in (*self.matched, *self.new)}
        if self.rule == "shared":
            return f"channels: one stored kernel shared out among {len(ours)} ({', '.join(ours.values())})"
        pairs = [(ours[name], theirs) for name, theirs in self.matched.items()]
        named = ", ".join(mine if mine == theirs else f"{mine} = {theirs}" for mine, theirs in pairs)
        parts = [f"{len(pairs)} of {len(pairs) + len(self.dropped)} matched" + (f" ({named})" if named else "")]
        if self.rule == "position":
            parts.append("the weights do not name theirs, so by position")
        if self.new:
            start = "start at random" if self.start == "fresh" else "start as the mean of the stored kernels"
            parts.append(f"{', '.join(ours[name] for name in self.new)} {start}")
        parts += [f"{', '.join(self.dropped)} dropped"] if self.dropped else []
        parts += [f"{', '.join(self.absent)} not in the data, fed as absent"] if self.absent else []
        return f"channels: {'; '.join(parts)}"

    def without(self, absent: Sequence[str]) -> "ChannelReport":
        """Return the report with the matched channels that no case has."""
        return self._replace(absent=[name for name in absent if name in self.matched])

    def facts(self) -> dict[str, Any]:
        """Return the report as plain values, for summaries and tables."""
        return self._asdict()


def match_channels(
    stored: Sequence[str], wanted: Sequence[str], names: Sequence[str] = (), start: NewChannels = "refuse"
) -> ChannelReport:
    """Match channels by their canonical names.

    Args:
        stored: Of the weights, in order.
        wanted: Of the data, in order.
        names: What the weights' archive calls its channels; empty: as ``stored``.
        start: How channels without a stored kernel are initialised.

    Raises:
        CheckpointError: a channel is not stored and must be, or none matches and kernels may not be random.
    """
    called = dict(zip(stored, names or stored, strict=True))
    matched = {name: called[name] for name in stored if name in wanted}
    new = [name for name in wanted if name not in stored]
    known = ", ".join(called.values())
    if not matched and start != "fresh":
        remedy = "" if start == "refuse" else ", or set model.new_channels to fresh to start them at random"
        raise CheckpointError(f"None of the data's channels ({', '.join(wanted)}) is among the encoder's ({known}): "
                              f"use an encoder of these channels{remedy}.")  # fmt: skip
    if new and start == "refuse":
        raise CheckpointError(f"The encoder has no kernel for {', '.join(new)} (it has {known}): set data.modalities "
                              f"to channels that it knows.")  # fmt: skip
    moved = [name for name in matched if list(wanted).index(name) != list(stored).index(name)]
    return ChannelReport(matched, moved, new, [name for name in stored if name not in wanted], start=start)


def inflated(kernel: Tensor, count: int) -> Tensor:
    """Give every one of ``count`` input channels the same share of a kernel ``(E, C, ...)``.

    It is the mean over the stored channels, scaled so that equal channels are answered as before.
    """
    return (kernel.sum(1, keepdim=True) / count).repeat(1, count, *[1] * (kernel.ndim - 2))


def _by_name(kernel: Tensor, fresh: Tensor, stored: Sequence[str], wanted: Sequence[str], start: NewChannels) -> Tensor:
    """Return the kernel ``(E, C, P)`` of the wanted channels."""
    places = {name: place for place, name in enumerate(stored)}
    matched = [kernel[:, places[name]] for name in wanted if name in places]
    mean = torch.stack(matched).mean(0) if matched and start != "fresh" else None
    columns = [
        kernel[:, places[name]] if name in places else fresh[:, index] if mean is None else mean
        for index, name in enumerate(wanted)
    ]
    return torch.stack(columns, 1)


class Channels(NamedTuple):
    """The channels of a first kernel.

    Attributes:
        number: Number of channels.
        names: Their canonical names, in order; None: unknown.
        shown: What their archive calls them; empty: the same.
    """

    number: int
    names: Sequence[str] | None = None
    shown: Sequence[str] = ()


def _by_position(kernel: Tensor, wanted: Channels, start: NewChannels) -> tuple[Tensor, ChannelReport]:
    """Return the kernel ``(E, C, P)`` where the stored weights do not name their channels."""
    names = list(wanted.names or [f"channel {index}" for index in range(wanted.number)])
    if kernel.shape[1] == wanted.number:
        matched = {name: f"channel {index}" for index, name in enumerate(names)}
        return kernel, ChannelReport(matched, [], [], [], rule="position", start=start)
    if start == "refuse":
        raise CheckpointError(f"The weights do not name their {kernel.shape[1]} channels, and the data have "
                              f"{wanted.number} ({', '.join(names)}): frozen, they work on as many only.")  # fmt: skip
    return inflated(kernel, wanted.number), ChannelReport({}, [], names, [], rule="position", start="mean")


def fit_kernel(
    weight: Tensor, fresh: Tensor, stored: Channels, wanted: Channels, start: NewChannels
) -> tuple[Tensor, ChannelReport]:
    """Bring the first kernel of stored weights to other channels.

    One kernel that was trained on channels of several names, one at a time, is shared out among all.

    Args:
        weight: ``(E, C P)``, or a convolution's ``(E, C, ...)``.
        fresh: The same of the new network, as it was initialised.
        stored: Channels of the weights.
        wanted: Channels of the new network; without names, the first ones are those of the weights.
        start: How channels without a stored kernel are initialised.

    Returns:
        The kernel in the shape of ``fresh``, and how the channels were matched.

    Raises:
        CheckpointError: a channel is not stored and must be, none matches and kernels may not be random, or the
            networks differ in more than channels.
    """
    if len(weight) != len(fresh) or weight.numel() * wanted.number != fresh.numel() * stored.number:
        raise CheckpointError(f"The first kernel is {tuple(weight.shape)} there and {tuple(fresh.shape)} here: the "
                              f"encoders differ in width or patch.")  # fmt: skip
    kernel = weight.reshape(len(weight), stored.number, -1)
    old = list(stored.names or [])
    if stored.number == 1 < len(old):
        names = wanted.names or [f"channel {index}" for index in range(wanted.number)]
        report = ChannelReport(dict(zip(names, names, strict=True)), [], [], [], rule="shared", start=start)
        return inflated(kernel, wanted.number).reshape(fresh.shape), report
    if len(old) != stored.number:
        fitted, report = _by_position(kernel, wanted, start)
        return fitted.reshape(fresh.shape), report
    new = wanted.names
    if new is None:
        new = [old[index] if index < len(old) else f"new {index}" for index in range(wanted.number)]
        start = "mean" if start == "refuse" else start
    report = match_channels(old, new, stored.shown, start)
    initial = fresh.detach().reshape(len(fresh), wanted.number, -1)
    return _by_name(kernel, initial, old, new, start).reshape(fresh.shape), report


def deliver_channels(
    datamodule: Any, stored: Sequence[str], names: Sequence[str] = (), add: NewChannels | None = None
) -> tuple[InputSpec, ChannelReport]:
    """Have a data module give its batches the channels of stored weights, those that the data lack as absent.

    Args:
        datamodule: With ``input_spec`` and ``deliver``.
        stored: Canonical names of the weights' channels, in order.
        names: What the weights' archive calls them; empty: the same.
        add: None keeps exactly the weights' channels in their order; else the data's come first, those that the weights
            lack start as it says, and those that only the weights have follow.

    Returns:
        What the batches hold then, and how the channels were matched.

    Raises:
        CheckpointError: the data have a channel that the weights lack and must not, or none of theirs.
    """
    spec: InputSpec = datamodule.input_spec
    report = match_channels(stored, spec.channels, names, add or "refuse")
    left_out = not report.matched or (spec.chosen and add in ("mean", "fresh"))
    kept = [] if left_out else report.dropped
    report = match_channels(stored, (*spec.channels, *kept), names, add or "refuse")
    wanted = tuple(stored) if add is None else (*spec.channels, *kept)
    if wanted != spec.channels:
        datamodule.deliver(wanted)
        spec = datamodule.input_spec
    return spec, report.without(spec.absent)
