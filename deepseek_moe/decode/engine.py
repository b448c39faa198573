"""Continues batches of sequences as fast as the GPU reads the weights.

A step (the decoder, the sampler, and what both change) is captured in a CUDA graph for each size of
batch. One step is always under way on the GPU before the ids of the last are looked at, so neither
Python nor a stop id makes the GPU wait. Sequences that have ended leave the batch.

Without a GPU the same steps run one by one, without graphs. So the tests of this file run on a CPU.

Letters: B sequences, T tokens, V vocabulary.
"""

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from transformers import PreTrainedModel

from ..errors import UserError
from ..model.modeling_deepseek import DeepseekForCausalLM
from .batch import Batch
from .decoder import Decoder, StaticCache
from .reading import Text, read_texts
from .sampling import Prompts, Sampler, Sampling, mark_broken, seen_in, sum_rows
from .supported import find_unsupported, is_supported, signature_of

GRAPH_ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
"""Sizes of batches for which graphs are made. A batch takes the next that holds it; above these are
the multiples of 128."""
CHUNK = 8192  # tokens of prompts that go through the layers at once, if memory suffices
CACHE_BLOCK = 64  # the cache's capacity is a multiple of it
FIRST_CACHE = 1024  # positions of all sequences together, 0.23 GB of the 16B model


class UnsupportedModel(UserError):
    """The engine does not compute this model, or not as it is now."""


