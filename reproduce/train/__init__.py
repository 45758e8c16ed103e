"""The training loop and what belongs to it: options, recipes, workers, runs, and models to start from."""
