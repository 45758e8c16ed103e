"""The command line: `python -m reproduce --help`."""

from . import console

if __name__ == "__main__":
    console.leave_at_once()  # on Ctrl-C: what follows takes seconds

import argparse
import dataclasses
import importlib
import shlex
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from .data.prepared import is_prepared, prepare
from .data.text import check_places
from .experiments import (
    ablations,
    compress,
    compress_models,
    compress_speed,
    decode,
    exactness,
    figure3,
    generation_speed,
    heal,
    spectra,
    speed,
    table1,
    table2,
    table3,
    theorems,
    two_gpus,
)
from .models.generation import generate
from .report import checks, claims, pages, plans, results
from .report.markdown import aligned
from .store import locks, records
from .store.faults import first_line
from .train.arguments import add_generate_arguments, add_prepare_arguments, add_run_arguments
from .train.distributed import Workers, started
from .train.language import load_model
from .train.options import Options

EXPERIMENTS = {
    "exactness": exactness,
    "theorems": theorems,
    "table1": table1,
    "table2": table2,
    "spectra": spectra,
    "table3": table3,
    "ablations": ablations,
    "compress": compress,
    "compress_models": compress_models,
    "heal": heal,
    "compress_speed": compress_speed,
    "figure3": figure3,
    "decode": decode,
    "speed": speed,
    "generation_speed": generation_speed,
    "two_gpus": two_gpus,
}
TRUST = (
    "survival",
    "hostile",
    "coverage",
    "mutation",
    "fuzz",
    "versions",
    "opening",
)  # they test the code; no wheel holds them
IS_REPOSITORY = (Path(__file__).parent / "trust").is_dir()
EXPERIMENTS |= {name: importlib.import_module(f"reproduce.trust.{name}") for name in TRUST if IS_REPOSITORY}
TOGETHER = [name for name, module in EXPERIMENTS.items() if "workers" in module.TAKES]  # what several workers may train
ON_A_GPU = ("ablations", "speed", "generation_speed", "two_gpus")  # they say nothing at smoke scale
OF_A_MODEL = ("compress_models", "heal")  # that has to be named
NOT_IN_ALL = (*ON_A_GPU, *OF_A_MODEL, *TRUST)
SMOKE = ("smoke",)  # the presets of what has but one scale
ALL_TAKES = ("device", "seeds", "training", "text", "validation", "bpe", "images")  # the command "all"
PAGE = {"report": pages.FIRST, "claims": pages.CLAIMS}  # which is written where none is named
WRITE = {
    "report": f"write it between the marks of this Markdown file instead; of {pages.FIRST}, which is meant where none is named, the "
    f"pages beside it are written too: {', '.join(pages.BESIDE)}",
    "claims": f"write it between the marks of this Markdown file instead, {pages.CLAIMS} where none is named",
}
EPILOG = """
examples:
  python -m reproduce all                              everything at smoke scale: some minutes on two cores
  python -m reproduce table2 --rows "MHA,Tucker [8,64,64]" --seeds 0,1,2
  python -m reproduce table2 --text novel.txt          on your own text (.txt, .gz, .xz or a folder of them)
  python -m reproduce figure3 --images images.npz      uint8 arrays x_train, y_train, x_test, y_test
  python -m reproduce compress --model gpt2 --text novel.txt --ranks "12,256,256;8,128,128"
  python -m reproduce heal --model models/gemma-270m --text train.txt --validation val.txt --test test.txt --preset gpu
  python -m reproduce generate --model out/models/table2-MHA-seed-0.safetensors --prompt "def "
  python -m reproduce prepare openwebtext --out data/openwebtext
  python -m reproduce prepare wiki --files wiki.txt.xz --validation held_out.txt.xz --bpe gpt2 --out data/wiki
  python -m reproduce table2 --preset gpu-fresh --text data/wiki --rows "MHA QK-norm" --learning-rate 2.4e-3,4.8e-3
  python -m reproduce table2 --preset paper --dry-run --gpus 8     batches, steps, memory, and whose settings they are
  torchrun --nproc-per-node 8 -m reproduce table2 --preset paper --text data/openwebtext
  python -m reproduce report                           every table, from the committed records
  python -m reproduce report --write README.md         README and all pages of results again
  python -m reproduce claims --records out/records     every claim of the paper with its verdict, from your own runs

A run that is on record is skipped; one that was stopped goes on from its last checkpoint when the command is repeated.
"""


