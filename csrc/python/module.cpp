// The Python module `_C`: facts about the build, and the functions and classes that read gradients.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <vector>

#include "../process.h"
#include "clip.h"
#include "measured.h"
#include "walk.h"
#include "wrapped.h"

namespace fastclip {

namespace cuda {
// Both are null in a build without the CUDA kernels.
[[gnu::weak]] std::vector<int> architectures();
[[gnu::weak]] const char* refusal(int device);
}  // namespace cuda

bool has_process_groups() {
  const py::gil_scoped_acquire gil;
  const auto distributed = py::module_::import("torch.distributed");
  return distributed.attr("is_available")().cast<bool>() &&
         distributed.attr("is_initialized")().cast<bool>();
}

namespace {

// Python finds this in the file before loading it: with another torch, symbols would be missing.
constexpr const char kBuiltFor[] = "fastclip built for torch " TORCH_VERSION;

}  // namespace
}  // namespace fastclip

PYBIND11_MODULE(_C, m) {
  using fastclip::PlainGrads;
  m.attr("built_for") = fastclip::kBuiltFor;
  m.attr("cuda_architectures") =
      fastclip::cuda::architectures ? fastclip::cuda::architectures() : std::vector<int>();
  m.def("cuda_refusal", [](int device) {
    return fastclip::cuda::refusal ? fastclip::cuda::refusal(device) : "not built";
  });
  m.def("use_kernels", [](bool enabled) { fastclip::kernels_are_on = enabled; });
  m.def("kernels_are_on", [] { return fastclip::kernels_are_on.load(); });
  m.def("has_process_groups", fastclip::has_process_groups);
  m.def("read_grads", fastclip::read<fastclip::Source::kGrads>);
  m.def("take_tensors", fastclip::read<fastclip::Source::kTensors>);
  m.def("clip_grad_norm_", fastclip::clip_grad_norm);
  py::class_<PlainGrads>(m, "PlainGrads")
      .def("__len__", &PlainGrads::size)
      .def("is_wide", &PlainGrads::is_wide)
      .def("has", &PlainGrads::has)
      .def("result", &PlainGrads::result, py::arg("norms"), py::arg("dtype") = std::nullopt)
      .def("norm", &PlainGrads::norm)
      .def("groups", &PlainGrads::groups)
      .def("devices", &PlainGrads::devices)
      .def("norms", &PlainGrads::norms)
      .def("each_norms", &PlainGrads::each_norms, py::arg("p"), py::arg("rows") = false)
      .def("scale_", &PlainGrads::scale_)
      .def("scale_each_", &PlainGrads::scale_each_, py::arg("coefs"), py::arg("rows") = false)
      .def("clamp_", &PlainGrads::clamp_)
      .def("clip_norm_", fastclip::clip_norm, py::arg("max_norm"), py::arg("p"),
           py::arg("norm") = std::nullopt);
  using fastclip::Wrapped;
  py::class_<Wrapped>(m, "Wrapped")
      .def(py::init<const std::vector<py::handle>&, std::vector<int64_t>, py::str, py::str,
                    std::vector<py::str>>())
      .def("read_grads", &Wrapped::read<fastclip::Source::kGrads>)
      .def("take_tensors", &Wrapped::read<fastclip::Source::kTensors>);
  using fastclip::Measured;
  py::class_<Measured>(m, "Measured")
      .def_readwrite("is_paused", &Measured::is_paused)
      .def("take", &Measured::take)
      .def("forget", &Measured::forget);
  using fastclip::MeasuredGrads;
  py::class_<MeasuredGrads, Measured>(m, "MeasuredGrads")
      .def(py::init<const py::list&, double>())
      .def("see", &MeasuredGrads::see);
  using fastclip::MeasuredBuckets;
  py::class_<MeasuredBuckets, Measured>(m, "MeasuredBuckets")
      .def(py::init<const py::list&, double>())
      .def("touch", &MeasuredBuckets::touch)
      .def("see_bucket", &MeasuredBuckets::see_bucket)
      .def("settle", &MeasuredBuckets::settle);
}
