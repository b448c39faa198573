"""The model card of a checkpoint: its README.md, of which the hub reads the head (YAML)."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from .bundled import MODELS
from .checkpoint import HUB_ID
from .json_file import read_object, run_records

CARD = "README.md"
OFFICIAL = "deepseek-ai/deepseek-moe-16b-"
OFFICIAL_LICENCE = {
    "license": "other",
    "license_name": "deepseek",
    "license_link": "https://github.com/deepseek-ai/DeepSeek-MoE/blob/main/LICENSE-MODEL",
}
INHERITED = ("base_model", "license", "license_name", "license_link")
HASHED = ("model", "data", "eval_data", "adapter", "train_experts")
"""Settings that a run.json stores as hashes or long lists, so that they are only named."""
LOSSES = {"loss": "loss", "eval_loss": "loss on the evaluation data"}
LOAD = """\
## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto", trust_remote_code=True)
```

The model's code is in the folder. vLLM serves it by `vllm serve FOLDER --trust-remote-code`. Each
text begins with BOS, which the tokenizer adds.
"""


def model_card(
    made: str, given: str, base: Path, trained: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """The card of a checkpoint under its file name, as `write_checkpoint` takes it.

    Args:
        made: what was done to the base model, in a whole sentence.
        given: the base model as the user named it, a folder or a hub id.
        base: its folder, whose own card tells the licence of a model that is not known here.
        trained: what a run.json says of the run, with `losses`.
    """
    name = shown_name(given)
    fields = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["moe"]}
    fields |= {"license": "unknown"} | _inherited(base)
    if name.startswith(OFFICIAL):
        fields |= OFFICIAL_LICENCE
    elif base.resolve().parent == MODELS:
        fields["license"] = "mit"
    if "/" in name:
        fields["base_model"] = name
    trained = trained or {}
    rows = {"base model": f"`{name}`", "licence": "that of the base model"} | _results(trained)
    head = ModelCardData(**fields).to_yaml()
    parts = [f"---\n{head}\n---", f"# DeepSeek-MoE, from {name}", made, _table(rows)]
    settings = trained.get("settings") or {}
    idle = () if settings.get("use_lora") else ("lora_", "quant_type", "double_quant")
    shown = {n: x for n, x in settings.items() if x and n not in HASHED and not n.startswith(idle)}
    if shown:
        parts += ["## Settings", _table(shown)]
    return {CARD: "\n\n".join([*parts, LOAD])}


def shown_name(given: str) -> str:
    """A hub id as it is. Of a path only the last part, since a card may be published."""
    path = Path(given).expanduser()
    return path.resolve().name if path.exists() or not HUB_ID.fullmatch(given) else given


def last_losses(history: Iterable[Any]) -> dict[str, float]:
    """The last value of each loss in the log of a Trainer."""
    lines = [line for line in history if isinstance(line, dict)]
    return {name: line[name] for line in lines for name in LOSSES if name in line}


def record_of_run(folder: Path) -> dict[str, Any] | None:
    """What the run.json in `folder`, or above it, says of the run. Of a checkpoint, the losses are
    those up to its own step. None without a run.json of fine-tuning."""
    _, record = next(run_records(folder), (None, None))
    state = folder / "trainer_state.json"
    if record and state.is_file():
        history = read_object(state).get("log_history")
        record["losses"] = last_losses(history if isinstance(history, list) else [])
    return record


def _inherited(base: Path) -> dict[str, Any]:
    """The fields that the card of the base model tells, if it has one that can be read."""
    try:
        text = (base / CARD).read_text(encoding="utf-8")
        found = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, RecursionError, YAMLError):
        return {}
    return {name: found[name] for name in INHERITED if isinstance(found.get(name), str)}


def _results(trained: Mapping[str, Any]) -> dict[str, object]:
    """Data and losses of a run, if its run.json has them; those of older versions do not."""
    data, losses = trained.get("data"), trained.get("losses")
    rows: dict[str, object] = {}
    if isinstance(data, list) and data:
        rows["data"] = ", ".join(f"`{name}`" for name in data)
    if isinstance(losses, dict):
        found = {said: losses[name] for name, said in LOSSES.items() if name in losses}
        rows |= {n: round(x, 4) if isinstance(x, float) else x for n, x in found.items()}
    return rows


def _table(rows: Mapping[str, object]) -> str:
    cells = [(n, " ".join(str(x).split()).replace("|", "\\|")) for n, x in rows.items()]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])
