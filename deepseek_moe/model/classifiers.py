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


class DeepseekForSequenceClassification(GenericForSequenceClassification, _Classifier):
    """One score for each label from the last token, for reward models and classifiers."""


class DeepseekForTokenClassification(GenericForTokenClassification, _Classifier):
    """One score for each label from every token."""
