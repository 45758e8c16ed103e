"""Rung 10b. Tucker Attention (Klein et al. 2026, Def. 2.1): train the two attention tensors in Tucker form (PyTorch).

    pre-softmax   W  = C  x_1 U1  x_2 U2  x_3 U3     C  (r, s, t), U1 (n_H, r), U2 (d, s), U3 (d, t)
    post-softmax  W~ = C~ x_1 U~1 x_2 U~2 x_3 U~3    C~ (u, o, v), U~1 (n_H, u), U~2 (d, o), U~3 (d, v)

The six lines of rung 10a, made fast, and with a cache, biases and norms. In `forward` they are

    P = X U2                        (b, n, s)                    one query latent,
    K = X U3,  V = X U~3            (b, 1, m, t), (b, 1, m, v)   one key and one value for all heads
    Q_h = P T_h,  T = C x_1 U1      (b, h, n, t)                 what is new is U1: the heads share a basis
    A_h = softmax(scale Q_h K^T)    (b, h, n, m)                 `attend`, to which it is multi-query attention: a stock
    Z_h = A_h V                     (b, h, n, v)                 flash kernel runs it, if t = v (Sec. 3.3)
    Y = (sum_h Z_h T~_h^T) U~2^T    (b, n, d)                    T~ = C~ x_1 U~1
"""

import torch
import torch.nn.functional as F
from torch import nn

from .attend import attend
from .cache import Cache
from .cached_attention import CachedAttention, keeps_cache, token_positions
from .checks import check_init, check_tucker
from .initialisation import initialise_tucker
from .norms import LatentNorm, QKNorm
from .recompute import laid_by_token, queries_made_again
from .rotary import Rotary
from .tucker_weights import SharedLatentWeights, TuckerWeights, assembled, latent_factors, under_one_name


