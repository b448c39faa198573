"""How many parameters a model has and trains, and how many a token is multiplied with."""

from torch import nn

from .chosen_experts import is_of_chosen
from .quantized_base import full_shape

KINDS = {
    "embedding and head": ("embed_tokens", "lm_head"),
    "attention": ("self_attn",),
    "routed experts": (".experts.",),
    "shared experts": ("shared_experts",),
    "router": ("mlp.gate.",),
    "dense layers": (".mlp.",),
    "norms": ("norm",),
}


def parameter_table(model: nn.Module) -> list[tuple[str, int, int]]:
    """(kind, parameters, trainable parameters) of each kind that the model has, and of "all"."""
    counts = {kind: [0, 0] for kind in [*KINDS, "all"]}
    for name, parameter in model.named_parameters():
        kind = next(k for k, marks in KINDS.items() if any(mark in name for mark in marks))
        size = full_shape(parameter).numel()
        for key in (kind, "all"):
            counts[key][0] += 0 if is_of_chosen(name) else size
            counts[key][1] += size * parameter.requires_grad
    return [(kind, total, trains) for kind, (total, trains) in counts.items() if total]


def weights_passed(model: nn.Module) -> float:
    """How many weights a token is multiplied with, those of adapters included. The embedding is one
    of them only where it is the head too."""
    share = (model.config.num_experts_per_tok or 0) / (model.config.n_routed_experts or 1)
    looked_up = not model.config.tie_word_embeddings
    return sum(
        full_shape(parameter).numel() * (share if ".experts." in name else 1.0)
        for name, parameter in model.named_parameters()
        if "original_module" not in name  # frozen, beside the copy that trains
        and not is_of_chosen(name)  # they stand for a part of the frozen stack
        and not (looked_up and "embed_tokens" in name)
    )
