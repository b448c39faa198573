"""Loading: what works, each bad checkpoint as one line with its remedy, and no code that is run."""

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from text_fixtures import BUNDLED
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from deepseek_moe import DeepseekForCausalLM, DeepseekTokenizer, checkpoint
from deepseek_moe.checkpoint import find_checkpoint, own_tokenizer
from deepseek_moe.decode import load as load_module
from deepseek_moe.decode.load import load
from deepseek_moe.errors import UserError

Change = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint to be broken."""
    return shutil.copytree(BUNDLED, tmp_path / "model")


def refused(model: Path | str, *said: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(str(model), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert not [words for words in said if words not in message], message
    found, _, remedy = message.partition("; ")
    assert found and remedy, f"no remedy: {message}"
    return message


def set_fields(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    old = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(old | fields), encoding="utf-8")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# --- What loads


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_whole_checkpoint_loads_ready_to_generate(dtype: str) -> None:
    model, tokenizer = load(str(BUNDLED), dtype=dtype)
    assert type(model) is DeepseekForCausalLM and type(tokenizer) is DeepseekTokenizer
    assert model.dtype == getattr(torch, dtype)
    assert not model.training


def test_the_home_folder_may_be_abbreviated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(BUNDLED.parent))
    assert find_checkpoint(f"~/{BUNDLED.name}") == BUNDLED


def test_a_sharded_checkpoint_loads_too(tmp_path: Path) -> None:
    model, tokenizer = load(str(BUNDLED), dtype="bfloat16")
    model.save_pretrained(tmp_path, max_shard_size="6MB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again, _ = load(str(tmp_path), dtype="bfloat16")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_auto_on_a_cpu_is_float32_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, _ = load(str(BUNDLED))
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    numbers = sum(x.numel() for x in load_file(BUNDLED / "model.safetensors").values())
    monkeypatch.setattr(load_module, "_free_memory", lambda device: 3 * numbers)
    assert load(str(BUNDLED), device="cpu")[0].dtype == torch.bfloat16


@pytest.mark.parametrize("content", [None, "{}"])
def test_the_tokenizer_needs_no_tokenizer_config(folder: Path, content: str | None) -> None:
    (folder / "tokenizer_config.json").unlink()
    if content:
        (folder / "tokenizer_config.json").write_text(content)
    _, tokenizer = load(str(folder))
    assert tokenizer("Hello").input_ids == own_tokenizer(BUNDLED)("Hello").input_ids
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None


# --- Arguments that are refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int8"}, "dtype int8 is unknown; use auto, float32"),
        ({"quantization": "int3"}, "quantization int3 is unknown; use int"),
        ({"device": "cuda:7"}, "device cuda:7 was asked for, but 0 GPUs were found; use cpu"),
        *(
            ({"device": device}, f"device {device} is unknown; use auto, cpu or cuda")
            for device in ("banana", "cuda:-1", "", "meta", "xpu")
        ),
    ],
)
def test_options_that_cannot_be_met(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, str], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused(BUNDLED, said, **options)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_too_little_memory(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(load_module, "_free_memory", lambda device: 1000)
    refused(BUNDLED, "GB free", "smaller model", device="cpu", dtype=dtype)


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "nothing", "~/no/such", "a/b/c"])
def test_wrong_path(path: str) -> None:
    refused(path, path, "does not exist", "give a checkpoint folder or a hub id")


@pytest.mark.parametrize("path", ["", "~no_such_user/x", "a b" * 2000], ids=["no", "~", "long"])
def test_impossible_path(path: str) -> None:
    refused(path, "folder")


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("Cannot find the files in the cache.\nCheck your connection."),
        # The HTTP library of huggingface_hub, which its versions change, has its own errors.
        HfHubHTTPError.__mro__[1]("The read operation timed out"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_hub_id_that_cannot_be_downloaded(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "snapshot_download", fail)
    refused("some-org/no-model", "some-org/no-model", "check the name and the network")


def test_download_takes_neither_pickles_nor_code(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = []

    def download(model: str, allow_patterns: list[str], cache_dir: str | None) -> str:
        wanted.extend(allow_patterns)
        return str(BUNDLED)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert find_checkpoint("some-org/model") == BUNDLED
    assert set(wanted) == {"*.json", "*.safetensors", "*.jinja"}


# --- Checkpoints that are refused


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def rename(name: str, new: str) -> Change:
    return lambda folder: (folder / name).rename(folder / new)


def fields(**changes: Any) -> Change:
    return lambda folder: set_fields(folder, **changes)


def index(content: Any) -> Change:
    def write_index(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00003.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return write_index


def pickled(name: str) -> Change:
    def replace(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(b"\x80\x04K*.")

    return replace


WEIGHTS = "model.safetensors"
SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
NO_ADAPTER = ("holds an adapter", "merge it first")
CORRUPT = (f"{WEIGHTS} is truncated or corrupt", "get it anew")
BROKEN: list[tuple[Change, tuple[str, ...]]] = [
    (remove("config.json"), ("no config.json", "Hugging Face layout")),
    *(
        (write("config.json", content), ("config.json is not JSON", "get it anew"))
        for content in (b"", b"{", b"\xff\xfe")
    ),
    *((write("config.json", content), ("config.json holds",)) for content in (b"[1]", b"null")),
    (write("config.json", b"{}"), ("holds a None model", "type deepseek")),
    (fields(model_type="other"), ("holds a other model", "type deepseek")),
    (fields(scoring_func="sigmoid"), ("scoring_func",)),
    (fields(hidden_size="wide"), ("hidden_size",)),
    (fields(num_attention_heads=0), ("num_attention_heads",)),
    (fields(quantization_config={"quant_method": "gptq", "bits": 4}), ("optimum",)),
    # transformers would read these weights unchecked, and a pickle too, if it has such a name.
    (fields(transformers_weights="adapter_model.bin"), ("take transformers_weights out",)),
    (write("adapter_config.json", b"{}"), NO_ADAPTER),
    *((write(WEIGHTS, content), CORRUPT) for content in (b"", b"\xff" * 1000, b"version https:")),
    (remove(WEIGHTS), ("safetensors", "download")),
    (rename(WEIGHTS, "other.safetensors"), (WEIGHTS, "download")),
    *((pickled(name), (name, "only safetensors are read")) for name in ("a.bin", "c.00.pth")),
    (
        index({"weight_map": {f"tensor {n}": shard for n, shard in enumerate(SHARDS)}}),
        (*SHARDS[1:], "2 of 3 weight files", "finish the download"),
    ),
    *((index(wrong), ("index", "anew")) for wrong in ([], {}, {"weight_map": {"a": 1}})),
    (remove("tokenizer.json"), ("no tokenizer.json", "original checkpoint")),
    *((write("tokenizer.json", content), ("tokenizer.json",)) for content in (b"", b"{}", b"[]")),
    *((write("tokenizer_config.json", x), ("tokenizer_config.json",)) for x in (b"", b"[]")),
]


@pytest.mark.parametrize(("change", "said"), BROKEN)
def test_a_broken_checkpoint_is_refused(folder: Path, change: Change, said: tuple[str]) -> None:
    change(folder)
    refused(folder, str(folder), *said)


def test_a_file_or_a_part_of_one_is_refused(folder: Path) -> None:
    expert, file = "model.layers.1.mlp.experts.3.up_proj.weight", folder / WEIGHTS
    refused(file, "is a file", "give the folder")
    change_weights(folder, lambda weights: weights.pop(expert))
    refused(folder, f"{expert} is missing")
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, *CORRUPT)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_weights_that_are_no_floats(
    folder: Path, dtype: torch.dtype, quantization: str | None
) -> None:
    change_weights(
        folder, lambda weights: weights.update({n: w.to(dtype) for n, w in weights.items()})
    )
    refused(folder, "is stored as", quantization=quantization)


def test_a_tokenizer_with_ids_that_the_model_has_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before the weights are read. Added tokens count."""
    monkeypatch.setattr(DeepseekForCausalLM, "from_pretrained", None)
    tokenizer = DeepseekTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder)
    refused(folder, "ids up to 4096", "ends at 4095", "vocab_size")
    set_fields(folder, vocab_size=5000)
    assert len(own_tokenizer(folder)) == 4097  # fewer than the model has is right


