"""What experts.py measures, writes, prints and draws."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from measured_data import named_sets, read_set, settings_of
from transformers import PreTrainedTokenizerBase

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM, load
from deepseek_moe.bundled import BUNDLED_MODEL
from deepseek_moe.checkpoint import find_checkpoint, fingerprint, own_tokenizer, read_config
from deepseek_moe.errors import UserError, as_user_error
from deepseek_moe.experts import coloured_text, heatmap
from deepseek_moe.experts.compare import differences, together
from deepseek_moe.experts.measure import measure, picked_experts
from deepseek_moe.experts.profile import Picks, Profile
from deepseek_moe.files import check_writable, write_text

MAX_LENGTH = 1024
NAMED = 4  # experts that a row of a table names


def run(args: argparse.Namespace) -> None:
    """Measures every set of data that the options name.

    What the user can mend is refused before any weight is loaded.
    """
    sets = named_sets(args)
    refuse_existing(args, [one.name for one in sets])
    folder = find_checkpoint(args.model or str(BUNDLED_MODEL))
    config = usable_config(folder)
    check_layer(args, config)
    context = config.max_position_embeddings
    args.max_length = checked_length(args.max_length, context)
    tokenizer = own_tokenizer(folder)
    sequences = {one.name: read_set(one, args, tokenizer, context) for one in sets}
    with as_user_error(f"{args.output} cannot be made", "give another folder"):
        args.output.mkdir(parents=True, exist_ok=True)
    of_model = fingerprint(folder)
    model, _ = load(str(folder), args.dtype, args.device)
    model_name = args.model or f"models/{BUNDLED_MODEL.name}"
    common = {"model": model_name, "dtype": str(model.dtype).removeprefix("torch.")}
    profiles = {
        one.name: measure(
            model,
            sequences[one.name],
            fingerprint=of_model,
            settings=common | settings_of(one, args),
            batch_size=args.batch_size,
            name=one.name,
        )
        for one in sets
    }
    prompts = [colours_of(prompt, model, tokenizer) for prompt in args.prompt]
    write_profiles(args, profiles)
    print_profiles(profiles)
    print(f"the profile is in {args.output / 'profile.json'}", file=sys.stderr)
    show_pictures(args, profiles, prompts)


def usable_config(folder: Path) -> DeepseekConfig:
    """The config of a checkpoint that has routed experts."""
    config = read_config(folder)
    if not config.moe_layers:
        raise UserError(f"{folder} has no routed experts; give a mixture of experts")
    return config


def check_layer(args: argparse.Namespace, config: DeepseekConfig) -> None:
    """Takes the middle layer where none is given, and refuses one without routed experts."""
    layers = config.moe_layers
    args.layer = layers[len(layers) // 2] if args.layer is None else args.layer
    if args.layer not in layers:
        found = ", ".join(map(str, layers))
        raise UserError(f"--layer {args.layer} has no routed experts; layers that have: {found}")


def checked_length(max_length: int | None, context: int) -> int:
    """Tokens of a window or an example."""
    if max_length is None:
        return min(MAX_LENGTH, context)
    if not 2 <= max_length <= context:
        raise UserError(f"--max_length is {max_length}; it must be from 2 to the context {context}")
    return max_length


def refuse_existing(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuses files that this command would write and must not replace."""
    if args.output.exists():
        files = ["profile.json", "heatmap.png", "heatmap.html"]
        files += ["prompt.html"] if args.prompt else []
        files += ["differences.json", *map(profile_name, names)] if len(names) > 1 else []
        for file in files:
            check_writable(args.output / file, args.overwrite)


def profile_name(name: str) -> str:
    """The file of one of several sets of data."""
    return f"profile-{name}.json"


