"""Rung 14. Triton kernels, checked against rung 4. Importing this needs triton; nothing else in tucker_ref does."""
