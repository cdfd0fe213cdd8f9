"""Groups with norms of their own, adaptive clipping but for the last layer, and norms in a log."""

import torch

import fastclip

model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
trunk, head = model[0], model[2]
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
clipper = fastclip.GradClipper(
    groups=[
        {"params": trunk, "max_norm": fastclip.AutoClip(percentile=90), "name": "trunk"},
        {"params": head, "max_norm": 1.0, "name": "head"},
    ],
    each=True,
)

for step in range(100):
    optimizer.zero_grad()
    batch = torch.randn(16, 8)
    (model(batch) - batch.sum(1, keepdim=True)).square().mean().backward()
    norms = clipper.clip_()  # one for each group
    # Afterwards, for the rule to see the norms as they were. The paper leaves the last layer out.
    fastclip.clip_grad_agc_(trunk.parameters(), clip_factor=0.1)
    optimizer.step()
    if step == 50:
        clipper.max_norm["head"] = 0.5
    if step % 50 == 0:
        # Both wait for the device, so not at every step. With TensorBoard:
        # writer.add_scalars("grad_norm", clipper.norms_by_parameter(), step)
        print(step, clipper.norms_by_parameter())
        print(step, norms.tolist(), clipper.last()["trunk"])
