"""The plans for several devices: they fit the model, and two processes compute what one does."""

import os
import re
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

from deepseek_moe import DeepseekForCausalLM

IDS = torch.arange(2, 24).view(2, 11)
RANKS = 2


def test_plans_name_parts_of_the_model_and_known_styles(tiny_model):
    model = tiny_model()
    bare, config = model.model, model.config
    names = {name for name, _ in [*bare.named_modules(), *bare.named_parameters()]}
    plan = [*config.base_model_tp_plan.items(), *config.base_model_ep_plan.items()]
    for pattern, style in plan:
        wanted = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        assert any(wanted.fullmatch(name) for name in names), pattern
        assert style in ALL_PARALLEL_STYLES, pattern
    assert model._tp_plan["lm_head"] in ALL_PARALLEL_STYLES
    assert config.base_model_pp_plan.keys() <= dict(bare.named_children()).keys()


def compute(model: DeepseekForCausalLM) -> dict[str, torch.Tensor]:
    """Logits, the losses and every gradient, gathered if they are spread over processes."""

    def whole(x: torch.Tensor) -> torch.Tensor:
        return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()

    with torch.no_grad():
        logits = whole(model.eval()(IDS).logits)
    out = model.train()(IDS, labels=IDS)
    out.loss.backward()
    found = {"logits": logits, "loss": whole(out.loss), "aux_loss": whole(out.aux_loss)}
    return found | {name: whole(weight.grad) for name, weight in model.named_parameters()}


def one_rank(rank: int, folder: Path, ways: dict[str, dict[str, Any]]) -> None:
    """What each process does: load its part of the model in each way, compute, write."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    store = f"file://{folder / 'store'}"
    patience = timedelta(seconds=60)  # of a process whose partner failed alone
    distributed.init_process_group("gloo", store, patience, world_size=RANKS, rank=rank)
    for way, options in ways.items():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, distributed_config=DistributedConfig(**options)
        )
        found = compute(model)
        weight = model.model.layers[1].mlp.experts.gate_up_proj
        found["part"] = weight.to_local().detach() if hasattr(weight, "to_local") else weight
        if rank == 0:
            torch.save(found, folder / f"{way}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_compute_what_one_does(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    expert: dict[str, Any] = {"tp_size": RANKS, "tp_plan": "auto"}
    if "ep_size" in {field.name for field in fields(DistributedConfig)}:
        expert["ep_size"] = RANKS
    else:  # transformers 5.17
        expert["enable_expert_parallel"] = True
    ways = {"tensor": {"tp_plan": "auto"}, "expert": expert}
    multiprocessing.start_processes(
        one_rank, (tmp_path, ways), nprocs=RANKS, start_method="spawn", join=True
    )
    want = compute(tiny_model())
    for way, part in (("tensor", (8, 8, 32)), ("expert", (4, 16, 32))):
        found = torch.load(tmp_path / f"{way}.pt")
        assert tuple(found.pop("part").shape) == part, "the experts were not divided"
        assert found.keys() == want.keys()
        for name, x in want.items():
            message = f"{name} in {way} parallelism"
            torch.testing.assert_close(found[name], x, atol=1e-5, rtol=1e-4, msg=message)
