"""The rule of every opening: each architecture in every form gives transformers' own logits, and an altered one is refused."""

import dataclasses
import json
import math

import pytest
import torch
from helpers import run_here
from torch import nn

from reproduce.experiments import compress, spectra
from reproduce.models.public import agreement
from reproduce.report import results as report
from reproduce.store import records, saved
from reproduce.train.options import Options
from reproduce.train.public_models import open_model, sample
from reproduce.trust import opening
from tucker_ref import TuckerAttention
from tucker_ref.norms import QKNorm

transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is in the public extra")
GPT2, LLAMA, QWEN3, MIXTRAL = (
    next(a for a in opening.ARCHITECTURES if a.name == name) for name in ("GPT-2", "Llama", "Qwen3", "Mixtral")
)
DEEPSEEK = next(a for a in opening.ARCHITECTURES if a.name.startswith("DeepSeek"))
SIGLIP = opening.ARCHITECTURES[-1]


@pytest.mark.parametrize("architecture", opening.ARCHITECTURES, ids=lambda a: f"{a.name} {a.which}".strip())
@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on a device")
def test_an_architecture_opens_exactly_in_every_form(architecture, tmp_path):
    """Own layers, Tucker layers, saved and opened, compressed at full rank, generated: as transformers' own; control: one option."""
    found = opening.measure(architecture, tmp_path)
    assert found["errors"]["opened"] == 0 and max(found["errors"].values()) < 1e-5  # float32
    assert {"own layers", "Tucker", "saved"} <= found["errors"].keys()
    for generated in filter(None, found["generated"].values()):
        assert generated["same"] == generated["tokens"] == 2 * opening.NEW_TOKENS
    assert found["refused"] > agreement.HIDDEN


def test_what_the_table_shows_is_on_record_and_a_control_that_passes_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(opening, "ARCHITECTURES", (GPT2, QWEN3, SIGLIP))
    assert run_here("opening", "--records", tmp_path) == 0
    kept = records.load(tmp_path, "opening", "tests")
    table = report.render(kept)
    assert table in capsys.readouterr().out and report.render([]) == ""
    lines = [line.split("|") for line in table.splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line[1:-1]] for line in lines]
    assert [line[:3] for line in cells] == [
        ["GPT-2", "`gpt2`", "0"],
        ["Qwen3", "`qwen3`", cells[1][2]],
        ["SigLIP", "`siglip`", "0"],
    ]
    assert [line[4] for line in cells][1] == "no tensor: norms" and [line[5] for line in cells] == ["48 of 48"] * 2 + [
        "no decoder"
    ]
    assert [line[7] for line in cells] == ["add_cross_attention not False", "rope_type dynamic", "images that are not square"]
    harmless = opening.Architecture("GPT-2", "GPT2Config", "GPT2LMHeadModel", GPT2.options, "nothing", lambda model: None)
    with pytest.raises(ValueError, match="GPT-2: altered in nothing, it is not refused"):
        opening.refusal(harmless, tmp_path / "gpt2" if opening.save(harmless, tmp_path / "gpt2") else None)
    (file,) = tmp_path.glob("*.json")
    (record,) = json.loads(file.read_text(encoding="utf-8"))
    record["metrics"]["architectures"][0].pop("errors")
    file.write_text(json.dumps([record]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"opening.tests.json.*architectures\[0\].*errors"):
        records.load(tmp_path, "opening", to_show=True)


def test_the_committed_record_has_every_architecture_within_its_bounds():
    (record,) = records.load(records.COMMITTED, "opening")
    kept = record.metrics["architectures"]
    assert [(a["name"], a["which"], a["option"]) for a in kept] == [(a.name, a.which, a.option) for a in opening.ARCHITECTURES]
    for architecture in kept:
        assert max(architecture["errors"].values()) < 1e-5 and architecture["refused"] > agreement.HIDDEN
    assert report.render([record]).count("\n| ") == len(kept) + 1


@pytest.fixture
def llama(tmp_path):
    opening.save(LLAMA, tmp_path / "llama")
    return tmp_path / "llama"


def test_a_model_that_differs_is_refused_with_the_number_and_the_first_layer(llama, monkeypatch):
    """Silently read as another: the second layer's scale."""
    opened = open_model(str(llama))
    assert opened.agreement["hidden"] < 1e-5 and opened.agreement["layer"] < 1e-5  # control
    places = list(opened.layers)
    opened.layers[places[1]].scale *= 1.1
    with pytest.raises(
        agreement.Differs, match=rf"last hidden state differs by \d.\de-0\d \(at most 1e-04\), first at {places[1]}"
    ):
        agreement.compare(opened, sample(opened))
    assert all(type(opened.model.get_submodule(p)).__name__ == "LlamaAttention" for p in places)  # the model is as it was
    read = transformers.models.llama.modeling_llama.LlamaAttention.forward
    monkeypatch.setattr(
        transformers.models.llama.modeling_llama.LlamaAttention,
        "forward",
        lambda self, *a, **k: (read(self, *a, **k)[0] + 1, None),
    )
    with pytest.raises(
        ValueError, match="--model .*llama cannot be opened: its attention is not what is known.*--trust-layers"
    ):
        open_model(str(llama))


def test_a_difference_that_later_layers_hide_is_found_in_the_layer(llama):
    """What layer scale or a large residual makes small is still another attention."""
    opened = open_model(str(llama))
    place, layer = next(iter(opened.layers.items()))
    with torch.no_grad():  # too small a part of the hidden state to be seen there
        opened.model.get_submodule(place).o_proj.weight.mul_(1e-7)
        layer.o_proj.weight.mul_(2e-7)
    with pytest.raises(agreement.Differs, match=f"first at {place}, whose output differs by 1.0e[+]00") as refused:
        agreement.compare(opened, sample(opened))
    assert refused.value.hidden < agreement.HIDDEN


def test_what_changes_with_the_position_alone_is_found_at_the_last_ones(llama, monkeypatch):
    """Ministral 3 and Llama 4 multiply late queries: two sentences never get there."""
    opened = open_model(str(llama))
    original = transformers.models.llama.modeling_llama.LlamaAttention.forward

    def grown(self, hidden_states, *arguments, position_ids=None, **options):
        y, weights = original(self, hidden_states, *arguments, position_ids=position_ids, **options)
        return y * torch.where(position_ids > 60, 1.1, 1.0)[..., None], weights

    agreement.compare_far(opened, sample(opened))  # control
    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaAttention, "forward", grown)
    agreement.compare(opened, sample(opened))  # nothing to be seen
    with pytest.raises(ValueError, match=r"m.*cannot be opened: .* from position 40 on the output of .*self_attn differs by"):
        open_model(str(llama))
    assert open_model(str(llama), trust_layers=True).layers
    monkeypatch.setattr(opened, "context", 60)
    agreement.compare_far(opened, sample(opened))  # a shorter text never gets there either


