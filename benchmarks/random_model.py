"""Writes a DeepSeekMoE checkpoint of any size with random weights, for measuring.

    python benchmarks/random_model.py --output /tmp/random-16b
    python benchmarks/random_model.py --output /tmp/random-4-layers --num_hidden_layers 4
    python benchmarks/random_model.py --output /tmp/random-skewed --skew /tmp/random-16b

The default is the configuration of the official 16B model. Weights are normal with a standard
deviation of 0.006, embeddings of 0.02, norms are 1. This makes the routing nearly uniform, as in
the official model; with smaller weights all tokens would go to the same experts. The tokenizer is
the bundled one. --skew takes a checkpoint that this script wrote, and makes some rows of its
routers larger, so that the first 8 of 64 experts get about half of all picks. The folder appears
under its name when it is complete.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM
from deepseek_moe.errors import RunError, UserError, exit_on_user_error
from deepseek_moe.files import BUNDLED_MODEL, complete_or_absent, refuse_occupied
from deepseek_moe.model.layout import official_tensors

HOT, HOT_EXPERTS = 5, 8  # how much larger the rows are, and how many
ROUTERS = "model-routers.safetensors"


@contextmanager
def new_model(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a folder to fill, which then becomes `folder`, or replaces the model there.

    Raises:
        UserError: `folder` holds anything (with `overwrite`: anything but a model).
        RunError: it cannot be written.
    """
    if overwrite and (folder / "config.json").is_file():
        shutil.rmtree(folder)
    refuse_occupied(folder)
    try:
        with complete_or_absent(folder) as aside:
            yield aside
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder} cannot be written: {error}; free space, or move it") from error


def write_random_model(
    folder: Path, config: DeepseekConfig, seed: int = 0, overwrite: bool = False
) -> None:
    """Writes bf16 weights, a file for each layer and one for all routers.

    Raises:
        UserError, RunError: as `new_model`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        tensors = official_tensors(DeepseekForCausalLM(config))
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

    with new_model(folder, overwrite) as aside:
        for file, names in tqdm(files.items(), unit="file"):
            made = {name: make(name) for name in names}
            save_file(made, aside / file, metadata={"format": "pt"})
        places = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {}, "weight_map": places}
        (aside / "model.safetensors.index.json").write_text(json.dumps(index))
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(BUNDLED_MODEL / name, aside)
        config.architectures = ["DeepseekForCausalLM"]
        config.dtype = torch.bfloat16
        config.save_pretrained(aside)


def write_skewed_model(folder: Path, source: Path, overwrite: bool = False) -> None:
    """Writes `source` with half of all picks on a few experts; all but the routers are links.

    Raises:
        UserError: `source` is no model of this script, or `folder` itself; or as `new_model`.
    """
    if not (source / ROUTERS).is_file():
        raise UserError(f"{source} has no {ROUTERS}; give --skew a model that this script wrote")
    if folder.exists() and folder.samefile(source):
        raise UserError(f"{source} would be written over itself; give another --output")
    with new_model(folder, overwrite) as aside:
        routers = load_file(source / ROUTERS)
        for file in source.iterdir():
            if file.name != ROUTERS:
                (aside / file.name).symlink_to(file.resolve())
        for weight_ED in routers.values():
            weight_ED[:HOT_EXPERTS] *= HOT
        save_file(routers, aside / ROUTERS, metadata={"format": "pt"})


def model_of_layers(folder: Path, layers: int, skewed: bool = False) -> Path:
    """The random model of so many layers in `folder`, which is written if it is not there."""
    model = folder / f"{layers}-layers"
    if not all((model / name).exists() for name in ("config.json", ROUTERS)):
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
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the model in --output, and everything beside it",
    )
    parser.add_argument("--num_hidden_layers", type=int, default=28)
    parser.add_argument("--skew", type=Path, help="write the skewed form of this model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.skew:
        write_skewed_model(args.output, args.skew, args.overwrite)
        return
    config = DeepseekConfig(num_hidden_layers=args.num_hidden_layers)
    write_random_model(args.output, config, args.seed, args.overwrite)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
