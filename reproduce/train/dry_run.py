"""What a run would take, without running it: its model, settings and data, the memory by part, and how fast such runs were."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..models.sizes import count_parameters
from ..store.records import COMMITTED, load
from .distributed import Workers
from .settings import TrainConfig


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Args:
        experiment, title, data: which one, what the first line calls it, and what is trained on.
        labels: of its rows.
        build: a row's label -> its model.
        block: a row's label -> one of its blocks.
        settings: how the first row is trained.
        samples: what the batch counts, "sequences" or "images".
        tokens: of one sequence or image.
        outputs: logits of one sequence or image.
        seeds: one run of every row each.
        largest_micro_batch: as in `Workers.settled`.
        shape: what a record of the same model says of it.
        known: settings that the paper tells, none at a scale of ours.
        ours: those that we chose.
    """

    experiment: str
    title: str
    data: str
    labels: tuple[str, ...]
    build: Callable[[str], nn.Module]
    block: Callable[[str], nn.Module]
    settings: TrainConfig
    samples: str
    tokens: int
    outputs: int
    seeds: tuple[int, ...]
    largest_micro_batch: int | None
    shape: dict
    known: tuple[str, ...]
    ours: tuple[str, ...]

    @property
    def all_tokens(self) -> int:
        """Of one run."""
        return self.settings.steps * self.settings.batch_size * self.tokens


def memory_parts(model: nn.Module, workers: Workers, plan: Plan, kept: float) -> tuple[float, ...]:
    """The memory of one GPU by part.

    Args:
        model: may be on the device "meta".
        workers: settled ones.
        plan: of the run.
        kept: bytes that the backward pass keeps per token and block (`kept_per_token`).

    Returns:
        Bytes of weights, gradients, AdamW, copies in bfloat16, activations and output, in this order.
    """
    parameters, layers = count_parameters([model]), len(model.blocks)
    part = parameters / (workers.count if workers.sharding == "fsdp" else 1)
    block = count_parameters([model.blocks[0]])
    gathered = parameters - layers * block + 2 * block if workers.sharding == "fsdp" else 0
    activations = workers.micro_batch * plan.tokens * layers * kept
    return 4 * (part + gathered), 4 * part, 8 * part, 2 * parameters, activations, 4 * workers.micro_batch * plan.outputs


def kept_per_token(block: nn.Module) -> float:
    """Bytes that autograd keeps for the backward pass of one token, under bfloat16 autocast; no weights among them.

    Args:
        block: of a model, on the CPU.
    """
    tokens, kept = 32, dict[int, torch.Tensor]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def forward(batch: int) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", dtype=torch.bfloat16):
            y = block(torch.randn(batch, tokens, block.attention.d_model, requires_grad=True))
        del y
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # a norm has no fused kernel then
        return (forward(3) - forward(2)) / tokens  # what does not grow with the batch are weights and their copies


def throughput(plan: Plan, label: str) -> tuple[int, str] | None:
    """How fast such a run has been.

    Args:
        plan: of the run.
        label: of its row.

    Returns:
        Tokens a second of the fastest committed run of this row and model on one GPU, and that GPU; None if there is none. No record
        says whether other runs shared the GPU.
    """
    runs = [
        (record.metrics["tokens_per_second"], record.device)
        for record in load(COMMITTED, plan.experiment)
        if record.method == label
        and record.metrics.get("tokens_per_second")
        and record.workers == 1
        and record.device.startswith("NVIDIA")
        and all(record.config.get(name) == value for name, value in plan.shape.items())
    ]
    return max(runs, default=None)
