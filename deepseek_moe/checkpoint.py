"""A checkpoint: a folder or a hub id that is found, checked, and read tensor by tensor.

Nothing of it is executed or unpickled.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn

from .errors import UserError, as_user_error
from .model.configuration_deepseek import DeepseekConfig
from .model.layout import official_parts, official_tensors, refuse_wrong_tensors, weight_files
from .model.modeling_deepseek import DeepseekForCausalLM
from .model.tokenization_deepseek import DeepseekTokenizer

ADAPTER_FILE = "adapter_model.safetensors"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_checkpoint(model: str, cache_dir: str | None = None) -> Path:
    """The folder of a local checkpoint, or of a hub checkpoint after its download (to `cache_dir`).

    Raises:
        UserError: there is none, or it is not one that can be loaded safely.
    """
    with as_user_error(f"{model[:80]!r} is no path", "give a checkpoint folder or a hub id"):
        folder = Path(model).expanduser()
        exists = folder.exists()
    if not exists:
        if not HUB_ID.fullmatch(model):
            raise UserError(f"{model} does not exist; give a checkpoint folder or a hub id")
        failed = f"{model} is no folder here and could not be downloaded as a hub id"
        with as_user_error(failed, "check the name and the network"):
            wanted = ["*.json", "*.safetensors", "*.jinja"]
            folder = Path(snapshot_download(model, allow_patterns=wanted, cache_dir=cache_dir))
    if folder.is_file():
        raise UserError(f"{folder} is a file; give the folder that holds it and config.json")
    if (folder / "adapter_config.json").is_file():  # transformers would add it to a model beside it
        raise UserError(
            f"{folder} holds an adapter; merge it first: python -m deepseek_moe.export "
            f"--model BASE --adapter {folder} --output FOLDER"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; give a folder in Hugging Face layout")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json; copy it from the original checkpoint")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            read_object(folder / name)
    kind = read_object(folder / "config.json").get("model_type")
    if kind != DeepseekConfig.model_type:
        raise UserError(f"{folder} holds a {kind} model; give one of type deepseek")
    _refuse_incomplete_weights(folder)
    return folder


def own_tokenizer(folder: Path) -> DeepseekTokenizer:
    """The tokenizer of a checkpoint that `find_checkpoint` has found.

    Raises:
        UserError: its files are broken, or some of its ids are beyond the model's vocabulary.
    """
    fields = read_object(folder / "config.json")
    with as_user_error(
        f"{folder / 'tokenizer.json'} cannot be used", "get the tokenizer's files anew"
    ):
        tokenizer = DeepseekTokenizer.from_pretrained(folder)
        highest = max(tokenizer.get_vocab().values())
    size = fields.get("vocab_size", DeepseekConfig.vocab_size)
    if isinstance(size, int) and highest >= size:
        raise UserError(
            f"{folder / 'tokenizer.json'} has ids up to {highest}, but the model's vocabulary ends "
            f"at {size - 1} (vocab_size in config.json); get both files of one checkpoint"
        )
    return tokenizer


def read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); get it anew") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds {type(content).__name__}, no JSON object; get it anew")
    return content


def _refuse_incomplete_weights(folder: Path) -> None:
    try:
        files = weight_files(folder)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{folder} has a broken index of weight files; get it anew") from error
    missing = [file.name for file in files if not file.is_file()]
    pickles = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt*")])
    if missing and pickles:
        raise UserError(
            f"{folder} holds {pickles[0]}, a pickle, which can run code when it is opened; only "
            "safetensors are read: convert it, or download the safetensors files"
        )
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing[:3])} ({len(missing)} of {len(files)} weight "
            "files); finish the download"
        )


def base_tensors(base: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Official names and tensors of `base` as they are."""
    checkpoint = Checkpoint(base)
    return ((name, checkpoint.tensor(name)) for name in checkpoint.official)


class Checkpoint:
    """A checkpoint of this model: what is in it, and its tensors when they are asked for."""

    def __init__(self, folder: Path) -> None:
        try:
            fields, _ = DeepseekConfig.get_config_dict(folder)
            if fields.get("model_type") != DeepseekConfig.model_type:
                raise ValueError(f"it holds a {fields.get('model_type')} model, not a deepseek one")
            self.config = DeepseekConfig.from_pretrained(folder)
            with torch.device("meta"):
                self.model = DeepseekForCausalLM(self.config)
            refuse_wrong_tensors(folder, self.model)
            opened = [safe_open(file, framework="pt") for file in weight_files(folder)]
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise UserError(f"{folder} cannot be read: {error}; give a whole model") from error
        # A bare DeepseekModel passes the above; its names lack "model.", and it has no head.
        self.places = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
        self.official = official_tensors(self.model)
        self.parameters = {n: tuple(p.shape) for n, p in self.model.named_parameters()}
        if not self.official.keys() <= self.places.keys():
            raise UserError(f"{folder} has no lm_head.weight; give a whole causal language model")

    def tensor(self, official: str) -> torch.Tensor:
        return self.places[official].get_tensor(official)

    def dtype(self, official: str) -> torch.dtype:
        return self.places[official].get_slice(official)[:0].dtype

    def read(self, parameter: str) -> torch.Tensor:
        """By its name in memory, where the experts of a layer are stacked."""
        shape = self.parameters[parameter]
        parts = list(official_parts(parameter, shape))
        if len(parts) == 1:
            return self.tensor(parameter)
        stack = torch.empty(shape, dtype=self.dtype(parts[0][0]))
        for name, where in parts:
            stack[where] = self.tensor(name)
        return stack

    def quantizable(self) -> set[str]:
        """The parameters that a quantised base holds in 4 or 8 bits: linears and routed experts."""
        modules = self.model.model.layers.named_modules(prefix="model.layers")
        linears = {f"{name}.weight" for name, x in modules if isinstance(x, nn.Linear)}
        return linears | (self.parameters.keys() - self.official.keys())
