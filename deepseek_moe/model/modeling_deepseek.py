"""DeepSeekMoE (Dai et al. 2024, arXiv 2401.06066) on one page.

A Llama decoder whose MLPs, from the second layer on, are mixtures of many small experts:

    gate            a softmax over all routed experts; each token keeps the K largest scores
    experts         the routed ones: 1408 wide in the 16B model, where a dense MLP is 10944 wide
    shared_experts  two more that see every token, stored as one MLP of twice the width

Parameters have the names of the official checkpoint, but the routed experts of a layer are stacked
while they are in memory (layout.py). Attention, norms and rotary embedding are transformers' own
for Llama.

Letters that suffix locals: B batch, L length, T = B*L tokens, K experts a token, E experts,
D hidden size.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .balance_loss import AddLossGradient, Sequences, balance_loss, weights_of_rows
from .configuration_deepseek import DeepseekConfig
from .fast_generation import FastGenerationMixin
from .layout import (
    first_few,
    refuse_adapters_of_experts,
    refuse_wrong_checkpoint,
    stack_official_experts,
)

CACHE = "cache" if hasattr(MoeModelOutputWithPast, "cache") else "past_key_values"
"""What transformers calls the cache in arguments and outputs: before 5.24 `past_key_values`."""


@dataclass
class Routing:
    """What one MoE layer did with one batch while training. The layer fills it.

    Gradient checkpointing calls a layer twice with the same one, and the second call takes the
    picks of the first. A tie, or a kernel that rounds differently, would change them.
    """

    index_TK: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


class DeepseekGate(nn.Module):
    """The router: scores every expert for every token, keeps the best. `weight` is [E, D]."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts  # transformers 5.17's expert parallelism asks
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(
        self, hidden_TD: torch.Tensor, routing: Routing | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns logits [T, E], the picks' weights [T, K] (both fp32) and the picks [T, K].

        It takes the picks that `routing` holds, or, while training, puts its own there, before
        expert parallelism changes what it returns.
        """
        index_TK = routing.index_TK if routing is not None else None
        # Logits in bf16 would swap experts whose scores are close. Autocast would undo the cast.
        with torch.autocast(hidden_TD.device.type, enabled=False):
            logits_TE = F.linear(hidden_TD.float(), self.weight.float())
        scores_TE = logits_TE.softmax(dim=-1)
        if index_TK is None:
            index_TK = scores_TE.detach().topk(self.top_k, dim=-1, sorted=False).indices
        if routing is not None and self.training:
            routing.index_TK = index_TK
        weights_TK = scores_TE.gather(-1, index_TK)
        if self.norm_topk_prob and self.top_k > 1:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return logits_TE, weights_TK, index_TK


@use_experts_implementation
class DeepseekExperts(nn.Module):
    """The routed experts: `gate_up_proj` [E, 2F, D] (gate above up) and `down_proj` [E, D, F].

    `forward` is the reference ("eager"). By default transformers takes "grouped_mm" instead, one
    product for all experts; `experts_implementation=` of `from_pretrained` chooses.
    """

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        E, D, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts = E
        self.act_fn = ACT2FN[config.hidden_act]
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, width))
        self.register_load_state_dict_pre_hook(stack_official_experts)

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, expert: int) -> "Expert":
        """`experts[i].gate_proj.weight` reads and writes what the expert has in the stacks."""
        if not -len(self) <= expert < len(self):
            raise IndexError(f"expert {expert} of {len(self)}")
        width = self.down_proj.shape[-1]
        return Expert(
            ExpertMatrix(self.gate_up_proj, (expert, slice(width))),
            ExpertMatrix(self.gate_up_proj, (expert, slice(width, None))),
            ExpertMatrix(self.down_proj, (expert, slice(None))),
        )

    def forward(
        self, hidden_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """out[t] = sum_k weights[t, k] * expert(index[t, k])(hidden[t])."""
        return loop_over_experts(self, hidden_TD, index_TK, weights_TK)

    def matrices(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one expert: gate above up [2F, D], and down [D, F]."""
        return self.gate_up_proj[expert], self.down_proj[expert]


class ExpertMatrix:
    """A matrix of one expert. Its `weight` is a view of a stack; assigning to it copies."""

    def __init__(self, stack: nn.Parameter, where: tuple[int, slice]) -> None:
        self._stack, self._where = stack, where

    @property
    def weight(self) -> torch.Tensor:
        return self._stack[self._where]

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        with torch.no_grad():
            self._stack[self._where] = value


class Expert(NamedTuple):
    """One of the routed experts, with the names that its matrices have in a checkpoint."""

    gate_proj: ExpertMatrix
    up_proj: ExpertMatrix
    down_proj: ExpertMatrix


def loop_over_experts(
    experts: Any, hidden_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """`DeepseekExperts.forward`, also for `experts` that store their matrices in another way.

    The sum is in the dtype of `weights_TK`. An index of `num_experts` marks a pick that another
    rank computes (expert parallelism).
    """
    out_TD = torch.zeros_like(hidden_TD, dtype=weights_TK.dtype)
    for expert in index_TK.unique().tolist():
        if expert == experts.num_experts:
            continue
        token, pick = torch.where(index_TK == expert)
        gate_up, down = experts.matrices(expert)
        gate, up = F.linear(hidden_TD[token], gate_up).chunk(2, dim=-1)
        out = F.linear(experts.act_fn(gate) * up, down)
        out_TD.index_add_(0, token, out * weights_TK[token, pick, None])
    return out_TD.to(hidden_TD.dtype)


class DeepseekMLP(nn.Module):
    """SwiGLU, for the dense layers and the shared experts."""

    def __init__(self, config: DeepseekConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


class DeepseekMoE(nn.Module):
    """The router sends each token to K experts; the shared experts see all of them."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.aux_loss_alpha = config.aux_loss_alpha
        self.seq_aux = config.seq_aux
        self.gate = DeepseekGate(config)
        self.experts = DeepseekExperts(config)
        width = (config.n_shared_experts or 0) * config.moe_intermediate_size
        self.shared_experts = DeepseekMLP(config, width) if width else None

    def forward(
        self,
        hidden_BLD: torch.Tensor,
        routing: Routing | None = None,
        sequences: Sequences | None = None,
    ) -> torch.Tensor:
        routing = Routing() if routing is None else routing
        hidden_TD = hidden_BLD.reshape(-1, hidden_BLD.shape[-1])
        logits_TE, weights_TK, index_TK = self.gate(hidden_TD, routing)
        loss = None
        if self.training and self.aux_loss_alpha > 0:
            number_T, count, scale, weight_G = sequences or Sequences()
            if number_T is None:
                B, L = hidden_BLD.shape[:2]
                number_T, count = torch.arange(B * L, device=hidden_BLD.device) // L, B
            if not self.seq_aux:
                number_T, count = number_T.clamp(max=0), 1
                weight_G = None if weight_G is None else weight_G.sum(0, keepdim=True)
            scores_TE = logits_TE.softmax(dim=-1)
            loss = balance_loss(scores_TE, routing.index_TK, number_T, count, weight_G)
            routing.aux_loss = self.aux_loss_alpha * loss.detach()
        shared_BLD = self.shared_experts(hidden_BLD) if self.shared_experts is not None else None
        # The routed experts come last: a checkpointed layer is computed again only as far as the
        # last tensor that the backward pass needs, so their output is spared.
        out_BLD = self.experts(hidden_TD, index_TK, weights_TK).view_as(hidden_BLD)
        out_BLD = out_BLD if shared_BLD is None else out_BLD + shared_BLD
        if loss is not None:
            out_BLD = AddLossGradient.apply(out_BLD, self.aux_loss_alpha * scale * loss)
        return out_BLD


class DeepseekDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.is_moe = config.is_moe_layer(layer_idx)
        dense = config.intermediate_size
        self.mlp = DeepseekMoE(config) if self.is_moe else DeepseekMLP(config, dense)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_BLD: torch.Tensor,
        routing: Routing | None = None,
        sequences: Sequences | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        hidden_BLD = hidden_BLD + self.self_attn(self.input_layernorm(hidden_BLD), **kwargs)[0]
        for_moe = (routing, sequences) if self.is_moe else ()
        return hidden_BLD + self.mlp(self.post_attention_layernorm(hidden_BLD), *for_moe)


class DeepseekPreTrainedModel(PreTrainedModel):
    config: DeepseekConfig
    config_class = DeepseekConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(DeepseekGate, index=0),
        "hidden_states": DeepseekDecoderLayer,
        "attentions": LlamaAttention,
    }

    _free_heads: tuple[str, ...] = ()  # of these, a checkpoint may have none, or others

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (DeepseekExperts, DeepseekGate)):
            for weight in module.parameters():
                init.normal_(weight, mean=0.0, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As transformers' own, but every tensor must be there with its shape, and no other.

        Raises:
            ValueError: names the wrong tensors. transformers would warn and use random ones. Or
                `quantization_config` is of a library that quantises linears only, not the experts.
        """
        quantization = kwargs.get("quantization_config")
        if quantization is not None and not getattr(quantization, "quantizes_experts", False):
            raise ValueError(
                "this quantization_config would leave the experts, most of the model, as they are; "
                "to generate, use deepseek_moe.load(..., quantization='int4'); to train, "
                "finetune.py --bits 4"
            )
        path = pretrained_model_name_or_path
        local = path is not None and Path(path).is_dir()
        if local:
            refuse_wrong_checkpoint(path, kwargs, cls.config_class, cls._free_heads)
        try:
            model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        finally:  # Now the files of a hub id are here. An error that names tensors says more.
            if path is not None and not local:
                refuse_wrong_checkpoint(path, kwargs, cls.config_class, cls._free_heads)
        wrong = [f"{key} is missing" for key in sorted(info["missing_keys"])]
        wrong += [f"{key} is not of this model" for key in sorted(info["unexpected_keys"])]
        wrong = [fault for fault in wrong if not fault.startswith(cls._free_heads)]
        if wrong:
            raise ValueError(f"{path} does not hold this model: {first_few(wrong)}")
        return (model, info) if output_loading_info else model

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, but an adapter whose experts it would leave out is refused.

        Raises:
            ValueError: the adapter has LoRA on the linears of single experts.
        """
        info = super().load_adapter(*args, **kwargs)
        refuse_adapters_of_experts(info.unexpected_keys)
        return info


class DeepseekModel(DeepseekPreTrainedModel):
    """The decoder without its head: ids in, hidden states out."""

    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq", r"^lm_head\."]

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        # No padding_idx: pad equals eos, and eos must be able to learn.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [DeepseekDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        sequence_ids: torch.LongTensor | None = None,
        num_sequences: int | None = None,
        aux_loss_scale: float = 1.0,
        sequence_weights: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> "DeepseekModelOutput":
        """Four arguments are for the balance loss in training.

        Args:
            sequence_ids: [B, L] numbers the sequences of the batch from 0 (-1: padding), so that
                each counts by itself in padded and packed rows too. Without it a row is a sequence,
                as far as a 2-D `attention_mask` has ones.
            num_sequences: how many they are. Without it the GPU is asked, and waited for.
            aux_loss_scale: multiplies the gradient of the balance loss. Where gradients are
                accumulated, it is the share of this batch in the sequences of the step.
            sequence_weights: how much each sequence counts. Without it they count alike.
            past_key_values: the `cache`, as transformers before 5.24 and its `generate` call it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        other = any(isinstance(one, Cache) for one in kwargs.values())  # by a name of the future
        if other or None not in (cache, past_key_values):
            raise ValueError("give one cache, as `cache` or, by its older name, `past_key_values`")
        cache = past_key_values if cache is None else cache
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            length = inputs_embeds.shape[1]
            position_ids = (torch.arange(length, device=inputs_embeds.device) + seen).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )

        hidden_BLD = inputs_embeds
        cos_sin = self.rotary_emb(hidden_BLD, position_ids=position_ids)
        masked = attention_mask is not None and attention_mask.shape == inputs_embeds.shape[:2]
        if self.training and sequence_ids is None and masked:
            num_sequences = len(attention_mask)
            rows = torch.arange(num_sequences, device=attention_mask.device)[:, None]
            sequence_ids = torch.where(attention_mask.bool(), rows, -1)
        sequences = Sequences(None, 0, aux_loss_scale, sequence_weights)
        if sequence_ids is not None and self.training:
            count = int(sequence_ids.max()) + 1 if num_sequences is None else num_sequences
            sequences = Sequences(sequence_ids.flatten(), count, aux_loss_scale, sequence_weights)
        losses, picks = [], []
        for layer in self.layers:
            routing = Routing()
            hidden_BLD = layer(
                hidden_BLD,
                routing=routing,
                sequences=sequences,
                attention_mask=mask,
                position_ids=position_ids,
                position_embeddings=cos_sin,
                use_cache=use_cache,
                **{CACHE: cache},
                **kwargs,
            )
            if routing.index_TK is not None:
                picks.append(routing.index_TK)
            if routing.aux_loss is not None:
                losses.append(routing.aux_loss.to(inputs_embeds.device))
        aux_losses = torch.stack(losses) if losses else None
        return DeepseekModelOutput(
            last_hidden_state=self.norm(hidden_BLD),
            aux_loss=aux_losses.sum() if losses else None,
            aux_losses=aux_losses,
            router_picks=tuple(picks) or None,
            **{CACHE: cache},
        )


@dataclass
class DeepseekModelOutput(MoeModelOutputWithPast):
    """transformers' output, and while training what the MoE layers did.

    `aux_losses` has the balance loss of each, `aux_loss` is their sum, and `router_picks` has the
    picks [T, K] of each, once also where gradient checkpointing computes a layer again.
    """

    aux_loss: torch.Tensor | None = None
    aux_losses: torch.Tensor | None = None
    router_picks: tuple[torch.Tensor, ...] | None = None


@dataclass
class DeepseekCausalLMOutput(MoeCausalLMOutputWithPast):
    """The same for a model with a head; transformers' own output has `aux_loss`."""

    aux_losses: torch.Tensor | None = None
    router_picks: tuple[torch.Tensor, ...] | None = None


class DeepseekForCausalLM(FastGenerationMixin, DeepseekPreTrainedModel):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.model = DeepseekModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> DeepseekCausalLMOutput:
        """`loss` is the language loss of `labels`, which are shifted here (-100 does not count).

        While training, the balance loss reaches the gradients from inside the layers, as in the
        published model. It is not part of `loss`; `aux_loss` shows its value. `logits_to_keep` > 0
        computes the logits of that many last positions only. An `lm_head` that has `computes_loss`
        takes the labels while training, and there are no logits.
        """
        # generate and Trainer read the signature above to see what the model takes.
        if self.training and not kwargs.keys() & {"sequence_ids", "aux_loss_scale"}:
            tokens = inputs_embeds if input_ids is None else input_ids
            items = kwargs.get("num_items_in_batch")
            kwargs["sequence_weights"] = weights_of_rows(tokens, labels, attention_mask, items)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            past_key_values=past_key_values,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_BLD = outputs.last_hidden_state[:, keep]
        loss = logits = None
        if labels is not None and self.training and getattr(self.lm_head, "computes_loss", False):
            loss = self.lm_head(hidden_BLD, labels, **kwargs)
        else:
            logits = self.lm_head(hidden_BLD)
        if labels is not None and logits is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return DeepseekCausalLMOutput(
            loss=loss,
            aux_loss=outputs.aux_loss,
            aux_losses=outputs.aux_losses,
            router_picks=outputs.router_picks,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE: getattr(outputs, CACHE)},
        )


__all__ = ["DeepseekForCausalLM", "DeepseekModel", "DeepseekPreTrainedModel"]
