"""Checks of notebook 06: a rotation by hand, what positions change, schedules, the gauge that commutes with rotations."""

import torch

from .common import judge, judge_value


def _turn(first, second, angles):
    cos, sin = angles.cos(), angles.sin()
    return first * cos - second * sin, second * cos + first * sin


def rotation(x, position, frequencies):
    first, second = x.chunk(2)
    return torch.cat(_turn(first, second, position * frequencies))


def _interleaved(x, position, frequencies):
    return torch.stack(_turn(x[0::2], x[1::2], position * frequencies), dim=1).flatten()


def check_rotation(attempt) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, generator=generator, dtype=torch.float64)
    frequencies = torch.tensor([1.0, 0.3, 0.02], dtype=torch.float64)
    return judge(
        attempt,
        [(x, 3, frequencies), (x, 0, frequencies)],
        rotation,
        {
            'this pairs channel 2j with 2j + 1, the pairing "interleaved"; "half" pairs j with j + width/2': _interleaved,
            "it turns the wrong way; (first, second) -> (first cos - second sin, second cos + first sin)": lambda x, p, f: (
                rotation(x, -p, f)
            ),
            "the frequencies do not depend on the position; the angle is position times frequency": lambda x, p, f: rotation(
                x, 1, f
            ),
            "cosine and sine have changed places": lambda x, p, f: torch.cat(
                _turn(*x.chunk(2), torch.pi / 2 - p * f),
            ),
        },
        "each pair, as a complex number, times exp(i position frequency)",
    )


def check_change(answer) -> bool:
    mistakes = {
        "all distances stay when everybody moves by 1,000": 1,
        "shifting moves everybody by the same; only one of the two changes a distance": 3,
    }
    return judge_value(answer, 2, mistakes, "only distances count: a shift keeps them, doubling does not")


def check_fitting(answer) -> bool:
    mistakes = {
        "the column of Def. 3.1 has one more green field": 1,
        "GQA and MHA keep the heads' schedule for each group; only one group is one latent": 3,
        "no schedule fits all of them": 5,
    }
    return judge_value(answer, 2, mistakes, "MQA, whose latent is one head wide, and coupled MLA, which was made for it")


def _schedule(width):
    return 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def frequencies(kv_rank, rope_dim):
    return torch.cat([torch.zeros(kv_rank // 2, dtype=torch.float64), _schedule(rope_dim)])


def check_frequencies(attempt) -> bool:
    return judge(
        attempt,
        [(8, 4), (512, 64)],
        frequencies,
        {
            "this is the paper's latent schedule; decoupled channels have their own, and the latent does not turn": lambda t, r: (
                _schedule(t + r)
            ),
            "the latent comes first, U3 = [W^DKV, W^KR], so the zeros do": lambda t, r: frequencies(t, r).roll(r // 2),
            "one frequency per channel; a pair of channels has one together": lambda t, r: torch.cat(
                [torch.zeros(t, dtype=torch.float64), _schedule(r).repeat(2)]
            ),
            "these are the frequencies of the rotary channels; the latent's pairs need theirs too, zeros": lambda t, r: (
                _schedule(r)
            ),
            "the schedule of the rotary channels is base^(-2j / rope_dim), not stretched over the whole width": lambda t, r: (
                torch.cat([torch.zeros(t // 2, dtype=torch.float64), _schedule(t + r)[: r // 2]])
            ),
        },
        "zero is a frequency too, and the pairs that have it stand still",
    )


def gauge(re, im):
    re, im = re.diag(), im.diag()
    return torch.cat([torch.cat([re, im], dim=1), torch.cat([-im, re], dim=1)])


def check_gauge(attempt) -> bool:
    generator = torch.Generator().manual_seed(0)
    re, im = torch.randn(2, 3, generator=generator, dtype=torch.float64)

    def interleaved(re, im):
        return torch.block_diag(*(torch.stack([torch.stack([a, b]), torch.stack([-b, a])]) for a, b in zip(re, im)))

    return judge(
        attempt,
        [(re, im)],
        gauge,
        {
            "this is its transpose: rows are multiplied from the right, so real parts come from [re; -im]": lambda re, im: (
                gauge(re, im).T
            ),
            'this is the matrix for the pairing "interleaved"': interleaved,
            "the signs of im must differ in the two halves, as in (a + ib)(c + id)": lambda re, im: torch.cat(
                [torch.cat([re.diag(), im.diag()], dim=1), torch.cat([im.diag(), re.diag()], dim=1)]
            ),
            "channels are scaled one by one; that commutes with no rotation unless both of a pair get the same": lambda re, im: (
                torch.cat([re, im]).diag()
            ),
        },
        "it commutes with every rotation, since complex numbers commute",
    )
