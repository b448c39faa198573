"""How fast the engine and transformers prefill and decode the same prompts."""

import gc
import statistics
import time
from collections.abc import Callable
from itertools import islice, pairwise
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from deepseek_moe.decode.engine import Engine
from deepseek_moe.decode.generation import Generator
from deepseek_moe.decode.sampling import greedy
from deepseek_moe.kernels.decode import torch_ops
from deepseek_moe.model.modeling_deepseek import DeepseekGate

NO_MEMORY = "no memory"
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


class _Arrivals(StoppingCriteria):
    """Notes when each token of `generate`, which waits for the GPU after each, is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        wait(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def stock_decode(model: PreTrainedModel, prompts: Prompts, new: int) -> tuple[float, Prompts]:
    """The median step of transformers' greedy `generate`, in seconds, and the new tokens."""
    ids_BL, arrivals = torch.tensor(prompts, device=model.device), _Arrivals()
    tokens_BL = model.generate(
        ids_BL,
        attention_mask=torch.ones_like(ids_BL),
        do_sample=False,
        max_new_tokens=new,
        min_new_tokens=new,
        stopping_criteria=StoppingCriteriaList([arrivals]),
    )
    # The prompt's own token does not come between two, and the first step sets up.
    seconds = statistics.median(end - start for start, end in pairwise(arrivals.times[1:]))
    return seconds, tokens_BL[:, ids_BL.shape[1] :].tolist()


def stock_decode_seconds(model: PreTrainedModel, prompts: Prompts, new: int) -> float:
    return stock_decode(model, prompts, new)[0]


def prefill_seconds(generator: Generator, prompts: Prompts) -> float:
    """From ids to the logits after each prompt in the engine, with the cache filled."""
    on_gpu = generator.model.device.type == "cuda"
    engine = generator.engine or Engine(generator.model, ops=None if on_gpu else torch_ops)
    engine.start(prompts, greedy, 1)  # makes the cache
    return median_seconds(lambda: engine.prefill(prompts), generator.model.device)


@torch.inference_mode()
def stock_prefill_seconds(model: PreTrainedModel, prompts: Prompts) -> float:
    """The same by the model's own forward."""
    ids_BL = torch.tensor(prompts, device=model.device)
    return median_seconds(lambda: model(ids_BL, logits_to_keep=1, use_cache=True), model.device)


@torch.inference_mode()
def chosen_experts(model: PreTrainedModel, texts: Prompts) -> float:
    """How many different experts the last tokens of `texts`, all of one length, choose together.

    This is the mean over the layers. Texts that have grown alike choose fewer than others would.
    """
    length = len(texts[0])
    chosen: dict[DeepseekGate, set[int]] = {}

    def note(gate: DeepseekGate, _: Any, out: tuple[torch.Tensor, ...]) -> None:
        index_TK = out[2]
        chosen.setdefault(gate, set()).update(index_TK[length - 1 :: length].flatten().tolist())

    gates = [module for module in model.modules() if isinstance(module, DeepseekGate)]
    hooks = [gate.register_forward_hook(note) for gate in gates]
    for texts_BL in torch.tensor(texts, device=model.device).split(16):
        model(texts_BL, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return statistics.mean(map(len, chosen.values()))


def random_prompts(model: PreTrainedModel, count: int, length: int) -> Prompts:
    """The same at each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (count, length), generator=generator).tolist()


def or_no_memory(measure: Callable[[], float], device: torch.device) -> float | str:
    """What `measure` returns, or NO_MEMORY if the GPU has too little."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        return NO_MEMORY
    finally:
        release(device)


def release(device: torch.device) -> None:
    """Gives memory that nothing uses back to the GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def median_seconds(work: Callable[[], object], device: torch.device, times: int = 5) -> float:
    """The median time from the call of `work` to the end of all it does on the GPU, after one call
    that does not count."""
    seconds = []
    for _ in range(times + 1):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def wait(device: torch.device) -> None:
    """Until the GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
