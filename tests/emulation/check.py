"""`python -m fastclip check` on the emulated device, in a child process for each planted fault.

PYTHONPATH=.:tests python tests/emulation/check.py library.so folder number ...: number 0 is the
code without a fault, and of the others the cases alone are checked. Writes the output of each check
to folder/number. A fault may end its child.
"""

import os
import sys
from pathlib import Path

import torch

import emulation
from fastclip._check import check, find_first_wrong


def check_with(fault: int, output: Path) -> int:
    """Check in a child process, with a fault under several schedules; return its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        for target in (1, 2):
            os.dup2(os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND), target)
        machine.fault = fault
        device, wrong = torch.device("emulated"), []
        for seed in range(3 if fault else 0):
            machine.seed, machine.cooperative = 1000 * seed, 1 - seed % 2
            wrong = wrong or find_first_wrong(device, True)[1]
        if not fault:
            check(device, None)
        print(*(f"WRONG {why}" for why in wrong))
        status = len(wrong)
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    machine = emulation.load(Path(sys.argv[1])).machine
    for number in sys.argv[3:]:
        print(number, check_with(int(number), Path(sys.argv[2]) / number))
