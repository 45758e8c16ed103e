"""timm's vision transformers: plain ones open, all others are refused; nothing that a file says reaches timm but a number of classes."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import relative_error
from torch import nn

from reproduce.models.public import timm_models
from reproduce.train.public_models import open_model
from tucker_ref import compress as reduce

pytest.importorskip("transformers", reason="transformers is not installed; it is in the public extra")


def inputs() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("qkv_bias", [True, False])
@torch.no_grad()
def test_timm(monkeypatch, tmp_path, qkv_bias):
    timm = pytest.importorskip("timm", reason="timm is not installed; it needs torchvision", exc_type=ImportError)
    create = timm.create_model
    torch.manual_seed(0)
    small = dict(img_size=16, patch_size=4, embed_dim=48, num_heads=6, depth=2, qkv_bias=qkv_bias, num_classes=10)
    source = create("vit_tiny_patch16_224", **small).eval()
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained=False, **_: source if pretrained else create(name, **small).eval()
    )
    opened, x = open_model("vit_tiny_patch16_224"), inputs()
    expected = source(x).clone()
    opened.put(opened.layers)
    assert relative_error(opened.model(x), expected) < 1e-5
    assert relative_error(opened.logits(opened.model, x), expected) < 1e-5  # its images lie in [-1, 1]
    smaller = {place: reduce(layer, (4, 24, 16)) for place, layer in opened.layers.items()}
    opened.put(smaller)
    opened.save(tmp_path / "small.safetensors")
    again = open_model(str(tmp_path / "small.safetensors"))
    assert [layer.ranks for layer in again.layers.values()] == [(4, 24, 16)] * 2
    assert torch.equal(again.model(x), opened.model(x)) and relative_error(again.model(x), expected) > 1e-4


class Attention(nn.Module):
    """As timm has it; extra: something that no layer here has."""

    def __init__(self, extra: str = ""):
        super().__init__()
        self.head_dim, self.scale, self.extra = 8, 8**-0.5, extra
        self.qkv, self.proj = nn.Linear(48, 144), nn.Linear(48, 48)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if extra == "q_bias":
            self.q_bias = nn.Parameter(torch.zeros(48))

    def forward(self, x, attn_mask=None, rope=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, 6, 8)).permute(2, 0, 3, 1, 4)  # (b, h, n, k) each
        if self.extra == "hidden":  # nothing in its weights tells
            q = q.flip(2)
        z = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(z.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, extra: str):
        super().__init__()
        self.norm, self.attn, self.rope = nn.LayerNorm(48), Attention(extra), extra == "rope"

    def forward(self, x):
        return x + self.attn(self.norm(x), **({"rope": torch.ones(3)} if self.rope else {}))


class Plain(nn.Module):
    """A vision transformer in the shape of timm's."""

    def __init__(self, num_classes: int = 10, extra: str = "", img_size=(16, 16)):
        super().__init__()
        torch.manual_seed(0)
        self.num_classes, self.pretrained_cfg = num_classes, {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        self.patch_embed = nn.Conv2d(3, 48, 4, stride=4)
        self.patch_embed.img_size = img_size
        self.blocks, self.head = nn.Sequential(Block(extra), Block(extra)), nn.Linear(48, num_classes)

    def forward_features(self, x):
        return self.blocks(self.patch_embed(x).flatten(2).mT)

    def forward(self, x):
        return self.head(self.forward_features(x).mean(1))


@pytest.fixture
def timm(monkeypatch):
    """A stand-in that keeps what it is asked for."""
    module = SimpleNamespace(__version__="1.0.9", asked=[], extra={})

    def create_model(name, pretrained=False, **arguments):
        module.asked.append((name, pretrained, arguments))
        return Plain(**arguments, **module.extra)

    module.create_model, module.is_model = create_model, lambda name: name.startswith("vit_")
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


@torch.no_grad()
def test_a_plain_one_opens_is_saved_and_opens_again(timm, tmp_path):
    opened, x = open_model("timm/vit_tiny.in1k"), inputs()
    assert (opened.name, opened.image_size, len(opened.layers)) == ("vit_tiny.in1k", 16, 2) and opened.weights
    expected = Plain().eval()(x)
    assert relative_error(opened.logits(opened.model, x), expected) < 1e-5
    opened.put({place: reduce(layer, (4, 24, 16)) for place, layer in opened.layers.items()})
    opened.save(tmp_path / "small.safetensors")
    again = open_model(str(tmp_path / "small.safetensors"))
    assert torch.equal(again.logits(again.model, x), opened.logits(opened.model, x))
    assert timm.asked == [("vit_tiny.in1k", True, {}), ("vit_tiny.in1k", False, {"num_classes": 10})]


@pytest.mark.parametrize(
    "public, message",
    [
        ({"timm": "hf-hub:someone/vit"}, "timm knows no model hf-hub:someone/vit"),
        (
            {"timm": "vit_tiny", "arguments": {"num_classes": "10"}},
            'its public has arguments.num_classes "10"; it must be an integer',
        ),
    ],
)
def test_a_file_leads_timm_nowhere_else(public, message, timm, tmp_path):
    """Older timm unpickles what `checkpoint_path` names; a name may lead to the hub or another folder."""
    opened = open_model("vit_tiny")
    evil = {"num_classes": 10, "checkpoint_path": "innocent.bin"}
    opened.metadata["public"] = json.dumps({"timm": "vit_tiny", "arguments": evil})
    opened.put({place: reduce(layer, (4, 24, 16)) for place, layer in opened.layers.items()})
    opened.save(tmp_path / "m.safetensors")
    open_model(str(tmp_path / "m.safetensors"))
    assert timm.asked[-1] == ("vit_tiny", False, {"num_classes": 10})
    opened.metadata["public"] = json.dumps({"arguments": {"num_classes": 10}} | public)
    opened.save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=f"m.safetensors describes no model that can be built: ValueError: {message}"):
        open_model(str(tmp_path / "m.safetensors"))


@pytest.mark.parametrize(
    "extra, message",
    [
        (dict(extra="q_bias"), "its attention holds q_bias, which is not known here"),
        (dict(extra="rope"), "this attention is given rope, which no layer here knows"),
        (dict(extra="hidden"), r"its attention is not what is known here: .* first at blocks.0.attn"),
        (dict(img_size=(16, 32)), "img_size is 16 x 32: only square images are known here"),
        (dict(img_size=None), "only timm's plain vision transformers are known here"),
    ],
)
def test_what_is_not_plain_is_refused(extra, message, timm):
    open_model("vit_tiny")  # control
    timm.extra = extra
    with pytest.raises(ValueError, match=f"--model vit_tiny cannot be opened: {message}"):
        open_model("vit_tiny")


def test_a_timm_that_may_unpickle_is_refused(timm):
    for version, allowed in (("1.0.31", True), ("1.1.0.dev0", True), ("0.9.16", False), ("1.0.8", False)):
        timm.__version__ = version
        if allowed:
            timm_models.check_version(version)
        else:
            with pytest.raises(ValueError, match=f"timm {version} may unpickle weights; 1.0.9 or newer does not"):
                open_model("vit_tiny")


def test_without_timm_a_name_is_one_of_the_hub_s(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert timm_models.open_timm("vit_tiny") is None
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(is_model=lambda name: False))
    assert timm_models.open_timm("gpt2") is None
