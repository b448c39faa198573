"""Writes a checkpoint folder in the official layout: adapter merged in, the model's code with it.

    python -m deepseek_moe.export --model BASE --adapter DIR --output DIR
    python -m deepseek_moe.export --model BASE --deepspeed_checkpoint DIR --output DIR

No model is built: tensors go one at a time from the files of the base, through the adapter, into
the new files. The most that is in memory is one stack of experts and the shard being written. The
folder appears under its name when it is complete.
"""

import argparse
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils.hub import convert_file_size_to_int

from .checkpoint import DTYPES, locate
from .cli import one_line_errors
from .configuration_deepseek import DeepseekConfig
from .errors import RunError, UserError
from .modeling_deepseek import DeepseekForCausalLM
from .tokenization_deepseek import DeepseekTokenizer
from .weights import name_some, official_tensors, refuse_wrong_tensors, weight_files

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

AUTO_MAP = {
    "AutoConfig": "configuration_deepseek.DeepseekConfig",
    "AutoModel": "modeling_deepseek.DeepseekModel",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
}
TOKENIZER_AUTO_MAP = {"AutoTokenizer": [None, "tokenization_deepseek.DeepseekTokenizer"]}
# Beside an auto_map transformers believes this name: under any other a folder with code would get a
# plain tokenizer here, with a second BOS in front of a rendered chat.
TOKENIZER_FIELDS = {"auto_map": TOKENIZER_AUTO_MAP, "tokenizer_class": DeepseekTokenizer.__name__}
ADAPTER_FILE = "adapter_model.safetensors"
UNFINISHED = ".partial"

# What may differ from PEFT's defaults without changing what is computed other than by A, B and
# their scale. Anything else (DoRA, biases, new variants) is refused.
MERGEABLE = {
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("task_type", "inference_mode", "runtime_config", "r", "lora_alpha", "lora_dropout"),
    *("use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "modules_to_save"),
    *("target_modules", "target_parameters", "exclude_modules"),
    *("layers_to_transform", "layers_pattern"),
}
INITS = (True, False, "gaussian", "orthogonal")  # the others also change the base


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deepseek_moe.export", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", required=True, help="the base: a folder or a hub id")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--adapter", type=Path, help="a LoRA adapter in PEFT's format, to merge")
    what.add_argument(
        "--deepspeed_checkpoint",
        type=Path,
        help="a checkpoint of full fine-tuning under ZeRO; it is unpickled: only your own",
    )
    parser.add_argument("--output", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", *DTYPES], help="auto: each tensor as the base's"
    )
    parser.add_argument("--max_shard_size", default="5GB", help="of a weight file; default 5GB")
    args = parser.parse_args()

    output = args.output.expanduser()
    _refuse_occupied(output)
    with redirect_stdout(sys.stderr):  # DeepSpeed prints and logs there
        base = locate(args.model)
        if args.adapter:
            tensors = merged_tensors(base, args.adapter.expanduser())
        elif args.deepspeed_checkpoint:
            tensors = consolidated_tensors(base, args.deepspeed_checkpoint.expanduser())
        else:
            tensors = base_tensors(base)
        write_checkpoint(tensors, base, output, DTYPES.get(args.dtype), args.max_shard_size)
    print(output)


