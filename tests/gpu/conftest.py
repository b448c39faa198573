"""Where the tests of this folder run.

Each test that takes `device` is two: one on the GPU (`-m gpu`), and one on the CPU with small sizes
(`-m slow`), which tries the test itself in the first of its cases.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        devices = [
            pytest.param("cuda", marks=pytest.mark.gpu),
            pytest.param("cpu", marks=pytest.mark.slow),
        ]
        metafunc.parametrize("device", devices, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out all but the first case of each test on a CPU."""
    first, left_out = {}, []
    for item in items:
        on_cpu = item.path.parent == HERE and "[cpu" in item.name
        if on_cpu and first.setdefault((item.path, item.originalname), item) is not item:
            left_out.append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU was found")
    yield torch.device(request.param)
    if request.param == "cuda":
        torch.cuda.synchronize()  # An error on the GPU is this test's, not the next one's.
        torch.cuda.empty_cache()  # Other processes share the memory.


@pytest.fixture
def dtype(device: torch.device) -> str:
    return "bfloat16" if device.type == "cuda" else "float32"


@pytest.fixture
def new_tokens(device: torch.device) -> int:
    """The length of each generation: long enough for steps to be captured in graphs."""
    return 64 if device.type == "cuda" else 6
