"""Rung 10. Tucker Attention (Klein et al. 2026, Def. 2.1): train the two attention tensors in Tucker form (PyTorch).

    pre-softmax   W  = C  x_1 U1  x_2 U2  x_3 U3     C  (r, s, t), U1 (n_H, r), U2 (d, s), U3 (d, t)
    post-softmax  W~ = C~ x_1 U~1 x_2 U~2 x_3 U~3    C~ (u, o, v), U~1 (n_H, u), U~2 (d, o), U~3 (d, v)

Seen from the softmax it is multi-query attention: one key X U3 of width t and one value X U~3 of width v serve all heads, so
a stock flash-attention kernel with grouped heads runs it, if t = v (Sec. 3.3). What is new is U1: the heads share a basis.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .attend import attend
from .cache import Cache, CachedAttention, token_positions
from .checks import check_positive, check_ranks, check_scale
from .decomposition import TuckerTensor
from .mha import check_rotary
from .rotary import Rotary


class TuckerWeights(nn.Module):
    """One attention tensor (n_H, d, d) held as trainable core and factors, named by what they act on.

    core: (r_0, r_1, r_2); the three factors: {"head": (n_H, r_0), name: (d, r_1), name: (d, r_2)} in mode order.
    """

    head: nn.Parameter
    query: nn.Parameter  # these two before the softmax
    key: nn.Parameter
    output: nn.Parameter  # these two after it
    value: nn.Parameter

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
        """The dense tensor (n_H, d, d), for proofs and spectra; the layer itself never forms it (d + 1 where biased)."""
        return torch.einsum("hst,ds,et->hde", self.head_cores(), *self.factors[1:])

    def numpy(self) -> TuckerTensor:
        """The same tensor as rung 2 knows it."""
        core, *factors = (  # NumPy computes in no half precision
            p.detach().cpu().to(torch.promote_types(p.dtype, torch.float32)).numpy() for p in (self.core, *self.factors)
        )
        return TuckerTensor(core, tuple(factors))


class TuckerAttention(CachedAttention):
    """Attention whose pre- and post-softmax tensors have Tucker ranks `ranks` and `post_ranks`.

    d_model: d; n_heads: n_H; ranks: (head, query, key) = (r1, r2, r3); post_ranks: (head, output, value), by default `ranks`.
    shared_kv: the value latent is the key latent, U~3 = U3, one parameter; needs r~3 = r3.
    scale: multiplies the logits, by default 1/sqrt(d / n_H) whatever the ranks (Eqs. 2-6).
    bias: append a constant 1 to every token, X~ = [X, 1]: U2, U3 and U~3 get one more row, which is a query, key and value bias
    in their latents (d + 1 rows); and an output bias. Exact for the biases of GPT-2, Qwen and ViT.
    rotary: turns the key latent and every head's latent query, width r3 (Def. 3.1, Eq. 12, with any frequencies). Turned
    coordinates may not be mixed, so r3 then has no upper limit.
    latent_norm: RMSNorm on the query, key and value latents, which makes it another function than Def. 2.1.
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
        bias: bool = False,
        rotary: Rotary | None = None,
        latent_norm: bool = False,
        init: str = "orthonormal",
    ):
        super().__init__()
        check_positive("d_model", d_model)
        check_positive("n_heads", n_heads)
        if init not in ("orthonormal", "xavier"):
            raise ValueError(f"init is {init!r}; it must be 'orthonormal' or 'xavier'")
        rows = d_model + 1 if bias else d_model
        widest_key = rows if rotary is None else math.inf
        # Latents that are normalised, turned or read by both tensors are more than a basis: no product of ranks bounds them.
        uncapped = {1: latent_norm, 2: latent_norm or shared_kv or rotary is not None}
        post_uncapped = {2: latent_norm or shared_kv}
        self.ranks = check_ranks("ranks", ranks, (n_heads, rows, widest_key), [m for m, free in uncapped.items() if free])
        self.post_ranks = check_ranks(
            "post_ranks",
            self.ranks if post_ranks is None else post_ranks,
            (n_heads, d_model, widest_key if shared_kv else rows),
            [m for m, free in post_uncapped.items() if free],
        )
        if shared_kv and self.post_ranks[2] != self.ranks[2]:
            raise ValueError(f"post_ranks[2] is {self.post_ranks[2]}; with shared_kv it must equal ranks[2] = {self.ranks[2]}")
        check_rotary(rotary, self.ranks[2], "ranks[2]")
        self.d_model, self.n_heads, self.init = d_model, n_heads, init
        self.shared_kv, self.bias, self.rotary, self.latent_norm = shared_kv, bias, rotary, latent_norm
        self.scale = (d_model / n_heads) ** -0.5 if scale is None else scale
        check_scale(self.scale)
        self.rotates_on_reading = rotary is not None and shared_kv

        r, s, t = self.ranks
        u, o, v = self.post_ranks
        self.pre = TuckerWeights(
            torch.empty(r, s, t), {"head": torch.empty(n_heads, r), "query": torch.empty(rows, s), "key": torch.empty(rows, t)}
        )
        value = self.pre.key if shared_kv else torch.empty(rows, v)
        self.post = TuckerWeights(
            torch.empty(u, o, v), {"head": torch.empty(n_heads, u), "output": torch.empty(d_model, o), "value": value}
        )
        self.output_bias = nn.Parameter(torch.empty(d_model)) if bias else None
        self.query_norm: nn.Module = LatentNorm(s) if latent_norm else nn.Identity()
        self.key_norm: nn.Module = LatentNorm(t) if latent_norm else nn.Identity()
        self.value_norm: nn.Module = LatentNorm(v) if latent_norm and not shared_kv else nn.Identity()
        self.register_load_state_dict_pre_hook(_check_tied)
        self.register_load_state_dict_post_hook(_tie)
        self.reset_parameters()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        _tie(self)
        return self

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
    ) -> "TuckerAttention":
        """The layer with exactly these cores and factors; shared KV where post.value is pre.key, biased where output_bias is given.

        norms: for the query, key and value latents.  Raises ValueError for ranks as the constructor does, and for tensors that do
        not fit together.
        """
        for name, weights, factors in (("pre", pre, ("head", "query", "key")), ("post", post, ("head", "output", "value"))):
            if weights.names != factors:
                raise ValueError(f"{name} has the factors {', '.join(weights.names)}; it must have {', '.join(factors)}")
        with torch.device("meta"):  # sizes and checks only: no memory, no random numbers
            (r, s, t), (u, o, v) = pre.core.shape, post.core.shape
            layer = cls(
                len(post.output),
                len(pre.head),
                (r, s, t),
                (u, o, v),
                shared_kv=post.value is pre.key,
                scale=scale,
                bias=output_bias is not None,
                rotary=rotary,
                latent_norm=norms is not None,
            )
        given: dict[str, torch.Tensor] = {f"pre.{name}": tensor for name, tensor in pre.named_parameters()}
        given |= {f"post.{name}": tensor for name, tensor in post.named_parameters()}
        given |= {} if output_bias is None else {"output_bias": output_bias}
        for name, tensor in given.items():
            if tensor.shape != (expected := layer.get_parameter(name).shape):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; beside the others it must have {tuple(expected)}, where query, key and "
                    "value have one row more than the output factor if there is an output_bias"
                )
        layer.pre, layer.post = pre, post
        if output_bias is not None:
            layer.output_bias = nn.Parameter(output_bias.detach().clone())
        if norms is not None:
            layer.query_norm, layer.key_norm, layer.value_norm = norms
        return layer

    def reset_parameters(self, std: float = 0.02, output_gain: float = 1.0) -> None:
        """Start like the multi-head layer this one replaces (projections of the given std, residual scaled by output_gain).

        "orthonormal": factors with orthonormal columns, Gaussian cores. On unit-variance tokens that layer's logits have
        variance (d std^2)^2 and its output d std^2 * d (std output_gain)^2; the core variances below give the same two.
        "xavier": said to be the authors' choice; output_gain scales the post-softmax core.  Biases start at zero, norms at one.
        """
        fill = nn.init.xavier_uniform_ if self.init == "xavier" else nn.init.orthogonal_
        d = self.d_model
        with torch.no_grad():
            for weights in (self.pre, self.post):
                for name, factor in zip(weights.names, weights.factors):
                    if weights is self.post and factor is self.pre.key:
                        continue  # a shared latent is filled once
                    rows = len(factor) if name == "head" else d
                    at_least_float32 = torch.promote_types(factor.dtype, torch.float32)  # QR knows no bfloat16
                    factor[:rows] = fill(torch.empty_like(factor[:rows], dtype=at_least_float32))
                    factor[rows:] = 0.0  # the bias row, where there is one
            if self.output_bias is not None:
                self.output_bias.zero_()
            for norm in (self.query_norm, self.key_norm, self.value_norm):
                if isinstance(norm, LatentNorm):
                    norm.weight.fill_(1.0)
            if self.init == "xavier":
                fill(self.pre.core)
                fill(self.post.core).mul_(output_gain)
                return
            logit_variance = (d * std**2) ** 2
            output_variance = d * std**2 * d * (std * output_gain) ** 2
            # Latents have variance 1, less where one without a norm is wider than the model and cannot be orthonormal.
            narrow, post_narrow = (1.0 if self.latent_norm else min(1.0, d / r[2]) for r in (self.ranks, self.post_ranks))
            core_size, post_core_size = self.pre.core.numel() * narrow, self.post.core.numel() * post_narrow
            self.pre.core.normal_(std=(logit_variance * self.n_heads / self.scale**2 / core_size) ** 0.5)
            self.post.core.normal_(std=(output_variance * d / post_core_size) ** 0.5)

    def cache_streams(self) -> dict[str, tuple[int, int]]:
        key = {"key": (1, self.ranks[2])}
        return key if self.shared_kv else key | {"value": (1, self.post_ranks[2])}

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
        """x: (b, n, d); the other arguments as in MultiHeadAttention.  Returns: (b, n, d)."""
        self.check_call(x, causal, mask, positions, cache, backend)
        places = None if self.rotary is None else token_positions(x, positions, cache)
        x = F.pad(x, (0, 1), value=1.0) if self.bias else x  # [X, 1]
        factors = (self.pre.query, self.pre.key, *(() if self.shared_kv else (self.post.value,)))
        # One product for all latents: x is read once, and so is the gradient that it gets.
        p, *kv = (x @ torch.cat(factors, dim=1)).split([factor.shape[1] for factor in factors], dim=-1)
        p = self.query_norm(p)  # (b, n, s)  the query latent
        cores = self.pre.head_cores()  # (h, s, t)
        k, v = self._keys_and_values(kv, places, positions, cache)  # (b, 1, m, t), (b, 1, m, v)
        if backend == "triton" and x.shape[1] > 1:  # the next lines as one kernel: no q in memory
            from .kernels.latent_attention import latent_attention

            z = latent_attention(
                p, cores, k, v, scale=self.scale, causal=causal, rotary=self.rotary, positions=places
            )  # (b, h, n, v)
        else:
            # Latents first and cores after them: s (d + h t) multiply-adds a token, where U2 T_h made beforehand takes d h t.
            q = torch.einsum("bns,hst->bhnt", p, cores)  # per head, in key coordinates
            if self.rotary is not None:
                q = self.rotary(q, places)
            z = attend(q, k, v, scale=self.scale, causal=causal, mask=mask, backend=backend)  # (b, h, n, v)
        y = torch.einsum("bhnv,hov->bno", z, self.post.head_cores())  # (b, n, o)
        return F.linear(y, self.post.output, self.output_bias)  # (b, n, d)

    def _keys_and_values(self, kv, places, positions, cache):
        """One key and one value for all heads, turned and cached. A shared latent is cached unturned and turned on reading."""
        k = self.key_norm(kv[0]).unsqueeze(1)  # (b, 1, n, t)
        if self.shared_kv:
            if cache is not None:
                (k,) = cache.append(positions, key=k)
                places = cache.positions(k.device)
            return k if self.rotary is None else self.rotary(k, places), k
        v = self.value_norm(kv[1]).unsqueeze(1)  # (b, 1, n, v)
        if self.rotary is not None:
            k = self.rotary(k, places)
        return (k, v) if cache is None else cache.append(key=k, value=v)


