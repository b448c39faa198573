"""A checkpoint folder used by transformers alone, as on a machine without this package."""

import os
import subprocess
import sys
from pathlib import Path

import torch

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


def run_as_stranger(folder: Path, work: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loads the folder by its own code. Returns ids, their logits, and five greedy tokens more.

    The folder has the bundled tokenizer and chat template; `work` is for what the process writes.
    """
    result = work / "result.pt"
    modules = {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, folder, result],
        env=os.environ | modules,
        cwd=work,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(result)
