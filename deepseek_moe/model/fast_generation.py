"""transformers' `generate`, with a place for a faster loop over the tokens than its own.

The package puts its engine there (decode/transformers_generate.py). The code that travels with an
exported checkpoint has nothing there, and generates as transformers does.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ClassVar

from transformers import GenerationMixin

BY_TRANSFORMERS = {"cache", "past_key_values", "inputs_embeds", "position_ids", "custom_generate"}
"""Arguments with which transformers' own loop runs."""
_fast: ContextVar[bool] = ContextVar("fast", default=True)


class FastGenerationMixin(GenerationMixin):
    """`GenerationMixin` for a model whose steps something else may compute."""

    decode_fast: ClassVar[Callable[..., Any] | None] = None
    """Called as `_sample` is. It returns what `generate` returns, or None to leave it to
    transformers."""
    shared_engine: Any = None
    """What `decode_fast` keeps until the model is cast or moved."""

    def generate(self, *args: Any, fast: bool = True, **kwargs: Any) -> Any:
        """As transformers' own, with the same arguments and results. On a supported GPU the engine
        of this package makes the tokens wherever it gives the same answer. `fast=False` never takes
        it."""
        token = _fast.set(fast and all(kwargs.get(name) is None for name in BY_TRANSFORMERS))
        try:
            return super().generate(*args, **kwargs)
        finally:
            _fast.reset(token)

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        # A private name of transformers: `generate` calls `type(self)._sample` for greedy search
        # and sampling, when all is prepared (generation/utils.py, GENERATION_MODES_MAPPING).
        # The public `custom_generate` gets neither the streamer nor the way back to this loop.
        # tests/decode/test_transformers_generate.py fails when it is no longer called.
        made = self.decode_fast(*args, **kwargs) if self.decode_fast and _fast.get() else None
        return super()._sample(*args, **kwargs) if made is None else made

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """torch casts and moves a model by this. An engine would keep the weights of before."""
        self.shared_engine = None
        return super()._apply(*args, **kwargs)