def test_a_layer_that_is_never_called_agrees_with_nothing(llama):
    opened = open_model(str(llama))
    opened.model.model.layers[1] = Skipped()
    opened.model.model.layers[1].self_attn = nn.Identity()
    with pytest.raises(agreement.Differs, match="first at model.layers.1.self_attn, whose output differs by nan"):
        agreement.compare(opened, sample(opened))


@pytest.fixture
def mixtral(tmp_path):
    """Opened, with one expert of four per token; the own layers are the same but for a rounding."""
    by_one = dataclasses.replace(MIXTRAL, options=MIXTRAL.options | dict(num_local_experts=4, num_experts_per_tok=1))
    opening.save(by_one, tmp_path / "mixtral")
    opened = open_model(str(tmp_path / "mixtral"))
    with torch.no_grad():
        for layer in opened.layers.values():
            layer.o_proj.weight.mul_(1 + 3e-6)
    return opened


@torch.no_grad()
def tie(opened, inputs, token: int) -> None:
    """Let a token's two best experts in the last layer be as good as tied: closer than the layers' rounding, which tips them over."""
    seen, gate = [], opened.model.model.layers[-1].mlp.gate
    for put_back in (False, True):
        if put_back:
            originals = {place: opened.model.get_submodule(place) for place in opened.layers}
            opened.put(opened.layers)
        hook = gate.register_forward_hook(
            lambda _module, arguments, _output: seen.append(arguments[0].flatten(0, -2)[token].double())
        )
        opened.hidden(opened.model, inputs)
        hook.remove()
    for place, module in originals.items():
        opened.model.set_submodule(place, module)
    (theirs, ours), weight = seen, gate.weight.double()
    between, apart = (theirs + ours) / 2, theirs - ours
    best = weight[(weight @ between).argmax()]
    # A row that scores as the best one where the token is, more on one side of it, and less on the other.
    other = best + 1e5 * apart - (1e5 * apart @ between) / (between @ between) * between
    gate.weight[:] = torch.stack([best, other, weight.min(0)[0] * 0 - best, weight.min(0)[0] * 0 - best]).to(gate.weight)


def test_experts_that_are_as_good_as_tied_do_not_refuse_a_model(mixtral):
    inputs = sample(mixtral)
    assert agreement.compare(mixtral, inputs).hidden < agreement.HIDDEN
    tie(mixtral, inputs, token=5)
    with pytest.raises(agreement.Differs, match="the last hidden state differs by") as refused:
        agreement.compare(mixtral, inputs)
    assert refused.value.layers_agree
    assert agreement.compare_again(mixtral, inputs).hidden < agreement.HIDDEN


def test_a_second_comparison_lets_nothing_else_pass(mixtral, monkeypatch):
    inputs, put = sample(mixtral), type(mixtral).put
    monkeypatch.setattr(type(mixtral), "put", lambda self, layers: put(self, dict(zip(layers, reversed(layers.values())))))
    with pytest.raises(agreement.Differs) as refused:  # each layer agrees, and stands in the other's place
        agreement.compare_again(mixtral, inputs)
    assert refused.value.layers_agree
    monkeypatch.undo()
    compared = []
    monkeypatch.setattr(agreement, "compare", lambda opened, x, real=agreement.compare: compared.append(x) or real(opened, x))
    next(iter(mixtral.layers.values())).scale *= 1.1
    with pytest.raises(agreement.Differs) as refused:
        agreement.compare_again(mixtral, inputs)
    assert not refused.value.layers_agree and len(compared) == 1


