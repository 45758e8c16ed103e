"""`--dry-run`: batches, steps, memory by part, hours, and which settings are whose, as text."""

from collections.abc import Iterable
from textwrap import fill

from tucker_ref.initialisation import shapes_alone

from ..models.sizes import count_parameters
from ..train.distributed import Workers, counted
from ..train.dry_run import Plan, kept_per_token, memory_parts, throughput
from ..train.options import Options
from ..train.settings import TrainConfig
from .markdown import aligned, markdown

WIDTH = 132
GUESSED_SPEED = 150e12  # operations a second in bfloat16, about what narrow models reach on an H100 or H200
FORMULAS = """\
Memory in GB (10^9 bytes) per GPU, of P parameters: weights 4 P, gradients 4 P, AdamW 8 P; under fsdp each over the number of GPUs, and
beside them in float32 what belongs to no block and two gathered blocks. Copies: 2 P, the weights in bfloat16. Activations: micro-batch x
tokens x layers x the bytes that autograd keeps of one token in one block, counted on a real block without compilation, which needs less.
Output: logits and their gradient in bfloat16. What the allocator and the kernels need besides is not in it: leave a tenth free.
Muon keeps half of AdamW's 8 P for the matrices of the blocks.
Checkpoint: weights and AdamW's moments, 12 P."""


def show(plans: list[Plan], options: Options) -> None:
    """Print the plans of one experiment.

    Args:
        plans: one per model.
        options: whose workers need not exist.
    """
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
    print(aligned(markdown(header, [cells for cells, _, _ in rows])) + "\n")
    too_large = [label for label, (_, _, memory) in zip(plan.labels, rows) if round(memory / 1e9, 1) > 0.9 * options.gpu_memory]
    if too_large:
        print(
            f"TOO LARGE for {options.gpu_memory:g} GB: {'; '.join(too_large)}. Take a smaller --micro-batch, or --sharding fsdp.\n"
        )


def _row(plan: Plan, label: str, options: Options) -> tuple[list[str], Workers, float]:
    """A row's cells, the workers as they would share it, and the bytes that it takes on one GPU."""
    with shapes_alone():
        model = plan.build(label)
    parameters = count_parameters([model])
    attention = count_parameters(block.attention for block in model.blocks)
    workers = options.workers.settled(plan.settings.batch_size, parameters, plan.largest_micro_batch)
    memory = memory_parts(model, workers, plan, kept_per_token(plan.block(label)))
    cells = [label, f"{parameters / 1e6:,.1f}M", f"{attention / 1e6:,.2f}M", workers.sharding]
    cells += [f"{part / 1e9:.1f}" for part in (*memory, sum(memory), 12 * parameters)]
    return cells, workers, sum(memory)


def _hours(plan: Plan, count: int) -> str:
    """How long one run of each row takes, as far as records tell."""
    rates = {label: rate for label in plan.labels if (rate := throughput(plan, label))}
    if not rates:
        return f"Hours: no run at this shape is on record. {_estimate(plan, count)}"
    said = []
    for label, (rate, device) in rates.items():
        hours = plan.all_tokens / rate / count / 3600
        said.append(f"{label} {hours:,.{0 if hours >= 1 else 2}f} ({rate:,} tokens/s on one {device})")
    return (
        f"Hours of one run on {counted(count, 'GPU')}, each as fast as the fastest committed run: {'; '.join(said)}. "
        "No record says whether its run had the card to itself: if others ran beside it, it is faster alone."
    )


def _estimate(plan: Plan, count: int) -> str:
    """Minutes of one run by the rule of thumb of six operations per parameter and token."""
    with shapes_alone():
        operations = {label: 6 * count_parameters([plan.build(label)]) * plan.all_tokens for label in plan.labels}
    said = (f"{label} {n / GUESSED_SPEED / count / 60:,.1f}" for label, n in operations.items())
    return f"Minutes of one run, guessed at {GUESSED_SPEED / 1e12:.0f} TFLOP/s on each of {counted(count, 'GPU')}: {'; '.join(said)}."


def _changes(options: Options) -> list[str]:
    """What the command line has in place of the preset's."""
    given = {
        "passes": options.passes,
        "steps": options.steps,
        "warm-up steps": options.warmup_steps,
        "learning rate": options.learning_rate,
        "QK-clip": options.qk_clip,
    }
    return [f"{name} {value:,}" for name, value in given.items() if value is not None]


def _recipe(settings: TrainConfig) -> Iterable[str]:
    """The settings of `train` that are known for no experiment."""
    yield (
        f"betas {settings.beta1:g} and {settings.beta2:g}, weight decay {settings.weight_decay:g} on matrices and cores, "
        f"gradients clipped at norm {settings.gradient_clip:g}"
    )
    yield f"{settings.warmup_steps:,} warm-up steps, then a cosine down to {settings.final_share:g} of the peak rate"
    yield ("bfloat16 autocast over float32 weights" if settings.precision == "bfloat16" else "float32") + "; no dropout"
