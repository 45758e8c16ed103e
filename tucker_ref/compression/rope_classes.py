"""Rung 12a. Which key channels may be mixed: the classes into which a rotary embedding divides them (PyTorch).

Without rotary embedding the key factor is U3 -> U3 A for any A. With it, A must commute with every rotation: channels may only
be mixed with others of the same frequency, and only as complex numbers, a pair (a, b) as a + ib. The key mode then has one small
complex unfolding per frequency in place of one real one.
"""

from dataclasses import dataclass

import torch

from ..rotary import Rotary


@dataclass(frozen=True)
class KeyClass:
    """Key channels that may be mixed: those of one frequency as complex numbers, or unturned ones as they are.

    channels: channel numbers, (2, c) of real and imaginary parts, or (1, c) of unturned ones.
    """

    frequency: float
    channels: torch.Tensor

    def turns(self) -> bool:
        return len(self.channels) == 2

    def energy(self) -> float:
        """What a channel's square counts in the average over all rotations: Re z e^(i phi) has half the square of z."""
        return 0.5 if self.turns() else 1.0

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The class's channels of the last axis, (..., c), complex where they turn."""
        parts = [x[..., numbers] for numbers in self.channels]
        return torch.complex(*parts) if self.turns() else parts[0]


def key_classes(width: int, rotary: Rotary | None, device) -> tuple[KeyClass, ...]:
    """Which of `width` channels may be mixed: all of them without rotary embedding, else those of equal frequency."""
    channels = torch.arange(width, device=device)
    if rotary is None:
        return (KeyClass(0.0, channels[None]),)
    pairs = torch.stack(rotary.pairs(channels))  # (2, width / 2)
    classes = []
    for frequency in rotary.frequencies.unique().tolist():
        chosen = pairs[:, rotary.frequencies == frequency]  # (2, c)
        classes.append(KeyClass(frequency, chosen if frequency else chosen.flatten().sort().values[None]))
    return tuple(classes)


def merged(classes: tuple[KeyClass, ...], others: tuple[KeyClass, ...], width: int) -> tuple[KeyClass, ...]:
    """The classes of two sets of columns side by side; the first set is `width` wide."""
    by_frequency: dict[float, list[torch.Tensor]] = {}
    for moved, group in (*((0, group) for group in classes), *((width, group) for group in others)):
        by_frequency.setdefault(group.frequency, []).append(group.channels + moved)
    return tuple(KeyClass(frequency, torch.cat(by_frequency[frequency], dim=1)) for frequency in sorted(by_frequency))
