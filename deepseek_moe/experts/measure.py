"""Measures a profile: what each routed expert does while the model reads some text.

The text goes once through the model, whose experts are computed by a function of our own
(transformers lets a model choose one by name). It returns what they always return, and sums up on
the way what a profile needs: the picks, their weights, and the norms of the weighted outputs.

Letters: B batch, L length, T = B*L tokens, K experts a token, N = T*K picks, E experts, D hidden,
F expert width.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..errors import RunError, UserError
from ..kernels.training import ops_for, torch_ops
from ..model.modeling_deepseek import DeepseekExperts, DeepseekForCausalLM
from .profile import LayerProfile, Picks, Profile

Ids = Sequence[int] | np.ndarray

MEASURED = "measured"
"""The name of our function while a model is measured."""


def measure(
    model: DeepseekForCausalLM,
    sequences: Sequence[Ids],
    *,
    fingerprint: str,
    settings: dict[str, Any] | None = None,
    batch_size: int = 16,
    name: str = "measuring",
) -> Profile:
    """The profile of a model over all ids of `sequences`.

    The host waits for the GPU only at the end, so that little time is lost.

    Args:
        model: in evaluation mode. Its experts are not quantised.
        sequences: ids, each as the model shall read them: BOS included, within the context.
        fingerprint: of the checkpoint that `model` was loaded from.
        settings: go into the profile, for its readers.
        batch_size: how many sequences are read together. It changes the result by rounding only.
        name: stands before the progress bar.

    Raises:
        UserError: there is no id, or the model has no experts that can be measured.
        RunError: scores of a router or outputs of an expert are not finite.
    """
    assert not model.training
    experts = routed_experts(model)
    if not experts:
        raise UserError("the model has no routed experts; measure a mixture of experts")
    if not all(isinstance(one, DeepseekExperts) for one in experts.values()):
        raise UserError("the experts are quantised; measure the model in 16 or 32 bits")
    tokens = sum(map(len, sequences))
    if not tokens:
        raise UserError("there is no token to measure; give some text")
    sums = PickSums()
    bar = tqdm(total=tokens, desc=name, unit="token", unit_scale=True)
    with sums.collected_from(model), torch.inference_mode(), bar:
        for batch in batches_of(sequences, batch_size):
            ids_BL, sums.is_token_T = padded(batch, model.device)
            model.model(ids_BL, use_cache=False)  # A profile needs no logits.
            bar.update(sum(map(len, batch)))
        layers = {n: sums.layer_profile(one, n, tokens) for n, one in experts.items()}
    return Profile(layers, tokens, fingerprint, hash_ids(sequences), settings or {})


def picked_experts(model: DeepseekForCausalLM, ids: Ids) -> dict[int, Picks]:
    """The picks of each layer with routed experts, in one plain forward pass over `ids`.

    It asks only the routers, so the experts may be quantised.
    """
    found: dict[int, Picks] = {}

    def keep(number: int, outputs: tuple[torch.Tensor, ...]) -> None:
        _, weights_LK, index_LK = outputs
        weights_LK, order_LK = weights_LK.sort(descending=True)
        found[number] = Picks(index_LK.gather(-1, order_LK).tolist(), weights_LK.tolist())

    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, inputs, outputs, n=n: keep(n, outputs))
        for n, layer in enumerate(model.model.layers)
        if layer.is_moe
    ]
    try:
        with torch.inference_mode():
            model.model(torch.tensor([list(ids)], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def router_profile(picks: dict[int, Picks], num_experts: int, begin: int, model: str) -> Profile:
    """A profile of the tokens from `begin` on, without the norms, which no router knows.

    Args:
        picks: of one sequence, by the number of the layer.
        num_experts: of a layer.
        begin: the first token that is counted.
        model: its name, for the readers of the profile.
    """
    layers, tokens = {}, len(next(iter(picks.values())).experts) - begin
    for number, (experts, weights) in picks.items():
        index_N = torch.tensor(experts[begin:]).flatten()
        weights_N = torch.tensor(weights[begin:]).flatten()
        gate_E = index_N.bincount(weights_N.double(), num_experts) / tokens
        picks_E = index_N.bincount(minlength=num_experts)
        layers[number] = LayerProfile(picks_E.tolist(), gate_E.tolist(), [])
    return Profile(layers, tokens, "", "", {"model": model})


def routed_experts(model: DeepseekForCausalLM) -> dict[int, nn.Module]:
    """The experts of each layer that has some, by the layer's number."""
    return {n: layer.mlp.experts for n, layer in enumerate(model.model.layers) if layer.is_moe}


