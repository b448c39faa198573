"""Loading: what works, and every bad checkpoint as one line with its remedy."""

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from text_fixtures import BUNDLED, tokenizer_of

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM, DeepseekTokenizer, checkpoint
from deepseek_moe.checkpoint import find_checkpoint, own_tokenizer
from deepseek_moe.decode import load as load_module
from deepseek_moe.decode.load import load
from deepseek_moe.errors import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that loads: the bundled tokenizer, a smaller model."""
    folder = tmp_path_factory.mktemp("whole")
    tokenizer = tokenizer_of(BUNDLED)
    config = DeepseekConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    DeepseekForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be broken."""
    return shutil.copytree(whole, tmp_path / "model")


def refused(model: Path | str, *said: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(str(model), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert not [words for words in said if words not in message], message
    found, _, remedy = message.partition("; ")
    assert found, message
    assert remedy, f"no remedy: {message}"
    return message


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields), encoding="utf-8")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_whole_checkpoint_loads_ready_to_generate(whole: Path) -> None:
    model, tokenizer = load(str(whole))
    assert type(model) is DeepseekForCausalLM
    assert type(tokenizer) is DeepseekTokenizer
    assert not model.training


def test_the_home_folder_may_be_abbreviated(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(whole.parent))
    assert find_checkpoint(f"~/{whole.name}") == whole


