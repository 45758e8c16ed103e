"""BERT, RoBERTa and XLM-R: every token sees every other; behind the output projection stands a LayerNorm, which stays as it is."""

from torch import nn

from .family import Family
from .layers import Turning, multi_head
from .opened import MASKED

NAMES = {"self.query": "q_proj", "self.key": "k_proj", "self.value": "v_proj", "output.dense": "o_proj"}
DECODES = "it is a decoder here, and known here as an encoder"


def layer_of(attention: nn.Module, _turning: Turning | None) -> nn.Module:
    state = {
        f"{ours}.{part}": tensor
        for theirs, ours in NAMES.items()
        for part, tensor in attention.get_submodule(theirs).state_dict().items()
    }
    return multi_head(state, attention.self.attention_head_size, attention.self.scaling)


BERT = Family(
    types=("bert", "roberta", "xlm-roberta"),
    head="AutoModelForMaskedLM",
    predicts=MASKED,
    attention=("BertAttention", "RobertaAttention", "XLMRobertaAttention"),
    layer_of=layer_of,
    without_head={"BertModel": "BertModel", "RobertaModel": "RobertaModel", "XLMRobertaModel": "XLMRobertaModel"},
    bare={"add_pooling_layer": False},
    unused=r"(bert\.|roberta\.)?(pooler\.|embeddings\.position_ids)|cls\.seq_relationship\.",
    norm_of=lambda attention: attention.output.LayerNorm,
    needed={
        "is_decoder": (False, DECODES),
        "add_cross_attention": (False, "its layers look at a second text (cross-attention)"),
        "position_embedding_type": ("absolute", "it adds distances to its logits, which no layer here knows"),
    },
)
