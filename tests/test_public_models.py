"""Public checkpoints, randomly initialised and saved in their own formats: opened, compressed, saved, opened again."""

import dataclasses
import json
import shutil
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import relative_error, run_here
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from reproduce.experiments import compress, spectra
from reproduce.models.public.opened import NEXT
from reproduce.store import records
from reproduce.train.options import Options
from reproduce.train.public_models import open_model
from tucker_ref import TuckerAttention

transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is in the public extra")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPE = dict(hidden_size=48, num_attention_heads=6, num_hidden_layers=2, intermediate_size=64, vocab_size=300)


def make(kind: str):
    """A small model of this kind with random weights, large enough that attention matters."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_embd=48, n_head=6, n_layer=2, vocab_size=300, n_positions=64, scale_attn_by_inverse_layer_idx=True
        )
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "vit":
        config = transformers.ViTConfig(
            hidden_size=48,
            num_attention_heads=6,
            num_hidden_layers=2,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
            num_labels=10,
        )
        model = transformers.ViTForImageClassification(config)
    else:
        config_class, model_class, more = {
            "llama": (
                transformers.LlamaConfig,
                transformers.LlamaForCausalLM,
                dict(num_key_value_heads=3, rope_parameters=LLAMA3),
            ),
            "mistral": (
                transformers.MistralConfig,
                transformers.MistralForCausalLM,
                dict(num_key_value_heads=2, sliding_window=5),
            ),
            "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, dict(num_key_value_heads=6)),
        }[kind]
        model = model_class(config_class(**SHAPE, max_position_embeddings=64, **more))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    learned.train_from_iterator(["some words to learn from, and some more words"] * 4, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=learned, eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("public")
    for kind in KINDS:
        make(kind).save_pretrained(folder / kind)
        if kind != "vit":
            tokenizer.save_pretrained(folder / kind)
    return folder


KINDS = ("gpt2", "llama", "mistral", "qwen2", "vit")
EVERY = pytest.mark.parametrize("kind", KINDS)


def inputs_for(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if kind == "vit":
        return torch.randn(2, 3, 16, 16, generator=generator)
    return torch.randint(0, 300, (2, 11), generator=generator)


@EVERY
@torch.no_grad()
def test_attention_put_back_changes_nothing(kind, checkpoints):
    opened, x = open_model(str(checkpoints / kind)), inputs_for(kind)
    expected = opened.logits(opened.model, x)
    assert len(opened.layers) == 2 and relative_error(expected, make(kind)(x).logits) == 0
    opened.put(opened.layers)
    assert relative_error(opened.logits(opened.model, x), expected) < 1e-5  # float32
    with torch.no_grad():  # control: another weight shows
        next(iter(opened.layers.values())).q_proj.weight[0] += 1.0
    assert relative_error(opened.logits(opened.model, x), expected) > 1e-4


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
@torch.no_grad()
def test_padding_masks_reach_the_layers(kind, checkpoints):
    opened, x = open_model(str(checkpoints / kind)), inputs_for(kind)
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    expected = opened.model(x, attention_mask=mask).logits[0, 3:]
    opened.put(opened.layers)
    assert relative_error(opened.model(x, attention_mask=mask).logits[0, 3:], expected) < 1e-5
    assert relative_error(opened.model(x).logits[0, 3:], expected) > 1e-3  # control


def run(tmp_path, checkpoint, text, **more) -> None:
    compress.run(Options("smoke", tmp_path, tmp_path / "records", model=str(checkpoint), text=text and str(text), **more))


@pytest.mark.parametrize(
    "kind, option, message",
    [
        ("gpt2", "images", "takes text, not images"),
        ("vit", "text", "takes images, not text"),
        ("vit", "validation", "takes images, not text"),
    ],
)
def test_compress_refuses_data_that_the_model_cannot_take(kind, option, message, checkpoints, tmp_path):
    options = Options("smoke", tmp_path, tmp_path / "records", model=str(checkpoints / kind), **{option: "anything"})
    with pytest.raises(ValueError, match=f"--{option}: {kind} {message}"):
        compress.run(options)


def test_a_model_of_images_has_no_text_to_learn_its_inputs_from(checkpoints, tmp_path, capsys):
    """The reason that it has no tokenizer is none that was found out, and there is nothing behind the colon."""
    arguments = ["spectra", "--device", "cpu", "--model", checkpoints / "vit", "--records", tmp_path / "records"]
    assert run_here(*arguments, "--text", "anything.txt") == 1
    assert capsys.readouterr().err.strip().endswith("error: --text: vit takes images, not text")
    assert run_here(*arguments) == 0  # control


@torch.no_grad()
def test_images_are_standardised_as_the_model_was_trained(checkpoints, tmp_path):
    """Images come in [-1, 1], which is what most vision transformers take; one that says otherwise gets what it says."""
    shutil.copytree(checkpoints / "vit", tmp_path / "vit")
    x = inputs_for("vit").clamp(-1, 1)
    plain = open_model(str(tmp_path / "vit"))
    assert torch.equal(plain.logits(plain.model, x), make("vit")(x).logits)
    said = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(said), encoding="utf-8")
    opened = open_model(str(tmp_path / "vit"))
    mean, std = (torch.tensor(values)[:, None, None] for values in said.values())
    expected = make("vit")((x / 2 + 0.5 - mean) / std).logits
    torch.testing.assert_close(opened.logits(opened.model, x), expected)
    assert relative_error(opened.logits(opened.model, x), plain.logits(plain.model, x)) > 1e-3  # control
    opened.save(tmp_path / "small.safetensors")
    again = open_model(str(tmp_path / "small.safetensors"))
    torch.testing.assert_close(again.logits(again.model, x), expected)


@pytest.mark.no_cover
@EVERY
@torch.no_grad()
def test_compress_measures_saves_and_opens_again(kind, checkpoints, text, tmp_path):
    text = None if kind == "vit" else text  # it takes images
    ranks = ((4, 24, 16), (6, 12, 12))
    run(tmp_path, checkpoints / kind, text, ranks=ranks)
    rows = records.load(tmp_path / "records", "compress", "models")
    assert [r.method for r in rows] == ["Tucker [4,24,16]", "Tucker [6,12,12]"]
    for row in rows:
        plain, aware = (row.metrics["ways"][way] for way in ("plain", "aware"))
        assert all(a < p for a, p in zip(aware["inputs"], plain["inputs"])) and all(
            a >= p for a, p in zip(aware["weights"], plain["weights"])
        )
        assert 0 < plain["agreement"] <= 1 and ("loss" in plain) == (kind != "vit") and ("top1" in plain) == (kind == "vit")
    assert rows[1].metrics["attention_parameters"] < rows[0].metrics["before"]["attention_parameters"]
    assert rows[0].config["model"] == kind  # and not where it lies on this machine
    saved = tmp_path / "small.safetensors"
    run(tmp_path, checkpoints / kind, text, ranks=ranks[:1], save=saved)
    again, x = open_model(str(saved)), inputs_for(kind)
    assert [type(layer) for layer in again.layers.values()] == [TuckerAttention] * 2
    assert [layer.ranks for layer in again.layers.values()] == [(4, 24, 16)] * 2
    original = open_model(str(checkpoints / kind))
    assert relative_error(again.logits(again.model, x), original.logits(original.model, x)) > 1e-4  # it is compressed
    run(tmp_path / "second", saved, text, ranks=ranks[:1])  # and can be compressed again: to its own ranks, without loss
    (row,) = records.load(tmp_path / "second" / "records", "compress")
    assert max(row.metrics["ways"]["plain"]["weights"]) < 1e-5
    expected = next(r for r in rows if r.method == row.method).metrics["ways"]["aware"]
    for score in {"loss", "top1"} & set(expected):  # what was saved is what was measured
        assert row.metrics["before"][score] == pytest.approx(expected[score], rel=1e-5)


@EVERY
def test_spectra_of_a_checkpoint(kind, checkpoints, tmp_path, capsys):
    spectra.run(Options("smoke", tmp_path, tmp_path / "records", model=str(checkpoints / kind)))
    (record,) = records.load(tmp_path / "records", "spectra", "models")
    assert len(record.metrics["trained"]) == 2 and record.metrics["trained"][0]["pre"]["head"]["size"] == 6
    assert "pre head: 6 of 6 (entropy" in capsys.readouterr().out


def test_a_rank_deficient_checkpoint_is_found_out(checkpoints, tmp_path):
    model = make("gpt2")
    with torch.no_grad():  # two heads of layer 0 repeat two others; their queries have rank 10
        q, k, v = model.transformer.h[0].attn.c_attn.weight.split(48, dim=1)  # views, (d, heads * k) each
        model.transformer.h[0].attn.c_attn.bias.zero_()
        q.copy_(torch.randn(48, 10) @ torch.randn(10, 48))
        for part in (q, k):
            part[:, 32:] = part[:, :16]
    model.save_pretrained(tmp_path / "deficient")
    with safe_open(checkpoints / "gpt2" / "model.safetensors", "pt") as file:
        assert file.keys()  # the public format itself
    transformers.AutoTokenizer.from_pretrained(checkpoints / "gpt2").save_pretrained(tmp_path / "deficient")
    first, second = spectra.of_layers(open_model(str(tmp_path / "deficient")).layers.values())
    # In float32 a repeated head is a repetition to 1e-7, and the rounding floor of a Gram matrix in float64 is about 1e-7 too.
    assert [first["pre"][mode]["rank"] for mode in ("head", "query")] == [4, 10]
    assert [second["pre"][mode]["rank"] for mode in ("head", "query")] == [6, 48]  # control


def test_layers_with_biases_have_no_rows_of_mla():
    shape = dict(n_heads=4, d_model=48, n_kv_heads=4, head_dim=12)
    found = {bias: {row.mechanism for row in compress.default_rows({**shape, "bias": bias})} for bias in (False, True)}
    assert found == {False: {"Tucker", "MLA", "GQA"}, True: {"Tucker", "GQA"}}


def test_own_models_are_compressed_by_default_rows(tmp_path, text):
    from reproduce.train.language import build_model, load_model, model_path, save_model

    config = {"model": "gpt2", "d_model": 48, "n_heads": 12, "n_layers": 2, "context": 16, "vocab_size": 300}
    config |= {"attention": {"mechanism": "MHA"}, "train": {}}
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel()
    learned.train_from_iterator(
        ["words and numbers"],
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim == 2 else 1.0)
    save_model(model_path(tmp_path, "table2 MHA seed 0"), model, config, learned.to_str())
    compress.run(Options("smoke", tmp_path, tmp_path / "records", text=str(text)))
    with pytest.raises(ValueError, match="holds no multi-head model"):
        compress.run(Options("smoke", tmp_path, tmp_path / "records", text=str(text), seeds=(1,)))
    rows = records.load(tmp_path / "records", "compress", "smoke")
    assert {r.method.split()[0] for r in rows} == {"Tucker", "MLA", "GQA"}
    assert all(
        set(r.metrics["ways"]) == ({"plain", "aware", "mean"} if r.method.startswith("GQA") else {"plain", "aware"})
        for r in rows
    )
    path = model_path(tmp_path, "table2 MHA seed 0")
    run(tmp_path, path, text, ranks=((6, 8, 8),), save=tmp_path / "small.safetensors")
    small, _, _ = load_model(tmp_path / "small.safetensors")  # as `generate` opens it
    assert all(block.attention.ranks == (6, 8, 8) for block in small.blocks)
    with pytest.raises(ValueError, match="only multi-head and grouped-query layers have rows by default; give --ranks"):
        run(tmp_path, tmp_path / "small.safetensors", text)
    with pytest.raises(ValueError, match="holds no multi-head model; run table2 first"):
        compress.run(Options("smoke", tmp_path / "empty", tmp_path / "records"))


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda folder: None, "no such file or folder"),
        (lambda folder: folder.mkdir(), "cannot be opened"),
        (
            lambda folder: transformers.T5Config().save_pretrained(folder),
            r"its model type is t5 \(it adds something to its logits .*; known here are gpt2, llama",
        ),
        (
            lambda folder: transformers.CTRLConfig().save_pretrained(folder),
            "its model type is ctrl; known here are gpt2, llama",
        ),
        (lambda folder: transformers.GPT2Config(n_embd=48, n_head=6, n_layer=1).save_pretrained(folder), "cannot be opened"),
    ],
)
def test_what_cannot_be_opened_is_named(prepare, message, tmp_path):
    prepare(tmp_path / "model")
    with pytest.raises(ValueError, match=f"--model .*model.*{message}"):
        open_model(str(tmp_path / "model"))


def test_pickled_code_is_never_run(checkpoints, tmp_path):
    """A checkpoint in the old format that holds an object with code is refused; with plain tensors it opens."""
    import shutil

    folder = tmp_path / "old"
    shutil.copytree(checkpoints / "gpt2", folder)
    (folder / "model.safetensors").unlink()
    state = make("gpt2").state_dict()
    torch.save(state, folder / "pytorch_model.bin")
    assert len(open_model(str(folder)).layers) == 2

    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save(state | {"code": Code()}, folder / "pytorch_model.bin")
    with warnings.catch_warnings(), pytest.raises(ValueError, match="cannot be opened"):
        warnings.simplefilter("ignore")
        open_model(str(folder))
    assert not (tmp_path / "ran").exists()


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="--model gpt2: public models need transformers: pip install 'tucker-ref.public.'"):
        open_model("gpt2")
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.57.1"))
    with pytest.raises(ValueError, match="--model gpt2: transformers 4.57.1 is too old; 5 or newer is needed"):
        open_model("gpt2")


def test_changing_rotary_embeddings_are_refused(tmp_path, tokenizer):
    config = transformers.LlamaConfig(
        **SHAPE, max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="of type dynamic; known are default, linear, llama3, yarn and longrope"):
        open_model(str(tmp_path / "m"))


def test_a_cache_of_transformers_is_refused_with_advice(checkpoints):
    opened = open_model(str(checkpoints / "llama"))
    opened.put(opened.layers)
    with pytest.raises(ValueError, match="use_cache=False"):
        opened.model(inputs_for("llama"), use_cache=True)


def test_text_is_read_until_there_is_enough(tokenizer, text, monkeypatch, tmp_path):
    opened = SimpleNamespace(
        tokenizer=tokenizer.backend_tokenizer.to_str(), context=1024, predicts=NEXT, vocabulary=300, takes_text=True
    )
    options = Options("smoke", tmp_path, tmp_path, text=str(text))
    every = compress.text_samples(opened, options)
    assert sum(map(len, every.calibration)) == compress.BATCHES * compress.WINDOWS  # as many windows as asked for
    monkeypatch.setattr(compress, "BATCHES", 1)
    fewer = compress.text_samples(opened, options)
    assert len(fewer.calibration) == 1 and torch.equal(fewer.calibration[0], every.calibration[0])
    assert fewer.sha256 != every.sha256  # it names the documents that were read
    files = sorted(text.iterdir())
    for file in (files[0], files[9]):
        (tmp_path / file.name).write_text(f"{file.read_text(encoding='utf-8')}and what is new\n", encoding="utf-8")
    first, tenth = (str(tmp_path / file.name) for file in (files[0], files[9]))
    given = compress.text_samples(opened, dataclasses.replace(options, validation=first))
    assert torch.equal(given.calibration[0], fewer.calibration[0]) and not torch.equal(given.test[0], fewer.test[0])
    monkeypatch.setattr(compress, "BATCHES", 10**6)
    all_but, all_of = (compress.text_samples(opened, dataclasses.replace(options, validation=v)) for v in (None, tenth))
    assert len(torch.cat(all_of.calibration)) > len(
        torch.cat(all_but.calibration)
    )  # held out is what was named, and nothing else
    monkeypatch.setattr(compress, "BATCHES", 1)
    opened.context = 10**6
    monkeypatch.setattr(compress, "WINDOW", 10**6)
    with pytest.raises(ValueError, match="text.* holds fewer than one window of 1000001 tokens"):
        compress.text_samples(opened, options)


def test_saving_needs_one_triple_of_ranks(tmp_path):
    with pytest.raises(ValueError, match="--save keeps one compressed model"):
        compress.run(Options("smoke", tmp_path, tmp_path, model="x", save=tmp_path / "m.safetensors"))


def test_a_damaged_file_is_named(checkpoints, text, tmp_path):
    run(tmp_path, checkpoints / "gpt2", text, ranks=((4, 24, 16),), save=tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="m.safetensors is not a readable safetensors file"):
        open_model(str(tmp_path / "m.safetensors"))
    with safe_open_written(tmp_path, whole) as file:
        assert {"public", "attention", "tokenizer", "name"} <= set(file.metadata()) and json.loads(file.metadata()["attention"])


def safe_open_written(folder, content):
    (folder / "whole.safetensors").write_bytes(content)
    return safe_open(folder / "whole.safetensors", "pt")
