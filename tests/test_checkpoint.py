"""Loading: what works, each bad checkpoint as one line with its remedy, and no code that is run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from text_fixtures import BUNDLED
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM, DeepseekTokenizer, checkpoint
from deepseek_moe.checkpoint import Checkpoint, find_checkpoint, own_tokenizer
from deepseek_moe.checkpoint_writer import AUTO_MAP
from deepseek_moe.decode.load import load
from deepseek_moe.errors import UserError

Change = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint to be broken."""
    return shutil.copytree(BUNDLED, tmp_path / "model")


def refused(model: Path | str, *said: str, **options: Any) -> None:
    with pytest.raises(UserError) as caught:
        load(str(model), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert not [words for words in said if words not in message], message
    found, _, remedy = message.partition("; ")
    assert found and remedy, f"no remedy: {message}"


def set_fields(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    old = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(old | fields), encoding="utf-8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_a_whole_checkpoint_loads_ready_to_generate(dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, tokenizer = load(str(BUNDLED), dtype=dtype)
    assert type(model) is DeepseekForCausalLM and type(tokenizer) is DeepseekTokenizer
    assert model.dtype == getattr(torch, dtype, torch.float32)
    assert model.device.type == "cpu" and not model.training


def test_the_home_folder_may_be_abbreviated(monkeypatch):
    monkeypatch.setenv("HOME", str(BUNDLED.parent))
    assert find_checkpoint(f"~/{BUNDLED.name}") == BUNDLED


def test_a_sharded_checkpoint_is_found_too(tmp_path):
    AutoModel.from_pretrained(BUNDLED).save_pretrained(tmp_path, max_shard_size="6MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    shutil.copy(BUNDLED / "tokenizer.json", tmp_path)
    assert find_checkpoint(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "content",
    [
        *("{", "", "[]", '"a"', "\xff", "[" * 10**5, '{"temperature": "hot"}'),
        *('{"watermarking_config": 5}', '{"compile_config": [1]}', '{"cache_implementation": "x"}'),
        *(f'{{"eos_token_id": {value}}}' for value in ('"x"', "[1, 1.5]", "true", '{"id": 1}')),
    ],
)
def test_a_broken_generation_config_is_not_left_out(content, folder):
    """The ids in it end texts, which would else go on."""
    (folder / "generation_config.json").write_text(content, encoding="latin-1")
    refused(folder, str(folder / "generation_config.json"))


@pytest.mark.parametrize("content", ["{}", '{"eos_token_id": null}', '{"eos_token_id": [5, 6]}'])
def test_a_generation_config_may_be_short_or_missing(content, folder):
    (folder / "generation_config.json").write_text(content)
    assert find_checkpoint(str(folder)) == folder
    (folder / "generation_config.json").unlink()
    assert find_checkpoint(str(folder)) == folder


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int8"}, "dtype int8 is unknown; use auto, float32"),
        ({"quantization": "int3"}, "quantization int3 is unknown; use auto, int"),
        ({"device": "cuda:7"}, "device cuda:7 was asked for, but 0 GPUs were found; use cpu"),
        *(
            ({"device": device}, f"device {device} is unknown; use auto, cpu or cuda")
            for device in ("banana", "cuda:-1", "", "meta", "xpu")
        ),
    ],
)
def test_options_that_cannot_be_met(monkeypatch, options, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused(BUNDLED, said, **options)


@pytest.mark.parametrize("path", ["/no/such/folder", "nothing", "~/no/such", "a/b/c"])
def test_a_path_that_does_not_exist(path):
    refused(path, f"{path} does not exist; give a checkpoint folder or a hub id")


@pytest.mark.parametrize("path", ["~no_such_user/x", "a b" * 2000], ids=["~", "long"])
def test_what_can_be_no_path(path):
    refused(path, "is no path", "give a checkpoint folder or a hub id")


def test_a_hub_id_that_cannot_be_downloaded(monkeypatch):
    """The HTTP library of huggingface_hub, which its versions change, has its own errors."""
    error = HfHubHTTPError.__mro__[1]("The read operation timed out.\nCheck your connection.")
    monkeypatch.setattr(checkpoint, "snapshot_download", Mock(side_effect=error))
    refused("some-org/no-model", "some-org/no-model", "check the name and the network")


def test_download_takes_neither_pickles_nor_code(monkeypatch):
    download = Mock(return_value=str(BUNDLED))
    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert find_checkpoint("some-org/model") == BUNDLED
    patterns = download.call_args.kwargs["allow_patterns"]
    assert sorted(patterns) == ["*.jinja", "*.json", "*.safetensors"]


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def rename_weights(new: str) -> Change:
    return lambda folder: (folder / WEIGHTS).rename(folder / new)


def fields(**changes: Any) -> Change:
    return lambda folder: set_fields(folder, **changes)


def index(content: Any) -> Change:
    def write_index(folder: Path) -> None:
        rename_weights(SHARDS[0])(folder)
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return write_index


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else []


NO_TOKENIZER = (
    b"",
    b"{}",
    b"[]",
    b"[" * 10**5,
    b'{"model": {"type": "BPE", "vocab": [], "merges": 5}}',
)
SIZES = ("num_hidden_layers", "n_routed_experts", "vocab_size", "hidden_size", "intermediate_size")
SIZES += ("moe_intermediate_size", "n_shared_experts")
WEIGHTS = "model.safetensors"
SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
CORRUPT = (f"{WEIGHTS} is truncated or corrupt", "get the checkpoint anew")
BROKEN: list[tuple[Change, tuple[str, ...]]] = [
    (remove("config.json"), ("no config.json", "Hugging Face layout")),
    (write("delta.json", b"{}"), ("holds only what changed", "export --model BASE --delta")),
    *(
        (write("config.json", content), ("config.json is not JSON", "get it anew"))
        for content in (b"", b"{", b"\xff\xfe", b"[" * 10**5)
    ),
    *((write("config.json", content), ("config.json holds",)) for content in (b"[1]", b"null")),
    (write("config.json", b"{}"), ("holds a None model", "type deepseek")),
    (fields(model_type="other"), ("holds a other model", "type deepseek")),
    (fields(scoring_func="sigmoid"), ("scoring_func",)),
    (fields(kv_lora_rank=512), ("kv_lora_rank is 512", "no latent attention")),
    (fields(hidden_size="wide"), ("hidden_size",)),
    (fields(tie_word_embeddings=True), ("lm_head.weight is not the embedding", "config.json")),
    (fields(a="\ud800"), ("config.json is not JSON", "surrogates", "get it anew")),
    (fields(a=nested(100)), ("config.json is not JSON", "nested", "get it anew")),
    *(
        (fields(model_type=None, architectures=[name]), (f"holds a {name} model", "type deepseek"))
        for name in (5, "DeepseekV2ForCausalLM")
    ),
    *(
        (fields(**{name: value}), ("config.json", name))
        for values, names in (
            ((0, -1, 10**30), ("vocab_size", "hidden_size", "num_attention_heads")),
            ((0, -1, 10**30), ("num_hidden_layers", "num_key_value_heads", "moe_layer_freq")),
            ((-1, float("nan"), 10**30), ("rms_norm_eps", "aux_loss_alpha", "initializer_range")),
            ((-1, float("nan"), 2), ("attention_dropout",)),
            (("x", 0, float("inf"), 10**30), ("rope_theta",)),
            ((10**9, -1, "x"), ("num_labels",)),
            (("int8", 5), ("dtype",)),
            (("x", 5), ("output_hidden_states", "output_attentions", "text_config")),
            ((False,), ("return_dict",)),
        )
        for name in names
        for value in values
    ),
    *((fields(rope_scaling={"type": "linear", "factor": x}), ("factor",)) for x in (0, "x", -1)),
    (fields(num_experts=float("inf")), ("n_routed_experts",)),
    # No file can hold these; a model would be built for ever.
    *((fields(**{name: 6 * 10**8}), ("does not hold this model",)) for name in SIZES),
    *(
        (fields(quantization_config={"quant_method": kind, "bits": 4}), (f"stored as {kind}",))
        for kind in ("gptq", "fp8", "bitsandbytes")
    ),
    # transformers would read these weights unchecked, and a pickle too, if it has such a name.
    (fields(transformers_weights="adapter_model.bin"), ("take transformers_weights out",)),
    (write("adapter_config.json", b"{}"), ("holds an adapter", "merge it first")),
    *((write(WEIGHTS, content), CORRUPT) for content in (b"", b"\xff" * 1000, b"version https:")),
    (remove(WEIGHTS), ("safetensors", "download")),
    (rename_weights("other.safetensors"), (WEIGHTS, "download")),
    *((rename_weights(name), (name, "only safetensors")) for name in ("a.bin", "c.00.pth")),
    (
        index({"weight_map": {f"tensor {n}": shard for n, shard in enumerate(SHARDS)}}),
        (*SHARDS[1:], "2 of 3 weight files", "finish the download"),
    ),
    *((index(wrong), ("index", "anew")) for wrong in ([], {}, {"weight_map": {"a": 1}})),
    (index({"weight_map": {"a": "../a.safetensors"}}), ("names '../a.safetensors'", "anew")),
    (remove("tokenizer.json"), ("no tokenizer.json", "original checkpoint")),
    *((write("tokenizer.json", content), ("tokenizer.json",)) for content in NO_TOKENIZER),
    *(
        (write(name, content), (name,))
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        for content in (b"", b"[]", b"[" * 10**5)
    ),
    *(
        (
            write("tokenizer_config.json", content),
            ("tokenizer_config.json or ",),
        )
        for content in (b'{"model_max_length": "x"}', b'{"padding_side": 5}', b'{"bos_token": 5}')
    ),
]


@pytest.mark.parametrize(("change", "said"), BROKEN)
def test_a_broken_checkpoint_is_refused(folder, change, said):
    change(folder)
    refused(folder, str(folder), *said)


def test_a_file_or_a_part_of_one_is_refused(folder):
    expert, file = "model.layers.1.mlp.experts.3.up_proj.weight", folder / WEIGHTS
    refused(file, "is a file", "give the folder")
    weights = load_file(file)
    del weights[expert]
    save_file(weights, file, metadata={"format": "pt"})
    refused(folder, f"{expert} is missing")
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, *CORRUPT)


def test_a_config_beside_other_weights_is_refused_before_a_model_is_built(folder, monkeypatch):
    monkeypatch.setattr(DeepseekForCausalLM, "__init__", None)
    DeepseekConfig().save_pretrained(folder)  # of the 16B model
    refused(folder, "does not hold this model", "the config wants [102400, 2048]")


@pytest.mark.parametrize("name", ["attn_implementation", "_experts_implementation"])
def test_a_config_does_not_say_how_the_model_is_computed(name, folder):
    """transformers would load code of that name from the hub. Methods stay, too."""
    set_fields(folder, **{name: "owner/kernel"}, is_moe_layer=5, base_model_tp_plan="x")
    config = DeepseekConfig.from_pretrained(folder)
    assert (config._attn_implementation, config._experts_implementation) == (None, None)
    assert Checkpoint(folder).config.moe_layers == [1, 2, 3, 4, 5]
    assert load(str(folder))[0].config._attn_implementation == "sdpa"


def test_a_tokenizer_with_ids_that_the_model_has_not(folder, monkeypatch):
    """It is refused before the weights are read. Added tokens count."""
    monkeypatch.setattr(DeepseekForCausalLM, "from_pretrained", None)
    tokenizer = DeepseekTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder)
    refused(folder, "ids up to 4096", "ends at 4095", "vocab_size")
    set_fields(folder, vocab_size=5000)
    assert len(own_tokenizer(folder)) == 4097  # fewer than the model has is right


@pytest.fixture
def marker(folder: Path, tmp_path: Path) -> Path:
    """The file that code in `folder` writes if it is executed. Both configs name that code."""
    marker = tmp_path / "executed"
    (folder / "custom_generate").mkdir()
    kinds = ("configuration_deepseek", "modeling_deepseek", "tokenization_deepseek")
    for name in (*kinds, "custom_generate/generate"):
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    auto_map = AUTO_MAP | {"AutoTokenizer": [None, "tokenization_deepseek.DeepseekTokenizer"]}
    set_fields(folder, auto_map=auto_map)
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    return marker


@pytest.mark.parametrize("auto", [AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer])
def test_auto_classes_execute_no_code(auto, folder, marker):
    assert type(auto.from_pretrained(folder)).__module__.startswith("deepseek_moe.")
    assert not marker.exists()


def test_load_executes_no_code(folder, marker):
    load(str(folder))
    set_fields(folder, model_type="other")
    refused(folder, "holds a other model")
    assert not marker.exists()
