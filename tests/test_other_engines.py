"""What vLLM 0.26, SGLang 0.5 and llama.cpp read of an exported folder is in it.

None of them runs here. Their rules for the names of this architecture's tensors, and the shapes of
their parameters, stand below as tables.
"""

import json
import math
import re
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest
from adapter_fixtures import tensors_in
from text_fixtures import OFFICIAL, needs_official
from transformers import PreTrainedTokenizerFast

from deepseek_moe import DeepseekConfig, export
from deepseek_moe.checkpoint import own_tokenizer
from deepseek_moe.model.layout import official_tensors

# Of both engines: the names in a checkpoint, and the parameter and the part of it that they fill.
# The first rule that matches counts. A rule is a part of the loop in `load_weights` of vLLM's
# deepseek_v2.py (with fused_moe/routed_experts.py) and of SGLang's deepseek.py.
SHARED_RULES = [
    (r"self_attn\.(q|k|v)_proj", r"self_attn.qkv_proj", r"\1"),
    (r"mlp\.(shared_experts\.)?(gate|up)_proj", r"mlp.\1gate_up_proj", r"\2"),
    (r"(self_attn\.o_proj|mlp\.(shared_experts\.)?down_proj)", r"\1", ""),
    (r"(mlp\.gate|input_layernorm|post_attention_layernorm)", r"\1", ""),
]
TABLES = {
    "vLLM 0.26": [
        (
            r"mlp\.experts\.(\d+)\.(gate|up)_proj\.weight",
            r"mlp.experts.routed_experts.w13_weight",
            r"\1 \2",
        ),
        (r"mlp\.experts\.(\d+)\.down_proj\.weight", r"mlp.experts.routed_experts.w2_weight", r"\1"),
        *SHARED_RULES,
    ],
    "SGLang 0.5": [
        (r"mlp\.experts\.(\d+)\.(gate|up)_proj", r"mlp.experts.\1.gate_up_proj", r"\2"),
        (r"(mlp\.experts\.\d+\.down_proj)", r"\1", ""),
        *SHARED_RULES,
    ],
}
CONFIGS = {
    "official": {},
    "GQA": {"num_key_value_heads": 4, "num_hidden_layers": 3},
    "no dense layer, nothing shared": {
        "first_k_dense_replace": 0,
        "n_shared_experts": None,
        "num_hidden_layers": 2,
    },
}


def parameters_of(engine: str, config: DeepseekConfig) -> dict[str, int]:
    """The numbers in each parameter that the engine makes for `config`, on one GPU."""
    D, E, F = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    d = D // config.num_attention_heads
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    sizes = {
        "model.embed_tokens.weight": config.vocab_size * D,
        "model.norm.weight": D,
        "lm_head.weight": config.vocab_size * D,
    }
    for layer in range(config.num_hidden_layers):
        names = {"self_attn.qkv_proj": heads * d * D, "self_attn.o_proj": D * D}
        names |= {"input_layernorm": D, "post_attention_layernorm": D}
        mlps = {"mlp": config.intermediate_size}
        if config.is_moe_layer(layer):
            shared = (config.n_shared_experts or 0) * F
            mlps = {"mlp.shared_experts": shared} if shared else {}
            names["mlp.gate"] = E * D
            if engine.startswith("SGLang"):
                mlps |= {f"mlp.experts.{e}": F for e in range(E)}
            else:
                stacks = "mlp.experts.routed_experts"
                names |= {f"{stacks}.w13": E * 2 * F * D, f"{stacks}.w2": E * F * D}
        for mlp, width in mlps.items():
            names |= {f"{mlp}.gate_up_proj": 2 * width * D, f"{mlp}.down_proj": width * D}
        for name, size in names.items():
            joint = "_" if name.endswith(("w13", "w2")) else "."
            sizes[f"model.layers.{layer}.{name}{joint}weight"] = size
    return sizes


def place_of(name: str, rules: list[tuple[str, str, str]]) -> tuple[str, str]:
    """The parameter that a tensor goes to, and which part of it."""
    for pattern, parameter, part in rules:
        if found := re.search(pattern, name):
            start, end = name[: found.start()], name[found.end() :]
            return start + found.expand(parameter) + end, found.expand(part)
    return name, ""


@pytest.mark.parametrize("engine", TABLES)
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_each_tensor_has_a_place_and_each_parameter_is_filled(fields, engine):
    config = DeepseekConfig(**fields)
    tensors = dict(official_tensors(config))
    assert fields or len(tensors) == 5466
    places = {name: place_of(name, TABLES[engine]) for name in tensors}
    assert len(set(places.values())) == len(tensors)  # no two to the same part
    filled: Counter[str] = Counter()
    for name, shape in tensors.items():
        filled[places[name][0]] += math.prod(shape)
    assert filled == parameters_of(engine, config)


def test_an_export_has_these_names_and_the_fields_that_the_engines_read(
    base: Path, tmp_path, run_module
):
    run_module(export, "--model", base, "--output", tmp_path / "new")
    config = DeepseekConfig.from_pretrained(base)
    names = dict(official_tensors(config))
    assert {n: tuple(x.shape) for n, x in tensors_in(tmp_path / "new").items()} == names
    fields = json.loads((tmp_path / "new" / "config.json").read_text())
    wanted = {"architectures": ["DeepseekForCausalLM"], "model_type": "deepseek"}
    wanted |= {"pad_token_id": config.eos_token_id, "rope_theta": 10000, "rope_scaling": None}
    wanted |= {"moe_router_dtype": "float32", "norm_topk_prob": False, "moe_layer_freq": 1}
    assert fields | wanted == fields
    assert "rope_parameters" not in fields
    assert fields["hidden_act"] == "silu" and fields["scoring_func"] == "softmax"


# llama.cpp's convert_hf_to_gguf.py knows a pre-tokenizer by the ids that it makes of this text.
CHECKED_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis "
    "concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure "
    "I'll make it, 'D you like some tea? We'Ve a'lL"
)
DEEPSEEK_LLM = "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754"


@needs_official
def test_llama_cpp_knows_the_official_tokenizer_after_a_save(tmp_path):
    own_tokenizer(OFFICIAL).save_pretrained(tmp_path)
    ids = PreTrainedTokenizerFast.from_pretrained(tmp_path).encode(CHECKED_TEXT)
    assert sha256(str(ids).encode()).hexdigest() == DEEPSEEK_LLM
