"""What makes Tucker Attention train well: other initialisations, and cures for its break-down at high learning rates, one at a time."""

import dataclasses

from ..models.rows import TABLE2, labels_of
from ..train.arguments import LANGUAGE
from ..train.language import method_of, train_rows
from ..train.options import Options
from ..train.recipes import INITS, Recipe
from ..train.runs import check_labels
from .table2 import ON_GPU_ROWS, PAPER_SHAPE, SWEPT_RATES
from .table2 import PRESETS as TABLE2_PRESETS

LONGER = " with the longer warm-up"
SLOWER_FACTORS = Recipe("factors at a quarter of the rate", factor_rate=0.25)
# What is open to any row: the row that Tucker is measured against gets the same chance.
SLOWER_ATTENTION = Recipe("attention at a quarter of the rate", attention_rate=0.25)
SLOWER = (SLOWER_FACTORS.name, SLOWER_ATTENTION.name)
RECIPES = (
    *(Recipe(f"init {init}", init=init) for init in INITS[1:]),
    Recipe("normalised latents", latent_norm=True),
    Recipe("cores at a quarter of the rate", core_rate=0.25),
    SLOWER_FACTORS,
    Recipe("factors kept orthonormal", retracted=True),
    Recipe("factors kept orthonormal by retraction", retracted=True, carried=False),
    Recipe("decay of the product", product_decay=True),
    Recipe(f"cores at a quarter of the rate{LONGER}", core_rate=0.25, warmup=4),
    dataclasses.replace(SLOWER_FACTORS, name=f"{SLOWER_FACTORS.name}{LONGER}", warmup=4),
    Recipe(f"factors kept orthonormal by retraction{LONGER}", retracted=True, carried=False, warmup=4),
    Recipe("warm-up four times longer", warmup=4),
)
ROW = "Tucker [8,128,128]"  # the one that broke down
FOR_ANY = (
    RECIPES[-1],
    dataclasses.replace(SLOWER_ATTENTION, name=f"{SLOWER_ATTENTION.name}{LONGER}", warmup=4),
)
CASES = [
    *((ROW, recipe) for recipe in (Recipe(), *RECIPES)),
    *(("MHA", recipe) for recipe in (Recipe(), *FOR_ANY)),
    *((label, FOR_ANY[-1]) for label in ("GQA n_KV=4", "MLA shared d_c=128")),  # the sweep has them without
]
WIDE = "Tucker [12,256,256]"  # as large as MHA: at the full budget its logits run away even at the lower rate that it has there
CURED = {  # the full budget has the longer warm-up for every row
    "normalised latents": (ROW, WIDE),
    "cores at a quarter of the rate": (ROW, WIDE),
    SLOWER_FACTORS.name: labels_of(TABLE2, "Tucker"),
}
CURES = [(row, recipe) for recipe in RECIPES for row in CURED.get(recipe.name, ())] + [("MHA", SLOWER_ATTENTION)]

TAKES = LANGUAGE
PRESETS = {
    "smoke": dataclasses.replace(
        TABLE2_PRESETS["smoke"],
        train=dataclasses.replace(TABLE2_PRESETS["smoke"].train, steps=20, warmup_steps=4),
        keep_models=False,
    ),
    # The learning-rate sweep's budget; the sweep itself has the cases without a change.
    "gpu-sweep": dataclasses.replace(
        TABLE2_PRESETS["gpu-sweep"], train=dataclasses.replace(TABLE2_PRESETS["gpu-sweep"].train, learning_rate=4.8e-3)
    ),
    # What did good in the sweep, at Table 2's full budget: each at the rate that was best there with the change, or, where it was not
    # swept, at the one that was too high for the row as it is.  Table 2 has the runs without it.
    "gpu": dataclasses.replace(
        TABLE2_PRESETS["gpu"],
        seeds=(0,),
        keep_models=False,
        learning_rates=SWEPT_RATES | {method_of(row, recipe): 4.8e-3 for row, recipe in CURES if recipe.name in SLOWER},
    ),
}


def run(options: Options) -> None:
    """Train every case of the preset at every seed, one record each.

    Args:
        options: `rows` are names of recipes, all if empty.

    Raises:
        ValueError: for a name that no recipe of the preset has.
    """
    preset, rows = PRESETS[options.preset], {row.label: row for row in ON_GPU_ROWS}
    cases = [(rows[label], recipe) for label, recipe in (CURES if options.preset == "gpu" else CASES)]
    check_labels("recipe", options.rows, dict.fromkeys(recipe.name for _, recipe in cases))
    chosen = [(row, recipe) for row, recipe in cases if not options.rows or recipe.name in options.rows]
    train_rows("ablations", chosen, {"model": "gpt2", **PAPER_SHAPE}, preset, options)
