"""Llama and those that keep its names: grouped queries, half-split rotary embedding; some with biases, some with QK-norm.

Qwen3 and Gemma 3 normalise each head's queries and keys, OLMo 2 those of all heads together. Gemma's gains are 1 + weight, and
its layers of either kind have frequencies of their own. SmolLM3 leaves some layers without rotary embedding. What Mixtral does
between its attention layers changes none of them.
"""

from dataclasses import replace

from torch import nn

from .family import Family
from .layers import Turning, multi_head
from .opened import NEXT


def layer_of(attention: nn.Module, turning: Turning | None) -> nn.Module:
    return multi_head(attention.state_dict(), attention.head_dim, attention.scaling, turning, _eps(attention))


def gemma_layer_of(attention: nn.Module, turning: Turning | None) -> nn.Module:
    state = attention.state_dict()
    state |= {f"{norm}.weight": state[f"{norm}.weight"] + 1 for norm in ("q_norm", "k_norm")}
    return multi_head(state, attention.head_dim, attention.scaling, turning, _eps(attention))


def _eps(attention: nn.Module) -> float | None:
    """Of its norms of queries and keys, by either name that transformers has for it."""
    norm = getattr(attention, "q_norm", None)
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


LLAMA = Family(
    types=(
        "llama", "mistral", "ministral", "gemma", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "olmo2", "mixtral",
        "granite", "granitemoe", "smollm3", "starcoder2", "stablelm",
    ),
    head="AutoModelForCausalLM",
    predicts=NEXT,
    attention=(
        "LlamaAttention", "MistralAttention", "MinistralAttention", "GemmaAttention", "Qwen2Attention", "Qwen2MoeAttention",
        "Qwen3Attention", "Qwen3MoeAttention", "Olmo2Attention", "MixtralAttention", "GraniteAttention",
        "GraniteMoeAttention", "SmolLM3Attention", "Starcoder2Attention", "StableLmAttention",
    ),
    layer_of=layer_of,
)  # fmt: skip
OLMO = replace(
    LLAMA,
    types=("olmo",),
    attention=("OlmoAttention",),
    needed={"clip_qkv": (None, "it cuts off what is large in queries, keys and values, and is no product of weights then")},
)
GEMMA = Family(
    types=("gemma3_text",),
    head="AutoModelForCausalLM",
    predicts=NEXT,
    attention=("Gemma3Attention",),
    layer_of=gemma_layer_of,
)
