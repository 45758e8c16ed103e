"""One training loop for every model: an optimiser, its learning rate step by step, atomic checkpoints, and the same digits after a resume.

The batch of a step depends on the seed and the step alone, and nothing in the models is random after construction. So a run
that was killed and resumed takes the same steps as one that was not.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..console import Told
from ..store.checked import Amount, Part, Size, check, read_json
from ..store.files import write_atomically
from ..store.records import device_in_words
from ..store.schema import Curve
from .distributed import ALONE, Workers, accumulating, clip_gradients, counted, gathered, sharded_like
from .optimizers import Together, make_optimizer
from .settings import TrainConfig, learning_rate_at


@dataclass
class TrainResult:
    """What a run leaves behind beside the model.

    Args:
        curve: per log entry [step, mean training loss, largest gradient norm before clipping] since the entry before.
        seconds: time in the loop, over all resumes.
        observations: what `observe` returned, each with its step.
        machines: on what it ran, in words; several where it was resumed elsewhere or by another number of workers.
    """

    curve: list
    seconds: float
    observations: list = field(default_factory=list)
    machines: list = field(default_factory=list)


class Diverged(FloatingPointError):
    """The loss or a gradient is no longer a number.

    Args:
        message: for people.
        step: when that was seen.
        result: what there was until then.
    """

    def __init__(self, message: str, step: int, result: TrainResult):
        super().__init__(message)
        self.step, self.result = step, result


def train(
    model: nn.Module,
    batch_at: Callable[[int], tuple[torch.Tensor, ...]],
    loss_of: Callable[..., torch.Tensor],
    config: TrainConfig,
    checkpoint: Path | None,
    title: str,
    observe: Callable[[int], dict | None] | None = None,
    optimizer_of: Callable[[nn.Module, TrainConfig], torch.optim.Optimizer | Together] = make_optimizer,
    workers: Workers = ALONE,
    after_step: Callable[[int], object] | None = None,
) -> TrainResult:
    """Train in place; resumes from a checkpoint if it is there, and leaves the finished state in it.

    A crash or Ctrl-C loses at most the steps since the last checkpoint.

    Args:
        model: on its device; with `config.compiled` it has `compile_parts`, as `LanguageModel` does.
        batch_at: step -> the tensors of its batch, of several workers this one's rows.
        loss_of: loss_of(model, *batch), their mean loss, a scalar tensor.
        config: how to train.
        checkpoint: the file; None for a run that is not to be resumed.
        title: of the progress bar and of messages.
        observe: called with the step after each backward pass, before clipping; what it returns is kept, None is not.
        optimizer_of: (model, config) -> the optimiser of the model's parameters, which may be sharded by then; a group's "share"
            multiplies its learning rate.
        workers: those that train together; each calls this with the same arguments.
        after_step: called with the step after each step of the optimiser, to set right what it did.

    Raises:
        ValueError: if the checkpoint belongs to another configuration, is damaged, or is not there for all workers.
        Diverged: on a loss or gradient that is not finite, when it is logged.
    """
    device = next(model.parameters()).device
    if config.compiled:
        torch.compiler.reset()  # each model gets a compilation of its own; without this the ninth falls back to eager
        model.compile_parts()
    if workers.micro_batch:
        tqdm.write(f"{title}: {workers.in_words(config.batch_size)}")
    loss = workers.shared(model, loss_of)
    optimizer = optimizer_of(model, config)
    first_step, result = 0, TrainResult([], 0.0)
    if checkpoint is not None and checkpoint.exists():
        first_step, result = _load(checkpoint, model, optimizer, config)
        tqdm.write(f"{title}: goes on after step {first_step:,}, from {checkpoint}")
    machine = f"{device_in_words(str(device))}, {counted(workers.count, 'worker')}"
    if first_step < config.steps and machine not in result.machines:
        result.machines.append(machine)
    workers.agree(first_step, f"{checkpoint} is not the same file for all workers; they need one folder for --out")
    losses, largest_norm = torch.zeros((), device=device), torch.zeros((), device=device)  # read only when logged
    started = time.perf_counter()

    def save(step: int) -> None:
        if checkpoint is None:
            return
        total = result.seconds + time.perf_counter() - started
        _save(checkpoint, model, optimizer, config, step, dataclasses.replace(result, seconds=total), workers)

    model.train()
    with tqdm(range(first_step, config.steps), title, initial=first_step, total=config.steps, mininterval=0.5) as progress:
        step = first_step
        try:
            for step in progress:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate_at(step, config) * group.get("share", 1.0)
                batch = [tensor.to(device, non_blocking=True) for tensor in batch_at(step)]
                parts = workers.micro_batches(batch)
                optimizer.zero_grad(set_to_none=True)
                for number, part in enumerate(parts, 1):
                    with accumulating(loss, last=number == len(parts)):
                        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bfloat16"):
                            share = loss(*part) / len(parts)
                        share.backward()
                    losses += share.detach()
                if observe is not None and (seen := observe(step)):
                    result.observations.append({"step": step, **seen})
                norm = clip_gradients(model.parameters(), config.gradient_clip)
                optimizer.step()
                if after_step is not None:
                    after_step(step)
                torch.maximum(largest_norm, norm, out=largest_norm)
                finished = step + 1
                if finished % config.log_every == 0 or finished == config.steps:
                    mean = workers.mean(losses).item() / ((finished - 1) % config.log_every + 1)
                    if not (math.isfinite(mean) and largest_norm.isfinite()):
                        message = f"{title}: the loss is {mean} and the gradient norm {largest_norm.item()} at step {finished}"
                        result.seconds += time.perf_counter() - started
                        raise Diverged(message, finished, result)
                    result.curve.append([finished, round(mean, 4), round(largest_norm.item(), 3)])
                    losses.zero_()
                    largest_norm.zero_()
                    progress.set_postfix_str(f"loss {mean:.3f}")
                    if finished % config.checkpoint_every == 0 or finished == config.steps:
                        save(finished)
        except KeyboardInterrupt:
            progress.close()
            there = checkpoint is not None and checkpoint.exists()
            goes_on = "goes on from the last checkpoint" if there else "starts again: there is no checkpoint yet"
            print(f"{title}: stopped in step {step}; the same command {goes_on}")
            raise Told from None
    result.seconds += time.perf_counter() - started
    return result


def _save(path, model, optimizer, config, step, result, workers) -> None:
    state = {
        "config": json.dumps(config.config()),
        "step": step,
        "curve": result.curve,
        "seconds": result.seconds,
        "observations": result.observations,
        "machines": result.machines,
        "model": gathered(model.state_dict(), keep=workers.is_first),
        "optimizer": gathered(optimizer.state_dict(), keep=workers.is_first),
    }
    if workers.is_first:
        state["seal"] = seal_of(state)
        write_atomically(path, lambda file: torch.save(state, file))


def seal_of(state: dict) -> str:
    """What tells a state from any other, as 16 hex digits: numbers that were changed in a file would be trained on like others.

    Args:
        state: tensors, numbers and text in dicts and lists.
    """
    digest = hashlib.sha256()
    for place, value in _leaves(state):
        holds_numbers = isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta
        digest.update(f"{place}: {(value.dtype, tuple(value.shape)) if holds_numbers else value!r}\n".encode())
        if holds_numbers:
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """What is no dict and no list, each with its place."""
    if not isinstance(value, (dict, list, tuple)):
        yield place, value
        return
    for name, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(part, f"{place}/{name}")


class Moments(Part):
    """What a checkpoint says of the optimiser."""

    state: dict[int, dict[str, Any]]  # by the number of a parameter
    param_groups: list[dict[str, Any]]


class Checkpoint(Part):
    """What a checkpoint says beside weights and moments."""

    config: str
    step: Size
    curve: Curve
    seconds: Amount
    observations: list[dict[str, Any]]
    machines: list[str] = []
    model: dict[str, Any]
    optimizer: Moments
    seal: str | None = None  # which older ones do not have


def _second(model: nn.Module, name: str) -> torch.Tensor:
    """The parameter that has a second, older name.  Raises ValueError where it is none's."""
    try:
        return model.get_parameter(name)
    except AttributeError:
        raise ValueError(f"it holds {name}, which is no parameter") from None


