"""The checks of the exercises: one module per notebook, e00 to e10. They say what is wrong, not only that it is."""
