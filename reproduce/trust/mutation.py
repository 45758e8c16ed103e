"""Mutation testing: small faults are put into the code, one at a time, by mutmut; tests, or mypy, must notice each of them.

Two counts are kept apart. What mypy rejects is never met by a test, but for a part drawn by lot; all others are met by the tests that
belong to the module. `[tool.mutmut]` in pyproject.toml holds what all modules share. A mutant that survives counts against us unless
equivalent_mutants.toml lists it with the reason why it changes nothing that a caller could see; such a one meets the quickest tests
alone. The GPU kernels in `tucker_ref/kernels`
are left out: a test takes seconds there in Triton's interpreter.

mutmut leaves decorated functions out, so each is tried as a plain function whose decorators are applied below it.
"""

import ast
import builtins
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ..store.files import code_hash
from ..store.records import append, new_record
from ..train.options import Options
from ..train.runs import check_labels

TAKES = ("rows",)
ROOT = Path(__file__).parents[2]
EQUIVALENT = Path(__file__).parent / "equivalent_mutants.toml"
COLLECTED_ONCE = Path(__file__).parent / "collected_once.py"  # mutmut itself, with quicker tests
TOGETHER = 12  # modules that are tried at once: what they share is prepared once
LOT = 0.1  # of the mutants that only types reject
SEED = 0  # of the lot
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"  # begins lines in which mutmut only says that it goes on
PLAIN = "__plain"  # ends the name of a function without its decorators
NUMPY = "test_hostile.py::test_tensors_and_sizes_that_mean_nothing_are_refused"
BUILT = "test_hostile.py::test_a_layer_that_cannot_be_is_not_built"
SHRUNK = "test_hostile.py::test_what_cannot_be_compressed_is_said"
SPECTRAL = tuple(
    f"test_compress.py::test_effective_ranks_{name}"
    for name in ("of_known_spectra", "know_neither_order_nor_size", "are_those_of_singular_values")
)
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
        "a_layers_scale_that_its_dtype_does_not_hold_is_refused_before_anything_is_cached",
    )
)
ARRAYS = tuple(
    f"test_hostile.py::test_{name}"
    for name in (
        "products_of_integers_are_exact_or_refused",
        "weights_of_heads_have_three_sizes",
        "on_a_gpu_where_values_are_not_read_such_angles_are_nan",
    )
)
GRADIENTS = tuple(
    f"test_cache.py::test_{name}"
    for name in (
        "a_gradient_that_is_asked_for_through_a_cache_is_an_error",
        "a_cache_costs_nothing_where_no_gradients_are_kept",
        "a_gradient_that_needs_nothing_cached_passes",
        "what_is_stored_is_given_as_it_is_where_nobody_can_ask",
    )
)
INTEGERS = "test_integers.py"
STARTED = tuple(
    f"test_hostile.py::test_{name}"
    for name in (
        "weights_start_as_large_as_is_said_or_not_at_all",
        "the_least_and_the_largest_weights_that_start",
        "a_scale_for_which_no_weights_start_is_refused_before_any",
        "what_float64_holds_only_without_its_square_starts_as_it_should",
        "where_nothing_is_drawn_a_scale_may_be_any",
    )
)
HELD = "test_static_cache.py::test_what_is_held_is_what_was_there_and_shared_by_layers_that_turn_alike"
PLACED = "test_static_cache.py::test_a_static_cache_needs_a_mask_and_is_left_where_it_was"
COMMON = "test_normed.py::test_what_keys_have_in_common_counts_for_nothing"
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
               "test_mechanisms.py", "test_qk_norm.py", "test_tensor_algebra.py", "test_decomposition.py", "test_attention_tensors.py",
               INTEGERS, NUMPY, *ARRAYS, BUILT, SHRUNK, *STARTED, *CALLED, *SPECTRAL),
    "tensor_algebra": ("test_tensor_algebra.py", INTEGERS, NUMPY),
    "decomposition": ("test_decomposition.py", INTEGERS, NUMPY),
    "attention_tensors": ("test_attention_tensors.py", NUMPY),
    "costs": ("test_costs.py", "test_contracts.py::test_costs_are_those_of_the_layer", INTEGERS, NUMPY),
    "rotary": ("test_rotary.py", INTEGERS, BUILT),
    "rope_frequencies": ("test_rotary.py", INTEGERS, BUILT),
    "gqa": ("test_mechanisms.py", "test_qk_norm.py", INTEGERS, BUILT),
    "mha": (*LAYERS, "test_qk_norm.py", "test_recompute.py", INTEGERS),
    "mla": (*LAYERS, "test_rotary.py", "test_replaced_parts.py", INTEGERS),
    "tucker_naive": ("test_tucker_naive.py",),
    "tucker": (*LAYERS, "test_tucker_naive.py", "test_qk_norm.py", "test_rotary.py", "test_special_cases.py", "test_recompute.py", HELD),
    "tucker_weights": (*LAYERS, "test_special_cases.py", "test_qk_norm.py::test_norms_that_do_not_fit_make_no_layer", HELD),
    "norms": (*LAYERS, "test_qk_norm.py", INTEGERS),
    "initialisation": (*LAYERS, "test_qk_norm.py", *STARTED),
    "cache": ("test_cache.py", "test_rotary.py", "test_one_thread.py", INTEGERS, *CALLED),
    "static_cache": ("test_static_cache.py", "test_one_thread.py", INTEGERS,
                     "test_contracts.py::test_a_layer_keeps_shapes_and_decodes_what_it_computes_at_once"),
    "no_gradient": ("test_static_cache.py", *GRADIENTS),
    "held": ("test_static_cache.py", INTEGERS),
    "one_thread": ("test_one_thread.py",),
    "own_code": ("test_own_code.py",),
    "cached_attention": ("test_cache.py", "test_rotary.py", "test_one_thread.py", "test_replaced_parts.py", INTEGERS, *CALLED, PLACED),
    "attend": ("test_attend.py", *ATTENDED),
    "backends": ("test_attend.py", *ATTENDED),
    "recompute": ("test_recompute.py",),
    "factors": ("test_factors.py", "test_replaced_parts.py", *CONVERTED, "test_compress.py", "test_convert.py", SHRUNK, SPOILED),
    "special_cases": (*CONVERTED, "test_convert.py", SHRUNK),
    **{f"compression/{module}": (*COMPRESSED, SHRUNK, SPOILED) for module in ("rope_classes", "truncation")},
    "compression/factored_tensor": (*COMPRESSED, SHRUNK, SPOILED, COMMON),
    "compression/leading": ("test_leading.py",),
    "compression/moments": ("test_compress.py", "test_contracts.py::test_the_second_moment_is_symmetric_and_positive", SHRUNK,
                            COMMON),
    "compression/spectra": ("test_compress.py", "test_contracts.py::test_spectra_agree_on_the_norm_and_bound_the_ranks",
                            INTEGERS, SHRUNK, SPOILED, COMMON),
    "compression/ranks": (*COMPRESSED, INTEGERS, SHRUNK),
    "compression/compress": (*COMPRESSED, INTEGERS, SHRUNK),
    "compression/model_ranks": ("test_model_ranks.py", INTEGERS),
    "compression/normed": ("test_normed.py",),
    "compression/convert": ("test_convert.py", INTEGERS,
                            "test_contracts.py::test_conversions_have_the_sizes_asked_for_and_are_exact_where_nothing_is_lost", SHRUNK),
    "reproduce/train/muon": ("test_muon.py",),
    "reproduce/train/qk_clip": ("test_qk_clip.py",),
}  # fmt: skip
OUTCOMES = {0: "survived", 1: "killed", 3: "killed", 33: "untested", 36: "timeout", 24: "timeout", -24: "timeout", 37: "mypy"}
OUTCOMES |= {-11: "killed", -6: "killed"}  # the whole process broke down in a test, which nobody misses