@console.at_the_terminal
def main() -> int:
    """Run what the command line says.

    Returns:
        0; 1 after one line where something given cannot be used, 2 where the command itself is wrong, 130 after Ctrl-C. Any other
        error is one of the program: it is raised, and the terminal is told so.
    """
    if (command := "".join(sys.argv[1:2])) in TRUST and command not in EXPERIMENTS:
        print(f"error: {command} tests the code and is not in the wheel; run it in the repository", file=sys.stderr)
        return 1
    options = parse()
    if "lock_timeout" in options:
        locks.wait_at_most(options.lock_timeout)
    if options.command == "generate":
        write_text(options)
    elif options.command == "prepare":
        prepare(options.text, options.out, options.files, options.bpe, options.validation)
    elif options.command in ("report", "claims"):
        show_records(options)
    else:
        run(options)
    return 0


def show_records(options: argparse.Namespace) -> None:
    everything = records.load_some(options.records)
    is_report = options.command == "report"
    if options.write:
        return (pages.write if is_report else pages.write_claims)(options.write, everything)
    shown = (results.render(everything), checks.render(everything)) if is_report else (claims.render(everything),)
    print(aligned("\n\n".join(text for text in shown if text)))


def run(options: argparse.Namespace) -> None:
    records.git_commit()  # that of now, for all records
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
    text = None if is_prepared(chosen.text) else chosen.text  # a folder of tokens may lie anywhere
    check_places([("--text", text), ("--validation", chosen.validation), *(("--test", path) for path in chosen.test)])
    if options.dry_run:
        for at_rate in chosen.at_each_rate():
            plans.show(EXPERIMENTS[names[0]].run(at_rate), at_rate)
        return
    for name in names:
        EXPERIMENTS[name].run(chosen)
    if workers.is_first and options.command in results.DRAW:  # what tests the code says itself what came out
        print(aligned(results.render(records.load(options.records, to_show=True), names)), end="\n\n")
    place = shlex.quote(str(options.records))
    print(f"records are in {options.records}; `python -m reproduce report --records {place}` draws all tables")


def check_device(name: str) -> None:
    """Raise ValueError unless tensors can be made there."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device {name} cannot be used here: {first_line(error).split('. ')[0]}") from None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m reproduce",
        description="Reproduce the tables and figures of the Tucker Attention paper (arXiv:2603.30033), at a scale you choose.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in EXPERIMENTS.items():
        said = module.__doc__ or name  # Python leaves it out with -OO
        command = commands.add_parser(
            name,
            help=said.split("\n\n")[0].replace("\n", " "),
            description=said,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_run_arguments(command, tuple(getattr(module, "PRESETS", SMOKE)), module.TAKES)
    rest = f"every experiment but {', '.join(NOT_IN_ALL[:-1])} and {NOT_IN_ALL[-1]}, one after the other"
    add_run_arguments(commands.add_parser("all", help=rest, description=rest), SMOKE, ALL_TAKES)
    add_prepare_arguments(commands.add_parser("prepare", help="tokenise a text too large for memory, for --text"))
    add_generate_arguments(commands.add_parser("generate", help="continue prompts with a model that table2 or table3 trained"))
    for name, text in (("report", "print every table from records"), ("claims", "print every claim with its verdict")):
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "--records", type=console.path, default=records.COMMITTED, help="folder of records (default: those committed here)"
        )
        command.add_argument("--write", type=console.path, nargs="?", const=Path(PAGE[name]), metavar="PAGE", help=WRITE[name])
    return parser.parse_args()


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


if __name__ == "__main__":
    sys.exit(main())
