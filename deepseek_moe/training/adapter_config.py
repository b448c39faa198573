"""A LoRA adapter's config and what it changes: what can be trained on and merged, or an error."""

import hashlib
import re
from pathlib import Path

import peft
from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from safetensors import safe_open

from ..errors import UserError, as_user_error
from ..json_file import read_object
from ..model.layout import first_few

CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"

# The fields of PEFT's config that may differ from their defaults, because they change nothing but
# A, B and their scale. Any other (DoRA, biases, new variants) is refused.
MERGEABLE = {
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("task_type", "inference_mode", "runtime_config", "r", "lora_alpha", "lora_dropout"),
    *("use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "modules_to_save"),
    *("target_modules", "target_parameters", "exclude_modules"),
    *("layers_to_transform", "layers_pattern"),
}
NAMES = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save")
NAMES += ("layers_pattern", "rank_pattern", "alpha_pattern")
INITS = (True, False, "gaussian", "orthogonal")  # all others change the base, too


def read_adapter_config(folder: Path) -> peft.LoraConfig:
    """The config of the adapter in `folder`, without dropout.

    Raises:
        UserError: there is no adapter, or one of another kind.
    """
    file = folder / CONFIG_FILE
    for needed in (file, folder / ADAPTER_FILE):
        if not needed.is_file():
            inside = folder / "adapter"  # where a run with --merge_on_save puts it
            there = inside if (inside / ADAPTER_FILE).is_file() else "the folder of a PEFT adapter"
            raise UserError(f"{needed} does not exist; give {there}")
    _refuse_wrong_fields(file)
    with as_user_error(f"{file} cannot be used", "get the adapter anew"):
        config = peft.PeftConfig.from_pretrained(str(folder))
    if type(config) is not peft.LoraConfig:
        raise UserError(f"{folder} is a {config.peft_type} adapter; only LoRA can be merged")
    plain = peft.LoraConfig().to_dict()
    other = {k: v for k, v in config.to_dict().items() if k not in MERGEABLE and v != plain[k]}
    if config.init_lora_weights not in INITS:
        other["init_lora_weights"] = config.init_lora_weights
    if other:
        found = first_few([f"{name}={value!r}" for name, value in other.items()])
        raise UserError(f"{file} has {found}; only plain LoRA can be merged here: use PEFT's own")
    config.init_lora_weights = False
    config.lora_dropout = 0.0  # matters while training only, and PEFT refuses it on experts
    return config


def _refuse_wrong_fields(file: Path) -> None:
    """Refuses what PEFT would fail on, or would take for a regular expression, which may run for
    ever on a name."""
    fields = read_object(file, "get the adapter anew")
    for name in NAMES:
        value = fields.get(name) or ()
        for one in value if isinstance(value, (list, dict, tuple)) else [value]:
            if not (isinstance(one, str) and re.fullmatch(r"[\w.-]{1,200}", one)):
                raise UserError(
                    f"{file} has {str(one)[:80]!r} in {name}, which is no name; write the names of "
                    "modules one by one"
                )
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        value = fields.get(name)
        for one in value.values() if isinstance(value, dict) else [value]:
            if one is not None and not (type(one) in (int, float) and 0 < abs(one) < 2**31):
                raise UserError(f"{file} has {one!r} in {name}; give a number that is not 0")


def refuse_other_tensors(wrapped: peft.PeftModel, folder: Path) -> None:
    """Compares the headers of the adapter in `folder` with what `wrapped`, a base with adapters by
    its config, may be on meta, has of them.

    Raises:
        UserError: names the tensors that are missing, surplus or of another shape.
    """
    state = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    # PEFT also saves the frozen weight of a module that is both adapted and saved whole.
    frozen = ".base_layer.weight"
    wanted = {name: list(x.shape) for name, x in state.items() if not name.endswith(frozen)}
    with (
        as_user_error(f"{folder / ADAPTER_FILE} cannot be read", "get the adapter anew"),
        safe_open(folder / ADAPTER_FILE, framework="pt") as file,
    ):
        names = [name for name in file.keys() if not name.endswith(frozen)]  # noqa: SIM118
        shapes = {name: file.get_slice(name).get_shape() for name in names}
    wrong = [f"{name} is missing" for name in sorted(wanted.keys() - shapes.keys())]
    wrong += [f"{name} is surplus" for name in sorted(shapes.keys() - wanted.keys())]
    for name in sorted(shapes.keys() & wanted.keys()):
        if shapes[name] != wanted[name]:
            wrong.append(f"{name} is {shapes[name]} where {wanted[name]} is wanted")
    if wrong:
        raise UserError(
            f"{folder} does not fit this base: {first_few(wrong)}; give the base that the adapter "
            "was trained on"
        )


def find_changes(
    wrapped: peft.PeftModel, folder: Path
) -> tuple[dict[str, tuple[str, float]], dict[str, str]]:
    """By parameter: the name of its adapter's wrapper and the scale of B A; or, where it is
    replaced as a whole, the name of the new tensor.

    A module with two adapted stacks is wrapped twice: `experts.lora_A` belongs to the outer wrapper
    and `experts.base_layer.lora_A` to the inner one.

    Raises:
        UserError: the adapter, which is in `folder`, changes what cannot be merged.
    """
    low_rank, replaced = {}, {}
    for name, module in wrapped.named_modules():
        own = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if isinstance(module, ParamWrapper):
            low_rank[f"{own}.{module.parameter_name}"] = (name, module.scaling["default"])
        elif isinstance(module, Linear):
            low_rank[f"{own}.weight"] = (name, module.scaling["default"])
        elif isinstance(module, LoraLayer):
            raise UserError(f"{folder} has LoRA on {own}; only linears and experts can be merged")
        elif isinstance(module, ModulesToSaveWrapper):
            for part, _ in module.modules_to_save["default"].named_parameters():
                replaced[f"{own}.{part}"] = f"{name}.{part}"
    changed = low_rank.keys() | replaced.keys()
    ends = {"lm_head.weight", "model.embed_tokens.weight"}
    if wrapped.base_model.model.config.tie_word_embeddings and changed & ends:
        raise UserError(
            f"{folder} changes the embedding or the head, which this base ties to each other; "
            "untie the base and train anew"
        )
    if inside := sorted(name for name in changed if ".modules_to_save." in name):
        raise UserError(
            f"{folder} changes {first_few(inside)}, which this base has not: adapters inside of a "
            "module that was saved whole; name it in one of the two and train anew"
        )
    return low_rank, replaced


def hash_adapter(folder: str | Path) -> str:
    """A hash of the weights of an adapter.

    Raises:
        UserError: there are none.
    """
    with as_user_error(f"--adapter {folder} cannot be read", "give the folder of a LoRA adapter"):
        return hashlib.sha256((Path(folder) / ADAPTER_FILE).read_bytes()).hexdigest()[:16]
