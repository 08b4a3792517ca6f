"""Real errors of a GPU, and their classification. Run with `pytest -m gpu tests/gpu`.

Each runs in its own process, because an error of the device ends the process's context. The error
is printed (`-rP`), as a case for the classification table.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

ROOT = Path(__file__).parents[2]

OUT_OF_MEMORY = "torch.empty(2**50, dtype=torch.uint8, device='cuda')"
DEVICE_ASSERT = """
weights = torch.ones(33, 4, device='cuda')
torch.nn.functional.embedding(torch.tensor([10**6], device='cuda'), weights)
torch.cuda.synchronize()
"""
TOKEN_BEYOND_THE_ALPHABET = """
from vnp_lib.inference.executor import BatchExecutor
from vnp_lib.model.weights import Weights, load_model
from vnp_lib.inference.token_budget import TokenBudget
from vnp_lib.model.tokens import pack_batch

device, weights = torch.device("cuda"), Weights.random("esm2_t6_8M_UR50D")
model = load_model(weights, dtype=torch.bfloat16, device=device)
batch = pack_batch(["MKV", "ACD"], ["a", "b"], [0, 1], batch_idx=7)
batch.input_ids[2] = 10**6
executor = BatchExecutor(model, device, budget=TokenBudget())
executor.collect(executor.launch(batch))
"""
ILLEGAL_ADDRESS = """
import triton
import triton.language as tl

@triton.jit
def write_far_away(pointer):
    tl.store(pointer + (1 << 40), 1.0)

write_far_away[(1,)](torch.ones(1, device='cuda'))
torch.cuda.synchronize()
"""
HARNESS = """
import torch

{code}
"""
CATCHING = """
import runpy
import sys
from vnp_lib.failures import classify_exception
import json

try:
    runpy.run_path(sys.argv[1])
except Exception as error:
    arrived = {
        "type": type(error).__name__,
        "code": getattr(error, "error_code", None),
        "message": str(error)[:300],
    }
    print(json.dumps({"arrived": arrived, "failure": classify_exception(error).to_json()}))
"""


@pytest.mark.parametrize(
    ("code", "kind", "cause", "batch_idx"),
    [
        pytest.param(OUT_OF_MEMORY, "oom", "gpu_oom", None, id="out of memory"),
        pytest.param(DEVICE_ASSERT, None, "device_assert", None, id="device assert"),
        pytest.param(ILLEGAL_ADDRESS, None, "illegal_address", None, id="illegal address"),
        pytest.param(
            TOKEN_BEYOND_THE_ALPHABET,
            "poison_input",
            "device_assert",
            7,
            id="device assert in a batch",
        ),
    ],
)
def test_what_a_gpu_says_is_understood(tmp_path, code, kind, cause, batch_idx):
    script = tmp_path / "script.py"
    script.write_text(HARNESS.format(code=code))
    ended = subprocess.run(
        [sys.executable, "-c", CATCHING, str(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.stdout.strip(), ended.stderr
    outcome = json.loads(ended.stdout.strip().splitlines()[-1])
    print(json.dumps(outcome["arrived"]))
    assert (outcome["failure"]["cause"], outcome["failure"]["batch_idx"]) == (cause, batch_idx)
    if kind is not None:
        assert outcome["failure"]["kind"] == kind
