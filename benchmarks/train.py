"""Tokens a second of fine-tuning beside stock transformers with PEFT and what the machine allows.

    python benchmarks/train.py                      a minute a setting, for the 16B model on an H200
    python benchmarks/train.py --only qlora         the settings with this text in their name
    python benchmarks/train.py --output_file images/train.json
    python images/draw.py                           draws images/train.png from that file

Each setting is a `finetune.py` of its own on random weights of the official configuration and
random text, with real steps of the optimizer; counted are the steps after the first four. Stock is
stock_train.py. MFU counts 6 operations a token and weight that it passes (2.6 of the 16.4 billion),
and attention's, over the measured rate of large products, and nothing for what is computed twice.
Frozen weights count as those that train, though nobody computes gradients of them, a third of it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from decode import aligned, machine, number, times
from limits import layer_numbers, product_rate
from processes import EIGHT_BITS, KEPT, LORA, QLORA, command_of, finetune, rows_file, steps_of
from random_model import ROUTERS, write_random_model, write_skewed_model
from rates import release
from tqdm import tqdm

from deepseek_moe import DeepseekConfig
from deepseek_moe.errors import UserError, exit_on_user_error
from deepseek_moe.files import check_writable, write_text

STEPS, LEAD = 8, 4  # of a run, and those of them that do not count
QLORA_16 = "--use_lora True --bits 4 --lora_r 16"


@dataclass(frozen=True)
class Setting:
    name: str
    rows: int
    length: int
    options: str
    stock: str | None = None  # what stock_train.py is to train for comparison
    skewed: bool = False  # half of the picks on 8 experts


SETTINGS = (
    Setting("full", 16, 1024, KEPT, "full"),
    Setting("full, skewed routing", 16, 1024, KEPT, None, True),
    Setting("full, experts again", 16, 1024, f"{KEPT} --recompute_experts True"),
    Setting("full, layers again", 16, 1024, ""),
    Setting("full, layers again, long", 4, 4096, ""),
    Setting("full, layers again, packed", 4, 4096, "--packing True"),
    Setting("lora r64", 16, 1024, f"{LORA} {KEPT}", "lora"),
    Setting("qlora r64, layers again", 16, 1024, QLORA),
    Setting("qlora r64, adam in 8 bits", 16, 1024, f"{QLORA} {EIGHT_BITS}"),
    Setting("qlora r64, adam in 8 bits, skewed", 16, 1024, f"{QLORA} {EIGHT_BITS}", None, True),
    Setting("qlora r64, all kept", 16, 1024, f"{QLORA} {KEPT}"),
    Setting("qlora r16, adam in 8 bits", 1, 1024, f"{QLORA_16} {EIGHT_BITS}"),
)  # fmt: skip
COLUMNS = ["tokens/s", "ms a step", "TFLOP/s", "MFU", "stock", "x stock", "GB", "stock GB"]


@dataclass
class Trained:
    """One line of the table."""

    name: str
    shape: str
    tokens_s: float | None  # None: it failed, and said why on stderr
    step_ms: float | None
    flops_s: float | None
    mfu: float | None
    gigabytes: float | None
    stock_tokens_s: float | None = None
    stock_gigabytes: float | None = None

    def cells(self) -> list[str]:
        return [
            number(self.tokens_s),
            number(self.step_ms),
            "-" if self.flops_s is None else f"{self.flops_s / 1e12:.0f}",
            "-" if self.mfu is None else f"{100 * self.mfu:.0f} %",
            number(self.stock_tokens_s),
            times(self.tokens_s, self.stock_tokens_s),
            number(self.gigabytes),
            number(self.stock_gigabytes),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="settings with this text in their name")
    parser.add_argument("--no_stock", action="store_true")
    parser.add_argument("--num_hidden_layers", type=int, default=28)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "random-moe")
    parser.add_argument("--output_file", type=Path, help="JSON, for images/draw.py")
    parser.add_argument("--overwrite", action="store_true", help="an output file that is there")
    args = parser.parse_args()
    if not any(args.only in setting.name for setting in SETTINGS):
        raise UserError(f"no setting has {args.only!r} in its name")
    if args.output_file:
        check_writable(args.output_file, args.overwrite)
    if not torch.cuda.is_available():
        print("no GPU was found; this measures one", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda")
    report = {"machine": machine(device), "operations_s": product_rate(device), "lines": []}
    release(device)
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    print(f"measured: multiplies {report['operations_s'] / 1e12:.3g} TFLOP/s (square matrices)")
    print(f"{'':28} {'rows x length':>13} {aligned(COLUMNS)}", flush=True)
    with rows_file(16 * STEPS, 6000) as data:
        for line in lines(args, data, report["operations_s"]):
            print(f"{line.name:28} {line.shape:>13} {aligned(line.cells())}", flush=True)
            report["lines"].append(asdict(line))
            if args.output_file:  # now, in case a later line fails
                write_text(args.output_file, json.dumps(report, indent=1) + "\n", overwrite=True)


def lines(args: argparse.Namespace, data: Path, operations_s: float) -> Iterator[Trained]:
    """Each as soon as it is measured."""
    config = DeepseekConfig(num_hidden_layers=args.num_hidden_layers)
    chosen = [setting for setting in SETTINGS if args.only in setting.name]
    for setting in tqdm(chosen, file=sys.stderr):
        model = args.models / f"{args.num_hidden_layers}-layers"
        if not all((model / name).exists() for name in ("config.json", ROUTERS)):
            write_random_model(model, config)
        if setting.skewed:
            plain, model = model, model.with_name(f"{model.name}-skewed")
            if not (model / ROUTERS).exists():
                write_skewed_model(model, plain)
        shape = (setting.rows, setting.length)
        printed = finetune(
            command_of(model, data, *shape, setting.options, STEPS), f"step {STEPS}/{STEPS}"
        )
        line = trained(setting, steps_of(printed), config, operations_s)
        if setting.stock and not args.no_stock:
            line.stock_tokens_s, line.stock_gigabytes = stock(model, setting)
        yield line


def trained(
    setting: Setting,
    steps: list[tuple[float, float | None]],
    config: DeepseekConfig,
    operations_s: float,
) -> Trained:
    """The line of a run that logged these steps."""
    tokens, shape = setting.rows * setting.length, f"{setting.rows} x {setting.length}"
    if len(steps) < STEPS:
        return Trained(setting.name, shape, None, None, None, None, None)
    seconds = [1 / rate for rate, _ in steps[LEAD:]]  # a token
    rate = len(seconds) / sum(seconds)
    flops = rate * token_flops(config, setting.length)
    size = max(size for _, size in steps)
    return Trained(
        setting.name, shape, rate, 1000 * tokens / rate, flops, flops / operations_s, size
    )


def token_flops(config: DeepseekConfig, length: int) -> float:
    """Operations of a token's forward and backward pass: 6 for each weight that it passes, and for
    each of the (length + 1) / 2 positions that it attends to on average."""
    numbers = [layer_numbers(config, i) for i in range(config.num_hidden_layers)]
    experts = config.num_experts_per_tok or 0
    passed = sum(n.kv + n.dense + n.small + experts * n.expert for n in numbers)
    passed += config.vocab_size * config.hidden_size
    attended = len(numbers) * 2 * config.hidden_size * (length + 1) / 2
    return 6 * (passed + attended)


def stock(model: Path, setting: Setting) -> tuple[float | None, float | None]:
    """Tokens/s and GB of stock_train.py, or None twice if it failed."""
    command = [sys.executable, str(Path(__file__).with_name("stock_train.py")), setting.stock]
    command += ["--model", str(model), "--rows", str(setting.rows), "--length", str(setting.length)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-1500:], file=sys.stderr)
        return None, None
    found = json.loads(done.stdout.strip().split("\n")[-1])
    return found["tokens_s"], found["gigabytes"]


if __name__ == "__main__":
    with exit_on_user_error():
        main()
