"""The tensors that rules and records keep between steps: saved, loaded, copied and pickled."""

import io
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ._ops import refuse_transforms, widest

CPU = torch.device("cpu")


def put(place: Tensor, value: Tensor) -> None:
    """Copy a 0-d tensor into another one."""
    # Copied as views of one element, because in compiled code torch 2.13 (not 2.14) loses writes to
    # a 0-d float64 tensor on the CPU.
    place.view(1).copy_(value.view(1))


class State:
    """Tensors of fixed names and shapes, on the device of the latest norm.

    They are on the CPU at first, in copies and in saved states: there any process can load them,
    and no process writes into the memory of another one.
    """

    # Tensors made in inference mode could not be changed in place outside of it.
    @torch.inference_mode(False)
    def __init__(self) -> None:
        self._device = CPU
        self._places = {CPU: self._start()}

    @property
    def _here(self) -> dict[str, Tensor]:
        return self._places[self._device]

    def _start(self) -> dict[str, Tensor]:
        """The tensors before the first step, on the CPU."""
        raise NotImplementedError

    def _on(self, device: torch.device) -> Iterable[Tensor]:
        """Move the tensors to a device if needed; return them in the order of `_start`."""
        refuse_transforms(type(self).__name__)
        if device != self._device:
            self._move(device)
        return self._here.values()

    @torch.inference_mode(False)
    def _move(self, device: torch.device) -> None:
        before = self._here
        # A captured CUDA graph goes on using its tensors, so those on accelerators are kept.
        self._places = {d: tensors for d, tensors in self._places.items() if d.type != "cpu"}
        if device not in self._places:
            narrow = {torch.float64: widest(device)}
            made = {
                name: torch.empty_like(value, dtype=narrow.get(value.dtype), device=device)
                for name, value in before.items()
            }
            self._places[device] = made
        self._device = device
        for name, value in self._here.items():
            value.copy_(before[name])

    def describe(self) -> str:
        """Return class, arguments and step counts as text; waits for the device."""
        arguments = {
            name: value.describe() if isinstance(value, State) else value
            for name, value in vars(self).items()
            if name[0] != "_"
        }
        counts = {n: v.tolist() for n, v in self._here.items() if not v.is_floating_point()}
        return f"{type(self).__name__} of {arguments} at {counts}"

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies on the CPU, always of the same names and shapes; waits for the device."""
        return {name: value.to(CPU, copy=True) for name, value in self._here.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the `state_dict()` of an object made with the same arguments.

        Raises:
            ValueError: the names or shapes of the tensors differ from those of this object.
        """
        if _shapes(state) != _shapes(self._here):
            raise ValueError(
                f"state: expected what state_dict of this {type(self).__name__} returns, of shapes "
                f"{_shapes(self._here)}, got {_shapes(state)}; make it with the arguments of the "
                "saved one"
            )
        for name, value in self._here.items():
            value.copy_(state[name])

    # Pickled as bytes, because multiprocessing would share the memory of a tensor.
    def __getstate__(self) -> dict[str, Any]:
        file = io.BytesIO()
        torch.save(State.state_dict(self), file)
        return {**vars(self), "_device": CPU, "_places": file.getvalue()}

    @torch.inference_mode(False)
    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._places = {CPU: torch.load(io.BytesIO(state["_places"]), weights_only=True)}


class Shared(tuple[Any, ...]):
    """A tuple of process groups: a deep copy shares them, and it can be pickled only if empty."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shared":
        return self

    def __reduce__(self) -> Any:
        if self:
            raise TypeError(
                "process_group: a process group cannot be pickled; make a GradClipper in the other "
                "process and have it load state_dict() of this one"
            )
        return Shared, ()


def _shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
    return {n: tuple(v.shape) if isinstance(v, Tensor) else None for n, v in state.items()}
