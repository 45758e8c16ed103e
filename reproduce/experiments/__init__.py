"""One module per table, figure or measurement; each has `run(options)`."""
