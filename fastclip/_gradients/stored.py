"""Views of one tensor of any layout, in the form that the ops take."""

import torch
from torch import Tensor

from .._ops import is_fake
from .._private import attribute, private

_is_traceable = private("torch.utils._python_dispatch.is_traceable_wrapper_subclass")
_neg_view = private("torch._neg_view")


def held(tensor: Tensor) -> Tensor:
    """Return the strided tensor in which the elements are stored."""
    if tensor.is_sparse:
        values: Tensor = attribute(tensor, "_values")()
        return values
    return tensor.values() if tensor.layout == torch.jagged else tensor


def indices_of(tensor: Tensor) -> Tensor:
    """Return the indices of a sparse tensor, coalesced or not."""
    indices: Tensor = attribute(tensor, "_indices")()
    return indices


def as_measured(tensor: Tensor, p: float, rows: bool = False) -> Tensor:
    """Return the tensor that an op measures; for an opaque tensor (see `is_opaque`), its norms.

    Raises:
        TypeError: `rows` is true and the tensor is not stored row by row.
    """
    _check_rows(tensor, rows)
    tensor = held(tensor.coalesce() if tensor.is_sparse else tensor)
    if is_opaque(tensor):
        if not rows or tensor.dim() < 2:
            norm: Tensor = torch.linalg.vector_norm(tensor, p)
            return norm
        norms: Tensor = torch.linalg.vector_norm(tensor, p, dim=tuple(range(1, tensor.dim())))
        return norms.reshape(-1, 1)
    if not tensor.is_complex() or p == 2:
        return as_real(tensor, rows)
    # The magnitude of a complex32 may overflow float16, even if both of its parts fit.
    return (tensor.to(torch.complex64) if tensor.dtype == torch.complex32 else tensor).abs()


def as_clamped(tensor: Tensor) -> Tensor:
    """Return the tensor that an op clamps in place.

    Raises:
        TypeError: the tensor is complex.
    """
    if tensor.is_complex():
        raise TypeError(
            "parameters: complex numbers have no order to clip gradients by value; clip by norm"
        )
    if tensor.is_sparse and not tensor.is_coalesced():
        tensor.copy_(tensor.coalesce())
    return as_real(held(tensor))


def as_real(tensor: Tensor, rows: bool = False) -> Tensor:
    """Return a view of the stored real numbers.

    For a lazy conjugate or negative it shows the signs as stored; magnitudes are the same.
    """
    if tensor.is_complex():
        real = torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)
        real = _neg_view(real) if _is_negated(real) else real
        return real[None] if rows and tensor.dim() < 2 else real
    return _neg_view(tensor) if _is_negated(tensor) else tensor


def _check_rows(tensor: Tensor, rows: bool) -> None:
    """Raise if slicing the stored values along dimension 0 does not give the rows of `tensor`."""
    by_row = tensor.is_sparse and (tensor.dim() < 2 or tensor.sparse_dim() == 1)
    if rows and tensor.layout != torch.strided and not by_row:
        raise TypeError(
            f"parameters: a gradient of layout {tensor.layout} and shape {tuple(tensor.shape)} is "
            "not stored by rows; make it dense, or clip its parameter with clip_grad_norms_"
        )


def is_opaque(tensor: Tensor) -> bool:
    """Return whether only the tensor's own `__torch_dispatch__` can read its elements. Fake tensors
    in a graph are not opaque."""
    if torch.compiler.is_compiling():
        return bool(_is_traceable(tensor))
    if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
        return False
    return not is_fake(tensor)


def _is_negated(tensor: Tensor) -> bool:
    """Return whether the signs are lazily flipped; in a graph always False: no check is needed."""
    return not torch.compiler.is_compiling() and tensor.is_neg()
