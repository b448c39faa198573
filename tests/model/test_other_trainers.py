"""The balance loss under transformers' own Trainer, which gives other arguments than ours."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_fixtures import free_port
from torch import multiprocessing
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from deepseek_moe import DeepseekForCausalLM

LENGTHS = (3, 9, 5, 4, 8, 7, 2, 6)


def rows() -> list[dict[str, list[int]]]:
    dice = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, 96, (length,), generator=dice).tolist() for length in LENGTHS]
    return [{"input_ids": row, "labels": row} for row in ids]


def collate(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pads on the right to 12 ids, with a mask."""
    fill = {"input_ids": 1, "labels": -100, "attention_mask": 0}
    batch = [row | {"attention_mask": [1] * len(row["labels"])} for row in features]
    return {
        name: torch.tensor([row[name] + [value] * (12 - len(row[name])) for row in batch])
        for name, value in fill.items()
    }


def loss_over_all_labels(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor
) -> torch.Tensor:
    """A loss of one's own, as Trainer's `compute_loss_func` takes it."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


def stock(
    folder: Path,
    model: Any,
    data: list[dict[str, list[int]]] | None = None,
    compute_loss_func: Callable | None = None,
    **changes: Any,
) -> Trainer:
    """transformers' own Trainer for four steps, of which it saves the second and the fourth."""
    torch.manual_seed(0)
    plain = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}
    plain |= {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    data = data or rows()
    return Trainer(
        model,
        TrainingArguments(str(folder), **(plain | changes)),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
        compute_loss_func=compute_loss_func,
    )


def gradients(
    model: Any, folder: Path, batch: int, seq_aux: bool = True, ranks: int = 1, **changes: Any
) -> dict[str, torch.Tensor]:
    """The gradients of one step over all rows, as the optimizer (plain SGD) applies them.

    On several ranks, each calls it, and trains on its part of the rows. Without `seq_aux`, the
    tokens of a batch count together, so that only equal rows compare.
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sgd = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    sgd |= {"max_grad_norm": 0.0, "save_strategy": "no", "per_device_train_batch_size": batch}
    sgd |= {"gradient_accumulation_steps": len(LENGTHS) // batch // ranks}
    sgd |= {"ddp_backend": "gloo" if ranks > 1 else None}
    data = rows() if seq_aux else rows()[1:2] * len(LENGTHS)
    stock(folder, model, data, **(sgd | changes)).train()
    return {name: before[name] - p for name, p in model.named_parameters()}


OTHER_LOSSES = {
    "smoothed": {"label_smoothing_factor": 0.1},
    "own": {"compute_loss_func": loss_over_all_labels},
}


@pytest.mark.parametrize("loss", [None, *OTHER_LOSSES])
@pytest.mark.parametrize("seq_aux", [True, False])
def test_accumulated_batches_count_as_much_as_one(loss, seq_aux, tiny_model, tmp_path):
    """Where the loss is computed outside, Trainer keeps the labels back from the model."""
    options = OTHER_LOSSES.get(loss, {})
    at_once, without, one_by_one = (
        gradients(
            tiny_model(aux_loss_alpha=alpha, seq_aux=seq_aux), tmp_path, batch, seq_aux, **options
        )
        for alpha, batch in ((5.0, 8), (0.0, 8), (5.0, 1))
    )
    gate = "model.layers.1.mlp.gate.weight"
    assert (at_once[gate] - without[gate]).norm() > without[gate].norm()
    for name, gradient in at_once.items():
        torch.testing.assert_close(one_by_one[name], gradient, rtol=1e-4, atol=1e-5)
    if loss and seq_aux:
        inside, plain = (
            gradients(tiny_model(aux_loss_alpha=alpha), tmp_path, 8) for alpha in (5.0, 0.0)
        )
        balance = inside[gate] - plain[gate]
        torch.testing.assert_close(at_once[gate] - without[gate], balance, rtol=1e-3, atol=1e-4)


def test_a_batch_with_few_labels_counts_once_where_the_model_is_not_told_them(tiny_model):
    model, ids = tiny_model(aux_loss_alpha=1.0).train(), torch.arange(2, 22).view(4, 5)
    for given in ({"input_ids": ids}, {"inputs_embeds": model.model.embed_tokens(ids)}):
        for few in (2, torch.tensor(2)):
            weighted = model(**given, num_items_in_batch=few)
            torch.testing.assert_close(weighted.aux_loss, model(**given).aux_loss)


def test_label_smoothing_shifts_the_labels(tiny_model, tmp_path):
    """A smoothing near 0 gives the loss of the model."""
    losses = [
        stock(tmp_path, tiny_model(), label_smoothing_factor=factor).evaluate()["eval_loss"]
        for factor in (0.0, 1e-9)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


WAYS = ((4, True), (1, True), (1, False))
"""Rows in a batch of each process, and `seq_aux`."""


def one_rank(rank: int, folder: Path, port: int) -> None:
    """What each of two processes does. The first writes the gradients that both have."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    for batch, seq_aux in WAYS:
        model = DeepseekForCausalLM.from_pretrained(folder / f"{seq_aux}", dtype=torch.float32)
        found = gradients(model, folder / "run", batch, seq_aux, ranks=2)
        if rank == 0:
            torch.save(found, folder / f"{batch} {seq_aux}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_count_as_one(tiny_model, tmp_path):
    alone = {}
    for seq_aux in (True, False):
        model = tiny_model(aux_loss_alpha=5.0, seq_aux=seq_aux)
        model.save_pretrained(tmp_path / f"{seq_aux}")
        alone[seq_aux] = gradients(model, tmp_path / "alone", 8, seq_aux)
    arguments = (tmp_path, free_port())
    multiprocessing.start_processes(one_rank, arguments, nprocs=2, start_method="spawn", join=True)
    for batch, seq_aux in WAYS:
        together = torch.load(tmp_path / f"{batch} {seq_aux}.pt")
        assert together.keys() == alone[seq_aux].keys()
        for name, gradient in alone[seq_aux].items():
            torch.testing.assert_close(together[name], gradient, rtol=1e-4, atol=1e-5)


def test_a_row_counts_as_the_language_loss_counts_it(tiny_model):
    """No loss has the first label of a row. Equal rows weigh 1 in sum, as they do unweighted."""
    model, ids = tiny_model(aux_loss_alpha=1.0).train(), torch.arange(2, 22).view(4, 5)
    weighted = model(ids, labels=ids, num_items_in_batch=torch.tensor(4 * 4))
    torch.testing.assert_close(weighted.aux_loss, model(ids, labels=ids).aux_loss)


def test_padding_counts_in_no_batch(tiny_model):
    model, row = tiny_model(aux_loss_alpha=1.0).train(), rows()[1]
    alone = model(torch.tensor([row["input_ids"]])).aux_loss
    padded = collate([row])
    labels = padded.pop("labels")
    assert torch.allclose(model(**padded).aux_loss, alone)
    del padded["attention_mask"]
    assert not torch.allclose(model(**padded).aux_loss, alone)
    assert labels.shape == padded["input_ids"].shape


def test_a_run_that_is_resumed_ends_as_one_that_was_not(tiny_model, tmp_path):
    whole = stock(tmp_path, tiny_model(), learning_rate=1e-2)
    whole.train()
    resumed = stock(tmp_path, tiny_model(), learning_rate=1e-2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor)


def test_the_best_checkpoint_is_loaded_with_its_experts(tiny_model, tmp_path):
    """The best is here the one with the highest loss, so that it is not the last."""
    best = {"load_best_model_at_end": True, "greater_is_better": True}
    best |= {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_loss"}
    trainer = stock(tmp_path, tiny_model(), learning_rate=3e-2, **best)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-5)
