"""GPT-NeoX and Pythia: query, key and value of each head side by side in one matrix; the first quarter of a head turns."""

from torch import nn

from .family import Family
from .layers import Turning, multi_head
from .opened import NEXT


def layer_of(attention: nn.Module, turning: Turning | None) -> nn.Module:
    state = {f"o_proj.{part}": tensor for part, tensor in attention.dense.state_dict().items()}
    for part, tensor in attention.query_key_value.state_dict().items():
        for name, own in zip("qkv", tensor.unflatten(0, (-1, 3, attention.head_size)).unbind(1)):  # (h, k, d) each
            state[f"{name}_proj.{part}"] = own.flatten(0, 1)
    return multi_head(state, attention.head_size, attention.scaling, turning)


GPT_NEOX = Family(
    types=("gpt_neox",), head="AutoModelForCausalLM", predicts=NEXT, attention=("GPTNeoXAttention",), layer_of=layer_of
)  # fmt: skip
