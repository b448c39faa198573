"""The dry run: its memory against stored bytes and measured figures; it reads no weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
from adapter_fixtures import stored_bytes
from finetune_fixtures import run
from option_fixtures import parse_arguments
from text_fixtures import BUNDLED, ROOT

from deepseek_moe import DeepseekConfig
from deepseek_moe.training.arguments import FineTuningArguments
from deepseek_moe.training.build import build_model
from deepseek_moe.training.compute.adamw_in_backward import StepInBackward
from deepseek_moe.training.dry_run import bucket_numbers, estimate, meta_model

BASE = "--data_path none --output_dir none --bf16 True --report_to none"

QLORA, LORA = "--use_lora True --bits 4 --lora_r 64", "--use_lora True --lora_r 64"
RECOMPUTE = "--gradient_checkpointing True"
IN_8_BITS = "--optim adamw_bnb_8bit"
ALL = "--single_gpu_full True"
# By benchmarks/train.py on one H200, torch 2.11, transformers 5.17, peft 0.21.2, 28 layers: rows of
# 1024 tokens a batch, options, and the most GB that PyTorch had allocated.
MEASURED = {
    "full_kept": (16, ALL, 110.8),
    "full_experts_again": (16, f"{ALL} --recompute_experts True", 95.9),
    "full_layers_again": (16, f"{ALL} {RECOMPUTE}", 71.2),
    "qlora_r16": (1, f"--use_lora True --bits 4 --lora_r 16 {RECOMPUTE} {IN_8_BITS}", 12.5),
    "lora_kept": (16, LORA, 93.0),
    "qlora": (16, f"{QLORA} {RECOMPUTE}", 27.8),
    "qlora_adam_in_8_bits": (16, f"{QLORA} {RECOMPUTE} {IN_8_BITS}", 22.0),
    "qlora_kept": (16, QLORA, 69.8),
}
# By benchmarks/multi_gpu.py on each of some H100s, the last on H200s: layers, GPUs, rows of 1024
# tokens a batch, DeepSpeed file, options, GB.
ZERO_MEASURED = {
    "qlora_zero2": (28, 1, 16, "2_no_offload", QLORA, 30.8),
    "qlora_zero2_two_gpus": (28, 2, 16, "2_no_offload", QLORA, 22.6),
    "lora_zero2": (28, 1, 16, "2_no_offload", LORA, 54.5),
    "lora_zero2_two_gpus": (28, 2, 16, "2_no_offload", LORA, 46.2),
    "zero3": (6, 1, 16, "3", "", 63.2),
    "zero3_two_gpus": (6, 2, 16, "3", "", 34.1),
    "zero3_all_layers_two_gpus": (28, 2, 1, "3", "", 138.5),
}


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Folders with the official configuration, of so many layers."""

    def folder(layers: int = 28) -> Path:
        folder = tmp_path_factory.mktemp("official")
        DeepseekConfig(num_hidden_layers=layers).save_pretrained(folder)
        return folder

    return folder


