"""Muon: torch's own on matrices, slice by slice on cores, and one optimiser together with AdamW."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from helpers import relative_error, times_tables

from reproduce import __main__
from reproduce.experiments import ablations, table2
from reproduce.models.gpt2 import GPT2
from reproduce.models.rows import TABLE2, TABLE2_BEST, TABLE2_NORMED, Row
from reproduce.store import records
from reproduce.train import language
from reproduce.train.loop import train
from reproduce.train.muon import Muon, newton_schulz, orthogonal
from reproduce.train.optimizers import Together, make_muon
from reproduce.train.options import Options
from reproduce.train.recipes import Recipe
from reproduce.train.settings import TrainConfig
from reproduce.trust import survival

CONFIG = TrainConfig(
    steps=4, batch_size=2, learning_rate=1e-2, warmup_steps=2, log_every=1, checkpoint_every=2, optimizer="muon"
)
TUCKER = Row("Tucker", ranks=(8, 20, 24))
SHAPES = ((32, 48), (48, 32), (32, 48), (20, 17), (64, 64), (3, 32, 48), (3, 48, 20))


def random(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepped(make, tensors, steps=3):
    """How far some steps with the same random gradients take the parameters."""
    params = [torch.nn.Parameter(t.clone()) for t in tensors]
    optimizer = make(params)
    for step in range(steps):
        for number, p in enumerate(params):
            p.grad = random(p.shape, 100 * step + number)
        optimizer.step()
    return [p.detach() - t for p, t in zip(params, tensors)]


def test_on_matrices_it_is_torchs_own():
    start = [random(shape, n) for n, shape in enumerate(SHAPES) if len(shape) == 2]
    ours = stepped(lambda params: Muon(params, 1e-2, weight_decay=0.1), start)
    theirs = lambda rule: lambda params: torch.optim.Muon(params, 1e-2, weight_decay=0.1, adjust_lr_fn=rule)  # noqa: E731
    same, other = stepped(theirs("match_rms_adamw"), start), stepped(theirs("original"), start)
    # A batch may add up bfloat16 products in another order than one matrix by itself; five iterations pass that on.
    assert max(map(relative_error, ours, same)) < 1e-4
    assert min(map(relative_error, ours, other)) > 1e-2  # control: another size of the steps


def test_a_core_is_as_many_matrices_as_it_has_slices():
    core = random((3, 32, 48), 0)
    whole, *slices = orthogonal([core, *core])
    assert relative_error(whole, torch.stack(slices)) < 1e-2  # of bfloat16
    unfolded = orthogonal([core.flatten(0, 1)])[0].view_as(core)
    assert relative_error(whole, unfolded) > 0.3  # control: an unfolding shares one budget among the slices


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[-1] != shape[-2]], ids=str)  # square ones reach down to 0
def test_singular_values_end_around_one_in_any_precision(shape):
    for dtype in (torch.float32, torch.float64):
        x = random(shape, 1).to(dtype)
        result = orthogonal([x])[0]
        assert result.shape == x.shape and result.dtype == dtype
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.6 and values.max() < 1.25
        assert torch.linalg.svdvals(x).max() > 5  # control


def test_the_iteration_keeps_the_singular_vectors():
    x = random((1, 20, 30), 2).double()
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    middle = u.mT @ newton_schulz(x) @ vh.mT
    assert relative_error(torch.diag_embed(middle.diagonal(dim1=1, dim2=2)), middle) < 1e-12


def model_of(row=TUCKER):
    torch.manual_seed(0)
    return GPT2(50, 16, 48, 12, 2, row.build)


def windows(step):
    return (torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(step)),)


def test_each_parameter_has_one_optimiser_the_right_one():
    model = model_of()
    adamw, muon = make_muon(model, CONFIG).optimizers
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon, by_adamw = (sorted(names[id(p)] for g in o.param_groups for p in g["params"]) for o in (muon, adamw))
    assert sorted(by_muon + by_adamw) == sorted(names.values())
    kinds = ("mlp.up.weight", "mlp.down.weight", "pre.core", "pre.query", "pre.key", "post.core", "post.output", "post.value")
    assert by_muon == sorted(
        f"blocks.{n}.{kind if kind.startswith('mlp') else f'attention.{kind}'}" for n in range(2) for kind in kinds
    )
    assert {g["weight_decay"] for g in adamw.param_groups} == {0.0, CONFIG.weight_decay}


@pytest.mark.parametrize("row", TABLE2_BEST, ids=lambda row: row.label)
def test_at_any_width_the_same_parameters_of_a_row_are_matrices(row):
    """Four times narrower a latent is 16 wide, which is still a matrix; a head factor is none, be it as wide as Llama's 32 heads."""

    def by_muon(d_model, n_heads, row):
        with torch.device("meta"):
            model = GPT2(50, 16, d_model, n_heads, 1, row.build)
        names = {id(p): name for name, p in model.named_parameters()}
        (group,) = make_muon(model, CONFIG).optimizers[1].param_groups
        return sorted(names[id(p)] for p in group["params"])

    wide = by_muon(768, 12, row)
    assert by_muon(192, 12, row.narrowed(4)) == wide and len(wide) >= 6
    many_heads = dataclasses.replace(row, ranks=(32, *row.ranks[1:])) if row.ranks else row
    assert by_muon(768, 32 if row.mechanism != "GQA" else 12, many_heads) == wide
    assert not [name for name in wide if name.endswith(".head")]


