"""Whose fault an error is: what a file can cause becomes one line, and a fault of the program stays one, with its traceback."""

import io
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from helpers import run_here
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import nn

from reproduce import console
from reproduce.models.public import agreement, checkpoint, inputs, transformers_models
from reproduce.store import faults, saved
from reproduce.train import public_models
from tucker_ref import LatentNorm, Rotary, TuckerAttention
from tucker_ref.norms import QKNorm


def written_in(package: str, source: str, **names):
    """A function of no arguments whose code belongs to a package."""
    space = {"__name__": package, **names}
    exec(f"def function(*arguments, **options):\n    {source}", space)
    return space["function"]


def raised(call) -> BaseException:
    try:
        call()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def raising(error: BaseException):
    def call():
        raise error

    return call


ours, theirs = "reproduce.models.opened", "transformers.models.llama"
inner = written_in("torch.nn.functional", "return {}['missing']")  # PyTorch's own code, which somebody calls
Strange = type("Strange", (Exception,), {"__module__": "safetensors._rust"})
Own = type("Own", (RuntimeError,), {"__module__": "reproduce.store.locks"})
OF_A_FILE = {
    "ValueError": raising(ValueError("x")),
    "a file that is not there": lambda: open("/nowhere/at/all", "rb"),  # noqa: SIM115
    "text in another encoding": lambda: b"\xff".decode(),
    "pickled code": lambda: torch.load(pickled(), weights_only=True),
    "what tokenizers raises": lambda: Tokenizer.from_str("{"),
    "what safetensors raises": raising(Strange("x")),
    "a library meets values it did not expect": written_in(theirs, "return {}['missing']"),
    "a library asks PyTorch": written_in(theirs, "return inner()", inner=inner),
    "a library that we call": written_in(ours, "return theirs()", theirs=written_in(theirs, "return None + 1")),
    "a library in vain": written_in(theirs, "return torch.ones(2) @ torch.ones(3)", torch=torch),
}
OF_THE_PROGRAM = {
    "our code": written_in(ours, "return {}['missing']"),
    "the library's code": written_in("tucker_ref.mha", "return None + 1"),
    "we ask PyTorch": written_in(ours, "return inner()", inner=inner),
    "we ask PyTorch in vain": written_in(ours, "return torch.ones(2) @ torch.ones(3)", torch=torch),
    "our code inside a library's": written_in(theirs, "return ours()", ours=written_in("tucker_ref.mha", "return None + 1")),
    "an error of our own": written_in(ours, "raise Own('x')", Own=Own),
    "Ctrl-C": raising(KeyboardInterrupt()),
}


def pickled():
    return io.BytesIO(pickle.dumps(SimpleNamespace(x=1)))


@pytest.mark.parametrize("name", OF_A_FILE)
def test_what_a_file_can_cause_becomes_one_line(name):
    error = raised(OF_A_FILE[name])
    assert faults.is_of_a_file(error)
    with pytest.raises(ValueError, match="^m cannot be read: ") as said, faults.as_one_line(lambda e: f"m cannot be read: {e}"):
        OF_A_FILE[name]()
    assert said.value.__cause__ is not None


@pytest.mark.parametrize("name", OF_THE_PROGRAM)
def test_a_fault_of_the_program_stays_one(name):
    error = raised(OF_THE_PROGRAM[name])
    assert not faults.is_of_a_file(error)
    with pytest.raises(type(error)) as same, faults.as_one_line(lambda e: pytest.fail("it is the program's")):
        OF_THE_PROGRAM[name]()
    assert str(same.value) == str(error)


def test_of_an_error_that_was_never_raised_the_kind_alone_is_known():
    assert faults.is_of_a_file(KeyError("x")) and not faults.is_of_a_file(Own("x"))


# Where files are opened.

MISTAKES = {  # what a mistake in a function of ours would be
    "the comparison": (agreement, "layer_by_layer"),
    "the weights": (checkpoint, "check_types"),
    "the pieces": (transformers_models, "adapted"),
    "the tokenizer": (inputs, "tokenizer_of"),
    "the tokens": (public_models, "sample"),
}


