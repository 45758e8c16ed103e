"""Phi-3: queries, keys and values in one matrix, one after the other; of Phi-4 mini's heads only a part turns."""

from torch import nn

from .family import Family
from .layers import Turning, multi_head
from .opened import NEXT


def layer_of(attention: nn.Module, turning: Turning | None) -> nn.Module:
    keys = attention.num_key_value_heads * attention.head_dim
    weight = attention.qkv_proj.weight  # (q + 2 k, d)
    q, k, v = weight.split([len(weight) - 2 * keys, keys, keys])
    state = {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "o_proj.weight": attention.o_proj.weight}
    return multi_head(state, attention.head_dim, attention.scaling, turning)


PHI3 = Family(
    types=("phi3",), head="AutoModelForCausalLM", predicts=NEXT, attention=("Phi3Attention",), layer_of=layer_of
)  # fmt: skip