def run(options: Options) -> None:
    """One record per module.

    Args:
        options: `rows` are modules, all of TESTS if empty; `out` holds the copies that are mutated.

    Raises:
        ValueError: for a module that is not in TESTS, or if mutmut fails.
    """
    modules = options.rows or tuple(TESTS)
    check_labels("module", modules, TESTS)
    known = equivalent()
    for first in tqdm(range(0, len(modules), TOGETHER), "mutation"):
        batch, started = modules[first : first + TOGETHER], time.perf_counter()
        sources = {module: code_hash(ROOT / path_of(module)) for module in batch}
        folder = prepare(options.out / "mutation" / batch[0], batch)
        for module, (outcomes, drawn) in outcomes_of(folder, batch).items():
            said = changes(folder, [name for part in (outcomes, drawn) for name in living(part)])
            metrics = count(outcomes, drawn, said, known)
            tqdm.write(f"{module}: {summary(metrics)}")
            for text in metrics["survivors"]:
                tqdm.write(f"  survived: {text}")
            # Not what defines the run: a module's newest record counts.
            metrics |= {"tests": TESTS[module], "source": sources[module]}
            wall = (time.perf_counter() - started) / len(batch)
            record = new_record("mutation", "mutmut", module, {"tool": "mutmut"}, metrics, wall_seconds=wall)
            append(options.records, record, replace=True)


