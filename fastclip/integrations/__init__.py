"""One file for each framework: functions that `fastclip.patch()` replaces, or a callback to import.

`megatron` and `timm` import nothing of their frameworks. `lightning` and `transformers` do, and
only their users import them.

A file for `patch()` names the `MODULE` that it waits for, and `adapt(module, wrap)` replaces
functions of that by what `wrap` makes of ours, and returns how to undo it.
"""
