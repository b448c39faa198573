"""Other people's programs, for real, on the bundled models: TRL and lm_eval.

They need `pip install -r requirements-interop.txt`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from text_fixtures import BUNDLED, ROOT, UNMARKED, assistant, user

pytestmark = pytest.mark.slow
for name in ("trl", "lm_eval"):
    pytest.importorskip(name, reason=f"{name} is not here: pip install -r requirements-interop.txt")

CHAT = BUNDLED.with_name("tiny-chat")
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TALKS = [
    {"messages": [user(f"Count to {n}"), assistant(" ".join(map(str, range(n))))]}
    for n in range(2, 18)
]


def command(*words: object, folder: Path = ROOT) -> list[str]:
    return [sys.executable, "-m", "deepseek_moe", *map(str, words)]


def run(*words: object) -> str:
    done = subprocess.run(
        command(*words), capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def write_lines(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_trl_sft_from_the_command_line(tmp_path):
    """It trains on answers only, also where the checkpoint's template does not mark them."""
    rows, output = write_lines(tmp_path / "rows" / "train.jsonl", TALKS), tmp_path / "out"
    model = shutil.copytree(CHAT, tmp_path / "model")
    (model / "chat_template.jinja").write_text(UNMARKED)
    words = f"trl sft --model_name_or_path {model} --dataset_name {rows.parent} --max_steps 2"
    words += f" --output_dir {output} --assistant_only_loss True --use_cpu True --report_to none"
    said = run(*words.split())
    assert float(re.search(r"'train_loss': '?([\d.]+)", said)[1]) > 0
    assert (output / "model.safetensors").is_file()
    with safe_open(output / "model.safetensors", framework="pt") as tensors:
        assert "model.layers.1.mlp.experts.0.gate_proj.weight" in tensors.keys()  # noqa: SIM118


PREFERENCES = """
import sys
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

folder, output = sys.argv[1:]
options = {"use_cpu": True, "report_to": "none", "max_steps": 2, "save_strategy": "no"}
options |= {"per_device_train_batch_size": 2, "bf16": False, "learning_rate": 1e-3}
say = lambda role, text: [{"role": role, "content": text}]
pairs = [
    {
        "prompt": say("user", f"Say {n}"),
        "chosen": say("assistant", f"{n}."),
        "rejected": say("assistant", "No."),
    }
    for n in range(8)
]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
before = model.model.layers[1].mlp.experts.down_proj.detach().clone()
trainer = DPOTrainer(  # without a reference model, which it makes from the path
    model, args=DPOConfig(output, **options), train_dataset=Dataset.from_list(pairs),
    processing_class=tokenizer,
)
print("dpo", trainer.train().training_loss)
assert not torch.equal(before, model.model.layers[1].mlp.experts.down_proj)

rows = [{"messages": [*pair["prompt"], *pair["chosen"]]} for pair in pairs]
rows = Dataset.from_list(rows)
trainer = SFTTrainer(folder, args=SFTConfig(output, **options), train_dataset=rows)
print("sft", trainer.train().training_loss)
"""


def test_trl_trainers_in_python(tmp_path):
    file = tmp_path / "preferences.py"
    file.write_text(PREFERENCES)
    said = run(file, CHAT, tmp_path / "out")
    assert re.search(r"^dpo 0\.\d+", said, flags=re.MULTILINE)
    assert re.search(r"^sft \d", said, flags=re.MULTILINE)


def test_lm_eval(tmp_path):
    rows = [{"question": f"Is {n} even?", "answer": n % 2} for n in range(6)]
    data = write_lines(tmp_path / "task" / "rows.jsonl", rows)
    task = {
        "task": "even",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (data.parent / "even.yaml").write_text(json.dumps(task))  # JSON is YAML
    words = f"lm_eval --model hf --model_args pretrained={BUNDLED},dtype=float32 --tasks even"
    said = run(*f"{words} --include_path {data.parent} --device cpu".split())
    assert re.search(r"\|even\s*\|.*\|acc", said)
