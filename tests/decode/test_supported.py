"""A model that changes after its Generator was made: the next call computes what it is now.

The engine runs on the twins of its kernels. The reference is a new Generator without an engine.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from types import MethodType

import pytest
import torch
from gpu_fixtures import logits_before, with_engine
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.decode.engine import Engine, UnsupportedModel
from deepseek_moe.decode.generation import Generator
from deepseek_moe.decode.int_quantizer import IntConfig
from deepseek_moe.decode.supported import HARMLESS_HOOKS, find_unsupported, signature_of
from deepseek_moe.errors import UserError
from deepseek_moe.kernels.decode import torch_ops
from deepseek_moe.model.modeling_deepseek import DeepseekMLP

peft = pytest.importorskip("peft", reason="adapters are PEFT's: pip install peft")

PROMPTS = [[5, 17, 44, 70, 2], [33, 8, 61]]
NEW = 8
Model = DeepseekForCausalLM
Change = Callable[[Model], object]


@pytest.fixture
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model(hidden_size=64, num_attention_heads=2)


@pytest.fixture
def generator(model: Model) -> Generator:
    return with_engine(model)


@pytest.fixture(params=[16, 4], ids=["16 bits", "int4"])
def any_model(
    request: pytest.FixtureRequest, tiny_model: Callable[..., Model], tmp_path: Path
) -> Model:
    model = tiny_model(hidden_size=64, num_attention_heads=2, num_hidden_layers=2)
    if request.param == 16:
        return model
    model.save_pretrained(tmp_path)
    return Model.from_pretrained(tmp_path, quantization_config=IntConfig(request.param))


def check_equals_plain(generator: Generator, new: int = NEW) -> torch.Tensor:
    """The logits [N, B, V], after they were found to be those of the model as it is."""
    ids = [[(17 * n + 5 * b) % 64 for n in range(new)] for b in range(len(PROMPTS))]
    plain = Generator(generator.model, fast=False)
    ours, theirs = (logits_before(way, PROMPTS, ids) for way in (generator, plain))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    return ours


def other(x: torch.Tensor) -> torch.Tensor:
    """Other numbers of the same kind: words turned by a bit, or all rows one further."""
    return x.bitwise_not() if x.dtype == torch.int32 else x.roll(1, 0) * 1.25


def replace_parameters(module: nn.Module) -> None:
    """Each Parameter by a new object."""
    state = {name: other(x) for name, x in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


def swap_names(mlp: nn.Module) -> None:
    """Of gate_proj and up_proj, which stay in their order."""
    names = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    mlp._modules = {names.get(name, name): module for name, module in mlp._modules.items()}


def wrap_forward(module: nn.Module) -> None:
    own = type(module).forward
    module.forward = MethodType(lambda self, *args, **kwargs: -own(self, *args, **kwargs), module)


def add_lora(model: Model, **targets: list[str]) -> "peft.PeftModel":
    config = peft.LoraConfig(r=4, init_lora_weights=False, **targets)
    return peft.get_peft_model(model, config)


def replace_head(model: Model, bias: bool = False) -> None:
    torch.manual_seed(3)
    model.lm_head = nn.Linear(64, model.config.vocab_size, bias=bias)


def set_all(model: Model, name: str, value: object) -> None:
    for module in model.modules():
        if hasattr(module, name):
            setattr(module, name, value)


def replace_rotary(model: Model) -> None:
    model.config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)


def layer(model: Model) -> nn.Module:
    return model.model.layers[1]


REBUILT: dict[str, Change] = {
    "head": replace_head,
    "parameters": replace_parameters,
    "more embeddings": lambda m: m.resize_token_embeddings(160),
    "top_k of a layer": lambda m: setattr(layer(m).mlp.gate, "top_k", 2),
    "norm_topk_prob": lambda m: set_all(m, "norm_topk_prob", True),
    "one expert, not normed": lambda m: (
        set_all(m, "norm_topk_prob", True),
        set_all(m, "top_k", 1),
    ),
    "epsilon": lambda m: set_all(m, "variance_epsilon", 0.5),
    "angles": lambda m: m.model.rotary_emb.inv_freq.mul_(0.3),
    "attention_scaling": lambda m: setattr(m.model.rotary_emb, "attention_scaling", 0.5),
    "rotary embedding": replace_rotary,
    "layers swapped": lambda m: m.model.layers.insert(1, m.model.layers.pop(2)),
    "layer removed": lambda m: m.model.layers.pop(2),
    "layer's module": lambda m: setattr(layer(m), "mlp", copy.deepcopy(m.model.layers[2].mlp)),
    "names": lambda m: swap_names(layer(m).mlp.shared_experts),
    "no shared experts": lambda m: setattr(layer(m).mlp, "shared_experts", None),
}
"""Into a model that the engine computes too."""


UNKNOWN: dict[str, Change] = {
    "adapter": lambda m: add_lora(m, target_modules=["q_proj", "gate_proj", "down_proj"]),
    "adapter on experts": lambda m: add_lora(m, target_parameters=["mlp.experts.down_proj"]),
    "head with a bias": lambda m: replace_head(m, bias=True),
    "hook": lambda m: layer(m).mlp.register_forward_hook(lambda _, args, out: -out),
    "pre-hook": lambda m: layer(m).mlp.register_forward_pre_hook(lambda _, args: (-args[0],)),
    "forward": lambda m: wrap_forward(layer(m).self_attn.o_proj),
    "epsilon of a norm": lambda m: setattr(layer(m).input_layernorm, "variance_epsilon", 0.5),
    "scaling": lambda m: set_all(m, "scaling", 0.5),
    "not causal": lambda m: setattr(layer(m).self_attn, "is_causal", False),
    "heads in the config": lambda m: setattr(m.config, "num_key_value_heads", 1),
    "max_norm": lambda m: setattr(m.model.embed_tokens, "max_norm", 0.1),
    "another activation": lambda m: setattr(layer(m).mlp.experts, "act_fn", nn.Tanh()),
    "wrapped": lambda m: m.set_submodule("lm_head", nn.Sequential(m.lm_head, nn.Tanh())),
}
"""Into a model that only its own forward computes."""
NO_OTHER_RESULT = ("not causal", "heads in the config")
"""The first counts only where no mask is given; the heads were read when the model was made."""


@pytest.mark.parametrize("name", [*REBUILT, *UNKNOWN])
def test_a_changed_model_is_computed(generator, model, name):
    before = check_equals_plain(generator)
    (REBUILT | UNKNOWN)[name](model)
    after = check_equals_plain(generator)
    if name not in NO_OTHER_RESULT:
        assert before.shape != after.shape or not torch.allclose(before, after, atol=1e-2)
    assert (generator.engine.decoder is not None) == (name in REBUILT)
    if name in UNKNOWN:
        generator.fast = True
        with pytest.raises(UserError, match=r"does not take this model: .*`fast` out[^\n]*$"):
            generator.generate(PROMPTS, 2)
        with pytest.raises(UnsupportedModel):
            Engine(model, ops=torch_ops)


def test_what_is_changed_outside_of_the_model(generator, model, monkeypatch):
    """Forwards of classes, and torch's hooks for all modules."""
    before = check_equals_plain(generator)
    with monkeypatch.context() as patch:
        own = DeepseekMLP.forward
        patch.setattr(DeepseekMLP, "forward", lambda self, *args: -own(self, *args))
        assert not torch.allclose(before, check_equals_plain(generator), atol=1e-2)
    assert torch.equal(check_equals_plain(generator), before)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: -out if isinstance(module, nn.Linear) else None
    )
    try:
        assert not torch.allclose(before, check_equals_plain(generator), atol=1e-2)
    finally:
        hook.remove()


