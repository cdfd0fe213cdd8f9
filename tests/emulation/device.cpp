// A torch device "emulated" (two of them) for the kernels of machine.h: tensors in host memory of
// their own, every allocation up against a page that must not be touched. Whatever else torch does
// with them goes through its CPU fallback.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/pybind11.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>

#include "../../csrc/process.h"
#include "machine.h"

namespace emulation {
namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr size_t kPage = 4096, kAlignment = 512;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating type

thread_local c10::DeviceIndex current_device = 0;
std::atomic<int64_t> allocations = 0, allocated = 0;

// Half of the allocations end where the guard page begins, whatever their alignment; the others
// are aligned as CUDA's are, with poison between their end and the guard page.
struct Allocation {
  char* base;
  size_t mapped;
  char* data;
  size_t bytes;
};

void release(void* context) {
  auto* a = static_cast<Allocation*>(context);
  const char* end = a->base + a->mapped - kPage;
  for (const char* c = a->base; c < end; ++c)
    if ((c < a->data || c >= a->data + a->bytes) && static_cast<unsigned char>(*c) != kPoison)
      fail("a write outside of an allocation");
  munmap(a->base, a->mapped);
  delete a;
}

class GuardedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(kDevice, current_device);
    if (bytes == 0) return {nullptr, device};
    const size_t pages = (bytes + kPage - 1) / kPage * kPage;
    void* base = mmap(nullptr, pages + kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || mprotect(base, pages, PROT_READ | PROT_WRITE) != 0) fail("no memory");
    std::memset(base, kPoison, pages);
    const bool at_the_end = ++allocations % 2 == 0;
    const size_t slack = pages - bytes;
    const size_t offset = at_the_end ? slack : slack / kAlignment * kAlignment;
    allocated += bytes;
    auto* a = new Allocation{static_cast<char*>(base), pages + kPage,
                             static_cast<char*>(base) + offset, bytes};
    return {a->data, a, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

GuardedAllocator allocator;
REGISTER_ALLOCATOR(kDevice, &allocator)

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  c10::Device getDevice() const override { return {kDevice, current_device}; }
  void setDevice(c10::Device d) const override { current_device = d.index(); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { current_device = d.index(); }
  c10::Device exchangeDevice(c10::Device d) const override {
    const c10::Device before = getDevice();
    setDevice(d);
    return before;
  }
  c10::Stream getStream(c10::Device d) const override {
    return c10::Stream(c10::Stream::DEFAULT, d);
  }
  c10::Stream getDefaultStream(c10::Device d) const override { return getStream(d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  void* getStreamNativeHandle(c10::Stream) const override { return nullptr; }
  c10::DeviceIndex deviceCount() const noexcept override { return 2; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
};

at::Tensor on_cpu(const at::Tensor& t) {
  return t.is_cpu()
             ? t
             : at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options().device(c10::kCPU));
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &allocator,
                                   c10::DispatchKeySet(at::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &allocator,
                                           c10::DispatchKeySet(at::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

const at::Tensor& resize(const at::Tensor& self, c10::IntArrayRef size,
                         std::optional<at::MemoryFormat> format) {
  const at::Tensor fresh = empty(size, self.scalar_type(), {}, self.device(), {}, format);
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(fresh.storage());
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  return copy_from(from, from.sizes() == to.sizes() ? to : resize(to, from.sizes(), {}), false);
}

at::Scalar local_scalar(const at::Tensor& t) { return on_cpu(t).item(); }

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("resize_", resize);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
}

}  // namespace
}  // namespace emulation

bool fastclip::has_process_groups() { return emulation::machine().process_groups != 0; }

PYBIND11_MODULE(_emulation, m) {
  using emulation::Machine;
  at::RegisterPrivateUse1HooksInterface(new emulation::Hooks);
  pybind11::class_<Machine>(m, "Machine")
      .def_readwrite("multiprocessors", &Machine::multiprocessors)
      .def_readwrite("threads_per_multiprocessor", &Machine::threads_per_multiprocessor)
      .def_readwrite("driver", &Machine::driver)
      .def_readwrite("cooperative", &Machine::cooperative)
      .def_readwrite("l2_bytes", &Machine::l2_bytes)
      .def_readwrite("held_blocks", &Machine::held_blocks)
      .def_readwrite("process_groups", &Machine::process_groups)
      .def_readwrite("capability", &Machine::capability)
      .def_readwrite("seed", &Machine::seed)
      .def_readwrite("launches", &Machine::launches)
      .def_readwrite("fail_launch", &Machine::fail_launch)
      .def_readwrite("fail_queries", &Machine::fail_queries)
      .def_readwrite("last_error", &Machine::last_error)
      .def_readwrite("fault", &Machine::fault);
  m.attr("machine") = pybind11::cast(&emulation::machine());
  m.def("allocations", [] { return emulation::allocations.load(); });
  m.def("allocated_bytes", [] { return emulation::allocated.load(); });
}
