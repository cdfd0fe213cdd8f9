"""FSDP2 with a rule, saved and resumed: `torchrun --nproc-per-node 2 fsdp2_resume.py`."""

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import fastclip

dist.init_process_group("gloo")
mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))


def build() -> tuple[torch.nn.Module, torch.optim.Optimizer, fastclip.GradClipper]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, fastclip.GradClipper(model, fastclip.AutoClip(percentile=50))


def train(model, optimizer, clipper, steps: int) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        batch = torch.randn(16, 8)
        (model(batch) - batch.sum(1, keepdim=True)).square().mean().backward()
        # The norm of the full gradients, the same on every rank.
        total_norm = clipper.clip_()
        optimizer.step()
    return total_norm.item()


def state_of(model, optimizer, clipper) -> dict:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "clipper": clipper.state_dict()}


# All ranks write into one folder.
folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
first = build()
train(*first, steps=10)
dcp.save(state_of(*first), checkpoint_id=folder[0])
torch.manual_seed(dist.get_rank())
went_on = train(*first, steps=5)

second = build()
state = state_of(*second)
dcp.load(state, checkpoint_id=folder[0])
set_state_dict(*second[:2], model_state_dict=state["model"], optim_state_dict=state["optimizer"])
second[2].load_state_dict(state["clipper"])
torch.manual_seed(dist.get_rank())
resumed = train(*second, steps=5)
print(f"gradient norm after 5 more steps: {went_on:.6f}, resumed: {resumed:.6f}")
assert went_on == resumed
dist.destroy_process_group()
