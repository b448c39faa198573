"""The tensors of a checkpoint with a LoRA adapter merged in, under their official names.

No model with weights is built. Each tensor is read, changed and handed on when it is asked for, so
that no more than one stack of experts is in memory.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ..checkpoint import ADAPTER_FILE, Checkpoint
from ..errors import UserError
from ..model.configuration_deepseek import DeepseekConfig
from ..model.layout import dtype_fault, first_few, official_parts
from ..model.modeling_deepseek import DeepseekForCausalLM
from .quantized_base import Quantization

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

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


def merged_tensors(base: Path, adapter: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the official names and tensors of `base` with the LoRA adapter in `adapter` merged in.

    Tensors that the adapter changes are fp32. If it was trained over a quantised base, each tensor
    that was quantised is what that base computed with.

    Raises:
        UserError: the adapter is no LoRA adapter of this base, is broken, or changes nothing. This
            is found before a tensor of the base is read.
    """
    checkpoint = Checkpoint(base)
    change = _Adapter(adapter, checkpoint)

    quantization = Quantization.load(adapter)
    quantized = checkpoint.quantizable() if quantization else set()

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in checkpoint.parameters.items():
            if name in change.replaced:
                weight = change.replacement(name)
            else:
                weight = checkpoint.read(name)
                if name in quantized:  # the whole stack, because its experts share statistics
                    weight = quantization.roundtrip(weight)
            delta = change.delta(name) if name in change.low_rank else None
            for part, where in official_parts(name, shape):
                piece = weight[where]
                yield part, piece if delta is None else piece.float() + delta(where)

    return tensors()


