"""What trains: everything, chosen modules or experts, or low-rank adapters.

Adapters are PEFT's own, in its format. Only on the routed experts they are computed in another way:
PEFT adds B A to the whole stack in every forward pass. Here each token goes through the A and B of
its experts, which costs the rank instead of the width, and allows dropout.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError, as_user_error
from ..model.layout import EXPERT_STACKS, first_few
from .adapter_config import ADAPTER_FILE, find_changes, read_adapter_config, refuse_other_tensors
from .arguments import ALL_LINEARS, ModelArguments, split_commas
from .chosen_experts import train_chosen_experts
from .expert_lora import keep_experts, register_expert_lora

EXPERT_PARAMETERS = ("experts.gate_up_proj", "experts.down_proj")


def targets(names: Sequence[str], chosen: Collection[int] = ()) -> tuple[list[str], list[str]]:
    """The linears, and the stacked tensors of routed experts, that `--trainable` names.

    `gate_proj`, `up_proj` and `down_proj` mean those of dense layers, shared experts and routed
    experts. A longer name (`shared_experts.down_proj`) means those that end in it. If experts of
    the layers `chosen` were chosen, the stacks are those of these layers, and no name means others.

    Raises:
        UserError: only one of `gate_proj` and `up_proj` is named, or routed experts are named
            beside chosen ones.
    """
    stacks = ("gate_up_proj", *EXPERT_PARAMETERS)
    parameters = {name for name in names if any(_ends(name, stack) for stack in stacks)}
    modules = [name for name in names if name not in parameters]
    if chosen:
        named = [name for name in names if name in parameters or "experts" in name.split(".")]
        if named:
            raise _routed_experts_are_chosen(named[0])
        stacks = [f"layers.{layer}.mlp.{name}" for layer in chosen for name in EXPERT_PARAMETERS]
        return modules, sorted(stacks)
    halves = {"gate_proj", "up_proj"} & set(modules)
    if len(halves) == 1:
        raise UserError(
            "--trainable names one of gate_proj and up_proj, which the routed experts hold in one "
            "tensor; name both, or for the others only: shared_experts.gate_proj"
        )
    if halves:
        parameters.add(EXPERT_PARAMETERS[0])
    if "down_proj" in modules:
        parameters.add(EXPERT_PARAMETERS[1])
    return modules, sorted(parameters)


def _routed_experts_are_chosen(name: str) -> UserError:
    return UserError(
        f"--trainable {name} means routed experts, and --train_experts chooses some; leave it out"
    )


def add_lora(
    model: PreTrainedModel,
    trainable: Sequence[str],
    rank: int,
    alpha: float,
    dropout: float,
    modules_to_save: Sequence[str] = (),
    chosen: Mapping[int, Sequence[int]] | None = None,
) -> PeftModel:
    """`model` with new adapters. Only these train, and whole copies of `modules_to_save`. If routed
    experts were `chosen`, by layer, these have adapters beside the linears that are `trainable`.

    Raises:
        UserError: no module has one of the names, or a value is out of range.
    """
    if not 0 <= dropout < 1:
        raise UserError(f"lora_dropout is {dropout}; it must be from 0 to below 1")
    modules, parameters = targets(trainable, chosen or ())
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
    register_expert_lora(config)
    with as_user_error("these adapters cannot be added", "change --trainable or --modules_to_save"):
        adapted = get_peft_model(model, config)
    for name, _ in adapted.named_parameters():
        if ".modules_to_save." in name and ".lora_" in name:  # No merge could handle both.
            raise UserError(
                f"--modules_to_save {','.join(modules_to_save)} has in it what --trainable adapts "
                f"({name}); leave it out of one of them"
            )
    if chosen:
        keep_experts(adapted, chosen)
    # It goes into the saved file, where plain PEFT would refuse dropout on experts.
    config.lora_dropout = 0.0
    return adapted


def continue_adapter(
    model: PreTrainedModel,
    folder: Path,
    dropout: float,
    chosen: Mapping[int, Sequence[int]] | None = None,
) -> PeftModel:
    """`model` with the adapter in `folder`, which trains on, as that of the `chosen` experts if it
    was one.

    Raises:
        UserError: it is no LoRA adapter of this model.
    """
    config = read_adapter_config(folder)
    _refuse_dropout(config, dropout, folder)
    config.lora_dropout, config.inference_mode = dropout, False
    register_expert_lora(config)
    with as_user_error(f"{folder} does not fit this base", "give the base it was trained on"):
        adapted = get_peft_model(model, config)
        if model.device.type == "meta":  # comes first, so that the config claims no more than fits
            refuse_other_tensors(adapted, folder)
        if chosen:
            keep_experts(adapted, chosen)
        if model.device.type == "meta":
            find_changes(adapted, folder)  # refuses what no merge could handle afterwards
        else:
            found = set_peft_model_state_dict(adapted, load_file(folder / ADAPTER_FILE))
            lost = [n for n in found.missing_keys if ".lora_" in n or ".modules_to_save." in n]
            if wrong := [*found.unexpected_keys, *lost]:
                raise ValueError(f"{first_few(wrong)} is missing or surplus")
    config.lora_dropout = 0.0  # as in `add_lora`
    return adapted


def _refuse_dropout(config: LoraConfig, dropout: float, folder: Path) -> None:
    """PEFT has none for parameters, and `expert_lora` has it for those of routed experts only."""
    for name in config.target_parameters or ():
        if dropout and name.rpartition(".")[2] not in EXPERT_STACKS:
            raise UserError(
                f"{folder} adapts {name}, for which PEFT has no dropout; add --lora_dropout 0"
            )


def freeze_all_but(
    model: PreTrainedModel, names: Sequence[str], chosen: Collection[int] = ()
) -> None:
    """Lets only those parameters train that `names` name, or that are in a module so named.

    `gate_proj`, `up_proj` and `down_proj` have the meaning that `targets` gives them. If experts of
    the layers `chosen` were chosen, which get weights of their own, all stacks are frozen.

    Raises:
        UserError: nothing has one of the names, or what is named has no parameters; or `names` mean
            routed experts beside chosen ones.
    """
    modules, parameters = targets(names, chosen)
    _refuse_unknown(model, [*modules, *parameters])
    for name, parameter in model.named_parameters():
        path = f".{name.removesuffix('.weight')}."
        if chosen and ".experts." in name:
            parameter.requires_grad_(False)
            around = path.rpartition("experts.")[0]
            if named := next((one for one in modules if f".{one}." in around), None):
                raise _routed_experts_are_chosen(named)
            continue
        parameter.requires_grad_(any(f".{one}." in path for one in [*modules, *parameters]))
    if not chosen and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"--trainable {','.join(names)} has no parameters; name what has")


def saved_whole(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The full names of the modules that `--modules_to_save` means to PEFT: those that end in one
    of its `names`.

    Raises:
        UserError: a name means no module with weights, or one module is inside of another.
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
    parameters = [name for name, _ in model.named_parameters()]
    known = [name for name, _ in model.named_modules()] + parameters
    for name in names:
        if not any(_ends(one, name) for one in known):
            last = {one.removesuffix(".weight").rpartition(".")[2] for one in parameters}
            raise UserError(f"this model has no module {name!r}; it has {', '.join(sorted(last))}")


def _refuse_other_than_linear(model: nn.Module, names: Sequence[str]) -> None:
    """PEFT would adapt an embedding, which no export can merge, and fail on other modules."""
    for one, module in model.named_modules():
        for name in names:
            if _ends(one, name) and not isinstance(module, nn.Linear):
                raise UserError(
                    f"{name} is no linear layer, which adapters need; name linear layers, or train "
                    "it whole: --modules_to_save"
                )


def adapt(model: PreTrainedModel, options: ModelArguments) -> PreTrainedModel | PeftModel:
    """`model`, in which only that trains which `options` name."""
    if options.adapter:
        folder = Path(options.adapter)
        return continue_adapter(model, folder, options.lora_dropout, options.chosen_experts)
    if options.use_lora:
        return add_lora(
            model,
            split_commas(options.trainable or ("" if options.chosen_experts else ALL_LINEARS)),
            options.lora_rank,
            options.lora_alpha,
            options.lora_dropout,
            split_commas(options.modules_to_save),
            options.chosen_experts,
        )
    chosen = options.chosen_experts or {}
    if options.trainable or chosen:
        freeze_all_but(model, split_commas(options.trainable), chosen)
        train_chosen_experts(model, chosen)
    return model
