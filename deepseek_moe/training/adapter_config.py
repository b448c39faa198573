"""The config of a LoRA adapter: plain LoRA, which can be trained on and merged, or an error."""

import hashlib
from pathlib import Path

import peft

from ..errors import UserError, as_user_error
from ..model.layout import first_few

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
INITS = (True, False, "gaussian", "orthogonal")  # all others change the base, too


def read_adapter_config(folder: Path) -> peft.LoraConfig:
    """The config of the adapter in `folder`, without dropout.

    Raises:
        UserError: there is no adapter, or one of another kind.
    """
    file = folder / "adapter_config.json"
    for needed in (file, folder / ADAPTER_FILE):
        if not needed.is_file():
            inside = folder / "adapter"  # where a run with --merge_on_save puts it
            there = inside if (inside / ADAPTER_FILE).is_file() else "the folder of a PEFT adapter"
            raise UserError(f"{needed} does not exist; give {there}")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} cannot be used: {error!r}; get the adapter anew") from error
    if type(config) is not peft.LoraConfig:
        raise UserError(f"{folder} is a {config.peft_type} adapter; only LoRA can be merged")
    plain = peft.LoraConfig().to_dict()
    other = {k: v for k, v in config.to_dict().items() if k not in MERGEABLE and v != plain[k]}
    if config.init_lora_weights not in INITS:
        other["init_lora_weights"] = config.init_lora_weights
    if other:
        found = first_few([f"{name}={value!r}" for name, value in other.items()])
        raise UserError(f"{folder} has {found}; only plain LoRA can be merged here: use PEFT's own")
    config.init_lora_weights = False
    config.lora_dropout = 0.0  # matters while training only, and PEFT refuses it on experts
    return config


def hash_adapter(folder: str | Path) -> str:
    """A hash of the weights of an adapter.

    Raises:
        UserError: there are none.
    """
    with as_user_error(f"--adapter {folder} cannot be read", "give the folder of a LoRA adapter"):
        return hashlib.sha256((Path(folder) / ADAPTER_FILE).read_bytes()).hexdigest()[:16]
