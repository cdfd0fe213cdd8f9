"""`python -m fastclip check` on the emulated device, in a process that a fault may well end.

PYTHONPATH=.:tests python tests/emulation/check.py library.so [fault]: exit status 0 if all is
right; with a planted fault also under other schedules.
"""

import sys
from pathlib import Path

import torch

import emulation

if __name__ == "__main__":
    machine = emulation.load(Path(sys.argv[1])).machine
    machine.fault = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    from fastclip._check import check

    for seed in range(3 if machine.fault else 1):
        machine.seed, machine.cooperative = 1000 * seed, 1 - seed % 2
        check(torch.device("emulated"), None)