def test_adamw_beside_it_runs_at_half_the_rate(tmp_path):
    model, made = model_of(), []
    train(
        model, windows, GPT2.loss, CONFIG, tmp_path / "c.pt", "", optimizer_of=lambda *a: made.append(make_muon(*a)) or made[-1]
    )
    rates = [{g["lr"] for g in optimizer.param_groups} for optimizer in made[0].optimizers]
    assert rates[0] == {0.5 * rate for rate in rates[1]}


def test_a_resumed_run_takes_the_same_steps(tmp_path):
    whole, stopped = model_of(), model_of()
    train(whole, windows, GPT2.loss, CONFIG, tmp_path / "whole.pt", "", optimizer_of=Recipe().optimizer)

    def until_three(step):
        if step == 3:
            raise InterruptedError
        return windows(step)

    with pytest.raises(InterruptedError):
        train(stopped, until_three, GPT2.loss, CONFIG, tmp_path / "part.pt", "", optimizer_of=Recipe().optimizer)
    resumed = model_of()
    train(resumed, windows, GPT2.loss, CONFIG, tmp_path / "part.pt", "", optimizer_of=Recipe().optimizer)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
    forgetful = model_of()
    state = torch.load(tmp_path / "whole.pt", weights_only=True)
    forgetful.load_state_dict(state["model"])
    assert len(state["optimizer"]["state"]) == len(list(forgetful.parameters()))  # every parameter's, under its own number
    with pytest.raises(ValueError, match="belongs to a run with another optimizer"):
        train(forgetful, windows, GPT2.loss, dataclasses.replace(CONFIG, optimizer="adamw"), tmp_path / "whole.pt", "")


def test_two_optimisers_of_one_kind_are_one_optimiser():
    def trained(make):
        a, b = (torch.nn.Parameter(random((20, 30), n)) for n in range(2))
        optimizer = make(a, b)
        for step in range(4):
            optimizer.zero_grad()
            (a @ b.T @ random((20, 3), step)).square().sum().backward()
            optimizer.step()
            if step == 1:  # as a checkpoint takes it up
                state, optimizer = optimizer.state_dict(), make(a, b)
                optimizer.load_state_dict(state)
        return torch.stack([a, b]).detach()

    one = trained(lambda a, b: torch.optim.AdamW([a, b]))
    two = trained(lambda a, b: Together(torch.optim.AdamW([a]), torch.optim.AdamW([b])))
    mixed = trained(lambda a, b: Together(torch.optim.AdamW([a]), torch.optim.AdamW([b], lr=2e-3)))
    assert torch.equal(one, two) and not torch.equal(one, mixed)


