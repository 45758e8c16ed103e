"""Opening: every architecture that is known here, as a tiny random checkpoint of transformers' own making, opened and compared.

Its own layers put back, written as Tucker Attention, compressed at full rank, saved and opened again must give transformers' own
logits, and text must go on as transformers continues it. A model altered in one option afterwards must be refused.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import nn
from tqdm import tqdm

from tucker_ref import MultiHeadAttention, as_tucker, compress

from ..models.public import agreement
from ..models.public.opened import OpenModel
from ..store.records import append, new_record
from ..train.options import Options
from ..train.public_models import open_model, sample

TAKES = ()
WIDTHS = dict(hidden_size=48, num_attention_heads=6, num_hidden_layers=2, intermediate_size=64)
TEXT = WIDTHS | dict(vocab_size=300, max_position_embeddings=64)
GROUPED = TEXT | dict(num_key_value_heads=2)
IMAGES = WIDTHS | dict(image_size=16, patch_size=4, num_labels=10)
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
NEW_TOKENS = 12


@dataclass(frozen=True)
class Architecture:
    """config, model: names of transformers' classes, and options of the first; which: what of its kind it stands for.

    option: what is altered for the control, and alter: the model, so.
    """

    name: str
    config: str
    model: str
    options: dict
    option: str
    alter: Callable[[nn.Module], None]
    which: str = ""

    @property
    def takes_text(self) -> bool:
        return "image_size" not in self.options and "vision_config" not in self.options

    @property
    def generates(self) -> bool:
        return self.model.endswith(("CausalLM", "LMHeadModel"))


def on_attention(name: str, value: Callable | object, part: str = "") -> Callable[[nn.Module], None]:
    """Alters an attribute of every attention module, or of this part of it."""

    def alter(model: nn.Module) -> None:
        for module in model.modules():
            owner = getattr(module, part, None) if part else module
            if type(module).__name__.endswith("Attention") and hasattr(owner, name):
                setattr(owner, name, value(getattr(owner, name)) if callable(value) else value)

    return alter


def on_rotary(name: str, value: Callable) -> Callable[[nn.Module], None]:
    """Alters an attribute of the rotary embedding."""

    def alter(model: nn.Module) -> None:
        module = next(module for module in model.modules() if hasattr(module, "rope_type"))
        setattr(module, name, value(getattr(module, name)))

    return alter


def twice(x):
    return 2 * x


ARCHITECTURES = (
    Architecture(
        "GPT-2", "GPT2Config", "GPT2LMHeadModel",
        dict(n_embd=48, n_head=6, n_layer=2, vocab_size=300, n_positions=64, scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx", on_attention("scaling", 8**-0.5),
    ),
    Architecture(
        "Llama", "LlamaConfig", "LlamaForCausalLM", GROUPED | dict(rope_parameters=LLAMA3),
        "rope_parameters.factor", on_rotary("inv_freq", twice), "Llama 3's frequencies",
    ),
    Architecture(
        "Llama", "LlamaConfig", "LlamaForCausalLM", GROUPED | dict(rope_parameters=YARN, attention_bias=True),
        "rope_parameters.attention_factor", on_rotary("attention_scaling", twice), "yarn, biases",
    ),
    Architecture(
        "Llama", "LlamaConfig", "LlamaForCausalLM", TEXT | dict(is_causal=False),
        "scaling", on_attention("scaling", twice), "sees the whole text",
    ),
    Architecture(
        "Mistral", "MistralConfig", "MistralForCausalLM", GROUPED | dict(sliding_window=5, head_dim=12),
        "rope_theta", on_rotary("inv_freq", torch.sqrt), "sliding window",
    ),
    Architecture(
        "Qwen2", "Qwen2Config", "Qwen2ForCausalLM", TEXT | dict(num_key_value_heads=6), "scaling", on_attention("scaling", twice)
    ),
    Architecture(
        "Qwen3", "Qwen3Config", "Qwen3ForCausalLM", GROUPED | dict(head_dim=12), "rms_norm_eps",
        on_attention("variance_epsilon", 1.0, "q_norm"),
    ),
    Architecture(
        "Gemma 3", "Gemma3TextConfig", "Gemma3ForCausalLM",
        GROUPED | dict(head_dim=12, query_pre_attn_scalar=20, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
        "rope_local_base_freq", on_rotary("sliding_attention_inv_freq", twice),
    ),
    Architecture(
        "OLMo 2", "Olmo2Config", "Olmo2ForCausalLM", GROUPED, "rms_norm_eps", on_attention("variance_epsilon", 1.0, "k_norm")
    ),
    Architecture(
        "Phi-3", "Phi3Config", "Phi3ForCausalLM", GROUPED | dict(pad_token_id=0, partial_rotary_factor=0.5), "partial_rotary_factor",
        on_rotary("inv_freq", torch.sqrt), "partial rotary embedding",
    ),
    Architecture(
        "Phi-3", "Phi3Config", "Phi3ForCausalLM",
        GROUPED | dict(pad_token_id=0, partial_rotary_factor=0.5, original_max_position_embeddings=32, rope_parameters=dict(
            rope_type="longrope", rope_theta=1e4, short_factor=[1.5, 2.0], long_factor=[4.0, 8.0], partial_rotary_factor=0.5,
            original_max_position_embeddings=32)),
        "rope_parameters.factor", on_rotary("attention_scaling", twice), "longrope",
    ),
    Architecture(
        "GPT-NeoX", "GPTNeoXConfig", "GPTNeoXForCausalLM", TEXT | dict(rotary_pct=0.5), "rotary_pct",
        on_rotary("inv_freq", torch.sqrt), "Pythia",
    ),
    Architecture(
        "OPT", "OPTConfig", "OPTForCausalLM",
        dict(hidden_size=48, num_attention_heads=6, num_hidden_layers=2, ffn_dim=64, vocab_size=300, max_position_embeddings=64,
             word_embed_proj_dim=48),
        "scaling", on_attention("scaling", twice),
    ),
    Architecture(
        "BERT", "BertConfig", "BertForMaskedLM", TEXT, "is_decoder", on_attention("is_causal", True, "self")
    ),
    Architecture(
        "BERT", "BertConfig", "BertModel", TEXT, "scaling", on_attention("scaling", twice, "self"), "without a head"
    ),
    Architecture(
        "RoBERTa", "RobertaConfig", "RobertaForMaskedLM", TEXT, "scaling", on_attention("scaling", twice, "self")
    ),
    Architecture("Granite", "GraniteConfig", "GraniteForCausalLM", GROUPED | dict(attention_multiplier=0.2, residual_multiplier=0.5),
                 "attention_multiplier", on_attention("scaling", 1.0)),
    Architecture("SmolLM3", "SmolLM3Config", "SmolLM3ForCausalLM", GROUPED | dict(no_rope_layers=[1, 0], pad_token_id=0),
                 "no_rope_layers", on_attention("use_rope", lambda on: 1 - on)),
    Architecture("Mixtral", "MixtralConfig", "MixtralForCausalLM", GROUPED | dict(num_local_experts=2), "rope_theta",
                 on_rotary("inv_freq", twice)),
    Architecture("ViT", "ViTConfig", "ViTForImageClassification", IMAGES, "scaling", on_attention("scaling", twice)),
    Architecture("DeiT", "DeiTConfig", "DeiTForImageClassification", IMAGES | dict(qkv_bias=False), "scaling",
                 on_attention("scaling", twice)),
    Architecture("DINOv2", "Dinov2Config", "Dinov2ForImageClassification", IMAGES | dict(mlp_ratio=2, layerscale_value=0.1),
                 "scaling", on_attention("scaling", twice), "layer scale"),
    Architecture("DINOv2", "Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", IMAGES | dict(mlp_ratio=2, num_register_tokens=3),
                 "is_causal", on_attention("is_causal", True), "with registers, without a head"),
    Architecture("SigLIP", "SiglipConfig", "SiglipForImageClassification",
                 dict(vision_config={k: v for k, v in IMAGES.items() if k != "num_labels"}, num_labels=10),
                 "scaling", on_attention("scale", twice)),
)  # fmt: skip


def tokenizer():
    """A small one, of transformers, which begins every text with a token of its own."""
    import transformers

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<s>", "[MASK]"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special, show_progress=False
    )
    learned.train_from_iterator(["some words to learn from, and some more words"] * 4, trainer)
    learned.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", special.index("<s>"))])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=learned, eos_token="<|endoftext|>", bos_token="<s>")


def make(architecture: Architecture) -> nn.Module:
    """With random weights, as large as trained ones: attention matters, and no head looks everywhere alike."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, architecture.config)(**architecture.options)
    model = getattr(transformers, architecture.model)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            else:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape))
    return model


def save(architecture: Architecture, folder: Path) -> nn.Module:
    """A checkpoint as transformers writes it, and the model."""
    model = make(architecture)
    model.save_pretrained(folder)
    if architecture.takes_text:
        tokenizer().save_pretrained(folder)
    return model
