"""Several processes train one model. torchrun starts them; each takes its rows of every global batch, and all take the same step.

The batch of a step does not depend on how many workers there are, nor does a checkpoint: a run may be stopped on eight workers and
resumed on one. Worker w of W takes the rows w, w + W, w + 2 W, ..., a micro-batch at a time; gradients are averaged over
micro-batches and workers. "ddp" keeps the whole model on every worker, "fsdp" (PyTorch's FSDP2) a part of each tensor.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

SHARDINGS = ("ddp", "fsdp")
LARGE = 500_000_000  # parameters from which a model is sharded unless the command line decides
PATIENCE = timedelta(hours=2)  # how long workers wait for one that reads data or judges the model


@dataclass(frozen=True)
class Workers:
    """Who trains together, and how they share a batch. None leaves a choice to `settled`.

    Args:
        rank: this worker's number, from 0.
        count: of workers.
        micro_batch: sequences or images that a worker takes at a time.
        sharding: "ddp", "fsdp", or "none" where one worker is alone.
    """

    rank: int = 0
    count: int = 1
    micro_batch: int | None = None
    sharding: str | None = None

    @property
    def is_first(self) -> bool:
        """Of all workers the first alone prints, validates and writes."""
        return self.rank == 0

    def settled(self, batch_size: int, parameters: int, largest: int | None = None) -> "Workers":
        """These workers with the open choices made.

        Args:
            batch_size: of the global batch.
            parameters: of the model; from LARGE on it is sharded.
            largest: the most sequences or images at a time, None for no limit.

        Returns:
            Workers with the largest micro-batch that fits, unless one was set, and the sharding.

        Raises:
            ValueError: if the global batch cannot be shared out evenly.
        """
        if batch_size % self.count:
            raise ValueError(f"the global batch of {batch_size} cannot be shared evenly among {self.count} workers")
        share = batch_size // self.count
        if share % (self.micro_batch or 1):
            raise ValueError(
                f"--micro-batch {self.micro_batch} does not divide a worker's share, {share}: "
                f"the global batch of {batch_size} over {self.count} workers"
            )
        fitting = max(size for size in range(1, min(share, largest or share) + 1) if share % size == 0)
        sharding = "none" if self.count == 1 else self.sharding or ("fsdp" if parameters >= LARGE else "ddp")
        return dataclasses.replace(self, micro_batch=self.micro_batch or fitting, sharding=sharding)

    def in_words(self, batch_size: int, samples: str = "") -> str:
        """How these workers, settled, come to the global batch.

        Args:
            batch_size: of the global batch.
            samples: what it counts, with a space before it: " images".
        """
        times = batch_size // self.count // self.micro_batch
        return f"global batch {batch_size}{samples} = {counted(self.count, 'worker')} x {self.micro_batch} at a time x {times}"

    def describe(self, batch_size: int) -> dict:
        """What a record says of these workers, settled.

        Args:
            batch_size: of the global batch.
        """
        return {
            "global_batch": batch_size,
            "workers": self.count,
            "micro_batch": self.micro_batch,
            "accumulation_steps": batch_size // self.count // self.micro_batch,
            "sharding": self.sharding,
        }

    def rows(self, batch_size: int) -> slice:
        """Which rows of the global batch are this worker's."""
        return slice(self.rank, batch_size, self.count)

    def micro_batches(self, batch: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """This worker's rows in parts of equal size.

        Args:
            batch: tensors of as many rows each.

        Returns:
            One tuple of tensors per part; a single part if no micro_batch is set.
        """
        return list(zip(*(tensor.split(self.micro_batch or len(tensor)) for tensor in batch)))

    def shared(self, model: nn.Module, loss_of: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """A loss whose gradients are those of all workers.

        Args:
            model: sharded in place with "fsdp", which needs `model.blocks`.
            loss_of: loss_of(model, *batch), a scalar tensor.

        Returns:
            A callable of the batch alone.
        """
        if self.count == 1:
            return functools.partial(loss_of, model)
        whole, device = _Loss(model, loss_of), next(model.parameters()).device
        if self.sharding == "fsdp":
            from torch.distributed.fsdp import fully_shard  # half a second, for those alone who shard

            mesh = init_device_mesh(device.type, (self.count,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            return fully_shard(whole, mesh=mesh)  # what belongs to no block
        places = None if device.type == "cpu" else [device]
        return DistributedDataParallel(whole, device_ids=places, gradient_as_bucket_view=True)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over all workers, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(value)
            value /= self.count
        return value

    def unsharded(self, model: nn.Module, fresh: Callable[[], nn.Module]) -> nn.Module:
        """The trained model whole; all workers must call it.

        Args:
            model: sharded or not.
            fresh: builds the same model anew.

        Returns:
            On the first worker `fresh()` with the weights, where `model` is sharded; otherwise `model` itself.
        """
        if not any(map(is_sharded, model.parameters())):
            return model
        weights = gathered(model.state_dict(), keep=self.is_first)
        if self.is_first:
            model = fresh()
            model.load_state_dict(weights)
        return model

    def agree(self, value, otherwise: str) -> None:
        """Make sure that all workers have the same value.

        Args:
            value: of this worker; it can be pickled.
            otherwise: the message of the error.

        Raises:
            ValueError: on every worker, if they differ.
        """
        if self.count > 1:
            values = [None] * self.count
            torch.distributed.all_gather_object(values, value)
            if any(other != value for other in values):
                raise ValueError(otherwise)

    def wait(self) -> None:
        """Until all workers are here."""
        if self.count > 1:
            torch.distributed.barrier()


ALONE = Workers()


class _Loss(nn.Module):
    """A loss as a module, so that one call passes through the hooks of DDP and FSDP."""

    def __init__(self, model: nn.Module, loss_of: Callable[..., torch.Tensor]):
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        return self.loss_of(self.model, *batch)


@contextmanager
def started(device: str, micro_batch: int | None = None, sharding: str | None = None) -> Iterator[tuple[Workers, str]]:
    """The workers that torchrun started; without torchrun one worker.

    All but the first are silent, except for errors.

    Args:
        device: as torch names it; of several GPUs each worker gets its own.
        micro_batch, sharding: as in `Workers`.

    Yields:
        The workers, and this one's device.
    """
    if not torch.distributed.is_torchelastic_launched():
        # Streams, events, memory counters and kernels of torch.cuda are those of the current GPU: of "cuda:1" too, not of the first.
        with torch.cuda.device(device) if torch.device(device).type == "cuda" else nullcontext():
            yield Workers(micro_batch=micro_batch, sharding=sharding), device
        return
    if torch.device(device).type == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl", timeout=PATIENCE, device_id=torch.device(device))
    else:
        torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        with nullcontext() if rank == 0 else _silence():
            yield Workers(rank, count, micro_batch, sharding), device
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def _silence() -> Iterator[None]:
    loud, bar = sys.stdout, tqdm.__init__
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout, tqdm.__init__ = nowhere, functools.partialmethod(bar, disable=True)
        try:
            yield
        finally:
            sys.stdout, tqdm.__init__ = loud, bar


def accumulating(loss: Callable, last: bool) -> AbstractContextManager:
    """Around forward and backward of a micro-batch: DDP exchanges gradients once a step, after the last.

    FSDP exchanges them each time: only so do they stay sharded.

    Args:
        loss: as `Workers.shared` returns it.
        last: whether this is the last micro-batch of the step.
    """
    return loss.no_sync() if isinstance(loss, DistributedDataParallel) and not last else nullcontext()


def clip_gradients(parameters: Iterator[nn.Parameter], largest: float) -> torch.Tensor:
    """Scale the gradients so that their norm, taken over all shards, is at most a limit.

    Args:
        parameters: whose gradients.
        largest: the limit.

    Returns:
        The norm before, a scalar tensor.
    """
    norm = nn.utils.clip_grad_norm_(parameters, largest)
    return norm.full_tensor() if is_sharded(norm) else norm


def is_sharded(value) -> bool:
    """Whether this is a DTensor, told without its module, which is slow to import."""
    return hasattr(value, "full_tensor")


# Not torch.distributed.checkpoint.state_dict (torch 2.13): it keys an optimiser's states by name, so a checkpoint that keys them by
# number, as ours do, is a KeyError; and given whole tensors it loads a checkpoint that lacks a weight without a word.
def gathered(state, keep: bool = True):
    """A state with every sharded tensor whole, on the CPU; all workers must call it.

    Args:
        state: tensors in dicts and lists.
        keep: whether this worker gets them; otherwise None stands in the place of what is sharded.
    """
    if isinstance(state, dict):
        return {name: gathered(value, keep) for name, value in state.items()}
    if isinstance(state, list):
        return [gathered(value, keep) for value in state]
    if is_sharded(state):
        whole = state.full_tensor()  # one tensor at a time: the model need not fit
        return whole.cpu() if keep else None
    return state


def sharded_like(pattern: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that belongs where another is.

    Args:
        pattern: sharded or not.
        whole: the tensor, the same on all workers.

    Returns:
        This worker's part, as a DTensor; `whole` itself if `pattern` is not sharded, or has another shape.
    """
    if not is_sharded(pattern) or pattern.shape != whole.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, pattern.device_mesh, pattern.placements, src_data_rank=None)  # each worker has it all


def counted(number: int, thing: str) -> str:
    """ "1 worker", "8 workers"."""
    return f"{number:,} {thing}{'s' if number > 1 else ''}"
