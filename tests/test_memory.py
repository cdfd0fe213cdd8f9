"""No call allocates more than 50 kB, and 50 bytes a tensor, counted under malloc itself."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import python

from fastclip import _ops

pytestmark = pytest.mark.slow

# Every allocation of the process goes through these; glibc's own names do the work.
COUNTER = r"""
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>
void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t), __libc_free(void *);
static atomic_long now, peak;
static void *count(void *p) {
  long total = atomic_fetch_add(&now, (long)malloc_usable_size(p)) + (long)malloc_usable_size(p);
  if (total > peak) peak = total;
  return p;
}
void *malloc(size_t n) { return count(__libc_malloc(n)); }
void *calloc(size_t n, size_t m) { return count(__libc_calloc(n, m)); }
void *memalign(size_t a, size_t n) { return count(__libc_memalign(a, n)); }
void *aligned_alloc(size_t a, size_t n) { return memalign(a, n); }
int posix_memalign(void **p, size_t a, size_t n) { return (*p = memalign(a, n)) ? 0 : 12; }
void free(void *p) { atomic_fetch_sub(&now, (long)malloc_usable_size(p)); __libc_free(p); }
void *realloc(void *p, size_t n) {
  atomic_fetch_sub(&now, (long)malloc_usable_size(p));
  return count(__libc_realloc(p, n));
}
void restart(void) { peak = now; }
long above(void) { return peak - now; }
"""

SCRIPT = r"""
import ctypes, os, sys, torch, fastclip
counter = ctypes.CDLL(os.environ["LD_PRELOAD"])
counter.above.restype = ctypes.c_long
functions = {"fastclip": fastclip.clip_grad_norm_, "torch": torch.nn.utils.clip_grad_norm_}
# 128 tensors of 16 tiles have as many spans as there can be, one of 4 096 tiles has no more.
for count, size in ((128, 1 << 18), (1, 1 << 26), (1000, 1 << 16), (1000, 100), (1, 3)):
    made = [torch.nn.Parameter(torch.empty(size, dtype=torch.bfloat16)) for _ in range(count)]
    for parameter in made:
        parameter.grad = torch.ones_like(parameter)
    for max_norm in (1e9, 1.0):
        counter.restart()
        norm = functions[sys.argv[1]](made, max_norm, float(sys.argv[2]))
        print(counter.above() - 50 * count)
"""


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not sys.platform.startswith("linux") or shutil.which("cc") is None:
        pytest.skip("needs glibc and a C compiler")
    folder = tmp_path_factory.mktemp("counter")
    (folder / "counter.c").write_text(COUNTER)
    library = folder / "counter.so"
    subprocess.run(
        ["cc", "-O1", "-shared", "-fPIC", "-o", library, folder / "counter.c"], check=True
    )
    return library


def most_bytes(counter: Path, function: str, norm_type: str) -> int:
    variables = {"LD_PRELOAD": str(counter), "OMP_NUM_THREADS": "2"}
    result = python("-c", SCRIPT, function, norm_type, **variables)
    assert result.returncode == 0, result.stderr
    return max(map(int, result.stdout.split()))


@pytest.mark.skipif(_ops.extension is None, reason="the default ops measure in 8 MB blocks")
@pytest.mark.parametrize("norm_type", ["2", "inf"])
def test_a_call_allocates_50_kb_and_50_bytes_a_tensor(counter, norm_type):
    assert most_bytes(counter, "fastclip", norm_type) <= 50_000


def test_the_count_sees_what_torch_allocates(counter):
    assert most_bytes(counter, "torch", "2") > 50_000
