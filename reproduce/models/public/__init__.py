"""Models that others trained, as transformers and timm hold them, with every attention layer as one of `tucker_ref`.

checkpoint   a folder or hub name: its configuration, its weights or an error that names what is missing, who it is
inputs       the text or the images that it takes, as it was trained on them
layers       projections, norms and rotary embedding of an attention module as a layer of `tucker_ref`
gpt2, llama, phi3, gpt_neox, opt, bert, deepseek, vit     one family each: where its attention is, and how it becomes a layer
families     all of them; what is known here, and what is refused
adapter      such a layer where the model calls its own attention, and a cache that transformers generates with
opened       a model with its layers
agreement    the rule of every opening: with its own layers in their places the model computes what it computed before
timm_models  timm's plain vision transformers
"""
