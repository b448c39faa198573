"""Which optimizer a run has."""

from typing import Any

from torch import nn
from transformers import Trainer

from ..errors import as_user_error
from .arguments import FineTuningArguments, optimizer_name
from .compute.adamw_in_backward import StepInBackward


def optimizer_of(
    args: FineTuningArguments, model: nn.Module | None = None
) -> tuple[Any, dict[str, Any]]:
    """The class, and its options beside the parameters.

    Raises:
        UserError: the optimizer that --optim names cannot be made.
    """
    if args.single_gpu_full:
        betas = (args.adam_beta1, args.adam_beta2)
        options = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
        return StepInBackward, options | {"seed": args.seed}
    name = optimizer_name(args)
    with as_user_error(f"--optim {name} cannot be made", "choose another"):
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if name in ("adamw_bnb_8bit", "adamw_8bit") and not args.deepspeed:
        from .compute.bitsandbytes_adamw import UnwaitingAdamW as kind
    return kind, options
