"""The command line: `python -m reproduce --help`."""

import argparse
import dataclasses
import importlib
import math
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from .data.prepared import SOURCES, prepare
from .experiments import ablations, compress, compress_speed, decode, exactness, figure3, spectra, speed, table1, table2, table3
from .models.generation import generate
from .report import checks, claims, gpu, plans, results
from .store import records
from .train.distributed import SHARDINGS, Workers, started
from .train.language import load_model
from .train.options import Options
from .train.settings import OPTIMIZERS

EXPERIMENTS = {
    "exactness": exactness,
    "table1": table1,
    "table2": table2,
    "spectra": spectra,
    "table3": table3,
    "ablations": ablations,
    "compress": compress,
    "compress_speed": compress_speed,
    "figure3": figure3,
    "decode": decode,
    "speed": speed,
}
TRUST = ("survival", "hostile", "coverage", "mutation", "fuzz", "versions")  # they test the code; no wheel holds them
IS_REPOSITORY = (Path(__file__).parent / "trust").is_dir()
EXPERIMENTS |= {name: importlib.import_module(f"reproduce.trust.{name}") for name in TRUST if IS_REPOSITORY}
LANGUAGE = ("device", "rows", "seeds", "training", "optimizer", "text", "bpe")
TAKES = {  # what each experiment can be told, by groups of options, beside --preset, --out and --records
    "table2": (*LANGUAGE, "workers"),
    "table3": (*LANGUAGE, "workers"),
    "ablations": LANGUAGE,
    "spectra": ("device", "rows", "seeds", "model"),
    "compress": ("device", "rows", "text", "images", "model", "compression"),
    "figure3": ("device", "rows", "seeds", "training", "images", "pretrained", "workers"),
    "decode": ("device", "rows"),
    "speed": ("device", "rows"),
    "mutation": ("rows",),
    "all": ("device", "seeds", "training", "text", "bpe", "images"),
}
TOGETHER = [name for name, groups in TAKES.items() if "workers" in groups]  # what several workers may train
ON_A_GPU = ("ablations", "speed")  # they say nothing at smoke scale
NOT_IN_ALL = (*ON_A_GPU, *TRUST)
SMOKE = ("smoke",)  # the presets of what has but one scale
EPILOG = """
examples:
  python -m reproduce all                              everything at smoke scale: some minutes on two cores
  python -m reproduce table2 --rows "MHA,Tucker [8,64,64]" --seeds 0,1,2
  python -m reproduce table2 --text novel.txt          on your own text (.txt, .gz, .xz or a folder of them)
  python -m reproduce figure3 --images images.npz      uint8 arrays x_train, y_train, x_test, y_test
  python -m reproduce compress --model gpt2 --text novel.txt --ranks "12,256,256;8,128,128"
  python -m reproduce generate --model out/models/table2-MHA-seed-0.safetensors --prompt "def "
  python -m reproduce prepare openwebtext --out data/openwebtext
  python -m reproduce table2 --preset paper --dry-run --gpus 8     batches, steps, memory, and whose settings they are
  torchrun --nproc-per-node 8 -m reproduce table2 --preset paper --text data/openwebtext
  python -m reproduce report                           every table, from the committed records
  python -m reproduce claims --records out/records     every claim of the paper with its verdict, from your own runs

A run that is on record is skipped; one that was stopped goes on from its last checkpoint when the command is repeated.
"""


