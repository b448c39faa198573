"""The extensions of torch that tests compile: a killed compilation does not block the next one."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import compile_extensions

AS_TORCH_DOES = """
import os, sys, time
from pathlib import Path
from torch.utils.file_baton import FileBaton
folder = Path(os.environ["TORCH_EXTENSIONS_DIR"], "shm")
folder.mkdir(exist_ok=True)
baton = FileBaton(str(folder / "lock"))
if not baton.try_acquire():
    baton.wait()
    raise SystemExit("somebody else compiled at the same time")
{then}
(folder / "shm.so").write_text("compiled")
baton.release()
"""


def test_a_compilation_that_was_killed_does_not_block_the_next(tmp_path: Path) -> None:
    killed = AS_TORCH_DOES.format(then="os.kill(os.getpid(), 9)")
    with pytest.raises(subprocess.CalledProcessError):
        compile_extensions(tmp_path, killed)
    assert (tmp_path / "shm" / "lock").is_file()
    whole = AS_TORCH_DOES.format(then="time.sleep(0.5)")
    with ThreadPoolExecutor() as pool:  # Two at once wait for each other.
        both = [pool.submit(compile_extensions, tmp_path, whole, 60) for _ in range(2)]
        for one in both:
            one.result()
    assert (tmp_path / "shm" / "shm.so").read_text() == "compiled"
    assert not (tmp_path / "shm" / "lock").exists()
