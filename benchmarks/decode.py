"""Tokens a second of the engine beside stock transformers and what the machine allows, in one run.

    python benchmarks/random_model.py --output /tmp/random-16b
    python benchmarks/decode.py --model /tmp/random-16b --output_file images/decode.json
    python images/draw.py                   draws images/decode.png from that file

About four minutes for the 16B model on an H200. The first part starts other processes, which need
the GPU for themselves. The limit of decoding is the bytes that a step must read over the measured
bandwidth, that of prefill the operations over the measured rate of products (limits.py).
"""

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from limits import distinct_experts, product_rate, prompt_flops, read_bandwidth, step_bytes
from rates import (
    LEAD,
    chosen_experts,
    decode_seconds,
    or_no_memory,
    prefill_seconds,
    random_prompts,
    release,
    stock_decode_seconds,
    stock_prefill_seconds,
)
from start import describe, largest_file, starts

from deepseek_moe.decode.generation import Generator
from deepseek_moe.decode.load import load
from deepseek_moe.errors import UserError, exit_on_user_error
from deepseek_moe.files import BUNDLED_MODEL, check_writable, write_text
from deepseek_moe.kernels.int_weights import BITS

PARTS = ("start", "prefill", "stock", "quantization")  # that --skip leaves out
Figure = float | str | None
"""What was measured, NO_MEMORY, or None: not measured."""


@dataclass
class Decoded:
    """One line of the table of decoding; tokens/s of all sequences together."""

    weights: str
    weights_bytes: int
    batch_size: int
    tokens_s: Figure
    stock_tokens_s: Figure
    unpacked_tokens_s: Figure  # of this run, for packed weights
    limit_tokens_s: float
    experts: Figure  # that the tokens of a step chose together, mean over the layers
    experts_expected: float

    def cells(self) -> list[str]:
        step = quotient(1000 * self.batch_size, self.tokens_s)
        return [
            self.weights,
            f"{self.weights_bytes / 1e9:.2f}",
            str(self.batch_size),
            number(self.tokens_s),
            "-" if step is None else f"{step:.3f}",
            number(self.stock_tokens_s),
            times(self.tokens_s, self.stock_tokens_s),
            times(self.tokens_s, self.unpacked_tokens_s),
            number(self.limit_tokens_s),
            percent(self.tokens_s, self.limit_tokens_s),
            number(self.experts),
            number(self.experts_expected),
        ]


@dataclass
class Prefilled:
    """One line of the table of prefill."""

    prompts: int
    length: int
    tokens_s: Figure
    stock_tokens_s: Figure
    limit_tokens_s: float

    def cells(self) -> list[str]:
        return [
            f"{self.prompts} x {self.length}",
            number(self.tokens_s),
            number(self.stock_tokens_s),
            times(self.tokens_s, self.stock_tokens_s),
            number(self.limit_tokens_s),
            percent(self.tokens_s, self.limit_tokens_s),
        ]


TABLES = {
    Decoded: (
        "decode, tokens/s of all sequences together: prompts of {prompt_tokens} tokens, "
        "{new_tokens} new ones\n(experts: of a layer, chosen by the tokens of a step; expected of "
        "even choice)",
        ["weights", "GB", "batch", "project", "ms a step", "stock", "x stock", "x unpacked",
         "limit", "of limit", "experts", "expected"],
    ),
    Prefilled: (
        "prefill, tokens/s",
        ["prompts", "project", "stock", "x stock", "limit", "of limit"],
    ),
}  # fmt: skip
WIDTH = 10


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    if device.index:
        torch.cuda.set_device(device)  # on which kernels are launched
    report: dict[str, Any] = {
        "machine": machine(device),
        "command": f"python {shlex.join(sys.argv)}",
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
    }
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    print(report["command"], flush=True)
    if "start" not in args.skip:
        report["start"] = []
        print("\nstart, seconds since the process began", flush=True)
        try:
            for start in starts(args.model, args.device):
                largest = largest_file(args.model)
                report["start"].append(asdict(start) | {"largest_file": largest})
                print(f"{start.triton_cache} Triton cache: {describe(start, largest)}", flush=True)
        except UserError as error:  # the rest can still be measured
            print(error, flush=True)
    report["bytes_s"], report["operations_s"] = read_bandwidth(device), product_rate(device)
    release(device)
    print(
        f"\nmeasured: reads {report['bytes_s'] / 1e12:.3g} TB/s (matrix times vector), "
        f"multiplies {report['operations_s'] / 1e12:.3g} TFLOP/s (square matrices)",
        flush=True,
    )
    for line in lines(args, device, report["bytes_s"], report["operations_s"]):
        kind = {Decoded: "decode", Prefilled: "prefill"}[type(line)]
        if kind not in report:
            title, columns = TABLES[type(line)]
            print(f"\n{title.format(**report)}\n{aligned(columns)}")
        report.setdefault(kind, []).append(asdict(line))
        print(aligned(line.cells()), flush=True)
        if args.output_file:  # now, in case a later line fails
            write_text(args.output_file, json.dumps(report, indent=1) + "\n", overwrite=True)


