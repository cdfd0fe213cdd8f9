"""Spikes and NaN: such a step is not taken, and ten of them in a row end the training."""

import torch

import fastclip

torch.manual_seed(0)
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
clipper = fastclip.GradClipper(
    model, max_norm=fastclip.DropSpikes(max_norm=1.0, warmup_steps=10), nonfinite="keep"
)
bad_in_a_row = skipped = 0

for step in range(60):
    optimizer.zero_grad()
    batch = torch.randn(16, 8)
    batch[0] *= {30: 1e4, 31: float("nan")}.get(step, 1.0)
    (model(batch) - batch.sum(1, keepdim=True)).square().mean().backward()
    total_norm = clipper.clip_()
    # Waits for the device at every step; clipped_step skips without a wait.
    if clipper.last()["dropped"] or not total_norm.isfinite():
        print(f"step {step} is not taken: {fastclip.find_nonfinite(model) or 'a spike'}")
        bad_in_a_row, skipped = bad_in_a_row + 1, skipped + 1
        if bad_in_a_row == 10:
            raise SystemExit("ten steps in a row could not be taken")
        continue
    bad_in_a_row = 0
    optimizer.step()

print(f"{skipped} steps were skipped")
