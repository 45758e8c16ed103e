"""What belongs to a layer may be replaced, by an adapter, a quantised matrix or another norm. Who reads its weights alone says so."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import DIFFERENT, EXACT, relative_error, tokens, with_large_weights
from torch import nn

from tucker_ref import (
    GroupedQueryAttention,
    LatentNorm,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    Rotary,
    TuckerAttention,
    as_tucker,
    choose_ranks,
    compress,
    relative_errors,
    second_moment,
    spectra,
    to_gqa,
    to_mla,
)
from tucker_ref.compression.normed import between_norms
from tucker_ref.norms import QKNorm
from tucker_ref.tucker_weights import TuckerWeights

X = tokens(2, 5, 24)
LAYERS = {
    "MHA": lambda: MultiHeadAttention(24, 6),
    "GQA": lambda: GroupedQueryAttention(24, 6, 2, bias="qkv"),
    "MLA": lambda: MultiHeadLatentAttention(24, 6, 10, 8),
    "MLA separated": lambda: MultiHeadLatentAttention(24, 6, 10, 8, shared_kv=False),
}
PROJECTIONS = [(name, part) for name, make in LAYERS.items() for part, p in make().named_children() if isinstance(p, nn.Linear)]


class Adapter(nn.Module):
    """As peft puts it in: the weight and the bias that it shows are those of what it adapts."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features, dtype=torch.float64))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, dtype=torch.float64))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)
    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T

    def merged(self) -> nn.Linear:
        merged = copy.deepcopy(self.base)
        with torch.no_grad():
            merged.weight += self.up @ self.down
        return merged


class Quantised(nn.Linear):
    """Its weight counts steps."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight / 127, self.bias)


def quantised(base: nn.Linear) -> nn.Linear:
    base.__class__ = Quantised
    return base


def layer_of(name):
    return with_large_weights(LAYERS[name]())


READERS = {
    "as_tucker": as_tucker,
    "compress": lambda layer: compress(layer, (2, 4, 4)),
    "spectra": spectra,
    "choose_ranks": lambda layer: choose_ranks(layer, relative_error=0.1),
    "relative_errors": lambda layer: relative_errors(layer, layer),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name, part", PROJECTIONS)
@pytest.mark.parametrize("replaced", [Adapter, quantised, nn.Sequential])
def test_who_reads_weights_alone_refuses_what_computes_with_more(name, part, replaced, reader):
    layer = layer_of(name)
    READERS[reader](layer)  # control
    setattr(layer, part, replaced(getattr(layer, part)))
    with pytest.raises(
        ValueError, match=f"^{part} is (Adapter|Quantised|Sequential); here its weight alone is read, so it must be"
    ):
        READERS[reader](layer)


@pytest.mark.parametrize("name, part", PROJECTIONS)
def test_an_adapter_counts_when_it_is_merged(name, part):
    layer, before = layer_of(name), layer_of(name)(X)
    adapter = Adapter(getattr(layer, part))
    setattr(layer, part, adapter)
    if part != "kv_b_proj":  # which no layer calls
        adapted = layer(X)
        assert relative_error(adapted, before) > DIFFERENT  # control: without it the layer is another
        setattr(layer, part, adapter.merged())
        assert relative_error(layer(X), adapted) < EXACT
    setattr(layer, part, adapter.merged())
    assert relative_error(layer(X), before) > DIFFERENT and relative_error(as_tucker(layer)(X), layer(X)) < EXACT


@pytest.mark.parametrize("name", ["MLA", "MLA separated"])
@pytest.mark.parametrize("absorb", [False, True])
def test_mla_multiplies_by_its_up_projection_and_would_leave_an_adapter_out(name, absorb):
    layer = layer_of(name)
    layer.absorb = absorb
    cache = layer.new_cache(2, 5)
    layer(X[:, :2], cache=cache)
    whole = layer.kv_b_proj
    layer.kv_b_proj = Adapter(whole)
    with pytest.raises(ValueError, match="^kv_b_proj is Adapter; here its weight alone is read"):
        layer(X[:, 2:], cache=cache)
    layer.kv_b_proj = nn.Linear(8, whole.out_features).double()
    with pytest.raises(ValueError, match="^kv_b_proj has a bias; this layer was made without, and knows none$"):
        layer(X[:, 2:], cache=cache)
    layer.kv_b_proj = whole
    assert cache.length == 2 and relative_error(layer(X[:, 2:], cache=cache), layer(X)[:, 2:]) < EXACT


@pytest.mark.parametrize("name, part", [case for case in PROJECTIONS if case[0] != "GQA"])
def test_a_bias_that_a_layer_was_not_made_with_is_refused(name, part):
    layer = layer_of(name)
    getattr(layer, part).bias = nn.Parameter(torch.ones(getattr(layer, part).out_features, dtype=torch.float64))
    with pytest.raises(ValueError, match=f"^{part} has a bias; this layer was made without, and knows none$"):
        as_tucker(layer)


@pytest.mark.parametrize("name, part", PROJECTIONS)
def test_what_only_makes_the_weight_otherwise_is_read(name, part):
    layer = layer_of(name)
    nn.utils.parametrizations.weight_norm(getattr(layer, part))
    with torch.no_grad():
        getattr(layer, part).parametrizations.weight.original0.mul_(2)
    assert relative_error(layer(X), layer_of(name)(X)) > DIFFERENT  # control
    assert relative_error(as_tucker(layer)(X), layer(X)) < EXACT


NORMED = {
    "GQA": lambda **made: GroupedQueryAttention(24, 6, 2, qk_norm="head" if made["normed"] else None),
    "MLA": lambda **made: MultiHeadLatentAttention(24, 6, 10, 8, shared_kv=False, latent_norm=made["normed"]),
    "Tucker": lambda **made: TuckerAttention(24, 6, (4, 9, 8), latent_norm=made["normed"]),
    "Tucker, heads": lambda **made: TuckerAttention(24, 6, (4, 9, 8), qk_norm="all" if made["normed"] else None),
}
WIDTHS = {"q_norm": 4, "k_norm": 4, "q_a_layernorm": 10, "query_norm": 9}


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("normed", [False, True])
def test_another_norm_is_refused_where_it_would_be_left_out_or_taken_for_the_layers_own(name, normed):
    parts = [part for part, _ in NORMED[name](normed=normed).named_children() if part.endswith("norm")]
    assert parts
    for part in parts:
        layer = with_large_weights(NORMED[name](normed=normed))
        others = [nn.LayerNorm(WIDTHS.get(part, 8)), *([] if normed else [LatentNorm(WIDTHS.get(part, 8)), nn.RMSNorm(8)])]
        for other in others:
            setattr(layer, part, other.double())
            with pytest.raises(
                ValueError, match=f"^{part} is {type(other).__name__}, a norm that this layer was not made with"
            ):
                spectra(layer)


class OnePlus(nn.RMSNorm):
    """As Gemma has it."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


