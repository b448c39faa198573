"""Writes a checkpoint with fewer routed experts in each layer.

    python -m deepseek_moe.prune --model BASE --profile profile.json --keep 32 --output DIR

A layer keeps the experts with the largest mean of gate weight times output norm (REAP, arXiv
2510.13999), which examples/experts.py measures. The router loses the rows of the others, so its
softmax divides their share among those that stay. Tensors go one at a time from file to file. With
--text the perplexity of the whole model and of the pruned one on that text is printed.
"""

import argparse
import gc
import json
import math
import re
import sys
from pathlib import Path

import torch

from .checkpoint import DTYPES, Checkpoint, find_checkpoint, fingerprint, own_tokenizer
from .checkpoint_writer import add_output_options, path_of, write_checkpoint
from .decode.load import load
from .errors import RunError, UserError, exit_on_user_error
from .experts.profile import Profile, read_profile, refuse_other_model
from .files import refuse_occupied
from .model.configuration_deepseek import DeepseekConfig
from .model_card import model_card
from .perplexity import HeldOut, Loss, measure_loss, read_held_out

NOTE = "pruned.json"
"""The file in a pruned checkpoint that says what it was made of."""
WINDOW = 2048  # tokens, if the context is as long
EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(.+)")
ROUTER = re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.weight")
Kept = dict[int, list[int]]
"""The numbers of the experts that each layer keeps, by the layer's number, in rising order."""


class PrunedCheckpoint(Checkpoint):
    """A checkpoint seen with fewer experts: experts `kept` of a layer are numbered 0, 1, 2, ...

    Raises:
        UserError: the checkpoint cannot be read.
    """

    def __init__(self, folder: Path, kept: Kept, num_experts_per_tok: int) -> None:
        super().__init__(folder)
        self.kept = kept
        self.config.n_routed_experts = len(next(iter(kept.values())))
        self.config.num_experts_per_tok = num_experts_per_tok
        self._lay_out()

    def tensor(self, official: str) -> torch.Tensor:
        whole = super().tensor(self._name_in_whole(official))
        router = ROUTER.fullmatch(official)
        return whole[self.kept[int(router[1])]] if router else whole

    def dtype(self, official: str) -> torch.dtype:
        return super().dtype(self._name_in_whole(official))

    def _name_in_whole(self, official: str) -> str:
        if not (found := EXPERT.fullmatch(official)):
            return official
        layer, expert, matrix = found.groups()
        number = self.kept[int(layer)][int(expert)]
        return f"model.layers.{layer}.mlp.experts.{number}.{matrix}"


