"""benchmarks/fits.py on a CPU, without the cap: every run comes to its end, or says where not."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
from finetune_fixtures import ROOT, write_base

sys.path.append(str(ROOT / "benchmarks"))
fits, random_rows = import_module("fits"), import_module("processes").random_rows


@pytest.fixture
def uncapped(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for line in fits.CAPPED.splitlines() if "cuda" not in line]
    monkeypatch.setattr(fits, "CAPPED", "\n".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_a_setting_is_trained_saved_resumed_and_used(
    whole: bool, tmp_path: Path, uncapped: None
) -> None:
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(random_rows(8, 60)))
    base = write_base(tmp_path / "base", max_position_embeddings=512)
    options = "" if whole else "--use_lora True --lora_r 2"
    setting = fits.Training("small", 80, 2, 32, options, whole)
    peak, done = fits.train(setting, base, data, tmp_path / "run")
    assert peak is None  # of a GPU
    assert done.startswith("trained, saved, resumed, finished")
    assert ("continued a text: 50 tokens" in done) == whole


@pytest.mark.slow
def test_a_setting_that_does_not_fit_is_not_said_to_fit(tmp_path: Path, uncapped: None) -> None:
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(random_rows(8, 60)))
    setting = fits.Training("small", 80, 2, 32, "--lora_r 0 --use_lora True")
    assert fits.train(setting, write_base(tmp_path / "base"), data, tmp_path / "run") == (
        None,
        "not trained and saved",
    )
    assert "not complete" in fits.complete(tmp_path / "nothing", 80)
