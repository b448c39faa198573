"""The code in an exported folder is whole, and works where this package is missing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from adapter_fixtures import ADAPTED, load, make_adapter, peft

from deepseek_moe.checkpoint_writer import AUTO_MAP, add_code, write_checkpoint
from deepseek_moe.training.merge_lora import merged_tensors


def test_the_code_is_all_that_the_model_imports_and_no_more(
    bundled_model: Path, tmp_path: Path
) -> None:
    shutil.copyfile(bundled_model / "config.json", tmp_path / "config.json")
    old = json.loads((tmp_path / "config.json").read_text())
    stale = {"auto_map": {"AutoTokenizer": [None, "tokenization_deepseek.DeepseekTokenizer"]}}
    (tmp_path / "config.json").write_text(json.dumps(old | stale))
    add_code(tmp_path)
    code = ["balance_loss.py", "configuration_deepseek.py", "layout.py", "modeling_deepseek.py"]
    assert sorted(file.name for file in tmp_path.glob("*.py")) == code
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields.pop("auto_map") == AUTO_MAP
    assert fields == old


# Without this package and all that it needs beside torch and transformers.
STRANGER = """
import sys
for name in ("deepseek_moe", "accelerate", "psutil", "prompt_toolkit", "peft", "datasets",
             "bitsandbytes", "liger_kernel", "deepspeed", "tensorboard", "rich"):
    sys.modules[name] = None  # to import it is an error
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
folder, result = sys.argv[1:]
talk = [{"role": "user", "content": "Hello"}]
for trust in (False, True):  # engines that know the model load its tokenizer without trust
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    assert type(tokenizer).__module__.startswith("transformers."), type(tokenizer)
    assert tokenizer.padding_side == "left"
    bos = tokenizer.bos_token_id
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    assert ids[0, 0] == bos and ids[0].tolist().count(bos) == 1, ids
    chat = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    assert chat == tokenizer.bos_token + "User: Hello\\n\\nAssistant:", chat
    found = tokenizer.apply_chat_template(talk, add_generation_prompt=True).input_ids
    assert found[0] == bos and found.count(bos) == 1, found
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
config.rms_norm_eps = 1e-5  # a config that is given counts
model = AutoModelForCausalLM.from_pretrained(folder, config=config, trust_remote_code=True)
assert model.config.rms_norm_eps == 1e-5
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
made = model.generate(ids, max_new_tokens=5, do_sample=False)
with torch.no_grad():
    torch.save((ids, model(ids).logits, made), result)
"""


def test_exported_folder_works_with_transformers_alone(bundled_model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(load(bundled_model), tmp_path / "adapter", scale=0.02, **ADAPTED)
    merged, result = tmp_path / "merged", tmp_path / "result.pt"
    tensors = merged_tensors(bundled_model, adapter)
    write_checkpoint(tensors, bundled_model, merged, torch.float32)
    modules = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, merged, result],
        env=os.environ | modules,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ids, found, made = torch.load(result)
    model = load(bundled_model, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        torch.testing.assert_close(found, adapted(ids).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(made, load(merged).generate(ids, max_new_tokens=5, do_sample=False))
