"""Makes a small DeepSeekMoE from text: tokenizer, training, report. One GPU, some minutes.

    python models/train_tiny.py --text novels.jsonl --season stories.jsonl --output models/tiny-base

Text comes as .txt files (one document each) or as JSON lines with a `text` field, also as .xz.
Lines whose `split` is "val" or "test" are held out: "val" decides which step is kept, and "test" is
only reported. For comparison, `--dense` trains the same model with a dense MLP of the active width
in every layer. The learning rate is warmed up, held, and falls to 0 over the last fifth.
"""

import argparse
import copy
import json
import lzma
import math
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from deepseek_moe import DeepseekConfig
from deepseek_moe.errors import UserError, exit_on_user_error
from deepseek_moe.model.chat_format import CHAT_TEMPLATE
from deepseek_moe.model.tokenization_deepseek import BOS, EOS, DeepseekTokenizer

VOCABULARY = 4096
# Curly quotes and rare spaces would take too much of it.
PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "\xa0": " ", "\x0c": "\n"})


def read_documents(files: list[Path]) -> dict[str, list[str]]:
    """The documents of each split, which is "train" if a line names none."""
    documents: dict[str, list[str]] = defaultdict(list)
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} does not exist; give .txt or .jsonl files")
        with (lzma.open if file.suffix == ".xz" else open)(file, "rt", encoding="utf-8") as handle:
            lines = ".jsonl" in file.suffixes
            rows = [json.loads(line) for line in handle] if lines else [{"text": handle.read()}]
        for row in rows:
            split = row.get("split") or "train"
            documents[split].append(row["text"].translate(PLAIN).strip())
    return documents


def train_tokenizer(texts: list[str]) -> DeepseekTokenizer:
    """Byte-level BPE that splits text as the official one does: words, punctuation, digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\r\n]"), "isolated"),
            pre_tokenizers.Split(Regex(r"\s?\p{L}+"), "isolated"),
            pre_tokenizers.Split(Regex(r"\s?[^\s\p{L}\p{N}]+"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 2, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([BOS, EOS])
    return DeepseekTokenizer(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        add_bos_token=True,
        chat_template=CHAT_TEMPLATE,
    )


class Corpus:
    """Documents as one stream of ids, from which windows are drawn that start at a paragraph."""

    def __init__(self, texts: list[str], tokenizer: DeepseekTokenizer, device: str) -> None:
        encoded = tokenizer(texts, add_special_tokens=False).input_ids
        self.bos = tokenizer.bos_token_id
        self.documents = [[self.bos, *ids, tokenizer.eos_token_id] for ids in encoded]
        self.bytes = sum(len(text.encode()) for text in texts)
        self.ids = torch.tensor([i for ids in self.documents for i in ids], device=device)
        newline = tokenizer.convert_tokens_to_ids("Ċ")
        paragraph = (self.ids[:-1] == newline) | (self.ids[:-1] == self.bos)
        self.starts = torch.nonzero(paragraph).flatten()

    def sample(self, count: int, length: int) -> torch.Tensor:
        """Windows [count, length]: each is BOS, then text from the beginning of a paragraph."""
        starts = self.starts[self.starts < len(self.ids) - length]
        picks = torch.randint(len(starts), (count,), device=starts.device)
        windows = self.ids[starts[picks, None] + torch.arange(length, device=starts.device)]
        windows[:, 0] = self.bos
        return windows


@torch.no_grad()
def evaluate(model: PreTrainedModel, corpus: Corpus, length: int) -> dict[str, Any]:
    """The loss (nats a token, bits a byte), and each expert's picks divided by its even share."""
    model.eval()
    windows = []
    for ids in corpus.documents:  # windows overlap by one id: each is predicted once
        windows += [ids[i : i + length] for i in range(0, len(ids) - 1, length - 1)]
    nats, tokens, picks = 0.0, 0, 0
    for at in range(0, len(windows), 32):
        labels = torch.full((32, length), -100, device=corpus.ids.device)
        for row, window in enumerate(windows[at : at + 32]):
            labels[row, : len(window)] = torch.tensor(window)
        out = model(labels.clamp(min=0), output_router_logits=True, use_cache=False)
        logits, targets = out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        nats += F.cross_entropy(logits, targets, reduction="sum").item()
        tokens += (targets >= 0).sum().item()
        if out.router_logits:
            logits_LTE = torch.stack(out.router_logits)[:, labels.flatten() >= 0]
            top = logits_LTE.topk(model.config.num_experts_per_tok).indices.flatten(1)
            picks += torch.stack([t.bincount(minlength=logits_LTE.shape[-1]) for t in top])
    report = {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / corpus.bytes}
    if isinstance(picks, torch.Tensor):
        share = picks / picks.sum(dim=1, keepdim=True) * picks.shape[1]
        report["expert_load"] = [[round(x, 2) for x in layer] for layer in share.tolist()]
    model.train()
    return report


