"""Every field of a DeepSeekMoE config.json, and a refusal of what the code does not implement."""

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from importlib.util import find_spec
from types import NoneType
from typing import Any, get_args

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

# Newer transformers dispatch tokens to the ranks; 5.17 masked the picks of other ranks and summed.
if find_spec("transformers.distributed.expert_parallel"):
    _EXPERT_PARALLEL_PLAN = {"layers.*.mlp.experts": "ep_dispatch_experts"}
else:
    _EXPERT_PARALLEL_PLAN = {
        "layers.*.mlp.gate": "ep_router",
        "layers.*.mlp.experts": "moe_tp_experts",
    }

DTYPES = (None, torch.float64, torch.float32, torch.bfloat16, torch.float16)
LIMIT = 2**40  # of numbers in a config
MOST_LABELS = 2**20  # transformers makes a name for each of them
ROPE_TYPES = ("default", "linear", "dynamic")

# Fields of other models: the values at which they change nothing, and what this model has instead.
# To ignore another value would be to compute another model.
FOREIGN_FIELDS = {
    **dict.fromkeys(
        ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
        ((None, 0), "no latent attention (MLA), as DeepSeek-V2 and V3 have it"),
    ),
    "topk_method": ((None, "greedy", "group_limited_greedy"), "the choice of the largest scores"),
    "n_group": ((None, 1), "experts in one group"),
    "topk_group": ((None, 1), "experts in one group"),
    "routed_scaling_factor": ((None, 1), "weights of experts that are not scaled"),
    "use_mla": ((None, False), "no latent attention (MLA), as DeepSeek-V2 and V3 have it"),
    **dict.fromkeys(
        ("text_config", "decoder", "generator", "text_encoder"),
        ((None,), "one config for the whole model"),
    ),
    "mlp_bias": ((None, False), "no biases in its MLPs"),
    "sliding_window": ((None,), "attention to the whole context"),
    **dict.fromkeys(
        ("use_qk_norm", "qk_norm", "qk_layernorm"),
        ((None, False), "queries and keys without a norm"),
    ),
    **dict.fromkeys(
        ("final_logit_softcapping", "attn_logit_softcapping", "clip_qkv"),
        ((None,), "logits and projections without a cap"),
    ),
    **dict.fromkeys(
        ("embedding_multiplier", "residual_multiplier", "logits_scaling"),
        ((None, 1), "embeddings, layers and logits that are not scaled"),
    ),
}


def null_means_default(cls: type) -> type:
    """Lets a config take None for a field that must have a value, as files do.

    It wraps the constructor, through which all ways to make a config go.
    """
    initialize = cls.__init__
    needed = {f.name for f in fields(cls) if NoneType not in get_args(f.type)} | {"rope_theta"}

    @wraps(initialize)
    def __init__(self: Any, *args: Any, **given: Any) -> None:
        given = {n: value for n, value in given.items() if value is not None or n not in needed}
        for name in ("rope_parameters", "rope_scaling"):
            if isinstance(rope := given.get(name), dict):
                given[name] = {key: value for key, value in rope.items() if value is not None}
        initialize(self, *args, **given)

    cls.__init__ = __init__
    return cls


