"""Rung 10. Tucker Attention (Klein et al. 2026, Def. 2.1): train the two attention tensors in Tucker form (PyTorch).

    pre-softmax   W  = C  x_1 U1  x_2 U2  x_3 U3     C  (r, s, t), U1 (n_H, r), U2 (d, s), U3 (d, t)
    post-softmax  W~ = C~ x_1 U~1 x_2 U~2 x_3 U~3    C~ (u, o, v), U~1 (n_H, u), U~2 (d, o), U~3 (d, v)

Seen from the softmax it is multi-query attention: one key X U3 of width t and one value X U~3 of width v serve all heads, so
any flash-attention kernel with grouped heads runs it (Sec. 3.3). What is new is U1: the heads themselves share a basis.
"""

import torch
from torch import nn

from .attend import attend
from .checks import check_positive, check_ranks, check_scale, check_tokens
from .decomposition import TuckerTensor


class TuckerWeights(nn.Module):
    """One attention tensor (n_H, d, d) held as trainable core and factors, named by what they act on.

    core: (r_0, r_1, r_2); the three factors: {"head": (n_H, r_0), name: (d, r_1), name: (d, r_2)} in mode order.
    """

    def __init__(self, core: torch.Tensor, factors: dict[str, torch.Tensor]):
        super().__init__()
        self.names = tuple(factors)
        self.core = nn.Parameter(core.detach().clone(memory_format=torch.contiguous_format))
        for name, factor in factors.items():
            # A factor that already is a parameter stays the same object: that is how U~3 = U3 is shared.
            if not isinstance(factor, nn.Parameter):
                factor = nn.Parameter(factor.detach().clone(memory_format=torch.contiguous_format))
            self.register_parameter(name, factor)

    @property
    def factors(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, name) for name in self.names)

    def head_cores(self) -> torch.Tensor:
        """C x_1 U1: one small matrix per head, (h, s, t) or (h, o, v)."""
        return torch.einsum("rst,hr->hst", self.core, self.head)

    def to_tensor(self) -> torch.Tensor:
        """The dense tensor (n_H, d, d), for proofs and spectra; the layer itself never forms it."""
        return torch.einsum("hst,ds,et->hde", self.head_cores(), *self.factors[1:])

    def numpy(self) -> TuckerTensor:
        """The same tensor as rung 2 knows it."""
        core, *factors = (p.detach().cpu().numpy() for p in (self.core, *self.factors))
        return TuckerTensor(core, factors)