def test_states_of_other_parameters_are_refused():
    a, b = (torch.nn.Parameter(random((20, 30), n)) for n in range(2))
    both = Together(torch.optim.AdamW([a]), torch.optim.AdamW([b]))
    with pytest.raises(ValueError, match="parameter group"):
        Together(torch.optim.AdamW([a, b]), torch.optim.AdamW([a])).load_state_dict(both.state_dict())


def test_parameters_without_gradients_stay_and_vectors_are_refused():
    used, unused = (torch.nn.Parameter(random((20, 30), n)) for n in range(2))
    before, optimizer = unused.detach().clone(), Muon([{"params": [used]}, {"params": [unused]}], 1e-2)
    used.grad = random((20, 30), 3)
    assert optimizer.step(lambda: 7) == 7
    assert torch.equal(unused, before) and not optimizer.state[unused]
    with pytest.raises(ValueError, match=r"Muon got a parameter of shape \(30,\); it needs rows and columns"):
        Muon([torch.nn.Parameter(torch.zeros(30))], 1e-2)


def test_recipes_that_need_adamw_say_so():
    model = model_of()
    with pytest.raises(ValueError, match="recipe 'decay of the product': product_decay go with AdamW, not with muon"):
        Recipe("decay of the product", product_decay=True).optimizer(model, CONFIG)
    with pytest.raises(ValueError, match="attention_rate go with AdamW"):
        ablations.SLOWER_ATTENTION.optimizer(model, CONFIG)
    assert isinstance(Recipe("init xavier", init="xavier").optimizer(model, CONFIG), Together)
    with pytest.raises(ValueError, match="optimizer is 'sgd'; it must be one of adamw, muon"):
        dataclasses.replace(CONFIG, optimizer="sgd")


def test_records_from_before_muon_keep_their_ids():
    assert "optimizer" not in dataclasses.replace(CONFIG, optimizer="adamw").config()
    assert CONFIG.config()["optimizer"] == "muon"
    options = Options("gpu-sweep", *2 * (None,), optimizer="muon")
    assert language.settings_of(TABLE2[0], Recipe(), table2.PRESETS["gpu-sweep"], options).optimizer == "muon"


# --- each token once --------------------------------------------------------------------------------------------------------


