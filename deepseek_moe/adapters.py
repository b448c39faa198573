"""What trains: everything, chosen modules, or low-rank adapters on linears and routed experts.

Adapters are PEFT's own, in its own format. Only the way they are computed on the routed experts is
ours: PEFT adds B A to the whole stack of experts in every forward pass; here each token goes
through its experts' A and B, which costs the rank instead of the width and allows dropout.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from .acceleration import accelerate
from .arguments import ALL_LINEARS, FineTuningArguments, ModelArguments, names, zero_stage
from .checkpoint import one_line
from .configuration_deepseek import DeepseekConfig
from .errors import UserError
from .experts import NAME as EXPERTS
from .experts import LowRank, grouped_experts_forward
from .modeling_deepseek import DeepseekExperts, DeepseekForCausalLM
from .quantization import Quantization, full_shape

EXPERT_PARAMETERS = ("experts.gate_up_proj", "experts.down_proj")


class ExpertsLora(ParamWrapper):
    """PEFT's wrapper of one stacked expert tensor, computing x A B instead of W + B A.

    As in PEFT, lora_A [E*R, I] has the experts slowest and lora_B [O, R*E] has them fastest, and a
    module with two adapted tensors is wrapped twice.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any):
        self.dropout_p = config.lora_dropout
        config = LoraConfig(**(config.to_dict() | {"lora_dropout": 0.0}))  # PEFT's cannot
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        # PEFT looks at the tensor, which is packed in 4 bits; it swaps the two by itself.
        self.num_experts, out_features, in_features = full_shape(self.get_param())
        self._param_ndim = 3
        return out_features, in_features

    def low_rank(self) -> list[LowRank]:
        """The active adapters."""
        found = []
        for name in self.active_adapters:
            if name in self.lora_A:
                a, b = self.lora_A[name].weight, self.lora_B[name].weight
                a_ERI = a.view(self.num_experts, -1, a.shape[1])
                b_ERO = b.view(b.shape[0], -1, self.num_experts).permute(2, 1, 0)
                dropout = self.dropout_p if self.training else 0.0
                found.append(LowRank(a_ERI * self.scaling[name], b_ERO, dropout))
        return found

    def forward(self, hidden_TD: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(hidden_TD, *args, **kwargs)
        adapters, module = {}, self
        while isinstance(module, ExpertsLora):
            adapters[module.parameter_name] = module.low_rank()
            module = module.base_layer
        return grouped_experts_forward(module, hidden_TD, *args, adapters=adapters, **kwargs)


ExpertsLora.__name__ = "ParamWrapper"  # PEFT knows by this name which wrappers it may wrap again


def targets(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Linears and stacked expert tensors that `--trainable` names.

    `gate_proj` and `up_proj` are the same names in dense, shared and routed experts, and mean all
    of them; a longer name (`shared_experts.down_proj`) means the ones that end in it.
    """
    stacks = ("gate_up_proj", *EXPERT_PARAMETERS)
    parameters = [name for name in names if any(_ends(name, stack) for stack in stacks)]
    modules = [name for name in names if name not in parameters]
    if {"gate_proj", "up_proj"} <= set(modules):
        parameters.append(EXPERT_PARAMETERS[0])
    elif {"gate_proj", "up_proj"} & set(modules):
        raise UserError(
            "--trainable names one of gate_proj and up_proj, which the routed experts hold in one "
            "tensor; name both, or for the others only: shared_experts.gate_proj"
        )
    if "down_proj" in modules:
        parameters.append(EXPERT_PARAMETERS[1])
    return modules, sorted(set(parameters))


def add_lora(
    model: PreTrainedModel,
    trainable: Sequence[str],
    rank: int,
    alpha: float,
    dropout: float,
    modules_to_save: Sequence[str] = (),
) -> PeftModel:
    """`model` with new adapters, which alone train (and whole copies of `modules_to_save`).

    Raises:
        UserError: a name that no module has, or values that no adapter has.
    """
    if rank < 1:
        raise UserError(f"lora_rank is {rank}; it must be 1 or more")
    if not 0 <= dropout < 1:
        raise UserError(f"lora_dropout is {dropout}; it must be from 0 to below 1")
    modules, parameters = targets(trainable)
    _refuse_unknown(model, [*modules, *parameters, *modules_to_save])
    _refuse_other_than_linear(model, modules)
    saved_whole(model, modules_to_save)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        modules_to_save=list(modules_to_save) or None,
    )
    config._register_custom_module({DeepseekExperts: ExpertsLora})
    with one_line("these adapters cannot be added", "change --trainable or --modules_to_save"):
        adapted = get_peft_model(model, config)
    for name, _ in adapted.named_parameters():
        if ".modules_to_save." in name and ".lora_" in name:  # no merge could know both
            raise UserError(
                f"--modules_to_save {','.join(modules_to_save)} has in it what --trainable adapts "
                f"({name}); leave it out of one of them"
            )
    # In the saved file: plain PEFT refuses dropout on experts, and nobody drops out after training.
    config.lora_dropout = 0.0
    return adapted


def choose(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Lets only the parameters train that `names` name, or whose modules, at any depth.

    `gate_proj`, `up_proj` and `down_proj` mean what they mean to `targets`.
    """
    modules, parameters = targets(names)
    _refuse_unknown(model, [*modules, *parameters])
    for name, parameter in model.named_parameters():
        parts = name.removesuffix(".weight").split(".")
        within = [".".join(parts[: i + 1]) for i in range(len(parts))]
        parameter.requires_grad_(any(_ends(w, n) for w in within for n in [*modules, *parameters]))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"--trainable {','.join(names)} has no parameters; name what has")


def saved_whole(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The full names of the modules that PEFT takes `--modules_to_save` for: they end like it.

    Raises:
        UserError: there is none with weights, or one is inside of another.
    """
    found = [
        one
        for one, module in model.named_modules()
        if one.endswith(tuple(names)) and any(True for _ in module.parameters())
    ]
    for name in names:
        if not any(one.endswith(name) for one in found):
            raise UserError(
                f"--modules_to_save {name} is no module with weights; name one, such as experts, "
                "shared_experts, gate, embed_tokens or lm_head"
            )
    for one in found:
        if one.startswith(tuple(f"{other}." for other in found)):
            raise UserError(
                f"--modules_to_save {','.join(names)} means {one} twice; leave out what is inside "
                "of another"
            )
    return found


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _refuse_unknown(model: nn.Module, names: Sequence[str]) -> None:
    known = [name for name, _ in model.named_modules()]
    known += [name for name, _ in model.named_parameters()]
    for name in names:
        if not any(_ends(one, name) for one in known):
            weights = {one.removesuffix(".weight") for one, _ in model.named_parameters()}
            last = sorted({one.rsplit(".", 1)[-1] for one in weights})
            raise UserError(f"this model has no module {name!r}; it has {', '.join(last)}")


def _refuse_other_than_linear(model: nn.Module, names: Sequence[str]) -> None:
    """PEFT would adapt an embedding, which `export` cannot merge, and fails on all else."""
    for one, module in model.named_modules():
        for name in names:
            if _ends(one, name) and not isinstance(module, nn.Linear):
                raise UserError(
                    f"{name} is no linear layer, which adapters need; name linear layers, or train "
                    "it whole: --modules_to_save"
                )


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
    """(kind, parameters, of these trainable) of each kind there is, and "all"."""
    counts = {kind: [0, 0] for kind in [*KINDS, "all"]}
    for name, parameter in model.named_parameters():
        kind = next(k for k, marks in KINDS.items() if any(mark in name for mark in marks))
        size = full_shape(parameter).numel()
        for key in (kind, "all"):
            counts[key][0] += size
            counts[key][1] += size * parameter.requires_grad
    return [(kind, total, trains) for kind, (total, trains) in counts.items() if total]


def weights_passed(model: nn.Module) -> float:
    """The weights, adapters' too, that a token passes; the embedding multiplies nothing, unless it
    is the head too."""
    share = (model.config.num_experts_per_tok or 0) / (model.config.n_routed_experts or 1)
    unused = ["original_module"]  # frozen, beside the copy that trains
    if not model.config.tie_word_embeddings:
        unused.append("embed_tokens")
    return sum(
        full_shape(parameter).numel() * (share if ".experts." in name else 1.0)
        for name, parameter in model.named_parameters()
        if not any(part in name for part in unused)
    )


def build_model(
    folder: Path, options: ModelArguments, training: FineTuningArguments
) -> PreTrainedModel | PeftModel:
    """The model in `folder`, ready to train what `options` say, on this process's device.

    Weights that train are fp32 and computed with in bf16 if asked; bf16 where DeepSpeed keeps fp32
    copies of its own, or with --single_gpu_full. Frozen ones are bf16 where --bf16, or quantised.
    """
    keeps_fp32 = not (training.deepspeed or training.single_gpu_full)
    low = torch.bfloat16 if training.bf16 else torch.float32
    some_train = options.use_lora or options.trainable
    dtype = low if some_train or not keeps_fp32 else torch.float32
    wanted: dict[str, Any] = {}
    quantization = None
    if options.bits != 16:
        dtype_name = str(dtype).removeprefix("torch.")
        quantization = Quantization(
            options.bits, options.quant_type, options.double_quant, dtype_name
        )
        wanted["quantization_config"] = quantization.config(_left_alone(folder, options))
    if zero_stage(training) != 3:  # which places the weights by itself
        wanted["device_map"] = {"": training.device}
    with one_line(f"{folder} cannot be loaded", "get the checkpoint anew"):
        model = DeepseekForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=options.attention(dtype),
            experts_implementation=EXPERTS,
            use_safetensors=True,
            **wanted,
        )
    model.config.use_cache = False
    model = adapt(model, options)
    if keeps_fp32:  # PEFT casts adapters, but not `modules_to_save`
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    model.base_quantization = quantization
    for module in model.modules():
        if isinstance(module, DeepseekExperts):
            module.recompute = options.recompute_experts
    if zero_stage(training) == 3:
        # DeepSpeed 0.19 lets weights go too soon where nothing before a mixture has a gradient.
        model.enable_input_require_grads()
    if training.device.type == "cuda":
        accelerate(model)
    return model


def _left_alone(folder: Path, options: ModelArguments) -> list[str]:
    """The full names of the modules with weights that `--modules_to_save` means or that are in one
    of those: a whole layer's name would be the beginning of others'."""
    if not options.modules_to_save:
        return []
    with torch.device("meta"):
        model = DeepseekForCausalLM(DeepseekConfig.from_pretrained(folder))
    saved = saved_whole(model, names(options.modules_to_save))
    inside = tuple(f"{one}." for one in saved)
    return [
        one
        for one, module in model.named_modules()
        if f"{one}.".startswith(inside) and any(True for _ in module.parameters(recurse=False))
    ]


def adapt(model: PreTrainedModel, options: ModelArguments) -> PreTrainedModel | PeftModel:
    """`model` with what `options` let train."""
    if options.use_lora:
        return add_lora(
            model,
            names(options.trainable or ALL_LINEARS),
            options.lora_rank,
            options.lora_alpha,
            options.lora_dropout,
            names(options.modules_to_save),
        )
    if options.trainable:
        choose(model, names(options.trainable))
    return model