class TuckerAttention(nn.Module):
    """Attention whose pre- and post-softmax tensors have Tucker ranks `ranks` and `post_ranks`.

    d_model: d; n_heads: n_H; ranks: (head, query, key) = (r1, r2, r3); post_ranks: (head, output, value), by default `ranks`.
    shared_kv: the value latent is the key latent, U~3 = U3, one parameter; needs r~3 = r3.
    scale: multiplies the logits, by default 1/sqrt(d / n_H) whatever the ranks (Eqs. 2-6).
    init: "orthonormal" (ours, see `reset_parameters`) or "xavier" (Xavier-uniform on all eight factors).
    Raises ValueError if a rank exceeds its mode's size or the product of the other two ranks, or another argument is off.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        ranks: tuple[int, int, int],
        post_ranks: tuple[int, int, int] | None = None,
        *,
        shared_kv: bool = False,
        scale: float | None = None,
        init: str = "orthonormal",
    ):
        super().__init__()
        check_positive("d_model", d_model)
        check_positive("n_heads", n_heads)
        if init not in ("orthonormal", "xavier"):
            raise ValueError(f"init is {init!r}; it must be 'orthonormal' or 'xavier'")
        # Shared latents serve keys and values: what one of the two tensors cannot use, the other may.
        uncapped = (2,) if shared_kv else ()
        self.ranks = check_ranks("ranks", ranks, (n_heads, d_model, d_model), uncapped)
        self.post_ranks = check_ranks(
            "post_ranks", self.ranks if post_ranks is None else post_ranks, (n_heads, d_model, d_model), uncapped
        )
        if shared_kv and self.post_ranks[2] != self.ranks[2]:
            raise ValueError(f"post_ranks[2] is {self.post_ranks[2]}; with shared_kv it must equal ranks[2] = {self.ranks[2]}")
        self.d_model, self.n_heads, self.shared_kv, self.init = d_model, n_heads, shared_kv, init
        self.scale = (d_model / n_heads) ** -0.5 if scale is None else float(scale)
        check_scale(self.scale)

        r, s, t = self.ranks
        u, o, v = self.post_ranks
        self.pre = TuckerWeights(
            torch.empty(r, s, t),
            {"head": torch.empty(n_heads, r), "query": torch.empty(d_model, s), "key": torch.empty(d_model, t)},
        )
        self.post = TuckerWeights(
            torch.empty(u, o, v),
            {
                "head": torch.empty(n_heads, u),
                "output": torch.empty(d_model, o),
                "value": self.pre.key if shared_kv else torch.empty(d_model, v),
            },
        )
        self.reset_parameters()

    @classmethod
    def from_weights(cls, pre: TuckerWeights, post: TuckerWeights, *, scale: float) -> "TuckerAttention":
        """The layer with exactly these cores and factors; shared KV where post.value is pre.key."""
        with torch.device("meta"):  # sizes and checks only: no memory, no random numbers
            layer = cls(
                len(pre.query),
                len(pre.head),
                tuple(pre.core.shape),
                tuple(post.core.shape),
                shared_kv=post.value is pre.key,
                scale=scale,
            )
        layer.pre, layer.post = pre, post
        return layer

    def reset_parameters(self, std: float = 0.02, output_gain: float = 1.0) -> None:
        """Start like the multi-head layer this one replaces (projections of the given std, residual scaled by output_gain).

        "orthonormal": factors with orthonormal columns, Gaussian cores. On unit-variance tokens that layer's logits have
        variance (d std^2)^2 and its output d std^2 * d (std output_gain)^2; the core variances below give the same two.
        "xavier": the authors' choice; output_gain scales the post-softmax core.
        """
        if self.init == "xavier":
            for parameter in self.parameters():
                nn.init.xavier_uniform_(parameter)
            with torch.no_grad():
                self.post.core.mul_(output_gain)
            return
        for name, parameter in self.named_parameters():  # a shared U3 = U~3 appears once
            if not name.endswith("core"):
                nn.init.orthogonal_(parameter)
        d = self.d_model
        logit_variance = (d * std**2) ** 2
        output_variance = d * std**2 * d * (std * output_gain) ** 2
        core_size, post_core_size = self.pre.core.numel(), self.post.core.numel()
        nn.init.normal_(self.pre.core, std=(logit_variance * self.n_heads / self.scale**2 / core_size) ** 0.5)
        nn.init.normal_(self.post.core, std=(output_variance * d / post_core_size) ** 0.5)

    def forward(
        self, x: torch.Tensor, *, causal: bool = True, mask: torch.Tensor | None = None, backend: str = "sdpa"
    ) -> torch.Tensor:
        """x: (b, n, d), mask and backend as in `attend`.  Returns: (b, n, d)."""
        check_tokens(x, self.d_model)
        p = x @ self.pre.query  # (b, n, s)  the query latent
        q = torch.einsum("bns,hst->bhnt", p, self.pre.head_cores())  # per head, in key coordinates
        k = x @ self.pre.key  # (b, m, t)  the key latent, one for all heads
        v = k if self.shared_kv else x @ self.post.value  # (b, m, v)  the value latent
        z = attend(
            q, k.unsqueeze(1), v.unsqueeze(1), scale=self.scale, causal=causal, mask=mask, backend=backend
        )  # (b, h, n, v)
        y = torch.einsum("bhnv,hov->bno", z, self.post.head_cores())  # (b, n, o)
        return y @ self.post.output.T  # (b, n, d)