@pytest.mark.parametrize("shards", [1, 3])
def test_sharded_checkpoints_load_too(whole: Path, tmp_path: Path, shards: int) -> None:
    model, tokenizer = load(str(whole), dtype="bfloat16")
    size = sum(p.numel() * 2 for p in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size=size // shards + 5000)
    tokenizer.save_pretrained(tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards > 1)
    again, _ = load(str(tmp_path), dtype="bfloat16")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_the_one_asked_for(whole: Path, dtype: str) -> None:
    assert load(str(whole), dtype=dtype)[0].dtype == getattr(torch, dtype)


@pytest.mark.parametrize("dtype", ["int8", "float", "banana"])
def test_unknown_dtype(whole: Path, dtype: str) -> None:
    refused(whole, dtype, dtype=dtype)


def test_auto_on_a_cpu_is_float32_where_it_fits(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(str(whole), device="cpu")[0].dtype == torch.float32
    numbers = sum(x.numel() for x in load_file(whole / "model.safetensors").values())
    monkeypatch.setattr(load_module, "_free_memory", lambda device: 3 * numbers)
    assert load(str(whole), device="cpu")[0].dtype == torch.bfloat16


def test_auto_device_without_gpu_is_the_cpu(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load(str(whole))[0].device.type == "cpu"


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_gpu_asked_for_but_not_there(
    whole: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused(whole, device, "0 GPUs", "use cpu", device=device)


@pytest.mark.parametrize("device", ["banana", "cuda:-1", "", "meta", "xpu"])
def test_unknown_or_useless_device(whole: Path, device: str) -> None:
    refused(whole, f"device {device}", "cpu or cuda", device=device)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_too_little_memory(whole: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(load_module, "_free_memory", lambda device: 1000)
    refused(whole, "GB free", "smaller model", device="cpu", dtype=dtype)


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./nothing", "../nothing/here", "nothing", "~/no/such", "a/b/c"]
)
def test_wrong_path(path: str) -> None:
    refused(path, path, "does not exist", "give a checkpoint folder or a hub id")


@pytest.mark.parametrize("path", ["", "~no_such_user/x", "a b" * 2000], ids=["no", "~", "long"])
def test_impossible_path(path: str) -> None:
    refused(path, "folder")


def unreachable(*args: Any, **kwargs: Any) -> None:
    raise LocalEntryNotFoundError("Cannot find the files in the cache.\nCheck your connection.")


def not_on_the_hub(*args: Any, **kwargs: Any) -> None:
    response = SimpleNamespace(headers={}, request=None)
    raise HfHubHTTPError("404 Client Error.", response=response)


def impossible_id(*args: Any, **kwargs: Any) -> None:
    raise HFValidationError("Repo id must be in the form 'namespace/name'")


def cut_off(*args: Any, **kwargs: Any) -> None:
    # huggingface_hub's HTTP library, which is not the same in all its versions, has its own errors.
    http_error = HfHubHTTPError.__mro__[1]
    raise http_error("The read operation timed out")


@pytest.mark.parametrize("fails", [unreachable, not_on_the_hub, impossible_id, cut_off])
def test_hub_id_that_cannot_be_downloaded(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[..., None]
) -> None:
    monkeypatch.setattr(checkpoint, "snapshot_download", fails)
    refused("some-org/no-model", "some-org/no-model", "check the name and the network")


def test_download_takes_neither_pickles_nor_code(
    monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    wanted = []

    def download(model: str, allow_patterns: list[str], cache_dir: str | None) -> str:
        wanted.extend(allow_patterns)
        return str(whole)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert find_checkpoint("some-org/model") == whole
    assert set(wanted) == {"*.json", "*.safetensors", "*.jinja"}


def test_file_instead_of_folder(folder: Path) -> None:
    refused(folder / "model.safetensors", "is a file", "give the folder")


def test_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "no config.json", "Hugging Face layout")


@pytest.mark.parametrize("content", [b"", b"{", b"<html>", b"\xff\xfe"])
def test_config_that_is_not_json(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    refused(folder, "config.json is not JSON", "get it anew")


@pytest.mark.parametrize("content", ["[1]", "3", '"text"', "null", "{}"])
def test_config_that_describes_nothing(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    refused(folder, str(folder))


@pytest.mark.parametrize(
    ("field", "value"),
    [("scoring_func", "sigmoid"), ("hidden_size", "wide"), ("num_attention_heads", 0)],
)
def test_config_with_an_impossible_field_names_it(folder: Path, field: str, value: Any) -> None:
    change_config(folder, **{field: value})
    refused(folder, field)


def test_quantised_checkpoint_without_its_library(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, "optimum")


def test_truncated_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, "model.safetensors is truncated or corrupt", "get it anew")


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 1000, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"]
)
def test_weights_with_a_corrupt_header(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, "model.safetensors is truncated or corrupt", "get it anew")


def index(folder: Path, files: Any) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00003.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(files), encoding="utf-8")


def test_missing_shards(folder: Path) -> None:
    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    index(folder, {"weight_map": {f"tensor {n}": shard for n, shard in enumerate(shards)}})
    refused(folder, shards[1], shards[2], "2 of 3 weight files", "finish the download")


@pytest.mark.parametrize("content", [[], {}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_index_that_is_none(folder: Path, content: Any) -> None:
    index(folder, content)
    refused(folder, "index", "get it anew")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "safetensors", "download")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_not_opened(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04K*.")
    refused(folder, name, "pickle", "only safetensors are read")


@pytest.mark.parametrize("name", ["adapter_model.bin", "other.safetensors"])
def test_weights_that_the_config_names_are_not_read(folder: Path, name: str) -> None:
    """transformers would, unchecked, and of this name a pickle too."""
    torch.save({"model.norm.weight": torch.zeros(16)}, folder / name)
    change_config(folder, transformers_weights=name)
    refused(folder, name, "take transformers_weights out")


def test_an_adapter_beside_a_model(folder: Path) -> None:
    """transformers would add it."""
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "holds an adapter", "merge it first")


def test_weights_under_another_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    refused(folder, "model.safetensors")


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.3.up_proj.weight"]
)
def test_missing_tensor_is_named(folder: Path, name: str) -> None:
    change_weights(folder, lambda weights: weights.pop(name))
    refused(folder, f"{name} is missing")


def test_surplus_tensor_is_named(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update(surplus=torch.zeros(2)))
    refused(folder, "surplus")


def test_misshapen_tensor_is_named(folder: Path) -> None:
    wrong = {"model.norm.weight": torch.zeros(3)}
    change_weights(folder, lambda weights: weights.update(wrong))
    refused(folder, "model.norm.weight", "3", "16")


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn], ids=str)
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
    """Refused before the weights are read; an added token counts."""
    monkeypatch.setattr(DeepseekForCausalLM, "from_pretrained", None)
    tokenizer = DeepseekTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder)
    said = ("ids up to 4096", "ends at 4095", "vocab_size")
    refused(folder, *said)
    with pytest.raises(UserError, match="ids up to 4096"):
        own_tokenizer(folder)
    change_config(folder, vocab_size=5000)
    assert len(own_tokenizer(folder)) == 4097  # fewer than the model has is right


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_tokenizer_of_which_no_file_says_more(
    whole: Path, folder: Path, content: str | None
) -> None:
    (folder / "tokenizer_config.json").unlink()
    if content:
        (folder / "tokenizer_config.json").write_text(content)
    _, tokenizer = load(str(folder))
    assert tokenizer("Hello").input_ids == own_tokenizer(whole)("Hello").input_ids
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refused(folder, "no tokenizer.json", "original checkpoint")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("tokenizer.json", content) for content in ("", '{"version": ', "{}", "[]")),
        *(("tokenizer_config.json", content) for content in ("", '{"version": ', "[]")),
    ],
)
def test_corrupt_tokenizer_is_named(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    refused(folder, name)


AUTO_MAP = {
    "AutoConfig": "strange.StrangeConfig",
    "AutoModelForCausalLM": "strange.StrangeModel",
    "AutoTokenizer": [None, "strange.StrangeTokenizer"],
}


@pytest.fixture
def marker(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that code beside the weights writes when it is executed."""

    def ask(*args: Any) -> str:
        raise AssertionError("the user was asked")

    monkeypatch.setattr(builtins, "input", ask)
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    marker = tmp_path / "executed"
    (folder / "strange.py").write_text(f"open({str(marker)!r}, 'w').close()\n", encoding="utf-8")
    return marker


@pytest.mark.parametrize("model_type", ["other", None])
def test_code_of_an_unknown_architecture_is_not_executed(
    folder: Path, marker: Path, model_type: str | None
) -> None:
    change_config(folder, model_type=model_type, auto_map=AUTO_MAP)
    message = refused(folder, f"holds a {model_type} model", "type deepseek")
    assert not marker.exists(), message


def test_code_beside_this_architecture_is_not_executed(folder: Path, marker: Path) -> None:
    change_config(folder, auto_map=AUTO_MAP)
    model, _ = load(str(folder))
    assert type(model) is DeepseekForCausalLM
    assert not marker.exists()


def test_code_of_a_tokenizer_is_not_executed(folder: Path, marker: Path) -> None:
    file = folder / "tokenizer_config.json"
    fields = json.loads(file.read_text(encoding="utf-8")) | {"auto_map": AUTO_MAP}
    file.write_text(json.dumps(fields), encoding="utf-8")
    _, tokenizer = load(str(folder))
    assert type(tokenizer) is DeepseekTokenizer
    assert not marker.exists()