def path_of(module: str) -> str:
    """Of a key of TESTS, from the root."""
    return f"{module}.py" if module.startswith("reproduce/") else f"tucker_ref/{module}.py"


def prepare(folder: Path, modules: Sequence[str]) -> Path:
    """A fresh working copy with mutmut configured for these modules: it would not try survivors again on new tests.

    Args:
        folder: what it holds is lost.
        modules: keys of TESTS.

    Returns:
        The folder.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("tucker_ref", "reproduce", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    library = [path for path in (folder / "tucker_ref").rglob("*.py") if path.parent.name != "kernels"]
    for path in {*library, *(folder / path_of(module) for module in modules)}:  # what decorates one module may stand in another
        path.write_text(undecorated(path.read_text(encoding="utf-8")), encoding="utf-8")
    belonging = {path_of(m).removesuffix(".py").replace("/", "."): [f"tests/{name}" for name in TESTS[m]] for m in modules}
    asked = {"tests_of": belonging, "equivalent": list(equivalent()), "share": LOT, "seed": SEED}
    (folder / "asked.json").write_text(json.dumps(asked), encoding="utf-8")  # read by collected_once
    configure(folder, modules)
    return folder


def configure(folder: Path, modules: Sequence[str]) -> None:
    """Write pyproject.toml for mutmut.

    Args:
        folder: where it goes.
        modules: keys of TESTS.
    """
    mypy = [sys.executable, "-m", "mypy", "tucker_ref", "--output", "json", "--cache-dir", str(ROOT / ".mypy_cache")]
    chosen = {
        "only_mutate": [path_of(module) for module in modules],
        "pytest_add_cli_args_test_selection": sorted({f"tests/{name}" for module in modules for name in TESTS[module]}),
        "type_check_command": [*mypy, "--no-warn-unused-ignores"],
    }
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in chosen.items())
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").replace("[tool.mutmut]", f"[tool.mutmut]\n{lines}\n#")
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")


def undecorated(source: str) -> str:
    """The same module with decorators applied below their functions, which mutmut then mutates.

    `@d` above `def f` becomes `def f__plain` and `f = d(f__plain)`. A decorator of ours is applied at each call, for no mutant of it is
    there yet when the module is imported. What mutmut can do itself stays: a class, and a function that is static or a class method.

    Args:
        source: of a module.
    """
    lines = source.splitlines(keepends=True)
    decorated = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.decorator_list]
    for node in sorted(decorated, key=lambda node: -node.lineno):  # what stands within another first
        names = [ast.unparse(decorator) for decorator in node.decorator_list]
        if names in (["staticmethod"], ["classmethod"]):
            continue
        for n in range(node.decorator_list[0].lineno - 1, node.lineno - 1):
            lines[n] = "\n"
        lines[node.lineno - 1] = lines[node.lineno - 1].replace(f"def {node.name}(", f"def {node.name}{PLAIN}(", 1)
        applied = f"{'('.join([*names, node.name + PLAIN])}{')' * len(names)}"
        if len(names) == 1 and names[0].isidentifier() and names[0] not in vars(builtins):
            applied = f"lambda *given, plain={node.name}{PLAIN}, **options: {names[0]}(plain)(*given, **options)"
        lines[node.end_lineno - 1] += f"{' ' * node.col_offset}{node.name} = {applied}\n"
    return "".join(lines)


def outcomes_of(folder: Path, modules: Sequence[str]) -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """Try all mutants.

    Args:
        folder: as `prepare` leaves it.
        modules: keys of TESTS.

    Returns:
        Per module two dictionaries from a mutant's name to "killed", "mypy", "timeout", "survived" or "untested": of all mutants,
        and of those that mypy rejected and tests were tried on all the same.
    """
    python(folder, "-P", str(COLLECTED_ONCE), "run", "--max-children", "1")
    lots = set(json.loads((folder / "drawn.json").read_text(encoding="utf-8")))
    found = {}
    for module in modules:
        outcomes = exits(folder, module)
        drawn = {name: outcome for name, outcome in outcomes.items() if name in lots and outcome != "untested"}
        found[module] = (outcomes | dict.fromkeys(drawn, "mypy"), drawn)
    return found


def exits(folder: Path, module: str) -> dict[str, str]:
    """What became of each mutant in mutmut's last run."""
    codes = json.loads((folder / "mutants" / f"{path_of(module)}.meta").read_text(encoding="utf-8"))["exit_code_by_key"]
    return {name: OUTCOMES.get(code, f"exit code {code}") for name, code in codes.items()}


