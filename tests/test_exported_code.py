"""The code in an exported folder is run where this package is missing, and nowhere else."""

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
from adapter_fixtures import ADAPTED, load, make_adapter, peft
from packaging.requirements import Requirement
from transformers import AutoTokenizer

from deepseek_moe import DeepseekForCausalLM, DeepseekTokenizer
from deepseek_moe.checkpoint import Checkpoint
from deepseek_moe.checkpoint_writer import add_code, write_checkpoint
from deepseek_moe.model.tokenization_deepseek import BOS
from deepseek_moe.training.merge_lora import merged_tensors


def test_this_package_loads_the_folder_and_runs_no_code_in_it(
    bundled_model: Path, tmp_path: Path
) -> None:
    exported, mark, again = tmp_path / "exported", tmp_path / "mark", tmp_path / "again"
    write_checkpoint(Checkpoint(bundled_model).tensors(), bundled_model, exported, None)
    for file in exported.glob("*.py"):
        file.write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    assert type(load(exported)) is DeepseekForCausalLM
    load(exported).save_pretrained(again)
    AutoTokenizer.from_pretrained(exported).save_pretrained(again)
    for folder in (exported, again):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert type(tokenizer) is DeepseekTokenizer
        assert tokenizer(f"{BOS}Hi").input_ids == tokenizer("Hi").input_ids
        assert tokenizer("Hi").input_ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.model_max_length == 1024
        fields = json.loads((folder / "tokenizer_config.json").read_text())
        assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert "auto_map" not in fields
    assert not mark.exists()


def test_the_code_is_all_that_the_model_imports_and_no_more(
    bundled_model: Path, tmp_path: Path
) -> None:
    shutil.copyfile(bundled_model / "config.json", tmp_path / "config.json")
    old = json.loads((tmp_path / "config.json").read_text())
    stale = {"auto_map": {"AutoTokenizer": [None, "tokenization_deepseek.DeepseekTokenizer"]}}
    (tmp_path / "config.json").write_text(json.dumps(old | stale))
    for _ in range(2):  # again does no harm
        add_code(tmp_path)
    code = ["balance_loss.py", "configuration_deepseek.py", "layout.py", "modeling_deepseek.py"]
    assert sorted(file.name for file in tmp_path.glob("*.py")) == code
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields.pop("auto_map") == {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    }
    assert fields == old


def only(folder: Path, *names: str) -> Path:
    """A folder of links to the installed distributions `names` and what they require, no other."""
    folder.mkdir()
    seen, wanted = set(), list(names)
    while wanted:
        name = wanted.pop().lower().replace("_", "-")
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if name in seen:
            continue
        seen.add(name)
        for line in found.requires or []:
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                wanted.append(need.name)
        for file in found.files or []:
            link = folder / file.parts[0]
            if file.parts[0] != ".." and not link.exists():
                link.symlink_to(found.locate_file(file.parts[0]))
    return folder


STRANGER = """
import sys, importlib.util, torch
sys.path.insert(0, {packages!r})
for name in ("deepseek_moe", "peft", "accelerate", "bitsandbytes", "datasets", "psutil"):
    assert importlib.util.find_spec(name) is None, name
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
talk = [{{"role": "user", "content": "Hello"}}]
for trust in (False, True):  # engines that know the model load its tokenizer without trust
    tokenizer = AutoTokenizer.from_pretrained({folder!r}, trust_remote_code=trust)
    assert type(tokenizer).__module__.startswith("transformers."), type(tokenizer)
    assert tokenizer.padding_side == "left"
    bos = tokenizer.bos_token_id
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    assert ids[0, 0] == bos and ids[0].tolist().count(bos) == 1, ids
    chat = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    assert chat == tokenizer.bos_token + "User: Hello\\n\\nAssistant:", chat
    found = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=True).input_ids
    assert found[0] == bos and found.count(bos) == 1, found
    assert found == tokenizer(chat, add_special_tokens=False).input_ids
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
config = AutoConfig.from_pretrained({folder!r}, trust_remote_code=True)
config.use_cache = False
given = AutoModelForCausalLM.from_pretrained({folder!r}, config=config, trust_remote_code=True)
assert not given.config.use_cache
with torch.no_grad():
    logits = model(ids).logits
made = model.generate(ids, max_new_tokens=5, do_sample=False)
torch.save((ids, logits, made, transformers.__file__), {result!r})
"""


def test_exported_folder_works_with_transformers_alone(bundled_model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(load(bundled_model), tmp_path / "adapter", scale=0.02, **ADAPTED)
    merged, result = tmp_path / "merged", tmp_path / "result.pt"
    tensors = merged_tensors(bundled_model, adapter)
    write_checkpoint(tensors, bundled_model, merged, torch.float32)
    packages = only(tmp_path / "packages", "torch", "transformers")
    script = STRANGER.format(packages=str(packages), folder=str(merged), result=str(result))
    script = f"import sys; sys.path.insert(0, {str(packages)!r})\n{script}"
    modules = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(  # -I -S: no site-packages, no PYTHONPATH, not the folder it is run in
        [sys.executable, "-I", "-S", "-c", script],
        env=os.environ | modules,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ids, found, made, where = torch.load(result)
    assert where.startswith(str(packages))
    model = load(bundled_model, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        torch.testing.assert_close(found, adapted(ids).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(made, load(merged).generate(ids, max_new_tokens=5, do_sample=False))
