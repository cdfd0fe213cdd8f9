"""The switch between compiled kernels and plain PyTorch."""

from . import _ops


def use_kernels(enabled: bool) -> None:
    """Let the compiled kernels serve this process, or the plain-PyTorch ops in their place.

    The plain ops run on every device and give the same norms within 1e-6, slower: with them you see
    whether a kernel is at fault. FASTCLIP_KERNELS=0 in the environment does the same from the start
    on, and loads nothing that was compiled. All ranks of a model must use the same, or their copies
    of it drift apart by rounding. Call this between steps.

    Args:
        enabled: whether kernels serve, where they are built.

    Raises:
        RuntimeError: kernels are asked for, and none were loaded.

    Reference: `torch.backends.mkldnn.set_flags`.

    >>> use_kernels(False)  # and True again
    """
    if _ops.extension is not None:
        _ops.extension.use_kernels(bool(enabled))
    elif enabled:
        why = _ops.turned_off() or f"none are built; in a checkout: {_ops.REBUILD}"
        raise RuntimeError(f"use_kernels: no kernels were loaded: {why}")
