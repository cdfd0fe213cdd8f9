"""Mistakes that the tests have to notice: `python tests/mutants.py [name ...]`.

Each mutant is a slip that a maintainer could make. In a copy of the working tree one text is
replaced by another, the extension is rebuilt if it needs to be, and the named tests are run: they
pass without the mutant, and one of them has to fail with it, or to hang. All take about 40 minutes
on two cores.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Seconds after which tests count as failed. Those of csrc/cuda first compile it for the CPU.
LIMIT = 900

# (name, file, old text, new text, tests). The tests are a file, and an expression for pytest's -k.
# fmt: off
MUTANTS = [
    # The rest of `fastclip`.
    ("zero steps are trained", "fastclip/__main__.py", "int(value) >= 1", "int(value) >= 0",
     "main: bad_option"),
    ("the states of rules may differ between ranks", "fastclip/_agreement.py",
     "return threshold.describe()", "return type(threshold).__name__",
     "mesh_disagreement: clippers_compare"),
    ("a NaN is a threshold", "fastclip/_arguments.py",
     "    if not value >= 0:", "    if value < 0:", "errors: below_zero_and_nan"),
    ("one threshold too many is left over", "fastclip/_arguments.py",
     "if max_norm.shape != (count,):", "if max_norm.dim() != 1 or len(max_norm) < count:",
     "per_tensor: threshold"),
    ("a copy sets thresholds of the original", "fastclip/_arguments.py",
     "twin.changed = dict(self.changed)", "twin.changed = self.changed", "clipper: by_their_names"),
    ("types know no typos", "fastclip/_arguments.py",
     'Nonfinite = Literal["propagate", "error", "zero", "keep"]', "Nonfinite = str",
     "types: typos"),
    ("a check that finds faults ends with 0", "fastclip/_check.py",
     "        sys.exit(1)", "        sys.exit(0)", "kernels: ends_with_1"),
    ("other bits at the second call are right", "fastclip/_check_cases.py",
     "if not same or not canvas.memory", "if not canvas.memory", "kernels: case_says"),
    ("a rule is asked twice", "fastclip/_decide.py",
     "    limit = limit_of(max_norm, norm)\n",
     "    limit_of(max_norm, norm)\n    limit = limit_of(max_norm, norm)\n", "rules: asked_once"),
    ("a dropped step is taken", "fastclip/_decide.py",
     "return bad | limit.isnan().to(norms.device) if isinstance(limit, Tensor) else bad",
     "return bad", "rules: nonfinite_says or step_itself"),
    ("a negative factor turns the step round", "fastclip/_decide.py",
     "(coef * factor).masked_fill(norms < 0, math.nan)", "coef * factor", "optim: factor"),
    ("the first step is step 0", "fastclip/_demo.py",
     "enumerate(self.losses, 1)", "enumerate(self.losses)", "main: diverges"),
    ("a NaN in a subclass stays where zeros are meant", "fastclip/_gradients/local.py",
     "if is_host_readable(coef) and bool(means_zeros(coef).all()):", "if not coef.numel():",
     "subclasses: zeros"),
    ("one dimension that is not expanded hides the others", "fastclip/_gradients/look.py",
     "any(size > 1 and stride == 0 for", "all(size > 1 and stride == 0 for",
     "contract: refuses_to_write"),
    ("a replaced parameter is not found", "fastclip/_gradients/named.py",
     "len(now) == len(self._held) and all(map(operator.is_, now, self._held))",
     "len(now) == len(self._held)", "clipper: walked_again"),
    ("a norm stands at the last of equal parameters", "fastclip/_gradients/reading.py",
     "reversed(list(enumerate(parameters)))", "list(enumerate(parameters))",
     "per_tensor: of_its_own"),
    ("gradients in place of parameters are silent", "fastclip/_gradients/reading.py",
     "not any(map(_may_have_grad, items))", "not items", "errors: gradients_instead"),
    ("a rank that fails leaves the others waiting", "fastclip/_gradients/spread.py",
     "if not reduction.sends:\n                    raise\n                self",
     "if reduction:\n                    raise\n                self",
     "mesh_disagreement: nobody_foresaw"),
    ("a float64 on another rank is forgotten", "fastclip/_gradients/spread.py",
     "self.wide = bool(wide) if is_host_readable(wide) else self.wide", "pass",
     "mesh: wide_gradient"),
    ("equal indices of sparse gradients are clamped apart", "fastclip/_gradients/stored.py",
     "if tensor.is_sparse and not tensor.is_coalesced():", "if not tensor.numel():",
     "contract: sparse_gradient_is_clipped"),
    ("magnitudes of complex32 overflow", "fastclip/_gradients/stored.py",
     "(tensor.to(torch.complex64) if tensor.dtype == torch.complex32 else tensor).abs()",
     "tensor.abs()", "contract: complex_gradient"),
    ("in a graph all gradients are in the first slot", "fastclip/_gradients/traced.py",
     "(tensor, slot))", "(tensor, 0))", "mesh_compile: whole_graphs"),
    ("a parameter that changes groups stays in its old one", "fastclip/_grouped.py",
     "if group_of != self.group_of or list(", "if list(", "random_clipper: any_life"),
    ("last() is the step to come", "fastclip/_history.py",
     "rows[(steps - 1) % len(rows)]", "rows[steps % len(rows)]", "clipper: ring_keeps"),
    ("the record of many groups has no bound", "fastclip/_history.py",
     "most = max(1, min(STEPS, BYTES // (16 * max(1, groups))))", "most = STEPS",
     "clipper: ring_is_bounded"),
    ("memory that nobody wrote is saved", "fastclip/_history.py",
     '        state["rows"][int(state["steps"]) :] = 0\n', "", "clipper: zero_in_the_state"),
    ("norms beyond float32 zero the gradients", "fastclip/_ops/coef.py",
     "unit = 2.0**-48", "unit = 1.0", "range: coefficient or every_clip"),
    ("the formula has no 1e-6", "fastclip/_ops/coef.py", "EPSILON = 1e-6", "EPSILON = 1e-7",
     "ops: constant_shows"),
    ("an extension for another torch is loaded", "fastclip/_ops/loading.py",
     'built_for.split(".")[:2] == torch.__version__.split(".")[:2]',
     'built_for.split(".")[:1] == torch.__version__.split(".")[:1]', "build: does_not_load"),
    ("an extension that does not load is an error", "fastclip/_ops/loading.py",
     "except ImportError as error:", "except ModuleNotFoundError as error:",
     "build: does_not_load"),
    ("FASTCLIP_KERNELS=0 loads the kernels", "fastclip/_ops/loading.py",
     '    if _ASKED == "0":\n        return None\n', "", "kernels: environment"),
    ("powers overflow", "fastclip/_ops/measure.py",
     "unit = most.where((most > 0) & most.isfinite(), 1)", "unit = torch.ones_like(most)",
     "ops: norm_of_finite"),
    ("a clip changes what autograd keeps", "fastclip/_ops/measure.py",
     "return tensor.to(widest(tensor.device), copy=True) if is_differentiated() else tensor",
     "return tensor", "transforms: derivative"),
    ("what exists once is made anew", "fastclip/_ops/process.py",
     "if name not in kept:", "if make:", "patching: reloaded"),
    ("the bound is not rounded", "fastclip/_ops/reference.py",
     'float(torch.tensor(bound, dtype=torch.float64, device="cpu").to(some[0].dtype))', "bound",
     "ops: clamp or bound"),
    ("the default multiplies by no coefficient above 1", "fastclip/_ops/reference.py",
     "if bool(coef == 1):", "if bool(coef >= 1):", "ops: scale"),
    ("a fake norm is always float64", "fastclip/_ops/schemas.py",
     "dtype = widest(device) if wide else reference.result_dtype(tensors)",
     "dtype = widest(device)", "compile: opcheck"),
    ("inside transforms nothing is differentiated", "fastclip/_ops/transforms.py",
     "return is_transformed() and torch.is_grad_enabled()", "return False",
     "transforms: derivative"),
    ("a step of its own counts as torch's", "fastclip/_optimizers/fused.py",
     "if is_fused and is_torchs and _divides", "if is_fused and _divides",
     "optim: cannot_clip"),
    ("a small coefficient makes an infinite divisor", "fastclip/_optimizers/fused.py",
     "if wide else divisor.isfinite()", "if wide else ~coef.isinf()", "optim: too_small"),
    ("float64 gradients are divided by a float32", "fastclip/_optimizers/fused.py",
     "torch.zeros_like(coef, dtype=torch.bool) if wide else divisor.isfinite()",
     "divisor.isfinite()", "random_steps: any_steps"),
    ("a skipped first step leaves a momentum", "fastclip/_optimizers/fused.py",
     "        _clear_buffers(inner, fresh, found_inf)\n", "", "optim: dampened"),
    ("attributes of a step stay behind", "fastclip/_optimizers/fused.py",
     "attributes.pop(name, None)", "pass", "optim: behind"),
    ("ZeroRedundancyOptimizer is a wrapper", "fastclip/_optimizers/wrapped.py",
     "if len(others) != 1 or not _have_same_parameters(layers[-1], others[0]):",
     "if len(others) != 1:", "optim: cannot_clip"),
    ("a name that torch has lost ends the import", "fastclip/_private.py",
     "except (ImportError, AttributeError):", "except ImportError:", "private_names: without_any"),
    ("averages are rounded otherwise than without a hook", "fastclip/_ranks/ddp.py",
     "buffer.mul_(1 / count)", "buffer.div_(count)", "accumulator: to_the_bit"),
    ("a rank without batches counts as one with them", "fastclip/_ranks/ddp.py",
     "torch.tensor([not has_joined]", "torch.tensor([True]", "accumulator: to_the_bit"),
    ("a rank that fails tells no other", "fastclip/_ranks/failure.py",
     "parts[-NUMBERS], parts[-NUMBERS + 1] = 1, self.mark",
     "parts[-NUMBERS], parts[-NUMBERS + 1] = 0, self.mark", "mesh_disagreement: others_why"),
    ("a set of process groups has an order", "fastclip/_ranks/groups.py",
     "isinstance(process_group, Sequence) and", "isinstance(process_group, Iterable) and",
     "mesh: bad_input"),
    ("two groups may share two ranks", "fastclip/_ranks/groups.py",
     "set(ranks) & set(others))) > 1:", "set(ranks) & set(others))) > 2:", "mesh: share_two"),
    ("replicas count once each", "fastclip/_ranks/mesh.py",
     "whole = [p.is_replicate() or p.is_partial()", "whole = [p.is_partial()",
     "mesh: every_layout"),
    ("meshes that cross share a norm", "fastclip/_ranks/mesh.py",
     "len(ranks) + len(others) - 1 and here & there:", "0:",
     "mesh_disagreement: meshes_that_cross"),
    ("a NaN of one rank loses in a maximum", "fastclip/_ranks/parts.py",
     'return _all_reduce(step, bits, "MAX").view(parts.dtype)',
     'return _all_reduce(step, parts, "MAX")', "mesh_disagreement: bits_of_a_nan"),
    ("groups of other ranks hear of no infinity", "fastclip/_ranks/parts.py",
     "for some in slots.split(counts)]) + flags", "for some in slots.split(counts)])",
     "mesh_disagreement: overflows"),
    ("orders below zero are no reciprocals", "fastclip/_ranks/parts.py",
     "norms = norms.reciprocal() if p < 0 else norms\n", "norms = norms.clone()\n",
     "random_layouts: any_layout"),
    ("a float64 parameter makes no float64 norm", "fastclip/_ranks/plan.py",
     "self.wide = any(layout.tensor_meta.dtype in wide for layout in dtensors)",
     "self.wide = False", "mesh: wide_gradient"),
    ("all ranks of a mesh add to a process group", "fastclip/_ranks/reduction.py",
     "members[group] += [i] * slot.counts_for_mesh", "members[group] += [i]",
     "random_layouts: any_layout"),
    ("in a graph only dimension 0 is sharded", "fastclip/_ranks/traced.py",
     "if p.is_shard()))", "if p.is_shard(0)))", "mesh_compile: whole_graphs"),
    ("the trial expects sums for averages", "fastclip/_ranks/trial.py",
     ".square().mean() / size for", ".square().mean() for", "kernels: odd_rank and none"),
    ("undoing a patch puts ours back", "fastclip/_redirect.py",
     '    undo = partial(setattr, cell, "cell_contents", cell.cell_contents)\n'
     "    cell.cell_contents = ours\n", "    cell.cell_contents = ours\n"
     '    undo = partial(setattr, cell, "cell_contents", cell.cell_contents)\n',
     "patching: undone"),
    ("every rank under srun speaks", "fastclip/_run.py",
     " and not rank() and _site.is_first_rank():", " and not rank():", "run: first_rank"),
    ("a picture whose folder is gone ends in a traceback", "fastclip/_run.py",
     "except OSError as error:", "except FileExistsError as error:", "run: picture_is_gone"),
    ("a script that imports fastclip first is patched too early", "fastclip/_site/sitecustomize.py",
     'if not getattr(spec, "_initializing", False):', "if True:", "run: import_first"),
    ("a rank that cannot be patched goes on", "fastclip/_site/sitecustomize.py",
     'if RUN in sys._xoptions or _first_of(_SIZE, "1") not in ("0", "1"):',
     "if RUN in sys._xoptions:", "run: cannot_be_patched"),
    ("a saved state changes with the rule", "fastclip/_state.py",
     "value.to(CPU, copy=True)", "value.to(CPU)", "rules: round_trip"),
    ("a warning names a line of fastclip", "fastclip/_warnings.py",
     "frame, level = frame.f_back, level + 1", "frame = frame.f_back", "patching: warnings"),
    ("an accumulator does not see that ranks came", "fastclip/accumulator.py",
     "if self._measured is not None and not (self._is_averaged or is_alone()):",
     "if self._is_removed:", "accumulator: ranks_change"),
    ("removed in a pause, it goes on after it", "fastclip/accumulator.py",
     "self._set_paused(before or self._is_removed)", "self._set_paused(before)",
     "accumulator: removed_hooks"),
    ("copies have hooks that nobody called", "fastclip/accumulator.py",
     '"_has_lost_hooks": lost}', '"_has_lost_hooks": False}', "copies: accumulator"),
    ("a norm of -1 turns the step round", "fastclip/clip.py",
     "coef.masked_fill(precise < 0, math.nan)", "coef", "contract: norm_below_zero"),
    ("a norm that its dtype does not hold is finite", "fastclip/clip.py",
     "raise_if_nonfinite(norm if dtype is None else norm.to(dtype), p)",
     "raise_if_nonfinite(norm, p)", "contract: may_not_hold"),
    ("after a load ranks are not compared", "fastclip/clipper.py",
     "                self._thresholds[name] = number\n        self._is_compared = False\n",
     "                self._thresholds[name] = number\n", "mesh_disagreement: clippers_compare"),
    ("a misspelt attribute is set", "fastclip/clipper.py",
     'name[0] != "_" and not hasattr(GradClipper, name)', 'name[0] == "."',
     "clipper: no_attribute"),
    ("optimizers share a rule", "fastclip/integrations/lightning.py",
     "copy.deepcopy(rules[0]) if self._fresh is not None else rules[0]", "rules[0]",
     "frameworks/lightning: by_itself"),
    ("a resumed run begins anew", "fastclip/integrations/transformers.py",
     'if state.global_step and "state" in', 'if not state.global_step and "state" in',
     "frameworks/transformers: goes_on"),
    ("Megatron's scaling into other tensors is lost", "fastclip/integrations/megatron.py",
     "if grads is not outs:", "if len(grads) != len(outs):", "integrations: own_function"),
    ("timm's other orders are clipped by order 2", "fastclip/integrations/timm.py",
     "if norm_type != 2:", "if norm_type <= 0:", "patching: timm"),
    ("kernels are never turned off", "fastclip/kernels.py",
     "use_kernels(bool(enabled))", "use_kernels(True)", "kernels: off_and_on"),
    ("infinities are finite", "fastclip/nonfinite.py",
     "bad = (~norms.isfinite())", "bad = norms.isnan()", "clipper: found_and_counted"),
    ("an infinity of one rank is not one of all", "fastclip/optim.py",
     "process_group=process_group, agree=True)", "process_group=process_group)",
     "mesh_disagreement: overflows"),
    ("a skipped step is clipped", "fastclip/optim.py",
     "coef.where(is_bad == 0, 1) * inv_scale", "coef * inv_scale", "rules: step_itself"),
    ("an optimizer steps before a wrapper refuses", "fastclip/optim.py",
     "in sorted(given, key=lambda one: len(layers_of(one)), reverse=True):", "in given:",
     "optim: cannot_clip"),
    ("a patch that is entered again does not count", "fastclip/patching.py",
     "if self._was_entered or self not in", "if self not in", "patching: any_order"),
    ("eps is added to weights", "fastclip/per_tensor.py",
     "weights.clamp(min=min(eps, most))", "(weights + min(eps, most))", "per_tensor: papers"),
    ("gradients of zeros become NaN", "fastclip/per_tensor.py",
     "coef.masked_fill(total_norm == 0, 1)", "coef", "per_tensor: of_zeros"),
    ("a norm of 0 enters the state of a rule", "fastclip/rules.py",
     "return norm.isfinite() & (norm > 0)", "return norm.isfinite()", "rules: norms_of_0"),
    ("a percentile is not interpolated", "fastclip/rules.py",
     "around[0].lerp(around[1], rank - below)", "around[0]", "rules: norms_of_0"),
    ("patience has one step more", "fastclip/spikes.py",
     "drops >= self.patience", "drops > self.patience", "rules: norms_of_0"),
    ("fake ranks are asked of a fake tensor", "fastclip/_ranks/mesh.py",
     "        with without_modes():\n            self.ranks",
     "        with torch.no_grad():\n            self.ranks", "protocol: without_data"),
    ("a reducer in Python has buckets", "fastclip/_ranks/ddp.py",
     'isinstance(module, kind) and not attribute(module, "_use_python_reducer")',
     "isinstance(module, kind)", "accumulator: two_ranks_clip"),
    ("a graph holds no agreement on what is finite", "fastclip/_gradients/reading.py",
     "asked is NONE and kind is Kind.TOTAL and not agree:", "asked is NONE and kind is Kind.TOTAL:",
     "mesh_compile: policy"),
    ("one rank alone waits for the others", "fastclip/nonfinite.py",
     "local_of(item.grad))", "item.grad)", "mesh_clipper: rank_alone"),
    ("rows of a sparse gradient are the first ones", "fastclip/_gradients/local.py",
     "each[i] = each[i][indices_of(self.tensors[i])[0].to(coefs.device)]",
     "each[i] = each[i][: indices_of(self.tensors[i]).size(1)]", "per_tensor: sparse"),
    ("gradients change before a wrapper refuses", "fastclip/_optimizers/fused.py",
     "        now = attributes.get(", "        prepare()\n        now = attributes.get(",
     "optim: cannot_clip"),
    ("a copy of an optimizer divides nothing", "fastclip/_optimizers/fused.py",
     "(grad_scale, found_inf, True), strict=True", "(grad_scale, found_inf), strict=False",
     "optim: cannot_clip"),
    # How it is built.
    ("the oldest architecture keeps its PTX", "csrc/nvcc.py",
     '[(numbers[-1], f"compute_{numbers[-1]}")]', '[(numbers[0], f"compute_{numbers[0]}")]',
     "build: newest_keeps"),
    ("pip's nvcc is not found", "csrc/nvcc.py",
     '[*folders, os.environ["PATH"], *packages]', '[*folders, os.environ["PATH"]]',
     "build: taken_from"),
    ("a wheel takes any torch", "setup.py",
     'f"torch=={minor}.*" if CPU == "1" else "torch>=2.11"', '"torch>=2.11"',
     "build: variables_switch"),
    # Kernels for the CPU, and the walk.
    ("NaN is clipped to itself", "csrc/cpu/clip.cpp", "if (coef != 1) lists", "if (coef < 1) lists",
     "ops: not_finite"),
    ("squares beyond float64 are infinite", "csrc/cpu/norm.cpp",
     "  if (std::any_of(norms, norms + *groups, overflowed)) return by_default();\n",
     "  static_cast<void>(overflowed);\n", "range: squares_beyond"),
    ("groups are scaled in order", "csrc/cpu/scale.cpp",
     "single ? 0 : group ? (*group)[i] : i", "single ? 0 : i", "ops: scale_rounds"),
    ("kernels multiply by no coefficient above 1", "csrc/cpu/phases.h",
     "if (c != 1) scale", "if (c < 1) scale", "ops: scale"),
    ("a span crosses from group to group", "csrc/cpu/spans.h",
     "if (i > 0 && border(i)) room = 0;", "static_cast<void>(border);",
     "ops: norms_match"),
    ("what a division leaves over is read by no thread", "csrc/cpu/threads.h",
     "length = at::divup(size, threads),", "length = size / threads,", "ops: thread_count"),
    ("squares of bfloat16 overflow float32", "csrc/cpu/tile.cpp",
     "static_cast<double>(std::bit_cast<float>(word << 16))", "std::bit_cast<float>(word << 16)",
     "ops: norm_of_finite"),
    ("float16 keeps its signs in order 1", "csrc/cpu/half.h",
     "if (!kSquares) values", "if (kSquares) values", "ops: norms_match"),
    ("a negative threshold needs no check", "csrc/python/clip.h",
     "return as_number(max_norm) >= 0;", "return !std::isnan(as_number(max_norm));",
     "errors: below_zero_and_nan"),
    ("signs that are flipped lazily are forgotten", "csrc/python/grads.h",
     "         !tensor.is_neg() &&", "        ", "contract: lazily_negated"),
    ("a gradient changed in place is not measured again", "csrc/python/measured.h",
     " && version == now._version();", ";", "accumulator: only_what_changed"),
    ("a bucket that is made anew keeps its old gradients", "csrc/python/measured.h",
     "if (seen.piece == number) seen.piece = kNone;", "static_cast<void>(seen);",
     "accumulator: bucket_it_was"),
    ("process groups that are left still count", "csrc/python/module.cpp",
     ' &&\n         distributed.attr("is_initialized")().cast<bool>();', ";",
     "kernels: process_groups"),
    ("a threshold of a subclass is read as a plain tensor", "csrc/python/tensors.h",
     "THPVariable_CheckExact(object.ptr())", "THPVariable_Check(object.ptr())",
     "mesh: is_the_same_number"),
    ("unscaling bumps no version", "csrc/python/unscale.h", "        bump_versions(grads);\n", "",
     "random_steps: any_steps"),
    ("a parameter given twice counts twice", "csrc/python/walk.h",
     "if (source == Source::kGrads && !seen.insert(impls[i])) continue;", "",
     "contract: same_parameter"),
    ("a gradient of another layout is read as its parameter's", "csrc/python/wrapped.h",
     "if (same <= 0) return false;", "if (same < 0) return false;", "mesh: reduced_first"),
    ("an infinite threshold clips infinities", "csrc/formulas.h",
     "  if (max_norm == std::numeric_limits<acc_t>::infinity()) return 1;\n", "",
     "ops: not_finite"),
    ("memory that is shared until it is written is written", "csrc/tensor_list.h",
     "auto scaled = FlatList::try_flatten(tensors, false, Access::kWrite);",
     "auto scaled = FlatList::try_flatten(tensors);", "ops: written_alone"),
    # Kernels for CUDA, which the tests compile for the CPU.
    ("a launch that fails is silent", "csrc/cuda/launch.cu",
     "  check(status, what, stream.device);\n  return true;", "  return true;",
     "emulation: failed_launch"),
    ("magnitudes of order 1 keep signs", "csrc/cuda/norm.cuh", "fabs(a) + fabs(b)", "fabs(a) + b",
     "ops: norms_match"),
    ("a collective and a clip wait for each other", "csrc/cuda/ops.cpp",
     "may_fuse = !has_process_groups()", "may_fuse = true", "emulation: does_not_pay"),
    ("spans of groups have no holes", "csrc/cuda/partition.h",
     "if (apart && room > 0 && item.group", "if (!apart && room > 0 && item.group",
     "emulation: kept_apart"),
    ("a NaN is smaller than a number", "csrc/cuda/reduce.cuh",
     "return a > b || a != a ? a : b;", "return a > b ? a : b;", "ops: keeps_nan"),
    ("CUDA multiplies by no coefficient above 1", "csrc/cuda/scale.cuh",
     "return coef == 1; }", "return coef >= 1; }", "ops: scale_rounds"),
    ("half of a word leaks into the other", "csrc/cuda/tile.cuh",
     "vector[k / 2] & 0xffff0000 :", "vector[k / 2] :", "ops: norms_match"),
]
# fmt: on
# What the extension is built from. These mutants come last: no other needs it as it was.
BUILT = ("csrc/cpu/", "csrc/python/", "csrc/formulas.h", "csrc/tensor_list.h")


def run(copy: Path, *command: str, **variables: str) -> int:
    """Run Python in the copy; return its exit status, -1 if it hangs."""
    environment = os.environ | {"PYTHONPATH": str(copy), **variables}
    how = {"cwd": copy, "env": environment, "stderr": subprocess.STDOUT, "start_new_session": True}
    with (copy / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, *command], stdout=log, **how)
        try:
            return process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            return -1
        finally:
            # Also ranks that still wait for each other.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def place_of(mutant: tuple[str, ...]) -> tuple[bool, str]:
    """Return whether it needs the emulated device, and the file of its tests."""
    return mutant[1].startswith("csrc/cuda/"), mutant[4].partition(": ")[0]


def run_tests(copy: Path, mutants: list[tuple[str, ...]]) -> int:
    """Run the tests of mutants of one place."""
    is_emulated, file = place_of(mutants[0])
    folder, _, name = file.rpartition("/")
    each = [mutant[4].partition(": ")[2] for mutant in mutants]
    words = " or ".join(f"({one})" for one in each) if all(each) else ""
    command = ["-m", "pytest", "-x", "-q", "-n", "0", str(Path("tests", folder, f"test_{name}.py"))]
    return run(copy, *command, "-k", words, "-m", "emulated" if is_emulated else "not emulated")


def main(copy: Path, names: list[str]) -> list[str]:
    """Return the names of the mutants that no test notices."""
    chosen = [mutant for mutant in MUTANTS if mutant[0] in names or not names]
    # Tests of a callback need its framework, and the emulated device needs CUDA's headers.
    chosen = [m for m in chosen if "/" not in m[4] or find_spec(place_of(m)[1].split("/")[1])]
    chosen = [m for m in chosen if shutil.which("nvcc") or not place_of(m)[0]]
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    for file in (*files, *(f"fastclip/{path.name}" for path in ROOT.glob("fastclip/_C*.so"))):
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, copy / file)
    for place in dict.fromkeys(map(place_of, chosen)):
        if run_tests(copy, [mutant for mutant in chosen if place_of(mutant) == place]):
            sys.exit(f"{place[1]}: fails unchanged\n" + (copy / "log").read_text()[-2000:])
    unnoticed = []
    for mutant in sorted(chosen, key=lambda mutant: mutant[1].startswith(BUILT)):
        name, file, old, new, _ = mutant
        start, text = time.monotonic(), (copy / file).read_text()
        assert text.count(old) == 1, f"{name}: the old text is not once in {file}"
        (copy / file).write_text(text.replace(old, new))
        if file.startswith(BUILT) and run(copy, "setup.py", "build_ext", "-i", FASTCLIP_CUDA="0"):
            sys.exit(f"{name}: cannot be built\n" + (copy / "log").read_text()[-2000:])
        # pytest ends with 5 if there are no such tests.
        said = {0: "NOT NOTICED", 5: "NO SUCH TEST"}.get(run_tests(copy, [mutant]), "noticed")
        (copy / file).write_text(text)
        unnoticed += [name] if said != "noticed" else []
        print(f"{name}: {said}, {time.monotonic() - start:.0f} s", flush=True)
    return unnoticed


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        unnoticed = main(Path(folder), sys.argv[1:])
    print(f"not noticed: {'; '.join(unnoticed) or 'none'}")
    sys.exit(bool(unnoticed))