def main() -> int:
    if (command := "".join(sys.argv[1:2])) in TRUST and command not in EXPERIMENTS:
        print(f"error: {command} tests the code and is not in the wheel; run it in the repository", file=sys.stderr)
        return 1
    options = parse()
    try:
        if options.command == "generate":
            write_text(options)
        elif options.command == "prepare":
            prepare(options.text, options.out, options.files, options.bpe)
        elif options.command in ("report", "claims"):
            show_records(options)
        else:
            run(options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def show_records(options: argparse.Namespace) -> None:
    everything = records.load_some(options.records)
    if options.command == "claims" and options.write and claims.BEGIN in text_of(options.write):
        parts = {claims: claims.sentences(everything)}  # the page has a place for them beside its results
    elif options.command == "claims":
        parts = {results: claims.render(everything)}
    else:
        parts = {results: results.render(everything), checks: checks.render(everything)}
    if not options.write:
        return print("\n\n".join(text for text in parts.values() if text))
    if options.command == "report":
        parts |= {gpu: gpu.render(everything), claims: claims.sentences(everything)}
    results.write_into(options.write, {(part.BEGIN, part.END): text for part, text in parts.items()})


def text_of(page: Path) -> str:
    """Nothing where it cannot be read: who writes into it says why."""
    return page.read_text(errors="replace") if page.is_file() else ""


def run(options: argparse.Namespace) -> None:
    check_device(options.device)
    with started(options.device, options.micro_batch, options.sharding) as (workers, device):
        if workers.count > 1 and options.command not in TOGETHER:
            raise ValueError(f"{options.command} does not run under torchrun; {', '.join(TOGETHER)} do")
        if options.gpus and not options.dry_run:
            raise ValueError(
                "--gpus is for --dry-run; how many train is said to torchrun: torchrun --nproc-per-node 8 -m reproduce ..."
            )
        if options.gpus:
            workers = dataclasses.replace(workers, count=options.gpus)
        run_with(options, workers, device)


def run_with(options: argparse.Namespace, workers: Workers, device: str) -> None:
    names = [name for name in EXPERIMENTS if name not in NOT_IN_ALL] if options.command == "all" else [options.command]
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Options) if field.name in options}
    chosen = Options(**given | {"device": device, "workers": workers})
    if options.dry_run:
        for at_rate in chosen.at_each_rate():
            plans.show(EXPERIMENTS[names[0]].run(at_rate), at_rate)
        return
    for name in names:
        EXPERIMENTS[name].run(chosen)
    if workers.is_first and options.command in results.DRAW:  # what tests the code says itself what came out
        print(results.render(records.load(options.records), names), end="\n\n")
    print(f"records are in {options.records}; `python -m reproduce report --records {options.records}` draws all tables")


