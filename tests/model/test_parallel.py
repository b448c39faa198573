"""The plans for several devices: they fit the model, and two processes compute what one does."""

import os
import re
import traceback
from collections.abc import Callable
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

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM

IDS = torch.arange(2, 24).view(2, 11)
RANKS = 2
PLANS = ["base_model_tp_plan", "base_model_ep_plan"]
PATTERNS = [(plan, pattern) for plan in PLANS for pattern in getattr(DeepseekConfig, plan)]


@pytest.mark.parametrize(("plan", "pattern"), PATTERNS)
def test_plan_names_parts_of_the_model_and_known_styles(
    plan: str, pattern: str, tiny_model: Callable[..., DeepseekForCausalLM]
) -> None:
    bare = tiny_model().model
    names = {name for name, _ in [*bare.named_modules(), *bare.named_parameters()]}
    wanted = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    assert any(wanted.fullmatch(name) for name in names)
    assert getattr(bare.config, plan)[pattern] in ALL_PARALLEL_STYLES


def test_plan_of_the_head_and_of_the_pipeline(
    tiny_model: Callable[..., DeepseekForCausalLM],
) -> None:
    model = tiny_model()
    for name, style in model._tp_plan.items():
        assert style in ALL_PARALLEL_STYLES, name
    assert "lm_head" in model._tp_plan
    children = {name for name, _ in model.model.named_children()}
    assert set(model.config.base_model_pp_plan) <= children


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
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, distributed_config=DistributedConfig(**options)
            )
            found = compute(model)
            weight = model.model.layers[1].mlp.experts.gate_up_proj
            found["part"] = weight.to_local().detach() if hasattr(weight, "to_local") else weight
        except Exception as error:
            found = "".join(traceback.format_exception(error))
        if rank == 0:
            torch.save(found, folder / f"{way}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(
    tiny_model: Callable[..., DeepseekForCausalLM], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What two processes computed, in each way."""
    if not distributed.is_available():
        pytest.skip("this torch was built without torch.distributed")
    folder = tmp_path_factory.mktemp("parallel")
    tiny_model().save_pretrained(folder)
    expert_parallel: dict[str, Any] = {"tp_size": RANKS, "tp_plan": "auto"}
    if "ep_size" in {field.name for field in fields(DistributedConfig)}:
        expert_parallel["ep_size"] = RANKS
    else:  # transformers 5.17
        expert_parallel["enable_expert_parallel"] = True
    ways = {"tensor": {"tp_plan": "auto"}, "expert": expert_parallel}
    multiprocessing.start_processes(
        one_rank, (folder, ways), nprocs=RANKS, start_method="spawn", join=True
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("way", "part"), [("tensor", (8, 8, 32)), ("expert", (4, 16, 32))])
def test_two_processes_compute_what_one_does(
    way: str, part: tuple[int, ...], folder: Path, tiny_model: Callable[..., DeepseekForCausalLM]
) -> None:
    found = torch.load(folder / f"{way}.pt")
    assert isinstance(found, dict), found
    assert tuple(found.pop("part").shape) == part, "the experts were not divided"
    want = compute(tiny_model())
    assert found.keys() == want.keys()
    for name, x in want.items():
        torch.testing.assert_close(found[name], x, atol=1e-5, rtol=1e-4, msg=name)
