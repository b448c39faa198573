"""A flipped bit is named, in each kind of file of tensors; what people change is read."""

import json
import random
import struct
from pathlib import Path

import pytest
import torch
import xxhash
from adapter_fixtures import add_random_adapters
from flip_fixtures import flip, flipped
from safetensors.torch import load_file, save_file

from deepseek_moe import DeepseekForCausalLM, load
from deepseek_moe.checkpoint import Checkpoint
from deepseek_moe.checkpoint_writer import write_checkpoint
from deepseek_moe.checksums import find_damage
from deepseek_moe.delta import delta_tensors, write_delta
from deepseek_moe.errors import UserError
from deepseek_moe.model.layout import weight_files
from deepseek_moe.training.merge_lora import merged_tensors
from deepseek_moe.training.saving import save_trained

WRONG = r"is damaged \(the checksum of \S+ is wrong\); get it anew"


@pytest.fixture
def written(base: Path, tmp_path: Path) -> Path:
    """The base, which has no checksums, as this code writes it, in several files."""
    folder, whole = tmp_path / "written", Checkpoint(base)
    write_checkpoint(whole.tensors(), whole, folder, None, 40_000)
    return folder


def test_the_checksum_of_a_tensor_is_that_of_its_bytes(written):
    for file in weight_files(written):
        content = file.read_bytes()
        [length] = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        metadata, data = header.pop("__metadata__"), content[8 + length :]
        assert metadata["format"] == "pt"
        assert json.loads(metadata["xxh3_64"]) == {
            name: xxhash.xxh3_64(data[slice(*one["data_offsets"])]).hexdigest()
            for name, one in header.items()
        }


def test_load_and_export_name_the_file_and_the_tensor(written, tmp_path):
    load(str(written))
    assert len(weight_files(written)) > 2
    for file in weight_files(written):
        with flipped(file):
            with pytest.raises(UserError, match=WRONG) as caught:
                load(str(written))
            said = str(caught.value)
            assert said.startswith(f"{file} is") and "\n" not in said
            assert caught.value.exit_code == 2
            whole, output = Checkpoint(written), tmp_path / "output"
            with pytest.raises(UserError) as caught:
                write_checkpoint(whole.tensors(), whole, output, None)
            assert str(caught.value) == said
            assert not output.exists()


def test_an_adapter_and_a_delta_name_the_tensor(base, tiny_model, tmp_path):
    adapter, delta = tmp_path / "adapter", tmp_path / "delta"
    save_trained(add_random_adapters(tiny_model()), adapter, None, 10**9)
    write_delta(Checkpoint(base).tensors(), base, delta, 10**9)
    for folder, read in (
        (adapter, lambda: list(merged_tensors(base, adapter))),
        (delta, lambda: list(delta_tensors(delta))),
    ):
        [file] = folder.glob("*.safetensors")
        read()
        flip(file)
        with pytest.raises(UserError, match=f"^{file} {WRONG}"):
            read()


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_no_bit_of_a_file_flips_unseen(kind, written, tmp_path):
    """Where no checksum is wrong, the file has the same numbers, or cannot be opened."""
    file, seen = weight_files(written)[0], 0
    whole = load_file(file)
    if kind == "pt":
        file = tmp_path / "states.pt"
        torch.save(whole, file)
    for bit in random.Random(0).sample(range(8 * file.stat().st_size), 400):
        with flipped(file, bit):
            if find_damage([file]):
                seen += 1
                continue
            try:
                found = load_file(file) if kind == "safetensors" else torch.load(file)
            except Exception:  # libraries raise errors of any class
                continue
            assert found.keys() == whole.keys(), bit
            assert all(torch.equal(found[name], whole[name]) for name in whole), bit
    assert find_damage([file]) is None
    assert seen > 200


def edit_texts(folder: Path) -> None:
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        fields = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(fields | {"a_note": "mine"}))


def save_weights_again(folder: Path) -> None:
    for file in weight_files(folder):
        changed = {name: tensor + 1 for name, tensor in load_file(file).items()}
        save_file(changed, file, metadata={"format": "pt"})


def save_the_model_again(folder: Path) -> None:
    model = DeepseekForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data.zero_()
    model.save_pretrained(folder)


@pytest.mark.parametrize("change", [edit_texts, save_weights_again, save_the_model_again])
def test_what_people_change_is_read(change, written):
    before = load(str(written))[0].lm_head.weight
    change(written)
    after = load(str(written))[0].lm_head.weight
    assert torch.equal(before, after) == (change is edit_texts)
    assert list(Checkpoint(written).tensors())


def test_a_file_without_checksums_is_read(base):
    [file] = weight_files(base)
    flip(file)
    load(str(base))
    assert find_damage([file]) is None
