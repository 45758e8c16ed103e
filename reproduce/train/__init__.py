"""The training loop (`loop`) and what belongs to it.

settings       how long, how fast: the learning rate of every step
optimizers     AdamW, or Muon (`muon`) for the matrices and AdamW for the rest; `qk_clip`: a limit on every head's logits
recipes        other starts and cures, one change at a time
runs           a run's name, checkpoint and record; `options` and `arguments`: what the command line decides
language       GPT-2 and Llama rows; `vision`: vision transformers; `public_models`: models that others trained
distributed    several workers; `observe`: norms and logits on the way; `dry_run`: what a run would take
"""
