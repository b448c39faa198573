"""DeepSeek-MoE for transformers 5.

After this import, the Auto classes of transformers know the model. Two words are enough to use it:
`load` gives a model and its tokenizer, and a `Generator` continues texts.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .model.configuration_deepseek import DeepseekConfig
from .model.modeling_deepseek import DeepseekForCausalLM, DeepseekModel
from .model.tokenization_deepseek import DeepseekTokenizer
from .registration import register

if TYPE_CHECKING:
    from .decode.generation import Generator
    from .decode.load import load

register()

__all__ = [
    "DeepseekConfig",
    "DeepseekForCausalLM",
    "DeepseekModel",
    "DeepseekTokenizer",
    "Generator",
    "load",
]


LAZY = {"load": ".decode.load", "Generator": ".decode.generation"}


def __getattr__(name: str) -> Any:
    """Imports decoding when it is first asked for, so that `import deepseek_moe` stays cheap."""
    if name in LAZY:
        return getattr(import_module(LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
