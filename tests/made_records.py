"""Records made to order, of experiments of which none is committed: healing, and spectra by optimiser."""

import math

from helpers import a_record

from reproduce.report import unfoldings
from reproduce.report.unfoldings import BY_OPTIMIZER

MLA = "MLA separated d_c=6"
SIZE, LAYERS = 12, 6
ROWS = ("MHA", "MHA QK-norm")


def a_mode(steepness: float, layer: int) -> dict:
    """Singular values that fall by a constant factor, a little more or less in each layer."""
    values = [math.exp(-steepness * (1 + 0.02 * (-1) ** layer) * n) for n in range(SIZE)]
    ranks = [unfoldings.effective_rank(values, power) for power in (1, 2)]
    return {
        "size": SIZE, "rank": SIZE, "entropy_rank": ranks[0], "square_rank": ranks[1], "energy_rank_99": SIZE, "floor": 1e-9,
        "values": values,
    }  # fmt: skip


def layers(steepness: float, heads: float | None = None) -> list[dict]:
    """heads: steepness of the head mode before the softmax, where it is another."""
    return [
        {
            side: {mode: a_mode(heads if heads and (side, mode) == ("pre", "head") else steepness, n) for mode in modes}
            for side, modes in unfoldings.MODES.items()
        }
        for n in range(LAYERS)
    ]


def a_model(row: str, optimizer: str, steepness: float, rate=1e-3, loss=4.0, seed=0, heads=None, inputs=True):
    train = {"steps": 10, "batch_size": 4, "learning_rate": rate, "warmup_steps": 2, "log_every": 5, "precision": "float32"}
    train |= {} if optimizer == "adamw" else {"optimizer": optimizer}
    attention = {"mechanism": "MHA"} | ({"qk_norm": "head"} if "QK-norm" in row else {})
    config = {
        "model": "gpt2",
        "d_model": 48,
        "n_heads": SIZE,
        "n_layers": LAYERS,
        "context": 16,
        "vocab_size": 100,
        "train": train,
    }
    config |= {"row": attention, "attention": attention}
    metrics = {"trained": layers(steepness, heads), "initial": layers(0.01), "validation_loss": loss}
    metrics |= {"inputs": layers(2 * steepness)} if inputs else {}
    given = dict(id=f"{row}{optimizer}{rate}{seed}", experiment="spectra", preset=BY_OPTIMIZER, method=row, seed=seed)
    return a_record(**given, config=config, metrics=metrics, data={"name": "wiki", "sha256": "0"})


def study(muon: float, adamw: float = 0.3, near: float = 0.01, **more) -> list:
    """Both rows with both optimisers, each at its best rate and at half of it, where the spectra fall a little faster."""
    return [
        a_model(row, optimizer, steepness * more_steep, rate=rate, loss=loss, **more)
        for row in ROWS
        for optimizer, steepness in (("adamw", adamw), ("muon", muon))
        for rate, loss, more_steep in ((1e-3, 4.0, 1.0), (5e-4, 4.1, 1 + near))
    ]


def a_row(label: str, converted: float, healed: float | None, before=2.0, **more):
    """A record of one text, whose windows lose as much each, but for a little."""

    def judged(loss):
        windows = [10 * loss + (-1) ** n * 0.01 for n in range(30)]
        test = {"sha256": "0", "tokens": 300, "loss": loss, "bits_per_byte": loss / 3, "windows": windows}
        return {"validation_loss": loss, "tests": {"wiki.txt": test}}

    sizes = {"attention_parameters": 100, "cache": 10}
    m = {"share": 0.5, **sizes, "tokens_seen": 20_000_000, "before": judged(before) | sizes, "converted": judged(converted)}
    m |= {"rates": [{"learning_rate": 1e-3, "validation_loss": 1.0}]}
    m |= {"healed": judged(healed), "chosen": 1e-3} if healed else {"rates": [{"learning_rate": 1e-3, "diverged_at": 5}]}
    config = {"model": "gemma", "d_model": 8, "n_heads": 2, "n_layers": 1, "rotary": True}
    config["healing"] = {"steps": 10, "batch_size": 4, "window": 24, "rates": [1e-3]}
    given = dict(
        id=label, experiment="heal", preset="gpu", method=label, config=config, data={"name": "t", "sha256": "1"}, metrics=m
    )
    return a_record(**given | more)