def test_the_limits_are_the_present_ones(generator, model):
    generator.generate(PROMPTS, 2)
    for context in (10, 70):
        model.config.max_position_embeddings = context
        made = generator.generate(PROMPTS, 80)
        assert [len(ids) for ids in made] == [context - len(prompt) for prompt in PROMPTS]
        assert made == Generator(model, fast=False).generate(PROMPTS, 80)
        with pytest.raises(UserError, match=f"context is {context}"):
            generator.generate([[5] * context], 2)
    model.resize_token_embeddings(70)
    with pytest.raises(UserError, match="the id 70, but the model's ids are 0 to 69"):
        generator.generate(PROMPTS, 2)


def test_every_parameter_replaced_or_changed_in_place(any_model):
    """A replaced one is noticed, whichever it is; a changed one is read where it is."""
    generator = with_engine(any_model)
    last = check_equals_plain(generator, 2)
    for name, parameter in any_model.named_parameters():
        built, before = generator.engine.decoder, parameter.data.clone()
        with torch.no_grad():
            parameter.copy_(other(before))
        changed = check_equals_plain(generator, 2)
        assert generator.engine.decoder is built, name
        assert not torch.equal(changed, last), name
        parameter.data = before
        last = check_equals_plain(generator, 2)
        assert generator.engine.decoder not in (built, None), name
        assert not torch.equal(changed, last), name