def main() -> None:
    args = parse_arguments()
    refuse_occupied(args.output)
    folder = find_checkpoint(args.model)
    base = Checkpoint(folder)
    top_k = experts_per_token(base.config, args.keep, args.num_experts_per_tok)
    profile = profile_of(base, args.profile)
    kept = experts_to_keep(profile, args.keep)
    window = window_of(base.config, args.window)
    text = read_held_out(args.text, own_tokenizer(folder)) if args.text else None
    pruned = PrunedCheckpoint(folder, kept, top_k)
    sizes = [sum(map(math.prod, one.parameters.values())) / 1e6 for one in (base, pruned)]
    print(
        f"{args.keep} of {base.config.n_routed_experts} experts in each of {len(kept)} layers stay,"
        f" and a token uses {top_k}: {sizes[0]:,.1f} M parameters become {sizes[1]:,.1f} M",
        file=sys.stderr,
    )
    note = {"base": profile.model, "data": profile.data, "tokens": profile.tokens, "kept": kept}
    made = f"The base model with {args.keep} of its {base.config.n_routed_experts} routed experts."
    notes = {NOTE: json.dumps(note) + "\n"} | model_card(made, args.model, folder)
    write_checkpoint(
        pruned.tensors(), pruned, args.output, DTYPES.get(args.dtype), args.max_shard_size, notes
    )
    if text is None:
        said = "perplexity was not measured; with --text FILE it is, before and after"
        print(said, file=sys.stderr)
    else:
        print_losses(folder, args.output, text, window, args.dtype)
    print(args.output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deepseek_moe.prune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", metavar="BASE", required=True, help="a folder or a hub id")
    add("--profile", metavar="FILE", type=path_of, required=True, help="of BASE: profile.json")
    add("--keep", metavar="N", type=int, required=True, help="experts that stay in each layer")
    add("--num_experts_per_tok", metavar="K", type=int, help="default: as many as in BASE")
    add("--text", metavar="FILE", help='held-out text: plain, or .jsonl with a "text" in each line')
    add("--window", metavar="N", type=int, help=f"tokens seen together; default up to {WINDOW}")
    add_output_options(parser)
    return parser.parse_args()


def experts_per_token(config: DeepseekConfig, keep: int, wanted: int | None) -> int:
    """How many experts a token uses of the `keep` that stay.

    Raises:
        UserError: the model has no experts to leave out, or too few would stay.
    """
    E, K = config.n_routed_experts or 0, config.num_experts_per_tok
    if not config.moe_layers:
        raise UserError("this model has no routed experts to leave out; give a mixture of experts")
    if not 1 <= keep < E:
        raise UserError(f"--keep is {keep}, but the model has {E} experts; keep 1 to {E - 1}")
    if wanted is None and keep < K:
        raise UserError(
            f"--keep is {keep}, but a token uses {K} experts; keep more, or add "
            f"--num_experts_per_tok {keep}"
        )
    if wanted is not None and not 1 <= wanted <= keep:
        raise UserError(f"--num_experts_per_tok is {wanted}, but {keep} stay; use 1 to {keep}")
    return K if wanted is None else wanted


def profile_of(base: Checkpoint, file: Path) -> Profile:
    """Reads a profile of `base`, which has the score of some expert in each layer.

    Raises:
        UserError: it is no profile, one of another model, or has no such score.
    """
    profile, config = read_profile(file), base.config
    mark, experts = fingerprint(base.folder), config.n_routed_experts
    refuse_other_model(profile, file, mark, config.moe_layers, experts)
    for number, layer in profile.layers.items():
        if not any(layer.gate_times_norm):
            raise UserError(
                f"{file}: gate_times_norm is 0 for all experts of layer {number}; measure the "
                "model with examples/experts.py"
            )
    return profile


def experts_to_keep(profile: Profile, keep: int) -> Kept:
    """Of each layer the `keep` experts with the largest score. Of equal ones the first stay."""
    kept = {}
    for number, layer in profile.layers.items():
        score = layer.gate_times_norm
        best = sorted(range(len(score)), key=lambda expert: score[expert], reverse=True)
        kept[number] = sorted(best[:keep])
    return kept


def window_of(config: DeepseekConfig, wanted: int | None) -> int:
    """Raises a UserError if the model cannot see so many tokens, or predicts none of them."""
    context = config.max_position_embeddings
    if wanted is not None and not 2 <= wanted <= context:
        raise UserError(f"--window is {wanted}; use 2 to the model's context of {context}")
    return wanted or min(WINDOW, context)


def print_losses(whole: Path, pruned: Path, text: HeldOut, window: int, dtype: str) -> None:
    """Measures both models, one after the other, and prints their perplexity.

    Raises:
        RunError: there is too little memory.
    """
    print(f"{'':8}perplexity  nats a token  bits a byte")
    for name, folder in (("before", whole), ("after", pruned)):
        try:
            loss = _loss_of(folder, text, window, dtype)
        except UserError as error:
            reason = str(error).rpartition("; ")[0]
            raise RunError(
                f"{pruned} is complete, but perplexity cannot be measured here: {reason}; measure "
                "it on a larger machine"
            ) from error
        print(f"{name:8}{loss.perplexity:10.3f}{loss.nats_per_token:14.4f}", end="")
        print(f"{loss.bits_per_byte:13.4f}", flush=True)
    print(f"over {loss.tokens:,} tokens ({loss.bytes:,} bytes), in windows of {window:,} from BOS")


def _loss_of(folder: Path, text: HeldOut, window: int, dtype: str) -> Loss:
    model, tokenizer = load(str(folder), dtype)
    loss = measure_loss(model, text, window, tokenizer.bos_token_id)
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the next model asks how much is free
    return loss


if __name__ == "__main__":
    with exit_on_user_error():
        main()
