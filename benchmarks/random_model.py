"""Writes a DeepSeekMoE checkpoint of any size with random weights, for measuring.

    python benchmarks/random_model.py --output /tmp/random-16b
    python benchmarks/random_model.py --output /tmp/random-4-layers --num_hidden_layers 4
    python benchmarks/random_model.py --output /tmp/random-pruned --n_routed_experts 32

The default is the configuration of the official 16B model. Weights are normal with a standard
deviation of 0.006, embeddings of 0.02, norms are 1. This makes the routing nearly uniform, as in
the official model; with smaller weights all tokens would go to the same experts. The tokenizer is
the bundled one. The folder appears under its name when it is complete.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from deepseek_moe import DeepseekConfig
from deepseek_moe.bundled import BUNDLED_MODEL
from deepseek_moe.errors import RunError, exit_on_user_error
from deepseek_moe.files import complete_or_absent, refuse_occupied
from deepseek_moe.model.layout import official_tensors

HOT, HOT_EXPERTS = 5, 8  # how much larger some rows of skewed routers are, and how many
ROUTERS = "model-routers.safetensors"


def write_random_model(folder: Path, config: DeepseekConfig) -> None:
    """Writes bf16 weights, a file for each layer and one for all routers.

    Raises:
        UserError: `folder` holds anything.
        RunError: it cannot be written.
    """
    refuse_occupied(folder)
    try:
        with complete_or_absent(folder) as aside:
            fill_folder(aside, config)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder} cannot be written: {error}; free space, or move it") from error


def fill_folder(folder: Path, config: DeepseekConfig) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    tensors = dict(official_tensors(config))
    files: dict[str, list[str]] = {}
    for name in tensors:
        layer = name.split(".")[2] if ".layers." in name else "ends"
        file = ROUTERS if name.endswith("mlp.gate.weight") else f"model-{layer}.safetensors"
        files.setdefault(file, []).append(name)

    def make(name: str) -> torch.Tensor:
        weight = torch.empty(tensors[name], dtype=torch.bfloat16, device=device)
        if "norm" in name:
            return weight.fill_(1).cpu()
        std = 0.02 if "embed_tokens" in name else 0.006
        return weight.normal_(0, std, generator=generator).cpu()

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


def write_skewed_model(folder: Path, source: Path) -> None:
    """Writes a random model `source` again with half of all picks on the first 8 experts.

    Some rows of its routers are larger; all other files are links.
    """
    with complete_or_absent(folder) as aside:
        ignored = shutil.ignore_patterns(ROUTERS)
        options = {"copy_function": os.symlink, "ignore": ignored, "dirs_exist_ok": True}
        shutil.copytree(source.resolve(), aside, **options)
        routers = load_file(source / ROUTERS)
        for weight_ED in routers.values():
            weight_ED[:HOT_EXPERTS] *= HOT
        save_file(routers, aside / ROUTERS, metadata={"format": "pt"})


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options by which benchmarks choose what `model_of_layers` makes."""
    parser.add_argument("--num_hidden_layers", type=int, default=28)
    folder = Path(tempfile.gettempdir(), "random-moe")
    parser.add_argument("--folder", type=Path, default=folder, help="random models are kept here")


def model_of_layers(folder: Path, layers: int, skewed: bool = False) -> Path:
    """The random model of so many layers in `folder`, which is written if it is not there."""
    model = folder / f"{layers}-layers"
    if not (model / ROUTERS).exists():
        write_random_model(model, DeepseekConfig(num_hidden_layers=layers))
    if not skewed:
        return model
    other = folder / f"{model.name}-skewed"
    if not (other / ROUTERS).exists():
        write_skewed_model(other, model)
    return other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--num_hidden_layers", type=int, default=28)
    parser.add_argument("--n_routed_experts", type=int, default=64)
    fields = vars(parser.parse_args())
    write_random_model(fields.pop("output"), DeepseekConfig(**fields))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
