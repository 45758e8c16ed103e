"""What a checkpoint's files may do: give a model exactly their weights, and nothing else. What they lack is named."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import run_here
from safetensors.torch import load_file, save_file

from reproduce.models.public import checkpoint
from reproduce.models.public.layers import Turning
from reproduce.report import compression, query, unfoldings
from reproduce.store import records
from reproduce.train.public_models import open_model
from reproduce.trust import opening

transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is in the public extra")
BY_NAME = {(a.name, a.which): a for a in opening.ARCHITECTURES}
LLAMA, VIT, BERT = (BY_NAME[key] for key in (("Llama", "Llama 3's frequencies"), ("ViT", ""), ("BERT", "")))


@pytest.fixture
def llama(tmp_path):
    opening.save(LLAMA, tmp_path / "m")
    return tmp_path / "m"


def rewritten(folder: Path, change) -> None:
    """The same folder with other tensors."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def reconfigured(folder: Path, **options) -> None:
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(said | options), encoding="utf-8")


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
DAMAGED = {
    "one q_proj missing": (
        lambda f: rewritten(f, lambda t: {k: v for k, v in t.items() if k != Q_PROJ}),
        f"it lacks the weights {Q_PROJ}$",
    ),
    "saved from a compiled model": (
        lambda f: rewritten(f, lambda t: {f"_orig_mod.{k}": v for k, v in t.items()}),
        r"lacks .* and 17 more and holds _orig_mod.* begins with '_orig_mod.' \(saved from a compiled model\): take it off with",
    ),
    "saved from DDP": (
        lambda f: rewritten(f, lambda t: {f"module.{k}": v for k, v in t.items()}),
        r"begins with 'module.' \(saved from DistributedDataParallel\)",
    ),
    "three layers by config.json": (
        lambda f: reconfigured(f, num_hidden_layers=3), "lacks the weights model.layers.2.input_layernorm.weight, .* and 5 more$"
    ),
    "one layer by config.json": (
        lambda f: reconfigured(f, num_hidden_layers=1), "it holds model.layers.1.*, which belong to nothing in this model$"
    ),
    "another shape": (
        lambda f: rewritten(f, lambda t: t | {Q_PROJ: torch.zeros(24, 48)}),
        rf"{Q_PROJ} has shape \(24, 48\) in its file and \(48, 48\) by its config.json",
    ),
    "a gate that no layer here has": (
        lambda f: rewritten(f, lambda t: t | {"model.layers.0.self_attn.gate.weight": torch.zeros(48)}),
        "it holds model.layers.0.self_attn.gate.weight, which belong to nothing",
    ),
    "a NaN": (
        lambda f: rewritten(f, lambda t: t | {Q_PROJ: torch.full((48, 48), torch.nan)}), f"NaN or infinity is in {Q_PROJ}$"
    ),
    "quantised": (lambda f: reconfigured(f, quantization_config={"quant_method": "bitsandbytes"}), "weights are quantised"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}", encoding="utf-8"), "holds an adapter .* merge them"),
    "an index that leads outside": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "../other.safetensors"}}), encoding="utf-8"
        ),
        "model.safetensors.index.json names ../other.safetensors, which is outside its folder",
    ),
    "weights that are whole numbers": (
        lambda f: rewritten(f, lambda t: t | {Q_PROJ: torch.ones(48, 48, dtype=torch.int8)}),
        f"{Q_PROJ} is of type I8 in its file; open a checkpoint in F64, F32, F16, BF16$",
    ),
    "an empty quantisation": (lambda f: reconfigured(f, quantization_config={}), "weights are quantised"),
    "a class that transformers lacks": (
        lambda f: reconfigured(f, architectures=["LlamaEncoder"]), "its architecture is LlamaEncoder, which transformers does not know"
    ),
    "a class that is a number": (lambda f: reconfigured(f, architectures=[3]), "its architecture is 3, which transformers does not"),
    "classes that are a number": (lambda f: reconfigured(f, architectures=3), "its architectures is 3; it must be a list of names$"),
    "a window that Llama has not": (
        lambda f: reconfigured(f, sliding_window=5), "sliding_window is 5, which llama has not: remove it from config.json$"
    ),
    "no position": (lambda f: reconfigured(f, max_position_embeddings=0), "max_position_embeddings is 0; it must be above 0$"),
    "a position of no type": (
        lambda f: reconfigured(f, max_position_embeddings=None),
        "field 'max_position_embeddings': TypeError: .* expected int, got NoneType",
    ),
    "a rotary embedding of transformers 4": (
        lambda f: reconfigured(f, rope_parameters={"rope_type": "ntk", "factor": 2.0}), "ntk"
    ),
    "an activation that nobody knows": (
        lambda f: reconfigured(f, hidden_act="nothing"), r"its library makes nothing of what its files say \(KeyError: 'nothing'\)$"
    ),
    "code of its own": (
        lambda f: reconfigured(f, model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        r"it brings code of its own \(auto_map\), which is never run",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(), "it holds no model.safetensors and no pytorch_model.bin$"
    ),
    "weights of another format": (
        lambda f: (f / "model.safetensors").rename(f / "model.onnx"),
        r"no pytorch_model.bin, but weights of ONNX \(\*.onnx\), which are not read",
    ),
    "no configuration": (lambda f: (f / "config.json").rename(f / "m.gguf"), r"no config.json, but weights of llama.cpp \(\*.gguf\)"),
    "an index to an absolute path": (
        lambda f: (f / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "/tmp/other.bin"}}), encoding="utf-8"),
        "pytorch_model.bin.index.json names /tmp/other.bin, which is outside its folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_weights_that_are_missing_or_belong_to_nothing_are_named(damage, llama):
    change, message = DAMAGED[damage]
    assert open_model(str(llama)).agreement  # control
    change(llama)
    with pytest.raises(ValueError, match=f"--model .*m cannot be opened: .*{message}"):
        open_model(str(llama))


