"""GPT-2: queries, keys and values in one matrix that multiplies tokens from the right; learned positions."""

from torch import nn

from .family import Family
from .layers import Turning, multi_head
from .opened import NEXT


def layer_of(attention: nn.Module, _turning: Turning | None) -> nn.Module:
    state = {"o_proj.weight": attention.c_proj.weight.T, "o_proj.bias": attention.c_proj.bias}
    for name, weight, bias in zip("qkv", attention.c_attn.weight.T.chunk(3), attention.c_attn.bias.chunk(3)):
        state |= {f"{name}_proj.weight": weight, f"{name}_proj.bias": bias}
    return multi_head(state, attention.head_dim, attention.scaling)


GPT2 = Family(
    types=("gpt2",),
    head="AutoModelForCausalLM",
    predicts=NEXT,
    attention=("GPT2Attention",),
    layer_of=layer_of,
    needed={"add_cross_attention": (False, "its layers look at a second text as well (cross-attention)")},
)
