"""Writes a DeepSeekMoE checkpoint of any size with random weights: for measuring, not for reading.

    python benchmarks/random_model.py --output /tmp/random-16b
    python benchmarks/random_model.py --output /tmp/random-4-layers --num_hidden_layers 4
    python benchmarks/random_model.py --output /tmp/random-skewed --hot_experts 8

The default is the configuration of the official 16B model. Weights are normal with standard
deviation 0.006, embeddings 0.02, norms 1: so the routing is nearly uniform, as in the official
model, where tinier weights would send all tokens the same way. The tokenizer is the bundled one.
Hot experts have larger routers' rows; of 64 experts 8 hot ones get about half of all picks.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM
from deepseek_moe.cli import BUNDLED_MODEL
from deepseek_moe.weights import official_tensors

HOT = 5  # times the router's rows of others


def write_random_model(
    folder: Path, config: DeepseekConfig, seed: int = 0, hot_experts: int = 0
) -> None:
    """bf16, a file a layer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        tensors = official_tensors(DeepseekForCausalLM(config))
    files: dict[str, list[str]] = {}
    for name in tensors:
        layer = name.split(".")[2] if ".layers." in name else "ends"
        files.setdefault(f"model-{layer}.safetensors", []).append(name)

    def make(name: str) -> torch.Tensor:
        weight = torch.empty(tensors[name], dtype=torch.bfloat16, device=device)
        if "norm" in name:
            return weight.fill_(1).cpu()
        std = 0.02 if "embed_tokens" in name else 0.006
        weight.normal_(0, std, generator=generator)
        if name.endswith("mlp.gate.weight"):
            weight[:hot_experts] *= HOT
        return weight.cpu()

    folder.mkdir(parents=True, exist_ok=True)
    for file, names in tqdm(files.items(), unit="file"):
        save_file({name: make(name) for name in names}, folder / file, metadata={"format": "pt"})
    places = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BUNDLED_MODEL / name, folder)
    config.architectures = ["DeepseekForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num_hidden_layers", type=int, default=28)
    parser.add_argument("--hot_experts", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = DeepseekConfig(num_hidden_layers=args.num_hidden_layers)
    write_random_model(args.output, config, args.seed, args.hot_experts)


if __name__ == "__main__":
    main()