def test_no_more_channels_turn_than_a_head_has():
    """As partial_rotary_factor above 1 would have it."""
    turning = Turning(torch.tensor([1.0, 0.5]))
    assert turning.rotary(4).blocks == (4,) and turning.rotary(6).blocks == (4, 2)  # control
    with pytest.raises(ValueError, match="its rotary embedding turns 4 channels of a head, which has 2$"):
        turning.rotary(2)


def test_weights_in_several_files_open(llama):
    """An index that names files of its own folder: as transformers writes it for large models."""
    expected = open_model(str(llama))
    (llama / "model.safetensors").unlink()
    expected.model.save_pretrained(llama, max_shard_size="40KB")
    assert (llama / "model.safetensors.index.json").exists()
    again, x = open_model(str(llama)), torch.arange(20)[None]
    assert torch.equal(again.logits(again.model, x), expected.logits(expected.model, x)) and again.weights != expected.weights


def in_one_shard(folder: Path, tensors: dict) -> None:
    """Under a name that begins with anything: an index says which."""
    save_file(tensors, folder / "shard.safetensors", metadata={"format": "pt"})
    index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, "shard.safetensors")})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


FILES = {
    "one file": (lambda f, t: save_file(t, f / "model.safetensors", metadata={"format": "pt"}), "I8"),
    "a shard of any name": (in_one_shard, "I8"),
    "PyTorch's file": (lambda f, t: torch.save(t, f / "pytorch_model.bin"), "int8"),
    "PyTorch's file of before 1.6": (
        lambda f, t: torch.save(t, f / "pytorch_model.bin", _use_new_zipfile_serialization=False), "int8"
    ),
}  # fmt: skip


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("renamed", [False, True])
def test_weights_that_are_whole_numbers_are_refused_in_every_file_and_by_every_name(file, renamed, tmp_path):
    """GPT-2 is published without the prefix that transformers gives its weights, and with its mask among them."""
    opening.save(BY_NAME["GPT-2", ""], folder := tmp_path / "m")
    write, kind = FILES[file]
    prefix = "transformer." if renamed else "nothing."
    tensors = {name.removeprefix(prefix): t for name, t in load_file(folder / "model.safetensors").items()}
    tensors["h.0.attn.bias" if renamed else "transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    (folder / "model.safetensors").unlink()
    write(folder, tensors)
    assert open_model(str(folder)).agreement  # control: a mask of eight bits is none of the weights
    weight = next(name for name in tensors if name.endswith("h.1.attn.c_proj.weight"))
    write(folder, tensors | {weight: (100 * tensors[weight]).to(torch.int8)})
    with pytest.raises(ValueError, match=f"{weight} is of type {kind} in its file; open a checkpoint in F64, F32, F16, BF16$"):
        open_model(str(folder))


def test_of_several_files_those_count_that_transformers_reads(llama):
    whole = load_file(llama / "model.safetensors")
    torch.save(whole | {Q_PROJ: whole[Q_PROJ].to(torch.int8)}, llama / "pytorch_model.bin")
    assert checkpoint.files_of_weights(str(llama)) == [llama / "model.safetensors"] and open_model(str(llama)).agreement
    in_one_shard(llama, whole)
    assert checkpoint.files_of_weights(str(llama)) == [llama / "model.safetensors"]
    (llama / "model.safetensors").unlink()
    assert checkpoint.files_of_weights(str(llama)) == [llama / "shard.safetensors"]


def test_a_model_without_its_head_is_refused_and_one_that_never_has_any_opens(llama, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    model.model.save_pretrained(llama)
    with pytest.raises(ValueError, match=r"it lacks the weights lm_head.weight \(it is a LlamaModel, which has no head\)"):
        open_model(str(llama))
    bare = transformers.ViTModel(transformers.ViTConfig(**VIT.options)).eval()
    bare.save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="it lacks the weights classifier.bias, classifier.weight"):
        open_model(str(tmp_path / "vit"))
    x = torch.randn(2, 3, 16, 16)
    opened = open_model(str(tmp_path / "vit"), head=False)  # its classifier will be replaced
    torch.testing.assert_close(opened.logits(opened.model, x), bare(x).last_hidden_state[:, 0])
    encoder = transformers.BertForMaskedLM(transformers.BertConfig(**BERT.options))
    encoder.bert.save_pretrained(tmp_path / "bert")
    assert open_model(str(tmp_path / "bert")).predicts == "nothing"


def test_what_a_checkpoint_holds_beside_its_model_is_known(tmp_path):
    """A pooler, a second head, buffers of older versions, the tower of SigLIP that reads: not ours to use, and no error."""
    opening.save(BERT, tmp_path / "bert")
    extra = {"bert.pooler.dense.weight": torch.zeros(48, 48), "cls.seq_relationship.bias": torch.zeros(2)}
    rewritten(tmp_path / "bert", lambda t: t | extra | {"bert.embeddings.position_ids": torch.arange(64)[None]})
    assert open_model(str(tmp_path / "bert")).agreement
    parts = {f"{part}_config": {k: v for k, v in VIT.options.items() if k != "num_labels"} for part in ("text", "vision")}
    parts["text_config"] |= {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1}
    both = transformers.SiglipModel(transformers.SiglipConfig(**parts)).eval()
    both.save_pretrained(tmp_path / "siglip")
    x, opened = torch.randn(2, 3, 16, 16), open_model(str(tmp_path / "siglip"))
    torch.testing.assert_close(opened.logits(opened.model, x), both.vision_model(x).last_hidden_state)
    teacher = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**VIT.options)).eval()
    teacher.save_pretrained(tmp_path / "deit")
    opened = open_model(str(tmp_path / "deit"))
    torch.testing.assert_close(opened.logits(opened.model, x), teacher(x).logits)


