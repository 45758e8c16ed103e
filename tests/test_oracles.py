"""Outside oracles: Hugging Face's attention layers, randomly initialised, their weights loaded by name, outputs equal in float64.

Each layer then goes through `as_tucker` as well. Positions enter as cosines and sines computed here in float64; that our
frequencies are theirs is a test of its own, since theirs are float32.
"""

import pytest
import torch
from helpers import DIFFERENT, EXACT, relative_error, tokens, with_large_weights
from torch import nn

from tucker_ref import GroupedQueryAttention, Llama3Scaling, MultiHeadAttention, MultiHeadLatentAttention, Rotary, as_tucker

transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is in the dev extra")

D, HEADS, N = 64, 8, 11
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def cosines_and_sines(rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(N)[:, None] * rotary.frequencies  # (n, width / 2)
    angles = torch.cat([angles, angles], dim=-1)[None]  # (1, n, width), as Hugging Face lays them out
    return angles.cos(), angles.sin()


def causal_mask() -> torch.Tensor:
    return torch.zeros(1, 1, N, N, dtype=torch.float64).masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -torch.inf)


def check(layer: nn.Module, expected: torch.Tensor, x: torch.Tensor, causal: bool) -> None:
    """The layer, absorbed or not, and its Tucker form all equal the oracle."""
    assert relative_error(layer(x, causal=causal), expected) < EXACT
    assert relative_error(as_tucker(layer)(x, causal=causal), expected) < EXACT
    assert relative_error(layer(x, causal=not causal), expected) > DIFFERENT  # control


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scaling", [None, Llama3Scaling()], ids=["plain", "llama3"])
@pytest.mark.parametrize("n_kv_heads", [8, 2, 1])
def test_llama_attention(n_kv_heads, scaling, bias):
    from transformers.models.llama.modeling_llama import LlamaAttention

    config = transformers.LlamaConfig(
        hidden_size=D,
        num_attention_heads=HEADS,
        num_key_value_heads=n_kv_heads,
        attention_bias=bias,
        attn_implementation="sdpa",
    )
    oracle = with_large_weights(LlamaAttention(config, layer_idx=0))
    rotary = Rotary.heads(D // HEADS, base=500000.0, scaling=scaling)
    if n_kv_heads == HEADS:
        layer = MultiHeadAttention(D, HEADS, bias=bias, rotary=rotary).double()
    else:
        layer = GroupedQueryAttention(D, HEADS, n_kv_heads, bias=bias, rotary=rotary).double()
    layer.load_state_dict(oracle.state_dict())
    x = tokens(2, N, D)
    expected = oracle(x, position_embeddings=cosines_and_sines(rotary), attention_mask=causal_mask())[0]
    check(layer, expected, x, causal=True)
    layer.rotary = Rotary.heads(D // HEADS, base=500000.0, scaling=scaling, pairing="interleaved").double()
    assert relative_error(layer(x), expected) > DIFFERENT  # control: the other pairing


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 10000.0}, LLAMA3], ids=["plain", "llama3"])
def test_frequencies_are_those_of_transformers(rope):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=2048, num_attention_heads=32, rope_parameters=rope, max_position_embeddings=131072
    )
    theirs = LlamaRotaryEmbedding(config).inv_freq.double()
    scaling = Llama3Scaling() if rope["rope_type"] == "llama3" else None
    ours = Rotary.heads(64, base=rope["rope_theta"], scaling=scaling).frequencies
    assert ((ours - theirs).abs() <= 1e-6 * ours).all()  # theirs are float32
    assert not torch.allclose(Rotary.heads(64, base=20000.0).frequencies, theirs, rtol=1e-2)  # control


def deepseek(interleave: bool, q_lora_rank: int | None = 24):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    config = transformers.DeepseekV3Config(
        hidden_size=D,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=16,
        qk_nope_head_dim=10,
        qk_rope_head_dim=6,
        v_head_dim=12,
        rope_interleave=interleave,
        attn_implementation="sdpa",
    )
    return with_large_weights(DeepseekV3Attention(config, layer_idx=0))


@pytest.mark.parametrize("absorb", [False, True], ids=["plain", "absorbed"])
@pytest.mark.parametrize("interleave", [True, False], ids=["interleaved", "half"])
def test_deepseek_v3_attention(interleave, absorb):
    oracle = deepseek(interleave)
    rotary = Rotary.heads(6, pairing="interleaved" if interleave else "half")
    layer = MultiHeadLatentAttention(
        D, HEADS, 24, 16, head_dim=10, v_head_dim=12, rope_dim=6, latent_norm=True, rotary=rotary, absorb=absorb
    ).double()
    layer.load_state_dict(oracle.state_dict())
    x = tokens(2, N, D)
    arguments = dict(position_embeddings=cosines_and_sines(rotary), attention_mask=causal_mask())
    assert relative_error(layer(x), oracle(x, **arguments)[0]) < 1e-6  # theirs takes the norms in float32
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        norm = nn.RMSNorm(len(getattr(oracle, name).weight), eps=getattr(oracle, name).variance_epsilon)
        norm.weight = getattr(oracle, name).weight
        setattr(oracle, name, norm)  # torch's own, in float64
    check(layer, oracle(x, **arguments)[0], x, causal=True)


