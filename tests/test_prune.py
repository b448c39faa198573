"""Pruning: the result is the whole model with the router's other columns masked, and loads as it
does; what cannot be pruned is refused before a weight is read."""

import json
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from adapter_fixtures import load, logits, tensors_in
from gpu_fixtures import with_engine
from safetensors.torch import save_file
from text_fixtures import BUNDLED

from deepseek_moe import DeepseekForCausalLM, Generator, perplexity, prune
from deepseek_moe import load as load_to_generate
from deepseek_moe.checkpoint import Checkpoint, fingerprint
from deepseek_moe.errors import RunError
from deepseek_moe.experts.profile import LayerProfile, Profile

TEXT = "Once upon a time there was an old king. He had three sons and a bird of gold.\n"


def write_profile(of: Path, **changes: Any) -> Path:
    """A profile of the model in `of` with random scores, of which two are equal in each layer."""
    config, random = Checkpoint(of).config, torch.Generator().manual_seed(0)
    E, layers = config.n_routed_experts, {}
    for number in config.moe_layers:
        scores = torch.rand(E, generator=random).tolist()
        scores[2] = scores[5] = 0.5
        layers[number] = LayerProfile([1] * E, [0.1] * E, scores)
    fields = {"layers": layers, "tokens": 7, "model": fingerprint(of), "data": "d"} | changes
    file = of.parent / f"{of.name}.json"
    Profile(**fields).save(file, overwrite=True)
    return file


def kept_by_sorting(profile: Path, keep: int) -> dict[int, list[int]]:
    layers = json.loads(profile.read_text())["layers"]
    ranked = {
        int(number): sorted((-score, expert) for expert, score in enumerate(x["gate_times_norm"]))
        for number, x in layers.items()
    }
    return {number: sorted(e for _, e in pairs[:keep]) for number, pairs in ranked.items()}


def words(model: Path, profile: Path, keep: int, output: Path, *more: Any) -> list[Any]:
    given = {"--model": model, "--profile": profile, "--keep": keep, "--output": output}
    return [prune, *chain(*given.items()), *more]


@pytest.fixture
def run(run_module: Callable[..., None]) -> Callable[..., None]:
    return lambda *args: run_module(*words(*args))


@pytest.fixture
def error(refusal: Callable[..., str]) -> Callable[..., str]:
    return lambda *args, code=2: refusal(*words(*args), code=code)


def mask_routers(model: DeepseekForCausalLM, kept: dict[int, list[int]], top_k: int) -> None:
    """Gives the experts that are not kept the logit -inf, so that no token chooses them."""

    def hook(gate: Any, _: Any, out: Any, stay: list[int] = ()) -> Any:
        logits_TE = torch.full_like(out[0], -torch.inf)
        logits_TE[:, stay] = out[0][:, stay]
        weights_TK, index_TK = logits_TE.softmax(-1).topk(top_k)
        if gate.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return logits_TE, weights_TK, index_TK

    for number, stay in kept.items():
        gate = model.model.layers[number].mlp.gate
        gate.register_forward_hook(lambda g, i, o, stay=stay: hook(g, i, o, stay))


@pytest.mark.parametrize(("keep", "top_k"), [(5, None), (7, None), (3, 3), (4, 2), (1, 1)])
@pytest.mark.parametrize("normed", [False, True], ids=["", "renormalised"])
@pytest.mark.parametrize("shared", [2, None], ids=["", "no shared experts"])
def test_equals_the_model_with_masked_routers(keep, top_k, normed, shared, tiny_model, base, run):
    whole = tiny_model(norm_topk_prob=normed, n_shared_experts=shared)
    whole.save_pretrained(base)
    profile, output = write_profile(base), base.parent / "pruned"
    run(base, profile, keep, output, *(("--num_experts_per_tok", top_k) if top_k else ()))
    pruned = load(output)
    assert pruned.config.n_routed_experts == keep
    assert pruned.config.num_experts_per_tok == (top_k or 3)
    before = logits(whole)
    mask_routers(whole, kept_by_sorting(profile, keep), top_k or 3)
    torch.testing.assert_close(logits(pruned), logits(whole), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(pruned), before, atol=1e-2)


def test_all_else_is_as_it_was(base, tmp_path, capsys, run):
    """Each tensor bit for bit and in its own dtype. test_export.py compares the other files."""
    tensors, profile, output = tensors_in(base), write_profile(base), tmp_path / "pruned"
    kept = kept_by_sorting(profile, 5)
    half = f"model.layers.2.mlp.experts.{kept[2][3]}.down_proj.weight"
    assert kept[2][3] != 3
    tensors[half] = tensors[half].half()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    run(base, write_profile(base), 5, output, "--max_shard_size", "20KB")
    said = capsys.readouterr()
    assert said.out == f"{output}\n" and "perplexity was not measured" in said.err
    wanted = {name: x for name, x in tensors.items() if ".experts." not in name}
    for layer, experts in kept.items():
        wanted[f"model.layers.{layer}.mlp.gate.weight"] = torch.stack(
            [tensors[f"model.layers.{layer}.mlp.gate.weight"][expert] for expert in experts]
        )
        for new, old in enumerate(experts):
            for matrix in ("gate_proj", "up_proj", "down_proj"):
                name = f"model.layers.{layer}.mlp.experts.{{}}.{matrix}.weight"
                wanted[name.format(new)] = tensors[name.format(old)]
    found = tensors_in(output)
    assert len(list(output.glob("model-*.safetensors"))) > 3
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    note = json.loads((output / "pruned.json").read_text())
    assert note["base"] == fingerprint(base) != fingerprint(output)
    assert note["kept"] == {str(layer): experts for layer, experts in kept.items()}
    sizes = [sum(x.numel() for x in tensors_in(x).values()) / 1e6 for x in (base, output)]
    assert f"{sizes[0]:,.1f} M parameters become {sizes[1]:,.1f} M" in said.err
    assert "5 of 8 experts in each of 2 layers stay" in said.err


