"""How fast is decoding, beside stock transformers and what the machine allows?

    python benchmarks/random_model.py --output /tmp/random-16b
    python benchmarks/decode.py --model /tmp/random-16b --output_file images/decode.json
    python images/plots.py                  draws images/decode.png from that file

This takes about three minutes for the 16B model on an H200. The limit of decoding is the bytes that
a step must read over the measured bandwidth, that of prefill the operations over the measured rate
of products (limits.py).
"""

import argparse
from collections.abc import Iterator
from functools import partial

import tables
import timing
import torch
from limits import distinct_experts, product_rate, prompt_flops, read_bandwidth, step_bytes
from tables import Figure, Row, number, percent, rate, ratio
from timing import or_no_memory, random_prompts
from transformers import PreTrainedModel

from deepseek_moe.decode.generation import Generator
from deepseek_moe.decode.load import load
from deepseek_moe.errors import UserError, exit_on_user_error
from deepseek_moe.files import BUNDLED_MODEL
from deepseek_moe.kernels.int_weights import BITS

PARTS = ("prefill", "stock", "quantization")  # that --skip leaves out
TABLES: dict[str, tuple[str, tables.Columns]] = {
    "prefill": (
        "prefill, tokens/s",
        {
            "prompts": lambda row: f"{row['prompts']} x {row['length']}",
            "project": lambda row: number(row["tokens_s"]),
            "stock": lambda row: number(row["stock_tokens_s"]),
            "x stock": lambda row: ratio(row["tokens_s"], row["stock_tokens_s"]),
            "limit": lambda row: number(row["limit_tokens_s"]),
            "of limit": lambda row: percent(row["tokens_s"], row["limit_tokens_s"]),
        },
    ),
    "decode": (
        "decode, tokens/s of all sequences together: prompts of {prompt_tokens} tokens, "
        "{new_tokens} new ones\n(experts: of a layer, chosen by the tokens of a step; expected of "
        "even choice)",
        {
            "weights": lambda row: row["weights"],
            "GB": lambda row: f"{row['weights_bytes'] / 1e9:.2f}",
            "batch": lambda row: str(row["batch_size"]),
            "project": lambda row: number(row["tokens_s"]),
            "ms a step": lambda row: ratio(1000 * row["batch_size"], row["tokens_s"], "{:.3f}"),
            "stock": lambda row: number(row["stock_tokens_s"]),
            "x stock": lambda row: ratio(row["tokens_s"], row["stock_tokens_s"]),
            "x 16 bits": lambda row: ratio(row["tokens_s"], row["unquantised_tokens_s"]),
            "limit": lambda row: number(row["limit_tokens_s"]),
            "of limit": lambda row: percent(row["tokens_s"], row["limit_tokens_s"]),
            "experts": lambda row: number(row["experts"]),
            "expected": lambda row: number(row["experts_expected"]),
        },
    ),
}
"""Title and columns of each part of a report."""


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    if device.index:
        torch.cuda.set_device(device)  # on which kernels are launched
    report = tables.Report(args, device)
    report.contents |= {"prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens}
    bytes_s, operations_s = read_bandwidth(device), product_rate(device)
    report.contents |= {"bytes_s": bytes_s, "operations_s": operations_s}
    timing.release(device)
    print(f"\nmeasured: reads {bytes_s / 1e12:.3g} TB/s (matrix times vector), ", end="")
    print(f"multiplies {operations_s / 1e12:.3g} TFLOP/s (square matrices)", flush=True)
    for part, row in rows(args, bytes_s, operations_s):
        title, columns = TABLES[part]
        if part not in report.contents:
            print(f"\n{title.format(**report.contents)}\n {tables.aligned(columns)}")
        report.add(part, row, columns)


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
    tables.add_report_options(parser)
    args = parser.parse_args()
    if args.new_tokens < timing.FIRST_COUNTED + 2:
        least = timing.FIRST_COUNTED + 2
        raise UserError(f"new_tokens is {args.new_tokens}; only {least} or more can be timed")
    try:
        pairs = [map(int, shape.split("x")) for shape in args.prefill]
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
    unquantised: dict[int, Figure] = {}
    for batch in args.batch_sizes:
        row = decoded(generator, args, batch, bytes_s)
        unquantised[batch] = row["tokens_s"]
        if stock:
            row["stock_tokens_s"] = stock_decoded(model, batch, args.prompt_tokens)
        yield "decode", row
    for quantization in [] if "quantization" in args.skip else BITS:
        del model, generator
        timing.release(torch.device(args.device))
        model = load(args.model, device=args.device, quantization=quantization)[0]
        generator = Generator(model)
        for batch in args.quantized_batch_sizes:
            row = decoded(generator, args, batch, bytes_s, quantization)
            yield "decode", row | {"unquantised_tokens_s": unquantised.get(batch)}


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
        return timing.chosen_experts(model, [p + ids for p, ids in zip(prompts, made, strict=True)])

    # The mean length of the cache over the steps that are timed.
    length = args.prompt_tokens + (timing.FIRST_COUNTED + new) / 2
    bits = BITS[quantization] if quantization else None
    read = step_bytes(model.config, batch, length, model.dtype.itemsize, bits)
    measure = partial(timing.decode_seconds, generator, prompts, new)
    seconds = or_no_memory(measure, model.device)
    return {
        "weights": quantization or str(model.dtype).removeprefix("torch."),
        "weights_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "batch_size": batch,
        "tokens_s": rate(batch, seconds),
        "stock_tokens_s": None,
        "unquantised_tokens_s": None,  # of the same model with weights that are not quantised
        "limit_tokens_s": batch * bytes_s / read,
        "experts": None if quantization else or_no_memory(experts, model.device),
        "experts_expected": distinct_experts(model.config, batch),
    }


def stock_decoded(model: PreTrainedModel, batch: int, length: int) -> Figure:
    prompts, new = random_prompts(model, batch, length), 16 if batch == 1 else 8
    measure = partial(timing.stock_decode_seconds, model, prompts, new)
    return rate(batch, or_no_memory(measure, model.device))


def prefilled(
    generator: Generator, count: int, length: int, operations_s: float, stock: bool
) -> Row:
    """A row of `count` prompts of `length` tokens together, cut to the context."""
    model = generator.model
    length = min(length, model.config.max_position_embeddings)
    prompts, tokens = random_prompts(model, count, length), count * length
    ours = or_no_memory(partial(timing.prefill_seconds, generator, prompts), model.device)
    theirs = None
    if stock:
        measure = partial(timing.stock_prefill_seconds, model, prompts)
        theirs = or_no_memory(measure, model.device)
    return {
        "prompts": count,
        "length": length,
        "tokens_s": rate(tokens, ours),
        "stock_tokens_s": rate(tokens, theirs),
        "limit_tokens_s": tokens * operations_s / prompt_flops(model.config, [length] * count),
    }


if __name__ == "__main__":
    with exit_on_user_error():
        main()
