"""The reproduction: `python -m reproduce EXPERIMENT --preset smoke`. Seven rooms, each using those before it and none after it:

    store/        what is kept: records of runs, model files, files written whole or not at all
    data/         text and images
    models/       GPT-2, Llama and ViT around any attention of tucker_ref; `rows` names the rows of the paper's tables; `public`: models
                  that others trained
    train/        `settings` with the learning rate of every step, `optimizers`, the `loop`, and what goes with them
    experiments/  one module per table, figure or measurement
    report/       tables, sentences and verdicts from records; `judge` and `ledger` hold the rules by which claims are judged
    trust/        what tests the tests and the code

Read `models/rows`, `train/settings`, `train/loop`, `train/language`, `experiments/table2`, in this order.
"""
