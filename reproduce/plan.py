"""What a run would take, without running it: `--dry-run` prints batches, steps, memory by part, hours, and which settings are whose."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from textwrap import fill

import torch
from torch import nn

from .distributed import Workers
from .options import Options
from .records import COMMITTED, load, workers_of
from .sizes import count_parameters
from .tables import counted, markdown
from .training import TrainConfig

WIDTH = 132
FORMULAS = """\
Memory in GB (10^9 bytes) per GPU, of P parameters: weights 4 P, gradients 4 P, AdamW 8 P; under fsdp each over the number of GPUs, and
beside them in float32 what belongs to no block and two gathered blocks. Copies: 2 P, the weights in bfloat16. Activations: micro-batch x
tokens x layers x the bytes that autograd keeps of one token in one block, counted on a real block without compilation, which needs less.
Output: logits and their gradient in bfloat16. What the allocator and the kernels need besides is not in it: leave a tenth free.
Muon keeps half of AdamW's 8 P for the matrices of the blocks.
Checkpoint: weights and AdamW's moments, 12 P."""


@dataclass(frozen=True)
class Plan:
    """tokens: of one sequence or image; outputs: logits of one; samples: what the batch counts; data: what is trained on.

    build: row's label -> its model; block: row's label -> one of its blocks; shape: what a record of the same model says of it.
    known, ours: settings that the paper tells, none at a scale of ours; and those that we chose.
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


def show(plans: list[Plan], options: Options) -> None:
    """Print the plans of one experiment for the workers in `options`, which need not exist."""
    for plan in plans:
        _show_models(plan, options)
    last = plans[-1]  # what was chosen is the same for all
    ours = "; ".join((*last.ours, *_recipe(last.settings)))
    if last.known:
        print(fill(f"Known from the paper: {'; '.join(last.known)}.", WIDTH) + "\n")
        print(fill(f"Our choice, because the paper's is not known to us: {ours}.", WIDTH) + "\n")
    else:
        print(fill(f"Our choice: {ours}.", WIDTH) + "\n")
    if changed := _changes(options):
        print(fill(f"Changed on the command line: {', '.join(changed)}.", WIDTH) + "\n")
    print(FORMULAS + "\n")
    print("\n".join(dict.fromkeys(fill(_hours(plan, options.workers.count), WIDTH) for plan in plans)))


def _show_models(plan: Plan, options: Options) -> None:
    """Batches and steps, and a table of what each row needs."""
    settings, batch = plan.settings, plan.settings.batch_size
    rows = [_row(plan, label, options) for label in plan.labels]
    sharing = rows[0][1].in_words(batch, f" {plan.samples}").capitalize()
    print(
        f"{plan.title} on {counted(options.workers.count, 'GPU')} of {options.gpu_memory:g} GB, trained on {plan.data}.\n\n"
        f"{sharing}, {batch * plan.tokens:,} tokens a step.\n"
        f"Steps: {settings.steps:,}, which see {settings.steps * batch:,} {plan.samples}, {plan.all_tokens / 1e9:,.1f} billion tokens; "
        f"a checkpoint every {settings.checkpoint_every:,}; runs per row: {len(plan.seeds)}.\n"
    )
    header = ["row", "parameters", "attention", "split"]
    header += ["weights", "gradients", "AdamW", "copies", "activations", "output", "sum", "checkpoint"]
    print(markdown(header, [cells for cells, _ in rows]) + "\n")
    too_large = [cells[0] for cells, _ in rows if float(cells[10]) > 0.9 * options.gpu_memory]
    if too_large:
        print(
            f"TOO LARGE for {options.gpu_memory:g} GB: {'; '.join(too_large)}. Take a smaller --micro-batch, or --sharding fsdp.\n"
        )


def _row(plan: Plan, label: str, options: Options) -> tuple[list[str], Workers]:
    """A row's cells, and the workers as they would share it."""
    with torch.device("meta"):
        model = plan.build(label)
    parameters = count_parameters([model])
    attention = count_parameters(block.attention for block in model.blocks)
    workers = options.workers.settled(plan.settings.batch_size, parameters, plan.largest_micro_batch)
    memory = memory_parts(model, workers, plan, kept_per_token(plan.block(label)))
    cells = [label, f"{parameters / 1e6:,.1f}M", f"{attention / 1e6:,.2f}M", workers.sharding]
    cells += [f"{part / 1e9:.1f}" for part in (*memory, sum(memory), 12 * parameters)]
    return cells, workers


def _hours(plan: Plan, count: int) -> str:
    """How long one run of each row takes, as far as records tell."""
    rates = {label: rate for label in plan.labels if (rate := throughput(plan, label))}
    if not rates:
        return "Hours: no run at this shape is on record."
    hours = (
        f"{label} {plan.all_tokens / rate / count / 3600:,.0f} ({rate:,} tokens/s on one {device})"
        for label, (rate, device) in rates.items()
    )
    return f"Hours of one run, were {count} GPUs {count} times as fast as the fastest committed run on one: {'; '.join(hours)}."


def memory_parts(model: nn.Module, workers: Workers, plan: Plan, kept: float) -> tuple[float, ...]:
    """Bytes of weights, gradients, AdamW, copies, activations and output on one GPU.  kept: per token and block."""
    parameters, layers = count_parameters([model]), len(model.blocks)
    part = parameters / (workers.count if workers.sharding == "fsdp" else 1)
    block = count_parameters([model.blocks[0]])
    gathered = parameters - layers * block + 2 * block if workers.sharding == "fsdp" else 0
    activations = workers.micro_batch * plan.tokens * layers * kept
    return 4 * (part + gathered), 4 * part, 8 * part, 2 * parameters, activations, 4 * workers.micro_batch * plan.outputs


def kept_per_token(block: nn.Module) -> float:
    """Bytes that autograd keeps for the backward pass of one token in this block, under bfloat16 autocast; no weights among them."""
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

    return (forward(3) - forward(2)) / tokens  # what does not grow with the batch are weights and their copies


def throughput(plan: Plan, label: str) -> tuple[int, str] | None:
    """Tokens a second of the fastest committed run of this row and model on one GPU, and that GPU."""
    runs = [
        (record["metrics"]["tokens_per_second"], record["device"])
        for record in load(COMMITTED, plan.experiment)
        if record["method"] == label
        and record["metrics"].get("tokens_per_second")
        and workers_of(record) == 1
        and record["device"].startswith("NVIDIA")
        and all(record["config"].get(name) == value for name, value in plan.shape.items())
    ]
    return max(runs, default=None)


def _changes(options: Options) -> list[str]:
    """What the command line has in place of the preset's."""
    given = {"steps": options.steps, "warm-up steps": options.warmup_steps, "learning rate": options.learning_rate}
    return [f"{name} {value:,}" for name, value in given.items() if value is not None]


def _recipe(settings: TrainConfig) -> Iterable[str]:
    """The settings of `train` that are known for no experiment."""
    yield (
        f"betas {settings.beta1:g} and {settings.beta2:g}, weight decay {settings.weight_decay:g} on matrices and cores, "
        f"gradients clipped at norm {settings.gradient_clip:g}"
    )
    yield f"{settings.warmup_steps:,} warm-up steps, then a cosine down to {settings.final_share:g} of the peak rate"
    yield ("bfloat16 autocast over float32 weights" if settings.precision == "bfloat16" else "float32") + "; no dropout"
