"""Clipping each tensor, or each slice of it, by its own norm; scaling all to a given norm."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ._arguments import NormType, at_least_zero, order, thresholds
from ._gradients import aligned, as_list, each_norms_of, present, read, take_weights
from ._ops import clip_coef
from ._ranks import Kind


def clip_grad_norms_(
    parameters: Tensor | Iterable[Tensor], max_norm: float | Tensor, norm_type: NormType = 2.0
) -> Tensor:
    """Scale each gradient in place so that its own norm is at most `max_norm`.

    Each is multiplied by min(1, max_norm / (norm + 1e-6)) with its own norm; nothing is written
    where this factor is 1. At most two passes over all tensors together, no wait for the device,
    the same bits on every call.

    Args:
        parameters: tensors whose `.grad` is clipped, as in `clip_grad_norm_`; a DTensor's norm is
            that of the full gradient. Pass DTensors in the same order on every rank.
        max_norm: threshold, >= 0, a number or a 0-d tensor, the same for all; or a 1-d tensor, one
            for each of the n `parameters`, on any device.
        norm_type: order p of the norms, any number or `'inf'`.

    Returns:
        The n norms before clipping, 1-d, in the order of the n `parameters`: float64 if any
        gradient is, else float32; 0 if it has no gradient or repeats an earlier parameter.

    Raises:
        TypeError, ValueError, RuntimeError: bad input, which the message names; gradients are
            untouched.

    Reference: `tf.clip_by_norm`, Keras `clipnorm`. With one threshold per tensor: AdaGC
        (arXiv:2502.11034), `optax.clip_by_block_rms` (`max_norm` is its threshold times the square
        root of the number of elements).

    >>> a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    >>> a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.6, 0.0])
    >>> clip_grad_norms_([a, b], max_norm=1.0), a.grad
    (tensor([5.0000, 0.6000]), tensor([0.6000, 0.8000]))
    """
    items, p = as_list(parameters, "parameters"), order(norm_type)
    limits = thresholds(max_norm, len(items))
    grads = read(items, kind=Kind.EACH)
    norms = grads.each_norms(p)
    if isinstance(limits, Tensor) and limits.dim() and len(norms) < len(items):
        limits = limits[present(norms, items)]
    grads.scale_each_(clip_coef(norms, limits, grads.is_wide()))
    return aligned(grads.result(norms), items)


def clip_grad_agc_(
    parameters: Tensor | Iterable[Tensor], clip_factor: float = 0.01, eps: float = 1e-3
) -> None:
    """Scale each unit's gradient in place to at most `clip_factor` times the norm of its weights.

    Adaptive gradient clipping: a gradient g with weights w is scaled to the norm
    clip_factor * max(||w||, eps) if its norm is larger. A unit is a slice along the first
    dimension (an output of a linear or convolution weight), or all of a tensor with fewer than two
    dimensions (bias, gain). One read of weights and gradients, one write of clipped units, no
    wait for the device.

    Args:
        parameters: weights with a `.grad`, of any shapes, floating dtypes, devices and meshes. Pass
            DTensors in the same order on every rank. Brock et al. leave out the last linear layer.
        clip_factor: >= 0, the lambda of Brock et al.
        eps: >= 0; weights with a smaller norm (0, if they start as zeros) count as having norm eps.

    Raises:
        TypeError, ValueError, RuntimeError: bad input, which the message names; gradients are
            untouched.

    Reference: Brock et al. 2021, arXiv:2102.06171; `timm.utils.adaptive_clip_grad`;
        `optax.adaptive_grad_clip`, which takes other units for weights of shape (out, 1) and of
        three dimensions.

    >>> w = torch.nn.Parameter(torch.eye(2)); w.grad = torch.tensor([[3.0, 4.0], [0.0, 0.1]])
    >>> clip_grad_agc_([w], clip_factor=0.5); w.grad
    tensor([[0.3000, 0.4000],
            [0.0000, 0.1000]])
    """
    clip_factor, eps = at_least_zero("clip_factor", clip_factor), at_least_zero("eps", eps)
    items = as_list(parameters, "parameters")
    grads = read(items, kind=Kind.ROWS)
    weights, norms = each_norms_of([take_weights(items), grads], 2.0, rows=True)
    most = torch.finfo(norms.dtype).max
    limits = weights.clamp(min=min(eps, most)) * min(clip_factor, most)
    # The comparison is false for infinite and NaN norms: those gradients are scaled too.
    coefs = (limits / norms).masked_fill(norms <= limits, 1)
    grads.scale_each_(coefs, rows=True)


def normalize_grad_(parameters: Tensor | Iterable[Tensor], norm: float = 1.0) -> Tensor:
    """Scale the gradients in place, up or down, so that their global norm is `norm`.

    If all gradients are 0, they stay 0. One read and one write, no wait for the device.

    Args:
        parameters: tensors whose `.grad` is scaled, as in `clip_grad_norm_`.
        norm: the norm after scaling, >= 0 and finite.

    Returns:
        The norm before scaling, 0-d, as `clip_grad_norm_` returns it.

    Raises:
        TypeError, ValueError, RuntimeError: bad input, which the message names; gradients are
            untouched.

    Reference: Hazan et al. 2015, arXiv:1507.02030; `optax.normalize_by_update_norm`.

    >>> w = torch.nn.Parameter(torch.zeros(2)); w.grad = torch.tensor([0.3, 0.4])
    >>> normalize_grad_([w]), w.grad
    (tensor(0.5000), tensor([0.6000, 0.8000]))
    """
    wanted = at_least_zero("norm", norm)
    if wanted == math.inf:
        raise ValueError("norm: expected a finite number, got inf")
    grads = read(parameters)
    total_norm = grads.norm(2.0)
    dtype = torch.float64 if grads.is_wide() else torch.float32
    # For a subnormal norm, the quotient exceeds the largest number of the dtype.
    coef = (wanted / total_norm).clamp(max=torch.finfo(dtype).max).to(dtype)
    grads.scale_(coef.masked_fill(total_norm == 0, 1))
    return grads.result(total_norm)
