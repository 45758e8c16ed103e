"""Projections, norms and rotary embedding of an attention module as a multi-head or grouped-query layer of `tucker_ref`."""

from dataclasses import dataclass

import torch
from torch import nn

from tucker_ref import GroupedQueryAttention, MultiHeadAttention, Rotary

State = dict[str, torch.Tensor]
# Frequencies that stay the same for every text. "dynamic" ones change with its length, "longrope" has two sets.
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Turning:
    """The rotary embedding of a head.

    Args:
        frequencies: one per pair that turns, in radians a token; the channels behind those pairs do not turn.
        factor: what turned queries and keys are multiplied by (yarn, longrope).
        limit: the first position that has other frequencies, None if none has.
        pairing: as in `Rotary`.
    """

    frequencies: torch.Tensor
    factor: float = 1.0
    limit: int | None = None
    pairing: str = "half"

    @property
    def width(self) -> int:
        return 2 * len(self.frequencies)

    def rotary(self, head_dim: int) -> Rotary:
        """Partial rotary embedding turns the rest with frequency zero."""
        rest = head_dim - self.width
        if rest < 0:
            raise ValueError(f"its rotary embedding turns {self.width} channels of a head, which has {head_dim}")
        frequencies = torch.cat([self.frequencies, self.frequencies.new_zeros(rest // 2)])
        return Rotary(frequencies, self.pairing, (self.width, rest) if rest else None)


def check_rope_types(config) -> None:
    """Raise ValueError where frequencies change with the length of the text, or transformers does not know them."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for part in [part for part in parameters.values() if isinstance(part, dict)] or [parameters]:  # one per kind of layer
        kind = part.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            known = f"{', '.join(ROPE_TYPES[:-1])} and {ROPE_TYPES[-1]}"
            raise ValueError(f"its rotary embedding is of type {kind}; known are {known}")


def turning_of(model: nn.Module, attention: nn.Module, pairing: str) -> Turning | None:
    """How the model turns the queries and keys of one of its attention modules; None where it does not.

    Args:
        model: of transformers.
        attention: the module.
        pairing: as in `Rotary`; transformers does not say it.
    """
    embedding = next((module for module in model.modules() if hasattr(module, "rope_type")), None)
    if embedding is None or not getattr(attention, "use_rope", True):
        return None
    kind, parameters, prefix = embedding.rope_type, embedding.config.rope_parameters, ""
    if isinstance(kind, dict):  # one embedding per kind of layer (Gemma 3)
        layer_type = attention.layer_type
        kind, parameters, prefix = kind[layer_type], parameters[layer_type], f"{layer_type}_"
    return Turning(
        getattr(embedding, f"{prefix}inv_freq").double(),
        getattr(embedding, f"{prefix}attention_scaling"),
        parameters["original_max_position_embeddings"] if kind == "longrope" else None,
        pairing,
    )


def multi_head(
    state: State, head_dim: int, scale: float, turning: Turning | None = None, eps: float | None = None
) -> MultiHeadAttention:
    """MHA or GQA with these projections; biases that are missing beside others become zeros.

    Args:
        state: q_proj, k_proj, v_proj and o_proj, weights and biases; q_norm and k_norm.
        head_dim: k.
        scale: of the logits.
        turning: of each head.
        eps: of the norms.

    Raises:
        ValueError: for weights of another name.
    """
    queries, d_model = state["q_proj.weight"].shape
    keys = len(state["k_proj.weight"])
    bias = True if "o_proj.bias" in state else "qkv" if "q_proj.bias" in state else False
    options = dict(
        head_dim=head_dim, bias=bias, rotary=turning and turning.rotary(head_dim), qk_norm=_kind_of_norm(state, head_dim)
    )
    if keys == queries:
        layer = MultiHeadAttention(d_model, queries // head_dim, **options)
    else:
        layer = GroupedQueryAttention(d_model, queries // head_dim, keys // head_dim, **options)
    loaded(layer, state)
    layer.scale = scale
    if layer.qk_norm:
        layer.q_norm.eps = layer.k_norm.eps = eps
    if turning and turning.factor != 1:
        _multiply_turned(layer, turning)
    return layer.eval()


def loaded(layer: nn.Module, state: State) -> None:
    """The layer with these weights; biases that are missing stay zero.  Raises ValueError for weights of another name."""
    missing, unexpected = layer.load_state_dict(state, strict=False)
    if unexpected or any(not name.endswith("bias") for name in missing):
        raise ValueError(f"its attention holds {', '.join(unexpected or missing)}, which is not known here")


def _kind_of_norm(state: State, head_dim: int) -> str | None:
    if not {"q_norm.weight", "k_norm.weight"} <= state.keys():
        return None
    return "head" if len(state["q_norm.weight"]) == head_dim else "all"


@torch.no_grad()
def _multiply_turned(layer: MultiHeadAttention, turning: Turning) -> None:
    """The factor of turned queries and keys, in the scale where all channels turn, else in the weights of those that do."""
    if turning.width == layer.head_dim:
        layer.scale *= turning.factor**2
        return
    if layer.qk_norm:
        raise ValueError("it turns a part of normalised heads, and multiplies it: not known here")
    for projection in (layer.q_proj, layer.k_proj):
        for tensor in projection.parameters():
            tensor.unflatten(0, (-1, layer.head_dim))[:, : turning.width] *= turning.factor