def _check_tied(
    layer: TuckerAttention, state: dict, prefix: str, _metadata, _strict, _missing, _unexpected, errors: list
) -> None:
    """One latent under two names: either may be missing, as where a file holds each tensor once; two that differ are an error."""
    if not _has_one_latent(layer):
        return
    names = [prefix + name for name in ("pre.key", "post.value")]
    found = [state[name] for name in names if name in state]
    if len(found) == 1:
        state |= dict.fromkeys(names, found[0])
    elif len(found) == 2 and not (found[0].is_meta or _same(*found)):
        errors.append(f"{prefix}pre.key and {prefix}post.value differ; this layer shares one latent between them")


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """NaN, as of a run that diverged, is the same as NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def _tie(layer: TuckerAttention, _incompatible_keys=None) -> None:
    """U~3 is U3 again, after anything that may have replaced one of them by a copy."""
    if _has_one_latent(layer):
        layer.post.value = layer.pre.key


def _has_one_latent(layer: TuckerAttention) -> bool:
    """Whether keys and values share a plain parameter; a parametrised one cannot be tied."""
    return layer.shared_kv and "key" in layer.pre._parameters and "value" in layer.post._parameters


class LatentNorm(nn.Module):
    """RMSNorm over the first `normalised` channels of a latent, all by default; the rest passes (DeepSeek's rotary key).

    eps: added to the mean square, as in torch.nn.RMSNorm.
    """

    def __init__(self, width: int, normalised: int | None = None, *, eps: float | None = 1e-6):
        super().__init__()
        self.eps = eps
        self.normalised = width if normalised is None else normalised
        self.weight = nn.Parameter(torch.ones(self.normalised))

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """latent: (..., width).  Returns: the same shape."""
        first, rest = latent[..., : self.normalised], latent[..., self.normalised :]
        return torch.cat([F.rms_norm(first, (self.normalised,), self.weight, eps=self.eps), rest], dim=-1)