# --- Code beside the weights

AUTO_MAP = {
    "AutoConfig": "configuration_deepseek.DeepseekConfig",
    "AutoModel": "modeling_deepseek.DeepseekModel",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    "AutoTokenizer": [None, "tokenization_deepseek.DeepseekTokenizer"],
}


@pytest.fixture
def marker(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that code in `folder` writes if it is executed. Both configs name that code."""

    def ask(*args: Any) -> str:
        raise AssertionError("the user was asked")

    monkeypatch.setattr(builtins, "input", ask)
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'w').close()\n"
    for kind in ("configuration", "modeling", "tokenization"):
        (folder / f"{kind}_deepseek.py").write_text(code, encoding="utf-8")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code + "def generate(): pass\n")
    set_fields(folder, auto_map=AUTO_MAP)
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": AUTO_MAP}))
    return marker


@pytest.mark.parametrize("auto", [AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer])
def test_auto_classes_execute_no_code(auto: type, folder: Path, marker: Path) -> None:
    assert type(auto.from_pretrained(folder)).__module__.startswith("deepseek_moe.")
    assert not marker.exists()


def test_load_executes_no_code(folder: Path, marker: Path) -> None:
    model, tokenizer = load(str(folder))
    assert type(model) is DeepseekForCausalLM and type(tokenizer) is DeepseekTokenizer
    set_fields(folder, model_type="other")
    refused(folder, "holds a other model")
    assert not marker.exists()
