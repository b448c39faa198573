"""DeepSeek-MoE for transformers 5: after this import, its Auto classes know the model."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto import tokenization_auto

from .configuration_deepseek import DeepseekConfig
from .modeling_deepseek import DeepseekForCausalLM, DeepseekModel
from .tokenization_deepseek import DeepseekTokenizer

AutoConfig.register("deepseek", DeepseekConfig, exist_ok=True)
AutoModel.register(DeepseekConfig, DeepseekModel, exist_ok=True)
AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
AutoTokenizer.register(DeepseekConfig, fast_tokenizer_class=DeepseekTokenizer, exist_ok=True)
# The published files name LlamaTokenizerFast, which they are not. transformers keeps this list for
# such models: those whose registered class is to be believed, not the one in the files.
tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add("deepseek")
tokenization_auto.TOKENIZER_MAPPING_NAMES["deepseek"] = DeepseekTokenizer.__name__

__all__ = ["DeepseekConfig", "DeepseekForCausalLM", "DeepseekModel", "DeepseekTokenizer"]
