"""Mutation testing: small faults are put into the library, one at a time, by mutmut; tests, or mypy, must notice each of them.

Module by module, with the tests that belong to it; `[tool.mutmut]` in pyproject.toml holds what all modules share. A mutant that
survives counts against us unless equivalent_mutants.toml lists it with the reason why it changes nothing that a caller could see.
The GPU kernels in `tucker_ref/kernels` are left out: a test takes seconds there in Triton's interpreter.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from ..store.records import append, new_record
from ..train.options import Options
from ..train.runs import check_labels

TAKES = ("rows",)
ROOT = Path(__file__).parents[2]
EQUIVALENT = Path(__file__).parent / "equivalent_mutants.toml"
NUMPY = "test_hostile.py::test_tensors_and_sizes_that_mean_nothing_are_refused"
BUILT = "test_hostile.py::test_a_layer_that_cannot_be_is_not_built"
SHRUNK = "test_hostile.py::test_what_cannot_be_compressed_is_said"
SPOILED = "test_hostile.py::test_layers_with_weights_that_are_not_finite_have_no_approximation"
ATTENDED = tuple(
    f"test_hostile.py::test_{name}"
    for name in (
        "every_backend_refuses_the_same",
        "without_sources_every_backend_gives_zeros",
        "nothing_in_gives_nothing_out",
        "a_query_that_may_look_nowhere_gets_zeros",
    )
)
CALLED = tuple(
    f"test_hostile.py::test_{name}"
    for name in (
        "a_refused_call_names_its_argument_and_leaves_the_cache_as_it_was",
        "a_cache_that_cannot_be_is_not_made",
        "a_cache_made_otherwise_is_refused_and_stays_empty",
        "a_cache_of_another_layer_is_refused",
    )
)
LAYERS = (
    "test_mechanisms.py",
    "test_cache.py",
    *(
        f"test_contracts.py::test_{name}"
        for name in (
            "a_layer_keeps_shapes_and_decodes_what_it_computes_at_once",
            "later_tokens_and_other_sequences_change_nothing_and_as_tucker_agrees",
            "weights_are_core_times_factors",
            "the_norm_scales_its_channels_to_mean_square_one_and_passes_the_rest",
        )
    ),
    BUILT,
)
CONVERTED = ("test_special_cases.py", "test_exactness.py", *LAYERS[3:4])
COMPRESSED = (
    "test_compress.py",
    "test_convert.py",
    "test_contracts.py::test_compression_has_the_ranks_asked_for_and_the_error_promised",
)
TESTS = {
    "checks": ("test_checks.py", "test_attend.py::test_bad_input_is_named", *ATTENDED[:1], "test_rotary.py", "test_cache.py",
               "test_mechanisms.py", "test_qk_norm.py", NUMPY, BUILT, SHRUNK, *CALLED),
    "tensor_algebra": ("test_tensor_algebra.py", NUMPY),
    "decomposition": ("test_decomposition.py", NUMPY),
    "attention_tensors": ("test_attention_tensors.py", NUMPY),
    "costs": ("test_costs.py", "test_contracts.py::test_costs_are_those_of_the_layer", NUMPY),
    "rotary": ("test_rotary.py", BUILT),
    "rope_frequencies": ("test_rotary.py", BUILT),
    "gqa": ("test_mechanisms.py", "test_qk_norm.py", BUILT),
    "mha": (*LAYERS, "test_qk_norm.py"),
    "mla": (*LAYERS, "test_rotary.py"),
    "tucker_naive": ("test_tucker_naive.py",),
    "tucker": (*LAYERS, "test_tucker_naive.py", "test_qk_norm.py", "test_rotary.py", "test_special_cases.py"),
    "tucker_weights": (*LAYERS, "test_special_cases.py"),
    "norms": (*LAYERS, "test_qk_norm.py"),
    "initialisation": (*LAYERS, "test_qk_norm.py"),
    "cache": ("test_cache.py", "test_rotary.py", *CALLED),
    "cached_attention": ("test_cache.py", "test_rotary.py", *CALLED),
    "attend": ("test_attend.py", *ATTENDED),
    "backends": ("test_attend.py", *ATTENDED),
    "factors": ("test_factors.py", *CONVERTED, "test_compress.py", "test_convert.py", SHRUNK, SPOILED),
    "special_cases": (*CONVERTED, "test_convert.py", SHRUNK),
    **{f"compression/{module}": (*COMPRESSED, SHRUNK, SPOILED) for module in ("rope_classes", "factored_tensor", "truncation")},
    "compression/moments": ("test_compress.py", "test_contracts.py::test_the_second_moment_is_symmetric_and_positive", SHRUNK),
    "compression/spectra": ("test_compress.py", "test_contracts.py::test_spectra_agree_on_the_norm_and_bound_the_ranks", SHRUNK, SPOILED),
    "compression/ranks": (*COMPRESSED, SHRUNK),
    "compression/compress": (*COMPRESSED, SHRUNK),
    "compression/convert": ("test_convert.py",
                            "test_contracts.py::test_conversions_have_the_sizes_asked_for_and_are_exact_where_nothing_is_lost", SHRUNK),
}  # fmt: skip
OUTCOMES = {0: "survived", 1: "killed", 3: "killed", 33: "untested", 36: "timeout", 24: "timeout", -24: "timeout", 37: "mypy"}


def run(options: Options) -> None:
    """One record per module.  Raises ValueError for a module that is not listed above, or if mutmut fails."""
    modules = options.rows or tuple(TESTS)
    check_labels("module", modules, TESTS)
    known = equivalent()
    for module in tqdm(modules, "mutation"):
        started = time.perf_counter()
        folder = prepare(options.out / "mutation" / module, module)
        outcomes = mutate(folder, module)
        living = [name for name, outcome in outcomes.items() if outcome not in ("killed", "mypy", "timeout")]
        metrics = count(outcomes, changes(folder, living), known)
        tqdm.write(f"{module}: {summary(metrics)}")
        for text in metrics["survivors"]:
            tqdm.write(f"  survived: {text}")
        metrics["tests"] = TESTS[module]  # not what defines the run: a module's newest record counts
        wall = time.perf_counter() - started
        append(
            options.records,
            new_record("mutation", "mutmut", module, {"tool": "mutmut"}, metrics, wall_seconds=wall),
            replace=True,
        )


def prepare(folder: Path, module: str) -> Path:
    """A fresh working copy for one module, with mutmut configured for it: it would not try survivors again on new tests."""
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("tucker_ref", "reproduce", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    mypy = [sys.executable, "-m", "mypy", "tucker_ref", "--output", "json", "--cache-dir", str(ROOT / ".mypy_cache")]
    chosen = {
        "only_mutate": [f"tucker_ref/{module}.py"],
        "pytest_add_cli_args_test_selection": [f"tests/{name}" for name in TESTS[module]],
        "type_check_command": [*mypy, "--no-warn-unused-ignores"],
    }
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in chosen.items())
    text = (ROOT / "pyproject.toml").read_text().replace("[tool.mutmut]", f"[tool.mutmut]\n{lines}\n#")
    (folder / "pyproject.toml").write_text(text)
    return folder


def python(folder: Path, *arguments: str) -> str:
    """What this interpreter prints, run in this folder on one thread."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"mutmut failed in {folder}: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def mutate(folder: Path, module: str) -> dict[str, str]:
    """Per mutant "killed", "mypy", "timeout", "survived" or "untested"."""
    python(folder, "-m", "mutmut", "run", "--max-children", "1")
    codes = json.loads((folder / "mutants" / "tucker_ref" / f"{module}.py.meta").read_text())["exit_code_by_key"]
    return {name: OUTCOMES.get(code, f"exit code {code}") for name, code in codes.items()}


