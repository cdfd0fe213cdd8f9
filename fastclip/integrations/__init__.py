"""One file for each framework: functions that `fastclip.patch()` replaces, or a callback to import.

`megatron` and `timm` import nothing of their frameworks. `lightning` and `transformers` do, and
only their users import them.
"""