@pytest.mark.parametrize("keep", [20, 7, 6])
def test_the_engine_and_the_plain_way_take_it(keep, tmp_path, run):
    """Numbers of experts that are no power of two, also as many as a token uses."""
    prompts = [[4094, 17, 300, 5], [4094, 44, 80]]
    copy = shutil.copytree(BUNDLED, tmp_path / "base")
    run(copy, write_profile(copy), keep, tmp_path / "pruned", "--dtype", "float32")
    model, _ = load_to_generate(str(tmp_path / "pruned"), device="cpu")
    made = Generator(model, fast=False).generate(prompts, 6)
    assert with_engine(model).generate(prompts, 6) == made
    assert with_engine(model).generate(prompts * 8, 6) == made * 8  # the way of many tokens


def test_perplexity_before_and_after(tmp_path, capsys, run):
    copy, text = shutil.copytree(BUNDLED, tmp_path / "base"), tmp_path / "held-out.txt"
    text.write_text(TEXT * 3)
    command = (copy, write_profile(copy), 12)
    run(*command, tmp_path / "pruned", "--text", text, "--window", 16, "--dtype", "float32")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(tmp_path / "pruned")
    for line, folder in zip(lines[1:3], (copy, tmp_path / "pruned"), strict=True):
        model, tokenizer = load_to_generate(str(folder), "float32", "cpu")
        held_out = perplexity.read_held_out(text, tokenizer)
        loss = perplexity.measure_loss(model, held_out, 16, tokenizer.bos_token_id)
        numbers = (loss.perplexity, loss.nats_per_token, loss.bits_per_byte)
        assert [float(x) for x in line.split()[1:]] == pytest.approx(numbers, abs=1e-3)
    assert f"over {loss.tokens} tokens ({len(TEXT) * 3} bytes), in windows of 16" in lines[3]
    assert [lines[1].split()[0], lines[2].split()[0]] == ["before", "after"]


def test_too_little_memory_for_perplexity_loses_nothing(base, tmp_path, monkeypatch, error):
    monkeypatch.setattr("deepseek_moe.decode.load.free_memory", lambda _: 0)
    (tmp_path / "text.txt").write_text("w3 w5")
    output = tmp_path / "pruned"
    said = error(base, write_profile(base), 5, output, "--text", tmp_path / "text.txt", code=1)
    assert "pruned is complete, but perplexity cannot be measured here: the weights need" in said
    assert load(output).config.n_routed_experts == 5


@pytest.mark.parametrize(
    ("keep", "more", "said"),
    [
        (0, (), "the model has 8 experts; keep 1 to 7"),
        (8, (), "the model has 8 experts; keep 1 to 7"),
        (2, (), "a token uses 3 experts; keep more, or add --num_experts_per_tok 2"),
        (4, ("--num_experts_per_tok", 5), "4 stay; use 1 to 4"),
        (4, ("--num_experts_per_tok", 0), "4 stay; use 1 to 4"),
        (4, ("--window", 1), "use 2 to the model's context of 64"),
        (4, ("--window", 65), "use 2 to the model's context of 64"),
        (4, ("--text", "absent.txt"), "absent.txt cannot be read"),
        (4, ("--max_shard_size", "5 potatoes"), "is no size"),
    ],
)
def test_wrong_options_are_refused(keep, more, said, base, tmp_path, error):
    assert said in error(base, write_profile(base), keep, tmp_path / "new", *more)
    assert not (tmp_path / "new").exists()


def test_wrong_profiles_are_refused_before_the_work(base, tiny_model, tmp_path, monkeypatch, error):
    monkeypatch.setattr(Checkpoint, "tensor", Mock(side_effect=AssertionError("a weight is read")))
    new, good = tmp_path / "new", write_profile(base)
    zero = LayerProfile([1] * 8, [0.1] * 8, [0.0] * 8)
    one = LayerProfile([1] * 8, [0.1] * 8, [1.0] + [0.0] * 7)
    assert "is there already" in error(base, good, 4, base)
    assert "no profile" in error(base, base / "config.json", 4, new)
    file = write_profile(base, layers={1: one, 2: zero})
    assert "gate_times_norm is 0 for all experts of layer 2" in error(base, file, 4, new)
    file = write_profile(base, model="tensors:other")
    assert "measured on another model" in error(base, file, 4, new)
    file = write_profile(base, layers={1: one})
    assert "has 1 layers of 8 experts, the model 2 of 8" in error(base, file, 4, new)
    tiny_model(n_routed_experts=None, num_experts_per_tok=None).save_pretrained(base)
    assert "has no routed experts to leave out" in error(base, file, 4, new)
    assert not new.exists()


def test_a_disk_that_is_too_small_is_refused_before_the_work(base, tmp_path, monkeypatch, run):
    """It needs room for the experts that stay only."""
    profile, enough = write_profile(base), tmp_path / "enough"
    run(base, profile, 4, enough)
    need = sum(tensor.nbytes for tensor in tensors_in(enough).values())
    monkeypatch.setattr(shutil, "disk_usage", Mock(return_value=Mock(free=need - 1)))
    with pytest.raises(RunError, match=r"MB, and .* are free"):
        run(base, profile, 4, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(shutil, "disk_usage", Mock(return_value=Mock(free=need)))
    run(base, profile, 4, tmp_path / "new")