def merged_tensors(base: Path, adapter: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Official names and tensors of `base` with the LoRA adapter in `adapter` merged in.

    Tensors that the adapter changes come in fp32. If it was trained over a quantised base, the
    others too are what that base computed with.

    Raises:
        UserError: before anything is read: the adapter is no LoRA adapter of this base, is broken,
            or changes nothing.
    """
    checkpoint = _Checkpoint(base)
    change = _Adapter(adapter, checkpoint)
    from .quantization import Quantization  # here: it needs bitsandbytes, other exports do not

    quantization = Quantization.load(adapter)
    quantized = checkpoint.quantizable() if quantization else set()

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in checkpoint.parameters.items():
            if name in change.replaced:
                weight = change.replacement(name)
            else:
                weight = checkpoint.read(name)
                if name in quantized:  # the whole stack, as in memory: its parts share statistics
                    weight = quantization.roundtrip(weight)
            delta = change.delta(name) if name in change.low_rank else None
            for part, where in _parts(name, shape):
                piece = weight[where]
                yield part, piece if delta is None else piece.float() + delta(where)

    return tensors()


def base_tensors(base: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Official names and tensors of `base` as they are."""
    checkpoint = _Checkpoint(base)
    return ((name, checkpoint.tensor(name)) for name in checkpoint.official)


def consolidated_tensors(base: Path, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Official names and fp32 tensors from what every rank of a ZeRO-2 or 3 run saved in `folder`.

    DeepSpeed holds all ranks' shards in memory while it does so, and unpickles them.

    Raises:
        UserError: `folder` is no such checkpoint, or one of another model.
    """
    if (folder / ADAPTER_FILE).is_file():
        raise UserError(f"{folder} is a checkpoint of a LoRA run; pass it as --adapter instead")
    if not (folder / "latest").is_file():
        raise UserError(
            f"{folder} has no file 'latest', so DeepSpeed did not write it; give the "
            "checkpoint-N folder that holds global_stepN"
        )
    checkpoint = _Checkpoint(base)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder), lazy_mode=True)
    except Exception as error:  # of any class, depending on which file is broken
        found = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{folder} cannot be put together: {found}; use another one") from error
    wrong = [name for name, shape in checkpoint.parameters.items() if _shape(state, name) != shape]
    if wrong:
        raise UserError(
            f"{folder} is of another model: {name_some(wrong)} missing or of another shape; give "
            "the --model that was fine-tuned"
        )

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in checkpoint.parameters.items():
            weight = state[name].contiguous()
            for part, where in _parts(name, shape):
                yield part, weight[where]

    return tensors()


def _shape(state: dict[str, Any], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


def write_checkpoint(
    tensors: Iterator[tuple[str, torch.Tensor]],
    base: Path,
    folder: Path,
    dtype: torch.dtype | None,
    max_shard_size: str = "5GB",
) -> None:
    """Makes a complete checkpoint of `tensors`; all else in it comes from `base`.

    Args:
        tensors: official names, each once, in any order.
        folder: not there yet, or empty.
        dtype: of all tensors; None keeps for each the one that it has in `base`.

    Raises:
        UserError: tensors are missing, not of this model or not finite, or `folder` is in use.
        RunError: `folder` cannot be written, for example because the disk is full.
    """
    _refuse_occupied(folder)
    try:
        limit = convert_file_size_to_int(max_shard_size)
    except ValueError as error:
        raise UserError(f"max_shard_size {max_shard_size!r} is no size; use 5GB, 200MB") from error
    checkpoint = _Checkpoint(base)
    config = checkpoint.config
    config.architectures = [DeepseekForCausalLM.__name__]
    config.dtype = dtype or config.dtype
    try:
        tokenizer = DeepseekTokenizer.from_pretrained(base)
    except Exception as error:  # tokenizers has no class for its own
        raise UserError(f"{base}: no usable tokenizer: {error}; get its files anew") from error
    try:
        with _complete_or_absent(folder) as aside:
            config.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            if (base / "generation_config.json").is_file():
                shutil.copyfile(base / "generation_config.json", aside / "generation_config.json")
            else:
                GenerationConfig.from_model_config(config).save_pretrained(aside)
            add_code(aside)
            _write_shards(_checked(tensors, checkpoint, dtype), aside, limit)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder} cannot be written: {error}; free space, or move it") from error


def _refuse_occupied(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already; give a new folder, or remove it first")


def add_code(folder: Path) -> None:
    """Adds the model's code to a checkpoint folder, for machines without this package.

    There `from_pretrained(folder, trust_remote_code=True)` loads it with transformers alone; with
    this package imported the folder loads natively, and its code is not run.
    """
    for name in ("modeling_deepseek", "tokenization_deepseek"):
        module = Path(__file__).with_name(f"{name}.py")
        for file in {module, *map(Path, get_relative_import_files(module))}:
            _write_aside(folder / file.name, file.read_text(encoding="utf-8"))
    config_fields = {"auto_map": AUTO_MAP | TOKENIZER_AUTO_MAP}
    changes = {"tokenizer_config.json": TOKENIZER_FIELDS, "config.json": config_fields}
    for name, change in changes.items():
        fields = json.loads((folder / name).read_text(encoding="utf-8")) | change
        _write_aside(folder / name, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


def _write_aside(file: Path, text: str) -> None:
    aside = file.with_name(file.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, file)


class _Checkpoint:
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
            raise UserError(f"{folder} cannot be exported: {error}; give a whole base") from error
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
        parts = list(_parts(parameter, shape))
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


def _parts(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Official names of a parameter in memory, and where in it each of them is."""
    prefix, _, last = name.rpartition(".")
    if not prefix.endswith(".experts"):
        yield name, ()
        return
    for expert in range(shape[0]):
        if last == "down_proj":
            yield f"{prefix}.{expert}.down_proj.weight", (expert, slice(None))
        else:
            half = shape[1] // 2
            yield f"{prefix}.{expert}.gate_proj.weight", (expert, slice(half))
            yield f"{prefix}.{expert}.up_proj.weight", (expert, slice(half, None))


class _Adapter:
    """A PEFT LoRA adapter: which parameters it changes, and how.

    PEFT itself wraps the model, without weights, and so says which tensors the adapter must have,
    which parameter each belongs to, and its scale.
    """

    def __init__(self, folder: Path, checkpoint: _Checkpoint) -> None:
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
        wanted = {name: tuple(x.shape) for name, x in state.items()}
        names = set(self.file.keys())
        wrong = [f"{name} is missing" for name in sorted(wanted.keys() - names)]
        wrong += [f"{name} is surplus" for name in sorted(names - wanted.keys())]
        for name in sorted(names & wanted.keys()):
            shape = tuple(self.file.get_slice(name).get_shape())
            if shape != wanted[name]:
                wrong.append(f"{name} is {list(shape)} where {list(wanted[name])} is wanted")
        if wrong:
            raise UserError(
                f"{self.folder} does not fit this base: {name_some(wrong)}; give the base that the "
                "adapter was trained on"
            )

    def _refuse_bad_numbers(self) -> None:
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
    """scaling * B A in fp32, of a linear layer or of one expert at a time.

    PEFT stores the experts' lora_A [E*R, I] with experts slowest and lora_B [O, R*E] with experts
    fastest.
    """

    def __init__(
        self, a: torch.Tensor, b: torch.Tensor, scaling: float, shape: tuple[int, ...]
    ) -> None:
        self.scaling = scaling
        stacked = len(shape) == 3
        self.a = a.unflatten(0, (shape[0], -1)) if stacked else a
        self.b = b.unflatten(1, (-1, shape[0])).permute(2, 0, 1) if stacked else b

    def __call__(self, where: tuple[Any, ...]) -> torch.Tensor:
        """The part that `_parts` calls `where`: (), or (expert, output rows)."""
        return self.scaling * (self.b[where].float() @ self.a[where[:1]].float())


def _lora_config(folder: Path) -> "LoraConfig":
    from peft import LoraConfig, PeftConfig

    file = folder / "adapter_config.json"
    for needed in (file, folder / ADAPTER_FILE):
        if not needed.is_file():
            raise UserError(f"{needed} does not exist; give the folder of a PEFT adapter")
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
        found = name_some([f"{name}={value!r}" for name, value in other.items()])
        raise UserError(f"{folder} has {found}; only plain LoRA can be merged here: use PEFT's own")
    config.init_lora_weights = False
    config.lora_dropout = 0.0  # of training only, and PEFT refuses it on experts
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
    """By parameter: (name of its wrapper, scale) of products B A, and names of whole new tensors.

    Two stacks of one module are wrapped one in the other: `experts.lora_A` is of the outer wrapper,
    `experts.base_layer.lora_A` of the inner one.
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


def _checked(
    tensors: Iterator[tuple[str, torch.Tensor]], checkpoint: _Checkpoint, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """`tensors`, cast, with a progress bar; every one that there must be and no other, or fails."""
    missing = dict(checkpoint.official)
    for name, tensor in tqdm(tensors, "export", len(missing), unit="tensor", file=sys.stderr):
        if missing.pop(name, None) != tuple(tensor.shape):
            raise UserError(f"{name} {list(tensor.shape)} is not of this base; give its own base")
        wanted = dtype or checkpoint.dtype(name)
        cast = tensor.detach().to("cpu", wanted, copy=True).contiguous()
        if not cast.isfinite().all():
            raise UserError(
                f"{name} holds NaN or inf as {str(wanted).removeprefix('torch.')}; use another "
                "--dtype or an earlier checkpoint"
            )
        yield name, cast
    if missing:
        raise UserError(f"the model lacks {name_some(list(missing))}; give its own base")


def _write_shards(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, limit: int) -> None:
    """Fills files up to `limit` bytes, in the order in which the tensors come."""
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        file = folder / f"{len(shards)}.safetensors"
        save_file(shard, file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", file)  # safetensors lets only the owner read
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            flush()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        os.replace(folder / "0.safetensors", folder / "model.safetensors")
        return
    places = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        os.replace(folder / f"{number}.safetensors", folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@contextmanager
def _complete_or_absent(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to fill, which takes its name when it is complete.

    What an earlier run left there unfinished is removed.
    """
    aside = folder.absolute().with_name(folder.absolute().name + UNFINISHED)
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    try:
        yield aside
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
