"""How fast is decoding, beside stock transformers and what the machine allows?

    python benchmarks/random_model.py --output /tmp/random-16b
    python benchmarks/decode.py --model /tmp/random-16b --output_file images/decode.json
    python images/plots.py                  draws images/decode.png from that file

This takes about four minutes for the 16B model on an H200. The first part starts other processes,
which need the GPU for themselves. The limit of decoding is the bytes that a step must read over the
measured bandwidth, that of prefill the operations over the measured rate of products (limits.py).
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from limits import distinct_experts, product_rate, prompt_flops, read_bandwidth, step_bytes
from start import describe, starts
from tables import Figure, Report, add_report_options, aligned, number, percent, rate, ratio
from timing import (
    FIRST_COUNTED,
    chosen_experts,
    decode_seconds,
    or_no_memory,
    prefill_seconds,
    random_prompts,
    release,
    stock_decode,
    stock_prefill_seconds,
)

from deepseek_moe.decode.generation import Generator
from deepseek_moe.decode.load import load
from deepseek_moe.errors import UserError, exit_on_user_error
from deepseek_moe.files import BUNDLED_MODEL
from deepseek_moe.kernels.int_weights import BITS

PARTS = ("start", "prefill", "stock", "quantization")  # that --skip leaves out
Row = dict[str, Any]


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    if device.index:
        torch.cuda.set_device(device)  # on which kernels are launched
    report = Report(args, device)
    report.contents |= {"prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens}
    if "start" not in args.skip:
        print("\nstart, seconds since the process began", flush=True)
        try:
            for start in starts(args.model, args.device):
                report.add("start", asdict(start), describe(start))
        except UserError as error:  # the rest can still be measured
            print(error, flush=True)
    bytes_s, operations_s = read_bandwidth(device), product_rate(device)
    report.contents |= {"bytes_s": bytes_s, "operations_s": operations_s}
    release(device)
    print(f"\nmeasured: reads {bytes_s / 1e12:.3g} TB/s (matrix times vector), ", end="")
    print(f"multiplies {operations_s / 1e12:.3g} TFLOP/s (square matrices)", flush=True)
    for part, row in rows(args, bytes_s, operations_s):
        title, columns, cells = TABLES[part]
        if part not in report.contents:
            print(f"{title.format(**report.contents)}\n{aligned(columns)}")
        report.add(part, row, aligned(cells(row)))


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
    parser.add_argument("--skip", nargs="+", choices=PARTS, default=[], help="parts to leave out")
    add_report_options(parser)
    args = parser.parse_args()
    if args.new_tokens < FIRST_COUNTED + 2:
        least = FIRST_COUNTED + 2
        raise UserError(f"new_tokens is {args.new_tokens}; only {least} or more can be timed")
    try:
        pairs = [[int(number) for number in shape.split("x")] for shape in args.prefill]
        args.prefill = [(count, length) for count, length in pairs]
    except ValueError as error:
        raise UserError(f"--prefill is {' '.join(args.prefill)}; write it like 16x512") from error
    return args


def rows(
    args: argparse.Namespace, bytes_s: float, operations_s: float
) -> Iterator[tuple[str, Row]]:
    """The rows of both tables with the part that they belong to, as soon as they are measured."""
    model = load(args.model, device=args.device)[0]
    generator, stock = Generator(model), "stock" not in args.skip
    for count, length in [] if "prefill" in args.skip else args.prefill:
        yield "prefill", prefilled(generator, count, length, operations_s, stock)
    whole: dict[int, Figure] = {}
    for batch in args.batch_sizes:
        row = decoded(generator, args, batch, bytes_s)
        whole[batch] = row["tokens_s"]
        if stock:
            prompts, new = random_prompts(model, batch, args.prompt_tokens), 16 if batch == 1 else 8
            measure = lambda p=prompts, n=new: stock_decode(model, p, n)[0]  # noqa: E731
            row["stock_tokens_s"] = rate(batch, or_no_memory(measure, model.device))
        yield "decode", row
    for quantization in [] if "quantization" in args.skip else BITS:
        del model, generator
        release(torch.device(args.device))
        model = load(args.model, device=args.device, quantization=quantization)[0]
        generator = Generator(model)
        for batch in args.quantized_batch_sizes:
            row = decoded(generator, args, batch, bytes_s, quantization)
            yield "decode", row | {"whole_tokens_s": whole.get(batch)}


def decoded(
    generator: Generator,
    args: argparse.Namespace,
    batch: int,
    bytes_s: float,
    quantization: str | None = None,
) -> Row:
    """The project's part of a row; tokens/s are those of all sequences together."""
    model, new = generator.model, args.new_tokens
    prompts = random_prompts(model, batch, args.prompt_tokens)

    def experts() -> float:
        made = generator.generate(prompts, new // 2)
        return chosen_experts(model, [p + ids for p, ids in zip(prompts, made, strict=True)])

    # The mean length of the cache over the steps that are timed.
    length = args.prompt_tokens + (FIRST_COUNTED + new) / 2
    bits = BITS[quantization] if quantization else None
    read = step_bytes(model.config, batch, length, model.dtype.itemsize, bits)
    seconds = or_no_memory(lambda: decode_seconds(generator, prompts, new), model.device)
    return {
        "weights": quantization or str(model.dtype).removeprefix("torch."),
        "weights_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "batch_size": batch,
        "tokens_s": rate(batch, seconds),
        "stock_tokens_s": None,
        "whole_tokens_s": None,  # of the same model with weights that are not quantised
        "limit_tokens_s": batch * bytes_s / read,
        "experts": None if quantization else or_no_memory(experts, model.device),
        "experts_expected": distinct_experts(model.config, batch),
    }


def decode_cells(row: Row) -> list[str]:
    speed: Figure = row["tokens_s"]
    return [
        row["weights"],
        f"{row['weights_bytes'] / 1e9:.2f}",
        str(row["batch_size"]),
        number(speed),
        ratio(1000 * row["batch_size"], speed, "{:.3f}"),
        number(row["stock_tokens_s"]),
        ratio(speed, row["stock_tokens_s"]),
        ratio(speed, row["whole_tokens_s"]),
        number(row["limit_tokens_s"]),
        percent(speed, row["limit_tokens_s"]),
        number(row["experts"]),
        number(row["experts_expected"]),
    ]


def prefilled(
    generator: Generator, count: int, length: int, operations_s: float, stock: bool
) -> Row:
    """A row of `count` prompts of `length` tokens together, cut to the context."""
    model = generator.model
    length = min(length, model.config.max_position_embeddings)
    prompts, tokens = random_prompts(model, count, length), count * length
    ours = or_no_memory(lambda: prefill_seconds(generator, prompts), model.device)
    theirs = None
    if stock:
        theirs = or_no_memory(lambda: stock_prefill_seconds(model, prompts), model.device)
    return {
        "prompts": count,
        "length": length,
        "tokens_s": rate(tokens, ours),
        "stock_tokens_s": rate(tokens, theirs),
        "limit_tokens_s": tokens * operations_s / prompt_flops(model.config, [length] * count),
    }


def prefill_cells(row: Row) -> list[str]:
    return [
        f"{row['prompts']} x {row['length']}",
        number(row["tokens_s"]),
        number(row["stock_tokens_s"]),
        ratio(row["tokens_s"], row["stock_tokens_s"]),
        number(row["limit_tokens_s"]),
        percent(row["tokens_s"], row["limit_tokens_s"]),
    ]


TABLES = {
    "prefill": (
        "\nprefill, tokens/s",
        ["prompts", "project", "stock", "x stock", "limit", "of limit"],
        prefill_cells,
    ),
    "decode": (
        "\ndecode, tokens/s of all sequences together: prompts of {prompt_tokens} tokens, "
        "{new_tokens} new ones\n(experts: of a layer, chosen by the tokens of a step; expected of "
        "even choice)",
        ["weights", "GB", "batch", "project", "ms a step", "stock", "x stock", "x whole", "limit",
         "of limit", "experts", "expected"],
        decode_cells,
    ),
}  # fmt: skip
"""Title, columns, and what makes a row's cells, of each part of a report."""


if __name__ == "__main__":
    with exit_on_user_error():
        main()
