"""bitsandbytes' AdamW without a wait for the GPU after each tensor: a model with adapters has 500.

transformers looks for "bitsandbytes" in the full name of the class (`create_optimizer`, line 1328
of 5.24's trainer.py), and then lets the averages of embeddings keep 32 bits. So the name of this
module has to contain it; a test in tests/training/test_trainer.py holds that.
"""

from typing import Any

import torch
from bitsandbytes.optim import AdamW


class UnwaitingAdamW(AdamW):
    """The same steps, bit for bit. Its states must not be paged: paging needs the waits."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Takes a step; `closure` is not called."""
        if not self.initialized:
            torch.cuda.empty_cache()  # States stay: they should not lie among freed activations.
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for group_number, group in enumerate(self.param_groups):
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter, group_number, number)
                self.update_step(group, parameter, group_number, number)