class _Adapter:
    """A LoRA adapter of PEFT: which parameters it changes, and how.

    PEFT itself wraps a model without weights. From that it is known which tensors the adapter must
    have, to which parameter each belongs, and its scale.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        config = _lora_config(folder)
        wrapped = _wrap(folder, config, checkpoint.config)
        try:
            self.file = safe_open(folder / ADAPTER_FILE, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / ADAPTER_FILE}: {error}; get the adapter anew") from error
        self._refuse_other_tensors(wrapped)
        self.low_rank, self.replaced = _find_changes(wrapped, folder)
        tied = checkpoint.config.tie_word_embeddings
        if tied and {"lm_head.weight", "model.embed_tokens.weight"} & (
            self.low_rank.keys() | self.replaced.keys()
        ):
            raise UserError(
                f"{folder} changes the embedding or the head, which this base ties to each other; "
                "untie the base and train anew"
            )
        unknown = (self.low_rank.keys() | self.replaced.keys()) - checkpoint.parameters.keys()
        if unknown:
            raise UserError(
                f"{folder} changes {first_few(sorted(unknown))}, which this base has not: adapters "
                "inside of a module that was saved whole; name it in one of the two and train anew"
            )
        self._refuse_bad_numbers()

    def replacement(self, parameter: str) -> torch.Tensor:
        return self.file.get_tensor(self.replaced[parameter])

    def delta(self, parameter: str) -> "_Delta":
        key, scaling = self.low_rank[parameter]
        a, b = (self.file.get_tensor(f"{key}.lora_{x}.weight") for x in "AB")
        return _Delta(a, b, scaling, self.checkpoint.parameters[parameter])

    def _refuse_other_tensors(self, wrapped: "PeftModel") -> None:
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        # PEFT also saves the frozen weight of a module that is both adapted and saved whole.
        frozen = ".base_layer.weight"
        wanted = {name: tuple(x.shape) for name, x in state.items() if not name.endswith(frozen)}
        names = {name for name in self.file.keys() if not name.endswith(frozen)}  # noqa: SIM118
        wrong = [f"{name} is missing" for name in sorted(wanted.keys() - names)]
        wrong += [f"{name} is surplus" for name in sorted(names - wanted.keys())]
        for name in sorted(names & wanted.keys()):
            shape = tuple(self.file.get_slice(name).get_shape())
            if shape != wanted[name]:
                wrong.append(f"{name} is {list(shape)} where {list(wanted[name])} is wanted")
        if wrong:
            raise UserError(
                f"{self.folder} does not fit this base: {first_few(wrong)}; give the base that the "
                "adapter was trained on"
            )

    def _refuse_bad_numbers(self) -> None:
        for name in self.file.keys():  # noqa: SIM118 - not a dict
            if fault := dtype_fault(self.file.get_slice(name).get_dtype()):
                raise UserError(f"{self.folder}: {name} {fault}; give the adapter as PEFT saved it")
        changes = any(
            not torch.equal(self.replacement(name), self.checkpoint.read(name))
            for name in self.replaced
        )
        for name in self.file.keys():  # noqa: SIM118 - not a dict
            tensor = self.file.get_tensor(name)
            if not tensor.isfinite().all():
                raise UserError(f"{self.folder}: {name} holds NaN or inf; use an earlier adapter")
            changes |= name.endswith("lora_B.weight") and bool(tensor.any())
        if not changes:
            raise UserError(
                f"{self.folder} changes nothing: every lora_B is zero, as before training; give "
                "the adapter of a trained checkpoint"
            )


class _Delta:
    """scaling * B A in fp32, of a linear layer or of one expert.

    PEFT stores the experts' lora_A [E*R, I] with the experts slowest, and lora_B [O, R*E] with the
    experts fastest.
    """

    def __init__(
        self, a: torch.Tensor, b: torch.Tensor, scaling: float, shape: tuple[int, ...]
    ) -> None:
        self.scaling = scaling
        stacked = len(shape) == 3
        self.a = a.unflatten(0, (shape[0], -1)) if stacked else a
        self.b = b.unflatten(1, (-1, shape[0])).permute(2, 0, 1) if stacked else b

    def __call__(self, where: tuple[Any, ...]) -> torch.Tensor:
        """The part at the index `where` of `official_parts`: (), or (expert, output rows)."""
        return self.scaling * (self.b[where].float() @ self.a[where[:1]].float())


def _lora_config(folder: Path) -> "LoraConfig":
    from peft import LoraConfig, PeftConfig

    file = folder / "adapter_config.json"
    for needed in (file, folder / ADAPTER_FILE):
        if not needed.is_file():
            inside = folder / "adapter"  # where a run with --merge_on_save puts it
            there = inside if (inside / ADAPTER_FILE).is_file() else "the folder of a PEFT adapter"
            raise UserError(f"{needed} does not exist; give {there}")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} cannot be used: {error!r}; get the adapter anew") from error
    if type(config) is not LoraConfig:
        raise UserError(f"{folder} is a {config.peft_type} adapter; only LoRA can be merged")
    plain = LoraConfig().to_dict()
    other = {k: v for k, v in config.to_dict().items() if k not in MERGEABLE and v != plain[k]}
    if config.init_lora_weights not in INITS:
        other["init_lora_weights"] = config.init_lora_weights
    if other:
        found = first_few([f"{name}={value!r}" for name, value in other.items()])
        raise UserError(f"{folder} has {found}; only plain LoRA can be merged here: use PEFT's own")
    config.init_lora_weights = False
    config.lora_dropout = 0.0  # matters while training only, and PEFT refuses it on experts
    return config


def _wrap(folder: Path, config: "LoraConfig", model_config: DeepseekConfig) -> "PeftModel":
    from peft import get_peft_model

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a model that will not run
        try:
            return get_peft_model(DeepseekForCausalLM(model_config), config)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{folder} does not fit this base: {error}; give the base it was trained on"
            ) from error


def _find_changes(
    wrapped: "PeftModel", folder: Path
) -> tuple[dict[str, tuple[str, float]], dict[str, str]]:
    """For each parameter with an adapter, the name of its wrapper and the scale of B A; for each
    that is replaced as a whole, the name of the new tensor.

    A module with two adapted stacks is wrapped twice: `experts.lora_A` belongs to the outer wrapper
    and `experts.base_layer.lora_A` to the inner one.
    """
    from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper
    from peft.utils.other import ModulesToSaveWrapper

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
    return low_rank, replaced
