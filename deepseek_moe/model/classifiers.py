"""Classifiers over the decoder, by transformers' generic heads."""

from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from .modeling_deepseek import DeepseekModel, DeepseekPreTrainedModel


class _Classifier(DeepseekPreTrainedModel):
    """A checkpoint of a causal model has no `score`, and its `lm_head` is of no use here."""

    _free_heads = ("score.", "lm_head.")
    _keys_to_ignore_on_load_unexpected = DeepseekModel._keys_to_ignore_on_load_unexpected

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """transformers' method (modeling_utils.py) looks for the decorator of experts in the file
        of the class, and would take the slow loop for a class of this file."""
        return True


class DeepseekForSequenceClassification(GenericForSequenceClassification, _Classifier):
    """One score for each label from the last token, for reward models and classifiers."""


class DeepseekForTokenClassification(GenericForTokenClassification, _Classifier):
    """One score for each label from every token."""
