"""Opening: every architecture that is known here, as a tiny random checkpoint of transformers' own making, opened and compared.

Its own layers put back, written as Tucker Attention, compressed at full rank, saved and opened again must give transformers' own
logits, and text must go on as transformers continues it. A model altered in one option afterwards must be refused.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import nn
from tqdm import tqdm

from tucker_ref import MultiHeadAttention, as_tucker, compress

from ..models.public import agreement
from ..models.public.families import family_of
from ..models.public.opened import OpenModel
from ..report.results import render
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
LATENT = GROUPED | dict(kv_lora_rank=16, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=12, num_key_value_heads=6)
LATENT |= dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=32, n_shared_experts=1)
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
        return self.model.endswith(("CausalLM", "LMHeadModel")) and self.options.get("is_causal", True)


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
        "Ministral", "MinistralConfig", "MinistralForCausalLM",
        GROUPED | dict(head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"]), "scaling",
        on_attention("scaling", twice), "sliding window in one layer of two",
    ),
    Architecture(
        "Gemma", "GemmaConfig", "GemmaForCausalLM", TEXT | dict(num_key_value_heads=1, head_dim=12), "rope_theta",
        on_rotary("inv_freq", twice),
    ),
    Architecture(
        "Qwen3-MoE", "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        GROUPED | dict(head_dim=12, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32), "rms_norm_eps",
        on_attention("variance_epsilon", 1.0, "k_norm"),
    ),
    Architecture(
        "Qwen2", "Qwen2Config", "Qwen2ForCausalLM", TEXT | dict(num_key_value_heads=6), "scaling", on_attention("scaling", twice)
    ),
    Architecture(
        "Qwen2-MoE", "Qwen2MoeConfig", "Qwen2MoeForCausalLM",
        GROUPED | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32),
        "rope_theta", on_rotary("inv_freq", torch.sqrt),
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
    Architecture("OLMo", "OlmoConfig", "OlmoForCausalLM", GROUPED, "rope_theta", on_rotary("inv_freq", twice)),
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
    *(
        Architecture(
            f"DeepSeek-{version}",
            f"DeepseekV{version[1]}Config",
            f"DeepseekV{version[1]}ForCausalLM",
            LATENT | dict(rope_parameters=YARN | more) | dict(q_lora_rank=q_rank),
            option,
            alter,
            which,
        )
        for version, q_rank, more, option, alter, which in (
            ("V2", 24, {}, "rope_parameters.attention_factor", on_rotary("attention_scaling", twice), "yarn"),
            ("V2", None, {}, "scaling", on_attention("scaling", twice), "q_lora_rank null (V2-Lite)"),
            ("V3", 24, dict(mscale=1.0, mscale_all_dim=0.7), "rope_parameters.mscale_all_dim", on_attention("scaling", 16**-0.5), "yarn"),
        )
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
    Architecture(
        "XLM-R", "XLMRobertaConfig", "XLMRobertaModel", TEXT, "is_decoder", on_attention("is_causal", True, "self"),
        "without a head",
    ),
    Architecture("Granite", "GraniteConfig", "GraniteForCausalLM", GROUPED | dict(attention_multiplier=0.2, residual_multiplier=0.5),
                 "attention_multiplier", on_attention("scaling", 1.0)),
    Architecture("Granite-MoE", "GraniteMoeConfig", "GraniteMoeForCausalLM",
                 GROUPED | dict(attention_multiplier=0.2, num_local_experts=4, num_experts_per_tok=2), "attention_multiplier",
                 on_attention("scaling", 1.0)),
    Architecture("StarCoder2", "Starcoder2Config", "Starcoder2ForCausalLM", GROUPED | dict(sliding_window=5), "rope_theta",
                 on_rotary("inv_freq", twice), "sliding window, biases"),
    Architecture("StableLM", "StableLmConfig", "StableLmForCausalLM", GROUPED | dict(use_qkv_bias=True), "rope_theta",
                 on_rotary("inv_freq", twice), "partial rotary embedding"),
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


def run(options: Options) -> None:
    """One record: every architecture, and how exactly it opens.  Raises ValueError if one does not."""
    started, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for number, architecture in enumerate(tqdm(ARCHITECTURES, "opening")):
            rows.append(measure(architecture, Path(folder) / str(number)))
    metrics = {"architectures": rows, "allowed": {"hidden": agreement.HIDDEN, "layer": agreement.LAYER}}
    wall = time.perf_counter() - started
    record = new_record("opening", "tests", "tiny random checkpoints", {"float": 32}, metrics, seed=0, wall_seconds=wall)
    append(options.records, record, replace=True)
    print(render([record]))


@torch.no_grad()
def measure(architecture: Architecture, folder: Path) -> dict:
    """Relative differences from transformers' own logits, of the model in every form; tokens that were generated alike."""
    theirs = save(architecture, folder)
    opened = open_model(str(folder))
    x = sample(opened)
    expected = opened.logits(theirs, x)

    def error(other: OpenModel) -> float:
        return agreement.relative(other.logits(other.model, x), expected)

    errors, generated = {"opened": error(opened)}, {}
    own = dict(opened.layers)
    opened.put(own)
    errors["own layers"] = error(opened)
    generated["own layers"] = continued(opened, theirs, x) if architecture.generates else None
    opened.put({place: as_tucker(layer) for place, layer in own.items()})
    errors["Tucker"] = error(opened)
    generated["Tucker"] = continued(opened, theirs, x) if architecture.generates else None
    opened.save(folder / "tucker.safetensors")
    errors["saved"] = error(open_model(str(folder / "tucker.safetensors")))
    if has_tensors(own):
        opened.put({place: compress(layer, full_ranks(layer)) for place, layer in own.items()})
        errors["compressed"] = error(opened)
    return {
        "name": architecture.name,
        "which": architecture.which,
        "type": theirs.config.model_type,
        "errors": {name: float(f"{value:.2g}") for name, value in errors.items()},
        "generated": generated,
        "option": architecture.option,
        "refused": refusal(architecture, folder),
        "refuses": refuses(opened, theirs.config),
    }


