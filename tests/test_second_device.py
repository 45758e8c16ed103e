"""What the commands for a GPU do, on a device that is not the CPU: no test has a GPU, and a mistake there ends a run of hours."""

import json
import subprocess
from pathlib import Path

import pytest
import torch.utils.backend_registration
from helpers import unmeasured

pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 13) or not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch lets nobody add a device from Python, or otherwise than 2.13",
)
PROGRAM = Path(__file__).parent / "on_second_device.py"
BODIES = ("trained_kept_and_looked_at", "llamas", "workers", "healed_and_compressed", "images", "generation", "timed")
CONTROLS = {
    "read_by_numpy": "TypeError: can't convert pretended:0 device type tensor to numpy",
    "mixed": "RuntimeError: aten.index_select.default: expected all tensors on the same device; index",
    "of_another_generator": "expected a generator of pretended, not of cpu",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory, warm):
    """By body the error that it ended with; in a process of its own, which keeps the device."""
    folder = tmp_path_factory.mktemp("there")
    environment = {**unmeasured(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([warm.python, str(PROGRAM), str(folder)], env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    said = json.loads((folder / "said.json").read_text(encoding="utf-8"))
    assert set(said) == {*BODIES, *CONTROLS}
    return said


@pytest.mark.parametrize("body", BODIES)
def test_it_runs_on_a_device_that_is_not_the_cpu(said, body):
    assert not said[body], said[body]


@pytest.mark.parametrize("body", CONTROLS)
def test_what_mixes_devices_ends_as_on_a_gpu(said, body):
    assert CONTROLS[body] in said[body]
