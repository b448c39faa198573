"""The model as decoding needs it: tokens of any sequences go through all layers, over a static
cache. What each stage computes is in kernels/decode/torch_ops.py.

There are three ways through a layer, by how many tokens come at once:

    one to FEW      a kernel for each stage; an expert that several tokens chose is read once
    more            library products, and for the experts a kernel that reads each weight once
    whole prompts   library products for the experts too, and attention within the prompts

Letters: T tokens, D hidden, H heads, V vocabulary.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor, nn

from ..kernels.decode import Place
from ..kernels.int_weights import Weight, words_and_groups
from ..model.layout import EXPERT_STACKS
from ..model.modeling_deepseek import DeepseekForCausalLM, DeepseekMLP

FEW = 16  # tokens that take a kernel for each stage
SILENT = 64  # width of the zeros that stand for shared experts in a model without them
Attention = Callable[[int, Tensor], Tensor]
"""(layer, queries [T, H * D]) -> [T, H * D]."""


class StaticCache:
    """Keys and values of `slots` sequences of at most `capacity` positions.

    Each layer has memory of its own, so that one layer after another can grow.
    """

    def __init__(self, model: DeepseekForCausalLM, slots: int, capacity: int) -> None:
        shape = slots, model.config.num_key_value_heads, capacity, model.config.head_dim
        like = {"dtype": model.dtype, "device": model.device}
        self.slots, self.capacity = slots, capacity
        self.layers = [
            (torch.empty(shape, **like), torch.empty(shape, **like)) for _ in model.model.layers
        ]

    def grow(self, capacity: int) -> None:
        """Moves all keys and values to new addresses with room for `capacity` positions. Beside
        the larger cache, memory holds one old layer."""

        def larger(old: Tensor) -> Tensor:
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : self.capacity] = old
            return new

        for i, (keys, values) in enumerate(self.layers):
            self.layers[i] = larger(keys), larger(values)
        self.capacity = capacity


class _Layer:
    """The weights of one layer as the kernels read them. What they read together is stored side by
    side, and the model's own parameters become views of that."""

    def __init__(self, layer: nn.Module) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm = layer.input_layernorm.weight.data
        self.post_norm = layer.post_attention_layernorm.weight.data
        self.gate = None
        dense = mlp
        if not isinstance(mlp, DeepseekMLP):
            self.gate, dense = mlp.gate.weight.data, mlp.shared_experts
            self.top_k = mlp.gate.top_k
            self.norm_topk = mlp.gate.norm_topk_prob and self.top_k > 1
            self.experts_gate_up, self.experts_down = (
                _weight(mlp.experts, stack) for stack in EXPERT_STACKS
            )
        self.qkv = _lay_side_by_side([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o = _weight(attention.o_proj)
        if dense is None:  # the kernels of a mixture want a shared expert
            D = attention.q_proj.in_features
            self.gate_up = _zeros(self.experts_gate_up, 2 * SILENT, D)
            self.down = _zeros(self.experts_down, D, SILENT)
        else:
            self.gate_up = _lay_side_by_side([dense.gate_proj, dense.up_proj])
            self.down = _weight(dense.down_proj)


def _zeros(like: Weight, rows: int, columns: int) -> Weight:
    """A weight [rows, columns] of zeros, stored as `like` is."""
    if like.scale is None:
        return like._replace(data=like.data.new_zeros(rows, columns))
    words, groups = words_and_groups(columns, like.bits)
    zeros = like.data.new_zeros(rows, words), like.scale.new_zeros(rows, groups)
    return Weight(*zeros, like.bits)


class Decoder:
    """Ids to logits with `ops`: the module triton_ops, or torch_ops, its slow twin."""

    def __init__(self, model: DeepseekForCausalLM, ops: ModuleType) -> None:
        config = model.config
        self.ops = ops
        self.eps = model.model.norm.variance_epsilon  # supported.py asks that all norms have it
        self.embedding = model.model.embed_tokens.weight.data
        self.layers = [_Layer(layer) for layer in model.model.layers]
        self.norm, self.head = model.model.norm.weight.data, _weight(model.lm_head)
        positions = torch.arange(config.max_position_embeddings, device=model.device)[None]
        cos_sin = model.model.rotary_emb(torch.zeros((), device=model.device), positions)
        half = config.head_dim // 2  # both halves of a head have the same angles
        self.cos_sin = tuple(table[0, :, :half].float().contiguous() for table in cos_sin)
        self.side = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        # What a token of a prompt takes in a layer: its picks in and out of the experts, the shared
        # or dense MLP, and the rest.
        width, picked = config.hidden_size, config.num_experts_per_tok or 0  # 0: a dense model
        picks = picked * (2 * width + 3 * config.moe_intermediate_size)
        numbers = picks + 3 * config.intermediate_size + 8 * width
        self.bytes_of_prompt = numbers * model.dtype.itemsize
        # With these the programs of a kernel find out which of them is last. They are 0 in between.
        size = max(FEW * config.num_attention_heads, config.hidden_size, 512)  # `attend` takes 512
        self.counters = torch.zeros(size, dtype=torch.int32, device=model.device)

    def step(self, ids_T: Tensor, position_T: Tensor, slot_T: Tensor, cache: StaticCache) -> Tensor:
        """Logits [T, V], fp32, after one token of each of T sequences.

        A token stands at its position of its slot. A row of position -1 holds no token.
        """
        hidden_TD = self.embedding[ids_T]
        if len(ids_T) <= FEW:
            return self._few(hidden_TD, position_T, slot_T, cache)

        def attention(i: int, q_TD: Tensor) -> Tensor:
            place = Place(*cache.layers[i], position_T, slot_T)
            return self.ops.attend(q_TD, place, self.counters)

        return self.logits(self._many(hidden_TD, position_T, slot_T, cache, attention))

    def prefill(
        self,
        ids_T: Tensor,
        position_T: Tensor,
        slot_T: Tensor,
        cache: StaticCache,
        ends: list[int],
        rows: list[int],
    ) -> Tensor:
        """The hidden states [R, D], which `logits` takes, of the tokens in these R rising `rows`.

        Several sequences are laid end to end. Sequence b ends before ends[b], and each goes into
        its slot, after what that holds of it already.
        """
        longest = max(end - start for start, end in zip([0, *ends[:-1]], ends, strict=True))
        bounds = torch.tensor([0, *ends, *rows], device=ids_T.device)
        ends_B, row_R = bounds.split([len(ends) + 1, len(rows)])
        last_B, ends_B = ends_B[1:] - 1, ends_B.int()
        last_position_B, slot_B = position_T[last_B], slot_T[last_B]

        def attention(i: int, q_TD: Tensor) -> Tensor:
            if len(q_TD) == len(ids_T):
                place = Place(*cache.layers[i], last_position_B, slot_B)
                return self.ops.attend_prompt(q_TD, place, ends_B, longest)
            # The last layer asks for these rows only, and each is a sequence of one query.
            place = Place(*cache.layers[i], position_T[row_R], slot_T[row_R])
            ends_R = torch.arange(len(rows) + 1, device=q_TD.device).int()
            return self.ops.attend_prompt(q_TD, place, ends_R, 1)

        return self._many(self.embedding[ids_T], position_T, slot_T, cache, attention, row_R)

    def logits(self, x_RD: Tensor) -> Tensor:
        """Logits [R, V], fp32."""
        return self.ops.dense(x_RD, self.head, torch.float32)

    def _side_stream(self) -> AbstractContextManager:
        """What is inside may run beside what follows, up to `_wait_side_stream`: the products of
        the shared experts use the tensor cores, while routing and permutations use the memory."""
        if self.side is None:
            return nullcontext()
        self.side.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.side)

    def _wait_side_stream(self) -> None:
        # Before this no tensor that one of the two streams reads may be freed or reused.
        if self.side is not None:
            torch.cuda.current_stream().wait_stream(self.side)

    def _few(
        self, hidden_TD: Tensor, position_T: Tensor, slot_T: Tensor, cache: StaticCache
    ) -> Tensor:
        ops, eps = self.ops, self.eps
        for i, layer in enumerate(self.layers):
            place = Place(*cache.layers[i], position_T, slot_T)
            q_TD = ops.qkv(hidden_TD, layer.input_norm, eps, layer.qkv, self.cos_sin, place)
            out_TD = ops.attend(q_TD, place, self.counters)
            hidden_TD = ops.linear(out_TD, layer.o, residual_TO=hidden_TD)
            normed = (hidden_TD, layer.post_norm, eps)
            if layer.gate is None:
                act_TF = ops.gate_up(*normed, layer.gate_up)
                hidden_TD = ops.linear(act_TF, layer.down, residual_TO=hidden_TD)
                continue
            x_TD, shared_TF, index_TK, weights_TK = ops.route(
                *normed, layer.gate, layer.gate_up, position_T, layer.top_k, layer.norm_topk,
                self.counters,
            )  # fmt: skip
            act_TKF = ops.experts_gate_up(x_TD, layer.experts_gate_up, index_TK)
            hidden_TD = ops.experts_down(
                act_TKF, shared_TF, layer.experts_down, layer.down, index_TK, weights_TK,
                hidden_TD, self.counters,
            )  # fmt: skip
        return ops.linear(hidden_TD, self.head, self.norm, eps, dtype=torch.float32)

    def _many(
        self,
        hidden_TD: Tensor,
        position_T: Tensor,
        slot_T: Tensor,
        cache: StaticCache,
        attention: Attention,
        row_R: Tensor | None = None,
    ) -> Tensor:
        """The normed hidden states [T, D] that the head takes, or [R, D] of the tokens `row_R`.
        In that case the last layer has little to do after it has filled the cache."""
        ops, eps = self.ops, self.eps
        norms = [layer.input_norm for layer in self.layers[1:]] + [self.norm]
        hidden_TD, x_TD = ops.add_norm(hidden_TD, None, self.layers[0].input_norm, eps)
        for i, (layer, next_norm) in enumerate(zip(self.layers, norms, strict=True)):
            qkv_TO = ops.dense(x_TD, layer.qkv)
            q_TD = ops.rotate(qkv_TO, self.cos_sin, Place(*cache.layers[i], position_T, slot_T))
            if row_R is not None and i == len(self.layers) - 1:
                q_TD, hidden_TD, position_T = q_TD[row_R], hidden_TD[row_R], position_T[row_R]
            out_TD = attention(i, q_TD)
            out_TD = ops.dense(out_TD, layer.o)
            hidden_TD, x_TD = ops.add_norm(out_TD, hidden_TD, layer.post_norm, eps)
            with self._side_stream():
                mlp_TD = ops.dense(ops.swiglu(ops.dense(x_TD, layer.gate_up)), layer.down)
            if layer.gate is not None:
                logits_TE = ops.dense(x_TD, Weight(layer.gate), torch.float32)
                index_TK, weights_TK = ops.pick_experts(
                    logits_TE, position_T, layer.top_k, layer.norm_topk
                )
                token_N, place_TK, ends_E = ops.sort_picks(index_TK, len(layer.gate))
                step = row_R is None
                act_NF = ops.grouped_gate_up(x_TD, layer.experts_gate_up, token_N, ends_E, step)
                out_ND = ops.grouped_down(act_NF, layer.experts_down, ends_E, step)
            self._wait_side_stream()
            if layer.gate is None:
                hidden_TD, x_TD = ops.add_norm(mlp_TD, hidden_TD, next_norm, eps)
            else:
                hidden_TD, x_TD = ops.combine(
                    out_ND, place_TK, weights_TK, mlp_TD, hidden_TD, next_norm, eps
                )
        return x_TD


def _weight(module: nn.Module, name: str = "weight") -> Weight:
    """A weight of `module`, with its scales if it is quantised."""
    scale = getattr(module, f"{name}_scale", None)
    if scale is None:
        return Weight(getattr(module, name).data)
    return Weight(getattr(module, name).data, scale.data, module.bits)


def _lay_side_by_side(linears: list[nn.Module]) -> Weight:
    """One weight of all rows of `linears`, whose parameters become views of it.

    Nothing is moved if they are such views already, because an engine was made before.
    """
    joined = {}
    for name in ("weight", "weight_scale"):
        tensors = [getattr(one, name).data for one in linears if hasattr(one, name)]
        if not tensors:
            continue
        joined[name] = joined_view(tensors)
        if joined[name] is None:
            joined[name] = torch.cat(tensors)
            pieces = joined[name].split([len(tensor) for tensor in tensors])
            for linear, piece in zip(linears, pieces, strict=True):
                getattr(linear, name).data = piece
    return Weight(joined["weight"], joined.get("weight_scale"), getattr(linears[0], "bits", 16))


def joined_view(tensors: list[Tensor]) -> Tensor | None:
    """All rows of `tensors` [R, C] as one view, if they follow each other in one memory."""
    first = tensors[0]
    place = first.data_ptr()
    for tensor in tensors:
        follows = (
            tensor.data_ptr() == place
            and tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and tensor.is_contiguous()
            and (tensor.dtype, tensor.shape[1:]) == (first.dtype, first.shape[1:])
        )
        if not follows:
            return None
        place += tensor.nbytes
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())