def continued(opened: OpenModel, theirs: nn.Module, x: torch.Tensor) -> dict:
    """How many tokens transformers' `generate` adds on caches of our layers, and how many of them are those of the original."""
    prompt, options = x[:, :6], dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    options |= dict(attention_mask=torch.ones_like(prompt), use_cache=True)
    expected = theirs.generate(prompt, **options)
    cache = opened.new_cache(len(prompt), expected.shape[1])
    found = opened.model.generate(prompt, past_key_values=cache, **options)
    return {"tokens": expected[:, 6:].numel(), "same": int((found == expected)[:, 6:].sum())}


def refuses(opened: OpenModel, config) -> list[str]:
    """Options of such a model with which it does not open."""
    options = [f"{option} not {value}" for option, (value, _) in family_of(config).needed.items()]
    options += ["images that are not square"] if not opened.takes_text else []
    options += ["rope_type dynamic"] if opened.config()["rotary"] else []
    limits = {opened.wrap(place, layer).limit for place, layer in opened.layers.items()} - {None}
    return options + [f"positions from {limit} on" for limit in limits]


def has_tensors(layers: dict[str, nn.Module]) -> bool:
    """Whether nothing stands between the weights of these layers."""
    return not any(getattr(layer, "qk_norm", None) or getattr(layer, "latent_norm", None) for layer in layers.values())


def full_ranks(layer: MultiHeadAttention) -> tuple[int, int, int]:
    """Of heads, queries and keys: nothing is cut."""
    rows, inner = layer.d_model + bool(layer.bias), layer.n_heads * layer.head_dim
    return layer.n_heads, min(rows, layer.d_model, inner), layer.k_proj.out_features


def refusal(architecture: Architecture, folder: Path) -> float:
    """How far the model is from its layers when one option of it is altered behind their back.  Raises ValueError if that passes."""
    opened = open_model(str(folder))
    architecture.alter(opened.model)
    try:
        agreement.compare(opened, sample(opened))
    except agreement.Differs as error:
        return float(f"{error.hidden:.2g}")
    raise ValueError(f"{architecture.name}: altered in {architecture.option}, it is not refused")
