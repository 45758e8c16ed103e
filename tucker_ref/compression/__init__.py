"""Rung 12. Trained layers: which ranks they have, and the same layers with fewer (PyTorch).

rope_classes.py      which key channels may be mixed under a rotary embedding
factored_tensor.py   an attention tensor in orthonormal bases, and the Gram matrices of its unfoldings
moments.py           what is known of a layer's inputs
spectra.py           singular values of all six unfoldings, and effective ranks
leading.py           few eigenvectors of many, by block Lanczos with a proof
truncation.py        rung 2's `hosvd`, `sthosvd` and `hooi`, on Gram matrices
ranks.py             which ranks a tensor may have, and which an error or a budget allows
compress.py          a layer as a Tucker Attention of fewer ranks, and the error of that
convert.py           a layer as GQA or MLA
"""