@null_means_default
@strict
class DeepseekConfig(PreTrainedConfig):
    """Configuration of DeepSeekMoE (Dai et al. 2024, arXiv 2401.06066), by default the 16B model's.

    Layer `i` is a mixture of experts when `n_routed_experts` is set, `i >= first_k_dense_replace`
    and `i % moe_layer_freq == 0`; else a dense SwiGLU of width `intermediate_size`. The
    `n_shared_experts` experts that see every token are stored as one MLP of width
    `n_shared_experts * moe_intermediate_size`.

    `norm_topk_prob` divides the weights of a token's `num_experts_per_tok` experts by their sum.
    `aux_loss_alpha` scales the balance loss, counted per sequence (`seq_aux`) or over all tokens.
    `rope_scaling` is null or `{"type": "linear" | "dynamic", "factor": f}`. `pretraining_tp` split
    products on the training cluster; the result is the same, so it has no effect here.

    None, or null in a file, means the default, and `head_dim` must be the size of a head.
    Fields of other models are ignored where they would change nothing.

    Raises:
        ValueError: a field has a value that the model does not implement; the message names both.
    """

    model_type = "deepseek"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    auto_map = {}  # TRL asks for it; it is no field, so that files do not get it
    attribute_map = {"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"}

    warn_of_tokenizer = None
    """The package puts `warn_of_other_tokenizer` here (tokenization_deepseek.py); no field."""

    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        **_EXPERT_PARALLEL_PLAN,
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    n_shared_experts: int | None = 2
    n_routed_experts: int | None = 64
    num_experts_per_tok: int | None = 6
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    moe_router_dtype: str = "float32"
    aux_loss_alpha: float | int = 0.001
    seq_aux: bool = True
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float | int = 0.02
    rms_norm_eps: float | int = 1e-6
    use_cache: bool = True
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    pad_token_id: int | None = None
    pretraining_tp: int = 1
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0

    def __post_init__(self, head_dim: int | None = None, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        # Other engines look for pad_token_id; this family pads with the end-of-sentence token.
        if self.pad_token_id is None and isinstance(self.eos_token_id, int):
            self.pad_token_id = self.eos_token_id
        labels = kwargs.get("num_labels")
        if labels is not None and (type(labels) is not int or not 0 <= labels <= MOST_LABELS):
            raise ValueError(
                f"config field num_labels is {labels!r}, but this model implements numbers up to "
                f"{MOST_LABELS}"
            )
        super().__post_init__(**kwargs)
        self._refuse_what_is_not_implemented(head_dim)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' own, but warns if AutoTokenizer would take a class without BOS.

        AutoTokenizer calls this through AutoConfig, which passes `name_or_path`. AutoModel sets
        `return_unused_kwargs`, and needs no warning. How the model is computed is not for a file to
        say: it could name code of the hub.
        """
        for_tokenizer = "name_or_path" in kwargs and not kwargs.get("return_unused_kwargs")
        if for_tokenizer and cls.warn_of_tokenizer:
            cls.warn_of_tokenizer(str(kwargs["name_or_path"]))
        kept = {n: value for n, value in config_dict.items() if not cls._is_of_code(n)}
        return super().from_dict(kept, **kwargs)

    @classmethod
    def _is_of_code(cls, name: str) -> bool:
        """Whether a field of a file would replace a method, or say how the model is computed."""
        code = name.lstrip("_").startswith(("attn_implementation", "experts_implementation"))
        return code or name.startswith(("__", "base_model_")) or callable(getattr(cls, name, None))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` routes its tokens (else it is a dense MLP)."""
        return (
            bool(self.n_routed_experts)
            and layer_idx >= self.first_k_dense_replace
            and layer_idx % self.moe_layer_freq == 0
        )

    @property
    def moe_layers(self) -> list[int]:
        """The numbers of the layers that route their tokens."""
        return [i for i in range(self.num_hidden_layers) if self.is_moe_layer(i)]

    def to_dict(self) -> dict[str, Any]:
        """As transformers' own, but with `rope_theta` and `rope_scaling` as in the official files.

        vLLM, SGLang, llama.cpp and mlx-lm read these, not transformers 5's `rope_parameters`.
        """
        fields = super().to_dict()
        rope = dict(fields.pop("rope_parameters", None) or {})
        fields["rope_theta"] = rope.pop("rope_theta", 10000)
        kind = rope.pop("rope_type", "default")
        rope["type"] = kind
        fields["rope_scaling"] = None if kind == "default" else rope
        return fields

    def _refuse_what_is_not_implemented(self, head_dim: int | None) -> None:
        def need(field: str, implemented: bool, wanted: str, value: object = None) -> None:
            if not implemented:
                found = getattr(self, field) if value is None else value
                raise ValueError(
                    f"config field {field} is {found!r}, but this model implements {wanted}"
                )

        for field, (harmless, wanted) in FOREIGN_FIELDS.items():
            need(field, getattr(self, field, None) in harmless, wanted)
        if (stored := getattr(self, "quantization_config", None)) is not None:
            method = stored.get("quant_method") if isinstance(stored, dict) else None
            raise ValueError(
                f"config field quantization_config says that the weights are stored as {method}, "
                "but this model reads bf16, fp16 and fp32; get the checkpoint that was not "
                "quantised (int8 and int4 are made of it while it loads)"
            )
        heads, experts = self.num_attention_heads, self.n_routed_experts
        rope = self.rope_parameters or {}
        rope_type = rope.get("rope_type", "default")
        rotated = rope.get("partial_rotary_factor", 1)
        rope_types = f"{', '.join(ROPE_TYPES)} only"
        self._refuse_numbers(rope, need)
        need("scoring_func", self.scoring_func == "softmax", "'softmax' only")
        need("moe_router_dtype", self.moe_router_dtype == "float32", "'float32' only")
        need("rope_scaling type", rope_type in ROPE_TYPES, rope_types, rope_type)
        need("partial_rotary_factor", rotated == 1, "the rotation of whole heads", rotated)
        need("hidden_act", self.hidden_act in ACT2FN, "the activations of transformers only")
        need("hidden_size", self.hidden_size % heads == 0, f"multiples of {heads} heads")
        equal = head_dim in (None, self.head_dim)
        need("head_dim", equal, f"hidden_size / num_attention_heads ({self.head_dim})", head_dim)
        need("head_dim", self.head_dim % 2 == 0, "even sizes, whose halves rotate", self.head_dim)
        divides = heads % self.num_key_value_heads == 0
        need("num_key_value_heads", divides, f"divisors of num_attention_heads ({heads})")
        if experts:
            enough = 1 <= (self.num_experts_per_tok or 0) <= experts
            need("num_experts_per_tok", enough, f"1 to n_routed_experts ({experts})")

    def _refuse_numbers(self, rope: dict[str, Any], need: Callable[..., None]) -> None:
        """Refuses numbers that no computation can be done with. The types are right already."""
        experts = self.n_routed_experts  # num_experts, its other name, may be of any type
        need("n_routed_experts", experts is None or type(experts) is int, "whole numbers")
        counts = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
        counts += ["num_attention_heads", "num_key_value_heads", "max_position_embeddings"]
        counts += ["moe_intermediate_size", "moe_layer_freq"] if experts else []
        for field in counts:
            need(field, 1 <= getattr(self, field) < LIMIT, f"1 to below {LIMIT}")
        for field in ("output_hidden_states", "output_attentions", "return_dict"):
            need(field, isinstance(getattr(self, field, None), bool | NoneType), "true or false")
        for field in ("n_shared_experts", "initializer_range", "rms_norm_eps", "aux_loss_alpha"):
            need(field, 0 <= (getattr(self, field) or 0) < LIMIT, f"0 to below {LIMIT}")
        need("dtype", self.dtype in DTYPES, "bf16, fp16, fp32 and fp64", str(self.dtype))
        need("attention_dropout", 0 <= self.attention_dropout <= 1, "0 to 1")
        for field in ("rope_theta", "factor"):
            value = rope.get(field, 1)
            number = isinstance(value, (int, float)) and 0 < value < LIMIT
            need(field, number, f"numbers above 0 and below {LIMIT}", value)


__all__ = ["DeepseekConfig"]