def under_deepspeed(
    training: FineTuningArguments, stage: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Makes `training` what it is under the launcher, without any process of it."""
    training.deepspeed = str(ROOT / f"configs/ds_config_zero{stage}.json")
    monkeypatch.setattr(FineTuningArguments, "world_size", property(lambda self: ranks))


@pytest.mark.parametrize("case", MEASURED)
def test_the_estimate_is_within_3_percent_of_what_was_measured(
    case: str, official: Callable[..., Path]
) -> None:
    rows, options, measured = MEASURED[case]
    model, _, training = parse_arguments(f"{BASE} {options}".split())
    memory = estimate(meta_model(official(), model), model, training, rows * 1024)
    assert abs(memory.total / 1e9 / measured - 1) < 0.03, memory


@pytest.mark.parametrize("case", ZERO_MEASURED)
def test_the_estimate_under_deepspeed(
    case: str, official: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, ranks, rows, stage, options, measured = ZERO_MEASURED[case]
    model, _, training = parse_arguments(f"{BASE} {RECOMPUTE} {options}".split())
    under_deepspeed(training, stage, ranks, monkeypatch)
    memory = estimate(meta_model(official(layers), model), model, training, rows * 1024)
    assert abs(memory.total / 1e9 / measured - 1) < 0.03, memory


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"stage": 2, "reduce_bucket_size": 2e8, "overlap_comm": True}, 4e8),
        ({"stage": 2, "reduce_bucket_size": "auto"}, 64**2),
        ({"stage": 2}, 5e8),
        ({"stage": 3}, 1e9),
    ],
)
def test_buckets_are_those_that_deepspeed_makes(settings: dict, numbers: float) -> None:
    assert bucket_numbers(settings, hidden_size=64) == numbers


def test_of_a_small_model_no_more_is_gathered_than_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _, training = parse_arguments(BASE.split())
    under_deepspeed(training, "3", 2, monkeypatch)
    memory = estimate(meta_model(BUNDLED, model), model, training, 64)
    assert 0.8e9 < memory.total < 1e9, memory  # two buckets


def test_all_weights_train_on_one_gpu_of_80_gb(official: Callable[..., Path]) -> None:
    """The official size, 16 x 1024 tokens a step."""
    model, _, training = parse_arguments(f"{BASE} {RECOMPUTE} {ALL}".split())
    memory = estimate(meta_model(official(), model), model, training, 16 * 1024)
    assert 70e9 < memory.total < 76e9, memory
    number = 16.375e9
    assert memory.weights == pytest.approx(2 * number, rel=0.001)
    assert memory.optimizer == pytest.approx(2 * (1 + 4 / 256) * number, rel=0.001)
    assert memory.gradients == 2 * 64 * 2 * 1408 * 2048  # of one gate_up_proj


def test_averages_are_those_that_are_stored() -> None:
    model, _, training = parse_arguments(f"{BASE} {ALL}".split())
    said = estimate(meta_model(BUNDLED, model), model, training, 1).optimizer
    parameters = build_model(BUNDLED, model, training).parameters()
    states = StepInBackward(parameters, lr=0.0).state.values()
    stored = sum(one.nbytes for state in states for name, one in state.items() if name != "step")
    assert said == pytest.approx(stored, rel=1e-3)  # a tensor's last block may be shorter


@pytest.mark.parametrize("options", ["", ALL, "--use_lora True", QLORA, "--use_lora True --bits 8"])
def test_weights_are_those_that_are_stored(options: str) -> None:
    """Trained and frozen, quantised or not, with the scales."""
    model, _, training = parse_arguments(f"{BASE} {options}".split())
    said = estimate(meta_model(BUNDLED, model), model, training, 1)
    stored = stored_bytes(build_model(BUNDLED, model, training))
    assert abs(said.weights / stored - 1) < 0.01


def test_more_of_everything_takes_more(official: Callable[..., Path]) -> None:
    folder = official(3)

    def total(options: str, tokens: int = 4096) -> float:
        model, _, training = parse_arguments(f"{BASE} {options}".split())
        return estimate(meta_model(folder, model), model, training, tokens).total

    plain = total(f"{QLORA} {RECOMPUTE}")
    assert plain < total(f"{QLORA} {RECOMPUTE}", 8192)
    assert plain < total(QLORA)
    assert plain < total(f"--use_lora True --bits 8 --lora_r 64 {RECOMPUTE}")
    assert plain < total(f"{LORA} {RECOMPUTE}")
    one_gpu = total(f"{ALL} {RECOMPUTE}")
    assert plain < one_gpu < total(f"--single_gpu_full False {RECOMPUTE}") / 2
    assert one_gpu < total(f"{ALL} {RECOMPUTE}", 8192)
    assert one_gpu < total(ALL)
    assert total("--use_lora True --bits 4 --lora_r 8") < total(QLORA.replace("64", "9"))
    assert plain < total(f"{QLORA} {RECOMPUTE} --modules_to_save lm_head")
    evaluated = "--eval_strategy epoch --eval_fraction 0.1 --per_device_eval_batch_size"
    assert plain == total(f"{QLORA} {RECOMPUTE} {evaluated} 1") < total(f"{QLORA} {evaluated} 64")


def test_a_dry_run_reads_no_weights_and_writes_nothing(tmp_path: Path) -> None:
    model, output = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    for file in BUNDLED.iterdir():
        if file.suffix != ".safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    # The header says what is there, for the fingerprint; every number is a hole in the file.
    weights = (BUNDLED / "model.safetensors").read_bytes()
    with (model / "model.safetensors").open("wb") as file:
        file.write(weights[: 8 + int.from_bytes(weights[:8], "little")])
        file.truncate(len(weights))
    data = ROOT / "examples/data/sample.json"
    words = f"--model_name_or_path {model} --data_path {data} --output_dir {output} {QLORA}"
    done = run([*words.split(), "--dry_run", "--show_examples", "1"], tmp_path / "log")
    assert done.code == 0, done.err
    for said in ("LoRA of rank 64 over a base in 4 bits", "routed experts", "in all", "steps"):
        assert said in done.out
    assert "User: " in done.err  # the example
    assert not output.exists()
