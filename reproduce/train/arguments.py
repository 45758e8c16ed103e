"""The arguments of the command line: what an experiment can be told, by groups, and the types that argparse makes of the words."""

import argparse
import math
from pathlib import Path

import torch

from ..console import given, path
from ..data.prepared import SOURCES
from ..store.checked import LARGEST, MOST
from ..store.locks import PATIENCE
from .distributed import SHARDINGS
from .options import STARTS
from .settings import OPTIMIZERS

LARGEST_RATE = 1e30  # AdamW divides it by 1 - beta, Muon multiplies it by the root of a width


class Once(argparse._StoreAction):
    """Of an option that takes several values in one: argparse forgets what a first one said, and a run would end without it."""

    given = False

    def __call__(self, *arguments, **options):
        if self.given:
            raise argparse.ArgumentError(self, "it is given twice, and the first would be forgotten: give all in one")
        self.given = True
        super().__call__(*arguments, **options)


# The groups for training language models.
LANGUAGE = ("device", "rows", "seeds", "training", "optimizer", "passes", "text", "validation", "test", "bpe")


def add_run_arguments(parser: argparse.ArgumentParser, presets: tuple[str, ...], takes: tuple[str, ...]) -> None:
    """What every experiment takes: --preset, --out and --records, and the groups that it names.

    Args:
        parser: of the experiment's own command.
        presets: names of its scales.
        takes: keys of GROUPS.
    """
    parser.add_argument(
        "--preset", choices=presets, default="smoke", help="the scale (default: smoke, the smallest, for a CPU)"
    )
    parser.add_argument("--out", type=path, default=Path("out"), help="checkpoints and caches (default: out)")
    parser.add_argument("--records", type=path, default=Path("out/records"), help="where finished runs are recorded")
    add_lock_timeout(parser)
    parser.set_defaults(device="cpu", micro_batch=None, sharding=None, dry_run=False, gpus=None)  # where they are not taken
    for group in takes:
        GROUPS[group](parser)


