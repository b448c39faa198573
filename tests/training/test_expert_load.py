"""What is seen of the experts in training: each pick counted once, in TensorBoard's file."""

from collections import Counter
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from deepseek_moe.experts.heatmap import load_image
from deepseek_moe.experts.profile import LayerProfile
from deepseek_moe.model.modeling_deepseek import DeepseekCausalLMOutput
from deepseek_moe.training.expert_load import ExpertBoard, ExpertLoad
from deepseek_moe.training.packed_rows import pack
from deepseek_moe.training.trainer import FineTuner

LAYERS, E, K = (1, 2), 8, 3
EVALUATES = {"eval_data_path": "-", "eval_strategy": "steps", "eval_steps": 2}


class Read(TrainerCallback):
    """Notes what is read at each log: the picks by layer, and the balance losses."""

    def __init__(self, trainer: FineTuner) -> None:
        self.load, self.picks, self.losses = trainer.expert_load, [], []
        trainer.add_callback(self)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.picks.append(dict(zip(self.load.layers, self.load.picks, strict=True)))
            losses = self.load.curves["balance_loss"]
            self.losses.append(dict(zip(self.load.layers, losses, strict=True)))


def count_by_hand(trainer: FineTuner) -> list[dict[int, list[int]]]:
    """The picks in each batch of an epoch, from the router's logits, token by token."""
    found = []
    for batch in trainer.get_train_dataloader():
        del batch["sources"]
        with torch.no_grad():
            logits = trainer.model.train()(**batch, output_router_logits=True).router_logits
        kept = (batch["sequence_ids"] >= 0).flatten().tolist()
        counts = {}
        for number, scores_TE in zip(LAYERS, logits, strict=True):
            picks_TK = scores_TE.softmax(-1).topk(K).indices.tolist()
            pairs = zip(picks_TK, kept, strict=True)
            chosen = Counter(e for picks, keep in pairs if keep for e in picks)
            counts[number] = [chosen[e] for e in range(E)]
        found.append(counts)
    return found


def total(counts: list[dict[int, list[int]]]) -> dict[int, list[int]]:
    return {
        n: [sum(column) for column in zip(*(one[n] for one in counts), strict=True)] for n in LAYERS
    }


CASES: dict[str, dict[str, Any]] = {
    "padded rows": {"per_device_train_batch_size": 8},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "packed rows": {"packing": True, "per_device_train_batch_size": 2},
    "layers recomputed": {"per_device_train_batch_size": 8, "gradient_checkpointing": True},
    "adapters": {"per_device_train_batch_size": 8, "rank": 4},
    "adapters, layers recomputed": {"gradient_checkpointing": True, "rank": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_each_pick_of_each_token_is_counted_once(case, tuner, examples):
    """With a learning rate of 0 an epoch picks what the untrained model picks."""
    changes = CASES[case]
    rows = pack(examples, 256) if "packing" in changes else examples
    trainer = tuner(rows, learning_rate=0, **changes)
    read, wanted = Read(trainer), count_by_hand(trainer)
    trainer.train()
    assert len(read.picks) == trainer.state.global_step > 1
    assert total(read.picks) == total(wanted)
    tokens = sum(examples["length"])
    assert [sum(picks) for picks in total(read.picks).values()] == [tokens * K] * 2
    if "gradient_accumulation_steps" not in changes:
        assert read.picks == wanted  # each log begins anew


def test_only_training_is_counted(tuner, examples):
    plain, other = tuner(max_steps=4), tuner(held=examples, max_steps=4, **EVALUATES)
    reads = [Read(plain), Read(other)]
    plain.train()
    other.train()
    assert reads[0].picks == reads[1].picks


def test_picks_of_other_processes_and_of_padding_do_not_count(tiny_config):
    """Under expert parallelism an index of E marks a pick that another process computes."""
    load = ExpertLoad(tiny_config(), torch.device("cpu"))
    picks = torch.tensor([[0, 8, 7], [8, 8, 8], [1, 2, 3]])
    outputs = DeepseekCausalLMOutput(router_picks=(picks, picks.flip(0)))
    load.add(outputs, torch.tensor([[0, 0, -1]]), 1.0)
    load.read(Accelerator(cpu=True), 1)
    assert load.picks == [[1, 0, 0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 0, 0, 0, 0]]


def test_tensorboard_has_four_curves_a_layer_and_pictures(tuner, examples, tmp_path):
    trainer = tuner(held=examples, report_to="tensorboard", max_steps=4, **EVALUATES)
    read = Read(trainer)
    trainer.train()
    [file] = (tmp_path / "out").glob("runs/*/events*")
    events = EventAccumulator(str(file), {"images": 0}).Reload()
    tags = set(events.Tags()["scalars"])

    def curve(tag: str) -> list[float]:
        tags.remove(tag)
        assert [event.step for event in events.Scalars(tag)] == [1, 2, 3, 4], tag
        return [event.value for event in events.Scalars(tag)]

    for number in LAYERS:
        layers = [LayerProfile(picks[number], [], []) for picks in read.picks]
        for name in ("load_over_mean", "entropy", "starved"):
            wanted = [getattr(layer, name) for layer in layers]
            assert curve(f"train_experts/{name}/layer_0{number}") == pytest.approx(wanted)
        wanted = [losses[number] for losses in read.losses]
        assert curve(f"train_experts/balance_loss/layer_0{number}") == pytest.approx(wanted)
    assert curve("train/balance_loss") == pytest.approx([sum(x.values()) for x in read.losses])
    assert not {tag for tag in tags if "total_flos" in tag or "runtime" in tag}
    assert tags >= {"train/loss", "train/tokens_per_second", "eval/loss", "eval/perplexity"}
    assert all(len(events.Scalars(tag)) > 1 for tag in tags)  # no card with a single point
    images = events.Images("train_experts/load")
    assert [image.step for image in images] == [1, 2, 3, 4]
    for image, picks in zip(images, read.picks, strict=True):
        pixels = np.asarray(Image.open(BytesIO(image.encoded_image_string)))
        assert np.array_equal(pixels, load_image(list(picks.values()), list(LAYERS)))
    last = trainer.state.log_history[-1]
    assert last["total_flos"] > 0 and last["train_runtime"] > 0  # Trainer keeps them
    assert not {key for line in trainer.state.log_history for key in line if "layer" in key}


def test_a_long_run_gets_few_pictures(tiny_config, tmp_path):
    load = ExpertLoad(tiny_config(), torch.device("cpu"))
    load.read(Accelerator(cpu=True), 1)
    shown, written = ExpertBoard(load), []
    shown.tb_writer = SimpleNamespace(
        file_writer=SimpleNamespace(add_summary=lambda *_: None),
        add_image=lambda tag, image, step, dataformats: written.append(step),
        add_scalar=lambda *_: None,
        flush=lambda: None,
    )
    for step in range(1, 1001):
        state = SimpleNamespace(global_step=step, max_steps=1000, is_world_process_zero=True)
        shown.on_log(None, state, None, {"loss": 1.0})
    assert written == [1, *range(50, 1001, 50)]
