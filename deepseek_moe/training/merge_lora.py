"""The tensors of a checkpoint with a LoRA adapter merged in, under their official names.

No model with weights is built. Each tensor is read, changed and handed on when it is asked for, so
that no more than one stack of experts is in memory.
"""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import peft
import torch
from torch import nn
from tqdm import tqdm

from ..checkpoint import Checkpoint, refuse_other_base
from ..checksums import VerifiedFile
from ..errors import UserError, as_user_error
from ..model.configuration_deepseek import DeepseekConfig
from ..model.layout import dtype_fault, official_parts
from ..model.modeling_deepseek import DeepseekForCausalLM, DeepseekMLP
from .adapter_config import (
    ADAPTER_FILE,
    find_changes,
    read_adapter_config,
    refuse_other_tensors,
)
from .quantized_base import Quantization


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
            if name in change.low_rank:
                a, b, scaling = change.factors(name)
            for part, where in official_parts(name, shape):  # (), or (expert, rows) of a stack
                piece = weight[where]
                if name in change.low_rank:
                    piece = piece.float() + scaling * (b[where] @ a[where[:1]])
                elif part in change.low_rank:  # an expert that has an adapter of its own
                    own_a, own_b, own_scaling = change.factors(part)
                    piece = piece.float() + own_scaling * (own_b @ own_a)
                yield part, piece

    return tensors()


def merge_into(model: DeepseekForCausalLM, base: Path, adapter: Path) -> None:
    """Gives `model`, which was loaded from `base` and not quantised, the merged weights.

    Raises:
        UserError: as for `merged_tensors`, or the adapter was trained over another base.
    """
    refuse_other_base(adapter, base)
    places = {
        part: parameter.data[where]
        for name, parameter in model.named_parameters()
        for part, where in official_parts(name, tuple(parameter.shape))
    }
    tensors = merged_tensors(base, adapter)
    for name, tensor in tqdm(tensors, "merging", len(places), unit="tensor", leave=False):
        places[name].copy_(tensor)


class _Adapter:
    """A LoRA adapter of PEFT: which parameters, or experts of a stack, it changes, and how.

    A model that PEFT wraps tells which tensors the adapter must have, to which parameter each
    belongs, and its scale.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        config = read_adapter_config(folder)
        with as_user_error(f"{folder / ADAPTER_FILE}", "get the adapter anew"):
            self.file = VerifiedFile(folder / ADAPTER_FILE)
        apart = any(re.search(r"\.experts\.\d+\.", name) for name in self.file.keys())  # noqa: SIM118
        wrapped = _wrap(folder, config, checkpoint.config, apart)
        refuse_other_tensors(wrapped, folder)
        self.low_rank, self.replaced = find_changes(wrapped, folder)
        self._refuse_bad_numbers()

    def replacement(self, parameter: str) -> torch.Tensor:
        return self.file.get_tensor(self.replaced[parameter])

    def factors(self, parameter: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A [R, I], B [O, R], both in fp32, and the scale of B A. Stacks have E of each.

        PEFT stores the experts' lora_A [E*R, I] with the experts slowest, and lora_B [O, R*E] with
        the experts fastest.
        """
        key, scaling = self.low_rank[parameter]
        a, b = (self.file.get_tensor(f"{key}.lora_{x}.weight").float() for x in "AB")
        shape = self.checkpoint.parameters.get(parameter, ())
        if len(shape) == 3:
            a = a.unflatten(0, (shape[0], -1))
            b = b.unflatten(1, (-1, shape[0])).permute(2, 0, 1)
        return a, b, scaling

    def _refuse_bad_numbers(self) -> None:
        changes = False
        for name in self.file.keys():  # noqa: SIM118 - not a dict
            if fault := dtype_fault(self.file.get_slice(name).get_dtype()):
                raise UserError(f"{self.folder}: {name} {fault}; give the adapter as PEFT saved it")
            tensor = self.file.get_tensor(name)
            if not tensor.isfinite().all():
                raise UserError(f"{self.folder}: {name} holds NaN or inf; use an earlier adapter")
            changes |= name.endswith("lora_B.weight") and bool(tensor.any())
        if not changes and all(
            torch.equal(self.replacement(name), self.checkpoint.read(name))
            for name in self.replaced
        ):
            raise UserError(
                f"{self.folder} changes nothing: every lora_B is zero, as before training; give "
                "the adapter of a trained checkpoint"
            )


def _wrap(
    folder: Path, config: peft.LoraConfig, model_config: DeepseekConfig, experts_apart: bool
) -> peft.PeftModel:
    """A model without weights, with the adapter's tensors in their places.

    With transformers 4 each expert had linears of its own, and LoRA on them: `experts_apart`.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a model that will not run
        model = DeepseekForCausalLM(model_config)
        if experts_apart:
            width = model_config.moe_intermediate_size
            for layer in model.model.layers:
                if layer.is_moe:
                    experts = [DeepseekMLP(model_config, width) for _ in layer.mlp.experts]
                    layer.mlp.experts = nn.ModuleList(experts)
        with as_user_error(f"{folder} does not fit this base", "give the base it was trained on"):
            return peft.get_peft_model(model, config)
