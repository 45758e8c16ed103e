"""Rung 3. Attention is two third-order tensors: THE SPECIFICATION, slow and obvious (NumPy).

Every head multiplies its query and key weights before the softmax, and its value and output weights after it:

    W_i  = W_i^Q W_i^K^T   (d x d)          W~_i = W_i^V W_i^O   (d x d)

Only these products matter. Stacked over the heads they are the tensors of the paper:

    pre-softmax   W  (n_H, d, d), modes (head, query, key),     slice i is W_i
    post-softmax  W~ (n_H, d, d), modes (head, output, value),  slice i is W~_i^T   (mind the transpose)

`tensor_attention` is the paper's Eqs. 2-6. Every other rung, in any framework, must agree with it.
"""

import numpy as np

from .checks import as_matrix, as_reals, check_heads, check_scale
from .tensor_algebra import mode_product


def pre_softmax_tensor(w_q: np.ndarray, w_k: np.ndarray) -> np.ndarray:
    """W[h] = W_h^Q W_h^K^T.  Raises ValueError if the numbers of heads differ, as do the others here.

    Args:
        w_q, w_k: (n_H, d, d_H); tokens multiply from the left.

    Returns:
        (n_H, d, d), modes (head, query, key).
    """
    w_q, w_k = check_heads(w_q=w_q, w_k=w_k)
    return np.stack([q @ k.T for q, k in zip(w_q, w_k)])


def post_softmax_tensor(w_v: np.ndarray, w_o: np.ndarray) -> np.ndarray:
    """W~[h] = (W_h^V W_h^O)^T, mind the transpose.

    Args:
        w_v: (n_H, d, d_H).
        w_o: (n_H, d_H, d).

    Returns:
        (n_H, d, d), modes (head, output, value).
    """
    w_v, w_o = check_heads(w_v=w_v, w_o=w_o)
    return np.stack([(v @ o).T for v, o in zip(w_v, w_o)])


def softmax(logits: np.ndarray) -> np.ndarray:
    """exp(logits) normalised over the last axis."""
    (logits,) = as_reals(logits=logits)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True, initial=-np.inf))
    return weights / weights.sum(axis=-1, keepdims=True)


def causal_mask(n_tokens: int) -> np.ndarray:
    """(N, N), True where query n may look at source m <= n."""
    return np.tril(np.ones((n_tokens, n_tokens), dtype=bool))


def tensor_attention(x: np.ndarray, w_pre: np.ndarray, w_post: np.ndarray, scale: float, causal: bool = False) -> np.ndarray:
    """Attention from its two tensors, Eqs. 2-6 of the paper; the last line is Eq. 6.

        H1 = softmax(W x_2 X x_3 X * scale)     H2 = W~ x_3 X     Y[n,d] = sum over heads h and sources m of H1[h,n,m] H2[h,d,m]

    (modes x_2, x_3 of the paper are 1, 2 here).

    Args:
        x: (N, d), one token per row.
        w_pre, w_post: (n_H, d, d).
        scale: 1/sqrt(d_H) in the paper, whatever the ranks.
        causal: token n sees the tokens up to n.

    Returns:
        (N, d).
    """
    check_scale(scale)
    x, w_pre, w_post = as_matrix(x=x), *check_heads(w_pre=w_pre, w_post=w_post)
    logits = mode_product(mode_product(w_pre, x, 1), x, 2) * scale  # (h, n, m)
    if causal:
        logits = np.where(causal_mask(len(x)), logits, -np.inf)
    h1 = softmax(logits)  # (h, n, m)
    h2 = mode_product(w_post, x, 2)  # (h, d, m)
    return np.einsum("hnm,hdm->nd", h1, h2)


def multi_head_attention(
    x: np.ndarray, w_q: np.ndarray, w_k: np.ndarray, w_v: np.ndarray, w_o: np.ndarray, causal: bool = False
) -> np.ndarray:
    """Textbook multi-head attention, one head at a time, to compare `tensor_attention` with (Vaswani et al. 2017).

    Args:
        x: (N, d).
        w_q, w_k, w_v: (n_H, d, d_H).
        w_o: (n_H, d_H, d).
        causal: token n sees the tokens up to n.

    Returns:
        (N, d).
    """
    x, w_q, w_k, w_v, w_o = as_matrix(x=x), *check_heads(w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o)
    y = np.zeros((len(x), w_o.shape[2]), np.result_type(x, w_q, w_k, w_v, w_o))
    for q, k, v, o in zip(w_q, w_k, w_v, w_o):
        logits = (x @ q) @ (x @ k).T / np.sqrt(q.shape[1])  # (n, m)
        if causal:
            logits = np.where(causal_mask(len(x)), logits, -np.inf)
        y += softmax(logits) @ (x @ v) @ o  # (n, d)
    return y