def check_device(name: str) -> None:
    """Raise ValueError unless tensors can be made there."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m reproduce",
        description="Reproduce the tables and figures of the Tucker Attention paper (arXiv:2603.30033), at a scale you choose.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in EXPERIMENTS.items():
        command = commands.add_parser(
            name,
            help=module.__doc__.split("\n\n")[0].replace("\n", " "),
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_run_arguments(command, tuple(getattr(module, "PRESETS", SMOKE)), TAKES.get(name, ()))
    rest = f"every experiment but {', '.join(NOT_IN_ALL[:-1])} and {NOT_IN_ALL[-1]}, one after the other"
    add_run_arguments(commands.add_parser("all", help=rest, description=rest), SMOKE, TAKES["all"])
    add_prepare_arguments(commands.add_parser("prepare", help="tokenise a text too large for memory, for --text"))
    add_generate_arguments(commands.add_parser("generate", help="continue prompts with a model that table2 or table3 trained"))
    for name, text in (("report", "print every table from records"), ("claims", "print every claim with its verdict")):
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "--records", type=Path, default=records.COMMITTED, help="folder of records (default: those committed here)"
        )
        command.add_argument("--write", type=Path, help="put it between the result marks of this Markdown file instead")
    return parser.parse_args()


def add_run_arguments(parser: argparse.ArgumentParser, presets: tuple[str, ...], takes: tuple[str, ...]) -> None:
    parser.add_argument(
        "--preset", choices=presets, default="smoke", help="the scale (default: smoke, the smallest, for a CPU)"
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="checkpoints and caches (default: out)")
    parser.add_argument("--records", type=Path, default=Path("out/records"), help="where finished runs are recorded")
    parser.set_defaults(device="cpu", micro_batch=None, sharding=None, dry_run=False, gpus=None)  # where they are not taken
    for group in takes:
        GROUPS[group](parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute: cpu, cuda, cuda:1 (default: a GPU if there is one)",
    )


def add_rows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows",
        type=labels,
        default=(),
        help="which to run, separated by commas: rows by the labels of their table, recipes, sections or modules (default: all)",
    )


def add_seeds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=seeds, default=(), help="one run per seed, for example 0,1,2 (default: the preset's)")


def add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--learning-rate",
        dest="learning_rates",
        metavar="LEARNING_RATE",
        type=rates,
        default=(),
        help="peak rate in place of the preset's; several, as in 1e-3,2e-3, for one run at each",
    )
    parser.add_argument("--steps", type=positive, help="training steps in place of the preset's")
    parser.add_argument("--warmup-steps", type=positive, help="steps of rising learning rate in place of the preset's")


def add_optimizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        help="in place of the preset's; muon: for the matrices of the blocks, with adamw beside it",
    )


def add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text",
        help="text: .txt, .gz, .xz or a folder of them, for training one that `prepare` wrote too (default: the standard library's "
        "source)",
    )
    parser.add_argument(
        "--validation", help="held-out text (default: every tenth document of --text; what is prepared has its own)"
    )


def add_bpe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bpe", help="folder with GPT-2's vocab.json and merges.txt (default: learn byte pairs from the text)")


def add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        help=".npz with x_train, y_train, x_test, y_test (default: scikit-learn's digits); in the preset paper a folder with "
        "train/CLASS/*.jpg and validation/CLASS/*.jpg (default: ImageNet-1k from the Hugging Face hub)",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument(
        "--model",
        help=".safetensors from out/models, or a GPT-2, Llama-style or ViT checkpoint by folder or hub name (timm's too)",
    )


def add_pretrained(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="in the preset paper: a checkpoint of timm's, by name (default: those of the paper)")


def add_compression(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranks",
        type=triples,
        default=(),
        help='ranks of Tucker rows, head,query,key of each: "8,64,64;8,32,32" (default: a range of budgets)',
    )
    parser.add_argument("--save", type=Path, help="write the compressed model to this .safetensors file")


GROUPS = {
    "device": add_device,
    "rows": add_rows,
    "seeds": add_seeds,
    "training": add_training,
    "optimizer": add_optimizer,
    "text": add_text,
    "bpe": add_bpe,
    "images": add_images,
    "workers": add_workers,
    "model": add_model,
    "pretrained": add_pretrained,
    "compression": add_compression,
}


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", help=f"{' or '.join(SOURCES)}, from the Hugging Face hub; or any name for the text of --files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokens; the same command goes on after a crash")
    parser.add_argument("--files", help='a .txt, .jsonl or .parquet file or a pattern of them, with a column "text"')
    parser.add_argument("--bpe", help="folder with GPT-2's vocab.json and merges.txt (default: from the hub)")


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="a .safetensors file from out/models")
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; give it several times for a batch")
    parser.add_argument("--tokens", type=positive, default=100, help="how many tokens to add (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="share of probability to choose from (default: 0.95)")
    parser.add_argument("--seed", type=seed, default=0, help="of the random choices (default: 0)")


def write_text(options: argparse.Namespace) -> None:
    model, tokenizer, _ = load_model(options.model)
    tokenizer = Tokenizer.from_str(tokenizer)
    prompts = [tokenizer.encode(prompt).ids for prompt in options.prompt]
    chosen = generate(model, prompts, options.tokens, temperature=options.temperature, top_p=options.top_p, seed=options.seed)
    added = list(zip(*(step.tolist() for step in tqdm(chosen, "generating", total=options.tokens, leave=False))))
    for number, (prompt, tokens) in enumerate(zip(options.prompt, added)):
        if len(added) > 1:
            print(f"--- prompt {number + 1}")
        print(prompt + tokenizer.decode(list(tokens)))


def integers(text: str) -> tuple[int, ...]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers such as 0,1,2")
    return tuple(int(part) for part in text.split(","))


def seeds(text: str) -> tuple[int, ...]:
    return tuple(seed(str(number)) for number in integers(text))


def seed(text: str) -> int:
    if not text.strip().isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to 2^63 - 1")
    return int(text)


def rate(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def rates(text: str) -> tuple[float, ...]:
    return tuple(map(rate, text.split(",")))


def triples(text: str) -> tuple[tuple[int, int, int], ...]:
    rows = tuple(integers(part) for part in text.split(";"))
    if any(len(ranks) != 3 for ranks in rows):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of head,query,key ranks such as 8,64,64;8,32,32")
    return rows


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


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


if __name__ == "__main__":
    sys.exit(main())