class PickSums:
    """What is summed over the picks of a measurement.

    Attributes:
        is_token_T: which tokens of the batch are no padding. It is set before each forward pass.
        of: for the experts of each layer, over the picks of each expert: how many they are, their
            weights, and their weights times the norms of the outputs; fp64 [3, E].
    """

    def __init__(self) -> None:
        self.is_token_T: torch.Tensor | None = None
        self.of: dict[nn.Module, torch.Tensor] = {}

    @contextmanager
    def collected_from(self, model: DeepseekForCausalLM) -> Iterator[None]:
        """Adds to the sums whenever the experts of `model` are computed."""
        before = model.get_experts_implementation()
        ALL_EXPERTS_FUNCTIONS[MEASURED] = self._compute
        try:
            model.set_experts_implementation(MEASURED)
            yield
        finally:
            model.set_experts_implementation(before)
            del ALL_EXPERTS_FUNCTIONS[MEASURED]

    def _compute(
        self,
        experts: DeepseekExperts,
        hidden_TD: torch.Tensor,
        index_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> torch.Tensor:
        """Computes what `DeepseekExperts.forward` does, and adds to the sums."""
        with torch.cuda.device_of(hidden_TD):  # Triton launches on the current device.
            out_TD, norm_TK = experts_and_norms(experts, hidden_TD, index_TK, weights_TK)
        values_3TK = torch.stack([torch.ones_like(weights_TK), weights_TK, norm_TK])
        is_token_T1 = self.is_token_T.to(index_TK.device)[:, None]
        values_3TK = values_3TK.where(is_token_T1, 0.0)
        # No two picks of a token are of one expert, so nothing is written twice.
        values_3TE = values_3TK.new_zeros(3, len(index_TK), experts.num_experts)
        values_3TE.scatter_(2, index_TK.expand_as(values_3TK), values_3TK)
        sums_3E = values_3TE.sum(1, dtype=torch.float64)
        self.of[experts] = self.of[experts] + sums_3E if experts in self.of else sums_3E
        return out_TD

    def layer_profile(self, experts: nn.Module, number: int, tokens: int) -> LayerProfile:
        """Of the layer `number`, for the `tokens` that were no padding.

        Raises:
            RunError: a sum is not finite.
        """
        sums_3E = self.of[experts].cpu()
        if not sums_3E.isfinite().all():
            raise RunError(
                f"the router's scores or the experts' outputs of layer {number} are not finite; "
                "check the weights, or measure in bfloat16 or float32"
            )
        picks_E, gate_E, norm_E = sums_3E
        picks = [int(n) for n in picks_E]
        return LayerProfile(
            picks, (gate_E / tokens).tolist(), (norm_E / picks_E.clamp(min=1)).tolist()
        )


def experts_and_norms(
    experts: DeepseekExperts,
    hidden_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of the experts [T, D], and of each pick its weight times the norm of what its
    expert gives [T, K].

    The weights multiply the inputs of down, so that its outputs are weighted already.
    """
    # The kernels are tried in 16 bits only.
    ops = torch_ops if hidden_TD.dtype.itemsize > 2 else ops_for(hidden_TD.device)
    token_N, place_TK, ends_E = ops.sort_picks(index_TK.int(), experts.num_experts)
    weights_N = torch.empty_like(weights_TK).flatten()
    weights_N[place_TK.flatten()] = weights_TK.flatten()
    gate_up_NF = F.grouped_mm(hidden_TD[token_N], experts.gate_up_proj.mT, offs=ends_E)
    gate_NF, up_NF = gate_up_NF.chunk(2, dim=-1)
    act_NF = experts.act_fn(gate_NF) * up_NF * weights_N[:, None]
    out_ND = F.grouped_mm(act_NF.to(hidden_TD.dtype), experts.down_proj.mT, offs=ends_E)
    norm_N = torch.linalg.vector_norm(out_ND, dim=-1, dtype=torch.float32)
    return ops.sum_picks(out_ND, None, place_TK), norm_N[place_TK]


def batches_of(sequences: Sequence[Ids], batch_size: int) -> list[list[Ids]]:
    """All sequences that are not empty. Those of like length are together, the longest first."""
    order = sorted(filter(len, sequences), key=len, reverse=True)
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]


def padded(batch: Sequence[Ids], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, L], and whether each is a token [B*L] or padding.

    Padding is on the right, where causal attention never looks, so that no mask is needed.
    """
    lengths = np.array([len(ids) for ids in batch])
    is_token_BL = np.arange(lengths.max()) < lengths[:, None]
    ids_BL = np.zeros(is_token_BL.shape, dtype=np.int64)
    ids_BL[is_token_BL] = np.concatenate(batch)
    is_token_T = torch.from_numpy(is_token_BL).flatten()
    return torch.from_numpy(ids_BL).to(device), is_token_T.to(device)


def hash_ids(sequences: Sequence[Ids]) -> str:
    """A hash of the ids and lengths, in their order."""
    hashed = hashlib.blake2b(digest_size=8)
    for ids in sequences:
        hashed.update(np.array([len(ids)], "<i4").tobytes() + np.asarray(ids, "<i4").tobytes())
    return hashed.hexdigest()
