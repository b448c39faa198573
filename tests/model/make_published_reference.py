"""Writes the fixture of test_published.py: what the published DeepSeek-MoE code computes.

    python tests/model/make_published_reference.py FOLDER

FOLDER holds modeling_deepseek.py and configuration_deepseek.py of deepseek-moe-16b-base. They are
under another licence and not included here. They want transformers 4.36 to 4.40; the fixture next
to this script was made with 4.40.2, torch 2.13, on a CPU. It holds numbers only: for each small
random model (fp32, eager attention) its weights, what it computes from a few sentences, and its
gradients.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

# fmt: off
BASE = {
    "model_type": "deepseek", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3,
    "intermediate_size": 32, "moe_intermediate_size": 8, "n_shared_experts": 2,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    # The balance loss is weighted a hundred times the official 0.001, to show in the gradients.
    "aux_loss_alpha": 0.1, "seq_aux": True,
}
# One layer is enough to see the rotary embedding; the sentences are longer than 8.
ROPE = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "max_position_embeddings": 8}
CASES = {
    "base": {},
    "grouped_heads": {
        "num_key_value_heads": 2, "attention_bias": True, "norm_topk_prob": True, "seq_aux": False,
    },
    "no_shared": {
        "n_shared_experts": None, "aux_loss_alpha": 0.0, "first_k_dense_replace": 0,
        "moe_layer_freq": 2,
    },
    "linear_rope": {**ROPE, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic_rope": {**ROPE, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
}
# fmt: on
LENGTHS = torch.tensor([11, 7, 4])  # of the sentences, once padded on the left to the longest


def run(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Fills `model` with random numbers; returns them, the inputs and all that it computes."""
    config, width = model.config, int(LENGTHS.max())
    with torch.no_grad():
        for name, weight in model.named_parameters():  # wide: the router has clear favourites
            weight.normal_("norm" in name, 0.1 if "norm" in name else 1 if "embed" in name else 0.3)
    ids = torch.randint(2, config.vocab_size, (len(LENGTHS), width))
    mask = (torch.arange(width) >= width - LENGTHS[:, None]).long()
    padded_ids = ids.masked_fill(mask == 0, config.eos_token_id)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)  # as the published generate()
    out = {"input_ids": ids, "padded_ids": padded_ids, "mask": mask, "positions": positions}
    out |= {f"weight/{name}": weight for name, weight in model.state_dict().items()}

    for module in model.train().modules():
        if getattr(module, "alpha", None) == 0:
            module.alpha = 1e-30  # the published code cannot train with 0; fp32 loses this one
    out["loss"] = model(ids, labels=ids).loss
    out["loss"].backward()
    out |= {f"grad/{name}": weight.grad for name, weight in model.named_parameters()}

    with torch.no_grad():
        out["logits"] = model.eval()(ids).logits
        out["padded_logits"] = model(padded_ids, attention_mask=mask, position_ids=positions).logits
    # An end of sentence would cut the comparison short, hence the minimum.
    limits = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": config.eos_token_id}
    greedy = model.generate(padded_ids, attention_mask=mask, do_sample=False, **limits)
    return {name: x.detach().contiguous() for name, x in (out | {"greedy": greedy}).items()}


if __name__ == "__main__":
    [code] = sys.argv[1:]
    Published = get_class_from_dynamic_module("modeling_deepseek.DeepseekForCausalLM", code)
    tensors = {}
    for seed, (case, changes) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        config = Published.config_class(**(BASE | changes), attn_implementation="eager")
        tensors |= {f"{case}/{name}": value for name, value in run(Published(config)).items()}
    configs = {case: json.dumps(BASE | new) for case, new in CASES.items()}
    save_file(tensors, Path(__file__).with_name("published_reference.safetensors"), configs)
