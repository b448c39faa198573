"""Configs of strangers: every field with every odd value is used as it says, or refused in a line.

The weights and the tokenizer stay whole.
"""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
from adapter_fixtures import logits
from fault_fixtures import (
    ODD,
    TEXT,
    adapter_says,
    checkpoint_says,
    equal,
    keeps_the_rule,
    make_place,
    run_finetune,
    run_program,
    use_adapter,
    write_json,
)
from safetensors.torch import load_file

from deepseek_moe import DeepseekConfig, export, prune
from deepseek_moe.checkpoint import fingerprint
from deepseek_moe.decode.load import load
from deepseek_moe.experts.profile import LayerProfile, Profile

pytestmark = pytest.mark.slow

OF_TRANSFORMERS = """
    architectures attn_implementation auto_map chunk_size_feed_forward dtype
    experts_implementation id2label is_decoder is_encoder_decoder label2id layer_types model_type
    name_or_path num_labels output_attentions output_hidden_states problem_type return_dict
    torch_dtype transformers_version transformers_weights
"""
OF_OTHERS = """
    head_dim kv_lora_rank n_group quantization_config rope_scaling rope_theta sliding_window
    rope_scaling.type rope_scaling.factor rope_parameters.rope_theta
"""
FIELDS = [*DeepseekConfig.__annotations__, *OF_TRANSFORMERS.split(), *OF_OTHERS.split()]
BESIDE = {
    "generation_config.json": """
        bos_token_id cache_implementation do_sample eos_token_id max_length max_new_tokens
        pad_token_id suppress_tokens temperature top_k top_p transformers_version
    """,
    "tokenizer_config.json": """
        add_bos_token add_eos_token added_tokens_decoder additional_special_tokens auto_map
        bos_token chat_template eos_token extra_special_tokens model_max_length pad_token
        padding_side split_special_tokens tokenizer_class unk_token
    """,
}
"""Other files of a checkpoint, and the fields of each."""
FEWER = ODD[::2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_place(tmp_path_factory.mktemp("place"))
    run_finetune(place, place, use_lora=True, lora_dropout=0.0, save_strategy="no")
    use_adapter(place, place / "merged")
    return place


def set_field(file: Path, field: str, value: Any) -> None:
    """Sets a field of a file of JSON; `a.b` is a field of an object with what it needs else."""
    fields = json.loads(file.read_text())
    name, _, inner = field.partition(".")
    if inner:
        value = {"type": "linear", "factor": 2.0, inner: value}
    file.write_bytes(write_json(fields | {name: value}))


def run_prune(base: Path, output: Path) -> None:
    scores = [0.1 * n for n in range(1, 9)]
    layers = {n: LayerProfile([1] * 8, [0.1] * 8, scores) for n in (1, 2)}
    profile = base.parent / "profile.json"
    Profile(layers, 7, fingerprint(base), "d").save(profile, overwrite=True)
    words = ("--model", base, "--profile", profile, "--keep", 4, "--output", output)
    run_program(prune, *words)


odd_values = partial(pytest.mark.parametrize, "value", ids=lambda value: ascii(value)[:12])


@odd_values(ODD)
@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_the_config(field: str, value: Any, place: Path, tmp_path: Path) -> None:
    base = shutil.copytree(place / "base", tmp_path / "base")
    set_field(base / "config.json", field, value)
    commands: dict[str, Callable[[], Any]] = {
        "base": lambda: load(str(base), device="cpu")[0],
        "run": lambda: run_finetune(place, tmp_path, dry_run=True),
        "export": lambda: run_program(export, "--model", base, "--output", tmp_path / "export"),
        "prune": lambda: run_prune(base, tmp_path / "prune"),
    }
    names = ("config.json", "give one of type deepseek", "does not hold this model")
    model, *_ = [keeps_the_rule(command, *names) for command in commands.values()]
    assert {file.name for file in tmp_path.iterdir()} <= {"profile.json", *commands}
    if model is not None:
        assert equal({"logits": logits(model)}, {"logits": checkpoint_says(base)["logits"]})


@odd_values(FEWER)
@pytest.mark.parametrize(
    ("file", "field"), [(f, x) for f, some in BESIDE.items() for x in some.split()]
)
def test_a_field_beside_it(file: str, field: str, value: Any, place: Path, tmp_path: Path) -> None:
    base, output = shutil.copytree(place / "base", tmp_path / "base"), tmp_path / "export"
    set_field(base / file, field, value)
    loaded = keeps_the_rule(lambda: load(str(base), device="cpu"), file)
    keeps_the_rule(lambda: run_program(export, "--model", base, "--output", output), file)
    if loaded:
        assert output.exists()
        assert loaded[1].encode(TEXT, add_special_tokens=False) == checkpoint_says(base)["ids"]
        load(str(output), device="cpu")


@odd_values(FEWER)
@pytest.mark.parametrize("field", sorted(peft.LoraConfig().to_dict()))
def test_a_field_of_an_adapter(field: str, value: Any, place: Path, tmp_path: Path) -> None:
    for name in ("base", "run"):
        shutil.copytree(place / name, tmp_path / name)
    set_field(tmp_path / "run" / "adapter_config.json", field, value)
    new = {"use_lora": True, "adapter": tmp_path / "run", "output_dir": tmp_path / "new"}
    names = ("adapter_config.json", "does not fit this base")
    merged = keeps_the_rule(lambda: use_adapter(tmp_path, tmp_path / "merged"), *names)
    keeps_the_rule(lambda: run_finetune(place, tmp_path, dry_run=True, **new), *names)
    assert {file.name for file in tmp_path.iterdir()} <= {"base", "run", "merged"}
    whole = load_file(place / "merged" / "model.safetensors")
    if merged is not None and not equal(merged, whole):
        assert equal(merged, adapter_says(tmp_path))
