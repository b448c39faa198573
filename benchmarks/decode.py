"""How fast is decoding, beside stock transformers and what the machine allows?

    python benchmarks/random_model.py --output /tmp/random-16b
    python benchmarks/decode.py --model /tmp/random-16b --output_file images/decode.json
    python images/plots.py                  draws images/decode.png from that file

This takes about three minutes for the 16B model on an H200. Rates are tokens/s of all sequences
together. The limit of decoding is the bytes that a step must read over the measured bandwidth, that
of prefill the operations over the measured rate of products (limits.py). `tokens_s` is the rate of
`Generator`, `generate_tokens_s` that of `model.generate`, which the same engine computes.
"""

import timing
from limits import product_rate, prompt_flops, read_bandwidth, step_bytes
from tables import DEVICE, Figure, Report, Row, make_parser, ratio

from deepseek_moe.bundled import BUNDLED_MODEL
from deepseek_moe.decode.generation import Generator
from deepseek_moe.decode.int_quantizer import BITS
from deepseek_moe.decode.load import load
from deepseek_moe.errors import exit_on_user_error

PREFILLS = ((1, 4096), (16, 512))  # prompts, and tokens of each
BATCHES = (1, 8, 64, 256)
PROMPT, NEW = 128, 200  # tokens of each sequence


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=str(BUNDLED_MODEL), help="a folder or a hub id")
    args = parser.parse_args()
    report = Report(args)
    report.contents |= {"prompt_tokens": PROMPT, "new_tokens": NEW}
    bytes_s, operations_s = read_bandwidth(), product_rate()
    report.contents |= {"bytes_s": bytes_s, "operations_s": operations_s}
    print(f"measured: reads {bytes_s / 1e12:.3g} TB/s (matrix times vector), ", end="")
    print(f"multiplies {operations_s / 1e12:.3g} TFLOP/s (square matrices)", flush=True)
    timing.release()
    generator = Generator(load(args.model, device=str(DEVICE))[0])
    for count, length in PREFILLS:
        report.add("prefill", prefilled(generator, count, length, operations_s))
    for batch in BATCHES:
        report.add("decode", decoded(generator, batch, bytes_s))
    for quantization in BITS:
        del generator
        timing.release()
        generator = Generator(load(args.model, device=str(DEVICE), quantization=quantization)[0])
        report.add("decode", decoded(generator, 1, bytes_s, quantization))


def prefilled(generator: Generator, count: int, length: int, operations_s: float) -> Row:
    """A row of `count` prompts of `length` tokens together, cut to the context."""
    model = generator.model
    length = min(length, model.config.max_position_embeddings)
    prompts, tokens = timing.random_prompts(model, count, length), count * length
    speed = timing.rate(tokens, lambda: timing.prefill_seconds(generator, prompts))
    stock = timing.rate(tokens, lambda: timing.stock_prefill_seconds(model, prompts))
    limit = length * operations_s / prompt_flops(model.config, length)
    return {"prompts": count, "length": length} | compared(speed, stock, limit)


def decoded(
    generator: Generator, batch: int, bytes_s: float, quantization: str | None = None
) -> Row:
    """A row of `batch` sequences; stock transformers is measured with plain weights only."""
    model = generator.model
    prompts = timing.random_prompts(model, batch, PROMPT)
    speed, stock = timing.rate(batch, lambda: timing.decode_seconds(generator, prompts, NEW)), None
    generate = timing.rate(batch, lambda: timing.generate_seconds(model, prompts, NEW))
    if quantization is None:
        few = 16 if batch == 1 else 8  # steps of transformers, which takes long
        stock = timing.rate(batch, lambda: timing.stock_decode(model, prompts, few)[0])
    # The mean length of the cache over the steps that are timed.
    length = PROMPT + (timing.FIRST_COUNTED + NEW) / 2
    bits = BITS[quantization] if quantization else None
    read = step_bytes(model.config, batch, length, model.dtype.itemsize, bits)
    return {
        "weights": quantization or str(model.dtype).removeprefix("torch."),
        "gigabytes": sum(parameter.nbytes for parameter in model.parameters()) / 1e9,
        "batch_size": batch,
        "generate_tokens_s": generate,
    } | compared(speed, stock, batch * bytes_s / read)


def compared(speed: Figure, stock: Figure, limit: float) -> Row:
    """The columns that both tables end with."""
    return {
        "tokens_s": speed,
        "stock_tokens_s": stock,
        "x_stock": ratio(speed, stock),
        "limit_tokens_s": limit,
        "of_limit": ratio(speed, limit),
    }


if __name__ == "__main__":
    with exit_on_user_error():
        main()
