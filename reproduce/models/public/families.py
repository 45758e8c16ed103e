"""All families that are known here, and what is refused before a weight is read."""

from .bert import BERT
from .deepseek import DEEPSEEK
from .family import Family
from .gpt2 import GPT2
from .gpt_neox import GPT_NEOX
from .layers import check_rope_types
from .llama import GEMMA, LLAMA, OLMO
from .opened import CLASS
from .opt import OPT
from .phi3 import PHI3
from .vit import SIGLIP, VIT

FAMILIES = (GPT2, LLAMA, OLMO, GEMMA, PHI3, DEEPSEEK, GPT_NEOX, OPT, BERT, VIT, SIGLIP)
TYPES = tuple(name for family in FAMILIES for name in family.types)
IMAGE_TYPES = tuple(name for family in FAMILIES if family.predicts == CLASS for name in family.types)
ADDS = "adds something to its logits that is no product of queries and keys"
GROWS = "it multiplies queries by a number that grows with their position"
TWO = "its layers look at a second text or sound as well (cross-attention)"
WHY_NOT = {  # of what people ask for: why no layer here computes it, and so no Tucker Attention
    "gemma2": "it caps its logits (softcapping), after which they are no product of queries and keys",
    "gemma3": "it reads images as well; save its text part alone (gemma3_text)",
    "gpt_oss": "its softmax counts one more logit, that of no token (attention sinks)",
    "llama4": GROWS,
    "llama4_text": GROWS,
    "ministral3": GROWS,
    "falcon_mamba": "it has no attention",
    "mamba2": "it has no attention",
    "albert": "its layers are one layer, repeated",
    "whisper": TWO,
    "bart": TWO,
    "mbart": TWO,
    "marian": TWO,
    "t5": f"it {ADDS} (relative positions)",
    "mt5": f"it {ADDS} (relative positions)",
    "umt5": f"it {ADDS} (relative positions)",
    "deberta": f"it {ADDS} (relative positions)",
    "swinv2": f"it {ADDS} (relative positions), and looks through windows",
    "data2vec-vision": f"it {ADDS} (relative positions)",
    "bloom": f"it {ADDS} (ALiBi)",
    "mpt": f"it {ADDS} (ALiBi)",
    "deberta-v2": f"it {ADDS} (relative positions)",
    "swin": f"it {ADDS} (relative positions), and looks through windows",
    "beit": f"it {ADDS} (relative positions)",
    "cohere": "it normalises each head's queries by their mean and variance (LayerNorm)",
    "mamba": "it has no attention",
    "rwkv": "it has no attention",
}


def check_windows(config) -> None:
    """Raise ValueError for a window that is none of this model type's options.

    The layers of transformers then look at the whole text, and its cache forgets what lies before the window all the same: what is
    generated depends on the cache.
    """
    for option in ("sliding_window", "attention_chunk_size"):
        window = getattr(config, option, None)
        if window is not None and not hasattr(type(config), option) and window < config.max_position_embeddings:
            raise ValueError(f"{option} is {window}, which {config.model_type} has not: remove it from config.json")


def family_of(config) -> Family:
    """Whose model this configuration, of transformers, is of.

    Raises ValueError for a model type that is not known here, or an option that no layer here has.
    """
    family = next((family for family in FAMILIES if config.model_type in family.types), None)
    if family is None:
        why = f" ({WHY_NOT[config.model_type]})" if config.model_type in WHY_NOT else ""
        raise ValueError(f"its model type is {config.model_type}{why}; known here are {', '.join(TYPES)}")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("its weights are quantised (quantization_config); open a checkpoint in full precision")
    check_windows(config)
    check_rope_types(config)
    for option, (value, why) in family.needed.items():
        if getattr(config, option, value) != value:
            raise ValueError(f"{option} is {getattr(config, option)}: {why}")
    return family
