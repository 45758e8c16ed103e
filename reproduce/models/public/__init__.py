"""Models that others trained, as transformers and timm hold them, with every attention layer as one of `tucker_ref`.

    layers       projections, norms and rotary embedding of an attention module as a layer of `tucker_ref`
    family       what tells one family of models from another; gpt2, llama, phi3, gpt_neox, opt, bert, deepseek, vit: one each
    families     all of them, and what is refused
    checkpoint   a folder or hub name: its configuration, its weights or an error that names what is missing, who it is
    inputs       the text or the images that a model takes, as it was trained on them
    adapter      a layer where the model calls its own attention, and a cache that transformers generates with
    opened       a model with its layers; transformers_models, timm_models: how it comes from either library
    agreement    the rule of every opening: with its own layers in their places a model computes what it computed before

Read `llama`, `layers`, `adapter`, `agreement`, in this order.
"""
