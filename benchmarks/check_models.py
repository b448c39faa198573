"""The engine against the plain way on a GPU: a part of check_gpu.py.

Greedy ids may differ where two logits are near enough that rounding swaps them, and everything
after differs then. So beside ids, logits are compared while both ways are given the same ids.

Letters: N steps, B sequences, V vocabulary, K ids that can be drawn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from check_kernels import Check, Group, Poison, distance
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepseek_moe.decode.engine import CHUNK, Engine, Rows, size_for
from deepseek_moe.decode.generation import Generator
from deepseek_moe.decode.load import load
from deepseek_moe.decode.sampling import Sampler, Sampling, greedy, make_sampler
from deepseek_moe.files import BUNDLED_MODEL
from deepseek_moe.kernels.decode import torch_ops

TOLERANCE = 0.03  # relative distance of logits after all layers, in 16 bits
TIE = 4  # steps of the dtype, at the largest logit, by which rounding may move two logits apart
TIES = 0.02  # of the ids may be others than the plain way's for that reason
BATCHES = (1, 3, 20)  # one token, a padded size, the way of many
SAMPLINGS = (
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05},
    {"repetition_penalty": 1.3},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
)
TEXT = (
    "Once upon a time there lived a poor woodcutter with his wife and two children in a small "
    "hut at the edge of a great forest. He had little to bite and to break, and when a great "
    "famine fell upon the land he could no longer get them their daily bread. One night, as he "
    "lay in bed and could not sleep for his troubles, he sighed and said to his wife"
)
Ids = Sequence[Sequence[int]]


@dataclass
class Pair:
    """A model with both ways through it. (`cached_property`: loaded when a check first asks.)"""

    folder: str
    device: torch.device
    dtype: str
    quantization: str | None = None

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        options = {"device": str(self.device), "quantization": self.quantization}
        return load(self.folder, self.dtype, **options)

    @cached_property
    def fast(self) -> Generator:
        return engine_of(self.loaded[0])

    @cached_property
    def plain(self) -> Generator:
        return Generator(self.loaded[0], fast=False)

    def prompts(self, count: int) -> list[list[int]]:
        """Of `count` lengths, the longest last."""
        ids = self.loaded[1](TEXT).input_ids
        return [ids[: 3 + (len(ids) - 3) * (b + 1) // count] for b in range(count)]

    def random_ids(self, rows: int, steps: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(rows)
        vocabulary = self.loaded[0].config.vocab_size
        return torch.randint(vocabulary, (rows, steps), generator=generator).tolist()


def engine_of(model: PreTrainedModel, chunk: int = CHUNK) -> Generator:
    """A generator with an engine, which on a CPU runs the plain twins step by step."""
    ops = None if model.device.type == "cuda" else torch_ops
    return Generator(model, engine=Engine(model, chunk, ops))


def bundled_checks(device: torch.device, new: int) -> Iterator[Group]:
    """Of all that the engine does, on the bundled model, with `new` tokens a generation."""
    dtypes = ["bfloat16", "float16"] if device.type == "cuda" else ["float32"]
    pairs = [Pair(str(BUNDLED_MODEL), device, dtype) for dtype in dtypes]
    pair, exact = pairs[0], Pair(str(BUNDLED_MODEL), device, "float32")
    yield Group([sampling_check(pair, options, new) for options in SAMPLINGS])
    for other in pairs:
        logits = (f"logits, {other.dtype}", partial(check_logits, other, BATCHES, new))
        noise = (f"distance from fp32, {other.dtype}", partial(check_noise, other, exact, new))
        yield Group([logits, noise])
    for quantization in ("int8", "int4"):
        other = Pair(str(BUNDLED_MODEL), device, dtypes[0], quantization)
        yield Group([(f"logits, {quantization}", partial(check_logits, other, BATCHES, 20))])
    stops = ("stop ids", partial(check_stops, pair, new))
    context = ("end of the context", partial(check_context, pair))
    unwritten = ("unwritten memory", partial(check_unwritten, pair, BATCHES))
    yield Group([stops, context, unwritten])
    ids = []
    for batch in BATCHES:
        ids.append((f"greedy ids, batch {batch}", partial(check_greedy, pair, batch, new)))
        ids.append((f"twice the same, batch {batch}", partial(check_repeats, pair, batch, new)))
    ids.append(("batch equals single", partial(check_single, pair, new)))
    ids.append(("prompts in chunks", partial(check_chunks, pair, new)))
    yield Group(ids)
    if device.type == "cuda":  # more than the library's product is the faster one for
        yield Group([("greedy ids, batch 256", partial(check_greedy, pair, 256, 8))])


def model_checks(folder: str, device: torch.device) -> Iterator[Group]:
    """Of any model of this architecture; the memory is the 16B model's."""
    pair, batches, checks = Pair(folder, device, "auto"), (1, 8, 64), []
    for batch in batches:
        name = f"model's logits, batch {batch}"
        checks.append((name, partial(check_logits, pair, (batch,), 4)))
    checks.append(("model's unwritten memory", partial(check_unwritten, pair, batches)))
    yield Group(checks, gigabytes=50)