def test_deepseek_attention_whose_queries_have_no_latent():
    """q_lora_rank null (V2-Lite): the token itself is the query latent, not normalised."""
    oracle, rotary = deepseek(interleave=True, q_lora_rank=None), Rotary.heads(6, pairing="interleaved")
    options = dict(head_dim=10, v_head_dim=12, rope_dim=6, latent_norm=True, rotary=rotary)
    layer = MultiHeadLatentAttention(D, HEADS, D, 16, **options).double()
    layer.q_a_layernorm = nn.Identity()
    state = oracle.state_dict()
    layer.load_state_dict(state | {"q_b_proj.weight": state.pop("q_proj.weight"), "q_a_proj.weight": torch.eye(D)})
    norm = nn.RMSNorm(16, eps=oracle.kv_a_layernorm.variance_epsilon)
    norm.weight = oracle.kv_a_layernorm.weight
    oracle.kv_a_layernorm = norm  # torch's own, in float64
    x = tokens(2, N, D)
    check(layer, oracle(x, position_embeddings=cosines_and_sines(rotary), attention_mask=causal_mask())[0], x, causal=True)


def qwen3(n_kv_heads):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    sizes = dict(hidden_size=D, num_attention_heads=HEADS, num_key_value_heads=n_kv_heads, head_dim=12)
    config = transformers.Qwen3Config(**sizes, rms_norm_eps=1e-3, attn_implementation="sdpa")
    return Qwen3Attention(config, layer_idx=0), "head", 12, 12**-0.5


def gemma3(n_kv_heads):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention

    sizes = dict(hidden_size=D, num_attention_heads=HEADS, num_key_value_heads=n_kv_heads, head_dim=12)
    config = transformers.Gemma3TextConfig(**sizes, rms_norm_eps=1e-3, query_pre_attn_scalar=20, attn_implementation="sdpa")
    return Gemma3Attention(config, layer_idx=0), "head", 12, 20**-0.5


def olmo2(n_kv_heads):
    from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention

    sizes = dict(hidden_size=D, num_attention_heads=HEADS, num_key_value_heads=n_kv_heads)
    config = transformers.Olmo2Config(**sizes, rms_norm_eps=1e-3, attn_implementation="sdpa")
    return Olmo2Attention(config, layer_idx=0), "all", D // HEADS, (D // HEADS) ** -0.5


@pytest.mark.parametrize("n_kv_heads", [8, 2, 1])
@pytest.mark.parametrize("model", [qwen3, gemma3, olmo2])
def test_attention_with_qk_norm(model, n_kv_heads):
    """Theirs takes the norms in single precision; with torch's own in double precision it is the same to the last digits."""
    oracle, kind, head_dim, scale = model(n_kv_heads)
    oracle = with_large_weights(oracle).eval()
    rotary = Rotary.heads(head_dim)
    options = dict(head_dim=head_dim, rotary=rotary, qk_norm=kind)
    if n_kv_heads == HEADS:
        layer = MultiHeadAttention(D, HEADS, **options).double()
    else:
        layer = GroupedQueryAttention(D, HEADS, n_kv_heads, **options).double()
    layer.scale = scale
    state = oracle.state_dict()
    if model is gemma3:  # which multiplies by 1 + weight
        state |= {name: state[name] + 1 for name in ("q_norm.weight", "k_norm.weight")}
    layer.load_state_dict(state)
    layer.q_norm.eps = layer.k_norm.eps = 1e-3
    x = tokens(2, N, D)
    arguments = dict(position_embeddings=cosines_and_sines(rotary), attention_mask=causal_mask())
    assert relative_error(layer(x), oracle(x, **arguments)[0]) < 1e-6
    for name in ("q_norm", "k_norm"):
        norm = nn.RMSNorm(len(state[f"{name}.weight"]), eps=1e-3)
        norm.weight = nn.Parameter(state[f"{name}.weight"])
        setattr(oracle, name, norm)
    expected = oracle(x, **arguments)[0]
    check(layer, expected, x, causal=True)
    layer.q_norm.eps = 1.0
    assert relative_error(layer(x), expected) > DIFFERENT  # control
    layer.q_norm.eps, layer.k_norm.weight.data = 1e-3, layer.k_norm.weight.data.flip(0)
    assert relative_error(layer(x), expected) > DIFFERENT  # control


def test_gpt2_attention():
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    config = transformers.GPT2Config(n_embd=D, n_head=HEADS, attn_implementation="sdpa")
    oracle = with_large_weights(GPT2Attention(config, layer_idx=0)).eval()  # no dropout
    layer = MultiHeadAttention(D, HEADS, bias=True).double()
    with torch.no_grad():  # GPT-2 keeps q, k, v in one matrix that multiplies tokens from the right
        for i, projection in enumerate((layer.q_proj, layer.k_proj, layer.v_proj)):
            projection.weight.copy_(oracle.c_attn.weight.chunk(3, dim=1)[i].T)
            projection.bias.copy_(oracle.c_attn.bias.chunk(3)[i])
        layer.o_proj.weight.copy_(oracle.c_proj.weight.T)
        layer.o_proj.bias.copy_(oracle.c_proj.bias)
    x = tokens(2, N, D)
    check(layer, oracle(x, attention_mask=causal_mask())[0], x, causal=True)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_vit_attention(qkv_bias):
    from transformers.models.vit.modeling_vit import ViTAttention

    config = transformers.ViTConfig(hidden_size=D, num_attention_heads=HEADS, qkv_bias=qkv_bias, attn_implementation="sdpa")
    oracle = with_large_weights(ViTAttention(config))
    layer = MultiHeadAttention(D, HEADS, bias=True).double()
    missing = layer.load_state_dict(oracle.state_dict(), strict=False).missing_keys
    assert missing == ([] if qkv_bias else ["q_proj.bias", "k_proj.bias", "v_proj.bias"])  # which start at zero
    x = tokens(2, N, D)
    check(layer, oracle(x)[0], x, causal=False)