def learning_rate(done: float, peak: float) -> float:
    """The rate when the share `done` (0 to 1) of the training is done."""
    return peak * min(1.0, done / 0.02, (1 - done) / 0.2)


def train(
    model: PreTrainedModel, text: Corpus, season: Corpus, val: Corpus, args: argparse.Namespace
) -> list[dict[str, float]]:
    """Trains `model`, leaves the weights of its best evaluation in it, and returns all evaluations.

    The optimizer keeps weights in fp32, because bf16 would round small steps away.
    """
    weights = list(model.parameters())
    masters = [weight.detach().float().clone().requires_grad_() for weight in weights]
    vectors = [master for master in masters if master.ndim == 1]
    groups = [
        {"params": [master for master in masters if master.ndim > 1]},
        {"params": vectors, "weight_decay": 0.0},
    ]
    options = {"weight_decay": args.weight_decay, "betas": (0.9, 0.95), "fused": True}
    optimizer = torch.optim.AdamW(groups, **options)
    if args.compile:
        for layer in model.model.layers:
            layer.compile()
    steps = int(args.tokens / (args.batch_size * args.length))
    log, best, best_state = [], math.inf, {}
    bar = tqdm(range(steps), unit="step", file=sys.stderr)
    for step in bar:
        done = step / steps
        seasoned = int(args.batch_size * (args.season_share if done < 0.8 else args.season_end))
        plain = text.sample(args.batch_size - seasoned, args.length)
        windows = torch.cat([plain, season.sample(seasoned, args.length)])
        loss = model(windows, labels=windows, use_cache=False).loss
        loss.backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, args.learning_rate)
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)
        if (step + 1) % max(1, steps // args.evaluations) == 0 or step + 1 == steps:
            val_loss = evaluate(model, val, args.length)["loss"]
            log.append({"step": step + 1, "train_loss": loss.item(), "val_loss": val_loss})
            bar.set_postfix(train=f"{loss.item():.3f}", val=f"{val_loss:.3f}")
            if val_loss < best:
                best, best_state = val_loss, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    return log


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--season", type=Path, nargs="+", help="text that a small share comes from")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace a model in --output")
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--tokens", type=float, default=200e6)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--weight_decay", type=float, default=0.5)
    parser.add_argument("--season_share", type=float, default=0.06)
    parser.add_argument("--season_end", type=float, default=0.10)
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    there = [name for name in ("config.json", "training.json") if (args.output / name).exists()]
    if there and not args.overwrite:
        raise UserError(f"{args.output} has a {there[0]} already; give another, or add --overwrite")
    return args


def make_config(tokenizer: DeepseekTokenizer, args: argparse.Namespace) -> DeepseekConfig:
    return DeepseekConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=8 * 64,
        moe_intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=6,
        n_routed_experts=None if args.dense else 24,
        num_experts_per_tok=6,
        n_shared_experts=2,
        aux_loss_alpha=0.01,
        max_position_embeddings=args.length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    documents, seasoning = read_documents(args.text), read_documents(args.season or args.text)
    held = [documents[split] + seasoning[split] for split in ("val", "test")]
    if not all(held):
        raise UserError("no held-out text; mark some JSON lines with split val, some with test")
    texts = [documents["train"], seasoning["train"], *held]
    tokenizer = train_tokenizer(texts[0] + texts[1])
    # Grouped products on a GPU need bf16. A CPU is faster in fp32.
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_config(make_config(tokenizer, args), dtype=dtype).to(device)
    text, season, val, test = (Corpus(part, tokenizer, device) for part in texts)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = " ".join(f"{len(corpus.ids):,}" for corpus in (text, season, val, test))
    print(f"{parameters:,} parameters; {sizes} tokens of text, season, val, test")
    start = time.time()
    evaluations = train(model.train(), text, season, val, args)
    report = {
        "parameters": parameters,
        "tokens": args.tokens,
        "minutes": round((time.time() - start) / 60, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "val": evaluate(model, val, args.length),
        "test": evaluate(model, test, args.length),
    }
    model.bfloat16().save_pretrained(args.output)
    tokenizer.model_max_length = args.length
    tokenizer.save_pretrained(args.output)
    print(json.dumps(report))
    report["evaluations"] = evaluations
    (args.output / "training.json").write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
