"""Beside rung 10. One attention tensor as trainable core and factors, and two tensors that read one latent (PyTorch)."""

import torch
from torch import nn

from .checks import check_weights
from .decomposition import TuckerTensor
from .initialisation import shapes_alone
from .norms import kind_of


class TuckerWeights(nn.Module):
    """One attention tensor (n_H, d, d) held as trainable core and factors, named by what they act on (Def. 2.1).

    What is a parameter already stays the same object; other tensors are copied.

    Args:
        core: (r, s, t) before the softmax, (u, o, v) after it.
        factors: in mode order, {"head": (n_H, r), "query": (d, s), "key": (d, t)}, or "head" (n_H, u), "output" (d, o) and
            "value" (d, v); d + 1 rows where biased.
    """

    core: nn.Parameter
    head: nn.Parameter
    query: nn.Parameter  # these two before the softmax
    key: nn.Parameter
    output: nn.Parameter  # these two after it
    value: nn.Parameter
    held_cores: torch.Tensor | None = None  # what `held` computed beforehand
    held_factors: torch.Tensor | None = None

    def __init__(self, core: torch.Tensor, factors: dict[str, torch.Tensor]):
        super().__init__()
        self.names = tuple(factors)
        for name, tensor in {"core": core, **factors}.items():
            if not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format))
            self.register_parameter(name, tensor)

    @property
    def factors(self) -> tuple[torch.Tensor, ...]:
        """The factors in mode order."""
        return tuple(getattr(self, name) for name in self.names)

    def head_cores(self) -> torch.Tensor:
        """C x_1 U1: one small matrix per head, (h, s, t) or (h, o, v)."""
        if self.held_cores is not None:
            return self.held_cores
        return torch.einsum("rst,hr->hst", self.core, self.head)

    def to_tensor(self) -> torch.Tensor:
        """The dense tensor (n_H, d, d), for checks and spectra; the layer itself never forms it (d + 1 where biased)."""
        return torch.einsum("hst,ds,et->hde", self.head_cores(), *self.factors[1:])

    def numpy(self) -> TuckerTensor:
        """The same tensor as rung 2 knows it."""
        core, *factors = (  # NumPy computes in no half precision
            p.detach().cpu().to(torch.promote_types(p.dtype, torch.float32)).numpy() for p in (self.core, *self.factors)
        )
        return TuckerTensor(core, tuple(factors))


class SharedLatentWeights(TuckerWeights):
    """A post-softmax tensor that reads the key latent of `pre` as its value latent, U~3 = U3. `pre` alone holds it.

    Args:
        core: (u, o, v), with v = t.
        factors: {"head": (n_H, u), "output": (d, o)}.
        pre: the pre-softmax tensor. Whatever replaces its `key` is read from then on.
    """

    def __init__(self, core: torch.Tensor, factors: dict[str, torch.Tensor], pre: TuckerWeights):
        super().__init__(core, factors)
        self.names = (*self.names, "value")
        self.__dict__["pre"] = pre  # past nn.Module, which would register the latent a second time

    @property
    def value(self) -> nn.Parameter:  # type: ignore[override]
        """The key factor of `pre`, (d, t)."""
        return self.__dict__["pre"].key


def latent_factors(pre: TuckerWeights, post: TuckerWeights) -> tuple[torch.Tensor, ...]:
    """Query, key and, unless it is the same, value factor, (d, s), (d, t), (d, v)."""
    return (pre.query, pre.key, *(() if isinstance(post, SharedLatentWeights) else (post.value,)))


def beside(pre: TuckerWeights, post: TuckerWeights) -> TuckerWeights:
    """`post`, reading its value latent from `pre` where that is the key latent there, and holding one of its own elsewhere."""
    factors = dict(zip(post.names, post.factors))
    if factors["value"] is pre.key:
        del factors["value"]
        return SharedLatentWeights(post.core, factors, pre)
    return TuckerWeights(post.core, factors) if isinstance(post, SharedLatentWeights) else post


def assembled(cls, pre: TuckerWeights, post: TuckerWeights, scale: float, rotary, output_bias, norms, qk_norms):
    """The layer of class `cls`, TuckerAttention, with these parts, as its `from_weights` says."""
    check_weights(pre, post, output_bias, qk_norms)
    post = beside(pre, post)
    sizes = (len(post.output), len(pre.head), pre.core.shape, post.core.shape)
    options = dict(shared_kv=isinstance(post, SharedLatentWeights), bias=output_bias is not None, scale=scale)
    with shapes_alone():  # and checks
        layer = cls(*sizes, **options, rotary=rotary, latent_norm=norms is not None, qk_norm=kind_of(qk_norms))
    layer.pre, layer.post = pre, post
    if output_bias is not None:
        layer.output_bias = nn.Parameter(output_bias.detach().clone())
    if norms is not None:
        layer.query_norm, layer.key_norm, layer.value_norm = norms
    if qk_norms is not None:
        layer.q_norm, layer.k_norm = qk_norms
    return layer


def under_one_name(
    layer: nn.Module, state: dict, prefix: str, _metadata, _strict, _missing, _unexpected, errors: list[str]
) -> None:
    """Before a layer is loaded: its shared latent may stand under a second name, `post.value`, alone or beside its own."""
    key, value = f"{prefix}pre.key", f"{prefix}post.value"
    if layer.shared_kv and value in state:
        latent = state.pop(value)
        if not _same_bits(state.setdefault(key, latent), latent):
            errors.append(f"{key} and {value} differ; this layer shares one latent between them")


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    same_kind = (a.shape, a.dtype) == (b.shape, b.dtype)
    return a is b or (same_kind and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)))
