"""How much memory is free, on a GPU or a host."""

import psutil
import torch


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on `device`.

    On a GPU that is what is free there, with what PyTorch has taken and not used. If PyTorch's
    memory is capped (`torch.cuda.set_per_process_memory_fraction`), it is no more than the rest of
    that.
    """
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    cap = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return min(free + torch.cuda.memory_reserved(device), cap) - used