def add_lock_timeout(parser: argparse.ArgumentParser) -> None:
    """How long to wait for others; of what writes where they may be writing."""
    parser.add_argument(
        "--lock-timeout",
        metavar="SECONDS",
        type=rate,
        default=PATIENCE,
        help=f"how long to wait for another process that writes into the same folder (default: {PATIENCE:g})",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where to compute."""
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute: cpu, cuda, cuda:1 (default: a GPU if there is one)",
    )


def add_rows(parser: argparse.ArgumentParser) -> None:
    """Which rows of a table to run."""
    parser.add_argument(
        "--rows",
        action=Once,
        type=some_labels,
        default=(),
        help="which to run, separated by commas: rows by the labels of their table, recipes, sections or modules (default: all)",
    )


def add_seeds(parser: argparse.ArgumentParser) -> None:
    """Which seeds to run."""
    parser.add_argument(
        "--seeds", action=Once, type=seeds, default=(), help="one run per seed, for example 0,1,2 (default: the preset's)"
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    """How fast and how long to train."""
    parser.add_argument(
        "--learning-rate",
        action=Once,
        dest="learning_rates",
        metavar="LEARNING_RATE",
        type=rates,
        default=(),
        help="peak rate in place of the preset's; several, as in 1e-3,2e-3, for one run at each",
    )
    parser.add_argument("--steps", type=positive, help="training steps in place of the preset's")
    parser.add_argument("--warmup-steps", type=positive, help="steps of rising learning rate in place of the preset's")


def add_optimizer(parser: argparse.ArgumentParser) -> None:
    """Which optimiser, and a limit for its logits."""
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        help="in place of the preset's; muon: for the matrices of the blocks, with adamw beside it",
    )
    parser.add_argument(
        "--qk-clip",
        type=rate,
        metavar="LIMIT",
        help="scale a head's weights down where its largest logit exceeds this (default: never)",
    )


def add_passes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--passes",
        type=float,
        choices=(0.5, 1, 2),
        help="how often the presets gpu-fresh read the text, with steps and warm-up in proportion (default: once)",
    )


def add_text(parser: argparse.ArgumentParser) -> None:
    """Text to train on, or to learn from what layers read."""
    parser.add_argument(
        "--text",
        type=given,
        help="text: .txt, .gz, .xz or a folder of them, for training one that `prepare` wrote too (default: the standard library's "
        "source)",
    )


def add_validation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--validation", type=given, help="held-out text (default: every tenth document of --text; what is prepared has its own)"
    )


def add_test(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--test",
        action=Once,
        metavar="PATH[,PATH]",
        type=some_labels,
        default=(),
        help="texts that a finished model reads once, document by document, for its record; no setting may be chosen by them",
    )


def add_bpe(parser: argparse.ArgumentParser) -> None:
    """GPT-2's own byte pairs."""
    parser.add_argument(
        "--bpe", type=given, help="folder with GPT-2's vocab.json and merges.txt (default: learn byte pairs from the text)"
    )


def add_images(parser: argparse.ArgumentParser) -> None:
    """Images to train on."""
    parser.add_argument(
        "--images",
        type=given,
        help=".npz with x_train, y_train, x_test, y_test (default: scikit-learn's digits); in the preset paper a folder with "
        "train/CLASS/*.jpg and validation/CLASS/*.jpg (default: ImageNet-1k from the Hugging Face hub)",
    )


def add_conversion(parser: argparse.ArgumentParser) -> None:
    """Where the rows of Figure 3 start."""
    parser.add_argument(
        "--start",
        choices=STARTS,
        default="hosvd",
        help="in the preset gpu-tiny-imagenet, how layers are converted: by the HOSVD, by HOOI, or by the HOSVD that knows the second "
        "moment of their inputs (default: hosvd)",
    )
    parser.add_argument(
        "--pretrain-rate",
        action=Once,
        dest="pretrain_rates",
        metavar="PRETRAIN_RATE",
        type=rates,
        default=(),
        help="in the preset gpu-tiny-imagenet, peak rates of the pretraining (default: five with seed 0, then the one "
        "that is best by top-5 on held-out images)",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """How several workers share a run, and the dry run that tells what it takes."""
    workers = parser.add_argument_group("on many GPUs, started with torchrun")
    workers.add_argument(
        "--micro-batch", type=positive, help="sequences or images that a worker takes at a time (default: the preset's)"
    )
    workers.add_argument(
        "--sharding", choices=SHARDINGS, help="the model whole on every worker, or a part (default: fsdp from 500M parameters)"
    )
    workers.add_argument("--dry-run", action="store_true", help="print batches, steps, memory and settings; train nothing")
    workers.add_argument("--gpus", type=positive, help="for --dry-run: how many GPUs (default: the workers of torchrun)")
    workers.add_argument("--gpu-memory", type=rate, default=80.0, help="for --dry-run: of each GPU, in GB (default: 80)")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Whose attention to look at."""
    parser.add_argument(
        "--model",
        type=given,
        help=".safetensors from out/models, or a public checkpoint by folder or hub name (docs/compression.md lists them; timm's too)",
    )
    add_trust(parser)


def add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-layers",
        action="store_true",
        help="open a public model without comparing it with itself, its own attention as layers of tucker_ref (records say so)",
    )


def add_pretrained(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint to start from."""
    parser.add_argument(
        "--model", type=given, help="in the preset paper: a checkpoint of timm's, by name (default: those of the paper)"
    )
    add_trust(parser)


def add_compression(parser: argparse.ArgumentParser) -> None:
    """Ranks to compress to, and where the result goes."""
    parser.add_argument(
        "--ranks",
        action=Once,
        type=triples,
        default=(),
        help='ranks of Tucker rows, head,query,key of each: "8,64,64;8,32,32" (default: a range of budgets)',
    )
    parser.add_argument("--save", type=path, help="write the compressed model to this .safetensors file")


GROUPS = {  # what the TAKES of an experiment may name, beside --preset, --out and --records
    "device": add_device,
    "rows": add_rows,
    "seeds": add_seeds,
    "training": add_training,
    "optimizer": add_optimizer,
    "passes": add_passes,
    "text": add_text,
    "validation": add_validation,
    "test": add_test,
    "bpe": add_bpe,
    "images": add_images,
    "workers": add_workers,
    "model": add_model,
    "pretrained": add_pretrained,
    "conversion": add_conversion,
    "compression": add_compression,
}


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """What `prepare` takes."""
    parser.add_argument("text", help=f"{' or '.join(SOURCES)}, from the Hugging Face hub; or any name for the text of --files")
    parser.add_argument("--out", type=path, required=True, help="folder for the tokens; the same command goes on after a crash")
    parser.add_argument(
        "--files", type=given, help='a .txt, .jsonl or .parquet file or a pattern of them, with a column "text"'
    )
    parser.add_argument("--bpe", type=given, help="folder with GPT-2's vocab.json and merges.txt (default: from the hub)")
    parser.add_argument(
        "--validation",
        type=given,
        help="held-out text, of a text that fits into memory: both as training takes them with --text and --validation, tokenised "
        "once (default: one document in 2,000)",
    )
    add_lock_timeout(parser)


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """What `generate` takes."""
    parser.add_argument("--model", type=path, required=True, help="a .safetensors file from out/models")
    parser.add_argument(
        "--prompt", type=utf8, action="append", required=True, help="text to continue; give it several times for a batch"
    )
    parser.add_argument("--tokens", type=positive, default=100, help="how many tokens to add (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="share of probability to choose from (default: 0.95)")
    parser.add_argument("--seed", type=seed, default=0, help="of the random choices (default: 0)")


def integers(text: str) -> tuple[int, ...]:
    """Integers from 0, as in "0,1,2".

    Raises:
        argparse.ArgumentTypeError: for other text, here and below; argparse prints it as an error of the command line.
    """
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers such as 0,1,2")
    return tuple(int(part) for part in text.split(","))


def seeds(text: str) -> tuple[int, ...]:
    """Several of `seed`, as in "0,1,2"."""
    return tuple(seed(str(number)) for number in integers(text))


def seed(text: str) -> int:
    """An integer from 0 that torch's generators take: below 2^63."""
    if not text.strip().isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to 2^63 - 1")
    return int(text)


def rate(text: str) -> float:
    """A positive number that float32 holds."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of at most {LARGEST:g}")
    return number


def rates(text: str) -> tuple[float, ...]:
    """Several of `rate`, as in "1e-3,2e-3", and none that an optimiser could multiply beyond float32."""
    found = tuple(map(rate, text.split(",")))
    if max(found) > LARGEST_RATE:
        raise argparse.ArgumentTypeError(f"{max(found):g} is no learning rate; it must be at most {LARGEST_RATE:g}")
    return found


def triples(text: str) -> tuple[tuple[int, int, int], ...]:
    """Ranks of several rows, as in "8,64,64;8,32,32"."""
    rows = tuple(integers(part) for part in text.split(";"))
    if any(len(ranks) != 3 for ranks in rows):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of head,query,key ranks such as 8,64,64;8,32,32")
    return rows


def positive(text: str) -> int:
    """An integer of 1 or more."""
    if not text.isdecimal() or not 1 <= int(text[:20]) <= MOST:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number of 1 or more, and at most {MOST:,}")
    return int(text)


def utf8(text: str) -> str:
    """Text that was UTF-8 on the command line; Python gives other bytes as halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8 text: character {error.start} cannot be read") from None
    return text


def some_labels(text: str) -> tuple[str, ...]:
    """As `labels`, of which there must be one: none would mean all."""
    if not (found := labels(text)):
        raise argparse.ArgumentTypeError(f"{text!r} names none; leave the option out for the default")
    return found


def labels(text: str) -> tuple[str, ...]:
    """Split at commas that are not inside a label's brackets: "MHA,Tucker [8,64,64]" has two labels."""
    parts, depth = [""], 0
    for character in text:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return tuple(part.strip() for part in parts if part.strip())
