"""Python, before anything else: this folder on the path of a new process has torch patched there.

Python imports a `sitecustomize` that it finds when it starts
(https://docs.python.org/3/library/site.html). Imports no other room, and no torch.
"""

from .sitecustomize import PLOT, RUN, STATS, After, is_first_rank
