"""Small batches of adapters without the host: the decoder's two passes as CUDA graphs.

A step of one row of 1,024 tokens starts ten thousand kernels. The host takes 0.8 s for that, the
GPU 0.13 s for their work. A graph starts all of them at once. What each pass computes is that of
`DeepseekModel`, which is the plain twin; embedding, layers and last norm are in the graphs, head
and loss are not.

A graph is for one shape, so shapes are rounded up: the row by the collator (`examples.FLAT`), and
here the number of examples and the longest one, to powers of two. The first batch of a shape is
computed plainly, which also compiles kernels; the second one is recorded, if memory has room. Then
the optimizer must have taken a step, so that its averages are there. All graphs share their memory,
since only one is in use at a time.

Whatever changes from step to step is a tensor whose place stays: the inputs, the seed of dropout,
and the gradients, to which the backward graph adds.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn import functional as F
from transformers import TrainingArguments

from ...kernels.training.torch_ops import Seed
from ...model.modeling_deepseek import DeepseekModel, DeepseekModelOutput
from ..offload import HostStack
from .varlen_attention import VARLEN

MOST_TOKENS = 8192  # of a batch; larger ones keep the GPU busy, and their graphs much memory


def use_replays(model: nn.Module, args: TrainingArguments, bits: int) -> bool:
    """Makes the decoder in `model` replay its passes, if it has adapters and the process no others.
    Returns whether it does.

    Layers must not draw random numbers, apart from the dropout of adapters, which gets seeds here,
    so checkpointing need not bring back random states, which a graph cannot. Products in 8 `bits`
    are bitsandbytes', with PEFT's own dropout.
    """
    config = model.config
    is_alone = args.world_size == 1 and not args.deepspeed
    adapts = isinstance(model, PeftModel) and bits != 8 and not config.attention_dropout
    takes_bounds = config._attn_implementation == VARLEN and args.device.type == "cuda"
    if not (args.cuda_graphs and is_alone and adapts and takes_bounds):
        return False
    options = {"use_reentrant": False, "preserve_rng_state": False}
    # transformers 5.23 gave it a second name.
    args.gradient_checkpointing_kwargs = args.activation_checkpointing_kwargs = options
    replay(model)
    return True


def replay(model: PeftModel) -> None:
    device = next(model.parameters()).device
    step = torch.zeros((), dtype=torch.int64, device=device)
    for number, module in enumerate(model.modules()):
        if isinstance(module, LoraLayer):
            module.dropout_seed = Seed(step, number)
    [decoder] = [module for module in model.modules() if type(module) is DeepseekModel]
    decoder.__class__ = ReplayedModel
    decoder.step_seed, decoder.graphs, decoder.gradients = step, {}, {}
    decoder.trained = [one for one in decoder.parameters() if one.requires_grad]
    decoder.has_stepped, decoder.pool_bytes = False, 0
    decoder.pool = torch.cuda.graph_pool_handle()
    offloaded = [one.stream for one in model.parameters() if isinstance(one, HostStack)]
    decoder.restart_copies = offloaded[0].restart if offloaded else lambda: None


class Graphs(NamedTuple):
    """The two passes for one shape."""

    inputs: dict[str, torch.Tensor]
    forward: torch.cuda.CUDAGraph
    outputs: DeepseekModelOutput
    gradient_BLD: torch.Tensor  # of the last hidden state
    backward: torch.cuda.CUDAGraph
    restart_copies: Callable[[], None]  # of offloaded experts

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        self.restart_copies()
        graph.replay()
        self.restart_copies()  # The graph has filled the buffers, unnoticed.


class ReplayedModel(DeepseekModel):
    def forward(
        self, input_ids: torch.LongTensor | None = None, **inputs: Any
    ) -> DeepseekModelOutput:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(input_ids, **inputs)
        self.step_seed.fill_(int(torch.randint(2**31 - 1, ())))  # by the host's random state
        # Once a shape is noted, a pass has made gradients. The optimizer's step sets them to None.
        self.has_stepped |= bool(self.graphs) and self.trained[0].grad is None
        if self.gradients:
            self.place_gradients()
        if "cu_seq_lens_q" not in inputs or input_ids.numel() > MOST_TOKENS:
            return super().forward(input_ids, **inputs)
        tensors, numbers = rounded(input_ids, **inputs)
        key = (*numbers.values(), *(x.shape for x in tensors.values()))
        if key not in self.graphs:
            self.graphs[key] = None  # which a second batch of this shape will record
        elif self.graphs[key] is None and self.has_stepped:
            self.graphs[key] = self._has_room() and self._record(tensors, numbers)
        if not (graphs := self.graphs[key]):
            return super().forward(**tensors, **numbers)
        for name, tensor in graphs.inputs.items():
            tensor.copy_(tensors[name])
        anchor = torch.zeros((), device=input_ids.device, requires_grad=True)
        found = copy(graphs.outputs)
        found.last_hidden_state = _Replay.apply(graphs, anchor)
        return found

    def place_gradients(self) -> None:
        """Gives each parameter that trains the gradient to which the graphs add: that which it had
        when the first graph was recorded. It is zeros again where the optimizer has set it to None.
        """
        if not self.gradients:
            self.gradients = {
                one: torch.zeros_like(one) if one.grad is None else one.grad for one in self.trained
            }
        unset = [gradient for one, gradient in self.gradients.items() if one.grad is None]
        if unset:
            torch._foreach_zero_(unset)
        for one, gradient in self.gradients.items():
            one.grad = gradient

    def _has_room(self) -> bool:
        """Whether graphs can have as much memory as a step has taken at most, of which they may
        have some, beside as much again for the plain passes of other shapes. Gradients then stay.
        """
        device = self.step_seed.device
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        allowed = torch.cuda.get_per_process_memory_fraction(device) * total
        free = min(free, allowed - torch.cuda.memory_reserved(device))
        unset = sum(one.nbytes for one in self.trained if one.grad is None)
        taken = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        taken = max(0, taken - unset)
        return unset + max(0, taken - self.pool_bytes) + taken <= free

    def _record(self, tensors: dict[str, torch.Tensor], numbers: dict[str, int]) -> Graphs:
        self.place_gradients()
        before = torch.cuda.memory_reserved()
        inputs = {name: tensor.clone() for name, tensor in tensors.items()}
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with self._recording(forward):
            outputs = super().forward(**inputs, **numbers)
        hidden_BLD = outputs.last_hidden_state
        gradient_BLD = torch.empty_like(hidden_BLD)
        # A backward pass runs outside of autocast. Layers that it computes again turn it on.
        with torch.autocast("cuda", enabled=False), self._recording(backward):
            torch.autograd.backward(hidden_BLD, gradient_BLD)
        outputs.last_hidden_state = hidden_BLD.detach()
        torch.cuda.empty_cache()
        self.pool_bytes += max(0, torch.cuda.memory_reserved() - before)
        return Graphs(inputs, forward, outputs, gradient_BLD, backward, self.restart_copies)

    @contextmanager
    def _recording(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Records what is inside. Copies of offloaded experts begin and end inside too, because a
        graph cannot wait for an event from outside of it."""
        self.restart_copies()
        with torch.cuda.graph(graph, pool=self.pool):
            self.restart_copies()
            yield
            self.restart_copies()
        self.restart_copies()


