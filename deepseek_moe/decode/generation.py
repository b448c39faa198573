"""Ids in, ids out. What the ids mean is the business of chat.py.

generator = Generator(model)
for step in generator.stream([[100000, 17464]], max_new_tokens=20):
    ...  # step holds one new id for each prompt, None where it has ended
"""

from collections.abc import Collection, Iterable, Iterator

from transformers import PreTrainedModel

from ..errors import RunError, UserError
from .batch import Batch, PlainBatch
from .engine import Engine, UnsupportedModel, refusal_of
from .sampling import BROKEN, Prompts, Sampler, greedy
from .supported import is_supported

BROKEN_LOGITS = (
    "the model's logits for new token {made} of prompt {number} in the batch are NaN or infinite: "
    "its weights are broken, or their products overflow float16; try --dtype bfloat16, or get the "
    "checkpoint anew"
)


class Generator:
    """Continues batches of prompts of any lengths with a causal language model.

    This architecture on an NVIDIA GPU goes through the engine (engine.py); everything else goes the
    plain way: the model's own forward over a growing cache. Training mode is off in each step.
    Afterwards every module is in the mode that it was in.

    Every call generates with the model as it is when its first token is asked for. Between two
    calls the model may be trained, cast, moved or resized, and get or lose adapters, hooks, heads
    or weights. The engine is then built anew, or the call goes the plain way if the engine does not
    compute such a model. Finish a stream first: the engine goes on with the weights that it began
    with, and keeps their memory until the next call; the plain way takes the model as it is.

    The engine lays the weights of q_proj, k_proj and v_proj of each layer side by side in new
    memory, and those of gate_proj and up_proj (of a dense layer, and of the shared experts). These
    parameters become views of it; their names, shapes and values stay. Weights that are parts of a
    larger tensor, as DeepSpeed's ZeRO lays them, are not moved; if they are not side by side there,
    the call goes the plain way.

    Args:
        fast: None takes the engine where it can run, True refuses to go without it, and False
            never takes it.

    Raises:
        UserError: `fast` is True where the engine cannot run (here, or at a later call).
    """

    def __init__(self, model: PreTrainedModel, fast: bool | None = None) -> None:
        self.model, self.fast = model, fast
        self.engine: Engine | None = None
        self._find_engine()
        if fast and self.engine is None:
            raise UserError(refusal_of(model))

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer together."""
        return self.model.config.max_position_embeddings

    def _find_engine(self) -> None:
        """Makes the engine if there is none yet and it can run."""
        if self.engine is None and self.fast is not False and is_supported(self.model):
            self.engine = Engine(self.model)

    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        sample: Sampler = greedy,
        stop_ids: Collection[int] = (),
    ) -> list[list[int]]:
        """The new ids of each prompt, without the stop id. The arguments are those of `stream`."""
        return columns(self.stream(prompts, max_new_tokens, sample, stop_ids), len(prompts))

    def stream(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        sample: Sampler = greedy,
        stop_ids: Collection[int] = (),
    ) -> Iterator[list[int | None]]:
        """Step by step, the next id of every prompt; None for those that have ended.

        A sequence ends at one of `stop_ids` (which is not yielded), after `max_new_tokens`, or when
        it fills the context. The engine runs a `Sampling` inside its CUDA graph, and any other
        function on the logits that the graph leaves.

        Raises:
            UserError: there is no prompt, an empty one, one that fills the context, one with an id
                that the model does not have, or nothing to generate.
            RunError: the model's logits are NaN or infinite.
        """
        self._check(prompts, max_new_tokens)
        return self._steps(prompts, max_new_tokens, sample, stop_ids)

    def _steps(
        self, prompts: Prompts, max_new_tokens: int, sample: Sampler, stop_ids: Collection[int]
    ) -> Iterator[list[int | None]]:
        batch = self._start(prompts, max_new_tokens, sample)
        try:
            room = [self.context - len(prompt) for prompt in prompts]
            running = set(range(len(prompts)))
            for made in range(1, max_new_tokens + 1):
                new = {b: token for b, token in batch.next().items() if b in running}
                for number, token in new.items():
                    if token == BROKEN:
                        raise RunError(BROKEN_LOGITS.format(made=made, number=number + 1))
                running = {b for b, token in new.items() if token not in stop_ids}
                if running:
                    yield [new[b] if b in running else None for b in range(len(prompts))]
                running = {b for b in running if made < room[b]}
                if not running:
                    return
                batch.drop(new.keys() - running)
        finally:
            batch.close()

    def _start(self, prompts: Prompts, max_new_tokens: int, sample: Sampler) -> Batch:
        """In the engine, if it can compute the model as it is now; else the plain way."""
        self._find_engine()
        if self.engine is not None:
            try:
                return self.engine.start(prompts, sample, max_new_tokens)
            except UnsupportedModel:
                if self.fast:
                    raise
        return PlainBatch(self.model, prompts, sample)

    def _check(self, prompts: Prompts, max_new_tokens: int) -> None:
        if not prompts or not all(prompts):
            raise UserError("the prompt is empty; give it at least one token")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
        longest = max(len(prompt) for prompt in prompts)
        if longest >= self.context:
            raise UserError(
                f"the prompt has {longest} tokens, but the model's context is {self.context}, "
                "answer included; shorten the prompt"
            )
        vocabulary = self.model.config.vocab_size
        extremes = [find(prompt) for prompt in prompts for find in (min, max)]
        if wrong := [i for i in extremes if not 0 <= i < vocabulary]:
            raise UserError(
                f"the prompt has the id {wrong[0]}, but the model's ids are 0 to {vocabulary - 1}; "
                "encode the prompt with the model's own tokenizer"
            )


def columns(steps: Iterable[list[int | None]], prompts: int) -> list[list[int]]:
    """The ids of each of several prompts, from the steps of a stream."""
    steps = list(steps)
    return [[step[b] for step in steps if step[b] is not None] for b in range(prompts)]
