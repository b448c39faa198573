"""How fast the engine and transformers prefill and decode the same prompts."""

import gc
import statistics
import time
from collections.abc import Callable
from itertools import islice, pairwise
from typing import Any

import torch
from tables import DEVICE
from tqdm import tqdm
from transformers import PreTrainedModel, StoppingCriteriaList

from deepseek_moe.decode.engine import Engine
from deepseek_moe.decode.generation import Generator
from deepseek_moe.decode.sampling import greedy
from deepseek_moe.kernels.decode import torch_ops

FIRST_COUNTED = 3
"""The first token whose time counts. Before it the prompt is read, kernels are compiled and a graph
is captured."""
REPEATS = 3  # timed runs, of which the median counts
Prompts = list[list[int]]


def decode_seconds(generator: Generator, prompts: Prompts, new: int) -> float:
    """Seconds a step of `new` greedy steps, from the arrival of token FIRST_COUNTED to the last.

    Nothing waits for the GPU at the first of the two: it is at work on the step after, and to wait
    would leave that step out of the time.
    """
    # As many steps as later are asked for and a few are run, so that the cache has its size and its
    # graphs stay.
    for _ in islice(generator.stream(prompts, new), FIRST_COUNTED + 1):
        pass
    runs = []
    for _ in tqdm(range(REPEATS), f"decode, batch {len(prompts)}", leave=False):
        arrived = [time.perf_counter() for _ in generator.stream(prompts, new)]
        runs.append((arrived[-1] - arrived[FIRST_COUNTED]) / (len(arrived) - 1 - FIRST_COUNTED))
    return statistics.median(runs)


def generate_seconds(model: PreTrainedModel, prompts: Prompts, new: int) -> float:
    """The same by `model.generate`, whose streamer notes when a token comes."""

    class Arrivals(list):
        def put(self, ids: torch.Tensor) -> None:
            self.append(time.perf_counter())

        def end(self) -> None:
            """Nothing is left to be shown."""

    ids_BL, runs = torch.tensor(prompts, device=model.device), []
    options = {"attention_mask": torch.ones_like(ids_BL), "do_sample": False, "eos_token_id": None}
    for _ in tqdm(range(1 + REPEATS), f"generate, batch {len(prompts)}", leave=False):
        arrived = Arrivals()
        model.generate(ids_BL, **options, max_new_tokens=new, streamer=arrived)
        counted = arrived[1 + FIRST_COUNTED :]  # the prompt is put, too
        runs.append((counted[-1] - counted[0]) / (len(counted) - 1))
    model.shared_engine = None  # its cache leaves room for the next
    return statistics.median(runs[1:])


def stock_decode(model: PreTrainedModel, prompts: Prompts, new: int) -> tuple[float, Prompts]:
    """The median step of transformers' greedy `generate`, in seconds, and the new tokens."""
    ids_BL, arrived = torch.tensor(prompts, device=model.device), []

    def note(ids_BL: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
        """Notes when a token is there, and stops no sequence."""
        wait()
        arrived.append(time.perf_counter())
        return torch.zeros(len(ids_BL), dtype=torch.bool, device=ids_BL.device)

    tokens_BL = model.generate(
        ids_BL,
        attention_mask=torch.ones_like(ids_BL),
        do_sample=False,
        max_new_tokens=new,
        min_new_tokens=new,
        stopping_criteria=StoppingCriteriaList([note]),
        fast=False,
    )
    # The prompt's own token does not come between two, and the first step sets up.
    seconds = statistics.median(end - start for start, end in pairwise(arrived[1:]))
    return seconds, tokens_BL[:, ids_BL.shape[1] :].tolist()


def prefill_seconds(generator: Generator, prompts: Prompts) -> float:
    """From ids to the logits after each prompt in the engine, with the cache filled."""
    ops = None if DEVICE.type == "cuda" else torch_ops
    engine = generator.engine or Engine(generator.model, ops=ops)
    engine.start(prompts, greedy, 1)  # makes the cache
    return median_seconds(lambda: engine.prefill(prompts))


@torch.inference_mode()
def stock_prefill_seconds(model: PreTrainedModel, prompts: Prompts) -> float:
    """The same by the model's own forward."""
    ids_BL = torch.tensor(prompts, device=model.device)
    return median_seconds(lambda: model(ids_BL, logits_to_keep=1, use_cache=True))


def random_prompts(model: PreTrainedModel, count: int, length: int) -> Prompts:
    """The same at each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (count, length), generator=generator).tolist()


def rate(tokens: int, seconds: Callable[[], float]) -> float | str:
    """Tokens/s by what `seconds` measures, or "no memory" if the GPU has too little."""
    try:
        return tokens / seconds()
    except torch.OutOfMemoryError:
        return "no memory"
    finally:
        release()


def release() -> None:
    """Gives memory that nothing uses back to the GPU."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def median_seconds(work: Callable[[], object], times: int = 5) -> float:
    """The median of `seconds_of` after one call that does not count."""
    return statistics.median([seconds_of(work) for _ in range(times + 1)][1:])


def seconds_of(work: Callable[[], object]) -> float:
    """The time from the call of `work` to the end of all it does on the GPU."""
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    """Until the GPU has done all that it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
