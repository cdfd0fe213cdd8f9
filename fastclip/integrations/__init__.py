"""One file an ecosystem: what of it can be replaced, or what its users expect to import.

`apex` and `timm` are applied by `fastclip.patch()` and import neither; `lightning` and
`transformers` import theirs, and are imported by whoever uses it.
"""
