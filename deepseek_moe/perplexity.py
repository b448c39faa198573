"""Perplexity: how well a model foretells held-out text, token by token.

A text is cut into windows of so many tokens, which do not overlap. Each begins with BOS, so every
token of the text is predicted once, from what stands before it in its window.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .errors import UserError
from .model.modeling_deepseek import DeepseekForCausalLM

PIECE = 512
"""Positions whose logits are in memory together: 210 MB in fp32 with a vocabulary of 102,400."""
REMEDY = 'give UTF-8 text, or JSON lines with a "text"'


class HeldOut(NamedTuple):
    """Documents as ids without BOS, and how many bytes their text has in UTF-8."""

    documents: list[list[int]]
    bytes: int


@dataclass(frozen=True)
class Loss:
    """The nats of all predicted tokens together, how many these are, and their bytes as text."""

    nats: float
    tokens: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """This compares models of different tokenizers too."""
        return self.nats / math.log(2) / self.bytes


def read_held_out(file: str | Path, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    """Reads plain text, which is one document, or a .jsonl file with a "text" in each line.

    Raises:
        UserError: the file cannot be read, is no text, or holds no token.
    """
    try:
        content = Path(file).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; {REMEDY}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text ({error}); {REMEDY}") from error
    if "\0" in content:
        raise UserError(f"{file} is no text, because it has bytes that are 0; {REMEDY}")
    is_plain = Path(file).suffix != ".jsonl"
    texts = [content] if is_plain else list(_texts_of_lines(content, file))
    documents = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []
    if not any(documents):
        raise UserError(f"{file} holds no text, not even a token of it; {REMEDY}")
    return HeldOut(documents, sum(len(text.encode()) for text in texts))


def _texts_of_lines(content: str, file: str | Path) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                text = json.loads(line)["text"]
                text.encode()  # a lone surrogate is no text
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(f'{file} line {number} has no "text"; {REMEDY}') from error
            yield text


@torch.inference_mode()
def measure_loss(model: DeepseekForCausalLM, text: HeldOut, window: int, bos: int) -> Loss:
    """The loss of `model`, where it is, on all of `text`, with a progress bar.

    Args:
        window: tokens that the model sees together, BOS among them; at least 2.
        bos: the id of BOS.
    """
    nats = tokens = 0
    for ids in tqdm(list(_windows(text, window, bos)), "perplexity", unit="window"):
        ids_L = torch.tensor(ids, device=model.device)
        hidden_LD = model.model(ids_L[None, :-1], use_cache=False).last_hidden_state[0]
        for piece_D, next_ids in zip(hidden_LD.split(PIECE), ids_L[1:].split(PIECE), strict=True):
            logits = model.lm_head(piece_D).float()
            nats += F.cross_entropy(logits, next_ids, reduction="sum").item()
        tokens += len(ids) - 1
    return Loss(nats, tokens, text.bytes)


def _windows(text: HeldOut, window: int, bos: int) -> Iterator[list[int]]:
    for ids in text.documents:
        for start in range(0, len(ids), window - 1):
            yield [bos, *ids[start : start + window - 1]]
