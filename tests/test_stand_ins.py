"""What stands in for ranks in one process: fake groups under FakeTensorMode, and threads.

Each runs in a process of its own, for neither leaves the default group as it found it.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

FAKE = """
import torch, torch.distributed as dist, fastclip
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
mesh = dist.init_device_mesh("cpu", (2, 4), mesh_dim_names=("replicate", "shard"))

def scaled(weights):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    return scaler
"""

EACH = """
with FakeTensorMode():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    fully_shard(model, mesh=mesh)
    model(torch.randn(2, 8)).sum().backward()
    weights = list(model.parameters())
    total_norm = {call}
for result in total_norm if isinstance(total_norm, tuple) else (total_norm,):
    if result is not None:
        inner = result.to_local() if isinstance(result, DTensor) else result
        assert isinstance(inner, FakeTensor) and inner.dtype == torch.float32, inner
assert all(isinstance(w.grad.to_local(), FakeTensor) for w in weights)
"""

CALLS = [
    "fastclip.clip_grad_norm_(weights, 1.0)",
    "fastclip.clip_grad_norm_(weights, 1.0, float('inf'))",
    "fastclip.clip_grad_norm_(weights, 1.0, 3.0)",
    "fastclip.clip_grad_norm_(weights, 1.0, process_group=dist.group.WORLD)",
    "fastclip.clip_grad_norm_(weights, 1.0, process_group=mesh)",
    "fastclip.clip_grad_norm_(weights, 1.0, nonfinite='keep')",
    "fastclip.get_total_norm([w.grad for w in weights])",
    "fastclip.clip_grads_with_norm_(weights, 1.0, fastclip.get_total_norm([weights[0].grad]))",
    "fastclip.clip_grad_norms_(weights, 1.0)",
    "fastclip.clip_grad_agc_(weights)",
    "fastclip.clip_grad_value_(weights, 1.0)",
    "fastclip.normalize_grad_(weights)",
    "fastclip.NormAccumulator(model).clip_(1.0)",
    "fastclip.GradClipper(model, 1.0).clip_()",
    "fastclip.clipped_step(torch.optim.AdamW(weights, fused=True), 1.0)",
    "fastclip.clipped_step(torch.optim.AdamW(weights, fused=True), 1.0, scaled(weights))",
    "fastclip.unscale_and_clip_(torch.optim.AdamW(weights), 1.0, scaled(weights))",
    "fastclip.GradClipper(groups=[dict(params=w, max_norm=1.0) for w in weights]).clip_()",
]

THREADS = """
import threading, torch, torch.distributed as dist, fastclip
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed import multi_threaded_pg

torch._C._distributed_c10d._set_thread_isolation_mode(True)
multi_threaded_pg._install_threaded_pg()
store, found = dist.HashStore(), {}

def work(rank):
    dist.init_process_group("threaded", rank=rank, world_size=2, store=store)
    mesh = dist.init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
    weight.grad = distribute_tensor(torch.tensor([1.0, 2.0, 2.0, 4.0]), mesh, [Shard(0)])
    plain = nn.Parameter(torch.zeros(1))
    plain.grad = torch.full((1,), 3.0 + rank)
    found[rank] = [
        fastclip.clip_grad_norm_([weight], float("inf"), p).full_tensor().item()
        for p in (1.0, 2.0, 3.0, float("inf"))
    ] + [fastclip.clip_grad_norm_([plain], float("inf"), process_group=dist.group.WORLD).item()]

threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(30)
expected = torch.tensor([9.0, 5.0, 81 ** (1 / 3), 4.0, 5.0])
for rank in range(2):
    torch.testing.assert_close(torch.tensor(found[rank]), expected)
"""


def run(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr


def test_gradients_without_data_on_ranks_that_are_not_there_are_clipped():
    run(FAKE + "".join(EACH.replace("{call}", call) for call in CALLS))


def test_groups_written_in_python_add_up():
    run(THREADS)