def write_profiles(args: argparse.Namespace, profiles: dict[str, Profile]) -> None:
    """One profile, or one for each set of data, one of all, and how they differ."""
    whole, *others = profiles.values()
    if others:
        for name, profile in profiles.items():
            profile.save(args.output / profile_name(name), args.overwrite)
        text = json.dumps(differences_to_first(profiles), indent=1)
        write_text(args.output / "differences.json", text + "\n", args.overwrite)
        whole = together(profiles)
    whole.save(args.output / "profile.json", args.overwrite)


def differences_to_first(profiles: dict[str, Profile]) -> dict[str, object]:
    """What differences.json holds: of each set but the first, and each layer, the total variation
    and the list over experts of their share less the share in the first set."""
    first, *others = profiles
    return {
        "first": first,
        "others": {
            name: {
                str(number): {"total_variation": layer.total_variation, "shares": layer.shares}
                for number, layer in differences(profiles[name], profiles[first]).items()
            }
            for name in others
        },
    }


def print_profiles(profiles: dict[str, Profile]) -> None:
    """A table of each set of data, and of how each differs from the first."""
    for name, profile in profiles.items():
        even = f"entropy {math.log(profile.num_experts):.2f} if all were used alike"
        print(f"\n{name}: {profile.tokens:,} tokens, {profile.num_experts} experts a layer, {even}")
        print("layer  entropy  load/mean  starved  busiest experts and their shares of the picks")
        for number, layer in profile.layers.items():
            shares = [f"{e} {layer.shares[e]:.1%}" for e in largest(layer.shares)]
            print(
                f"{number:5}  {layer.entropy:7.2f}  {layer.load_over_mean:9.2f}  "
                f"{layer.starved:7}  {', '.join(shares)}"
            )
    first, *others = profiles
    for name in others:
        print(f"\n{name} beside {first}: the part of the picks that goes to other experts")
        print("layer   part  experts whose shares differ most")
        for number, layer in differences(profiles[name], profiles[first]).items():
            shares = [f"{e} {layer.shares[e]:+.1%}" for e in largest(layer.shares)]
            print(f"{number:5}  {layer.total_variation:5.1%}  {', '.join(shares)}")


def largest(shares: Sequence[float]) -> list[int]:
    """The experts with the largest numbers, whatever their sign."""
    return sorted(range(len(shares)), key=lambda e: -abs(shares[e]))[:NAMED]


def colours_of(
    prompt: str, model: DeepseekForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], dict[int, Picks]]:
    """The text of each token of a prompt, without BOS, and by layer each token's experts.

    A character of several tokens is the text of the first of them.
    """
    encoded, before = tokenizer(prompt, return_offsets_mapping=True), len(tokenizer("").input_ids)
    tokens, end = [], 0
    for _, to in encoded.offset_mapping:
        tokens.append(prompt[end:to])
        end = max(end, to)
    picks = picked_experts(model, encoded.input_ids)
    return tokens[before:], {n: Picks(*(x[before:] for x in of)) for n, of in picks.items()}


def show_pictures(
    args: argparse.Namespace,
    profiles: dict[str, Profile],
    prompts: Sequence[tuple[list[str], dict[int, Picks]]],
) -> None:
    """Prints the prompts in colours, and writes the pages and the picture.

    Raises:
        UserError: a package for pictures is missing. What needs none is shown before.
    """
    heatmap.write_html(profiles, args.output / "heatmap.html", overwrite=args.overwrite)
    num_experts = next(iter(profiles.values())).num_experts
    if prompts:
        only, page = {"prompt": profiles["prompt"]}, args.output / "prompt.html"
        sections = [coloured_text.as_html(*prompt, num_experts) for prompt in prompts]
        heatmap.write_html(only, page, "\n".join(sections), args.overwrite)
    for tokens, picks in prompts:
        shown = coloured_text.in_terminal(tokens, picks[args.layer].top, num_experts, args.layer)
        import rich  # if it is missing, the line above has said so

        print()
        rich.print(shown)
    heatmap.write_png(profiles, args.output / "heatmap.png", args.overwrite)
