// A GPU that is not there: the host's memory and arithmetic behind the rules of a device (CUDA; with -DAPPLE Apple's: MPS).
//
// Loaded before PyTorch (see pretend_gpu.py), it takes the places that PyTorch's CPU build leaves empty: allocator,
// device guard, hooks, kernels. Every operation runs on the CPU, after a check that a GPU would make too: tensors of two
// devices do not mix (numbers and indices excepted), and Apple's have no float64.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <atomic>
#include <set>
#include <string>

#ifdef APPLE
#define DEVICE MPS
#define HOOKS at::MPSHooksInterface
#else
#define DEVICE CUDA
#define HOOKS at::CUDAHooksInterface
#endif

namespace {

using at::Tensor;

constexpr auto kType = c10::DeviceType::DEVICE;
const c10::Device kDevice(kType, 0);
const c10::DispatchKeySet kKeys(c10::DispatchKey::DEVICE);
std::atomic<int64_t> waits{0};  // how often the host had to know what the device had computed

bool on_device(const Tensor& t) { return t.device().type() == kType; }

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = size ? c10::alloc_cpu(size) : nullptr;
    return {data, data, &c10::free_cpu, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, std::size_t size) const override { std::memcpy(to, from, size); }
} allocator;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
};
C10_REGISTER_GUARD_IMPL(DEVICE, Guard);

struct Hooks final : HOOKS {
  Hooks() = default;
#ifdef APPLE
  bool hasMPS() const override { return true; }
#else
  explicit Hooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  c10::DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
#endif
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex = -1) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex = -1) const override {
    return at::make_generator<at::CPUGeneratorImpl>();
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
};

Tensor on_host(const Tensor& t) {  // the same memory, seen as the CPU's
  if (!on_device(t)) return t;
  void* data = t.numel() ? t.mutable_data_ptr() : nullptr;
  auto seen = at::from_blob(data, t.sizes(), t.strides(), [](void*) {}, t.options().device(at::kCPU));
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) seen.unsafeGetTensorImpl()->set_wrapped_number(true);
  return seen;
}

at::ScalarType allowed(std::optional<at::ScalarType> dtype) {
  auto type = at::dtype_or_default(dtype);
#ifdef APPLE
  TORCH_CHECK_TYPE(type != at::kDouble, "pretended MPS: there is no float64");
#endif
  return type;
}

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, kKeys, allowed(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, allowed(dtype));
}

Tensor& copy_(Tensor& self, const Tensor& from, bool) {
  if (!on_device(self)) ++waits;
  on_host(self).copy_(on_host(from));
  return self;
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* storage = self.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  const size_t needed = (c10::multiply_integers(size) + self.storage_offset()) * self.itemsize();
  if (storage->nbytes() < needed) {
    auto data = allocator.allocate(needed);
    if (storage->nbytes()) std::memcpy(data.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(data));
    storage->set_nbytes(needed);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset);
  if (stride.size() == size.size()) impl->set_sizes_and_strides(size, stride);
  else impl->set_sizes_contiguous(size);
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage storage) {
  const int64_t size = storage.nbytes() / self.itemsize();
  return set_storage(self, std::move(storage), 0, {size}, {});
}

// Each tensor of a value, a list or a list with gaps.
template <typename F>
void replace_tensors(c10::IValue& value, F&& moved) {
  if (value.isTensor()) {
    value = moved(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& t : value.toTensorVector()) list.push_back(moved(t));
    value = list;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const auto& t : value.toOptionalTensorVector())
      list.push_back(t ? std::optional<Tensor>(moved(*t)) : std::nullopt);
    value = list;
  }
}

// Every other operation: on the CPU, on the same memory; what it writes is copied back.
void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  static const std::set<std::string> take_any_index = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"};
  static const std::set<std::string> wait = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select",
                                             "aten::equal", "aten::_unique2"};
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  const size_t first = stack->size() - arguments.size();
  const std::vector<c10::IValue> given(stack->begin() + first, stack->end());
  waits += wait.count(schema.name());

  std::vector<std::pair<Tensor, Tensor>> written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = (*stack)[first + i];
    const bool writes = arguments[i].alias_info() && arguments[i].alias_info()->isWrite();
    auto moved = [&](const Tensor& t) {
      if (!t.defined()) return t;
      if (!on_device(t)) {
        TORCH_CHECK(t.dim() == 0 || take_any_index.count(schema.name()),
                    "pretended GPU: Expected all tensors to be on the same device: ", op.operator_name(), ", argument ",
                    arguments[i].name(), ", is on ", t.device());
        return t;
      }
      if (!writes) return on_host(t);
      auto copy = at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kCPU));
      copy.copy_(on_host(t));
      written.emplace_back(t, copy);
      return copy;
    };
    if (value.isDevice()) value = c10::Device(at::kCPU);
    replace_tensors(value, moved);
  }

  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);

  for (auto& [original, copy] : written) {
    if (original.sizes() != copy.sizes()) resize_(original, copy.sizes(), std::nullopt);
    on_host(original).copy_(copy);
  }
  const auto& returns = schema.returns();
  const size_t out = stack->size() - returns.size();
  for (size_t i = 0; i < returns.size(); ++i) {
    auto& value = (*stack)[out + i];
    const auto* alias = returns[i].alias_info();
    if (alias && alias->isWrite()) {  // what was written is returned
      for (size_t a = 0; a < arguments.size(); ++a) {
        const auto* of = arguments[a].alias_info();
        if (of && of->isWrite() && of->beforeSets() == alias->beforeSets()) value = given[a];
      }
      continue;
    }
    TORCH_CHECK(!alias, "pretended GPU: a view that is not registered: ", op.operator_name());
    auto moved = [&](const Tensor& t) {
      if (!t.defined() || on_device(t)) return t;
      auto copy = empty_strided(t.sizes(), t.strides(), t.scalar_type(), {}, {}, {});
      on_host(copy).copy_(t);
      return copy;
    };
    replace_tensors(value, moved);
  }
}

TORCH_LIBRARY_IMPL(_, DEVICE, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, DEVICE, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", [](const Tensor& t, at::IntArrayRef size) { return at::native::view(t, size); });
  m.impl("unfold", &at::native::unfold);
  m.impl("_reshape_alias", [](const Tensor& t, at::IntArrayRef size, at::IntArrayRef stride) {
    return at::native::_reshape_alias(t, size, stride);
  });
  m.impl("_fused_sdp_choice", [](const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                                 std::optional<double>, bool) -> int64_t { return 0; });
}

const bool ready = (c10::SetAllocator(kType, &allocator, 255), true);

}  // namespace

namespace at {
#ifdef APPLE
C10_REGISTER_TYPED_CLASS(MPSHooksRegistry, "MPSHooks", ::Hooks);
#else
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", ::Hooks);
#endif
}  // namespace at

extern "C" int64_t pretend_gpu_waits() { return waits.load(); }
