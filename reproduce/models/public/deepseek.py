"""DeepSeek-V2 and V3: latent attention with a decoupled rotary key, RMSNorm on its latents, yarn's scale.

Where `q_lora_rank` is null (V2-Lite) queries have no latent of their own: the token itself is it, with the identity as W^DQ.
"""

import torch
from torch import nn

from tucker_ref import MultiHeadLatentAttention

from .family import Family
from .layers import Turning, loaded
from .opened import NEXT


@torch.no_grad()
def layer_of(attention: nn.Module, turning: Turning | None) -> nn.Module:
    state, d_model, rope = attention.state_dict(), attention.hidden_size, attention.qk_rope_head_dim
    if attention.q_lora_rank is None:
        state["q_b_proj.weight"] = state.pop("q_proj.weight")
        state["q_a_proj.weight"] = torch.eye(d_model)
    layer = MultiHeadLatentAttention(
        d_model,
        attention.num_heads,
        attention.q_lora_rank or d_model,
        attention.kv_lora_rank,
        head_dim=attention.qk_nope_head_dim,
        v_head_dim=attention.v_head_dim,
        rope_dim=rope,
        latent_norm=True,
        rotary=turning.rotary(rope),
    )
    if attention.q_lora_rank is None:
        layer.q_a_layernorm = nn.Identity()
    loaded(layer, state)
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        if (norm := getattr(attention, name)) is not None:
            getattr(layer, name).eps = norm.variance_epsilon
    layer.scale = attention.scaling
    layer.q_b_proj.weight.unflatten(0, (attention.num_heads, -1))[:, -rope:] *= turning.factor
    layer.kv_a_proj_with_mqa.weight[-rope:] *= turning.factor
    return layer.eval()


def pairing_of(config) -> str:
    """V2 turns neighbours; V3 does, unless it says otherwise."""
    return "interleaved" if config.model_type == "deepseek_v2" or config.rope_interleave else "half"


DEEPSEEK = Family(
    types=("deepseek_v2", "deepseek_v3"),
    head="AutoModelForCausalLM",
    predicts=NEXT,
    attention=("DeepseekV2Attention", "DeepseekV3Attention"),
    layer_of=layer_of,
    pairing=pairing_of,
)
