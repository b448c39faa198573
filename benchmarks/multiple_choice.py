"""How fast are multiple-choice questions, beside the harness's own backend for transformers?

    python benchmarks/multiple_choice.py                        the 16B model, minutes on an H100
    python benchmarks/multiple_choice.py --num_hidden_layers 4

Both get the same log-likelihood requests of lm-evaluation-harness, by text, on one model in one
process. `apart` is the mean distance of their log-probabilities, a token. The file is not called
evaluate.py, because the harness imports a library of that name.
"""

import random
import statistics
from functools import partial

import timing
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from random_model import add_model_options, model_of_layers
from tables import DEVICE, Report, Row, make_parser
from transformers import PreTrainedTokenizerBase

from deepseek_moe import Generator, load
from deepseek_moe.errors import exit_on_user_error
from deepseek_moe.evaluate.harness import EngineLM

QUESTIONS, CHOICES = 1000, 4
TOKENS = {"no examples": 60, "5 examples": 400}  # of a question, with what stands before it
ANSWER = 12  # tokens of a choice
WARM = 200  # questions that are asked first, without the clock; kernels are compiled
BATCH_SIZE = 64  # of the harness's backend, which is the most that it chooses itself


def main() -> None:
    parser = make_parser(__doc__)
    add_model_options(parser)
    args = parser.parse_args()
    report = Report(args)
    folder = model_of_layers(args.folder, args.num_hidden_layers)
    model, tokenizer = load(str(folder), device=str(DEVICE))
    ours = EngineLM(Generator(model), tokenizer)
    theirs = HFLM(model, tokenizer=tokenizer, batch_size=BATCH_SIZE)
    for name, tokens in TOKENS.items():
        report.add("multiple_choice", {"name": name} | compared(tokens, tokenizer, ours, theirs))


def compared(tokens: int, tokenizer: PreTrainedTokenizerBase, ours: LM, theirs: LM) -> Row:
    requests, seconds, answers = questions(tokens, tokenizer), [], []
    for lm in (ours, theirs):
        lm.loglikelihood(requests[: WARM * CHOICES])
        timing.release()
        ask = partial(lm.loglikelihood, requests)
        seconds.append(timing.seconds_of(lambda ask=ask: answers.append(ask())))
        timing.release()
    pairs = zip(*answers, strict=True)
    return {
        "items_s": QUESTIONS / seconds[0],
        "harness_items_s": QUESTIONS / seconds[1],
        "ratio": seconds[1] / seconds[0],
        "apart": statistics.mean(abs(one - other) for (one, _), (other, _) in pairs) / ANSWER,
    }


def questions(tokens: int, tokenizer: PreTrainedTokenizerBase) -> list[Instance]:
    """The requests of all questions, made of random words of one token each, the same each time."""
    chance = random.Random(0)
    known = [token[1:] for token in sorted(tokenizer.get_vocab()) if token[0] == "Ġ"]
    known = [word for word in known if word.isascii() and word.isalpha()]

    def text(count: int) -> str:
        return " ".join(chance.choices(known, k=count))

    found = []
    for _ in range(QUESTIONS):
        question = text(tokens - 1)  # and BOS
        for n in range(CHOICES):
            found.append(Instance("loglikelihood", {}, (question, f" {text(ANSWER)}"), n))
    return found


if __name__ == "__main__":
    with exit_on_user_error():
        main()