def parse_arguments() -> argparse.Namespace:
    """The options, `prefill` as pairs of numbers.

    Raises:
        UserError: a value that cannot be measured.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(BUNDLED_MODEL), help="a folder or a hub id")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--quantized_batch_sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=200)
    parser.add_argument(
        "--prefill", nargs="+", default=["1x4096", "16x512"], help="prompts x tokens of each"
    )
    parser.add_argument("--skip", default="", help=f"parts to leave out: {','.join(PARTS)}")
    parser.add_argument("--output_file", type=Path, help="JSON, for images/draw.py")
    parser.add_argument("--overwrite", action="store_true", help="an output file that is there")
    args = parser.parse_args()
    args.skip = [part for part in args.skip.split(",") if part]
    unknown = sorted(set(args.skip) - set(PARTS))
    if unknown:
        raise UserError(f"--skip names {unknown[0]}; it can leave out {', '.join(PARTS)}")
    if args.new_tokens < LEAD + 2:
        raise UserError(f"new_tokens is {args.new_tokens}; only {LEAD + 2} or more can be timed")
    try:
        pairs = [[int(number) for number in shape.split("x")] for shape in args.prefill]
        args.prefill = [(count, length) for count, length in pairs]
    except ValueError as error:
        raise UserError(f"--prefill is {' '.join(args.prefill)}; write it like 16x512") from error
    if args.output_file:
        check_writable(args.output_file, args.overwrite)
    return args


def lines(
    args: argparse.Namespace, device: torch.device, bytes_s: float, operations_s: float
) -> Iterator[Decoded | Prefilled]:
    """The lines of both tables, each as soon as it is measured."""
    model = load(args.model, device=args.device)[0]
    generator, stock = Generator(model), "stock" not in args.skip
    for count, length in [] if "prefill" in args.skip else args.prefill:
        yield prefilled(generator, count, length, operations_s, stock)
    unpacked: dict[int, Figure] = {}
    for batch in args.batch_sizes:
        line = decoded(generator, args, batch, bytes_s)
        unpacked[batch] = line.tokens_s
        if stock:
            prompts = random_prompts(model, batch, args.prompt_tokens)
            seconds = or_no_memory(lambda p=prompts: stock_decode_seconds(model, p), device)
            line.stock_tokens_s = rate(batch, seconds)
        yield line
    for quantization in [] if "quantization" in args.skip else BITS:
        del model, generator
        release(device)
        model = load(args.model, device=args.device, quantization=quantization)[0]
        generator = Generator(model)
        for batch in args.quantized_batch_sizes:
            line = decoded(generator, args, batch, bytes_s, quantization)
            line.unpacked_tokens_s = unpacked.get(batch)
            yield line


def decoded(
    generator: Generator,
    args: argparse.Namespace,
    batch: int,
    bytes_s: float,
    quantization: str | None = None,
) -> Decoded:
    """Measures the project's part of a line."""
    model, new = generator.model, args.new_tokens
    prompts = random_prompts(model, batch, args.prompt_tokens)

    def experts() -> float:
        made = generator.generate(prompts, new // 2)
        return chosen_experts(model, [p + ids for p, ids in zip(prompts, made, strict=True)])

    length = args.prompt_tokens + (LEAD + new) / 2  # of the cache, on average over what is timed
    bits = BITS[quantization] if quantization else None
    read = step_bytes(model.config, batch, length, model.dtype.itemsize, bits)
    seconds = or_no_memory(lambda: decode_seconds(generator, prompts, new), model.device)
    return Decoded(
        weights=quantization or str(model.dtype).removeprefix("torch."),
        weights_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        batch_size=batch,
        tokens_s=rate(batch, seconds),
        stock_tokens_s=None,
        unpacked_tokens_s=None,
        limit_tokens_s=batch * bytes_s / read,
        experts=None if quantization else or_no_memory(experts, model.device),
        experts_expected=distinct_experts(model.config, batch),
    )


def prefilled(
    generator: Generator, count: int, length: int, operations_s: float, stock: bool
) -> Prefilled:
    """Measures `count` prompts of `length` tokens together, cut to the context."""
    model = generator.model
    length = min(length, model.config.max_position_embeddings)
    prompts, tokens = random_prompts(model, count, length), count * length
    ours = or_no_memory(lambda: prefill_seconds(generator, prompts), model.device)
    theirs = None
    if stock:
        theirs = or_no_memory(lambda: stock_prefill_seconds(model, prompts), model.device)
    limit = tokens * operations_s / prompt_flops(model.config, [length] * count)
    return Prefilled(count, length, rate(tokens, ours), rate(tokens, theirs), limit)


def machine(device: torch.device) -> dict[str, str]:
    """What the figures were measured on."""
    on_gpu = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if on_gpu else platform.machine()
    found = {"hardware": hardware, "Python": platform.python_version()}
    for name in ("torch", "triton", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def aligned(cells: list[str]) -> str:
    return " ".join(f"{cell:>{WIDTH}}" for cell in cells)


def number(value: Figure) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def quotient(value: Figure, by: Figure) -> float | None:
    """None unless both were measured."""
    return value / by if isinstance(value, int | float) and isinstance(by, int | float) else None


def rate(tokens: int, seconds: Figure) -> Figure:
    """Tokens/s, or what there is instead of seconds."""
    return tokens / seconds if isinstance(seconds, float) else seconds


def times(value: Figure, by: Figure) -> str:
    ratio = quotient(value, by)
    return "-" if ratio is None else f"{ratio:.2f}"


def percent(value: Figure, by: Figure) -> str:
    ratio = quotient(value, by)
    return "-" if ratio is None else f"{100 * ratio:.0f} %"


if __name__ == "__main__":
    with exit_on_user_error():
        main()
