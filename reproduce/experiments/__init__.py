"""One module per table, figure or measurement, with its `PRESETS`, the arguments that it takes (`TAKES`), and `run(options)`.

`sizes` is what the tables share; the rows of Tables 2 and 3 are in `models/rows`.
"""