class _Replay(torch.autograd.Function):
    """The last hidden state. The gradients of parameters do not pass through autograd, which only
    tells the backward graph that it is its turn: `anchor` is there to need a gradient."""

    @staticmethod
    def forward(ctx: Any, graphs: Graphs, anchor: torch.Tensor) -> torch.Tensor:
        ctx.graphs = graphs
        graphs.replay(graphs.forward)
        return graphs.outputs.last_hidden_state.view_as(graphs.outputs.last_hidden_state)

    @staticmethod
    def backward(ctx: Any, grad_BLD: torch.Tensor) -> tuple[None, None]:
        ctx.graphs.gradient_BLD.copy_(grad_BLD)
        ctx.graphs.replay(ctx.graphs.backward)
        return None, None


def rounded(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    sequence_ids: torch.Tensor,
    num_sequences: int,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    aux_loss_scale: float = 1.0,
    **_: Any,
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The arguments of `DeepseekModel.forward` for a packed row, in shapes that come again: the
    tensors, and the numbers that a graph holds.

    Empty examples fill up their number. They do not count in the balance loss.
    """
    most, device = power_of_two(num_sequences), input_ids.device
    counts_G = torch.arange(most, device=device) < num_sequences
    ends = most + 2 - len(cu_seq_lens_q)  # what is left of the row counts as one more example
    tensors = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "sequence_ids": sequence_ids,
        "sequence_weights": counts_G / num_sequences,
        "aux_loss_scale": torch.full((), aux_loss_scale, device=device),
        "cu_seq_lens_q": F.pad(cu_seq_lens_q, (0, ends), value=input_ids.numel()),
        # A mask of four dimensions is taken as it is. Without one transformers asks the device
        # whether the row is packed, which the bounds say already.
        "attention_mask": input_ids.new_empty((0, 0, 0, 0)),
    }
    longest = min(input_ids.numel(), power_of_two(max_length_q))
    return tensors, {"num_sequences": most, "max_length_q": longest}


def power_of_two(number: int) -> int:
    """The next one that is not smaller."""
    return 1 << (number - 1).bit_length()
