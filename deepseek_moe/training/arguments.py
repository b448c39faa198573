"""The settings of a fine-tuning run and their defaults. options.py says which work together.

`finetune/finetune_options.py` reads them from a command line and says what each of them means.
"""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from ..bundled import BUNDLED_MODEL
from .compute.varlen_attention import VARLEN

STEP_IN_BACKWARD = "adamw_8bit_in_backward"
"""The optimizer of --single_gpu_full, named as transformers names its own."""
ALL_LINEARS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@dataclass
class ModelArguments:
    """What trains, over which base."""

    model_name_or_path: str = str(BUNDLED_MODEL)
    attn_implementation: str = "auto"
    cache_dir: str | None = None
    use_lora: bool = False
    adapter: str | None = None
    trainable: str | None = None
    lora_rank: int = 8
    lora_alpha: float = 32.0
    lora_dropout: float = 0.1
    modules_to_save: str = ""
    bits: int = 16
    quant_type: str = "nf4"
    double_quant: bool = True
    offload_experts: bool = False
    recompute_experts: bool = False
    merge_on_save: bool = False
    train_experts: str | None = None
    expert_score: str | None = None
    expert_threshold: float | None = None
    expert_share: float | None = None
    save_delta: bool = False
    chosen_experts: dict[int, list[int]] | None = None
    """The routed experts that train, by layer; None if none were chosen. `take_choice` sets it."""

    @property
    def train_chosen_whole(self) -> bool:
        """Whether the full weights of chosen experts train, rather than adapters on them."""
        return bool(self.chosen_experts) and not self.use_lora

    def attention(self, dtype: torch.dtype) -> str:
        """The attention implementation for weights of `dtype`."""
        if self.attn_implementation != "auto":
            return self.attn_implementation
        return VARLEN if torch.cuda.is_available() and dtype == torch.bfloat16 else "sdpa"


@dataclass
class DataArguments:
    """The rows, and what a run shows before it trains on them."""

    data_path: list[str] = field(default_factory=list)
    eval_data_path: list[str] = field(default_factory=list)
    eval_fraction: float = 0.0
    model_max_length: int = 512
    packing: bool = False
    skip_bad_rows: bool = False
    columns: str = ""
    show_examples: int = 0
    dry_run: bool = False


@dataclass
class FineTuningArguments(TrainingArguments):
    """transformers' arguments with defaults of our own."""

    logging_steps: float = 1
    report_to: str = "tensorboard"
    logging_nan_inf_filter: bool = False  # It would log NaN as a number.
    train_sampling_strategy: str = "group_by_length"
    remove_unused_columns: bool = False  # The collator takes what it needs.
    label_names: list[str] = field(default_factory=lambda: ["labels"])
    single_gpu_full: bool | None = None
    """All weights on one GPU, stepped in the backward pass. None: if no other setting is against
    it; `make_arguments` replaces None by True or False."""
    cuda_graphs: bool = True
    """Whether small batches of adapters are replayed (compute/replayed_model.py)."""

    @property
    def n_gpu(self) -> int:
        """At most one for each process. For more, transformers would take torch's DataParallel,
        which this code does not run under."""
        return min(1, super().n_gpu)

    @property
    def keeps_fp32(self) -> bool:
        """Whether the model itself keeps the weights that train in fp32."""
        return not (self.deepspeed or self.single_gpu_full)

    @property
    def number_bytes(self) -> int:
        """Bytes of a number that is computed with."""
        return 2 if self.bf16 else 4


Arguments = tuple[ModelArguments, DataArguments, FineTuningArguments]


def optimizer_name(training: FineTuningArguments) -> str:
    """As --optim has it, or that of --single_gpu_full."""
    return str(getattr(training.optim, "value", training.optim))


def split_commas(text: str | None) -> list[str]:
    """The words between commas, without spaces and empty ones."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]
