"""A folder that `python -m fastclip run` puts on `PYTHONPATH`, so that new processes patch torch.

Python imports a module called `sitecustomize`, if it finds one, whenever it starts
(https://docs.python.org/3/library/site.html). At that point, the one in this folder imports neither
torch nor other files of fastclip.
"""

from .sitecustomize import PLOT, RUN, STATS, After, is_first_rank
