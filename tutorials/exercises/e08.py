"""Checks of notebook 08: Gram matrices of unfoldings that are never formed, the HOSVD's bound, and what may be cut."""

import torch

from .common import judge, judge_value


def key_gram(w_q, w_k):
    return torch.einsum("hdk,hkl,hel->de", w_k, w_q.mT @ w_q, w_k)


def _projections():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64))


def check_key_gram(attempt) -> bool:
    return judge(
        attempt,
        [_projections()],
        key_gram,
        {
            "this is the query mode, section 3's; queries and keys change places": lambda q, k: key_gram(k, q),
            "the middle factor is missing: keys weigh as much as the queries that meet them": lambda q, k: torch.einsum(
                "hdk,hek->de", k, k
            ),
            "the middle factor is W_h^Q^T W_h^Q, with queries": lambda q, k: torch.einsum("hdk,hkl,hel->de", k, k.mT @ k, k),
            "heads are added as matrices first; their Gram matrices add up, not the slices": lambda q, k: (
                (q @ k.mT).sum(0).T @ (q @ k.mT).sum(0)
            ),
            "this has one slice per head; the unfolding has all heads side by side, so they add up": lambda q, k: torch.einsum(
                "hdk,hkl,hel->hde", k, q.mT @ q, k
            ),
        },
        "sum over heads of W^K (W^Q^T W^Q) W^K^T",
    )


def bound(spectra, ranks):
    tails = sum((s[rank:] ** 2).sum() for s, rank in zip(spectra, ranks))
    return (tails / (spectra[0] ** 2).sum()) ** 0.5


def check_bound(attempt) -> bool:
    spectra = [torch.tensor(s, dtype=torch.float64) for s in ([4.0, 3.0], [4.2, 2.0, 1.6, 1.0], [4.4, 2.0, 1.0, 0.8])]
    spectra = [s * 5 / s.norm() for s in spectra]  # all three have the tensor's norm
    return judge(
        attempt,
        [(spectra, (1, 2, 3)), (spectra, (2, 4, 2))],
        bound,
        {
            "this is the absolute error; divide by the norm of the tensor": lambda s, r: bound(s, r) * s[0].norm(),
            "this is its square; take the root": lambda s, r: bound(s, r) ** 2,
            "this is the lower bound, the largest tail; the three tails add up": lambda s, r: (
                max((v[n:] ** 2).sum() for v, n in zip(s, r)) ** 0.5 / s[0].norm()
            ),
            "squares add up, not singular values": lambda s, r: sum(v[n:].sum() for v, n in zip(s, r)) / s[0].norm(),
            "tails begin behind the rank: the first discarded value is s[rank]": lambda s, r: bound(s, [n + 1 for n in r]),
            "the norm of the tensor is that of any one spectrum; you divide by all three": lambda s, r: bound(s, r) / 3**0.5,
            "this is the part that is kept": lambda s, r: (
                (sum((v[:n] ** 2).sum() for v, n in zip(s, r)) / (s[0] ** 2).sum()) ** 0.5
            ),
        },
        "the root of the sum of all three tails, over the norm",
    )


def head_gram(w_q, w_k):
    return torch.einsum("iakl,iakl->ia", w_q.mT[:, None] @ w_q[None], w_k.mT[:, None] @ w_k[None])


def check_head_gram(attempt) -> bool:
    return judge(
        attempt,
        [_projections()],
        head_gram,
        {
            "inner products of queries alone; both sides count": lambda q, k: torch.einsum("idk,jdk->ij", q, q),
            "multiply the k x k matrices entry by entry and then add up; the product of the two sums is another thing": lambda q, k: (
                torch.einsum("idk,jdk->ij", q, q) * torch.einsum("idk,jdk->ij", k, k)
            ),
            "these are their square roots; inner products are wanted": lambda q, k: head_gram(q, k).abs().sqrt(),
            "this is the trace of a matrix product: one of the two k x k matrices is transposed": lambda q, k: torch.einsum(
                "iakl,ialk->ia", q.mT[:, None] @ q[None], k.mT[:, None] @ k[None]
            ),
        },
        "<W_i, W_j> is the sum of (W_i^Q^T W_j^Q) times (W_i^K^T W_j^K), entry by entry",
    )


def check_directions(answer) -> bool:
    mistakes = {
        "fewer than when it was fresh, but weight decay leaves less than half of them": 20,
        "training does not fill directions here; weight decay empties what the digits do not need": 45,
    }
    right = "the queries of all twelve heads come nearly all from these few directions"
    return judge_value(answer, 6, mistakes, right, rtol=0.25)


def check_fewer(answer) -> bool:
    told = "four patterns stand for twelve heads that have little in common, and nothing in the other modes makes up for that"
    right = "three ranks less in the query and key mode cost less than eight head patterns less"
    return judge_value(answer, (12, 6, 6), {told: (4, 9, 9)}, right)


def check_spare(answer) -> bool:
    mistakes = {"there twelve patterns are best wherever the error is small, and dark stands in all columns": 2}
    right = "before the softmax dark fades to the right, and fewer patterns do as well while the tensor is small"
    return judge_value(answer, 1, mistakes, right)
