"""One file for each framework: functions that `fastclip.patch()` replaces, or a callback to import.

`megatron` and `timm` import nothing of their frameworks. `lightning` and `transformers` do, so they
are imported only by users who want a callback.

A file for `patch()` has `MODULE`, the name of the module to adapt, and `adapt(module, wrap)`, which
replaces functions of the module by `wrap(ours)` and returns the functions that undo it.
"""
