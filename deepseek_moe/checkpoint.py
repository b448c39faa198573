"""A checkpoint: found by its folder or hub id, checked, read tensor by tensor, and fingerprinted.

Nothing in a checkpoint is executed or unpickled.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig

from .checksums import VerifiedFile
from .errors import UserError, as_user_error
from .json_file import read_object, run_records
from .model.configuration_deepseek import DeepseekConfig
from .model.layout import official_parts, official_tensors, refuse_wrong_tensors, weight_files
from .model.modeling_deepseek import DeepseekForCausalLM
from .model.tokenization_deepseek import DeepseekTokenizer

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# What transformers reads beside config.json and tokenizer.json.
OTHERS = "tokenizer_config special_tokens_map added_tokens chat_template model.safetensors.index"
GENERATION_NUMBERS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_length")
GENERATION_NUMBERS += ("max_new_tokens", "bos_token_id", "pad_token_id")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_checkpoint(model: str, cache_dir: str | None = None) -> Path:
    """The folder of a checkpoint. One of the hub is downloaded first, into `cache_dir`.

    Raises:
        UserError: it is not there, is incomplete, or is not of this architecture.
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
    if (folder / "adapter_config.json").is_file():  # transformers would add it to the model
        raise UserError(
            f"{folder} holds an adapter; merge it first: python -m deepseek_moe.export "
            f"--model BASE --adapter {folder} --output FOLDER"
        )
    if (folder / "delta.json").is_file():
        raise UserError(
            f"{folder} holds only what changed; put it into its base first: python -m "
            f"deepseek_moe.export --model BASE --delta {folder} --output FOLDER"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; give a folder in Hugging Face layout")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json; copy it from the original checkpoint")
    for file in (folder / f"{name}.json" for name in OTHERS.split()):
        if file.is_file():
            read_object(file)
    fields = read_object(folder / "config.json")
    kind = fields.get("model_type") or fields.get("architectures")
    kind = ", ".join(map(str, kind)) if isinstance(kind, list) else kind
    if kind != DeepseekConfig.model_type:
        raise UserError(f"by config.json {folder} holds a {kind} model; give one of type deepseek")
    config = read_config(folder)
    _refuse_broken_generation_config(folder)
    with as_user_error("the weights cannot be used", "get the checkpoint anew"):
        _refuse_incomplete_weights(folder)
        refuse_wrong_tensors(folder, config)
    return folder


def read_config(folder: Path) -> DeepseekConfig:
    """The config of a checkpoint.

    Raises:
        UserError: it describes a model that this code does not implement.
    """
    remedy = "use a checkpoint of this architecture, or mend the field"
    with as_user_error(f"{folder / 'config.json'} cannot be used", remedy):
        config = DeepseekConfig.from_pretrained(folder)
        if getattr(config, "return_dict", True) is False:
            raise ValueError("return_dict is false, but this code reads outputs by their names")
        return config


def own_tokenizer(folder: Path) -> DeepseekTokenizer:
    """The tokenizer of a checkpoint that `find_checkpoint` has found.

    Raises:
        UserError: its files are broken, or it has ids that the model's vocabulary lacks.
    """
    size = read_config(folder).vocab_size
    file = folder / "tokenizer.json"
    found = f"{file}, tokenizer_config.json or chat_template.jinja cannot be used"
    with as_user_error(found, "get the tokenizer's files anew"):
        tokenizer = DeepseekTokenizer.from_pretrained(folder)
        highest = max(tokenizer.get_vocab().values())
        batch = tokenizer(["a", "a b"], padding=True)  # what is wrong shows when it is used
        tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True)
    if highest >= size:
        raise UserError(
            f"{file} has ids up to {highest}, but the model's vocabulary ends at {size - 1} "
            "(vocab_size in config.json); get both files of one checkpoint"
        )
    return tokenizer