def test_what_config_json_says_of_a_head_and_of_outputs_is_no_hindrance(llama, tmp_path):
    """A head of its own where a tied one is promised is used, saved and opened again; outputs as a tuple are outputs."""
    x, expected = torch.arange(24)[None], open_model(str(llama))
    want = expected.logits(expected.model, x)
    for said in ({"tie_word_embeddings": True}, {"return_dict": False}, {"output_hidden_states": True}, {"sliding_window": 64}):
        reconfigured(llama, **said)
        opened = open_model(str(llama))
        assert torch.equal(opened.logits(opened.model, x), want)
        opened.put({place: opening.as_tucker(layer) for place, layer in opened.layers.items()})
        opened.save(tmp_path / "m.safetensors")
        again = open_model(str(tmp_path / "m.safetensors"))
        assert torch.equal(again.logits(again.model, x), opened.logits(opened.model, x))


def test_a_file_is_no_folder(llama):
    checkpoint.check_folder("owner/name")  # control: a name on the hub is looked for there
    with pytest.raises(ValueError, match="config.json cannot be opened: it is a file; --model takes a folder with config.json"):
        open_model(str(llama / "config.json"))


REFUSED = {
    "a model without layers": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA.options | {"num_hidden_layers": 0})),
        "it has no attention layer",
    ),
    "RoBERTa without padding": (
        lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**BERT.options | {"pad_token_id": None})),
        "pad_token_id is null: its positions count from there",
    ),
    "OLMo that cuts off": (
        lambda: transformers.OlmoForCausalLM(transformers.OlmoConfig(**BY_NAME["OLMo", ""].options, clip_qkv=8.0)),
        "clip_qkv is 8.0: it cuts off what is large",
    ),
    "StableLM with norms": (
        lambda: transformers.StableLmForCausalLM(
            transformers.StableLmConfig(**BY_NAME["StableLM", "partial rotary embedding"].options, qk_layernorm=True)
        ),
        "its attention holds q_layernorm.norms.0.weight, .* which is not known here",
    ),
    "numbers that grow": (
        lambda: transformers.Ministral3Config(),
        r"its model type is ministral3 \(it multiplies queries by a number that grows",
    ),
    "GPT-2 with cross-attention": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=48, n_head=6, n_layer=1, add_cross_attention=True)),
        r"add_cross_attention is True: its layers look at a second text",
    ),
    "BERT as a decoder": (
        lambda: transformers.BertLMHeadModel(transformers.BertConfig(**BERT.options, is_decoder=True)), "is_decoder is True: "
    ),
    "BERT with distances": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT.options, position_embedding_type="relative_key")),
        "position_embedding_type is relative_key: it adds distances to its logits",
    ),
    "oblong images": (
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VIT.options | {"image_size": [16, 32]})),
        "image_size is 16 x 32: only square images are known here",
    ),
    "DeepSeek with biases": (
        lambda: transformers.DeepseekV3ForCausalLM(
            transformers.DeepseekV3Config(**BY_NAME["DeepSeek-V3", "yarn"].options | {"attention_bias": True})
        ),
        "its attention holds q_a_proj.bias, .*, which is not known here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_layer_here_can_do_is_refused_in_a_line(kind, tmp_path):
    make, message = REFUSED[kind]
    make().save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=f"^--model .*m cannot be opened: {message}") as refused:
        open_model(str(tmp_path / "m"))
    assert "\n" not in str(refused.value)


