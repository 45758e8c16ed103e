"""Checks of notebook 03: sharing heads, MQA and GQA."""

import torch

from .common import judge, judge_value


def check_group(attempt) -> bool:
    mistakes = {
        "that deals the heads out in turn; groups are *neighbouring* heads": lambda head, h, g: head % g,
        "that is the number of heads in a group": lambda head, h, g: h // g,
        "divide by the number of heads in a group, n_heads / n_kv_heads, not by the number of groups": (
            lambda head, h, g: head // g
        ),
        "the group is a whole number: use //": lambda head, h, g: head * g / h,
    }
    inputs = [(7, 12, 4), (11, 12, 2), (2, 12, 12), (5, 12, 1)]
    return judge(attempt, inputs, lambda head, h, g: head // (h // g), mistakes, "neighbouring heads share")


def check_repeat(attempt) -> bool:
    def repeated(k, h):
        return k.repeat_interleave(h // k.shape[1], dim=1)

    mistakes = {
        "you repeated the whole row of groups, 0 1 0 1; heads of a group are neighbours, 0 0 1 1": lambda k, h: k.repeat(
            1, h // k.shape[1], 1, 1
        ),
        "you repeated the tokens; the heads are axis 1": lambda k, h: k.repeat_interleave(h // k.shape[1], dim=2),
        "repeat each head h / g times, not h times": lambda k, h: k.repeat_interleave(h, dim=1),
    }
    k = torch.arange(2 * 2 * 3 * 4.0).reshape(2, 2, 3, 4)
    return judge(attempt, [(k, 6), (k, 2)], repeated, mistakes, "head h finds the key of its group")


def check_core(attempt) -> bool:
    def core(h, g, k, group=None):
        result = torch.zeros(h, h, k, g, k)
        for head in range(h):
            result[head, head, :, head // (h // g) if group is None else group(head)] = torch.eye(k)
        return result.reshape(h, h * k, g * k)

    mistakes = {
        "that deals the groups out in turn; groups are *neighbouring* heads": lambda h, g, k: core(h, g, k, lambda i: i % g),
        "every head reads group 0": lambda h, g, k: core(h, g, k, lambda i: 0),
        "a slice has queries as rows and keys as columns; yours is transposed": lambda h, g, k: core(h, g, k).mT,
        "that lets every head read every head's query channels; head h has only its own": lambda h, g, k: (
            core(h, g, k).sum(dim=0, keepdim=True).expand(h, -1, -1)
        ),
    }
    return judge(attempt, [(4, 2, 3), (6, 3, 1), (3, 1, 2)], core, mistakes, "the core routes each head to its group")


def check_ranks(attempt) -> bool:
    def ranks(d, h, g, k):
        return h, min(d, h * k), min(d, g * k)

    mistakes = {
        "the head mode stays: queries still differ from head to head. It is the key mode that is shared": (
            lambda d, h, g, k: (g, min(d, h * k), min(d, g * k))
        ),
        "that is the theorem's maximum; narrow heads may not reach d: min(d, n_H d_H)": lambda d, h, g, k: (
            h,
            d,
            min(d, g * k),
        ),
        "that is multi-head attention; the key mode has n_KV d_H": lambda d, h, g, k: (h, min(d, h * k), min(d, h * k)),
        "n_KV d_H cannot exceed d": lambda d, h, g, k: (h, min(d, h * k), g * k),
        "those are the ranks of MQA; there are n_KV groups": lambda d, h, g, k: (h, min(d, h * k), min(d, k)),
    }
    inputs = [(24, 12, 4, 2), (24, 6, 2, 2), (24, 6, 3, 10), (768, 12, 4, 64)]
    return judge(attempt, inputs, ranks, mistakes, "(n_H, min(d, n_H d_H), min(d, n_KV d_H))")


def check_budget(attempt) -> bool:
    def largest(d, h, budget, streams=2, divides=True):
        k = d // h
        return max(g for g in range(1, h + 1) if streams * g * k <= budget and (h % g == 0 or not divides))

    mistakes = {
        "keys *and* values are cached: 2 n_KV d_H numbers a token": lambda d, h, b: largest(d, h, b, streams=1),
        "that many groups do not divide the heads evenly": lambda d, h, b: largest(d, h, b, divides=False),
        "there are fewer groups that fit than you think: the cache may be *at most* the budget": lambda d, h, b: min(
            g for g in range(1, h + 1) if 2 * g * (d // h) > b and h % g == 0
        ),
    }
    inputs = [(768, 12, 512), (768, 12, 700), (768, 12, 200), (2048, 32, 1024)]
    return judge(attempt, inputs, largest, mistakes, "2 n_KV d_H numbers a token, and n_KV divides n_H")


def check_mode(answer) -> bool:
    mistakes = {
        "every head keeps queries of its own, so no slice is a mixture of others: the head rank stays": 1,
        "queries are what heads do *not* share": 2,
    }
    return judge_value(answer, 3, mistakes, "all heads look for keys in the same directions")


def check_partner(answer) -> bool:
    mistakes = {
        "that would be so if heads were dealt out in turn; see which columns have ones": 0,
        "head 4 begins the third group; see which columns have ones": 4,
        "another head than 3 itself": 3,
    }
    return judge_value(answer, 2, mistakes, "both have their ones in the columns 4 to 7: the second group")
