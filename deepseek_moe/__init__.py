"""DeepSeek-MoE for transformers 5.

After this import, the Auto classes of transformers know the model. Two words are enough to use it:
`load` gives a model and its tokenizer, and a `Generator` continues texts.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto import tokenization_auto

from .model.configuration_deepseek import DeepseekConfig
from .model.modeling_deepseek import DeepseekForCausalLM, DeepseekModel
from .model.tokenization_deepseek import DeepseekTokenizer

if TYPE_CHECKING:
    from .decode.generation import Generator
    from .decode.load import load

AutoConfig.register("deepseek", DeepseekConfig, exist_ok=True)
AutoModel.register(DeepseekConfig, DeepseekModel, exist_ok=True)
AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
AutoTokenizer.register(DeepseekConfig, fast_tokenizer_class=DeepseekTokenizer, exist_ok=True)
# The published files name the class LlamaTokenizerFast, which is wrong. transformers has no public
# way to say so. It keeps these two tables of models whose registered class counts instead.
tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add("deepseek")
tokenization_auto.TOKENIZER_MAPPING_NAMES["deepseek"] = DeepseekTokenizer.__name__

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
