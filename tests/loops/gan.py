"""A GAN: each net has a clip of its own, right after its own backward."""

import torch

import fastclip

generator, critic = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-2)
critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)

for _ in range(20):
    real, noise = torch.randn(16, 2) + 3, torch.randn(16, 2)

    critic_optimizer.zero_grad()
    (critic(generator(noise).detach()).mean() - critic(real).mean()).backward()
    fastclip.clip_grad_value_(critic.parameters(), clip_value=0.1)
    critic_optimizer.step()

    generator_optimizer.zero_grad()
    (-critic(generator(noise)).mean()).backward()
    norm = fastclip.clip_grad_norm_(generator.parameters(), max_norm=1.0)
    generator_optimizer.step()

print(f"last gradient norm of the generator: {norm.item():.3f}")