class Behind(LatentNorm):
    """Its eps stands behind the root."""

    def forward(self, latent):
        return latent / (latent.square().mean(-1, keepdim=True).sqrt() + 1e-1) * self.weight


class Doubled(nn.Identity):
    def forward(self, x):
        return 2 * x


class DoubledNorm(QKNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def norms_of(layer) -> list[str]:
    return [part for part, norm in layer.named_children() if part.endswith("norm")]


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("other", [OnePlus, Behind, Doubled, DoubledNorm])
def test_a_norm_that_computes_by_code_of_its_own_is_refused(name, other):
    for normed in (False, True):
        for part in norms_of(NORMED[name](normed=normed)):
            layer = with_large_weights(NORMED[name](normed=normed))
            setattr(layer, part, other(WIDTHS.get(part, 8)).double())
            with pytest.raises(ValueError, match=f"^{part} is {other.__name__}, a norm that this layer was not made with"):
                spectra(layer)


@pytest.mark.parametrize("kind", ["head", "all"])
def test_query_and_key_norms_over_other_channels_than_the_layers_own_are_refused(kind):
    def made(heads):
        return None if kind == "head" else heads

    for part, heads in (("q_norm", 6), ("k_norm", 2)):
        for norm in (
            QKNorm(4, heads if kind == "head" else None), QKNorm(4, made(heads), count=7), QKNorm(4, made(heads), blocks=2),
            QKNorm(4, made(heads), blocks=2, count=QKNorm(4, made(heads)).count),
            QKNorm(4, heads if kind == "head" else None, count=QKNorm(4, made(heads)).count),
        ):  # fmt: skip
            layer = with_large_weights(GroupedQueryAttention(24, 6, 2, qk_norm=kind))
            as_tucker(layer)  # control
            setattr(layer, part, norm.double())
            for reader in (as_tucker, between_norms):
                with pytest.raises(
                    ValueError, match=f"^{part} takes mean squares of other channels than a layer with qk_norm='{kind}'"
                ):
                    reader(layer)


@pytest.mark.parametrize("shared_kv", [False, True])
def test_a_norm_without_gains_has_gains_of_one(shared_kv):
    layer = with_large_weights(MultiHeadLatentAttention(24, 6, 10, 8, shared_kv=shared_kv, latent_norm=True))
    for part in norms_of(layer):
        before = layer(X)
        setattr(layer, part, nn.RMSNorm(WIDTHS.get(part, 8), eps=1e-2, elementwise_affine=False))
        assert relative_error(layer(X), before) > DIFFERENT  # control
        assert relative_error(as_tucker(layer)(X), layer(X)) < EXACT


def put_hook(part: nn.Module) -> str:
    part.register_forward_hook(lambda _module, _given, y: 2 * y)
    return "hook"


def put_pre_hook(part: nn.Module) -> str:
    part.register_forward_pre_hook(lambda _module, given: (2 * given[0], *given[1:]))
    return "pre-hook"


def put_forward(part: nn.Module) -> str:
    """As accelerate does."""
    part.forward = lambda x, *more, forward=part.forward, **options: 2 * forward(x, *more, **options)
    return "method of its own"


HOOKED = {
    "GQA": lambda: GroupedQueryAttention(24, 6, 2, rotary=Rotary.heads(4), qk_norm="head"),
    "MLA": lambda: MultiHeadLatentAttention(24, 6, 10, 8, rope_dim=4, rotary=Rotary.heads(4), latent_norm=True),
    "Tucker": lambda: TuckerAttention(24, 6, (4, 9, 8), rotary=Rotary.latent(8)),
} | {f"{name} without norms": make for name, make in LAYERS.items()}


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("put", [put_hook, put_pre_hook, put_forward])
def test_what_is_hooked_to_a_part_or_to_the_layer_is_refused(name, put):
    for part in ("", *(part for part, _ in HOOKED[name]().named_children())):
        layer = with_large_weights(HOOKED[name]())
        hooked, before = layer.get_submodule(part), layer(X)
        kind = put(hooked)
        if part not in ("kv_b_proj", "pre", "post") and not (put is put_pre_hook and part.endswith("norm")):
            assert (
                relative_error(layer(X), before) > 1e-9
            )  # control: it counts where the part is called; a norm leaves a trace of a size
        for reader in READERS.values() if "without" in name else (spectra, *([] if name == "Tucker" else [as_tucker])):
            with pytest.raises(ValueError, match=f"^{part or 'layer'} has a forward {kind}, which is not read here"):
                reader(layer)


def test_a_rotary_embedding_that_turns_by_code_of_its_own_is_refused():
    class Slow(Rotary):
        def forward(self, x, positions):
            return super().forward(x, positions // 2)

    layer = with_large_weights(GroupedQueryAttention(24, 6, 2, rotary=Slow([1.0, 0.1])))
    assert (
        relative_error(layer(X), with_large_weights(GroupedQueryAttention(24, 6, 2, rotary=Rotary([1.0, 0.1])))(X)) > DIFFERENT
    )
    for reader in READERS.values():
        with pytest.raises(ValueError, match="^rotary is Slow, which turns by code of its own that is not known here$"):
            reader(layer)


def test_so_is_one_that_only_has_other_angles_and_one_that_is_no_module_of_torch():
    class Slow(Rotary):
        def cos_sin(self, positions, dtype):
            return super().cos_sin(positions // 2, dtype)

    class Alone:
        width = 4

        def __call__(self, x, _positions):
            return x.flip(-1)

    plain = with_large_weights(GroupedQueryAttention(24, 6, 2, rotary=Rotary([1.0, 0.1])))
    for rotary in (Slow([1.0, 0.1]), Alone()):
        layer = with_large_weights(GroupedQueryAttention(24, 6, 2, rotary=rotary))
        assert relative_error(layer(X), plain(X)) > DIFFERENT  # control
        for reader in READERS.values():
            with pytest.raises(ValueError, match=f"^rotary is {type(rotary).__name__}, which turns by code of its own"):
                reader(layer)


def with_method(layer: nn.Module, name: str, method) -> nn.Module:
    """Of a class of its own, which has this method and is else the layer's."""
    layer.__class__ = type("Own", (type(layer),), {name: method})
    return layer


def doubled(kind: type[nn.Module], name: str):
    """The method of this class, with all that it gives twice as large."""

    def method(self, *given, **options):
        y = getattr(kind, name)(self, *given, **options)
        return 2 * y if isinstance(y, torch.Tensor) else tuple(2 * part for part in y)

    return method


COMPUTING = {
    "MHA": ("forward", "_attention", "__call__"),
    "GQA": ("forward", "_attention"),
    "MLA": ("forward", "_queries", "_latents", "up_projections", "__call__"),
    "MLA separated": ("forward", "up_projections"),
    "Tucker": ("forward", "_attention", "_latents", "__call__"),
    "Tucker turned": ("forward", "_turned", "_keys_and_values"),
}
OWN = {
    "Tucker": lambda: TuckerAttention(24, 6, (4, 9, 8)),
    "Tucker turned": lambda: TuckerAttention(24, 6, (4, 9, 8), rotary=Rotary.latent(8)),
} | LAYERS


@pytest.mark.parametrize("name, method", [(name, method) for name in OWN for method in COMPUTING[name]])
def test_a_subclass_that_computes_by_code_of_its_own_is_refused(name, method):
    layer = with_large_weights(OWN[name]())
    before, kind = layer(X), type(layer)
    with_method(layer, method, doubled(kind, method))
    assert relative_error(layer(X), before) > DIFFERENT  # control
    refused = [reader for called, reader in READERS.items() if not (kind is TuckerAttention and called == "as_tucker")]
    conversions = [
        lambda layer: to_gqa(layer, 2),
        lambda layer: to_gqa(layer, 2, method="mean"),
        lambda layer: to_mla(layer, 4, 4),
    ]
    for reader in refused + (conversions if kind is MultiHeadAttention else []):
        with pytest.raises(
            ValueError,
            match=f"^layer is Own, whose {method} is code of its own that is not read here; only those of MultiHeadAttention, ",
        ):
            reader(layer)
    if kind is TuckerAttention:  # a copy computes what the layer computes
        assert torch.equal(as_tucker(layer)(X), layer(X))


def test_so_is_a_layer_itself_with_such_a_method_and_one_between_norms():
    layer = layer_of("MHA")
    layer._attention = lambda *given, **options: 2 * MultiHeadAttention._attention(layer, *given, **options)
    with pytest.raises(ValueError, match="^layer is MultiHeadAttention, whose _attention is code of its own"):
        as_tucker(layer)
    layer = with_method(with_large_weights(NORMED["GQA"](normed=True)), "forward", doubled(GroupedQueryAttention, "forward"))
    with pytest.raises(ValueError, match="^layer is Own, whose forward is code of its own"):
        between_norms(layer)


@pytest.mark.parametrize("name", OWN)
def test_a_subclass_that_computes_as_its_layer_does_is_read(name):
    layer = with_large_weights(OWN[name]())
    wanted = [reader(layer) for reader in (as_tucker, lambda layer: compress(layer, (2, 4, 4)))]
    with_method(layer, "reset_parameters", lambda self: None).more = 1
    for reader, expected in zip((as_tucker, lambda layer: compress(layer, (2, 4, 4))), wanted):
        assert torch.equal(reader(layer)(X), expected(X))


class Softmaxed(TuckerWeights):
    def head_cores(self):
        return torch.einsum("rst,hr->hst", self.core, self.head.softmax(-1))


@pytest.mark.parametrize("part", ["pre", "post"])
def test_a_tensor_that_is_made_by_code_of_its_own_is_refused(part):
    layer = with_large_weights(OWN["Tucker"]())
    before, weights = layer(X), getattr(layer, part)
    setattr(layer, part, Softmaxed(weights.core, dict(zip(weights.names, weights.factors))))
    assert relative_error(layer(X), before) > DIFFERENT  # control
    for reader in READERS.values():
        if reader is not as_tucker:
            with pytest.raises(
                ValueError,
                match=f"^{part} is Softmaxed, whose head_cores is code of its own that is not read here; only those of Tucker",
            ):
                reader(layer)


@pytest.mark.parametrize("part", ["pre", "post"])
def test_so_is_what_is_no_such_tensor(part):
    layer = with_large_weights(OWN["Tucker"]())
    setattr(layer, part, nn.Linear(24, 24))
    with pytest.raises(
        ValueError, match=f"^{part} is Linear, whose forward is code of its own that is not read here; only those of"
    ):
        compress(layer, (2, 4, 4))


def test_a_shared_latent_that_was_replaced_is_the_one_that_is_read():
    layer = with_large_weights(TuckerAttention(24, 6, (6, 24, 24), shared_kv=True))
    before = layer(X)
    layer.pre = with_large_weights(TuckerAttention(24, 6, (6, 24, 24)), seed=1).pre
    assert relative_error(layer(X), before) > DIFFERENT  # control
    assert relative_error(compress(layer, (6, 24, 24))(X), layer(X)) < 1e-9


def test_a_rotary_embedding_that_latent_attention_was_made_without_turns_nothing():
    layer, other = (with_large_weights(MultiHeadLatentAttention(24, 6, 10, 8, rotary=r)) for r in (None, Rotary.latent(8)))
    layer.rotary = Rotary.latent(8)
    assert relative_error(layer(X), other(X)) > DIFFERENT  # control
    assert relative_error(as_tucker(layer)(X), layer(X)) < EXACT


@pytest.mark.parametrize("name", ["GQA", "MLA"])
def test_a_parametrised_norm_is_read(name):
    for part in norms_of(NORMED[name](normed=True)):
        layer = with_large_weights(NORMED[name](normed=True))
        before = layer(X)
        nn.utils.parametrize.register_parametrization(getattr(layer, part), "weight", OneMore())
        assert relative_error(layer(X), before) > DIFFERENT  # control
        assert relative_error(as_tucker(layer)(X), layer(X)) < EXACT


class OneMore(nn.Module):
    """A weight counts from one, and grows with its place, so that it is no scale."""

    def forward(self, weight):
        return 1 + weight * torch.linspace(0, 1, weight.shape[0], dtype=weight.dtype).view(-1, *[1] * (weight.ndim - 1))


def test_queries_that_read_the_token_itself_have_no_norm():
    """As DeepSeek-V2 Lite has it: the identity stands where the norm would."""
    layer = with_large_weights(MultiHeadLatentAttention(24, 6, 24, 8, latent_norm=True))
    layer.q_a_layernorm = nn.Identity()
    assert relative_error(as_tucker(layer)(X), layer(X)) < EXACT


@pytest.mark.parametrize("replaced", [Adapter, quantised])
def test_conversions_refuse_them_as_well(replaced):
    layer = layer_of("MHA")
    layer.k_proj = replaced(layer.k_proj)
    for convert in (
        lambda: to_gqa(layer, 3),
        lambda: to_gqa(layer, 3, method="mean"),
        lambda: to_mla(layer, 8, 8),
        lambda: compress(layer, (2, 4, 4), moment=second_moment(layer, X)),
    ):
        with pytest.raises(ValueError, match="^k_proj is (Adapter|Quantised)"):
            convert()


@pytest.mark.parametrize("method", ["svd", "mean"])
def test_groups_of_a_parametrised_layer_are_those_of_its_weights(method):
    layer = layer_of("GQA")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        before = layer(X)
        nn.utils.parametrize.register_parametrization(getattr(layer, name), "weight", OneMore())
        assert relative_error(layer(X), before) > DIFFERENT  # control
        assert relative_error(to_gqa(layer, 2, method=method)(X), layer(X)) < EXACT


def test_between_norms_nothing_parametrised_is_written_to_and_no_other_norm_is_known():
    for name in ("q_proj", "k_proj"):
        layer = with_large_weights(NORMED["GQA"](normed=True))
        between_norms(layer)  # control
        nn.utils.parametrize.register_parametrization(getattr(layer, name), "weight", OneMore())
        with pytest.raises(ValueError, match="^a projection of the layer is parametrised; between norms it is written to"):
            between_norms(layer)
    layer.k_norm = nn.RMSNorm(4).double()
    with pytest.raises(ValueError, match="^k_norm is RMSNorm, a norm that this layer was not made with"):
        between_norms(layer)
