"""Mixed precision with gradient accumulation: the norm is measured during the last backward."""

import torch

import fastclip

MICRO_BATCHES = 4

model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
scaler = torch.amp.GradScaler("cpu")
norms = fastclip.NormAccumulator(optimizer)


def backward(batch: torch.Tensor) -> None:
    with torch.autocast("cpu"):
        loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean() / MICRO_BATCHES
    scaler.scale(loss).backward()


for step in range(20):
    optimizer.zero_grad()
    batches = torch.randn(MICRO_BATCHES, 16, 8)
    with norms.pause():
        for batch in batches[:-1]:
            backward(batch)
    backward(batches[-1])
    # Unscales, clips and steps; a norm that is not finite skips the step.
    total_norm = fastclip.clipped_step(optimizer, 1.0, scaler, measured=norms)
    scaler.update()
    if step % 10 == 0:
        print(f"step {step}: gradient norm {total_norm.item():.3f}")
