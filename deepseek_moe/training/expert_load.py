"""How the routed experts are used in training: counted on the GPU, shown in TensorBoard."""

from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from transformers.integrations import TensorBoardCallback

from ..experts.heatmap import load_image
from ..experts.profile import SUMMARIES, LayerProfile
from ..model.configuration_deepseek import DeepseekConfig
from ..model.modeling_deepseek import DeepseekCausalLMOutput

PICTURES = 20
"""Heat maps in the course of a run, beside the first. Each shows the steps since the last log."""
GROUP = "train_experts"  # TensorBoard opens two groups, in the order of their names: eval, train.
TIMES = ("_runtime", "_samples_per_second", "_steps_per_second")


class ExpertLoad:
    """Counts the picks of the experts, and adds up the balance loss, of each MoE layer.

    Counting never waits for the device. `read` sums over the processes and counts anew.
    """

    def __init__(self, config: DeepseekConfig, device: torch.device) -> None:
        self.layers = config.moe_layers
        self.picks: list[list[int]] = []
        self.curves: dict[str, list[float]] = {}
        """What was read last, of each of these layers: its experts' picks, and its figures."""
        # The last column takes the picks that do not count.
        shape = len(self.layers), (config.n_routed_experts or 0) + 1
        self._picks = torch.zeros(shape, dtype=torch.long, device=device)
        self._losses = torch.zeros(len(self.layers), device=device)

    def add(
        self, outputs: DeepseekCausalLMOutput, sequence_ids: torch.Tensor, share: float
    ) -> None:
        """Adds a micro-batch.

        Args:
            outputs: of the model while it trains.
            sequence_ids: [B, L], negative for padding.
            share: of the balance losses, the part that this batch has in its step.
        """
        if outputs.aux_losses is not None:
            self._losses += share * outputs.aux_losses
        if outputs.router_picks is not None:
            layers, columns = self._picks.shape
            index = torch.stack(outputs.router_picks)  # [layers, T, K]
            index.masked_fill_(sequence_ids.view(-1, 1) < 0, columns - 1)
            index += torch.arange(layers, device=index.device).view(-1, 1, 1) * columns
            ones = self._picks.new_ones(1).expand(index.numel())
            self._picks.view(-1).scatter_add_(0, index.view(-1), ones)

    def read(self, accelerator: Accelerator, steps: int) -> dict[str, float]:
        """Reads what all processes, which call it together, have counted in these `steps`.

        Returns the balance loss of a step, summed over the layers, and of the layers' figures the
        worst, the mean, and the sum.
        """
        self.picks = accelerator.reduce(self._picks, "sum")[:, :-1].tolist()
        losses = accelerator.reduce(self._losses, "sum").tolist()
        self._picks.zero_()
        self._losses.zero_()
        profiles = [LayerProfile(picks, [], []) for picks in self.picks]
        self.curves = {name: [getattr(one, name) for one in profiles] for name in SUMMARIES}
        self.curves["balance_loss"] = [loss / steps for loss in losses]
        found = {"balance_loss": sum(self.curves["balance_loss"])}
        if profiles:
            found["load_over_mean"] = max(self.curves["load_over_mean"])
            found["expert_entropy"] = fmean(self.curves["entropy"])
            found["starved_experts"] = sum(self.curves["starved"])
        return found


class ExpertBoard(TensorBoardCallback):
    """transformers' TensorBoard, with four curves for each layer and pictures of the load.

    They are not in `trainer_state.json`, where hundreds of numbers a step would be too many. What
    Trainer says of a whole run is left out, since it would be cards with a single point.
    """

    def __init__(self, load: ExpertLoad) -> None:
        super().__init__()
        self.load, self._pictured = load, -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.tb_writer and self.load.layers:
            names = (*SUMMARIES, "balance_loss")
            charts = {name: ["Multiline", [f"{GROUP}/{name}/.*"]] for name in names}
            self.tb_writer.add_custom_scalars({"all layers": charts})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "train_runtime" in logs:
            return
        if "loss" in logs and self.tb_writer and self.load.layers:
            self._write(state.global_step, PICTURES * state.global_step // state.max_steps)
        logs = {name: value for name, value in logs.items() if not name.endswith(TIMES)}
        super().on_log(args, state, control, logs=logs, **kwargs)

    def _write(self, step: int, part: int) -> None:
        """`part` counts from 0 to PICTURES in the course of the run."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        # One record takes a tenth of the time that `add_scalar` takes for each point.
        points = [
            Summary.Value(tag=f"{GROUP}/{name}/layer_{number:02}", simple_value=value)
            for name, curve in self.load.curves.items()
            for number, value in zip(self.load.layers, curve, strict=True)
        ]
        self.tb_writer.file_writer.add_summary(Summary(value=points), step)
        if part > self._pictured:
            self._pictured = part
            image = load_image(self.load.picks, self.load.layers)
            self.tb_writer.add_image(f"{GROUP}/load", image, step, dataformats="HWC")