def living(outcomes: dict[str, str]) -> list[str]:
    """The mutants that nothing noticed."""
    return [name for name, outcome in outcomes.items() if outcome not in ("killed", "mypy", "timeout")]


def python(folder: Path, *arguments: str) -> str:
    """Run this interpreter in a folder, on one thread; random inputs that tests find wrong are not made smaller.

    Args:
        folder: where it runs.
        arguments: of its command line.

    Returns:
        What it prints.

    Raises:
        ValueError: with the end of what it said, if it fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "mutants"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, encoding="utf-8")
    if done.returncode:
        said = "\n".join(line for line in (done.stdout + done.stderr).splitlines() if line[:1] not in SPINNER)
        raise ValueError(f"mutmut failed in {folder}: {said[-2000:]}")
    return done.stdout


def changes(folder: Path, names: list[str]) -> dict[str, str]:
    """Mutants in one line each: "cache.Cache.append: end = self.length + n -> end = self.length - n".

    Args:
        folder: where mutmut made them.
        names: as mutmut calls them.
    """
    program = (
        "import json, sys; from mutmut.mutation.diff_apply import get_diff_for_mutant as diff; "
        "print(json.dumps({name: diff(name) for name in sys.argv[1:]}))"
    )
    mutants = {}
    for name, diff in json.loads(python(folder, "-c", program, *names)).items() if names else ():
        lines = diff.splitlines()
        old, new = (" ".join(x[1:].strip() for x in lines if x[:1] == sign and x[:3] != sign * 3) for sign in "-+")
        function = name.removeprefix("tucker_ref.").rpartition("__mutmut_")[0].removesuffix(PLAIN)
        mutants[name] = f"{function.replace('.x_', '.').replace('.xǁ', '.').replace('ǁ', '.')}: {old} -> {new}"
    return mutants


def equivalent() -> dict[str, str]:
    """Per listed mutant the reason why it changes nothing."""
    entries = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8"))["equivalent"]
    return {mutant: entry["reason"] for entry in entries for mutant in entry["mutants"]}


def count(outcomes: dict[str, str], drawn: dict[str, str], said: dict[str, str], known: dict[str, str]) -> dict:
    """How many mutants met which end.

    Args:
        outcomes: of all mutants, by name.
        drawn: of those that mypy rejected and tests were tried on.
        said: what each change is, of those that are `living` in either.
        known: the equivalent ones with their reasons.

    Returns:
        `mutants`, of which mypy rejected `mypy` and tests met the others: `killed`, `timeouts`, `equivalent` and `survived`, with
        `survivors` and `equivalents` in words. `lot`: of those that mypy rejected how many were `drawn`, how many of them tests
        `noticed`, and the `unnoticed` in words.
    """
    ends = Counter(outcomes.values())
    alive = [said[name] for name in living(outcomes)]
    unnoticed = [said[name] for name in living(drawn)]
    same = [text for text in alive if text in known]
    return {
        "mutants": len(outcomes),
        "killed": ends["killed"],
        "mypy": ends["mypy"],
        "timeouts": ends["timeout"],
        "equivalent": len(same),
        "survived": len(alive) - len(same),
        "survivors": sorted(text for text in alive if text not in known),
        "equivalents": {text: known[text] for text in sorted(same)},
        "lot": {"seed": SEED, "drawn": len(drawn), "noticed": len(drawn) - len(unnoticed), "unnoticed": sorted(unnoticed)},
    }


def summary(metrics: dict) -> str:
    """One module's counts in a sentence or two.

    Args:
        metrics: as `count` gives them.
    """
    drawn, met = metrics["lot"], metrics["mutants"] - metrics["mypy"]
    return (
        f"{metrics['mutants']} mutants. Tests met {met}: {metrics['killed']} killed, {metrics['timeouts']} stopped by the clock, "
        f"{metrics['equivalent']} equivalent, {metrics['survived']} survived. Types alone rejected {metrics['mypy']}; "
        f"of {drawn['drawn']} of these, drawn by lot, tests noticed {drawn['noticed']}"
    )