@pytest.fixture
def llama(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed; it is in the public extra")
    from reproduce.trust import opening

    named = {architecture.name: architecture for architecture in opening.ARCHITECTURES}
    opening.save(named["Llama"], tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_ours_while_a_checkpoint_is_opened_is_no_fault_of_its_files(name, llama, monkeypatch, tmp_path, capsys):
    module, function = MISTAKES[name]
    arguments = ("spectra", "--model", llama, "--out", tmp_path / "out", "--records", tmp_path / "records")
    monkeypatch.setattr(module, function, written_in(module.__name__, "return None + 1"))
    with pytest.raises(TypeError, match="unsupported operand") as said:
        run_here(*arguments)
    assert said.value.__notes__ == [console.BUG] and "cannot be opened" not in capsys.readouterr().err
    monkeypatch.setattr(module, function, written_in(module.__name__, "raise ValueError('it is damaged')"))  # control
    assert run_here(*arguments) == (1 if name != "the tokenizer" else 0)
    assert ("it is damaged" in capsys.readouterr().err) == (name != "the tokenizer")  # spectra need none


def test_a_mistake_of_ours_in_what_is_known_beforehand_is_none_of_the_model_s(monkeypatch):
    monkeypatch.setattr(checkpoint, "config_of", written_in("reproduce.models.public.checkpoint", "return None + 1"))
    with pytest.raises(TypeError, match="unsupported operand"):
        public_models.configured("gpt2")
    monkeypatch.setattr(checkpoint, "config_of", written_in("transformers.configuration_auto", "return None + 1"))
    assert public_models.configured("gpt2") is None  # `open_model` says what is wrong


# Files of our own.


def layer() -> TuckerAttention:
    return TuckerAttention(24, 6, (4, 9, 8), rotary=Rotary.latent(8), qk_norm="head")


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = layer()


def described(change) -> dict[str, str]:
    """A file's metadata with another description of its layer."""
    return {"attention": json.dumps({"attention": change(json.loads(json.dumps(saved.describe(layer()))))})}


DESCRIPTIONS = {
    "no dict": (lambda d: 3, "its attention has attention 3; it must be a dict"),
    "nothing": (lambda d: {}, "its attention lacks attention.d_model, attention.n_heads, attention.ranks, attention.rotary"),
    "a word for a number": (lambda d: d | {"d_model": "24"}, 'its attention has attention.d_model "24"; it must be an integer'),
    "two ranks": (lambda d: d | {"ranks": [4, 9]}, r"its attention has attention.ranks \[4, 9\]; it must be a list of 3 or more"),
    "a rank of zero": (lambda d: d | {"ranks": [4, 0, 8]}, r"attention.ranks\[1\] 0; it must be at least 1"),
    "an argument that is none": (lambda d: d | {"evil": 1}, "its attention has attention.evil, which is not known here"),
    "a scale of zero": (lambda d: d | {"scale": 0}, "scale is 0; it must be finite and not zero"),
    "a rotary embedding that is a word": (lambda d: d | {"rotary": "half"}, 'attention.rotary "half"; it must be a dict'),
    "frequencies that are words": (
        lambda d: d | {"rotary": d["rotary"] | {"frequencies": ["1"]}}, r'attention.rotary.frequencies\[0\] "1"; it must be a number'
    ),
    "frequencies of another width": (lambda d: d | {"rotary": {"frequencies": [1.0]}}, "rotary turns 2 channels"),
    "norms that are a list": (lambda d: d | {"norms": []}, r"attention.norms \[\]; it must be a dict"),
    "a norm without a width": (lambda d: d | {"norms": {"k_norm": {"eps": 1e-6}}}, "its attention lacks attention.norms"),
    "a norm of fewer than no channels": (lambda d: d | {"norms": {"k_norm": {"width": 0, "eps": 1e-6}}}, "at least 1"),
    "a norm of an argument that is none": (
        lambda d: d | {"norms": {"key_norm": {"width": 8, "eps": 1e-6, "parts": 2}}}, "attention.norms.key_norm.parts, which is not known"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_description_of_no_layer_is_said_before_one_is_made(name):
    change, message = DESCRIPTIONS[name]
    model = saved.put_layers(Model(), described(lambda d: d))  # control
    assert isinstance(model.attention.k_norm, QKNorm) and model.attention.ranks == (4, 9, 8)
    with pytest.raises(ValueError, match=message):
        saved.put_layers(Model(), described(change))


def test_a_layer_that_computes_more_than_a_file_can_say_is_not_written(tmp_path):
    class Twice(TuckerAttention):
        def forward(self, x, **options):
            return 2 * super().forward(x, **options)

    class Slow(Rotary):
        def cos_sin(self, positions, dtype):
            return super().cos_sin(positions // 2, dtype)

    hooked, path = TuckerAttention(8, 2, (2, 3, 4)), tmp_path / "m.safetensors"
    saved.write_model(path, nn.Sequential(hooked), {})  # control
    before = path.read_bytes()
    hooked.register_forward_hook(lambda _module, _given, y: 2 * y)
    for layer, message in (
        (hooked, "layer has a forward hook"),
        (Twice(8, 2, (2, 3, 4)), "layer is Twice, whose forward is code of its own"),
        (TuckerAttention(8, 2, (2, 3, 4), rotary=Slow([1.0, 0.1])), "rotary is Slow, which turns by code of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            saved.write_model(path, nn.Sequential(layer), {})
    assert path.read_bytes() == before


def test_a_norm_is_described_by_its_kind():
    norms = {"key_norm": {"width": 8, "eps": None}, "k_norm": {"width": 8, "heads": None, "blocks": 2, "count": 4, "eps": 1e-5}}
    made = saved.put_layers(Model(), described(lambda d: d | {"norms": norms})).attention
    assert isinstance(made.key_norm, LatentNorm) and made.key_norm.eps is None
    assert isinstance(made.k_norm, QKNorm) and (made.k_norm.blocks, made.k_norm.count, made.k_norm.eps) == (2, 4, 1e-5)


@pytest.mark.parametrize("place", ["", "elsewhere", "attention.pre.core"])
def test_a_layer_that_the_model_does_not_have_is_named(place):
    with pytest.raises(ValueError, match=f"its attention describes a layer at {place!r}, where the model has none"):
        saved.put_layers(Model(), {"attention": json.dumps({place: saved.describe(layer())})})
    with pytest.raises(ValueError, match=r"its attention is \[\]; it must be a dict"):
        saved.put_layers(Model(), {"attention": "[]"})


def test_a_mistake_of_ours_while_a_file_s_model_is_built_is_no_fault_of_the_file(tmp_path):
    with pytest.raises(TypeError), saved.described(tmp_path):
        OF_THE_PROGRAM["the library's code"]()
    with (
        pytest.raises(ValueError, match="describes no model that can be built: KeyError: 'missing'"),
        saved.described(tmp_path),
    ):
        OF_A_FILE["a library asks PyTorch"]()  # control


PUBLIC = {
    "no dict": (lambda m: m | {"public": "3"}, "its public is 3; it must be a dict"),
    "no kind": (lambda m: m | {"public": '{"config": {}}'}, "its public lacks config.model_type"),
    "no configuration": (lambda m: m | {"public": "{}"}, "its public lacks config"),
    "no classes": (lambda m: m | {"public": '{"timm": "vit"}'}, "its public lacks arguments"),
    "layers in a list": (lambda m: m | {"attention": "[]"}, r"its attention is \[\]; it must be a dict"),
    "a layer elsewhere": (lambda m: m | {"attention": '{"x.attention": {}}'}, "its attention describes a layer at 'x', where"),
    "no JSON": (lambda m: m | {"public": "{"}, "its public: Expecting"),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_what_a_file_says_of_a_public_model_is_checked(name, llama, tmp_path):
    change, message = PUBLIC[name]
    path = tmp_path / "small.safetensors"
    public_models.open_model(str(llama)).save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    saved.safetensors.torch.save_file(tensors, path, metadata={k: v for k, v in metadata.items() if k != "name"})
    assert public_models.open_model(str(path)).name == "small"  # control, of a file that does not say its model's name
    saved.safetensors.torch.save_file(tensors, path, metadata=change(metadata))
    with pytest.raises(ValueError, match=f"small.safetensors describes no model that can be built: ValueError: {message}"):
        public_models.open_model(str(path))


def test_a_public_model_of_a_changed_description_is_refused(llama, tmp_path):
    """With the same weights it would be another model."""
    path = tmp_path / "small.safetensors"
    public_models.open_model(str(llama)).save(path)
    metadata, tensors = saved.read_model(path)
    public = json.loads(metadata["public"])
    public["config"]["rms_norm_eps"] = 0.5
    changed = metadata | {"public": json.dumps(public)}
    for seal in (saved.seal_of(changed), metadata["seal"]):  # a control: whoever writes it so means it
        saved.safetensors.torch.save_file(tensors, path, metadata=changed | {"seal": seal})
        if seal != metadata["seal"]:
            assert public_models.open_model(str(path)).model.config.rms_norm_eps == 0.5
    with pytest.raises(ValueError, match="small.safetensors: the description of its model was changed after it was written"):
        public_models.open_model(str(path))