def test_one_pass_reads_every_window_once_in_the_order_of_its_seed():
    tokens, settings = np.arange(1025, dtype=np.uint16), dataclasses.replace(CONFIG, steps=8, batch_size=8)
    first, again, other = (language.fresh_windows(tokens, seed, settings, 16) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    targets = language.stacked(tokens, first, 16)[:, 1:]
    assert sorted(targets.flatten().tolist()) == list(range(1, 1025))  # all but the first token are predicted, each once
    random_starts = [language.batch_of(tokens, step, 0, 8, 16)[:, 1:].flatten() for step in range(8)]
    assert len(set(torch.cat(random_starts).tolist())) < 1024  # control: windows with replacement miss some


def test_one_pass_over_too_little_text_says_how_many_steps_it_has():
    settings = dataclasses.replace(CONFIG, steps=9, batch_size=8)
    with pytest.raises(
        ValueError, match=r"9 steps of 8 windows need 1,153 tokens, each read once; the text has 1,025: at most 8 st"
    ):
        language.fresh_windows(np.zeros(1025, np.uint16), 0, settings, 16)


@pytest.mark.parametrize("passes, steps", [(2, 16), (2, 9), (3, 7)])
def test_a_second_pass_takes_the_same_windows_in_another_order(passes, steps):
    tokens, settings = np.arange(1025, dtype=np.uint16), dataclasses.replace(CONFIG, steps=steps, batch_size=8)
    starts = language.fresh_windows(tokens, 3, settings, 16, passes)
    assert steps * 8 <= len(starts) < steps * 8 + passes
    orders = np.split(starts, passes)
    assert all(sorted(order) == sorted(orders[0]) for order in orders) and len(set(orders[0])) == len(orders[0])
    assert len({tuple(order) for order in orders}) == passes
    once = dataclasses.replace(settings, steps=len(orders[0]) // 8)
    assert np.array_equal(language.fresh_windows(tokens, 3, once, 16), orders[0][: once.steps * 8])  # as in a run of one pass


def test_too_many_passes_say_how_many_steps_the_text_has():
    settings = dataclasses.replace(CONFIG, steps=17, batch_size=8)
    with pytest.raises(ValueError, match=r"need 1,089 tokens, each read 2 times; the text has 1,025: at most 16 steps"):
        language.fresh_windows(np.zeros(1025, np.uint16), 0, settings, 16, 2)


def test_passes_change_steps_and_warm_up_and_are_on_record():
    def at(passes, preset="gpu-fresh", **more):
        options = Options(preset, *2 * (None,), passes=passes, **more)
        settings = language.settings_of(TABLE2[0], Recipe(), table2.PRESETS[preset], options)
        return settings.steps, settings.warmup_steps, language.passes_of(table2.PRESETS[preset], options)

    assert at(None) == at(1) == (1980, 400, {"one_pass": True})  # the same run: its id covers nothing new
    assert at(0.5) == (990, 200, {"one_pass": True})
    assert at(2) == (3960, 800, {"passes": 2}) and at(2, steps=3000)[0] == 3000
    assert at(2, "gpu-fresh-narrow") == at(2)
    with pytest.raises(ValueError, match="--passes: --preset gpu draws its windows at random"):
        at(1, "gpu")
    assert at(None, "gpu")[2] == {}


@pytest.fixture
def text(tmp_path):
    return str(times_tables(tmp_path / "text"))


def test_each_mechanism_stands_with_and_without_its_norm():
    labels = [row.label for row in table2.ROWS["gpu-fresh"]]
    assert labels == [row.label for row in (*TABLE2_BEST, *TABLE2_NORMED)] and len(set(labels)) == 18
    assert {r.method for r in records.load(records.COMMITTED, "table2", "gpu-fresh")} <= {*labels}


def test_several_rates_are_as_many_runs(text, tmp_path, monkeypatch):
    toy = dataclasses.replace(survival.TOY, one_pass=True, train=dataclasses.replace(survival.TOY.train, optimizer="muon"))
    monkeypatch.setitem(table2.PRESETS, "smoke", toy)
    monkeypatch.setitem(table2.ROWS, "smoke", table2.FRESH_ROWS)
    rows = "MHA QK-norm,MLA shared d_c=128 latent norms"
    places = ["--text", text, "--out", str(tmp_path), "--records", str(tmp_path / "records")]
    monkeypatch.setattr(
        "sys.argv", ["reproduce", "table2", "--rows", rows, "--steps", "2", "--learning-rate", "1e-3,4e-3", *places]
    )
    assert __main__.main() == 0
    runs = records.load(tmp_path / "records", "table2", "smoke")
    trained = [run for run in runs if "train" in run.config]
    assert [(run.method, run.rate) for run in trained] == [(row, rate) for row in rows.split(",") for rate in (1e-3, 4e-3)]
    assert all(run.config["one_pass"] and run.config["train"]["optimizer"] == "muon" for run in trained)
    assert trained[0].metrics["validation_loss"] != trained[1].metrics["validation_loss"]
    monkeypatch.setattr("sys.argv", [*sys.argv, "--optimizer", "adamw"])
    assert __main__.main() == 0
    assert len(records.load(tmp_path / "records", "table2", "smoke")) == len(runs) + len(trained)
    monkeypatch.setattr("sys.argv", [*sys.argv, "--steps", "100000"])
    assert __main__.main() == 1


def test_two_passes_are_another_run(text, tmp_path, monkeypatch):
    toy = dataclasses.replace(
        survival.TOY, one_pass=True, keep_models=False, train=dataclasses.replace(survival.TOY.train, steps=3)
    )
    monkeypatch.setitem(table2.PRESETS, "smoke", toy)
    read, stacked = [], language.stacked
    monkeypatch.setattr(
        language, "stacked", lambda tokens, starts, context: read.append(list(starts)) or stacked(tokens, starts, context)
    )
    for passes in ("1", "2"):
        places = ["--text", text, "--out", str(tmp_path), "--records", str(tmp_path / "records")]
        monkeypatch.setattr("sys.argv", ["reproduce", "table2", "--rows", "MHA", "--passes", passes, *places])
        assert __main__.main() == 0
    one, two = (r for r in records.load(tmp_path / "records", "table2", "smoke") if r.is_trained)
    assert (one.config["one_pass"], one.steps, two.config["passes"], two.steps) == (True, 3, 2, 6)
    assert "passes" not in one.config and "one_pass" not in two.config
    assert read[:3] == read[3:6] != read[6:] and sorted(sum(read[3:6], [])) == sorted(sum(read[6:], []))


def test_each_rate_of_a_dry_run_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["reproduce", "table2", "--dry-run", "--rows", "MHA", "--learning-rate", "1e-3,4e-3"])
    assert __main__.main() == 0
    shown = capsys.readouterr().out
    assert "AdamW at a peak rate of 0.001" in shown and "AdamW at a peak rate of 0.004" in shown


def test_its_defaults_are_torchs_own():
    params = [torch.nn.Parameter(random((3, 4), 0))]
    ours, theirs = (kind(params, 1e-2).defaults for kind in (Muon, torch.optim.Muon))
    assert {name: theirs[name] for name in ("lr", "weight_decay", "momentum")} == ours


def test_a_group_without_gradients_holds_up_no_other():
    still, moved = (torch.nn.Parameter(random((3, 4), n)) for n in range(2))
    before = [still.detach().clone(), moved.detach().clone()]
    moved.grad = random((3, 4), 2)
    Muon([{"params": [still]}, {"params": [moved]}], 1e-2).step()
    assert torch.equal(still, before[0]) and not torch.equal(moved, before[1])


def test_a_core_of_many_slices_moves_as_its_slices_do():
    """However many there are: the size of a step is that of a slice's longer side."""

    def moved(params, grads):
        for p, grad in zip(params, grads):
            p.grad = grad
        before = [p.detach().clone() for p in params]
        Muon(params, 1e-2, weight_decay=0.0).step()
        return [p.detach() - b for p, b in zip(params, before)]

    core, grad = random((40, 6, 8), 0).double(), random((40, 6, 8), 1).double()
    [whole] = moved([torch.nn.Parameter(core.clone())], [grad])
    slices = moved([torch.nn.Parameter(part.clone()) for part in core], list(grad))
    assert relative_error(whole, torch.stack(slices)) < 1e-12
    assert (
        relative_error(whole, -1e-2 * 0.2 * 40**0.5 * torch.stack(orthogonal(list(grad)))) > 0.1
    )  # control: the longest of all


def test_cores_of_the_same_sizes_in_another_order_are_other_matrices():
    one, other = orthogonal([random((3, 4, 5), 0), random((4, 3, 5), 1)])
    for result, alone in ((one, random((3, 4, 5), 0)), (other, random((4, 3, 5), 1))):
        assert relative_error(result, orthogonal([alone])[0]) < 1e-2


def test_float64_is_kept_and_the_size_of_gradients_is_forgotten():
    x = random((20, 30), 2).double()
    [whole] = orthogonal([x])
    assert relative_error(whole, newton_schulz(x[None])[0]) < 1e-14
    assert relative_error(orthogonal([x.float()])[0].double(), whole) > 1e-4  # control: bfloat16
    assert relative_error(newton_schulz(1e-6 * x[None]), newton_schulz(x[None])) < 1e-12
    assert not newton_schulz(torch.zeros(1, 2, 3)).any()
