"""Rung 10a. Tucker Attention (Klein et al. 2026, Def. 2.1) in six lines, THE SPECIFICATION of rung 10b (PyTorch).

    pre-softmax   W  = C  x_1 U1  x_2 U2  x_3 U3     C  (r, s, t), U1  (h, r), U2  (d, s), U3  (d, t)
    post-softmax  W~ = C~ x_1 U~1 x_2 U~2 x_3 U~3    C~ (u, o, v), U~1 (h, u), U~2 (d, o), U~3 (d, v)

No cache, no kernel, no biases, no norms: whatever the layer of rung 10b does, it must agree with this in output and gradient.
"""

import torch


def tucker_attention(x, pre, post, scale, causal=True, mask=None, rotary=None, positions=None):
    """Attention whose two tensors are given in Tucker form, line by line as in tutorials/notation.md.

    Args:
        x: (b, n, d), tokens.
        pre: C, U1, U2, U3.
        post: C~, U~1, U~2, U~3; shared KV is U~3 = U3.
        scale: multiplies the logits, 1/sqrt(d_H) whatever the ranks (Eqs. 2-6).
        causal: token n sees the tokens up to n.
        mask: boolean, True where a query may look, broadcastable to (b, h, n, m). One that may look nowhere yields zeros.
        rotary: latent RoPE (Def. 3.1), turns the key and every head's query, width t.
        positions: (n,) or (b, n) integers for it, by default 0, 1, 2, ...

    Returns:
        (b, n, d).
    """
    (core, head, query, key), (post_core, post_head, output, value) = pre, post
    allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril(0 if causal else x.shape[1])
    allowed = allowed if mask is None else allowed & mask  # ([b, h,] n, m)
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device)
    turn = (lambda latent: latent) if rotary is None else (lambda latent: rotary(latent, positions))

    # The six lines.
    p = torch.einsum("bnd,ds->bns", x, query)  # the query latent
    k, v = turn(torch.einsum("bmd,dt->bmt", x, key)), torch.einsum("bmd,dv->bmv", x, value)  # one key, one value for all heads
    q = turn(torch.einsum("bns,rst,hr->bhnt", p, core, head)) * scale  # the cores make each head's query of it
    logits = torch.einsum("bhnt,bmt->bhnm", q, k)
    z = torch.einsum("bhnm,bmv->bhnv", softmax(logits, allowed), v)
    return torch.einsum("bhnv,uov,hu,do->bnd", z, post_core, post_head, output)


def softmax(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Over the allowed sources of each query; zeros where none is allowed.  logits: (b, h, n, m).  Returns: the same shape."""
    hidden = ~allowed
    return logits.masked_fill(hidden, torch.finfo(logits.dtype).min).softmax(dim=-1).masked_fill(hidden, 0.0)
