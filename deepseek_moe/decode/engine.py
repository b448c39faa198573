"""Continues batches of sequences as fast as the GPU reads the weights.

A step (decoder.py, the sampler, and what both change) is captured in a CUDA graph for each size of
batch, and always one step is under way on the GPU before the ids of the last are looked at: neither
Python nor a stop id makes it wait. Sequences that have ended leave the batch.

Without CUDA graphs the same steps run one by one: so the CPU tests this file.

Letters: B sequences, T tokens, V vocabulary.
"""

from collections import deque
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from transformers import PreTrainedModel

from ..errors import UserError
from ..kernels import has_triton
from ..kernels.decode import torch_ops as plain
from ..model.modeling_deepseek import DeepseekForCausalLM
from .decoder import Decoder, StaticCache
from .sampling import Sampler, Sampling, greedy, mark_broken, seen_in, sum_rows
from .supported import is_supported, signature_of, tensors_of, unknown_in

SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
"""Rows for which graphs are made; a batch takes the next that holds it, above them multiples of
128."""
CHUNK = 8192  # tokens of prompts that go through the layers at once
BLOCK = 64  # the cache's capacity is a multiple


class UnknownModel(UserError):
    """The engine does not compute this model, or not as it is now."""


class Engine:
    """A model and what its batches share: the static cache, the state of their rows, the graphs.

    One batch at a time: another takes the place of the one before.

    Each new batch is computed with the model as it is when the batch begins: if it has changed
    since (supported.py says what is noticed), the engine is built anew. A batch that has begun goes
    on with the weights that it began with; those that were replaced meanwhile are not looked for at
    every token, which would take as long as a token does. Numbers that are changed in place, as an
    optimizer does it, are the weights that it began with, and count at once.

    An engine may also be made where `supports` says no, to try it step by step on a CPU.

    Raises:
        UnknownModel: the model holds something that the decoder does not compute.
    """

    def __init__(self, model: DeepseekForCausalLM, chunk: int = CHUNK) -> None:
        self.model, self.chunk = model, chunk
        # Made where `supports` says no, to be tried on a CPU: then no later build asks it either.
        self.by_hand = not self.supports(model)
        self._build()

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Whether `model` is one that the kernels know, where they run: whole and as it was loaded,
        in bf16 or fp16 or int8 or int4, on one NVIDIA GPU."""
        return (
            isinstance(model, DeepseekForCausalLM)
            and model.device.type == "cuda"
            and torch.version.hip is None
            and has_triton()
            and torch.cuda.get_device_capability(model.device) >= (8, 0)
            and model.dtype in (torch.bfloat16, torch.float16)
            and is_supported(model)
        )

    def _build(self) -> None:
        """Reads the model as it is now.

        First it releases what was built for the model as it was: the references to its weights, the
        cache, and the graphs, which hold the addresses of both.
        """
        self.signature = self.decoder = None
        self.cache: StaticCache | None = None
        self.rows: Rows | None = None
        self.batch: Batch | None = None
        self.graphs: dict[tuple[int, Sampler], torch.cuda.CUDAGraph | None] = {}
        self.pool: tuple[int, int] | None = None
        self.held: list[torch.Tensor] = []
        model = self.model
        if unknown_in(model) or not (self.by_hand or self.supports(model)):
            raise UnknownModel(refusal_of(model))
        self.device = model.device
        self.fast = self.device.type == "cuda"
        if self.fast:
            from ..kernels.decode import triton_ops as fused
        # torch's own, one a process, is on the GPU of the first capture.
        self.stream = torch.cuda.Stream(self.device) if self.fast else None
        # The model is still to be trained, whatever mode the caller generates in.
        with torch.inference_mode(False), torch.no_grad():
            self.decoder = Decoder(model, fused if self.fast else plain)
        self.context = model.config.max_position_embeddings
        self.held = tensors_of(model)
        self.signature = signature_of(model)  # last: the decoder moves some of the weights

    def start(self, prompts: Sequence[Sequence[int]], sample: Sampler, steps: int) -> "Batch":
        """Begins to continue `prompts`, each by up to `steps` tokens.

        Raises:
            UnknownModel: the model was changed into one that the engine does not compute.
        """
        self.batch = None  # whatever happens below, the one before has lost its rows
        if self.signature != signature_of(self.model):
            self._build()
        self.graphs = {key: graph for key, graph in self.graphs.items() if key[1] in (sample, None)}
        longest = max(map(len, prompts)) + steps
        with self.here():
            self._reserve(len(prompts), min(self.context, longest))
            self.batch = Batch(self, prompts, sample, steps)
        return self.batch

    def here(self) -> AbstractContextManager:
        """Makes the model's GPU the current one, on which kernels are launched."""
        return torch.cuda.device(self.device) if self.fast else nullcontext()

    def _reserve(self, slots: int, positions: int) -> None:
        size = size_for(slots)
        if self.cache and self.cache.slots >= slots and self.cache.capacity > positions:
            return
        self.graphs.clear()  # they hold the addresses of what is replaced
        self.cache = self.rows = None
        if self.fast:  # the whole context if there is room, so that longer texts find it ready
            whole = StaticCache.bytes(self.model, slots, self.context)
            if whole < torch.cuda.mem_get_info(self.device)[0] // 4:
                positions = self.context
        cache = StaticCache(self.model, slots, -(-(positions + 1) // BLOCK) * BLOCK)
        rows = Rows(size, self.model.config.vocab_size, self.device)
        self.cache, self.rows = cache, rows  # both, or none if memory ran out

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits [B, V] after each prompt, which are now in the slots 0 to B - 1."""
        logits = []
        for pieces in _chunks([len(prompt) for prompt in prompts], self.chunk):
            ids = [np.array(prompts[b][start:end]) for b, start, end in pieces]
            position = [np.arange(start, end) for _, start, end in pieces]
            slot = [np.full(end - start, b) for b, start, end in pieces]
            rows = np.stack(
                [np.concatenate(part, dtype=np.int32) for part in (ids, position, slot)]
            )
            ids_T, position_T, slot_T = torch.from_numpy(rows).to(self.device)
            ends = np.cumsum([len(piece) for piece in ids]).tolist()
            out_BV = self.decoder.prefill(ids_T, position_T, slot_T, self.cache, ends)
            whole = [i for i, (b, _, end) in enumerate(pieces) if end == len(prompts[b])]
            logits.append(out_BV[whole] if len(whole) < len(pieces) else out_BV)
        return torch.cat(logits)

    @torch.inference_mode()
    def step(self, size: int, sample: Sampler) -> None:
        """Replaces the id of each of the first `size` rows by its next."""
        captured = self.fast and (sample is greedy or isinstance(sample, Sampling))
        key = (size, sample if captured else None)
        if not self.fast or key not in self.graphs:  # the first step, which compiles the kernels
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
        # A row that goes on one step too long, unread, must stay inside the cache.
        last = self.cache.capacity - 1
        sum_rows(logits_BV, out=rows.sum)
        new_B = sample(logits_BV, rows.seen)
        self.decoder.ops.advance(new_B, rows.ids, rows.position, rows.seen, last)

    def _capture(self, size: int, sample: Sampler | None) -> torch.cuda.CUDAGraph:
        if not any(self.graphs.values()):  # a pool goes with the last graph that used it
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        if isinstance(sample, Sampling) and sample.generator(self.device) is not None:
            graph.register_generator_state(sample.generator(self.device))
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            graph.logits = self._decode(size, sample)
        return graph


class Rows:
    """What a step reads and writes, a row a sequence: the id to go on from, its position (-1: no
    sequence), its slot of the cache, which ids it has seen, and the sum of its logits, which is
    finite if all of them are."""

    def __init__(self, size: int, vocabulary: int, device: torch.device) -> None:
        self.ids = torch.zeros(size, dtype=torch.int64, device=device)
        self.position = torch.full((size,), -1, dtype=torch.int32, device=device)
        self.slot = torch.zeros(size, dtype=torch.int32, device=device)
        self.seen = torch.zeros(size, vocabulary, dtype=torch.bool, device=device)
        self.sum = torch.zeros(size, dtype=torch.float32, device=device)

    def first(self, size: int) -> "Rows":
        """Views of the first rows."""
        rows = object.__new__(Rows)
        for name, tensor in vars(self).items():
            setattr(rows, name, tensor[:size])
        return rows

    def keep(self, kept: list[int]) -> None:
        """Moves rows together; those behind them hold no sequence."""
        index = torch.tensor(kept, pin_memory=self.ids.is_cuda)  # pinned: the copy does not wait
        index = index.to(self.ids.device, non_blocking=True)
        for tensor in vars(self).values():
            tensor[: len(kept)] = tensor[index]
        self.position[len(kept) :] = -1


class Batch:
    """Prompts that an engine is continuing."""

    def __init__(
        self, engine: Engine, prompts: Sequence[Sequence[int]], sample: Sampler, steps: int
    ) -> None:
        self.engine, self.sample = engine, sample
        self.numbers = list(range(len(prompts)))  # which prompt each row continues
        self.left = steps - 1  # after the one that the prompts themselves give
        # What was sent to the CPU: which prompts, their ids, the sums of their logits.
        self.under_way: deque[
            tuple[list[int], torch.Tensor, torch.Tensor, torch.cuda.Event | None]
        ] = deque()
        self._prefill(prompts)

    def next(self) -> dict[int, int]:
        """The next id of each prompt that was in the batch when its step began; `BROKEN` where the
        model's logits are NaN or infinite.

        Raises:
            UserError: the engine has begun another batch.
        """
        if self.engine.batch is not self:
            raise UserError(
                "another generation has begun on this model; finish one before the next, or give "
                "their prompts together"
            )
        with self.engine.here():
            if not self.under_way:
                self._launch()
            numbers, ids, sums, event = self.under_way.popleft()
            if self.started:  # one step ahead, but not before the first id is out
                self._launch()
        self.started = True
        if event is not None:
            event.synchronize()
        return dict(zip(numbers, mark_broken(ids, sums), strict=True))

    def drop(self, numbers: Collection[int]) -> None:
        """These prompts have ended: they leave the batch."""
        kept = [row for row, number in enumerate(self.numbers) if number not in numbers]
        if len(kept) < len(self.numbers):
            self.numbers = [self.numbers[row] for row in kept]
            if kept and self.engine.batch is self:  # else the rows are those of another batch
                with torch.inference_mode(), self.engine.here():
                    self.engine.rows.keep(kept)

    @torch.inference_mode()
    def _prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        engine, count = self.engine, len(prompts)
        logits_BV = engine.prefill(prompts)
        rows = engine.rows
        rows.position.fill_(-1)
        rows.position[:count] = torch.tensor([len(prompt) - 1 for prompt in prompts])
        rows.slot[:count] = torch.arange(count, device=engine.device)
        rows.seen[:count] = seen_in(prompts, rows.seen.shape[1], engine.device)
        engine._advance(count, logits_BV, self.sample)
        self.started = False
        self._sent(count)

    def _launch(self) -> None:
        if self.left > 0 and self.numbers:
            self.left -= 1
            self.engine.step(size_for(len(self.numbers)), self.sample)
            self._sent(len(self.numbers))

    def _sent(self, count: int) -> None:
        """Sends the ids and the sums of the logits on their way to the CPU."""
        rows, event = self.engine.rows.first(count), None
        ids, sums = (self._send(tensor) for tensor in (rows.ids, rows.sum))
        if self.engine.fast:
            event = torch.cuda.Event()
            event.record()
        self.under_way.append((list(self.numbers), ids, sums, event))

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.engine.fast:
            return tensor.clone()
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(
            tensor, non_blocking=True
        )


def refusal_of(model: PreTrainedModel) -> str:
    """What to tell the user of a model that the engine does not take."""
    found = unknown_in(model) or f"it is {model.dtype} on {model.device}"
    return (
        f"the fast engine does not take this model: {found}. It takes this architecture, with "
        "nothing added, in bfloat16 or float16 or packed, on one NVIDIA GPU with Triton; leave "
        "`fast` out to generate without the engine"
    )


def size_for(count: int) -> int:
    """Rows of the graph for `count` sequences."""
    return next((size for size in SIZES if size >= count), -(-count // 128) * 128)


def _chunks(lengths: list[int], chunk: int) -> list[list[tuple[int, int, int]]]:
    """Pieces (prompt, start, end) that go through the layers together: whole prompts of up to
    `chunk` tokens in all, or one piece of a prompt that is longer."""
    chunks, room = [], 0
    for b, length in enumerate(lengths):
        if length <= room:
            chunks[-1].append((b, 0, length))
            room -= length
            continue
        starts = range(0, length, chunk)
        chunks += [[(b, start, min(start + chunk, length))] for start in starts]
        room = chunk - length if length <= chunk else 0
    return chunks
