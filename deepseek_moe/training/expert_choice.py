"""The experts that a run trains: by --train_experts, or those of the adapter it goes on from."""

from pathlib import Path

from ..experts.choose import CHOICE_FILE, read_choice
from .arguments import ModelArguments

SHARED_LINEARS = "shared_experts.gate_proj,shared_experts.up_proj,shared_experts.down_proj"


def take_choice(model: ModelArguments, checkpoint: Path) -> None:
    """Sets the chosen experts of the model in the folder `checkpoint`. If the file has shared
    experts train too, these are added to `trainable`.

    Raises:
        UserError: an amount is outside of (0, 1], or the file chooses no experts of this model.
    """
    file = model.train_experts
    if model.adapter and (Path(model.adapter) / CHOICE_FILE).is_file():
        file = Path(model.adapter) / CHOICE_FILE
    if not file:
        return
    amounts = (model.expert_score, model.expert_threshold, model.expert_share)
    model.chosen_experts, shared = read_choice(file, checkpoint, *amounts)
    if shared:
        names = SHARED_LINEARS if model.use_lora else "shared_experts"
        model.trainable = f"{model.trainable or ''},{names}"