def sampling_check(pair: Pair, options: dict[str, float], new: int) -> Check:
    name = ", ".join(f"{key} {value}" for key, value in options.items())
    return f"sampling, {name}", partial(check_sampling, pair, options, new)


def check_greedy(pair: Pair, batch: int, new: int) -> str:
    prompts = pair.prompts(batch)
    ours = pair.fast.generate(prompts, new)
    refuse_uncaptured(pair.fast.engine, batch, greedy)
    theirs = pair.plain.generate(prompts, new)
    logits_NBV = recorded(pair.plain, prompts, ours)
    chosen_NB1 = torch.tensor(ours, device=logits_NBV.device).T[..., None]
    behind_NB = logits_NBV.amax(-1) - logits_NBV.gather(-1, chosen_NB1)[..., 0]
    others, allowed_NB = int((behind_NB > 0).sum()), near_tie(pair, logits_NBV)
    if (behind_NB > allowed_NB).any() or others > TIES * behind_NB.numel():
        raise RuntimeError(f"{others} ids are others, the worst by {behind_NB.max():.3g} in logits")
    return (
        f"{others} of {behind_NB.numel()} ids by a near-tie; {same(pair, ours, theirs, logits_NBV)}"
    )


def check_repeats(pair: Pair, batch: int, new: int) -> str:
    prompts = pair.prompts(batch)
    first, second = (pair.fast.generate(prompts, new) for _ in range(2))
    logits = [recorded(pair.fast, prompts, first) for _ in range(2)]
    if first != second or not torch.equal(*logits):
        raise RuntimeError(f"other ids, or logits, by up to {farthest(*logits):.3g}")
    return "ids, and logits bit for bit"


def check_single(pair: Pair, new: int) -> str:
    prompts = pair.prompts(BATCHES[-1])
    together = pair.fast.generate(prompts, new)
    alone = [pair.fast.generate([prompt], new)[0] for prompt in prompts]
    return same(pair, together, alone, recorded(pair.fast, prompts, together))


def check_chunks(pair: Pair, new: int) -> str:
    prompts = pair.prompts(BATCHES[-1])
    whole = pair.fast.generate(prompts, new)
    pieces = engine_of(pair.loaded[0], chunk=5).generate(prompts, new)
    return same(pair, whole, pieces, recorded(pair.fast, prompts, whole))


