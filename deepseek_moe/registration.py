"""Makes transformers know the model.

Everything is public but for three tables and one attribute of transformers, which stand here alone.
tests/test_registration.py fails when transformers changes them.
"""

import sys
from types import ModuleType
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.models.auto import modeling_auto, tokenization_auto

from .model.classifiers import DeepseekForSequenceClassification, DeepseekForTokenClassification
from .model.configuration_deepseek import DeepseekConfig
from .model.modeling_deepseek import DeepseekForCausalLM, DeepseekModel
from .model.tokenization_deepseek import DeepseekTokenizer, warn_of_other_tokenizer

MODELS = {
    AutoModel: DeepseekModel,
    AutoModelForCausalLM: DeepseekForCausalLM,
    AutoModelForSequenceClassification: DeepseekForSequenceClassification,
    AutoModelForTokenClassification: DeepseekForTokenClassification,
}


def register() -> None:
    """Registers the classes. A second call changes nothing."""
    AutoConfig.register("deepseek", DeepseekConfig, exist_ok=True)
    for auto_class, model_class in MODELS.items():
        auto_class.register(DeepseekConfig, model_class, exist_ok=True)
    AutoTokenizer.register(DeepseekConfig, fast_tokenizer_class=DeepseekTokenizer, exist_ok=True)
    # The published files name the class LlamaTokenizerFast, which is wrong. transformers has no
    # public way to say so. It keeps these two tables of models whose registered class counts.
    tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add("deepseek")
    tokenization_auto.TOKENIZER_MAPPING_NAMES["deepseek"] = DeepseekTokenizer.__name__
    # Trainer shifts the labels for its label smoothing only of classes that this table names.
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["deepseek"] = DeepseekForCausalLM.__name__
    DeepseekConfig.warn_of_tokenizer = warn_of_other_tokenizer
    DeepseekForCausalLM.decode_fast = _sample_by_engine
    # TRL and `transformers serve` look for the class that a config names in transformers itself.
    for copy in _copies_of_transformers():
        copy.DeepseekForCausalLM = DeepseekForCausalLM


def _sample_by_engine(*args: Any, **kwargs: Any) -> Any:
    """Imports the engine when a text is first generated, so that `import deepseek_moe` is cheap."""
    from .decode.transformers_generate import sample_by_engine

    return sample_by_engine(*args, **kwargs)


def _copies_of_transformers() -> list[ModuleType]:
    """Every transformers module that a loaded module holds.

    transformers/processing_utils.py imports transformers a second time, as a new module, which then
    stands in sys.modules. Who imported it before holds the old one.
    """
    found = {id(one): one for one in (transformers, sys.modules["transformers"])}
    for module in list(sys.modules.values()):
        held = getattr(module, "__dict__", {}).get("transformers")
        if isinstance(held, ModuleType) and held.__name__ == "transformers":
            found[id(held)] = held
    return list(found.values())
