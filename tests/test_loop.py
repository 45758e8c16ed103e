"""The training loop: the same digits after a crash, checkpoints that are whole or absent, errors that say what to do."""

import dataclasses

import pytest
import torch
from torch import nn

from reproduce.train import loop
from reproduce.train.loop import train
from reproduce.train.optimizers import make_optimizer
from reproduce.train.settings import TrainConfig, learning_rate_at
from tucker_ref import TuckerAttention

CONFIG = TrainConfig(steps=30, batch_size=8, learning_rate=1e-2, warmup_steps=5, log_every=5, checkpoint_every=10)


def fresh_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def batch_at(step):
    return (torch.randn(CONFIG.batch_size, 6, generator=torch.Generator().manual_seed(step)),)


def loss_of(model, x):
    return (model(x) - x[:, :3].flip(1)).square().mean()


class Crash(Exception):
    pass


def crash_at(step_to_die):
    def batch(step):
        if step == step_to_die:
            raise Crash
        return batch_at(step)

    return batch


@pytest.mark.parametrize("died_in", [3, 10, 11, 19, 29])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_last_digit(tmp_path, died_in):
    whole = fresh_model()
    expected = train(whole, batch_at, loss_of, CONFIG, tmp_path / "whole.pt", "whole")
    checkpoint = tmp_path / "crashed.pt"
    with pytest.raises(Crash):
        train(fresh_model(), crash_at(died_in), loss_of, CONFIG, checkpoint, "crashed")
    assert checkpoint.exists() == (died_in >= 10)
    steps = []
    torch.manual_seed(99)  # the state of the random generator must not matter
    resumed = fresh_model()
    result = train(resumed, lambda step: steps.append(step) or batch_at(step), loss_of, CONFIG, checkpoint, "resumed")
    assert steps[0] == died_in - died_in % 10  # at most the steps since the last checkpoint are taken again
    assert result.curve == expected.curve and len(result.curve) == 6
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_a_run_without_a_checkpoint_writes_none_and_is_the_same(tmp_path, monkeypatch):
    whole = train(fresh_model(), batch_at, loss_of, CONFIG, tmp_path / "whole.pt", "whole")
    written = []
    monkeypatch.setattr(loop, "_save", lambda path, *_: written.append(path))
    assert train(fresh_model(), batch_at, loss_of, CONFIG, None, "none").curve == whole.curve and not written
    train(fresh_model(), batch_at, loss_of, CONFIG, tmp_path / "again.pt", "again")
    assert len(written) == 3  # control


def test_a_checkpoint_from_before_that_holds_a_shared_latent_twice_is_taken_up(tmp_path):
    def fresh():
        torch.manual_seed(0)
        return nn.Sequential(TuckerAttention(6, 2, (2, 3, 4), shared_kv=True), nn.Linear(6, 3))

    tokens_at = lambda step: (batch_at(step)[0][None],)  # noqa: E731
    loss = lambda model, x: (model(x) - x[..., :3].flip(-1)).square().mean()  # noqa: E731
    whole = train(fresh(), tokens_at, loss, CONFIG, tmp_path / "whole.pt", "whole")
    died = lambda step: crash_at(11)(step) and tokens_at(step)  # noqa: E731
    with pytest.raises(Crash):
        train(fresh(), died, loss, CONFIG, tmp_path / "before.pt", "before")
    state = torch.load(tmp_path / "before.pt", weights_only=True)
    del state["seal"]
    state["model"]["0.post.value"] = state["model"]["0.pre.key"].clone()
    torch.save(state, tmp_path / "before.pt")
    assert train(fresh(), tokens_at, loss, CONFIG, tmp_path / "before.pt", "after").curve == whole.curve
    state["model"]["0.post.value"] += 1
    torch.save(state, tmp_path / "before.pt")
    with pytest.raises(ValueError, match="holds the weights of another model"):  # control: two that differ
        train(fresh(), tokens_at, loss, CONFIG, tmp_path / "before.pt", "after")


def test_another_seed_gives_other_digits(tmp_path):
    """Control for the test above: equality is not trivial."""
    a, b = fresh_model(), fresh_model()
    train(a, batch_at, loss_of, CONFIG, tmp_path / "a.pt", "a")
    train(b, lambda step: batch_at(step + 1000), loss_of, CONFIG, tmp_path / "b.pt", "b")
    assert not torch.equal(a[0].weight, b[0].weight)