def test_a_cast_model_is_computed_in_its_dtype(generator, model):
    generator.generate(PROMPTS, 2)
    model.bfloat16()
    assert generator.generate(PROMPTS, NEW) == with_engine(model).generate(PROMPTS, NEW)
    assert generator.engine.cache.layers[0][0].dtype == torch.bfloat16


def test_an_engine_changes_no_value_and_a_second_one_moves_nothing(any_model):
    state = {name: x.clone() for name, x in any_model.state_dict().items()}
    first = with_engine(any_model)
    built, places = first.engine.decoder, [p.data_ptr() for p in any_model.parameters()]
    after = any_model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], x) for name, x in state.items())
    second = with_engine(any_model)
    assert [p.data_ptr() for p in any_model.parameters()] == places
    for parameter in any_model.parameters():
        parameter.data.copy_(other(parameter.data))
    check_equals_plain(first), check_equals_plain(second)
    assert first.engine.decoder is built
    k_proj = any_model.model.layers[1].self_attn.k_proj.weight
    k_proj.data = other(k_proj.data)
    check_equals_plain(second)  # lays them side by side anew
    check_equals_plain(first)


@pytest.mark.parametrize("in_order", [True, False])
def test_weights_are_not_torn_out_of_the_memory_of_an_optimizer(generator, model, in_order):
    """One that writes its steps into a flat tensor, of which the parameters are parts."""
    parameters = list(model.parameters())
    if not in_order:
        parameters.reverse()
    flat = torch.cat([parameter.data.flatten() for parameter in parameters])
    pieces = flat.split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.data = piece.view(parameter.shape)
    before = check_equals_plain(generator)
    assert (generator.engine.decoder is not None) == in_order
    flat.mul_(torch.linspace(0.5, 1.5, len(flat)))
    assert not torch.allclose(before, check_equals_plain(generator), atol=1e-2)


def test_the_engine_comes_back_with_its_model(generator, model):
    before = check_equals_plain(generator)
    stream = generator.stream(PROMPTS, NEW)
    next(stream)
    adapted = add_lora(model, target_modules=["q_proj", "down_proj"])
    assert "model.layers.0.self_attn.q_proj is a peft.tuners.lora" in find_unsupported(model)
    assert not torch.allclose(check_equals_plain(generator), before, atol=1e-2)
    assert generator.engine.decoder is generator.engine.cache is None  # no memory is kept for it
    with pytest.raises(UserError, match="another generation has begun"):
        next(stream)
    adapted.unload()
    assert torch.equal(check_equals_plain(generator), before)
    assert generator.engine.decoder is not None


def test_a_stream_goes_on_with_its_first_weights(generator, model):
    whole = generator.generate(PROMPTS, NEW)
    stream = generator.stream(PROMPTS, NEW)
    steps = [next(stream), next(stream)]
    replace_parameters(model)
    steps += stream
    assert [list(ids) for ids in zip(*steps, strict=True)] == whole
    assert generator.generate(PROMPTS, NEW) == Generator(model, fast=False).generate(PROMPTS, NEW)


def test_a_model_rebuilt_in_inference_mode_is_trainable(generator, model):
    replace_parameters(model)
    with torch.inference_mode():
        check_equals_plain(generator)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model(torch.tensor(PROMPTS[:1])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_signature_of_an_untouched_model_stays(generator, model):
    """Also with the hooks that transformers leaves when it was asked for hidden states."""
    signature = generator.engine.signature
    model(torch.tensor([[1, 2]]), output_hidden_states=True)
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert {hook.__module__ for hook in hooks} == {HARMLESS_HOOKS}
    assert find_unsupported(model) is None
    model.train(), model.eval()
    model.config.use_cache = False
    assert signature_of(model) == signature
