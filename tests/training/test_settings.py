"""Which settings decide the result of a run, and whether a run of before has the same ones."""

import json
from typing import Any

import datasets
import pytest
from finetune_options import OPTIONS
from option_fixtures import parse
from text_fixtures import BUNDLED

from deepseek_moe.errors import UserError
from deepseek_moe.training.run import RUN_FILE, Run, settings_of

CHANGES_NOTHING = (
    "model_name_or_path cache_dir data_path eval_data_path columns skip_bad_rows "
    "per_device_train_batch_size gradient_accumulation_steps gradient_checkpointing deepspeed "
    "attn_implementation cuda_graphs recompute_experts single_gpu_full ddp_timeout use_cpu "
    "merge_on_save offload_experts expert_threshold expert_share expert_score save_delta "
    "output_dir save_strategy save_steps save_total_limit eval_strategy eval_steps "
    "per_device_eval_batch_size dry_run show_examples logging_steps report_to disable_tqdm"
)
# As the code before noted them.
LORA = {"lora_rank": 8, "lora_alpha": 32.0, "lora_dropout": 0.1, "modules_to_save": "", "bits": 16}
BEFORE = {
    "eval_data": None, "trainable": [], "use_lora": False, "model_max_length": 512,
    "packing": False, "eval_fraction": 0.0, "learning_rate": 5e-05, "num_train_epochs": 3.0,
    "max_steps": -1, "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0,
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-08, "bf16": False, "seed": 42,
    "data_seed": None, "train_sampling_strategy": "group_by_length", "neftune_noise_alpha": None,
    "optim_args": None, "dataloader_drop_last": False, "average_tokens_across_devices": True,
    "lr_scheduler_kwargs": "", "lr_scheduler_type": "linear", "optim": "adamw_torch_fused",
    "batch_size": 8, "zero_stage": 0,
}  # fmt: skip


def settings(words: str = "") -> dict[str, Any]:
    model, data, training = parse(words)
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2]], "trained": [[0, 1]]})
    return settings_of(model, data, training, BUNDLED, rows, None)


def test_every_option_decides_the_result_but_those_known_not_to():
    known = set(CHANGES_NOTHING.split())
    assert OPTIONS.keys() - known <= settings().keys()
    assert not settings().keys() & known
    assert json.loads(json.dumps(settings())) == settings()


@pytest.mark.parametrize(("words", "noted"), [("", BEFORE), ("--use_lora", BEFORE | LORA)])
def test_a_run_of_the_code_before_is_known_again(words, noted, tmp_path):
    now = settings(words)
    found = noted | {"use_lora": bool(words), "model": now["model"], "data": now["data"]}
    content = {"settings": found, "finished": True}
    (tmp_path / RUN_FILE).write_text(json.dumps(content))
    assert Run(str(tmp_path), now).finished
    with pytest.raises(UserError, match=r"weight_decay: 0\.0 there, 0\.1 now"):
        Run(str(tmp_path), settings(f"{words} --weight_decay 0.1"))
    with pytest.raises(UserError, match="full_determinism: False there, True now"):
        Run(str(tmp_path), settings(f"{words} --full_determinism"))