class TuckerAttention(CachedAttention):
    """Attention whose pre- and post-softmax tensors have Tucker ranks `ranks` and `post_ranks`.

    Args:
        d_model: d, the width of a token.
        n_heads: n_H.
        ranks: (head, query, key) = (r1, r2, r3).
        post_ranks: (head, output, value), by default `ranks`.
        shared_kv: the value latent is the key latent, U~3 = U3, which `pre` holds; needs r~3 = r3.
        scale: multiplies the logits, by default 1/sqrt(d / n_H) whatever the ranks (Eqs. 2-6).
        bias: append a constant 1 to every token, X~ = [X, 1]: U2, U3 and U~3 get one more row, which is a query, key and value
            bias in their latents (d + 1 rows); and an output bias. Exact for the biases of GPT-2, Qwen and ViT.
        rotary: turns the key latent and every head's latent query, width r3 (Def. 3.1, Eq. 12, with any frequencies). Turned
            coordinates may not be mixed, so r3 then has no upper limit.
        latent_norm: RMSNorm on the query, key and value latents, which makes it another function than Def. 2.1.
        qk_norm: RMSNorm on the latent queries P T_h and on the key latent before they are turned, another function too (see
            `norms`): None, of each "head" by itself, or of "all" heads' queries together. Values read the latent without it.
        init: "orthonormal" (ours, see `reset_parameters`) or "xavier" (Xavier-uniform on all eight factors).

    Raises:
        ValueError: if a rank exceeds its mode's size or the product of the other two ranks, or another argument is off.
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
        bias: bool = False,
        rotary: Rotary | None = None,
        latent_norm: bool = False,
        qk_norm: str | None = None,
        init: str = "orthonormal",
    ):
        super().__init__()
        check_init(init)
        d_model, n_heads, self.ranks, self.post_ranks = check_tucker(
            d_model, n_heads, ranks, post_ranks, shared_kv, scale, bias, rotary, latent_norm, qk_norm
        )
        self.d_model, self.n_heads, self.init = d_model, n_heads, init
        self.shared_kv, self.bias, self.rotary = shared_kv, bias, rotary
        self.latent_norm, self.qk_norm = latent_norm, qk_norm
        self.recompute = False  # True makes queries again in the backward pass, for less memory
        self.scale = (d_model / n_heads) ** -0.5 if scale is None else scale
        self.rotates_on_reading = rotary is not None and shared_kv

        rows = d_model + 1 if bias else d_model
        (r, s, t), (u, o, v) = self.ranks, self.post_ranks
        self.pre = TuckerWeights(
            torch.empty(r, s, t), {"head": torch.empty(n_heads, r), "query": torch.empty(rows, s), "key": torch.empty(rows, t)}
        )
        # One latent has one owner: with shared_kv `post.value` reads `pre.key`. Older files, which hold it twice, still load.
        core, post = torch.empty(u, o, v), {"head": torch.empty(n_heads, u), "output": torch.empty(d_model, o)}
        if shared_kv:
            self.post: TuckerWeights = SharedLatentWeights(core, post, self.pre)
        else:
            self.post = TuckerWeights(core, post | {"value": torch.empty(rows, v)})
        self.output_bias = nn.Parameter(torch.empty(d_model)) if bias else None
        self.query_norm: nn.Module = LatentNorm(s) if latent_norm else nn.Identity()
        self.key_norm: nn.Module = LatentNorm(t) if latent_norm else nn.Identity()
        self.value_norm: nn.Module = LatentNorm(v) if latent_norm and not shared_kv else nn.Identity()
        self.q_norm, self.k_norm = QKNorm.of(qk_norm, t, n_heads), QKNorm.of(qk_norm, t, 1)
        self.register_load_state_dict_pre_hook(under_one_name)
        self.reset_parameters()

    @classmethod
    def from_weights(
        cls,
        pre: TuckerWeights,
        post: TuckerWeights,
        *,
        scale: float,
        rotary: Rotary | None = None,
        output_bias: torch.Tensor | None = None,
        norms: tuple[nn.Module, nn.Module, nn.Module] | None = None,
        qk_norms: tuple[QKNorm, QKNorm] | None = None,
    ) -> "TuckerAttention":
        """The layer with exactly these cores and factors, which become its own; shared KV where post.value is pre.key.

        Args:
            pre, post: with the factors head, query, key, and head, output, value.
            scale, rotary: as in the constructor.
            output_bias: (d,), where the factors have a bias row.
            norms: for the query, key and value latents.
            qk_norms: for the heads' latent queries and the key latent, each of width r3.

        Raises:
            ValueError: for ranks as the constructor does, and for tensors that do not fit together.
        """
        return assembled(cls, pre, post, scale, rotary, output_bias, norms, qk_norms)

    def reset_parameters(self, std: float = 0.02, output_gain: float = 1.0) -> None:
        """Start with logits and outputs as large as multi-head attention's, see `initialisation`.  std, output_gain: as there."""
        initialise_tucker(self, std, output_gain)

    def cache_streams(self) -> dict[str, tuple[int, int]]:
        """The key latent and, unless it is the same, the value latent: one head each."""
        key = {"key": (1, self.ranks[2])}
        return key if self.shared_kv else key | {"value": (1, self.post_ranks[2])}

    @keeps_cache
    def forward(
        self,
        x: torch.Tensor,
        *,
        causal: bool = True,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cache: Cache | None = None,
        backend: str = "sdpa",
    ) -> torch.Tensor:
        """x: (b, n, d); the other arguments, and errors, as in MultiHeadAttention.  Returns: (b, n, d)."""
        self.check_call(x, causal, mask, positions, cache, backend)
        new_positions = None if self.rotary is None else token_positions(x, positions, cache)
        p, *kv = self._latents(x)  # (b, n, s), (b, n, t), (b, n, v)
        k, v = self._keys_and_values(kv, new_positions, positions, cache)  # (b, 1, m, t), (b, 1, m, v)
        latents = p, self.pre.head_cores(), k, v  # the cores (h, s, t)
        if backend == "triton" and x.shape[1] > 1 and self.qk_norm is None:  # `_attention` as one kernel: no q in memory
            from .kernels.latent_attention import latent_attention

            z = latent_attention(*latents, scale=self.scale, causal=causal, rotary=self.rotary, positions=new_positions)
        else:
            rest = new_positions, dict(scale=self.scale, causal=causal, mask=mask, backend=backend)
            z = queries_made_again(self._attention, *latents, *rest, when=self.recompute)  # (b, h, n, v)
        y = torch.einsum("bhnv,hov->bno", z, self.post.head_cores())  # (b, n, o)
        return F.linear(y, self.post.output, self.output_bias)  # (b, n, d)

    def _attention(self, p, cores, k, v, positions, options):
        # Latents first and cores after them: s (d + h t) multiply-adds a token, where U2 T_h made beforehand takes d h t.
        q = self.q_norm(torch.einsum("bns,hst->bhnt", p, cores))  # per head, in key coordinates
        return attend(laid_by_token(self._turned(q, positions)), k, v, **options)

    def _latents(self, x):
        """Query, key and, unless it is the same, value latent, in one product: x is read once, and so is the gradient that it gets."""
        x = F.pad(x, (0, 1), value=1.0) if self.bias else x  # [X, 1]
        factors, held = latent_factors(self.pre, self.post), self.pre.held_factors
        latents = (x @ (torch.cat(factors, dim=1) if held is None else held)).split([f.shape[1] for f in factors], dim=-1)
        # A shared latent has one norm, the key's: `zip` ends with it.
        return tuple(norm(one) for norm, one in zip((self.query_norm, self.key_norm, self.value_norm), latents))

    def _turned(self, latent, positions):
        return latent if self.rotary is None else self.rotary(latent, positions)

    def _keys_and_values(self, kv, new_positions, positions, cache):
        """One key and one value for all heads, cached. Keys are normalised and turned before that, a shared latent on reading."""
        k, v = kv[0].unsqueeze(1), kv[-1].unsqueeze(1)  # (b, 1, n, t), (b, 1, n, v)
        if not self.shared_kv:
            k = self._turned(self.k_norm(k), new_positions)
            return (k, v) if cache is None else cache.append(key=k, value=v)
        if cache is None:
            return self._turned(self.k_norm(k), new_positions), k
        (k,) = cache.append(positions, key=k)
        return self._turned(self.k_norm(k), cache.positions(k.device)), k
