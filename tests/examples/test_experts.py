"""examples/experts.py: what it writes and prints, and what it refuses."""

import json
import re
import shlex
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from example_fixtures import LONG, assert_error, run
from finetune_fixtures import write_base
from row_fixtures import ROWS, write_jsonl
from text_fixtures import BUNDLED, ROOT, bundled_model, tokenizer_of

from deepseek_moe.checkpoint import fingerprint
from deepseek_moe.experts.measure import hash_ids, measure, picked_experts
from deepseek_moe.experts.profile import SCORES, Profile, read_profile
from deepseek_moe.training.examples import load_examples

TEXT = "The old king had three sons and a bird of gold. " * 3


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "hello.jsonl"
    write_jsonl(file, ROWS)
    return file


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "tale.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def assert_measured(profile: Profile, sequences: list[list[int]]) -> None:
    wanted = measure(bundled_model().eval(), sequences, fingerprint="m")
    assert (profile.tokens, profile.data) == (sum(map(len, sequences)), hash_ids(sequences))
    assert profile.model == fingerprint(BUNDLED)
    for number, layer in wanted.layers.items():
        for name in SCORES:
            found = getattr(profile.layers[number], name)
            assert found == pytest.approx(getattr(layer, name), rel=1e-4, abs=1e-7)


def test_a_set_of_rows_gives_one_profile(data, tmp_path):
    output = tmp_path / "new" / "profiles"
    command = ["experts.py", "--data_path", data, "--output", output, "--max_length", 24]
    done = run(*command, "--cache_dir", tmp_path / "cache")
    assert done.code == 0, done.err
    profile = read_profile(output / "profile.json")
    tokenizer = tokenizer_of(BUNDLED)
    examples, _ = load_examples([str(data)], tokenizer, 24, cache_dir=str(tmp_path / "other"))
    assert_measured(profile, examples["input_ids"])
    assert profile.settings == {
        "model": "models/tiny-base",
        "dtype": "float32",
        "data_path": [str(data)],
        "limit": None,
        "max_length": 24,
    }
    assert not (output / "differences.json").exists()
    shown = [line.split() for line in done.out.splitlines() if re.match(r" +\d", line)]
    assert [int(words[0]) for words in shown] == list(profile.layers)
    layer, words = profile.layers[3], shown[2]
    assert words[1:4] == [f"{layer.entropy:.2f}", f"{layer.load_over_mean:.2f}", f"{layer.starved}"]
    assert layer.picks[int(words[4])] == max(layer.picks)
    assert_error(run(*command), "profile.json is there already", "--overwrite")
    again = run(*command, "--cache_dir", tmp_path / "cache", "--overwrite", "--batch_size", 1)
    assert again.code == 0, again.err


def test_text_is_cut_into_windows_that_begin_with_bos(text, tmp_path):
    done = run("experts.py", "--text", text, "--output", tmp_path, "--max_length", 10)
    assert done.code == 0, done.err
    bos, *ids = tokenizer_of(BUNDLED)(TEXT).input_ids
    assert bos == tokenizer_of(BUNDLED).bos_token_id
    windows = [[bos, *ids[at : at + 9]] for at in range(0, len(ids), 9)]
    assert_measured(read_profile(tmp_path / "profile.json"), windows)
    limited = tmp_path / "limited"
    words = ["--output", limited, "--max-length=10", "--limit", 25]
    assert run("experts.py", "--text", text, *words).code == 0
    assert_measured(
        read_profile(limited / "profile.json"), [windows[0], windows[1], windows[2][:5]]
    )


def test_several_sets_have_names_and_are_compared(data, text, tmp_path):
    output = tmp_path / "out"
    sets = ["--data_path", f"short={data}", "--text", text]
    sets += ["--prompt", "Gold", "--prompt", "Bird"]
    done = run("experts.py", *sets, "--output", output, "--cache_dir", tmp_path / "cache")
    assert done.code == 0, done.err
    names = ["short", "tale", "prompt"]
    profiles = {name: read_profile(output / f"profile-{name}.json") for name in names}
    assert_measured(profiles["prompt"], tokenizer_of(BUNDLED)(["Gold", "Bird"]).input_ids)
    whole = read_profile(output / "profile.json")
    assert whole.tokens == sum(one.tokens for one in profiles.values())
    for number, layer in whole.layers.items():
        picks = [one.layers[number].picks for one in profiles.values()]
        assert layer.picks == [sum(some) for some in zip(*picks, strict=True)]
    written = json.loads((output / "differences.json").read_text())
    assert written["first"] == "short" and list(written["others"]) == ["tale", "prompt"]
    found = written["others"]["tale"]["2"]
    one, first = (profiles[name].layers[2] for name in ("tale", "short"))
    wanted = [
        a / sum(one.picks) - b / sum(first.picks)
        for a, b in zip(one.picks, first.picks, strict=True)
    ]
    assert found["shares"] == pytest.approx(wanted)
    assert found["total_variation"] == pytest.approx(sum(map(abs, wanted)) / 2)
    assert [line for line in done.out.splitlines() if " beside short" in line] == [
        f"{name} beside short: the part of the picks that goes to other experts"
        for name in names[1:]
    ]
    assert f"{found['total_variation']:.1%}" in done.out