def test_a_finished_checkpoint_is_not_trained_again(tmp_path):
    train(fresh_model(), batch_at, loss_of, CONFIG, tmp_path / "c.pt", "first")
    result = train(fresh_model(), crash_at(0), loss_of, CONFIG, tmp_path / "c.pt", "again")
    assert len(result.curve) == 6


def test_a_run_knows_all_machines_that_it_ran_on(tmp_path, monkeypatch):
    def on(machine, batches):
        monkeypatch.setattr(loop, "device_in_words", lambda device: machine)
        return train(fresh_model(), batches, loss_of, CONFIG, tmp_path / "c.pt", machine).machines

    with pytest.raises(Crash):
        on("old card", crash_at(11))
    with pytest.raises(Crash):
        on("new card", crash_at(21))
    assert on("new card", batch_at) == ["old card, 1 worker", "new card, 1 worker"]
    assert on("a third", crash_at(0)) == ["old card, 1 worker", "new card, 1 worker"]  # nothing was left to do


def test_a_damaged_checkpoint_is_named_and_kept(tmp_path):
    checkpoint = tmp_path / "c.pt"
    train(fresh_model(), batch_at, loss_of, CONFIG, checkpoint, "first")
    damaged = checkpoint.read_bytes()[:-100]
    checkpoint.write_bytes(damaged)
    with pytest.raises(ValueError, match="c.pt is not a readable checkpoint.*delete it"):
        train(fresh_model(), batch_at, loss_of, CONFIG, checkpoint, "again")
    assert checkpoint.read_bytes() == damaged


