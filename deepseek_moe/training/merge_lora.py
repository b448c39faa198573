"""The tensors of a checkpoint with a LoRA adapter merged in, under their official names.

No model with weights is built. Each tensor is read, changed and handed on when it is asked for, so
that no more than one stack of experts is in memory. It is changed on a GPU where there is one.
"""

import math
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
from ..memory import free_memory
from ..model.configuration_deepseek import DeepseekConfig
from ..model.layout import dtype_fault, official_parts
from ..model.modeling_deepseek import DeepseekForCausalLM, DeepseekMLP
from .adapter_config import ADAPTER_FILE, find_changes, read_adapter_config, refuse_other_tensors
from .quantized_base import Quantization


def merged_tensors(
    base: Path, adapter: Path, device: torch.device | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the official names and tensors of `base` with the LoRA adapter in `adapter` merged in.

    Tensors that the adapter changes are fp32. If it was trained over a quantised base, each tensor
    that was quantised is what that base computed with. Both are on `device`, by default what
    `device_to_merge_on` finds; the others are on the CPU.

    Raises:
        UserError: the adapter is no LoRA adapter of this base, is broken, or changes nothing. This
            is found before a tensor of the base is read.
    """
    checkpoint = Checkpoint(base)
    change = _Adapter(adapter, checkpoint)
    device = device or device_to_merge_on(checkpoint)
    quantization = Quantization.load(adapter)
    quantized = checkpoint.quantizable() if quantization else set()

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in checkpoint.parameters.items():
            if name in change.replaced:
                weight = change.replacement(name)
            elif name in quantized:  # the whole stack, because its experts share statistics
                weight = quantization.roundtrip(checkpoint.read(name, device))
            else:
                weight = checkpoint.read(name)
            if name in change.low_rank:
                a, b, scaling = change.factors(name, device)
            for part, where in official_parts(name, shape):  # (), or (expert, rows) of a stack
                piece = weight[where]
                if name in change.low_rank:
                    piece = piece.to(device).float() + scaling * (b[where] @ a[where[:1]])
                elif part in change.low_rank:  # an expert that has an adapter of its own
                    own_a, own_b, own_scaling = change.factors(part, device)
                    piece = piece.to(device).float() + own_scaling * (own_b @ own_a)
                yield part, piece

    return tensors()


def device_to_merge_on(checkpoint: Checkpoint) -> torch.device:
    """The GPU, if there is one with room for the largest stack, else the CPU.

    Of each number there are four copies of 2 bytes at most while a stack is quantised and read
    back; the same again is left for what else takes memory.
    """
    largest = max(map(math.prod, checkpoint.parameters.values()))
    if torch.cuda.is_available():
        gpu = torch.device("cuda", torch.cuda.current_device())
        if free_memory(gpu) >= 16 * largest:
            return gpu
    return torch.device("cpu")


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

    def factors(
        self, parameter: str, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A [R, I], B [O, R], both fp32 on `device`, and the scale of B A. Stacks have E of each.

        PEFT stores the experts' lora_A [E*R, I] with the experts slowest, and lora_B [O, R*E] with
        the experts fastest.
        """
        key, scaling = self.low_rank[parameter]
        a, b = (self.file.get_tensor(f"{key}.lora_{x}.weight") for x in "AB")
        a, b = (x.to(device).float() for x in (a, b))
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
