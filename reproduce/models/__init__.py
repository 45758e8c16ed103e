"""The models that the attention layers sit in, and the rows of the paper's tables (`rows`), which say which attention each has."""
