"""Text and images as a public model was trained on them: its special tokens, its pixels; what does not fit is refused in a line."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import relative_error
from tokenizers import Tokenizer, models

from reproduce.experiments import compress
from reproduce.models.public import inputs
from reproduce.models.public.opened import MASKED, NOTHING
from reproduce.report import results
from reproduce.store import records
from reproduce.train.options import Options
from reproduce.train.public_models import open_model, sample
from reproduce.trust import opening
from tucker_ref import GroupedQueryAttention, MultiHeadAttention

transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is in the public extra")
BY_NAME = {(a.name, a.which): a for a in opening.ARCHITECTURES}
LLAMA, VIT, BERT, BARE = (
    BY_NAME[key] for key in (("Llama", "Llama 3's frequencies"), ("ViT", ""), ("BERT", ""), ("BERT", "without a head"))
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    opening.save(LLAMA, folder := tmp_path_factory.mktemp("public") / "llama")
    return folder


def options(tmp_path, model, **more) -> Options:
    return Options("smoke", tmp_path, tmp_path / "records", model=str(model), **more)


def test_windows_begin_with_the_token_that_the_model_was_trained_to_see_there(llama, text, tmp_path):
    given = options(tmp_path, llama, text=str(text), ranks=((4, 16, 8),))
    opened = open_model(str(llama))
    samples = compress.text_samples(opened, given)
    (first,) = {int(token) for batch in (*samples.calibration, *samples.test) for token in batch[:, 0]}
    assert inputs.whole(opened.tokenizer).id_to_token(first) == "<s>" and samples.describe()["begins_with"] == ["<s>"]
    assert all((batch[:, 1:] != first).all() for batch in samples.calibration)
    assert samples.describe()["calibration"] == compress.BATCHES * compress.WINDOWS * 64  # windows are as long as its context
    for x, y in zip(samples.test, samples.targets):
        assert torch.equal(x[:, 1:], y[:, :-1])  # each token predicts the next
    compress.run(given)
    (record,) = records.load(given.records, "compress")
    assert record.data["begins_with"] == ["<s>"] and record.metrics["opening"]["hidden"] < 1e-5
    plain = Tokenizer.from_str(opened.tokenizer)
    plain.post_processor = None
    opened.tokenizer = plain.to_str()  # control: one that begins with nothing
    without = compress.text_samples(opened, given)
    assert "begins_with" not in without.describe() and without.describe()["calibration"] == samples.describe()["calibration"]
    assert first not in without.calibration[0]


@pytest.mark.parametrize("kept", ["truncation", "truncation and padding"])
def test_what_a_tokenizer_keeps_from_training_is_off(kept, llama, text, tmp_path):
    opened, given = open_model(str(llama)), options(tmp_path, llama, text=str(text))
    expected = compress.text_samples(opened, given)
    trained = Tokenizer.from_str(opened.tokenizer)
    trained.enable_truncation(16)
    if "padding" in kept:
        trained.enable_padding(length=512, pad_id=0)
    assert len(trained.encode("words " * 99).ids) in (16, 512)  # control
    opened.tokenizer = trained.to_str()
    found = compress.text_samples(opened, given)
    assert all(map(torch.equal, found.calibration + found.test, expected.calibration + expected.test))


def test_a_token_beyond_the_embedding_is_one_line(llama, text, tmp_path):
    opened = open_model(str(llama))
    opened.vocabulary = 40
    with pytest.raises(ValueError, match=r"llama: its tokenizer makes token \d+, beyond the 40 of its embedding"):
        compress.text_samples(opened, options(tmp_path, llama, text=str(text)))


def test_a_text_of_one_line_is_cut_between_words(llama, tmp_path):
    (tmp_path / "line.txt").write_text("some words and more " * 3000, encoding="utf-8")
    samples = compress.text_samples(open_model(str(llama)), options(tmp_path, llama, text=str(tmp_path / "line.txt")))
    assert samples.test and samples.calibration
    (tmp_path / "few.txt").write_text("some words " * 80, encoding="utf-8")
    with pytest.raises(ValueError, match="the held-out part of few.txt holds fewer than one window of 64 tokens"):
        compress.text_samples(open_model(str(llama)), options(tmp_path, llama, text=str(tmp_path / "few.txt")))


def test_a_model_without_its_tokenizer_opens_and_text_says_what_it_needs(llama, text, tmp_path):
    LLAMA_ONLY = tmp_path / "alone"
    opening.make(LLAMA).save_pretrained(LLAMA_ONLY)
    opened = open_model(str(LLAMA_ONLY))
    assert opened.tokenizer is None and opened.agreement["hidden"] < 1e-5 and len(opened.layers) == 2
    with pytest.raises(ValueError, match="alone: text needs its tokenizer, and none can be read beside it: ."):
        compress.run(options(tmp_path, LLAMA_ONLY, text=str(text)))
    none = Tokenizer(models.BPE())
    transformers.PreTrainedTokenizerFast(tokenizer_object=none).save_pretrained(LLAMA_ONLY)
    with pytest.raises(ValueError, match="its tokenizer.json has no vocabulary in .*alone$"):
        inputs.tokenizer_of(str(LLAMA_ONLY))
    assert sample(open_model(str(LLAMA_ONLY))).shape == (2, 24)  # of a tokenizer without a single letter: any tokens


@pytest.mark.parametrize("kind", ["GPT2Config", "BertConfig", "Gemma3TextConfig", "T5Config"])
def test_a_tokenizer_that_only_its_class_makes_is_none(kind, llama, tmp_path):
    getattr(transformers, kind)().save_pretrained(tmp_path)  # of which transformers makes a tokenizer without a vocabulary
    made = transformers.AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer
    assert len(made.encode("Some words to read", add_special_tokens=False).ids) <= 8 and len(made.get_vocab()) < 110  # control
    with pytest.raises(ValueError) as said:
        inputs.tokenizer_of(str(tmp_path))
    assert str(said.value) == f"there is no tokenizer.json, and no other vocabulary in {tmp_path}"
    assert len(Tokenizer.from_str(inputs.tokenizer_of(str(llama))).encode("Some words to read").ids) > 8  # control


def test_an_encoder_is_asked_for_the_tokens_that_were_hidden(text, tmp_path):
    opening.save(BERT, tmp_path / "bert")
    given = options(tmp_path, tmp_path / "bert", text=str(text), ranks=((4, 16, 16),))
    opened = open_model(str(tmp_path / "bert"))
    samples, mask = compress.text_samples(opened, given), inputs.whole(opened.tokenizer).token_to_id("[MASK]")
    for x, y in zip(samples.test, samples.targets):
        hidden = x == mask
        assert torch.equal(hidden, y != compress.NOT_ASKED) and hidden.float().mean() == pytest.approx(9 / 64)
    compress.run(given)
    (record,) = records.load(given.records, "compress")
    with torch.no_grad():
        logits = torch.cat([opened.logits(opened.model, x) for x in samples.test]).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, torch.cat(samples.targets).flatten())  # ignores -100 by itself
    assert record.metrics["before"]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    nameless = SimpleNamespace(predicts=MASKED)
    inputs_alone, targets = compress.questions(nameless, Tokenizer(models.BPE()), torch.zeros(3, 8))
    assert torch.equal(torch.cat(inputs_alone), torch.zeros(3, 8)) and targets == []  # no token to hide others behind


def test_what_predicts_nothing_is_compared_by_its_features(text, tmp_path):
    opening.save(BARE, tmp_path / "bare")
    given = options(tmp_path, tmp_path / "bare", text=str(text), ranks=((4, 16, 16), (6, 48, 48)))
    assert open_model(str(tmp_path / "bare")).predicts == NOTHING
    compress.run(given)
    kept = records.load(given.records, "compress")
    small, whole = (record.metrics["ways"]["aware"]["similarity"] for record in kept)
    assert small < whole <= 1 + 1e-5 and whole > 0.999 and "loss" not in kept[0].metrics["before"]
    assert "cosine with before" in results.render(kept, ["compress"])


def processor(folder, **said) -> str:
    (folder / "preprocessor_config.json").write_text(json.dumps(said), encoding="utf-8")
    return str(folder)


BYTES = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(1)).float()
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def channels(values: list[float]) -> torch.Tensor:
    return torch.tensor(values)[:, None, None]


SAID = {
    "usual": (dict(image_mean=MEAN, image_std=STD), lambda x: (x / 255 - channels(MEAN)) / channels(STD)),
    "do_normalize false": (dict(do_normalize=False, image_mean=MEAN, image_std=STD), lambda x: x / 255),
    "do_rescale false": (
        dict(do_rescale=False, image_mean=[127.5] * 3, image_std=[64.0] * 3, do_resize=True), lambda x: (x - 127.5) / 64.0,
    ),
    "rescale_factor": (dict(rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3), lambda x: x / 127.5 - 1),
    "one number for all channels": (dict(image_mean=0.5, image_std=0.25), lambda x: (x / 255 - 0.5) / 0.25),
}  # fmt: skip


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    model = opening.save(VIT, folder := tmp_path_factory.mktemp("public") / "vit")
    return model, folder


@pytest.mark.parametrize("name", SAID)
@torch.no_grad()
def test_images_enter_as_the_preprocessor_says(name, vit, tmp_path):
    model, folder = vit
    said, expected = SAID[name]
    opened = open_model(processor(folder, **said))
    want = model(expected(BYTES)).logits
    assert relative_error(opened.logits(opened.model, BYTES / 127.5 - 1), want) < 1e-5
    opened.put({place: opening.as_tucker(layer) for place, layer in opened.layers.items()})
    opened.save(tmp_path / "m.safetensors")
    again = open_model(str(tmp_path / "m.safetensors"))
    assert relative_error(again.logits(again.model, BYTES / 127.5 - 1), want) < 1e-5
    if name != "usual":  # control
        assert relative_error(model((BYTES / 255 - channels(MEAN)) / channels(STD)).logits, want) > 1e-3


@torch.no_grad()
def test_a_file_from_before_factors_opens(vit, tmp_path):
    model, folder = vit
    opened = open_model(processor(folder, image_mean=MEAN, image_std=STD))
    public = json.loads(opened.metadata["public"])
    opened.metadata["public"] = json.dumps(public | {"pixels": [MEAN, STD]})
    opened.put({place: opening.as_tucker(layer) for place, layer in opened.layers.items()})
    opened.save(tmp_path / "m.safetensors")
    again = open_model(str(tmp_path / "m.safetensors"))
    want = model((BYTES / 255 - channels(MEAN)) / channels(STD)).logits
    assert relative_error(again.logits(again.model, BYTES / 127.5 - 1), want) < 1e-5


@pytest.mark.parametrize(
    "said, message",
    [
        (dict(do_flip_channel_order=True), "says do_flip_channel_order, which is not known here"),
        (dict(do_normalize=True), "standardises images, and has no image_mean and image_std"),
        (dict(image_mean=[0.5], image_std=[0.5]), r"has 1 numbers in image_mean; the model has 3 channels"),
    ],
)
def test_steps_of_a_preprocessor_that_are_not_known_are_refused(said, message, vit):
    with pytest.raises(ValueError, match=f"--model .*vit cannot be opened: preprocessor_config.json {message}"):
        open_model(processor(vit[1], **said))


def test_a_grey_model_takes_grey_images_and_refuses_colours_in_a_line(tmp_path):
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT.options | {"num_channels": 1}))
    model.save_pretrained(tmp_path / "grey")
    random = np.random.default_rng(0)
    for name, depth in (("grey", ()), ("colour", (3,))):
        x, y = random.integers(0, 256, (40, 16, 16, *depth)).astype(np.uint8), np.arange(40) % 10
        np.savez(tmp_path / f"{name}.npz", x_train=x, y_train=y, x_test=255 - x, y_test=y)
    given = dict(ranks=((6, 24, 24),))
    compress.run(options(tmp_path, tmp_path / "grey", images=str(tmp_path / "grey.npz"), **given))  # control
    with pytest.raises(ValueError, match="grey takes images of 1 channel; these have 3"):
        compress.run(options(tmp_path, tmp_path / "grey", images=str(tmp_path / "colour.npz"), **given))


def test_default_rows_reckon_with_the_layer_s_own_head_width():
    nemo = dict(d_model=5120, n_heads=32, n_kv_heads=8, head_dim=128, bias=False)  # Mistral-Nemo: 32 heads of 128 in 5,120
    rows = compress.default_rows(nemo)
    assert [row.label for row in rows if row.mechanism == "GQA"] == ["GQA n_KV=4", "GQA n_KV=2", "MQA"]
    assert not [r for r in rows if r.cost(5120, 32, 128).parameters >= 2 * 5120 * 128 * (32 + 8)]
    narrow = dict(d_model=1024, n_heads=16, n_kv_heads=8, head_dim=128, bias=False)
    assert all(row.cost(1024, 16, 128).parameters < 2 * 1024 * 128 * (16 + 8) for row in compress.default_rows(narrow))


@pytest.mark.parametrize("d, h, g, width", [(512, 4, 1, 64), (128, 4, 1, 64), (512, 4, 4, 16), (24, 4, 4, 64), (10, 8, 1, 4)])
def test_default_rows_can_be_converted_to(d, h, g, width):
    """Few narrow keys, or more than there are channels: a row's ranks stay below what its other ranks allow."""
    torch.manual_seed(0)
    layer = GroupedQueryAttention(d, h, g, head_dim=width) if g < h else MultiHeadAttention(d, h, head_dim=width)
    shape = dict(d_model=d, n_heads=h, n_kv_heads=g, head_dim=width, bias=False)
    for row in compress.default_rows(shape):
        row.converted(layer)
