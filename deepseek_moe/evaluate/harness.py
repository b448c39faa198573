"""This package's models in lm-evaluation-harness, which needs `pip install lm_eval`."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..decode.generation import Generator
from ..decode.sampling import Sampling
from ..decode.texts import TextStream, end_ids
from ..errors import UserError
from .scoring import Answer, Pair, batch_tokens, score

MOST_PROMPTS = 256  # of a batch that is generated


class EngineLM(LM):
    """Answers the harness's requests by a generator: by the engine where there is one.

    Every text begins with BOS, once. What does not fit into the context loses the beginning of its
    context, after BOS. Answers are reported to the harness's cache batch by batch.
    """

    def __init__(self, generator: Generator, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.generator, self.tokenizer = generator, tokenizer
        self._device = generator.model.device

    def loglikelihood(self, requests: list[Instance]) -> list[Answer]:
        """Of each (context, continuation). Their tokens are those of both together.

        Raises:
            UserError: a continuation alone does not fit into the model's context.
        """
        texts = [_with_spaces(*request.args) for request in requests]
        whole = self._encode([context + continuation for context, continuation in texts])
        before = self._encode([context for context, _ in texts])
        pairs = [
            self._fitted(context, ids[len(context) :])
            for ids, context in zip(whole, before, strict=True)
        ]
        answers: list[Answer] = [(0.0, True)] * len(requests)
        for number, answer in self._scored(pairs):
            answers[number] = answer
            self.cache_hook.add_partial("loglikelihood", requests[number].args, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of whole texts. The harness cuts them into windows of the model's context: the first has
        BOS, and the last as much of the text before it as there is room for."""
        pairs, owner = [], []
        for number, ids in enumerate(self._encode([request.args[0] for request in requests])):
            windows = get_rolling_token_windows(ids[1:], ids[0], self.generator.context, 1)
            pairs += [Pair(*map(tuple, make_disjoint_window(window))) for window in windows]
            owner += [number] * (len(pairs) - len(owner))
        sums, left = [0.0] * len(requests), [owner.count(n) for n in range(len(requests))]
        for window, (nats, _) in self._scored(pairs):
            number = owner[window]
            sums[number] += nats
            left[number] -= 1
            if not left[number]:
                args = requests[number].args
                self.cache_hook.add_partial("loglikelihood_rolling", args, sums[number])
        return sums

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The texts that follow, up to the first of the strings `until`.

        Raises:
            UserError: a task asks for more tokens than the context has, or for an option of
                transformers that is not one of `Sampling`.
        """
        prompts = self._encode([request.args[0] for request in requests])
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        with tqdm(total=len(requests), desc="generation", unit="request") as bar:
            for key, numbers in groups.items():
                options = normalize_gen_kwargs(json.loads(key))
                new = options.pop("max_gen_toks")
                room = self.generator.context - new
                if room < 2:
                    raise UserError(
                        f"a task asks for {new} new tokens, but the model's context is "
                        f"{self.generator.context}; choose other tasks or another model"
                    )
                until, sample = options.pop("until", None) or [], _sampling(options)
                for batch in self._batches(numbers, prompts, new):
                    cut = [prompts[n][:1] + prompts[n][1:][-(room - 1) :] for n in batch]
                    for n, text in zip(
                        batch, self._continued(cut, new, until, sample), strict=True
                    ):
                        texts[n] = text
                        self.cache_hook.add_partial("generate_until", requests[n].args, text)
                    bar.update(len(batch))
        return texts

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids with BOS in front, also where the text begins with it (as a rendered chat does).
        A text that comes again, as the context of several answers does, is tokenised once."""
        distinct = list(dict.fromkeys(texts))
        ids = self.tokenizer(distinct, verbose=False).input_ids if distinct else []
        ids_of = dict(zip(distinct, ids, strict=True))
        return [ids_of[text] for text in texts]

    def _fitted(self, context: Sequence[int], continuation: Sequence[int]) -> Pair:
        """Leaves out the beginning of a context, after BOS, that is too long."""
        room = self.generator.context + 1 - len(continuation)  # the last token is not read
        if room < 1:
            raise UserError(
                f"a continuation has {len(continuation)} tokens, but the model's context is "
                f"{self.generator.context}; choose other tasks or another model"
            )
        if len(context) > room:
            context = [context[0], *context[len(context) - room + 1 :]]
        return Pair(tuple(context), tuple(continuation))

    def _scored(self, pairs: list[Pair]) -> Iterator[tuple[int, Answer]]:
        found = score(self.generator, pairs)
        return tqdm(found, "log-likelihoods", total=len(pairs), unit="request")

    def _batches(
        self, numbers: list[int], prompts: list[list[int]], new: int
    ) -> Iterator[list[int]]:
        """The longest first, as many together as the cache holds of the longest. They are not more
        later on, since the engine would make a larger cache and all its graphs anew."""
        numbers = sorted(numbers, key=lambda n: -len(prompts[n]))
        longest = min(self.generator.context, len(prompts[numbers[0]]) + new)
        most = max(1, min(MOST_PROMPTS, batch_tokens(self.generator.model) // longest))
        yield from (numbers[at : at + most] for at in range(0, len(numbers), most))

    def _continued(
        self, prompts: list[list[int]], new: int, until: list[str], sample: Sampling
    ) -> list[str]:
        """Generates until each text has one of the strings `until`, or has ended."""
        streams = [TextStream(self.tokenizer) for _ in prompts]
        texts, ids = [""] * len(prompts), [[] for _ in prompts]
        ends = end_ids(self.tokenizer, self.generator.model)
        for step in self.generator.stream(prompts, new, sample, ends):
            for row, token in enumerate(step):
                if token is not None:
                    ids[row].append(token)
                    texts[row] += streams[row].add(token)
            ended = [token is None for token in step]
            if all(e or any(s in t for s in until) for e, t in zip(ended, texts, strict=True)):
                break
        decoded = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [postprocess_generated_text(text, until, None) for text in decoded]


def _with_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Moves spaces at the end of a context to the continuation, with which they share a token."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _sampling(options: dict[str, Any]) -> Sampling:
    """Of a task's options for generation, after the harness has put them in order."""
    if not options.pop("do_sample"):
        options["temperature"] = 0.0
    try:
        return Sampling(**options)
    except TypeError as error:
        raise UserError(
            f"a task generates with {', '.join(options)}, not all of which are known here; choose "
            "other tasks"
        ) from error
