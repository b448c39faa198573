"""The names of PEFT that expert_lora.py relies on still mean what it takes them for."""

import inspect

import pytest
from adapter_fixtures import EXPERTS
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as peft_layer

from deepseek_moe.model.modeling_deepseek import DeepseekExperts
from deepseek_moe.training.expert_lora import ParamWrapper


def test_peft_still_compares_the_name_of_the_class(tiny_model):
    """If this fails, PEFT takes any subclass, and ours may have a name of its own."""

    class Other(ParamWrapper):
        pass

    config = LoraConfig(target_modules=[], target_parameters=EXPERTS)
    config._register_custom_module({DeepseekExperts: Other})
    with pytest.raises(ValueError, match="of type Other, which is not a valid target"):
        get_peft_model(tiny_model(), config)


def test_peft_still_asks_for_the_shape_where_it_is_overridden():
    calls = inspect.getsource(peft_layer.LoraLayer.__init__)
    assert "self._get_in_out_features(" in calls
    original = inspect.getsource(peft_layer.ParamWrapper._get_in_out_features)
    assert "self.num_experts = num_experts" in original
    assert "self._param_ndim = len(shape)" in original
    assert "self._param_ndim == 3" in inspect.getsource(peft_layer.ParamWrapper.update_layer)