class Skipped(nn.Module):
    """A block that leaves out its attention."""

    def forward(self, hidden_states, **_options):
        return hidden_states


def test_equal_zeros_agree():
    zeros = torch.zeros(3)
    assert agreement.relative(zeros, zeros) == 0 and math.isinf(agreement.relative(torch.ones(3), zeros))


def test_trusted_layers_are_not_compared_and_their_records_say_so(llama, monkeypatch, tmp_path):
    monkeypatch.setattr(agreement, "compare", lambda *_: pytest.fail("it was compared"))
    options = ("spectra", "--device", "cpu", "--model", llama, "--records", tmp_path / "records")
    assert run_here(*options, "--trust-layers") == 0
    monkeypatch.undo()
    assert run_here(*options) == 0
    trusted, compared = records.load(tmp_path / "records", "spectra")
    assert trusted.config["layers"] == "trusted, not compared" and "opening" not in trusted.metrics
    assert "layers" not in compared.config and compared.metrics["opening"]["hidden"] < 1e-5


def test_a_model_without_tensors_says_which_layer_and_why(tmp_path):
    opening.save(QWEN3, tmp_path / "qwen3")
    options = Options("smoke", tmp_path, tmp_path / "r", model=str(tmp_path / "qwen3"), ranks=((2, 8, 8),))
    with pytest.raises(
        ValueError, match=r"qwen3: model.layers.0.self_attn normalises its queries and keys\. As a layer it is a Tucker"
    ):
        compress.run(options)
    spectra.run(options)  # which looks between the norms
    opening.save(DEEPSEEK, tmp_path / "deepseek")
    with pytest.raises(ValueError, match=r"self_attn normalises its latents\. As a layer"):
        spectra.run(dataclasses.replace(options, model=str(tmp_path / "deepseek")))


def test_a_zeroed_layer_is_measured(tmp_path):
    """An inserted identity block, and one without logits: errors are finite, and the ranks of what is zero are zero."""
    model = opening.make(GPT2)
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight.zero_()
        for tensor in model.transformer.h[0].attn.c_attn.parameters():
            tensor[..., :48] = 0  # the queries
    model.save_pretrained(tmp_path / "m")
    opening.tokenizer().save_pretrained(tmp_path / "m")
    for n in range(20):
        (tmp_path / f"{n:02}.txt").write_text("some words and more words. " * 200, encoding="utf-8")
    options = Options("smoke", tmp_path, tmp_path / "r", model=str(tmp_path / "m"), text=str(tmp_path), ranks=((2, 8, 8),))
    compress.run(options)
    spectra.run(Options("smoke", tmp_path, tmp_path / "r", model=str(tmp_path / "m")))
    kept = {record.experiment: record.metrics for record in records.load(tmp_path / "r")}
    assert all(map(math.isfinite, kept["compress"]["ways"]["aware"]["weights"]))
    found = [
        [layer[side][mode]["rank"] > 0 for side, mode in (("pre", "query"), ("post", "output"))]
        for layer in kept["spectra"]["trained"]
    ]
    assert found == [[False, True], [True, False]]


def test_a_file_is_compared_with_fresh_weights_before_it_is_filled(llama, tmp_path):
    """What its metadata say of the architecture is held to the same rule."""
    opened = open_model(str(llama))
    opened.put({place: opening.compress(layer, (4, 16, 8)) for place, layer in opened.layers.items()})
    opened.save(tmp_path / "small.safetensors")
    again = open_model(str(tmp_path / "small.safetensors"))
    assert again.agreement["hidden"] < 1e-5 and again.weights != opened.weights
    public = json.loads(opened.metadata["public"])
    opened.metadata["public"] = json.dumps(public | {"config": public["config"] | {"quantization_config": {"bits": 4}}})
    opened.save(tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match="small.safetensors describes no model.*weights are quantised"):
        open_model(str(tmp_path / "small.safetensors"))


@pytest.mark.parametrize("qk_norm", [None, "head"])
def test_a_description_from_before_norms_were_described_still_builds_its_layer(qk_norm):
    layer = TuckerAttention(24, 4, (2, 6, 6), qk_norm=qk_norm)
    described = saved.describe(layer)
    older = {name: value for name, value in described.items() if name != "norms"}
    shapes = {name: tensor.shape for name, tensor in layer.state_dict().items()}
    for description in (described, older):
        built = saved.layer_of(json.loads(json.dumps(description)))
        assert {name: tensor.shape for name, tensor in built.state_dict().items()} == shapes
        assert isinstance(built.q_norm, QKNorm) == (qk_norm is not None)
    if qk_norm:  # control: what is not as the layer makes it is described
        layer.q_norm = QKNorm(6, blocks=2, count=5, eps=1e-3)
        built = saved.layer_of(saved.describe(layer)).q_norm
        assert (built.blocks, built.count, built.eps) == (2, 5, 1e-3)
