"""Rung 12k. The leading eigenvectors of a Gram matrix: few of many by block Lanczos, proved good enough or thrown away (PyTorch).

All eigenvectors of an (n, n) matrix A cost several n^3, and a compression keeps few of them. Block Lanczos looks for them in the
span of X, A X, A^2 X, ..., where X is random. It gives r orthonormal columns V with values theta, and what these lack, the residuals
R = A V - V theta. Of what lies outside V it says nothing, so that is checked afterwards. For a chosen slack

    A - V theta V^H  <=  theta_r + slack        nothing larger was missed: the difference has a Cholesky decomposition

must hold. Then, by 2 |R x . y| <= |R x|^2 / slack + slack |y|^2, the r largest eigenvalues of A have a sum of at most

    sum theta  +  |R|^2 / slack  +  sum of max(0, theta_r + 2 slack - theta_i)

for only values so near the last one kept can have been passed over. The slack is chosen so that the last sum is half of what is
allowed, and the residuals must be small enough to leave the other half. Allowed is 1e-6 of what V discards, and the rounding,
4 n eps theta_1 a vector, which all decompositions have. Where a check fails, all eigenvectors are computed.
Golub & Underwood 1977; random starts, and how fast: Musco & Musco 2015.
"""

import torch

SMALLEST = 2048  # below, all eigenvectors are as quick
BLOCK = 16  # columns of X: enough to multiply fast
TOLERANCE = 1e-6  # by how much the discarded energy may exceed the least one


def leading(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """The eigenvectors of the `rank` largest eigenvalues of a positive semidefinite (n, n), as orthonormal columns (n, rank)."""
    if len(gram) >= SMALLEST and 8 * rank <= len(gram):
        found = by_lanczos(gram, rank)
        if found is not None and _nothing_missed(gram, *found):
            return found[0].flip(1)
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)  # a copy of what is kept alone


Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # V (n, r), theta (r,) ascending, and the slack


def by_lanczos(gram: torch.Tensor, rank: int) -> Found | None:
    """Vectors whose residuals are small enough, or None where half of all dimensions do not hold them."""
    n = len(gram)
    trace, generator = gram.diagonal().sum().real, torch.Generator().manual_seed(0)
    block = torch.linalg.qr(torch.randn(n, BLOCK, dtype=gram.dtype, generator=generator).to(gram.device)).Q.mH  # (b, n)
    basis, projected = gram.new_empty(n // 2, n), gram.new_zeros(n // 2, n // 2)  # rows of the first are orthonormal
    size, look = 0, 2 * rank
    while size + BLOCK <= n // 2:
        last, size = size, size + BLOCK
        basis[last:size] = block
        held = basis[:size]
        image = (gram @ block.mH.contiguous()).mH  # (b, n); rows on the left take twice as long
        near = slice(max(0, last - BLOCK), size)  # of all blocks it meets itself and the one before
        products = image @ basis[near].mH  # (b, 2 b)
        projected[last:size, near], projected[near, last:size] = products, products.mH
        block, coupling = _orthonormal(image - products @ basis[near], held)
        if size < look:
            continue
        values, vectors = (x[..., -rank:] for x in torch.linalg.eigh(projected[:size, :size]))  # (r,), (size, r), ascending
        half = TOLERANCE / 2 * (trace - values.sum()) + 2 * rank * n * torch.finfo(values.dtype).eps * values[-1]
        slack = slack_of(values, half)
        if (coupling @ vectors[last:]).norm() ** 2 <= half * slack:
            return held.mH @ vectors, values, slack
        look = min(size + size // 4, n // 2 // BLOCK * BLOCK)  # the last look is at the end
    return None


def slack_of(values: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """The slack for which max(0, values[0] + 2 slack - value) has this sum over all values, which ascend."""
    gaps, counts = values - values[0], torch.arange(1, len(values) + 1, device=values.device)  # (r,) each
    return (
        (allowed + gaps.cumsum(0)) / counts
    ).min() / 2  # of the k nearest ones the sum is 2 slack k - gaps, if no others count


def _orthonormal(rows: torch.Tensor, held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal rows, orthogonal to `held` too, which these are but for rounding; and C (b, b) with rows^H = result^H C.

    Where nothing but rounding is left, the result is as good as random: the search goes on elsewhere.
    """
    q, c = torch.linalg.qr(rows.mH)
    for _ in range(2):
        q, again = torch.linalg.qr(q - held.mH @ (held @ q))
        c = again @ c
        if again.diagonal().abs().min() > 0.7:  # little was taken away, and with it little of the rounding was left
            break
    return q.mH, c


def _nothing_missed(gram: torch.Tensor, vectors: torch.Tensor, values: torch.Tensor, slack: torch.Tensor) -> bool:
    """Whether all eigenvalues of A - V theta V^H are below the least theta and the slack, and V is orthonormal."""
    if (vectors.mH @ vectors - torch.eye(len(values)).to(vectors)).norm() > len(gram) * torch.finfo(values.dtype).eps:
        return False
    rest = torch.addmm(gram, vectors * values, vectors.mH, beta=-1)  # V theta V^H - A
    rest.diagonal().add_(values[0] + slack)
    failed = torch.empty(0, dtype=torch.int32, device=gram.device)
    columns = rest.mT  # as LAPACK has them; of the conjugate of a Hermitian matrix the answer is the same
    torch.linalg.cholesky_ex(columns, out=(columns, failed))  # in place: of the decomposition nothing is wanted
    return not failed