WEIGHT = lambda state: state["model"]["0.weight"]  # noqa: E731
GROUP = lambda state: state["optimizer"]["param_groups"][0]  # noqa: E731
MOMENTS = lambda state: state["optimizer"]["state"]  # noqa: E731
CHANGES = {
    "weights of less precision": lambda state: state["model"].update({"0.weight": WEIGHT(state).half()}),
    "weights in whole numbers": lambda state: state["model"].update({"0.weight": WEIGHT(state).long()}),
    "a weight that is not finite": lambda state: WEIGHT(state).view(-1)[:1].fill_(torch.inf),
    "two weights exchanged": lambda state: WEIGHT(state).copy_(WEIGHT(state).flip(0)),
    "weights of which none has a value": lambda state: state["model"].update({"0.weight": WEIGHT(state).to("meta")}),
    "sparse weights": lambda state: state["model"].update({"0.weight": WEIGHT(state).to_sparse()}),
    "no moments": lambda state: MOMENTS(state).clear(),
    "moments of another name": lambda state: MOMENTS(state)[0].update(mean=MOMENTS(state)[0].pop("exp_avg")),
    "moments of another shape": lambda state: MOMENTS(state)[0].update(exp_avg=MOMENTS(state)[0]["exp_avg"][:, :1]),
    "moments that began later": lambda state: MOMENTS(state)[0].update(step=torch.tensor(3.0)),
    "another decay": lambda state: GROUP(state).update(weight_decay=1.0),
    "parameters of no number": lambda state: GROUP(state).pop("params"),
    "an earlier step": lambda state: state.update(step=10, curve=state["curve"][:2]),
    "another curve": lambda state: state["curve"][0].__setitem__(1, 0.5),
    "another machine": lambda state: state["machines"].append("a faster one"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_that_was_changed_since_it_was_written_is_refused(tmp_path, change):
    with pytest.raises(Crash):
        train(fresh_model(), crash_at(21), loss_of, CONFIG, tmp_path / "c.pt", "first")
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    torch.save(state, tmp_path / "same.pt")
    assert len(train(fresh_model(), batch_at, loss_of, CONFIG, tmp_path / "same.pt", "control").curve) == 6
    CHANGES[change](state)
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(
        ValueError, match="c.pt is not a readable checkpoint: it is not as it was written; delete it to start again"
    ):
        train(fresh_model(), batch_at, loss_of, CONFIG, tmp_path / "c.pt", "again")


def test_so_is_one_of_which_a_bit_was_lost_on_disk(tmp_path):
    model = fresh_model()
    train(model, batch_at, loss_of, CONFIG, tmp_path / "c.pt", "first")
    content = (tmp_path / "c.pt").read_bytes()
    weight = model[0].weight.detach().numpy().tobytes()
    lost = bytearray(weight)
    lost[3] ^= 4
    assert content.count(weight) == 1
    (tmp_path / "c.pt").write_bytes(content.replace(weight, bytes(lost)))
    with pytest.raises(ValueError, match="it is not as it was written"):
        train(fresh_model(), batch_at, loss_of, CONFIG, tmp_path / "c.pt", "again")


def test_a_seal_knows_the_numbers_and_not_how_they_lie_in_memory():
    a = torch.arange(6.0).view(2, 3)
    seal = loop.seal_of({"a": a, "b": [1, (2.5, None)]})
    assert seal == loop.seal_of({"a": nn.Parameter(a.T.contiguous().T), "b": [1, (2.5, None)]})
    for other in ({"a": a.view(3, 2)}, {"a": a.double()}, {"a": -a}, {"c": a}):
        assert loop.seal_of({"b": [1, (2.5, None)]} | other) != seal
    assert loop.seal_of({"a": torch.zeros(())}) != loop.seal_of({"a": -torch.zeros(())})
    assert len(loop.seal_of({"a": torch.zeros(0), "b": torch.zeros(2, dtype=torch.bfloat16), "c": True})) == 16


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    train(fresh_model(), batch_at, loss_of, CONFIG, tmp_path / "c.pt", "first")
    other = dataclasses.replace(CONFIG, learning_rate=2e-2, steps=40)
    with pytest.raises(ValueError, match="another steps, learning_rate"):
        train(fresh_model(), batch_at, loss_of, other, tmp_path / "c.pt", "other")


def test_checkpoints_hold_no_code(tmp_path):
    """They load with weights_only=True, which refuses pickled objects."""
    train(fresh_model(), batch_at, loss_of, CONFIG, tmp_path / "c.pt", "first")
    assert set(torch.load(tmp_path / "c.pt", weights_only=True)) == {
        *("config", "step", "curve", "seconds", "observations", "machines", "model", "optimizer", "seal")
    }


def test_an_interrupted_run_says_how_to_go_on_and_does(tmp_path, capsys):
    def batch(step):
        if step == 17:
            raise KeyboardInterrupt
        return batch_at(step)

    with pytest.raises(KeyboardInterrupt):
        train(fresh_model(), batch, loss_of, CONFIG, tmp_path / "c.pt", "run")
    assert "run: stopped in step 17; the same command goes on from the last checkpoint" in capsys.readouterr().out
    assert torch.load(tmp_path / "c.pt", weights_only=True)["step"] == 10
    resumed = train(fresh_model(), batch_at, loss_of, CONFIG, tmp_path / "c.pt", "run")
    assert f"run: goes on after step 10, from {tmp_path / 'c.pt'}" in capsys.readouterr().out
    assert resumed.curve == train(fresh_model(), batch_at, loss_of, CONFIG, tmp_path / "whole.pt", "run").curve


def test_a_nan_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    def batch(step):
        (x,) = batch_at(step)
        return (x * (float("nan") if step == 17 else 1.0),)

    with pytest.raises(FloatingPointError, match="loss is nan .* at step 20"):
        train(fresh_model(), batch, loss_of, CONFIG, tmp_path / "c.pt", "nan")
    assert torch.load(tmp_path / "c.pt", weights_only=True)["step"] == 10


def test_a_nan_gradient_stops_the_run_before_it_is_saved(tmp_path):
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss, bad):
            ctx.bad = bad
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (float("nan") if ctx.bad else 1.0), None

    steps = []
    poisoned = lambda model, x: Poison.apply(loss_of(model, x), len(steps) == 20)  # noqa: E731
    with pytest.raises(FloatingPointError, match="gradient norm nan at step 20"):
        train(fresh_model(), lambda step: steps.append(step) or batch_at(step), poisoned, CONFIG, tmp_path / "c.pt", "nan")
    assert torch.load(tmp_path / "c.pt", weights_only=True)["step"] == 10


def test_the_learning_rate_warms_up_to_its_peak_and_ends_at_its_share():
    rates = [learning_rate_at(step, CONFIG) for step in range(CONFIG.steps)]
    assert rates[0] == pytest.approx(1e-2 / 5) and rates[4] == rates[5] == max(rates) == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(1e-3)
    assert all(later <= earlier for earlier, later in zip(rates[5:], rates[6:]))


def test_norms_and_biases_are_not_decayed():
    model = fresh_model()
    decayed, others = make_optimizer(model, CONFIG).param_groups
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in others["params"]} == {1}
    assert others["weight_decay"] == 0 < decayed["weight_decay"]


def test_checkpoints_must_fall_on_log_entries():
    with pytest.raises(ValueError, match="multiple of log_every = 10"):
        TrainConfig(steps=1, batch_size=1, learning_rate=1.0, checkpoint_every=15)