def check_stops(pair: Pair, new: int) -> str:
    """Sequences end before a stop id, leave the batch, and change nothing for the others."""
    prompts, engine = pair.prompts(BATCHES[-1]), pair.fast.engine
    whole = pair.fast.generate(prompts, new)
    logits_NBV = recorded(pair.fast, prompts, whole)
    stops = {whole[b][b * new // len(whole)] for b in range(1, len(whole), 3)}
    sizes, step = [], engine.step
    engine.step = lambda size, sample: (sizes.append(size), step(size, sample))
    try:
        made = pair.fast.generate(prompts, new, stop_ids=stops)
    finally:
        del engine.step
    if sizes != sorted(sizes, reverse=True) or len(set(sizes)) < 2:
        raise RuntimeError(f"rows of the steps: {sizes}")
    # Both with the stop id that ended them, which `generate` does not tell: the likeliest.
    for b, ids in enumerate(made):
        ends = [n for n, token in enumerate(whole[b]) if token in stops]
        whole[b] = whole[b][: ends[0] + 1] if ends else whole[b]
        if len(ids) < new:
            scores_V = logits_NBV[len(ids), b]
            ids.append(max(stops, key=scores_V.tolist().__getitem__))
    return f"{sizes[0]} rows at first, {sizes[-1]} at last; {same(pair, whole, made, logits_NBV)}"


def check_context(pair: Pair) -> str:
    """A sequence that fills the context ends, beside one that goes on."""
    ids = pair.prompts(1)[0]
    prompts = [(ids * pair.fast.context)[: pair.fast.context - 6], ids]
    ours, theirs = (way.generate(prompts, 20) for way in (pair.fast, pair.plain))
    if [len(ids) for ids in ours] != [6, 20]:
        raise RuntimeError(f"{[len(ids) for ids in ours]} new ids, not 6 and 20")
    return "; ".join(
        same(pair, ours[b : b + 1], theirs[b : b + 1], recorded(pair.plain, [prompt], [ours[b]]))
        for b, prompt in enumerate(prompts)
    )


def check_unwritten(pair: Pair, batches: Sequence[int]) -> str:
    """Rows without a sequence, and memory that holds NaN before it is written, change nothing."""
    engine = pair.fast.engine

    @torch.inference_mode()
    def logits(prompts: Ids, rows: Rows) -> torch.Tensor:
        step_BV = engine.decoder.step(rows.ids, rows.position, rows.slot, engine.cache)
        return torch.cat([step_BV[: len(prompts)], engine.prefill(prompts)])

    for batch in batches:
        prompts = pair.prompts(batch)
        engine.start(prompts, greedy, 4)
        rows = engine.rows.first(size_for(batch))
        clean = logits(prompts, rows)
        with Poison():
            poisoned = logits(prompts, rows)
        if not torch.equal(clean, poisoned):
            raise RuntimeError(f"batch {batch}: up to {farthest(clean, poisoned):.3g} in logits")
    return "logits bit for bit"


def check_sampling(pair: Pair, options: dict[str, float], new: int) -> str:
    """In a graph and outside the same seed draws the same ids from the same logits, and without a
    seed only ids that can be drawn."""
    prompts, engine = pair.prompts(3), pair.fast.engine
    inside, outside, unseeded = (make_sampler(**options, seed=seed) for seed in (7, 7, None))
    ids = pair.fast.generate(prompts, new, inside)
    refuse_uncaptured(engine, len(prompts), inside)
    drawn = pair.fast.generate(prompts, new, unseeded)
    possible = Possible(unseeded, drawn)
    pair.fast.generate(prompts, new, possible)
    if possible.refused:
        raise RuntimeError(f"{possible.refused} of the ids cannot be drawn")
    again = pair.fast.generate(prompts, new, lambda logits, seen: outside(logits, seen))
    if again != ids:
        raise RuntimeError("all ids can be drawn, but a seed draws others outside of the graph")
    return "a seed repeats in and outside of the graph, all ids can be drawn"


def check_logits(pair: Pair, batches: Sequence[int], new: int) -> str:
    """Of prefill and `new` steps of random ids."""
    found = []
    for batch in batches:
        prompts, ids = pair.prompts(batch), pair.random_ids(batch, new)
        ours, theirs = (recorded(way, prompts, ids) for way in (pair.fast, pair.plain))
        whole = distance(ours, theirs)
        # A token whose last experts are nearly equal goes elsewhere, so single steps may be worse.
        steps = [distance(x, y) for x, y in zip(ours, theirs, strict=True)]
        said = f"batch {batch} {whole:.2g} (prompts {steps[0]:.2g}, worst step {max(steps):.2g})"
        if not whole <= TOLERANCE:
            raise RuntimeError(f"{said}; by step: {' '.join(f'{x:.2g}' for x in steps[:20])}")
        found.append(said)
    return ", ".join(found)


def check_noise(pair: Pair, exact: Pair, new: int) -> str:
    """The engine's logits are about as near to those in fp32 as the plain way's."""
    prompts, ids = pair.prompts(3), pair.random_ids(3, new)
    expected, ours, theirs = (
        recorded(way, prompts, ids) for way in (exact.plain, pair.fast, pair.plain)
    )
    said = f"{distance(ours, expected):.2g}, the plain way {distance(theirs, expected):.2g}"
    if not distance(ours, expected) <= 1.5 * distance(theirs, expected) + 1e-5:
        raise RuntimeError(said)
    return said


class Forced:
    """A sampler that returns `ids` whatever the logits are, and keeps these."""

    def __init__(self, ids: Ids) -> None:
        self.ids_NB, self.logits = torch.tensor(ids).T, []

    def __call__(self, logits_BV: torch.Tensor, seen_BV: torch.Tensor) -> torch.Tensor:
        ids_B = torch.zeros(len(logits_BV), dtype=torch.int64)  # with rows that hold no sequence
        ids_B[: self.ids_NB.shape[1]] = self.ids_NB[len(self.logits)]
        self.logits.append(logits_BV[: self.ids_NB.shape[1]].clone())
        return ids_B.to(logits_BV.device)


class Possible(Forced):
    """As `Forced`, and counts in `refused` the ids that `sample` cannot have drawn."""

    def __init__(self, sample: Sampler, ids: Ids) -> None:
        super().__init__(ids)
        self.sample, self.refused = sample, 0

    def __call__(self, logits_BV: torch.Tensor, seen_BV: torch.Tensor) -> torch.Tensor:
        ids_B1 = super().__call__(logits_BV, seen_BV)[:, None]
        if isinstance(self.sample, Sampling) and self.sample.temperature:
            weights_BK, ids_BK = self.sample.distribution(logits_BV, seen_BV)
            if ids_BK is None:
                can_B = weights_BK.gather(-1, ids_B1)[:, 0] > 0
            else:
                can_B = ((ids_BK == ids_B1) & (weights_BK > 0)).any(dim=-1)
        else:
            can_B = self.sample(logits_BV, seen_BV) == ids_B1[:, 0]
        self.refused += int((~can_B[: self.ids_NB.shape[1]]).sum())
        return ids_B1[:, 0]


def refuse_uncaptured(engine: Engine, batch: int, sample: Sampler) -> None:
    """Raises unless the last steps were one graph, the sampler inside."""
    if engine.fast and engine.graphs.get((size_for(batch), sample)) is None:
        raise RuntimeError("the steps were not captured in a graph")


def recorded(way: Generator, prompts: Ids, ids: Ids) -> torch.Tensor:
    """This way's logits [N, B, V] (fp32) before each of `ids` [B, N]."""
    forced = Forced(ids)
    way.generate(prompts, len(ids[0]), forced)
    return torch.stack(forced.logits)


def same(pair: Pair, ours: Ids, theirs: Ids, logits_NBV: torch.Tensor) -> str:
    """Raises unless the rows are equal, each up to a near-tie of the logits before our ids."""
    allowed_NB, equal, widest = near_tie(pair, logits_NBV), 0, 0.0
    for b, (mine, yours) in enumerate(zip(ours, theirs, strict=True)):
        n = next((n for n, (i, j) in enumerate(zip(mine, yours, strict=False)) if i != j), None)
        if n is None:
            if len(mine) != len(yours):
                raise RuntimeError(f"row {b} has {len(mine)} ids, or {len(yours)}")
            equal += 1
            continue
        gap = (logits_NBV[n, b, mine[n]] - logits_NBV[n, b, yours[n]]).abs().item()
        if not gap <= allowed_NB[n, b]:
            raise RuntimeError(f"row {b} differs from id {n} on, by {gap:.3g} in logits")
        widest = max(widest, gap)
    ties = f", the others up to a near-tie (at most {widest:.2g})" if equal < len(ours) else ""
    return f"{equal} of {len(ours)} rows equal{ties}"


def near_tie(pair: Pair, logits_NBV: torch.Tensor) -> torch.Tensor:
    """By how much [N, B] two logits may differ for rounding to swap them: TIE steps between numbers
    of the model's dtype that are as large as the largest logit."""
    eps = torch.finfo(pair.loaded[0].dtype).eps
    return TIE * eps * 2 ** logits_NBV.abs().amax(-1).log2().floor()


def farthest(x: torch.Tensor, y: torch.Tensor) -> float:
    return (x - y).abs().max().item()
