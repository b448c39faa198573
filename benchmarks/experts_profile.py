"""What does it cost to measure a profile of the experts, over the plain forward pass?

    python benchmarks/experts_profile.py                        the 16B model, minutes on an H100
    python benchmarks/experts_profile.py --num_hidden_layers 4

Both read the same batches of random ids, by turns, in one process. The plain pass is the model's
own, with transformers' "grouped_mm" for the experts; neither computes logits.
"""

import statistics

import torch
from random_model import add_model_options, model_of_layers
from tables import DEVICE, Report, Row, make_parser
from timing import random_prompts, release, seconds_of

from deepseek_moe import DeepseekForCausalLM, load
from deepseek_moe.errors import exit_on_user_error
from deepseek_moe.experts.measure import batches_of, measure, padded

SHAPES = ((16, 1024), (4, 4096), (16, 256), (1, 1024))  # sequences in a batch, and tokens of each
BATCHES = 4  # in one measurement
REPEATS = 5  # of each, after one that does not count


def main() -> None:
    parser = make_parser(__doc__)
    add_model_options(parser)
    args = parser.parse_args()
    report = Report(args)
    folder = model_of_layers(args.folder, args.num_hidden_layers)
    model, _ = load(str(folder), device=str(DEVICE))
    for batch, length in SHAPES:
        report.add("profile", measured(model, batch, length))
        release()


def measured(model: DeepseekForCausalLM, batch: int, length: int) -> Row:
    """A row: median tokens/s of both, and how much longer the measurement takes in each turn."""
    ids = random_prompts(model, batch * BATCHES, min(length, model.config.max_position_embeddings))

    @torch.inference_mode()
    def read() -> None:
        for some in batches_of(ids, batch):
            model.model(padded(some, model.device)[0], use_cache=False)

    def profile() -> None:
        measure(model, ids, fingerprint="random", batch_size=batch)

    turns = [(seconds_of(read), seconds_of(profile)) for _ in range(REPEATS + 1)][1:]
    tokens = sum(map(len, ids))
    plain, whole = (statistics.median(column) for column in zip(*turns, strict=True))
    ratios = [after / before for before, after in turns]
    return {
        "shape": f"{batch} x {len(ids[0])}",
        "plain_tokens_s": tokens / plain,
        "measured_tokens_s": tokens / whole,
        "x_seconds": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }


if __name__ == "__main__":
    with exit_on_user_error():
        main()
