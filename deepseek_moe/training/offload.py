"""The 4-bit experts of QLoRA in host memory, streamed to the GPU just ahead of their use.

Each layer's packed stacks stay in pinned host memory. While one layer computes, a copy stream fills
the other of two buffers on the GPU with the stacks of the next one:

    computing    layer 3    layer 4    layer 5
    copying      layer 4    layer 5    layer 6

The backward pass, and what checkpointing computes again, ask for the layers from the last one down.
So the way turns at either end, where both layers that come next are in the buffers still.

Two events of each buffer keep the order: it is read when it is full, and filled again when what
read it has been computed. The scales of the packed numbers, a thirtieth of their bytes, stay on the
GPU. On a CPU the same code makes plain copies.

A pass that is recorded as a CUDA graph (compute/replayed_model.py) holds its copies too. It begins
with empty buffers and waits for its last copy, so that it can follow any other pass.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from mmap import mmap

import bitsandbytes as bnb
import psutil
import torch
from torch import nn

from ..errors import UserError
from ..model.configuration_deepseek import DeepseekConfig
from ..model.modeling_deepseek import DeepseekExperts

BUFFERS = 2


class HostStack(bnb.nn.Params4bit):
    """A packed stack that stays in host memory, whatever device its module is moved to."""

    @classmethod
    def of(cls, parameter: bnb.nn.Params4bit) -> "HostStack":
        """`parameter`, quantised on any device, without the memory that it takes there."""
        packed = parameter.data
        host = _pinned_copy(packed) if packed.device.type == "cuda" else packed
        state = parameter.quant_state
        stack = cls(host, quant_state=state, quant_type=state.quant_type, bnb_quantized=True)
        stack.host = host
        return stack

    def to(self, device: torch.device | None = None, *_: object, **__: object) -> "HostStack":
        """Moves only the scales. `nn.Module.to` calls it, always with a device first."""
        if device is not None:
            self.quant_state.to(device)
        return self

    @contextmanager
    def on_device(self) -> Iterator[torch.Tensor]:
        """Lends the packed numbers on the device that `stream_experts` was given. What reads them
        must have been started, on the current stream, when the context ends."""
        with self.stream.lend(self.layer, self.place) as packed:
            yield packed


def _pinned_copy(packed: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory of its exact size; PyTorch's own would take the next power of two."""
    host = torch.frombuffer(mmap(-1, packed.nbytes), dtype=packed.dtype).view(packed.shape)
    cudart, address = torch.cuda.cudart(), host.data_ptr()
    torch.cuda.check_error(cudart.cudaHostRegister(address, host.nbytes, 0))
    weakref.finalize(host, cudart.cudaHostUnregister, address).atexit = False
    return host.copy_(packed)


def refuse_small_host(config: DeepseekConfig) -> None:
    """Raises:
    UserError: the host has less memory free than the packed stacks of the model take.
    """
    widths = 3 * config.hidden_size * config.moe_intermediate_size
    needed = len(config.moe_layers) * (config.n_routed_experts or 0) * widths / 2
    if needed > (free := psutil.virtual_memory().available):
        raise UserError(
            f"--offload_experts True keeps {needed / 1e9:.1f} GB in host memory, of which "
            f"{free / 1e9:.1f} GB are free; end other programs, or leave it out"
        )


def stream_experts(model: nn.Module, device: torch.device) -> None:
    """Lets the `HostStack`s of `model` be computed with on `device`, where all else is moved: PEFT
    has put the adapters of experts beside their stacks."""
    model.to(device)
    experts = [one for one in model.modules() if isinstance(one, DeepseekExperts)]
    layers = [[p for p in one.parameters() if isinstance(p, HostStack)] for one in experts]
    if layers := [stacks for stacks in layers if stacks]:
        ExpertStream(layers, device)


class _Buffer:
    """Room on the device for the stacks of one layer."""

    def __init__(self, stacks: Sequence[HostStack], device: torch.device) -> None:
        self.packed = [torch.empty_like(stack.host, device=device) for stack in stacks]
        self.empty()

    def empty(self) -> None:
        """Forgets what it holds. The next copy into it waits for the work that the current stream
        already has."""
        self.layer = -1  # whose stacks are in it, or on their way
        if self.packed[0].device.type == "cuda":
            self.full, self.read = torch.cuda.Event(), torch.cuda.Event()
            self.read.record()


class ExpertStream:
    """The stacks of all layers, in the order of the layers, of which a few are on the device."""

    def __init__(self, layers: Sequence[Sequence[HostStack]], device: torch.device) -> None:
        self.layers = layers
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers = [_Buffer(layers[0], device) for _ in range(BUFFERS)]  # last used last
        self.now = self.buffers[-1]  # of the layer that was asked for last
        self.copying = False  # whether copies were begun since `restart`
        for buffer in self.buffers if self.copies else ():
            for packed in buffer.packed:
                packed.record_stream(self.copies)
        for number, stacks in enumerate(layers):
            for place, stack in enumerate(stacks):
                stack.stream, stack.layer, stack.place = self, number, place

    def restart(self) -> None:
        """Begins anew with empty buffers, when all copies that were begun are complete."""
        if self.copying:
            torch.cuda.current_stream().wait_stream(self.copies)
        self.copying = False
        for buffer in self.buffers:
            buffer.empty()

    @contextmanager
    def lend(self, layer: int, place: int) -> Iterator[torch.Tensor]:
        """The packed stack at `place` of a layer, on the device while the context lasts."""
        buffer = self._turn_to(layer)
        if self.copies:
            torch.cuda.current_stream().wait_event(buffer.full)
        yield buffer.packed[place]
        if self.copies:
            buffer.read.record()

    def _turn_to(self, layer: int) -> _Buffer:
        """The buffer of this layer. If it is another than before, the one after it is copied."""
        before, last = self.now.layer, len(self.layers) - 1
        if layer != before:
            self.now = self._buffer_of(layer)
            ahead = layer + (1 if layer == 0 or before < layer < last else -1)
            if 0 <= ahead <= last:
                self._buffer_of(ahead)
        return self.now

    def _buffer_of(self, layer: int) -> _Buffer:
        """The buffer that has the layer, or else the one that was used longest ago gets it."""
        buffer = next((one for one in self.buffers if one.layer == layer), self.buffers[0])
        if buffer.layer != layer:
            self._fill(buffer, layer)
        self.buffers.remove(buffer)
        self.buffers.append(buffer)
        return buffer

    def _fill(self, buffer: _Buffer, layer: int) -> None:
        buffer.layer = layer
        with torch.cuda.stream(self.copies):  # which is this one on a CPU
            if self.copies:
                self.copying = True
                self.copies.wait_event(buffer.read)
            for here, stack in zip(buffer.packed, self.layers[layer], strict=True):
                here.copy_(stack.host, non_blocking=True)
            if self.copies:
                buffer.full.record()
