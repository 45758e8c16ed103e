"""How a Tucker Attention may be started and trained otherwise: one change at a time, for the ablations and for the best recipe."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from tucker_ref import MultiHeadAttention, TuckerAttention, TuckerWeights, compress

from .optimizers import Together, make_adamw, make_optimizer, narrowed
from .settings import TrainConfig

INITS = ("orthonormal", "xavier", "std 0.02", "HOSVD of multi-head attention")


@dataclass(frozen=True)
class Recipe:
    """Changes to how a row is trained; the defaults change nothing.

    Args:
        name: what tables and records call it.
        init: of Tucker's cores and factors, one of INITS.
        latent_norm: RMSNorm on its latents.
        core_rate, factor_rate: learning rates of its cores and its factors, over the rate of all else.
        attention_rate: that of all parameters of any attention.
        retracted: factors brought back to orthonormal columns after every step.
        carried: what that takes away goes into the cores, otherwise it is dropped.
        product_decay: weight decay pulls the two attention tensors towards zero, not their cores and factors one by one.
        warmup: how many times longer.

    Raises:
        ValueError: for another init, or an attention_rate beside what tells cores from factors.
    """

    name: str = "as it is"
    init: str = "orthonormal"
    latent_norm: bool = False
    core_rate: float = 1.0
    factor_rate: float = 1.0
    attention_rate: float = 1.0
    retracted: bool = False
    carried: bool = True
    product_decay: bool = False
    warmup: int = 1

    def __post_init__(self):
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, but is {self.init!r}")
        if self.attention_rate != 1 and self._apart():
            raise ValueError("attention_rate goes with the plain optimiser: not with " + ", ".join(sorted(self._apart())))

    def _apart(self) -> set[str]:
        """What of this recipe needs an optimiser that tells cores from factors."""
        return {"core_rate", "factor_rate", "retracted", "product_decay"} & self.config().keys()

    def config(self) -> dict:
        """What differs from the defaults, for records."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[1:] if getattr(self, f.name) != f.default}

    def settings(self, settings: TrainConfig) -> TrainConfig:
        """The settings with this recipe's warm-up."""
        return dataclasses.replace(settings, warmup_steps=self.warmup * settings.warmup_steps)

    @torch.no_grad()
    def prepare(self, model: nn.Module) -> None:
        """Give the model's Tucker Attentions this recipe's initial weights and norms, in place; what else they have they keep.

        Args:
            model: freshly initialised.

        Raises:
            ValueError: for "HOSVD of multi-head attention" with latents, queries or keys that are normalised.
        """
        gain = (2 * len(model.blocks)) ** -0.5
        for block in model.blocks:
            old = block.attention
            if not isinstance(old, TuckerAttention) or (self.init == "orthonormal" and not self.latent_norm):
                continue
            options = {name: getattr(old, name) for name in ("shared_kv", "scale", "bias", "rotary", "qk_norm")}
            options["latent_norm"] = self.latent_norm or old.latent_norm
            if self.init == "HOSVD of multi-head attention":
                if normed := [name for name in ("latent_norm", "qk_norm") if options[name]]:
                    raise ValueError(f"recipe {self.name!r}: init {self.init!r} does not go with {' and '.join(normed)}")
                mha = MultiHeadAttention(old.d_model, old.n_heads, bias=old.bias)
                mha.reset_parameters(0.02, gain)
                mha.q_proj.weight.mul_(mha.scale / old.scale)  # logits as large at any scale
                mha.scale = old.scale
                block.attention = compress(mha, old.ranks, old.post_ranks, shared_kv=old.shared_kv, rotary=old.rotary)
                continue
            init = "xavier" if self.init == "xavier" else "orthonormal"
            new = TuckerAttention(old.d_model, old.n_heads, old.ranks, old.post_ranks, init=init, **options)
            new.reset_parameters(0.02, gain)
            if self.init == "std 0.02":
                for name, parameter in new.named_parameters():
                    if name.startswith(("pre.", "post.")):  # gains of norms stay one, biases zero
                        parameter.normal_(std=0.02 * gain if name == "post.core" else 0.02)
                for factor in (new.pre.query, new.pre.key, new.post.value):
                    factor[old.d_model :] = 0.0  # the bias row, where there is one
            block.attention = new

    def optimizer(self, model: nn.Module, settings: TrainConfig) -> torch.optim.AdamW | Together:
        """AdamW or Muon as ever; or an AdamW that knows the attention from the rest, or cores from factors.

        Args:
            model: whose parameters.
            settings: how to train.

        Raises:
            ValueError: where the settings want Muon and the recipe an AdamW of its own.
        """
        if settings.optimizer != "adamw" and (own := (self._apart() | {"attention_rate"}) & self.config().keys()):
            raise ValueError(f"recipe {self.name!r}: {', '.join(sorted(own))} go with AdamW, not with {settings.optimizer}")
        if self._apart():
            return TuckerAdamW(model, settings, self)
        if self.attention_rate != 1:
            return with_attention_apart(model, settings, self.attention_rate)
        return make_optimizer(model, settings)


def with_attention_apart(model: nn.Module, settings: TrainConfig, rate: float) -> torch.optim.AdamW:
    """AdamW as ever, but for the learning rate of the attention.

    Args:
        model: whose parameters; it has `blocks`.
        settings: as `make_adamw` takes them.
        rate: of the attention's parameters, over that of all else.
    """
    attention = {id(p) for block in model.blocks for p in block.attention.parameters()}
    plain = make_adamw(model, settings)
    slower = [group | {"share": rate} for group in narrowed(plain, lambda p: id(p) in attention)]
    return torch.optim.AdamW(narrowed(plain, lambda p: id(p) not in attention) + slower, fused=plain.defaults["fused"])