def test_prompts_are_shown_with_the_top_expert_of_each_token(tmp_path):
    prompts = ["A bird  of gold", "Führer 🎉 "]
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    done = run("experts.py", *given, "--layer", 2, "--output", tmp_path)
    assert done.code == 0, done.err
    page = (tmp_path / "prompt.html").read_text(encoding="utf-8")
    assert page.count('<section class="coloured-text">') == 2
    found = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    shown = [data for data in map(json.loads, found) if "tokens" in data]
    for prompt, data in zip(prompts, shown, strict=True):
        ids = tokenizer_of(BUNDLED)(prompt).input_ids
        assert "".join(data["tokens"]) == prompt and len(data["tokens"]) == len(ids) - 1
        picks = picked_experts(bundled_model().eval(), ids)
        assert {one["number"]: one["experts"] for one in data["layers"]} == {
            number: of.experts[1:] for number, of in picks.items()
        }
        pieces = zip(data["tokens"], picks[2].top[1:], strict=True)
        assert "".join(f"{text}[{expert}]" for text, expert in pieces) in done.out
    assert not re.search("coloured-text", (tmp_path / "heatmap.html").read_text(encoding="utf-8"))
    assert (tmp_path / "heatmap.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_package_for_pictures_costs_no_profile(text, tmp_path):
    with patch.dict(sys.modules, {"matplotlib": None}):
        done = run("experts.py", "--text", text, "--output", tmp_path)
    assert_error(done, "needs matplotlib; pip install matplotlib")
    assert read_profile(tmp_path / "profile.json").tokens and (tmp_path / "heatmap.html").exists()
    assert not (tmp_path / "heatmap.png").exists()


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "experts.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^python examples/(experts.py .*)", page, re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        command = command.replace("output/", f"{tmp_path}/")
        done = run(*shlex.split(re.sub(r"deepseek-ai/[\w-]+", str(BUNDLED), command)))
        assert done.code == 0, done.err


def test_what_is_refused_before_weights_are_loaded(data, text, tmp_path):
    output = tmp_path / "out"
    empty, no_rows = tmp_path / "empty.txt", tmp_path / "none.jsonl"
    for file in (empty, no_rows):
        file.touch()
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "profile-tale.json").touch()
    cases = {
        (): "nothing to measure; give --data_path, --text or --prompt",
        ("--text", empty): "empty.txt has no token",
        ("--text", tmp_path / "absent"): "absent cannot be read",
        ("--data_path", no_rows): "none.jsonl has no rows",
        ("--data_path", tmp_path / "absent.json"): "absent.json does not exist",
        ("--prompt", ""): "the prompt is empty",
        ("--prompt", LONG): "tokens, but the context is 1024",
        ("--text", text, "--max_length", 1025): "from 2 to the context 1024",
        ("--text", text, "--max_length", 1): "from 2 to the context 1024",
        ("--text", text, "--layer", 1): "--layer has no effect without --prompt",
        ("--prompt", "A bird", "--layer", 0): "--layer 0 has no routed experts; layers that have: ",
        ("--text", text, "--text", text): "two sets of data have the name tale",
        ("--text", f"prompt={text}", "--prompt", "A"): "two sets of data have the name prompt",
        ("--text", text, "--model", tmp_path): "has no config.json",
        ("--text", text, "--model", tmp_path / "dense"): "dense has no routed experts",
        ("--text", text, "--quantization", "int8"): "there is no option --quantization",
        ("--data_path", data, "--columns", "x"): "--columns 'x' is no name",
    }
    write_base(tmp_path / "dense", n_routed_experts=None)
    loaded = AssertionError("weights are loaded")
    with patch("deepseek_moe.DeepseekForCausalLM.from_pretrained", side_effect=loaded):
        for words, said in cases.items():
            assert_error(run("experts.py", *words, "--output", output), said)
        assert not output.exists()
        words = ["--text", text, "--prompt", "A bird", "--output", occupied]
        assert_error(run("experts.py", *words), "profile-tale.json is there already")
        words = ["--text", text, "--output", text]
        assert_error(run("experts.py", *words), "tale.txt cannot be made")
        words = ["--text", text, "--output", output]
        assert_error(run("experts.py", *words), "weights are loaded")
