"""Triton kernels of the decode engine and of training, and their plain twins (plain.py) in torch.

Stages of a layer, in the order in which a token meets them, for a step of few tokens:

    qkv         norm, projections, rotary embedding, write to the cache
    attention   over the cache
    linear      output projection and residual (dense layers' down product, the head)
    gate        norm, router, choice; the shared experts' gate and up products beside it
    experts     gate and up of the chosen; down, weighted sum, shared experts, residual

A step of many tokens leaves the products to the library (grouped.py) and fuses what stands between
them (between.py, sort.py); so does training (training.py, for fused_experts.py).
"""