def _refuse_broken_generation_config(folder: Path) -> None:
    """transformers would go on without a file that is no JSON, and without the ends of texts."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return
    fields = read_object(file)
    ends = fields.get("eos_token_id")
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and type(end) is not int:
            raise UserError(f"{file} has eos_token_id {ends!r}; give an id, or a list of ids")
    for name in GENERATION_NUMBERS:
        value = fields.get(name)
        if value is not None and not (type(value) in (int, float) and abs(value) < 2**63):
            raise UserError(f"{file} has {name} {value!r}; give a number")
    with as_user_error(f"{file} cannot be used", "mend the field, or get it anew"):
        GenerationConfig.from_pretrained(folder)


def _refuse_incomplete_weights(folder: Path) -> None:
    files = weight_files(folder)
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
            "files); finish the download (of several files, model.safetensors.index.json too)"
        )


class Checkpoint:
    """The tensors of a checkpoint. Opening it reads only the headers of its files.

    Attributes:
        folder: where it is.
        official: the shape of each tensor, by its name on disk.
        parameters: the shape of each parameter, by its name in memory.

    Raises:
        UserError: a tensor is missing, surplus, of another shape, or no float.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with as_user_error(f"{folder} cannot be read", "give a whole model"):
            self.config = DeepseekConfig.from_pretrained(folder)
            refuse_wrong_tensors(folder, self.config)  # before a model of any size is laid out
            self._lay_out()
            opened = [VerifiedFile(file) for file in weight_files(folder)]
        # `refuse_wrong_tensors` accepts a bare DeepseekModel too. It has no head.
        self.places = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
        if not self.official.keys() <= self.places.keys():
            raise UserError(f"{folder} has no lm_head.weight; give a whole causal language model")

    def _lay_out(self) -> None:
        """Sets what follows from `config`."""
        with torch.device("meta"):
            self.model = DeepseekForCausalLM(self.config)
        self.official = dict(official_tensors(self.config))
        self.parameters = {n: tuple(p.shape) for n, p in self.model.named_parameters()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Official names and tensors, each read when it is asked for."""
        return ((name, self.tensor(name)) for name in self.official)

    def tensor(self, official: str) -> torch.Tensor:
        return self.places[official].get_tensor(official)

    def dtype(self, official: str) -> torch.dtype:
        return self.places[official].get_slice(official)[:0].dtype

    def read(self, parameter: str, device: torch.device | None = None) -> torch.Tensor:
        """A parameter by its name in memory, where the experts of a layer are one stack.

        It is put together on `device`, by default the CPU.
        """
        shape = self.parameters[parameter]
        parts = list(official_parts(parameter, shape))
        if len(parts) == 1:
            return self.tensor(parameter).to(device)
        stack = torch.empty(shape, dtype=self.dtype(parts[0][0]), device=device)
        for name, where in parts:
            stack[where] = self.tensor(name)
        return stack

    def quantizable(self) -> set[str]:
        """Names in memory of what QLoRA's base holds in 4 or 8 bits: linears and routed experts."""
        modules = self.model.model.layers.named_modules(prefix="model.layers")
        linears = {f"{name}.weight" for name, x in modules if isinstance(x, nn.Linear)}
        return linears | (self.parameters.keys() - self.official.keys())


# --- The fingerprint: which base model a run or an adapter belongs to

FORMAT = "tensors:"  # how a fingerprint begins; those of older versions have no such mark
SAMPLE = 4096  # bytes that are read at one place of a tensor
STRIDE = 8 * 2**20  # bytes of a tensor for each such place

# Fields of the config on which no number in a forward or backward pass depends.
NOT_COMPUTED = {"use_cache", "initializer_range", "pretraining_tp", "moe_router_dtype"}
NOT_COMPUTED |= {"bos_token_id", "eos_token_id", "pad_token_id"}


def fingerprint(folder: Path) -> str:
    """A hash of the config and of every tensor's name, dtype, shape and a sample of its bytes.

    A sample is 4 KB from the middle of each 8 MB (22 MB of the 16B model), so a change of a few
    numbers can stay unnoticed. The division into files, the order in them, and fields of the config
    that change no number do not count.

    Raises:
        UserError: the config or a weight file is broken.
    """
    config = read_config(folder)
    names = DeepseekConfig.__annotations__.keys() - NOT_COMPUTED
    fields = json.dumps({name: getattr(config, name) for name in names})
    fields = json.loads(fields, parse_int=float)  # so that 10000 equals 10000.0
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    found: dict[str, bytes] = {}
    for file in weight_files(folder):
        with as_user_error(f"{file} is truncated or corrupt", "get it anew"):
            found |= dict(_describe_tensors(file))
    for name in sorted(found):
        tied_head = config.tie_word_embeddings and name == "lm_head.weight"
        if not tied_head and "rotary_emb.inv_freq" not in name:  # checkpoints may leave these out
            digest.update(found[name])
    return FORMAT + digest.hexdigest()[:32]


def is_outdated(recorded: object) -> bool:
    """Whether `recorded`, from a run.json, is a fingerprint of an older version of this code."""
    return isinstance(recorded, str) and not recorded.startswith(FORMAT)


def refuse_other_base(folder: Path, base: Path) -> None:
    """Refuses `base` if a run.json of fine-tuning, in `folder` or above it, names another base.

    Raises:
        UserError: what is in `folder` was trained over another base.
    """
    for file, record in run_records(folder):
        if "model" not in record["settings"]:
            continue  # a run.json of another program
        trained_over = record["settings"]["model"]
        if is_outdated(trained_over):
            print(
                f"{file} is of an older version of this code, so it was not checked that "
                f"{folder} was trained over {base}",
                file=sys.stderr,
            )
        elif trained_over != fingerprint(base):
            raise UserError(
                f"{folder} was not trained over {base}, by {file}; give the --model that was"
            )
        return


def _describe_tensors(file: Path) -> Iterator[tuple[str, bytes]]:
    """Each tensor's name and what of it is hashed, in the order in which they lie on the disk."""
    # safetensors checks the header, and that the file is whole.
    with safe_open(file, framework="pt"), file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = (8 + length + offset for offset in tensor["data_offsets"])
            described = repr((name, tensor["dtype"], tensor["shape"])).encode()
            yield name, described + b"".join(_samples(handle.fileno(), begin, end))


def _samples(file: int, begin: int, end: int) -> Iterator[bytes]:
    """The bytes in the middle of each equal part of `begin` to `end`; all of them if few."""
    size = end - begin
    parts = max(1, -(-size // STRIDE))
    for part in range(parts):
        middle = begin + size * (2 * part + 1) // (2 * parts)
        start = max(begin, middle - SAMPLE // 2)
        yield os.pread(file, min(SAMPLE, end - start), start)
