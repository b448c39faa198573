"""The card of an export: its head is one that the hub takes, and its text tells what was done."""

import json
from pathlib import Path

import pytest
from adapter_fixtures import ADAPTED, load, make_adapter
from huggingface_hub import ModelCard

from deepseek_moe import export
from deepseek_moe.bundled import BUNDLED_MODEL
from deepseek_moe.model_card import CARD, model_card

HUB = "deepseek-ai/deepseek-moe-16b-base"
MINE = "---\nlicense: apache-2.0\nbase_model: someone/else\nlicense_link: [1]\n---\n# Mine\n"
SETTINGS = {"use_lora": True, "lora_rank": 8, "bits": 16, "model": "tensors:12", "packing": None}
RUN = {"settings": SETTINGS, "data": ["a|b.json", "org/rows"], "losses": {"loss": 9.0}}


def head_of(text: str) -> dict[str, object]:
    """The head as `ModelCard.validate` sends it to the hub, after it was read here."""
    return ModelCard(text).data.to_dict()


@pytest.mark.parametrize(
    ("given", "card", "fields"),
    [
        (HUB, None, {"base_model": HUB, "license": "other", "license_name": "deepseek"}),
        (str(BUNDLED_MODEL), None, {"license": "mit"}),
        ("someone/new", None, {"base_model": "someone/new", "license": "unknown"}),
        ("/home/me/secret/old", MINE, {"base_model": "someone/else", "license": "apache-2.0"}),
        ("/home/me/secret/old", "---\n]:\n---\n", {"license": "unknown"}),
        ("/home/me/secret/old", "---\n- 1\n---\n", {"license": "unknown"}),
    ],
    ids=["official", "bundled", "hub", "a card", "a broken card", "another head"],
)
def test_the_head_names_base_and_licence(given, card, fields, tmp_path):
    base = BUNDLED_MODEL if given == str(BUNDLED_MODEL) else tmp_path
    if card:
        (tmp_path / CARD).write_text(card)
    text = model_card("It is whole.", given, base)[CARD]
    head = head_of(text)
    assert head.get("base_model") == fields.get("base_model")
    assert head | fields == head and head["pipeline_tag"] == "text-generation"
    assert "secret" not in text and "It is whole." in text


@pytest.mark.parametrize("place", ["root", "checkpoint-2"])
def test_the_card_of_a_run_tells_data_settings_and_losses(place, base: Path, tmp_path, run_module):
    """Those of a checkpoint are the losses up to its own step."""
    run, output = tmp_path / "run", tmp_path / "new"
    adapter = make_adapter(load(base), run if place == "root" else run / place, **ADAPTED)
    (run / "run.json").write_text(json.dumps(RUN | {"settings": SETTINGS | {"model": "old"}}))
    if place != "root":
        history = [{"loss": 3.0}, {"loss": 2.5, "step": 2}, {"eval_loss": 2.25}, {"epoch": 1}]
        (adapter / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    run_module(export, "--model", base, "--adapter", adapter, "--output", output)
    text = (output / CARD).read_text()
    assert head_of(text)["license"] == "unknown"
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    losses = ["| loss | 9.0 |"] if place == "root" else ["| loss | 2.5 |"]
    losses += [] if place == "root" else ["| loss on the evaluation data | 2.25 |"]
    assert [row for row in rows if "loss" in row] == losses
    assert "| data | `a\\|b.json`, `org/rows` |" in rows
    assert {"| lora_rank | 8 |", "| bits | 16 |"} <= set(rows)
    assert not [row for row in rows if "packing" in row or "old" in row]


def test_settings_that_a_full_fine_tuning_does_not_use_are_left_out(tmp_path):
    trained = {"settings": SETTINGS | {"use_lora": False}}
    text = model_card("Made.", HUB, tmp_path, trained)[CARD]
    assert "| bits | 16 |" in text and "lora" not in text
