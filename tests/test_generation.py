"""Language models with caches: the same logits as without, batches of unequal prompts, and the choices of the sampler."""

import json

import pytest
import safetensors.torch
import torch
from helpers import EXACT, relative_error
from tokenizers import Tokenizer
from tokenizers.models import BPE

from reproduce.models.generation import generate, next_token
from reproduce.models.gpt2 import GPT2
from reproduce.models.llama import Llama
from reproduce.models.rows import TABLE2, TABLE3
from reproduce.train.language import build_model, load_model, save_model

VOCABULARY = 50


def gpt2(row):
    return GPT2(VOCABULARY, 40, 48, 12, 2, row.narrowed(16).build)


def llama(row):
    return Llama(VOCABULARY, 256, 32, 2, lambda d, h: row.narrowed(8).build(d, h, rope_base=10_000.0))


MODELS = {f"gpt2 {row.label}": (gpt2, row) for row in TABLE2} | {f"llama {row.label}": (llama, row) for row in TABLE3}
EVERY = pytest.mark.parametrize("name", MODELS)


def model_of(name):
    """In float64, with weights large enough that the likeliest token is clear."""
    make, row = MODELS[name]
    torch.manual_seed(0)
    model = make(row).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    return model


@EVERY
@torch.no_grad()
def test_logits_with_caches_are_those_without(name):
    model, tokens = model_of(name), torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    caches = model.new_caches(2, 12)
    pieces = [model(part, caches=caches) for part in tokens.split([5, 1, 4, 1, 1], dim=1)]
    assert relative_error(torch.cat(pieces, dim=1), model(tokens)) < EXACT


@EVERY
@torch.no_grad()
def test_greedy_generation_of_unequal_prompts_is_that_of_each_alone(name):
    model, prompts = model_of(name), [[3, 1, 4, 1, 5, 9, 2], [6, 5], [3]]
    together = torch.stack(list(generate(model, prompts, 8, temperature=0)), dim=1)
    for prompt, continued in zip(prompts, together.tolist()):
        tokens = list(prompt)
        for _ in range(8):  # the slow, obvious way: everything again for each token
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        assert continued == tokens[len(prompt) :]
    assert len({tuple(row) for row in together.tolist()}) > 1  # control: prompts matter


@torch.no_grad()
def test_seeds_choose_and_repeat():
    model = model_of("llama MHA")
    runs = [torch.stack(list(generate(model, [[1, 2]], 12, temperature=5.0, seed=seed))).tolist() for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_temperature_and_top_p_shape_the_choice():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(20_000, 1)

    def shares(**options):
        options = {"temperature": 1.0, "top_p": 1.0, "generator": torch.Generator().manual_seed(0)} | options
        return torch.bincount(next_token(logits, **options), minlength=4) / len(logits)

    assert torch.allclose(shares(), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.02)
    assert shares(temperature=0)[0] == 1
    assert torch.allclose(shares(temperature=0.5), torch.tensor([0.25, 0.09, 0.0225, 0.0025]) / 0.365, atol=0.02)
    assert torch.allclose(shares(top_p=0.75), torch.tensor([0.625, 0.375, 0, 0]), atol=0.02)
    assert shares(top_p=1e-6)[0] == 1  # the likeliest token always stays


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prompts=[[]]), "a prompt is empty"),
        (dict(prompts=[]), "a prompt is empty"),
        (dict(temperature=-1.0), "temperature is -1.0"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(top_p=0.0), "top_p is 0.0"),
        (dict(top_p=1.5), "top_p is 1.5"),
        (dict(max_new_tokens=39), "2 prompt tokens and 39 new ones are 41; this model has positions for 40"),
    ],
)
def test_bad_requests_are_named(options, message):
    arguments = dict(prompts=[[1, 2]], max_new_tokens=4) | options
    with pytest.raises(ValueError, match=message):
        next(generate(model_of("gpt2 MHA"), arguments.pop("prompts"), arguments.pop("max_new_tokens"), **arguments))


@torch.no_grad()
def test_a_model_whose_weights_are_not_finite_writes_nothing():
    model = model_of("gpt2 MHA")
    assert len(list(generate(model, [[1, 2]], 4))) == 4  # control
    next(model.parameters())[1] = float("nan")
    with pytest.raises(
        FloatingPointError, match="the model's logits hold NaN or infinity after 2 tokens; are its weights finite"
    ):
        next(generate(model, [[1, 2]], 4))


TOKENIZER = Tokenizer(BPE()).to_str()
CONFIG = {"model": "llama", "rope_base": 100.0, "d_model": 256, "n_heads": 32, "n_layers": 1, "context": 16, "vocab_size": 50}


@pytest.mark.parametrize("row", TABLE3, ids=lambda row: row.label)
def test_a_saved_model_loads_back(tmp_path, row):
    config = CONFIG | {"attention": json.loads(json.dumps(row.narrowed(8).config()))}
    torch.manual_seed(0)
    model = build_model(config)
    save_model(tmp_path / "m.safetensors", model, config, TOKENIZER)
    torch.manual_seed(1)
    loaded, tokenizer, read = load_model(tmp_path / "m.safetensors")
    tokens = torch.arange(7)[None]
    assert tokenizer == TOKENIZER and read == config and torch.equal(loaded(tokens), model(tokens))
    assert not torch.equal(build_model(config)(tokens), model(tokens))  # control: fresh weights differ


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not a readable safetensors file"),
        (b"\x80\x04pickle", "not a readable safetensors file"),
        (safetensors.torch.save({"a": torch.ones(1)}), "was not saved by this program"),
        (safetensors.torch.save({"a": torch.ones(1)}, metadata={"attention": "{}"}), "names no config"),
        (
            safetensors.torch.save(
                {"a": torch.ones(1)},
                metadata={
                    "attention": "{}",
                    "tokenizer": TOKENIZER,
                    "config": json.dumps(CONFIG | {"attention": TABLE3[0].narrowed(8).config()}),
                },
            ),
            "do not fit",
        ),
    ],
)
def test_files_that_are_no_models_are_refused(tmp_path, content, message):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"m.safetensors.*{message}"):
        load_model(tmp_path / "m.safetensors")