class TuckerAdamW(torch.optim.AdamW):
    """AdamW with groups of their own for the cores and the factors of Tucker Attentions, and what a recipe does after each step.

    Args:
        model: whose parameters.
        settings: as `make_adamw` takes them.
        recipe: what is done otherwise.

    Raises:
        ValueError: where key and value share one factor: no recipe here is meant for it.
    """

    def __init__(self, model: nn.Module, settings: TrainConfig, recipe: Recipe):
        layers = [module for module in model.modules() if isinstance(module, TuckerAttention)]
        if any(layer.shared_kv for layer in layers):
            raise ValueError(f"recipe {recipe.name!r} is not defined for a latent that keys and values share")
        self.recipe, self.tensors = recipe, [[layer.pre for layer in layers], [layer.post for layer in layers]]
        cores = [weights.core for side in self.tensors for weights in side]
        factors = [factor for side in self.tensors for weights in side for factor in weights.factors]
        special = {id(p) for p in (*cores, *factors)}
        plain = make_adamw(model, settings)
        groups = narrowed(plain, lambda p: id(p) not in special)
        decay = settings.weight_decay
        # Where factors stay orthonormal, the product's norm is the core's.
        core_decay = 0.0 if recipe.product_decay and not recipe.retracted else decay
        factor_decay = 0.0 if recipe.product_decay or recipe.retracted else decay
        groups += [
            {"params": cores, "weight_decay": core_decay, "share": recipe.core_rate},
            {"params": factors, "weight_decay": factor_decay, "share": recipe.factor_rate},
        ]
        self.product_decay = decay if recipe.product_decay and not recipe.retracted else 0.0
        super().__init__(groups, **{name: plain.defaults[name] for name in ("lr", "betas", "fused")})

    @torch.no_grad()
    def step(self, closure=None):
        """A step of AdamW, then the recipe's decay and retraction."""
        loss = super().step(closure)
        for side in self.tensors:
            if self.product_decay:
                decay_products(side, self.param_groups[0]["lr"] * self.product_decay)
            if self.recipe.retracted:
                retract(side, self.recipe.carried)
        return loss


@torch.no_grad()
def decay_products(tensors: list[TuckerWeights], share: float) -> None:
    """One step of gradient descent on half the squared norm of each attention tensor, taken by its core and factors.

    Args:
        tensors: of one shape, changed in place.
        share: size of the step.
    """
    cores, *factors = stacked(tensors)  # (l, r, s, t); (l, rows, rank) for each mode
    grams = [u.mT @ u for u in factors]  # (l, rank, rank)
    others = [  # the core with the other modes' Gram matrices applied, unfolded: (l, rank, the rest)
        times(times(cores, grams[a], a), grams[b], b).movedim(1 + n, 1).flatten(2)
        for n, (a, b) in enumerate(((1, 2), (0, 2), (0, 1)))
    ]
    slopes = [u @ (other @ cores.movedim(1 + n, 1).flatten(2).mT) for n, (u, other) in enumerate(zip(factors, others))]
    core_slope = times(times(times(cores, grams[0], 0), grams[1], 1), grams[2], 2)
    for i, weights in enumerate(tensors):
        weights.core.sub_(share * core_slope[i])
        for factor, slope in zip(weights.factors, slopes):
            factor.sub_(share * slope[i])


@torch.no_grad()
def retract(tensors: list[TuckerWeights], carried: bool) -> None:
    """U = Q R for every factor, with Q in its place: orthonormal columns again.

    Args:
        tensors: of one shape, changed in place.
        carried: R goes into the core, which leaves the attention tensor as it is. But Adam's steps lengthen the columns, so the
            core then grows with every step. Dropping R, the usual retraction to the Stiefel manifold, has no such effect.
    """
    cores, *factors = stacked(tensors)
    for n, u in enumerate(factors):
        r = torch.linalg.cholesky(u.mT @ u).mT  # upper triangular, (l, rank, rank)
        factors[n] = torch.linalg.solve_triangular(r, u, upper=True, left=False)
        if carried:
            cores = times(cores, r, n)
    for i, weights in enumerate(tensors):
        weights.core.copy_(cores[i])
        for factor, u in zip(weights.factors, factors):
            factor.copy_(u[i])


def stacked(tensors: list[TuckerWeights]) -> list[torch.Tensor]:
    """All layers at once: one kernel in place of one per layer.

    Args:
        tensors: of one shape.

    Returns:
        The cores (l, r, s, t), then the factors (l, rows, rank) of each mode.
    """
    return [torch.stack(parts) for parts in zip(*((w.core, *w.factors) for w in tensors))]


def times(cores: torch.Tensor, matrices: torch.Tensor, mode: int) -> torch.Tensor:
    """The mode product of every layer's core with its own matrix.

    Args:
        cores: (l, r, s, t).
        matrices: (l, any, rank of the mode).
        mode: 0, 1 or 2.

    Returns:
        As `cores`, with `any` in place of the mode's rank.
    """
    letters = "rst"
    return torch.einsum(f"l{letters},lz{letters[mode]}->l{letters.replace(letters[mode], 'z')}", cores, matrices)
