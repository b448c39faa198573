"""The dry run: its memory against stored bytes and measured figures; it reads no weights."""

from pathlib import Path

import pytest
from adapter_fixtures import stored_bytes
from finetune_fixtures import run
from option_fixtures import parse
from text_fixtures import BUNDLED, ROOT

from deepseek_moe import DeepseekConfig
from deepseek_moe.training.arguments import FineTuningArguments
from deepseek_moe.training.build import build_model
from deepseek_moe.training.compute.adamw_in_backward import StepInBackward
from deepseek_moe.training.dry_run import meta_model, print_dry_run
from deepseek_moe.training.memory_need import Memory, bucket_numbers, estimate
from deepseek_moe.training.offload import HostStack

BASE = "--bf16 True --report_to none"

LORA, QLORA = "--use_lora True --lora_r 64", "--use_lora True --bits 4 --lora_r 64"
QLORA_16 = "--use_lora True --bits 4 --lora_r 16"
OFFLOADED = "--offload_experts True"
RECOMPUTE = "--gradient_checkpointing True"
NO_GRAPHS = "--cuda_graphs False"
IN_8_BITS = "--optim adamw_bnb_8bit"
ALL = "--single_gpu_full True"
# Most GB that PyTorch had allocated: layers, GPUs, rows of 1024 tokens a batch, DeepSpeed file,
# options. Without DeepSpeed by benchmarks/train.py on one H200 (torch 2.11, transformers 5.17, peft
# 0.21.2), else by benchmarks/multi_gpu.py on each of some H100s, the last on H200s.
MEASURED = {
    "full_kept": (28, 1, 16, "", ALL, 110.8),
    "full_experts_again": (28, 1, 16, "", f"{ALL} --recompute_experts True", 95.9),
    "full_layers_again": (28, 1, 16, "", f"{ALL} {RECOMPUTE}", 71.2),
    "qlora_r16": (28, 1, 1, "", f"{QLORA_16} {RECOMPUTE} {IN_8_BITS} {NO_GRAPHS}", 12.5),
    "qlora_r16_replayed": (28, 1, 1, "", f"{QLORA_16} {RECOMPUTE} {IN_8_BITS}", 12.8),
    "qlora_r16_kept_replayed": (28, 1, 1, "", QLORA_16, 16.9),
    "lora_r16_kept_replayed": (28, 1, 1, "", "--use_lora True --lora_r 16", 39.9),
    "lora_kept": (28, 1, 16, "", LORA, 87.9),
    "qlora_kept": (28, 1, 16, "", QLORA, 64.6),
    "qlora": (28, 1, 16, "", f"{QLORA} {RECOMPUTE}", 27.8),
    "qlora_adam_in_8_bits": (28, 1, 16, "", f"{QLORA} {RECOMPUTE} {IN_8_BITS}", 22.0),
    "qlora_zero2": (28, 1, 16, "2_no_offload", f"{QLORA} {RECOMPUTE}", 30.8),
    "qlora_zero2_two_gpus": (28, 2, 16, "2_no_offload", f"{QLORA} {RECOMPUTE}", 22.6),
    "lora_zero2": (28, 1, 16, "2_no_offload", f"{LORA} {RECOMPUTE}", 54.5),
    "lora_zero2_two_gpus": (28, 2, 16, "2_no_offload", f"{LORA} {RECOMPUTE}", 46.2),
    "zero3": (6, 1, 16, "3", RECOMPUTE, 63.2),
    "zero3_two_gpus": (6, 2, 16, "3", RECOMPUTE, 34.1),
    "zero3_all_layers_two_gpus": (28, 2, 1, "3", RECOMPUTE, 138.5),
}


def estimate_of(folder: Path, options: str, tokens: int) -> Memory:
    model, _, training = parse(f"{BASE} {options}")
    return estimate(meta_model(folder, model), model, training, tokens)


def be_under_deepspeed(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under its launcher, without any process of it."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(FineTuningArguments, "world_size", property(lambda self: ranks))


@pytest.mark.parametrize("case", MEASURED)
def test_the_estimate_is_within_3_percent_of_what_was_measured(case, tmp_path, monkeypatch):
    layers, ranks, rows, stage, options, measured = MEASURED[case]
    if stage:
        be_under_deepspeed(ranks, monkeypatch)
        options += f" --deepspeed {ROOT}/configs/ds_config_zero{stage}.json"
    DeepseekConfig(num_hidden_layers=layers).save_pretrained(tmp_path)  # else the official one
    memory = estimate_of(tmp_path, options, rows * 1024)
    assert abs(memory.total / 1e9 / measured - 1) < 0.03, memory


def test_buckets_are_those_that_deepspeed_makes():
    overlapping = {"stage": 2, "reduce_bucket_size": 2e8, "overlap_comm": True}
    assert bucket_numbers(overlapping, hidden_size=64) == 4e8
    assert bucket_numbers({"stage": 2, "reduce_bucket_size": "auto"}, hidden_size=64) == 64**2
    assert bucket_numbers({"stage": 2}, hidden_size=64) == 5e8
    assert bucket_numbers({"stage": 3}, hidden_size=64) == 1e9


def test_of_a_small_model_no_more_is_gathered_than_there_is(monkeypatch):
    be_under_deepspeed(2, monkeypatch)
    memory = estimate_of(BUNDLED, f"--deepspeed {ROOT}/configs/ds_config_zero3.json", 64)
    assert 0.8e9 < memory.total < 1e9, memory  # two buckets


CHOSEN = "--train_experts x"
STORED = ["", ALL, "--use_lora True", QLORA, f"{QLORA} {OFFLOADED}", "--use_lora True --bits 8"]
STORED += [
    f"{CHOSEN} --bf16 False",
    CHOSEN,
    f"{CHOSEN} {ALL}",
    f"{CHOSEN} --bits 4",
    f"{CHOSEN} --bits 4 {ALL}",
]


@pytest.mark.parametrize("options", STORED)
def test_weights_and_averages_are_those_that_are_stored(options):
    """Trained and frozen, quantised or not, with the scales."""
    model, _, training = parse(f"{BASE} {options}")
    model.chosen_experts = {2: [1, 5, 9], 4: list(range(0, 24, 2))} if CHOSEN in options else None
    said = estimate(meta_model(BUNDLED, model), model, training, 1)
    built = build_model(BUNDLED, model, training)
    trained = [parameter for parameter in built.parameters() if parameter.requires_grad]
    places = {p.untyped_storage().data_ptr() for p in built.parameters() if not p.requires_grad}
    twice = sum(p.nbytes for p in trained if p.untyped_storage().data_ptr() in places)
    host = sum(stack.nbytes for stack in built.parameters() if isinstance(stack, HostStack))
    assert bool(host) == (OFFLOADED in options) and said.host == host
    assert said.weights == pytest.approx(stored_bytes(built) - twice - host, rel=0.01)
    if CHOSEN in options:
        each = 2 if training.single_gpu_full else 8
        assert said.optimizer == pytest.approx(each * sum(p.numel() for p in trained), rel=0.02)
    if options == ALL:
        states = StepInBackward(built.parameters(), lr=0.0).state.values()
        stored = sum(x.nbytes for state in states for name, x in state.items() if name != "step")
        assert said.optimizer == pytest.approx(stored, rel=1e-3)  # the last blocks may be shorter
        assert said.gradients == max(parameter.nbytes for parameter in built.parameters())


def test_offloaded_experts_leave_the_gpu_but_for_two_buffers(tmp_path):
    DeepseekConfig().save_pretrained(tmp_path)  # the official one
    options = f"{QLORA_16} {RECOMPUTE} {IN_8_BITS}"
    there = estimate_of(tmp_path, f"{options} {NO_GRAPHS}", 1024)
    host = estimate_of(tmp_path, f"{options} {OFFLOADED}", 1024)
    packed = 27 * 64 * 3 * 2048 * 1408 / 2
    assert (there.host, host.host) == (0, packed)
    assert there.total - host.total == pytest.approx(packed - 2 * packed / 27)


@pytest.mark.parametrize(
    ("options", "free", "said"),
    [
        (f"{QLORA_16} {RECOMPUTE} {IN_8_BITS}", 14, "it fits"),
        (
            f"{QLORA_16} {RECOMPUTE} {IN_8_BITS}",
            7.5,
            "with --offload_experts True it would: 5.4 GB and 7.5 GB of host memory",
        ),
        (
            "--use_lora True --lora_r 16",
            7.5,
            "with --bits 4 --offload_experts True --gradient_checkpointing True it would: 6.",
        ),
        (f"{QLORA_16} {OFFLOADED} {IN_8_BITS}", 7.5, "with --gradient_checkpointing True it would"),
        (f"{QLORA_16} {OFFLOADED} {RECOMPUTE}", 6, "with --optim adamw_bnb_8bit it would: 5.4 GB"),
        (QLORA_16, 2, "use a smaller batch or fewer tokens"),
        (ALL, 60, "use a smaller batch or fewer tokens"),
    ],
)
def test_a_gpu_that_is_too_small_gets_advice(options, free, said, tmp_path, monkeypatch, capsys):
    DeepseekConfig().save_pretrained(tmp_path)
    model, _, training = parse(f"{BASE} {options} --per_device_train_batch_size 1")
    network = meta_model(tmp_path, model)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free * 1e9, 80e9))
    print_dry_run(network, tmp_path, model, training, [1024], "")
    assert said in capsys.readouterr().out.splitlines()[-1]


def test_more_of_everything_takes_more(tmp_path):
    DeepseekConfig(num_hidden_layers=3).save_pretrained(tmp_path)
    qlora, evaluated = f"{QLORA} {RECOMPUTE}", "--eval_strategy epoch --eval_fraction 0.1"
    plain, in_8_bits, saved, small, large = (
        estimate_of(tmp_path, options, 4096).total
        for options in (
            *(qlora, qlora.replace("--bits 4", "--bits 8"), f"{qlora} --modules_to_save lm_head"),
            *(f"{qlora} {evaluated} --per_device_eval_batch_size {size}" for size in (1, 64)),
        )
    )
    assert small == plain < min(in_8_bits, saved, large)


def test_a_dry_run_reads_no_weights_and_writes_nothing(tmp_path):
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
