"""From a folder or a hub id to a model and its tokenizer, with plain words where that fails.

`AutoModelForCausalLM` and `AutoTokenizer` do the work; what is here looks before it leaps: nothing
is executed or unpickled, weights that cannot fit or are broken are refused before the load.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .configuration_deepseek import DeepseekConfig
from .errors import UserError
from .packing import BITS, PackingConfig, packed_bytes
from .tokenization_deepseek import DeepseekTokenizer
from .weights import weight_files

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    model: str,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    quantization: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, ready to generate, and its tokenizer.

    Args:
        model: a folder in the official layout, or a hub id.
        dtype: float32, bfloat16, float16; auto takes the checkpoint's on a GPU, and on a CPU
            float32 (faster there than bfloat16 on most) if it fits, else bfloat16.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        trust_remote_code: run code that comes with a checkpoint of another architecture. For this
            one the code of this package is used, whatever the checkpoint brings.
        quantization: int8 or int4 packs the weights of the layers, and the head's in int8, in
            `dtype` before, while they are read (packing.py); None leaves them as they are.

    Raises:
        UserError: one line that says what was found and what to do.
    """
    if quantization is not None and quantization not in BITS:
        raise UserError(f"quantization {quantization} is unknown; use {' or '.join(BITS)}")
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype {dtype} is unknown; use auto, {', '.join(DTYPES)}")
    folder = locate(model, trust_remote_code)
    place = _device(device)
    numbers = _count_numbers(folder)
    ours = _read_object(folder / "config.json").get("model_type") == DeepseekConfig.model_type
    with one_line(f"{folder / 'config.json'} cannot be used", _remedy(folder, trust_remote_code)):
        if ours:  # AutoConfig would warn of a tokenizer that is not taken here
            config = DeepseekConfig.from_pretrained(folder)
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if quantization and not ours:
        raise UserError(
            f"{folder} holds a {config.model_type} model, of which {quantization} knows nothing; "
            "load it without quantization"
        )

    def size(number_type: torch.dtype) -> int:
        if quantization is None:
            return numbers * number_type.itemsize
        return packed_bytes(numbers, config, BITS[quantization], number_type)

    if ours:  # before the weights, which take longer; whatever class the files name
        tokenizer: PreTrainedTokenizerBase = own_tokenizer(folder)
    number_type = DTYPES.get(dtype) or _auto_dtype(place, size(torch.float32), config.dtype)
    _refuse_too_little_memory(size(number_type), quantization or str(number_type), place)
    options = {"quantization_config": PackingConfig(BITS[quantization])} if quantization else {}
    with one_line(f"{folder} cannot be loaded", "get the checkpoint anew"):
        network, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=number_type,
            device_map=place,
            use_safetensors=True,
            trust_remote_code=trust_remote_code and not ours,
            output_loading_info=True,
            **options,
        )
        if info["missing_keys"]:  # of other architectures; ours refuses them by itself
            raise UserError(f"{folder} lacks {min(info['missing_keys'])}; get the checkpoint anew")
    if not ours:
        with one_line(f"{folder / 'tokenizer.json'} cannot be used", "get its files anew"):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return network.eval(), tokenizer


def locate(model: str, trust_remote_code: bool = False, cache_dir: str | None = None) -> Path:
    """The folder of a local checkpoint, or of a hub checkpoint after its download (to `cache_dir`).

    Raises:
        UserError: there is none, or it is not one that can be loaded safely.
    """
    with one_line(f"{model[:80]!r} is no path", "give a checkpoint folder or a hub id"):
        folder = Path(model).expanduser()
        exists = folder.exists()
    if not exists:
        if not HUB_ID.fullmatch(model):
            raise UserError(f"{model} does not exist; give a checkpoint folder or a hub id")
        failed = f"{model} is no folder here and could not be downloaded as a hub id"
        with one_line(failed, "check the name and the network"):
            wanted = ["*.json", "*.safetensors", "*.jinja"]
            wanted += ["*.py"] if trust_remote_code else []
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
    if not (folder / "tokenizer.json").is_file() and not trust_remote_code:
        raise UserError(f"{folder} has no tokenizer.json; copy it from the original checkpoint")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            _read_object(folder / name)
    _refuse_incomplete_weights(folder)
    return folder


def own_tokenizer(folder: Path) -> DeepseekTokenizer:
    """The tokenizer of a checkpoint that must be of this architecture.

    Raises:
        UserError: it is of another one, its files are broken, or some of its ids are beyond the
            model's vocabulary.
    """
    fields = _read_object(folder / "config.json")
    kind = fields.get("model_type")
    if kind != DeepseekConfig.model_type:
        raise UserError(f"{folder} holds a {kind} model; give one of type deepseek")
    with one_line(f"{folder / 'tokenizer.json'} cannot be used", "get the tokenizer's files anew"):
        tokenizer = DeepseekTokenizer.from_pretrained(folder)
        highest = max(tokenizer.get_vocab().values())
    size = fields.get("vocab_size", DeepseekConfig.vocab_size)
    if isinstance(size, int) and highest >= size:
        raise UserError(
            f"{folder / 'tokenizer.json'} has ids up to {highest}, but the model's vocabulary ends "
            f"at {size - 1} (vocab_size in config.json); get both files of one checkpoint"
        )
    return tokenizer


@contextmanager
def one_line(what: str, remedy: str) -> Iterator[None]:
    """Turns what libraries make of broken files or networks, of any class, into a UserError."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, ImportError):
            remedy = "install that package, or choose what needs none"
        raise UserError(f"{what}: {_short(error)}; {remedy}") from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:400].rstrip(".") or type(error).__name__


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); get it anew") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds {type(content).__name__}, no JSON object; get it anew")
    return content


def _remedy(folder: Path, trust_remote_code: bool) -> str:
    fields = _read_object(folder / "config.json")
    own = fields.get("model_type") == DeepseekConfig.model_type
    if "auto_map" in fields and not own and not trust_remote_code:
        return "pass --trust_remote_code (trust_remote_code=True) if you trust the code it brings"
    return "use a checkpoint of this architecture, or mend the field"


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


def _count_numbers(folder: Path) -> int:
    """How many numbers the weight files hold; opening them proves that they are whole."""
    count = 0
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    shape = tensors.get_slice(name).get_shape()
                    count += torch.Size(shape).numel()
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} is truncated or corrupt ({_short(error)}); get it anew"
            ) from error
    return count


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        place = torch.device("meta")
    if place.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {device} is unknown; use auto, cpu or cuda")
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device {device} was asked for, but is not there; use cpu")
    if place.type == "cuda":
        found = torch.cuda.device_count()
        place = torch.device("cuda", place.index or 0)
        if place.index >= found:
            raise UserError(f"device {device} was asked for, but {found} GPUs were found; use cpu")
    return place


def _auto_dtype(device: torch.device, need: int, stored: torch.dtype | None) -> torch.dtype:
    """`need`: bytes of the weights as float32."""
    if device.type != "cpu":
        return stored or torch.bfloat16
    return torch.float32 if need < _free_memory(device) else torch.bfloat16


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _refuse_too_little_memory(need: int, stored_as: str, device: torch.device) -> None:
    free = _free_memory(device)
    if need > free:
        packed = stored_as in BITS
        smaller = "" if packed else "--dtype bfloat16, --quantization int4 (of this architecture), "
        raise UserError(
            f"the weights need {need / 1e9:.1f} GB as {stored_as.removeprefix('torch.')}, but "
            f"{device} has {free / 1e9:.1f} GB free; use {smaller}"
            "another device, or a smaller model"
        )