def test_square_images_may_be_said_with_two_numbers(tmp_path):
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT.options | {"image_size": [16, 16]}))
    model.save_pretrained(tmp_path / "m")
    assert open_model(str(tmp_path / "m")).image_size == 16


def test_code_of_a_checkpoint_is_never_run_whatever_stdin_says(tmp_path):
    """transformers asks on stdin where it is not told; `yes |` answers."""
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "config.json").write_text(
        '{"model_type": "evilmodel", "auto_map": {"AutoConfig": "evil.EvilConfig"}}', encoding="utf-8"
    )
    (evil / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import PretrainedConfig as EvilConfig\n", encoding="utf-8"
    )
    command = [
        sys.executable,
        "-m",
        "reproduce",
        "spectra",
        "--device",
        "cpu",
        "--model",
        str(evil),
        "--records",
        str(tmp_path / "r"),
    ]
    done = subprocess.run(command, input="y\n" * 99, encoding="utf-8", capture_output=True)
    assert done.returncode == 1 and "--model" in done.stderr and not (tmp_path / "ran").exists()
    for part in ("config.json", "tokenizer_config.json"):  # a model that is known, with code beside it that is not asked for
        opening.save(LLAMA, tmp_path / "m")
        (tmp_path / "m" / "evil.py").write_text((evil / "evil.py").read_text(encoding="utf-8"), encoding="utf-8")
        said = json.loads((tmp_path / "m" / part).read_text(encoding="utf-8"))
        classes = {
            "AutoConfig": "evil.EvilConfig",
            "AutoModelForCausalLM": "evil.Evil",
            "AutoTokenizer": ["evil.Evil", "evil.Evil"],
        }
        (tmp_path / "m" / part).write_text(json.dumps(said | {"auto_map": classes}), encoding="utf-8")
        remarks = open_model(str(tmp_path / "m")).remarks
        assert remarks.get("code", "none").startswith(
            "its own (auto_map), not run: opened as transformers' Llama" if part == "config.json" else "none"
        )
        assert not (tmp_path / "ran").exists()


