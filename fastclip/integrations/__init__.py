"""One file an ecosystem: what `fastclip.patch()` replaces there, or what its users import.

`apex`, `megatron` and `timm` import nothing of theirs. `lightning` and `transformers` do, and are
imported by nobody but those who use them.
"""