class Engine:
    """A model and what its batches share: the static cache, the state of their rows, the graphs.

    The cache grows with the texts, to twice its capacity at a time. It then has other addresses, so
    the graphs are captured again: four times in a text of 16,384 tokens.

    It holds one batch at a time. Another takes the place of the one before. When a batch begins,
    the engine is built anew if the model has changed (supported.py says what is noticed). The batch
    then goes on with these weights, since to look for new ones at every token would take as long as
    a token does. Numbers that are changed in place, as an optimizer does it, count at once.

    Args:
        chunk: tokens of prompts that go through the layers at once.
        ops: what computes the stages. By default it is triton_ops, for models that `is_supported`
            takes. If it is given, nobody asks that: with torch_ops an engine runs on a CPU.

    Raises:
        UnsupportedModel: the model holds something that the decoder does not compute, or the
            kernels do not run with it where it is.
    """

    def __init__(
        self, model: DeepseekForCausalLM, chunk: int = CHUNK, ops: ModuleType | None = None
    ) -> None:
        self.model, self.chunk, self.ops = model, chunk, ops
        self._build()

    def _build(self) -> None:
        """Reads the model as it is now, after it has released what was built for the model as it
        was: the references to its weights, the cache, and the graphs, which hold addresses."""
        self.signature = self.decoder = None
        self.cache: StaticCache | None = None
        self.rows: Rows | None = None
        self.batch: EngineBatch | None = None
        self.graphs: dict[tuple[int, Sampler], torch.cuda.CUDAGraph | None] = {}
        self.pool: tuple[int, int] | None = None
        self.held: list[torch.Tensor] = []
        model = self.model
        self.device = model.device
        self.fast = self.device.type == "cuda"
        ops = self.ops
        if find_unsupported(model) or (ops is None and not is_supported(model)):
            raise UnsupportedModel(refusal_of(model))
        if ops is None:
            from ..kernels.decode import triton_ops as ops
        # Not torch's own stream for captures, which is on the GPU of the process's first capture.
        self.stream = torch.cuda.Stream(self.device) if self.fast else None
        # Weights that the decoder moves can still be trained, even if the caller is in inference
        # mode.
        with torch.inference_mode(False), torch.no_grad():
            self.decoder = Decoder(model, ops)
        # Last, because the decoder moves weights. While they are held, nothing new gets the
        # addresses by which the signature knows them.
        self.held = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
        self.signature = signature_of(model)

    def start(self, prompts: Prompts, sample: Sampler, steps: int) -> "EngineBatch":
        """Begins to continue `prompts`, each by up to `steps` tokens.

        Raises:
            UnsupportedModel: the model was changed into one that the engine does not compute.
        """
        self.batch = None  # the batch before loses its rows, also if this one fails
        self.refresh()
        self.graphs = {key: graph for key, graph in self.graphs.items() if key[1] in (sample, None)}
        with self.on_device():
            self.batch = EngineBatch(self, prompts, sample, steps)
        return self.batch

    def refresh(self) -> None:
        """Builds the engine anew if the model has changed."""
        if self.signature != signature_of(self.model):
            self._build()

    def on_device(self) -> AbstractContextManager:
        """Inside, the model's GPU is the current one, on which kernels are launched."""
        return torch.cuda.device(self.device) if self.fast else nullcontext()

    def _reserve(self, slots: int, positions: int, most: int) -> None:
        """Has a cache of `slots` sequences that holds `positions` of each, of at most `most`."""
        if self.cache and self.cache.slots >= slots and self.cache.capacity >= positions:
            return
        self.graphs.clear()  # they hold the addresses of what is replaced
        self.cache = self.rows = None
        cache = StaticCache(self.model, slots, capacity_for(slots, positions, most))
        rows = Rows(size_for(slots), self.model.config.vocab_size, self.device)
        self.cache, self.rows = cache, rows  # if memory ran out, it has none of both

    def grow(self, positions: int, most: int) -> None:
        """Makes room for `positions` of each sequence, of at most `most`, if there is not."""
        if self.cache.capacity >= positions:
            return
        if self.fast:
            torch.cuda.synchronize(self.device)  # A step of a graph that goes now may be under way.
        self.graphs = dict.fromkeys(self.graphs)  # their kernels need not be compiled again
        cache, self.cache = self.cache, None  # if memory runs out, there is none
        cache.grow(capacity_for(cache.slots, positions, most))
        self.cache = cache

    @torch.inference_mode()
    def prefill(self, prompts: Prompts) -> torch.Tensor:
        """Logits [B, V] after each prompt. Fills the slots 0 to B - 1 of the cache."""
        texts = [Text(prompt, slot, wanted=1) for slot, prompt in enumerate(prompts)]
        states = read_texts(self.decoder, self.cache, texts, self.chunk)
        return torch.cat([self.decoder.logits(x_RD) for x_RD in states])

    @torch.inference_mode()
    def step(self, size: int, sample: Sampler) -> None:
        """Replaces the ids of the first `size` rows by their next ones."""
        captured = self.fast and isinstance(sample, Sampling)
        key = (size, sample if captured else None)
        if not self.fast or key not in self.graphs:  # the first step compiles the kernels
            self.graphs[key] = None
            self._decode(size, sample)
            return
        if self.graphs[key] is None:
            self.graphs[key] = self._capture(size, sample if captured else None)
        self.graphs[key].replay()
        if not captured:
            self._advance(size, self.graphs[key].logits, sample)

    def _decode(self, size: int, sample: Sampler | None) -> torch.Tensor:
        rows = self.rows.first(size)
        logits_BV = self.decoder.step(rows.ids, rows.position, rows.slot, self.cache)
        if sample is not None:
            self._advance(size, logits_BV, sample)
        return logits_BV

    def _advance(self, size: int, logits_BV: torch.Tensor, sample: Sampler) -> None:
        rows = self.rows.first(size)
        # A row may go one step too far, which nobody reads. It must stay inside of the cache.
        last = self.cache.capacity - 1
        sum_rows(logits_BV, out=rows.sum)
        new_B = sample(logits_BV, rows.seen)
        self.decoder.ops.advance(new_B, rows.ids, rows.position, rows.seen, last)

    def _capture(self, size: int, sample: Sampler | None) -> torch.cuda.CUDAGraph:
        if not any(self.graphs.values()):  # the pool of earlier graphs went with the last of them
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        if isinstance(sample, Sampling) and sample.generator(self.device) is not None:
            graph.register_generator_state(sample.generator(self.device))
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            graph.logits = self._decode(size, sample)
        return graph


class Rows:
    """What a step reads and writes, a row for each sequence: the last id, its position (-1: no
    sequence), the slot of the cache, the ids seen so far, and the sum of the logits."""

    def __init__(self, size: int, vocabulary: int, device: torch.device) -> None:
        self.ids = torch.zeros(size, dtype=torch.int64, device=device)
        self.position = torch.full((size,), -1, dtype=torch.int32, device=device)
        self.slot = torch.zeros(size, dtype=torch.int32, device=device)
        self.seen = torch.zeros(size, vocabulary, dtype=torch.bool, device=device)
        self.sum = torch.zeros(size, dtype=torch.float32, device=device)

    def first(self, size: int) -> "Rows":
        """Views of the first `size` rows."""
        rows = object.__new__(Rows)
        for name, tensor in vars(self).items():
            setattr(rows, name, tensor[:size])
        return rows

    def keep(self, kept: list[int]) -> None:
        """Moves these rows together to the front. Those behind them hold no sequence."""
        index = torch.tensor(kept, pin_memory=self.ids.is_cuda)  # from pinned memory nobody waits
        index = index.to(self.ids.device, non_blocking=True)
        for tensor in vars(self).values():
            tensor[: len(kept)] = tensor[index]
        self.position[len(kept) :] = -1


