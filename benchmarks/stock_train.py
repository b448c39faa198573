"""What transformers and PEFT do by themselves, for train.py to compare with.

    python benchmarks/stock_train.py full --model /tmp/random-moe/28-layers
    python benchmarks/stock_train.py lora --model /tmp/random-moe/28-layers

It has bf16 weights, transformers' own "grouped_mm" for the experts, PEFT's adapters of rank 64 on
all linear layers and experts, and recomputes layers in the backward pass. `full` takes no steps,
because Adam's states of 16B weights would not fit one GPU. It prints JSON.
"""

import argparse
import json
import statistics
import time

import torch
from finetune_runs import STEPS, UNCOUNTED
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.training.arguments import ALL_LINEARS, split_commas
from deepseek_moe.training.trainable import EXPERT_PARAMETERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method", choices=["full", "lora"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    model = DeepseekForCausalLM.from_pretrained(
        args.model,
        dtype=torch.bfloat16,
        device_map={"": args.device},
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.method == "lora":
        model.enable_input_require_grads()
        options = {
            "target_modules": split_commas(ALL_LINEARS),
            "target_parameters": list(EXPERT_PARAMETERS),
        }
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=64, **options))
    print(json.dumps(measure(model.train(), args)))


def measure(model: PreTrainedModel, args: argparse.Namespace) -> dict[str, float]:
    """Tokens/s of the median step, and the most GB allocated."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True) if args.method == "lora" else None
    on_gpu = args.device.startswith("cuda")
    generator = torch.Generator().manual_seed(0)
    shape = (args.rows, args.length)
    seconds = []
    for _ in range(STEPS):
        ids = torch.randint(model.config.vocab_size, shape, generator=generator).to(args.device)
        start = time.perf_counter()
        with torch.autocast(args.device.split(":")[0], torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    size = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
    tokens = args.rows * args.length
    return {"tokens_s": tokens / statistics.median(seconds[UNCOUNTED:]), "gigabytes": size}


if __name__ == "__main__":
    main()