def test_two_folders_of_one_name_are_two_models_in_the_records(tmp_path):
    for seed, run in enumerate(("run_a", "run_b")):
        model = opening.save(LLAMA, folder := tmp_path / run / "checkpoint-500")
        with torch.no_grad():
            model.lm_head.weight.add_(seed)
        model.save_pretrained(folder)
        assert run_here("spectra", "--device", "cpu", "--model", folder, "--records", tmp_path / "r") == 0
    first, second = records.load(tmp_path / "r")
    assert (
        first.config["model"] == second.config["model"] == "checkpoint-500"
        and first.config["weights"] != second.config["weights"]
    )
    for record in (first, second):
        record.more["data"] = None
        object.__setattr__(record, "data", {"sha256": "the same"})
    assert len(query.by_model([first, second])) == 2  # a table for each
    labels = [f"checkpoint-500 ({record.config['weights'][:8]})" for record in (first, second)]
    assert labels[0] != labels[1] and query.model_names([first, second, first]) == [*labels, labels[0]]
    assert query.model_names([first, first]) == ["checkpoint-500"] * 2  # control: one model needs no more than its name
    assert list(unfoldings.models_of([first, second])) == labels and list(unfoldings.models_of([first])) == ["checkpoint-500"]
    shutil.copytree(folder, tmp_path / "elsewhere" / "checkpoint-500")
    assert checkpoint.identity(str(tmp_path / "elsewhere" / "checkpoint-500")) == second.config["weights"]  # wherever it lies
    reconfigured(folder, rms_norm_eps=1e-3)  # the same weights in another model
    assert checkpoint.identity(str(folder)) != second.config["weights"]


def test_tables_of_models_of_one_name_tell_them_apart():
    (kept, *_) = records.load(records.COMMITTED, "compress")
    named = [kept.config | {"model": "gpt2", "run": by} for by in ("0123456789", "abcdefghij")]
    runs = [dataclasses.replace(kept, config=config) for config in named]
    assert [table.title.split(",")[0] for table in compression.compress_runs(runs)] == [
        "**gpt2 (01234567)",
        "**gpt2 (abcdefgh)",
    ]
    assert compression.compress_runs(runs[:1])[0].title.startswith("**gpt2, ")  # control


def test_a_name_on_the_hub_is_known_by_its_commit(monkeypatch, tmp_path):
    """Files of a hub name lie in a cache, below the commit's name; what is not there is none."""
    commit = tmp_path / "snapshots" / "0123456789abcdef0123"
    commit.mkdir(parents=True)
    (commit / "config.json").write_text("{}", encoding="utf-8")
    asked = []

    def cached_file(name, file, _raise_exceptions_for_missing_entries):
        asked.append((name, file))
        return str(commit / file) if (commit / file).exists() else None

    monkeypatch.setattr(transformers.utils, "cached_file", cached_file)
    assert checkpoint.identity("owner/name") == "0123456789abcdef" and asked == [("owner/name", "config.json")]
    assert checkpoint.beside("owner/name", "tokenizer.json") is None