def changes(folder: Path, names: list[str]) -> dict[str, str]:
    """Mutants in one line each: "cache.Cache.append: end = self.length + n -> end = self.length - n"."""
    program = (
        "import json, sys; from mutmut.mutation.diff_apply import get_diff_for_mutant as diff; "
        "print(json.dumps({name: diff(name) for name in sys.argv[1:]}))"
    )
    mutants = {}
    for name, diff in json.loads(python(folder, "-c", program, *names)).items():
        lines = diff.splitlines()
        old, new = (" ".join(x[1:].strip() for x in lines if x[:1] == sign and x[:3] != sign * 3) for sign in "-+")
        function = name.removeprefix("tucker_ref.").rpartition("__mutmut_")[0]
        mutants[name] = f"{function.replace('.x_', '.').replace('.xǁ', '.').replace('ǁ', '.')}: {old} -> {new}"
    return mutants


def equivalent() -> dict[str, str]:
    """Per listed mutant the reason why it changes nothing."""
    entries = tomllib.loads(EQUIVALENT.read_text())["equivalent"]
    return {mutant: entry["reason"] for entry in entries for mutant in entry["mutants"]}


def count(outcomes: dict[str, str], living: dict[str, str], known: dict[str, str]) -> dict:
    """How many mutants met which end.  living: what each changes, of those that nothing noticed; survivors are not in `known`."""
    counts = Counter(outcomes.values())
    same = [text for text in living.values() if text in known]
    return {
        "mutants": len(outcomes),
        "killed": counts["killed"],
        "mypy": counts["mypy"],
        "timeouts": counts["timeout"],
        "equivalent": len(same),
        "survived": len(living) - len(same),
        "survivors": sorted(text for text in living.values() if text not in known),
        "equivalents": {text: known[text] for text in sorted(same)},
    }


def killed_share(metrics: dict) -> float:
    """Of the mutants that are not equivalent, the share that tests, mypy or the clock noticed."""
    return 1 - metrics["survived"] / (metrics["mutants"] - metrics["equivalent"])


def summary(metrics: dict) -> str:
    return (
        f"{metrics['mutants']} mutants: {metrics['killed']} killed by tests, {metrics['mypy']} by mypy, {metrics['timeouts']} by the "
        f"clock; {metrics['equivalent']} equivalent, {metrics['survived']} survived ({100 * killed_share(metrics):.1f} % dead)"
    )