def _load(path, model, optimizer, config) -> tuple[int, TrainResult]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # workers of one machine share its pages
    except Exception as error:  # whatever torch and pickle raise of a damaged file: nothing else is called here
        raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__}); delete it to start again") from error
    try:
        check(Checkpoint, state, f"{path} is not a readable checkpoint: it")
        kept, step = read_json(state["config"], f"{path} is not a readable checkpoint: its config"), state["step"]
        if not isinstance(kept, dict):
            raise ValueError(f"{path} is not a readable checkpoint: its config is no dict")
        if kept == config.config() and step > config.steps:
            raise ValueError(f"{path} is not a readable checkpoint: its step is {step:,} of {config.steps:,}")
    except ValueError as error:
        raise ValueError(f"{error}; delete it to start again") from None
    result = TrainResult(state["curve"], state["seconds"], state["observations"], state.get("machines", []))
    if kept != config.config():
        changed = [k for k in {**kept, **config.config()} if kept.get(k) != config.config().get(k)]
        raise ValueError(f"{path} belongs to a run with another {', '.join(changed)}; delete it to start again")
    if state.pop("seal", None) not in (None, seal_of(state)):
        raise ValueError(f"{path} is not a readable checkpoint: it is not as it was written; delete it to start again")
    own = model.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        if not all(0 <= number < len(parameters) for number in state["optimizer"]["state"]):
            raise ValueError("its optimiser has other parameters")
        like = {name: own[name] if name in own else _second(model, name) for name in state["model"]}
        model.load_state_dict({name: sharded_like(like[name], tensor) for name, tensor in state["model"].items()})
        for number, moments in state["optimizer"]["state"].items():
            moments |= {name: sharded_like(parameters[number], tensor) for name, tensor in moments.items()}
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:  # PyTorch's of other names, shapes and groups
        raise ValueError(f"{path} holds the weights of another model; delete it to start again") from error
    return step, result