Sent = tuple[list[int], torch.Tensor, torch.Tensor, torch.cuda.Event | None]
"""What is on its way to the CPU: prompts, their ids, the sums of their logits, the arrival."""


class EngineBatch(Batch):
    """Prompts that an engine continues. `next` is refused once it has begun another batch."""

    def __init__(self, engine: Engine, prompts: Prompts, sample: Sampler, steps: int) -> None:
        super().__init__(prompts)
        self.engine, self.sample = engine, sample
        self.left = steps - 1  # after the one that the prompts themselves give
        longest = max(map(len, prompts))
        self.most = min(engine.model.config.max_position_embeddings, longest + steps)
        # That the cache must hold: a row also holds the place of the token that comes next.
        self.positions = longest + 1
        engine._reserve(len(prompts), min(self.positions, self.most), self.most)
        self.under_way: deque[Sent] = deque()
        self.started = False
        rows, count = engine.rows, len(prompts)
        with torch.inference_mode():
            logits_BV = engine.prefill(prompts)
            rows.position.fill_(-1)
            rows.position[:count] = torch.tensor([len(prompt) - 1 for prompt in prompts])
            rows.slot[:count] = torch.arange(count, device=engine.device)
            rows.seen[:count] = seen_in(prompts, rows.seen.shape[1], engine.device)
            engine._advance(count, logits_BV, sample)
            self._send(count)

    def next(self) -> dict[int, int]:
        if self.engine.batch is not self:
            raise UserError(
                "another generation has begun on this model; finish one before the next, or give "
                "their prompts together"
            )
        with self.engine.on_device():
            if not self.under_way:
                self._launch()
            numbers, ids, sums, event = self.under_way.popleft()
            if self.started:  # The step ahead must not delay the first id.
                self._launch()
        self.started = True
        if event is not None:
            event.synchronize()
        return dict(zip(numbers, mark_broken(ids, sums), strict=True))

    def _keep(self, rows: list[int]) -> None:
        if rows and self.engine.batch is self:  # else the engine's rows are another batch's
            with torch.inference_mode(), self.engine.on_device():
                self.engine.rows.keep(rows)

    def close(self) -> None:
        if self.engine.batch is self:
            self.engine.batch = None

    def _launch(self) -> None:
        """Begins a step, if one is left."""
        if self.left > 0 and self.numbers:
            self.left -= 1
            self.positions += 1
            self.engine.grow(min(self.positions, self.most), self.most)
            self.engine.step(size_for(len(self.numbers)), self.sample)
            self._send(len(self.numbers))

    def _send(self, count: int) -> None:
        """Sends the ids and the sums of the logits on their way to the CPU."""
        rows, event, fast = self.engine.rows.first(count), None, self.engine.fast
        ids, sums = (
            torch.empty_like(x, device="cpu", pin_memory=fast).copy_(x, non_blocking=fast)
            for x in (rows.ids, rows.sum)
        )
        if fast:
            event = torch.cuda.Event()
            event.record()
        self.under_way.append((list(self.numbers), ids, sums, event))


def refusal_of(model: PreTrainedModel) -> str:
    """What to tell the user of a model that the engine does not take."""
    found = find_unsupported(model) or f"it is {model.dtype} on {model.device}"
    return (
        f"the fast engine does not take this model: {found}. It takes this architecture, with "
        "nothing added, in bfloat16, float16, int8 or int4, on one NVIDIA GPU with Triton; leave "
        "`fast` out to generate without the engine"
    )


def size_for(count: int) -> int:
    """Rows of the graph for `count` sequences."""
    return next((size for size in GRAPH_ROWS if size >= count), -(-count // 128) * 128)


def capacity_for(slots: int, positions: int, most: int) -> int:
    """A cache's capacity: a power of 2 that holds `positions`, but no more than `most` take."""
    capacity = max(2 ** (positions - 1).bit_length(), FIRST_CACHE // slots)
    return -(-min(capacity, most) // CACHE_BLOCK) * CACHE_BLOCK
