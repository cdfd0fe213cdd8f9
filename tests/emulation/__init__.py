"""The CUDA sources on the CPU: a torch device "emulated", built for the tests and never shipped.

`kernels` are compiled unmodified, by g++, against the headers beside this file; the undefined
behaviour sanitizer stands for the GPU's own faults, such as a misaligned vector load.
"""

import fcntl
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sysconfig
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
TORCH = Path(torch.__file__).parent
MISSING = None if shutil.which("nvcc") and shutil.which("g++") else "no nvcc, or no g++"

CHECKED = ["-fsanitize=undefined", "-fno-sanitize-recover=undefined", "-D__CUDA_ARCH_LIST__=900"]


def _toolkit() -> list[str]:
    """The toolkit's include folders, as nvcc names them."""
    command = ["nvcc", "--dryrun", "-c", str(CSRC / "cuda/launch.cu")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    folders = re.findall(r'"-(?:I|isystem)" ?"?([^"]+)"|"-I([^"]+)"', said)
    return [f"-isystem{a or b}" for a, b in dict.fromkeys(folders)]


def _sources(*folders: Path) -> bytes:
    files = sorted(f for folder in folders for f in folder.glob("**/*.[ch]*"))
    return b"".join(str(f.name).encode() + f.read_bytes() for f in files)


def build(cache: Path, kernels: Path = CSRC) -> Path:
    """Compile what is not in `cache` yet; `kernels` is csrc, or a copy with faults planted."""
    # Of several processes the first one builds.
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _built(cache, kernels)


def _built(cache: Path, kernels: Path) -> Path:
    toolkit = _toolkit()
    torch_ = [f"-isystem{TORCH}/include", f"-isystem{TORCH}/include/torch/csrc/api/include"]
    torch_ += [f"-isystem{sysconfig.get_paths()['include']}"]
    flags = ["-std=c++20", "-O1", "-g1", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    units = {
        kernels / "cuda/launch.cu": [*CHECKED, "-xc++"],
        HERE / "machine.cpp": [],
        HERE / "device.cpp": torch_,
        HERE / "ops.cpp": torch_,
    }

    def compiled(unit: Path) -> str:
        own = kernels if unit.suffix == ".cu" else CSRC
        command = ["g++", *flags, f"-I{HERE}", *units[unit], *toolkit, "-c"]
        said = "\n".join([*command, torch.__version__]).encode()
        key = hashlib.sha256(said + _sources(HERE, own / "cuda") + _sources(own)).hexdigest()[:16]
        made = cache / f"{unit.stem}-{key}.o"
        if not made.exists():
            fresh = made.with_suffix(".part")
            subprocess.run([*command, str(unit), "-o", str(fresh)], check=True)
            fresh.rename(made)
        return str(made)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, units))
    # Bound to its own CUDA functions, not to those that a CUDA torch has brought into the process.
    command = ["g++", "-shared", "-Wl,-Bsymbolic", *objects, f"-L{TORCH}/lib"]
    command += ["-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10", "-lubsan", "-lpthread"]
    key = hashlib.sha256("\n".join(command).encode()).hexdigest()[:16]
    library = cache / f"_emulation-{key}.so"
    if not library.exists():
        subprocess.run([*command, "-o", str(library)], check=True)
    return library


def load(library: Path) -> Any:
    """Register the device "emulated"; what is returned has its `machine`."""
    spec = importlib.util.spec_from_file_location("_emulation", library)
    torch.utils.rename_privateuse1_backend("emulated")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    device_module = types.ModuleType("torch.emulated")
    device_module.is_available = lambda: True
    device_module.device_count = lambda: 2
    device_module.current_device = lambda: 0
    device_module._is_in_bad_fork = lambda: False
    device_module.manual_seed_all = lambda seed: None
    # Asked for by opcheck, of every device that there is.
    device_module.get_rng_state = lambda device=None: torch.empty(0, dtype=torch.uint8)
    device_module.set_rng_state = lambda state, device=None: None
    torch._register_device_module("emulated", device_module)
    return module
