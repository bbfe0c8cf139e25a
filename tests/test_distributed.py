"""Models that two processes share, with gloo on the CPU: each process says what a model that it has alone says.

Elsewhere: `benchmarks.ppl` by `accelerate launch` (test_ppl.py), layers on several devices by `device_map` (test_environments.py,
and on GPUs two_gpus.py).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from .oracle import relative_error
from .test_exact import TOLERANCE
from .two_processes import WAYS, what_is_said

ROOT = Path(__file__).parents[1]
LAUNCH = "-m torch.distributed.run --standalone --nproc-per-node 2 -m tests.two_processes"


@pytest.fixture(scope="module")
def outcomes(llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both processes wrote."""
    folder = tmp_path_factory.mktemp("distributed")
    llama.save_pretrained(folder / "model")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *LAUNCH.split(), folder / "model", folder]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("way", WAYS)
def test_a_shared_model_says_what_a_whole_one_says(llama: PreTrainedModel, outcomes: Path, way: str, rank: int) -> None:
    outcome = torch.load(outcomes / f"{way}-{rank}.pt")
    assert 0.4 < outcome["weights"] / llama.num_parameters() <= 0.5  # norms are whole
    assert outcome["heads"] == (1 if way == "tensor-parallel" else 2)  # of keys: a cache, too, holds its share of heads
    expected = what_is_said(llama, text=rank if way == "fully-sharded" else 0)
    assert outcome["said"].keys() == expected.keys()
    for name, said in outcome["said"].items():
        if said.is_floating_point():
            assert relative_error(said, expected[name]) <= TOLERANCE, name
        else:
            assert torch.equal(said, expected[name]), name
    assert outcome["error"] < 1e-4
