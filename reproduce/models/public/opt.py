"""OPT: multi-head attention with biases and learned positions; its output projection is called out_proj."""

from torch import nn

from .family import Family
from .layers import Turning, multi_head
from .opened import NEXT


def layer_of(attention: nn.Module, _turning: Turning | None) -> nn.Module:
    state = {name.replace("out_proj", "o_proj"): tensor for name, tensor in attention.state_dict().items()}
    return multi_head(state, attention.head_dim, attention.scaling)


OPT = Family(types=("opt",), head="AutoModelForCausalLM", predicts=NEXT, attention=("OPTAttention",), layer_of=layer_of)
