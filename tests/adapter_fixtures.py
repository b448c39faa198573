"""What the tests of merging and exports share: adapters, a tokenizer, and a model's logits."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedModel

from deepseek_moe.model.tokenization_deepseek import BOS, EOS
from deepseek_moe.training.trainable import add_lora

LINEARS = [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTED = {"r": 3, "target_modules": LINEARS, "target_parameters": EXPERTS}
IDS = torch.tensor([[0, 17, 5, 44, 80, 2, 91]])


def add_tokenizer(folder: Path) -> None:
    words = {BOS: 0, EOS: 1} | {f"w{i}": i for i in range(2, 96)}
    Tokenizer(WordLevel(words, unk_token=EOS)).save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": BOS, "eos_token": EOS, "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))


@torch.no_grad()
def move_what_trains(model: torch.nn.Module, scale: float = 0.1) -> Any:
    """`model` with random numbers added to every tensor that trains."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def make_adapter(model: PreTrainedModel, folder: Path, scale: float = 0.1, **fields: Any) -> Path:
    """Saves an adapter of PEFT, with random numbers in every tensor that trains."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**fields))
    move_what_trains(adapted, scale).save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits.float()


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {k: x for file in folder.glob("*.safetensors") for k, x in load_file(file).items()}


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters, with the scales of those that bitsandbytes quantised."""
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        if (state := getattr(parameter, "quant_state", None)) is not None:
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
        if isinstance(scale := getattr(parameter, "SCB", None), torch.Tensor):
            total += scale.nbytes
    return total


def add_random_adapters(
    model: PreTrainedModel, names: Sequence[str] = LINEARS, dropout: float = 0.0, **options: Any
) -> Any:
    """`model` with adapters of rank 3, as fine-tuning adds them, whose B is not zero."""
    torch.manual_seed(1)
    adapted = add_lora(model, names, rank=3, alpha=6.0, dropout=dropout, **options)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted
