"""How fast is fine-tuning, beside stock transformers with PEFT and what the machine allows?

    python benchmarks/train.py                      a minute a setting, for the 16B model on an H200
    python benchmarks/train.py --only QLoRA         the settings in which a word begins so
    python benchmarks/train.py --only rows --data_path train.jsonl   batches of 16 rows of a file
    python benchmarks/train.py --output_file images/train.json
    python images/plots.py                          draws images/train.png from that file

Each setting is a `finetune.py` of its own on random weights of the official configuration and
random text, with real steps of the optimizer; the first four do not count, and one more is
profiled: device_ms is the part of it in which the GPU was at work, and launches is how often the
host started something there. Stock is what
transformers and PEFT do by themselves with layers recomputed; it stands beside settings that do so.
MFU counts 6 operations for each weight that a token passes (2.6 of the 16.4 billion), and those of
attention, over the measured rate of large products. It counts nothing for what is computed twice.
Frozen weights count as those that train, though their gradients, a third of it, are not computed.
Chosen experts are random ones, so many in each layer, whose full weights train.
"""

import argparse
import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

import finetune_runs as runs
import torch
from limits import product_rate, training_flops
from peft import LoraConfig, get_peft_model
from tables import DEVICE, Row, ratio
from timing import release, seconds_of

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM
from deepseek_moe.errors import exit_on_user_error
from deepseek_moe.experts.choose import choice_as_text
from deepseek_moe.training.arguments import ALL_LINEARS, split_commas
from deepseek_moe.training.trainable import EXPERT_PARAMETERS


class Setting(NamedTuple):
    rows: int
    length: int
    options: str
    stock: str | None = None  # the method that transformers trains by for comparison
    share: float = 0.0  # of the experts, if only some of them train
    yours: bool = False  # rows of --data_path, of at most `length` tokens


MANY = 160  # steps over rows of many lengths: most shapes have come twice after three quarters
NO_GRAPHS = "--cuda_graphs False"
SETTINGS = {
    "all weights, everything kept": Setting(16, 1024, runs.KEPT),
    "all weights, skewed routing": Setting(16, 1024, runs.KEPT),
    "all weights, experts recomputed": Setting(16, 1024, f"{runs.KEPT} --recompute_experts True"),
    "all weights, layers recomputed": Setting(16, 1024, "", "full"),
    "all weights, layers recomputed, long": Setting(4, 4096, ""),
    "all weights, layers recomputed, packed": Setting(4, 4096, "--packing True"),
    "LoRA r64, everything kept": Setting(16, 1024, f"{runs.LORA} {runs.KEPT}"),
    "LoRA r64, layers recomputed": Setting(16, 1024, runs.LORA, "lora"),
    "QLoRA r64, layers recomputed": Setting(16, 1024, runs.QLORA),
    "QLoRA r64, layers recomputed, 8-bit Adam": Setting(16, 1024, runs.QLORA_8BIT_ADAM),
    "QLoRA r64, layers recomputed, skewed routing": Setting(16, 1024, runs.QLORA_8BIT_ADAM),
    "QLoRA r64, everything kept": Setting(16, 1024, f"{runs.QLORA} {runs.KEPT}"),
    "QLoRA r16, layers recomputed, 8-bit Adam": Setting(1, 1024, runs.QLORA_16_8BIT_ADAM),
    "QLoRA r16, layers recomputed, no graphs": Setting(1, 1024, f"{runs.QLORA_16} {NO_GRAPHS}"),
    "QLoRA r16, everything kept": Setting(1, 1024, f"{runs.QLORA_16} {runs.KEPT}"),
    "LoRA r16, everything kept": Setting(1, 1024, f"{runs.LORA_16} {runs.KEPT}"),
    "LoRA r16, everything kept, no graphs": Setting(
        1, 1024, f"{runs.LORA_16} {runs.KEPT} {NO_GRAPHS}"
    ),
    "QLoRA r16, rows of --data_path": Setting(16, 1024, runs.QLORA_16, yours=True),
    "QLoRA r16, rows of --data_path, no graphs": Setting(
        16, 1024, f"{runs.QLORA_16} {NO_GRAPHS}", yours=True
    ),
    "QLoRA r16, rows of --data_path, everything kept": Setting(
        16, 1024, f"{runs.QLORA_16} {runs.KEPT}", yours=True
    ),
    "LoRA r16, rows of --data_path": Setting(16, 1024, runs.LORA_16, yours=True),
    "LoRA r16, rows of --data_path, everything kept": Setting(
        16, 1024, f"{runs.LORA_16} {runs.KEPT}", yours=True
    ),
    "QLoRA r16, experts offloaded, layers recomputed": Setting(8, 1024, runs.OFFLOADED),
    "QLoRA r16, experts offloaded, 1 x 1024": Setting(1, 1024, runs.OFFLOADED),
    "chosen experts 0.1, everything kept": Setting(16, 1024, runs.KEPT, share=0.1),
    "chosen experts 0.25, everything kept": Setting(16, 1024, runs.KEPT, share=0.25),
    "chosen experts 0.5, everything kept": Setting(16, 1024, runs.KEPT, share=0.5),
    "chosen experts 0.1, layers recomputed": Setting(16, 1024, "", share=0.1),
    "chosen experts 0.25, layers recomputed": Setting(16, 1024, "", share=0.25),
    "chosen experts 0.5, layers recomputed": Setting(16, 1024, "", share=0.5),
    "chosen experts 0.1, layers recomputed, fp32": Setting(16, 1024, runs.FP32_ADAM, share=0.1),
    "chosen experts 0.25 over 4 bits, layers recomputed": Setting(16, 1024, "--bits 4", share=0.25),
}


def main() -> None:
    parser = runs.make_settings_parser(__doc__)
    parser.add_argument("--data_path", type=Path, help="rows for the settings that take them")
    parser.add_argument("--stock", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stock:
        method, model, rows, length = args.stock
        print(json.dumps(train_stock(method, model, int(rows), int(length))))
        return
    operations_s = product_rate()
    print(f"measured: multiplies {operations_s / 1e12:.3g} TFLOP/s (square matrices)", flush=True)
    release()
    settings = {name: one for name, one in SETTINGS.items() if args.data_path or not one.yours}
    measure = partial(measured, operations_s, args.data_path)
    runs.measure_settings(args, "lines", settings, measure, operations_s=operations_s)


def measured(
    operations_s: float, yours: Path | None, setting: Setting, model: Path, data: Path
) -> Row:
    """A row of a setting; a run that failed leaves None, and says why on stderr."""
    rows, length, stock = setting.rows, setting.length, setting.stock
    steps, uncounted = (MANY, 3 * MANY // 4) if setting.yours else (runs.STEPS, runs.UNCOUNTED)
    data = yours.resolve() if setting.yours else data
    step, printed = runs.profiled(command_of(setting, model, data, steps + 1))
    speed, size = runs.speed_and_gigabytes(printed, steps, uncounted)
    theirs = measured_stock(stock, model, rows, length) if stock else {}
    limit = operations_s / training_flops(DeepseekConfig.from_pretrained(model), length)
    return {
        "shape": f"{rows} x {length}",
        "tokens_s": speed,
        "step_ms": None if setting.yours else ratio(1000 * rows * length, speed),
        "device_ms": step.get("device_ms"),
        "launches": step.get("launches"),
        "mfu": ratio(speed, limit),
        "gigabytes": size,
        "stock_tokens_s": theirs.get("tokens_s"),
        "stock_gigabytes": theirs.get("gigabytes"),
        "x_stock": ratio(speed, theirs.get("tokens_s")),
    }


def command_of(setting: Setting, model: Path, data: Path, steps: int) -> str:
    """Options of finetune.py for some steps in a setting."""
    options = setting.options
    if setting.share:
        choice = write_choice(model, data.with_name("choice.json"), setting.share)
        options += f" --train_experts {choice}"
    return runs.command_of(model, data, setting.rows, setting.length, options, steps)


def write_choice(model: Path, file: Path, share: float) -> Path:
    """Writes a file for --train_experts that names random experts in each layer of `model`."""
    config, random = DeepseekConfig.from_pretrained(model), Random(0)
    E = config.n_routed_experts
    count = round(share * E)
    chosen = {layer: sorted(random.sample(range(E), count)) for layer in config.moe_layers}
    file.write_text(choice_as_text(chosen))
    return file


def measured_stock(method: str, model: Path, rows: int, length: int) -> dict[str, float]:
    """What `train_stock` finds in a process of its own; empty if it failed."""
    words = ["--stock", method, model, rows, length]
    command = [sys.executable, __file__, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-1500:], file=sys.stderr)
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def train_stock(method: str, folder: str, rows: int, length: int) -> dict[str, float]:
    """Tokens/s of the median step of transformers and PEFT, and the most GB allocated.

    The experts are transformers' "grouped_mm", adapters of rank 64 are on all linear layers and
    experts. Method "full" takes no steps, because Adam's states of 16B weights would not fit.
    """
    options = {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm"}
    options |= {"dtype": torch.bfloat16, "device_map": {"": str(DEVICE)}}
    model = DeepseekForCausalLM.from_pretrained(folder, **options).train()
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = None
    if method == "lora":
        model.enable_input_require_grads()
        places = {"target_modules": split_commas(ALL_LINEARS)}
        places["target_parameters"] = list(EXPERT_PARAMETERS)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=64, **places))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def step() -> None:
        ids = torch.randint(model.config.vocab_size, (rows, length), device=DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer:
            optimizer.step()
        model.zero_grad()

    torch.manual_seed(0)
    seconds = [seconds_of(step) for _ in range(runs.STEPS)][runs.UNCOUNTED :]
    size = torch.cuda.max_memory_allocated() / 1e9  # 0 on a CPU
    return {"tokens_s": rows * length / statistics.median(seconds), "gigabytes": size}


if __name__ == "__main__":
    with exit_on_user_error():
        main()
