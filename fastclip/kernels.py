"""The switch between compiled kernels and plain PyTorch."""

from . import _ops


def use_kernels(enabled: bool) -> None:
    """Use the compiled kernels in this process, or the plain-PyTorch ops instead.

    The plain ops run on every device, slower, and give the same norms within 1e-6: use them to find
    out whether a kernel is at fault. With FASTCLIP_KERNELS=0 in the environment they are used from
    the start, and the extension is not loaded. All ranks of a model must make the same choice;
    otherwise rounding makes their copies of the model drift apart. Call this between steps.

    Args:
        enabled: whether to use the kernels, where they are built.

    Raises:
        RuntimeError: kernels are asked for, and none were loaded.

    Reference: `torch.backends.mkldnn.set_flags`.

    >>> use_kernels(False)  # until use_kernels(True)
    """
    if _ops.extension is not None:
        _ops.extension.use_kernels(bool(enabled))
    elif enabled:
        why = _ops.turned_off() or f"none are built; in a checkout: {_ops.REBUILD}"
        raise RuntimeError(f"use_kernels: no kernels were loaded: {why}")
