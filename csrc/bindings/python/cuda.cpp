// Arrays on the device: our own, and those of other libraries by DLPack or __cuda_array_interface__.
// The operations have the names and arguments of those on NumPy arrays (signatures.hpp).
//
// Order. An operation is enqueued on the thread's current stream, behind what its inputs' streams have
// been given; its results belong to that stream. Memory that others gave is held until the stream has
// done what reads it.
#include "bindings/python/cuda.hpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/python/dlpack.hpp"
#include "bindings/python/signatures.hpp"
#include "core/cuda_backend.hpp"
#include "core/error.hpp"

namespace fastconv::python {
namespace {

using cuda::Library;
using cuda::Memory;

thread_local void* t_stream = nullptr;
// The object whose stream that is, or null. Borrowed: using_stream() holds it.
thread_local PyObject* t_stream_object = nullptr;

// Handles of the protocols: 1 is the legacy default stream too.
void* stream_of_handle(std::uintptr_t handle) {
  return handle == 1 ? nullptr : reinterpret_cast<void*>(handle);
}
constexpr int64_t kPerThread = 2;  // the handle of each thread's own default stream
std::uintptr_t handle_of_stream(void* stream) {
  return stream == nullptr ? 1 : reinterpret_cast<std::uintptr_t>(stream);
}

// --- element types --------------------------------------------------------------------------------

struct ElementType {
  const char* name;
  const char* interface;  // of __cuda_array_interface__; null where it has none
  std::uint8_t code, bits;
};
constexpr std::array<ElementType, 5> kElementTypes{{{"float32", "<f4", dlpack::kFloat, 32},
                                                    {"float16", "<f2", dlpack::kFloat, 16},
                                                    {"bfloat16", nullptr, dlpack::kBfloat, 16},
                                                    {"uint8", "|u1", dlpack::kUnsigned, 8},
                                                    {"int32", "<i4", dlpack::kInteger, 32}}};
enum Element : std::size_t { kFloat32, kFloat16, kBfloat16, kUint8, kInt32 };

std::size_t bytes_of(Element element) { return kElementTypes[element].bits / 8; }

Element element_named(const std::string& name) {
  for (std::size_t i = 0; i < kElementTypes.size(); ++i)
    if (name == kElementTypes[i].name) return Element(i);
  throw py::type_error(
      text("Arrays on a GPU must be of float32, float16, bfloat16, uint8 or int32. "
           "Received: dtype=",
           name));
}

cuda::DataType data_type(Element element) {
  return element == kFloat32   ? cuda::DataType::float32
         : element == kFloat16 ? cuda::DataType::float16
                               : cuda::DataType::bfloat16;
}

// --- arrays ---------------------------------------------------------------------------------------

bool interpreter_ends() {
#if PY_VERSION_HEX >= 0x030D0000
  return !Py_IsInitialized() || Py_IsFinalizing();
#else
  return !Py_IsInitialized() || _Py_IsFinalizing();
#endif
}

// To be let go by any thread, with the GIL or without it: a consumer of DLPack may free what it took in a
// thread of its own. At the interpreter's end such a thread would wait for ever: the object is left.
std::shared_ptr<void> python_owner(const py::object& object) {
  return {object.inc_ref().ptr(), [](void* pointer) {
            if (interpreter_ends() && (!Py_IsInitialized() || !PyGILState_Check())) return;
            const PyGILState_STATE state = PyGILState_Ensure();
            Py_DECREF(static_cast<PyObject*>(pointer));
            PyGILState_Release(state);
          }};
}

// What keeps the current stream alive; null where it is a mere handle. Called with the GIL.
std::shared_ptr<void> owner_of_stream() {
  if (t_stream_object == nullptr) return nullptr;
  return python_owner(py::reinterpret_borrow<py::object>(t_stream_object));
}

class DeviceArray {
 public:
  const Library* library = nullptr;
  int device = 0;
  void* stream = nullptr;              // in whose order it is written
  std::shared_ptr<void> stream_owner;  // before `memory`, which goes back in the stream's order
  Element element = kFloat32;
  std::vector<int64_t> shape;
  void* data = nullptr;
  bool read_only = false;
  std::shared_ptr<Memory> memory;  // ours; else
  std::shared_ptr<void> owner;     // what keeps the memory of another library
  // Of what another library hands over to one call: its own stream, where it says which.
  std::optional<void*> producer;
  bool anywhere = false;  // empty, and nobody knows of which device

  std::size_t size() const {
    std::size_t count = 1;
    for (int64_t extent : shape) count *= static_cast<std::size_t>(extent);
    return count;
  }
  std::size_t bytes() const { return size() * bytes_of(element); }
};

using ArrayPointer = std::shared_ptr<DeviceArray>;

// On the current stream.
template <class Shape>
ArrayPointer new_array(const Library& library, int device,
                       const std::shared_ptr<void>& stream_owner, Element element,
                       const Shape& shape) {
  auto array = std::make_shared<DeviceArray>();
  array->library = &library;
  array->device = device;
  array->stream = t_stream;
  array->stream_owner = stream_owner;
  array->element = element;
  array->shape.assign(shape.begin(), shape.end());
  array->memory = std::make_shared<Memory>(library, device, t_stream, array->bytes());
  array->data = array->memory->data();
  return array;
}

// Memory of others that the device still reads, with the point at which the stream has. Under a
// mutex, for Pythons without a GIL.
struct Held {
  const Library* library;
  int device;
  void* stream;
  void* point;
  std::shared_ptr<void> stream_owner;         // before the owners: an array of ours that went out
  std::vector<std::shared_ptr<void>> owners;  // by DLPack still records its end there
};

std::mutex held_mutex;

std::vector<Held>& held() {
  static auto* const all = new std::vector<Held>;  // outlives the interpreter
  return *all;
}

void release_held() {
  std::vector<Held> done;
  std::vector<const void*> busy;  // streams: what comes later in one of these is not done either
  const std::unique_lock lock(held_mutex, std::try_to_lock);
  if (!lock) return;  // another thread is at it
  std::erase_if(held(), [&](Held& one) {
    if (std::find(busy.begin(), busy.end(), one.stream) != busy.end()) return false;
    bool happened = true;
    // An error of the device's counts as the end: it will be heard of by who waits.
    if (one.library->has_happened(one.device, one.point, &happened) == cuda::Status::success &&
        !happened) {
      busy.push_back(one.stream);
      return false;
    }
    one.library->forget(one.device, one.point);
    done.push_back(std::move(one));
    return true;
  });
  // Owners are let go here, behind the loop: that may call Python, and Python us.
}

// The stream has been given work that reads or writes the arrays, which are all of the device.
void note_use(const std::vector<ArrayPointer>& arrays, int device, void* stream) {
  std::vector<std::shared_ptr<void>> owners;
  for (const ArrayPointer& array : arrays) {
    if (array->memory)
      array->memory->note_use(stream);
    else
      owners.push_back(array->owner);
  }
  if (owners.empty()) return;
  const Library& library = *arrays.front()->library;
  Held one{&library, device, stream, nullptr, owner_of_stream(), std::move(owners)};
  cuda::check(library, library.record(device, stream, &one.point));
  const std::lock_guard lock(held_mutex);
  held().push_back(std::move(one));
}

// --- from other libraries -------------------------------------------------------------------------

std::string type_name(py::handle object) {
  return python_text(py::type::handle_of(object).attr("__name__"));
}

void require_dense(const DeviceArray& array, const std::vector<int64_t>& strides,
                   const char* name) {
  int64_t expected = 1;
  for (std::size_t i = array.shape.size(); i-- > 0;) {
    if (array.shape[i] > 1 && strides[i] != expected && array.size() > 0) {
      throw InvalidArgument(text("`", name, "` on a GPU must be C-contiguous. Received: ", name,
                                 " of shape ", python_text(py::tuple(py::cast(array.shape))),
                                 " with strides of ", python_text(py::tuple(py::cast(strides))),
                                 " elements"));
    }
    expected *= array.shape[i];
  }
}

ArrayPointer import_tensor(const dlpack::Tensor& tensor, std::shared_ptr<void> owner,
                           bool read_only, const char* name) {
  if (tensor.device.type != dlpack::kCuda && tensor.device.type != dlpack::kCudaManaged) {
    throw py::type_error(text("`", name, "` must be on a CUDA device. Received: ", name,
                              " on a device of DLPack's type ", tensor.device.type));
  }
  auto array = std::make_shared<DeviceArray>();
  array->library = &cuda::library();
  array->device = tensor.device.id;
  array->stream = t_stream;
  array->stream_owner = owner_of_stream();
  array->owner = std::move(owner);
  array->read_only = read_only;
  const auto* const type =
      std::find_if(kElementTypes.begin(), kElementTypes.end(), [&](const ElementType& known) {
        return known.code == tensor.dtype.code && known.bits == tensor.dtype.bits &&
               tensor.dtype.lanes == 1;
      });
  if (type == kElementTypes.end()) {
    throw py::type_error(text("`", name, "` must be of float32, float16 or bfloat16. Received: ",
                              name, " with DLPack's type code ", int{tensor.dtype.code}, ", ",
                              int{tensor.dtype.bits}, " bits"));
  }
  array->element = Element(type - kElementTypes.begin());
  array->shape.assign(tensor.shape, tensor.shape + tensor.ndim);
  array->data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  if (tensor.strides != nullptr)
    require_dense(*array, {tensor.strides, tensor.strides + tensor.ndim}, name);
  return array;
}

// Gives the memory back when nobody has the array.
template <class Managed>
ArrayPointer import_managed(Managed* managed, const char* name) {
  std::shared_ptr<void> owner(managed, [](void* pointer) {
    auto* const given = static_cast<Managed*>(pointer);
    if (given->deleter != nullptr) given->deleter(given);
  });
  bool read_only = false;
  if constexpr (requires { managed->flags; }) {
    if (managed->version.major != 1) {
      throw InvalidArgument(
          text("DLPack's version must be 0 or 1. Received: version ", managed->version.major));
    }
    read_only = (managed->flags & 1) != 0;
  }
  return import_tensor(managed->tensor, std::move(owner), read_only, name);
}

template <class Managed>
ArrayPointer import_capsule(PyObject* capsule, const char* capsule_name, const char* used_name,
                            const char* name) {
  auto* const managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, capsule_name));
  if (managed == nullptr) throw py::error_already_set();
  // From here on the memory is ours to give back.
  if (PyCapsule_SetName(capsule, used_name) != 0) throw py::error_already_set();
  return import_managed(managed, name);
}

ArrayPointer import_dlpack(const py::object& object, const char* name) {
  const py::object capsule =
      object.attr("__dlpack__")(py::arg("stream") = handle_of_stream(t_stream));
  if (PyCapsule_IsValid(capsule.ptr(), dlpack::kVersionedName)) {
    return import_capsule<dlpack::VersionedTensor>(capsule.ptr(), dlpack::kVersionedName,
                                                   dlpack::kUsedVersionedName, name);
  }
  return import_capsule<dlpack::ManagedTensor>(capsule.ptr(), dlpack::kName, dlpack::kUsedName,
                                               name);
}

ArrayPointer import_interface(const py::object& object, const py::dict& interface,
                              const char* name) {
  const auto [address, read_only] = interface["data"].cast<std::pair<std::uintptr_t, bool>>();
  auto array = std::make_shared<DeviceArray>();
  array->library = &cuda::library();
  array->data = reinterpret_cast<void*>(address);
  array->read_only = read_only;
  array->shape = interface["shape"].cast<std::vector<int64_t>>();
  array->owner = python_owner(object);
  array->stream = t_stream;
  array->stream_owner = owner_of_stream();
  const std::string typestr = interface["typestr"].cast<std::string>();
  const auto* const type =
      std::find_if(kElementTypes.begin(), kElementTypes.end(), [&](const ElementType& known) {
        return known.interface != nullptr && typestr == known.interface;
      });
  if (type == kElementTypes.end()) {
    throw py::type_error(text("`", name, "` must be of float32, float16 or bfloat16. Received: ",
                              name, " with typestr '", typestr, "'"));
  }
  array->element = Element(type - kElementTypes.begin());
  if (interface.contains("strides") && !interface["strides"].is_none()) {
    auto strides = interface["strides"].cast<std::vector<int64_t>>();
    for (int64_t& stride : strides) stride /= static_cast<int64_t>(bytes_of(array->element));
    require_dense(*array, strides, name);
  }
  array->anywhere = array->size() == 0;
  if (!array->anywhere) {
    cuda::check(*array->library, array->library->device_of(array->data, &array->device));
    if (array->device < 0) {
      throw InvalidArgument(
          text("`", name, "` must be on a CUDA device. Received: ", name, " whose memory is not"));
    }
  }
  if (interface.contains("stream") && !interface["stream"].is_none()) {
    array->producer = stream_of_handle(interface["stream"].cast<std::uintptr_t>());
    cuda::check(*array->library, array->library->order(array->device, *array->producer, t_stream));
  }
  return array;
}

// The C functions of the object's type, where it has those of a version that we know.
const dlpack::Exchange* exchange_of(const py::object& object) {
  const auto type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  PyObject* const attribute = PyObject_GetAttrString(type, dlpack::kExchangeAttribute);
  if (attribute == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  const auto capsule = py::reinterpret_steal<py::object>(attribute);
  if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kExchangeName)) return nullptr;
  // It lives as long as the type.
  const auto* found = static_cast<const dlpack::Exchange*>(
      PyCapsule_GetPointer(capsule.ptr(), dlpack::kExchangeName));
  while (found != nullptr && found->version.major != 1) found = found->previous;
  if (found == nullptr || found->managed_from_object == nullptr ||
      found->tensor_from_object == nullptr || found->current_stream == nullptr)
    return nullptr;
  // PyTorch's own method refuses what needs a gradient, and says so.
  if (py::getattr(object, "requires_grad", py::bool_(false)).cast<bool>()) return nullptr;
  return found;
}

// By those functions: a tenth of the time that a method in Python takes. Null: not on a CUDA device, or
// not to be had like that.
ArrayPointer import_by_exchange(const py::object& object, const char* name) {
  const dlpack::Exchange* const exchange = exchange_of(object);
  dlpack::Tensor seen{};
  if (exchange == nullptr) return nullptr;
  if (exchange->tensor_from_object(object.ptr(), &seen) != 0) {
    PyErr_Clear();
    return nullptr;
  }
  if (seen.device.type != dlpack::kCuda && seen.device.type != dlpack::kCudaManaged) return nullptr;
  void* producer = nullptr;
  dlpack::VersionedTensor* managed = nullptr;
  if (exchange->current_stream(seen.device.type, seen.device.id, &producer) != 0 ||
      exchange->managed_from_object(object.ptr(), &managed) != 0)
    throw py::error_already_set();
  ArrayPointer array = import_managed(managed, name);
  array->producer = producer;
  cuda::check(*array->library, array->library->order(array->device, producer, t_stream));
  return array;
}

bool is_dlpack_of_cuda(py::handle object) {
  if (!py::hasattr(object, "__dlpack_device__") || !py::hasattr(object, "__dlpack__")) return false;
  const auto device = object.attr("__dlpack_device__")().cast<std::pair<int, int>>();
  return device.first == dlpack::kCuda || device.first == dlpack::kCudaManaged;
}

bool is_device_array(const py::object& object) {
  if (py::isinstance<py::array>(object)) return false;  // at once: most are
  return py::isinstance<DeviceArray>(object) || is_dlpack_of_cuda(object) ||
         py::hasattr(object, "__cuda_array_interface__");
}

ArrayPointer import_array(const py::object& object, const char* name) {
  if (py::isinstance<DeviceArray>(object)) return object.cast<ArrayPointer>();
  if (ArrayPointer array = import_by_exchange(object, name)) return array;
  if (is_dlpack_of_cuda(object)) return import_dlpack(object, name);
  if (py::hasattr(object, "__cuda_array_interface__"))
    return import_interface(object, object.attr("__cuda_array_interface__"), name);
  throw py::type_error(text("`", name, "` must be an array on a CUDA device. Received: ", name,
                            " of type ", type_name(object)));
}

// One that stays: from now on it is of the current stream, and its producer's may end.
ArrayPointer import_to_stay(const py::object& object, const char* name) {
  ArrayPointer array = import_array(object, name);
  array->producer.reset();
  return array;
}

// --- to other libraries ---------------------------------------------------------------------------

// What a capsule keeps: the array, and the stream in whose order it is read.
template <class Managed>
struct Exported {
  Managed managed{};
  ArrayPointer array;
  void* consumer = nullptr;
};

template <class Managed>
void delete_exported(Managed* managed) {
  auto* const exported = static_cast<Exported<Managed>*>(managed->context);
  try {
    if (exported->array->memory) exported->array->memory->note_use(exported->consumer);
  } catch (...) {  // NOLINT(bugprone-empty-catch): as in Memory's destructor, nobody hears of it
  }
  delete exported;
}

template <class Managed>
py::capsule export_capsule(const ArrayPointer& array, void* consumer, const char* name) {
  auto exported = std::make_unique<Exported<Managed>>();
  exported->array = array;
  exported->consumer = consumer;
  const ElementType& type = kElementTypes[array->element];
  exported->managed.tensor = {array->data,
                              {dlpack::kCuda, array->device},
                              static_cast<std::int32_t>(array->shape.size()),
                              {type.code, type.bits, 1},
                              array->shape.data(),
                              nullptr,
                              0};
  exported->managed.context = exported.get();
  exported->managed.deleter = delete_exported<Managed>;
  if constexpr (requires { exported->managed.version; }) {
    exported->managed.version = {1, 0};
    exported->managed.flags = array->read_only ? 1 : 0;
  }
  py::capsule capsule(&exported->managed, name, [](PyObject* object) {
    // One that somebody has taken has another name.
    for (const char* own : {dlpack::kName, dlpack::kVersionedName}) {
      if (!PyCapsule_IsValid(object, own)) continue;
      auto* const managed = static_cast<Managed*>(PyCapsule_GetPointer(object, own));
      managed->deleter(managed);
    }
  });
  exported.release();
  return capsule;
}

py::capsule to_dlpack(const ArrayPointer& array, const py::object& stream,
                      const py::object& max_version, const py::object& device,
                      const py::object& copy) {
  if (!device.is_none() &&
      device.cast<std::pair<int, int>>() != std::pair<int, int>{dlpack::kCuda, array->device}) {
    throw py::buffer_error("An array on a GPU is handed over where it is. Received: dl_device=" +
                           python_text(device));
  }
  if (!copy.is_none() && copy.cast<bool>())
    throw py::buffer_error("An array on a GPU is handed over as it is. Received: copy=True");
  const int64_t handle = stream.is_none() ? 1 : stream.cast<int64_t>();
  if (handle == 0 || handle < -1) {
    throw InvalidArgument(text(
        "`stream` must be None, -1, 1, 2 or the handle of a stream. Received: stream=", handle));
  }
  void* consumer = array->stream;
  if (handle != -1) {
    consumer = stream_of_handle(static_cast<std::uintptr_t>(handle));
    cuda::check(*array->library, array->library->order(array->device, array->stream, consumer));
    // Another thread may let it go, whose default stream is another one. The legacy one waits for all.
    if (handle == kPerThread) consumer = nullptr;
  }
  if (!max_version.is_none() && max_version.cast<std::pair<int, int>>().first >= 1)
    return export_capsule<dlpack::VersionedTensor>(array, consumer, dlpack::kVersionedName);
  return export_capsule<dlpack::ManagedTensor>(array, consumer, dlpack::kName);
}

py::dict to_interface(const DeviceArray& array) {
  const ElementType& type = kElementTypes[array.element];
  if (type.interface == nullptr) {
    throw py::attribute_error(
        "__cuda_array_interface__ knows no bfloat16: hand the array over by DLPack");
  }
  return py::dict(py::arg("version") = 3, py::arg("shape") = py::tuple(py::cast(array.shape)),
                  py::arg("typestr") = type.interface,
                  py::arg("data") =
                      py::make_tuple(reinterpret_cast<std::uintptr_t>(array.data), array.read_only),
                  py::arg("strides") = py::none(),
                  py::arg("stream") = handle_of_stream(array.stream));
}

// --- from and to the host -------------------------------------------------------------------------

// NumPy's, or that of ml_dtypes for bfloat16; null where there is none.
py::object numpy_type(Element element) {
  if (element != kBfloat16) return py::dtype(kElementTypes[element].name);
  try {
    return py::module_::import("numpy").attr("dtype")(
        py::module_::import("ml_dtypes").attr("bfloat16"));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_ImportError)) throw;
    return py::object();
  }
}

py::object dtype_of(const DeviceArray& array) {
  const py::object type = numpy_type(array.element);
  return type ? type : py::str(kElementTypes[array.element].name);
}

// `array` is C-contiguous and holds elements of the type named.
ArrayPointer from_numpy(const py::array& array, const std::string& type, int device) {
  const Element element = element_named(type);
  if (static_cast<std::size_t>(array.itemsize()) != bytes_of(element) ||
      (array.flags() & py::array::c_style) == 0) {
    throw InvalidArgument("`array` must be C-contiguous and of the type named. Received: " +
                          python_text(array.dtype()) + " for " + type);
  }
  release_held();
  const std::vector<int64_t> shape(array.shape(), array.shape() + array.ndim());
  const void* const data = array.data();
  const std::shared_ptr<void> stream_owner = owner_of_stream();  // goes back with the GIL
  ArrayPointer made;
  {
    const GilReleased unlocked;
    const Library& library = cuda::library();
    made = new_array(library, device, stream_owner, element, shape);
    cuda::check(library, library.copy_from_host(device, t_stream, made->data, data, made->bytes()));
  }
  return made;
}

py::array to_numpy(const DeviceArray& array) {
  py::object type = numpy_type(array.element);
  if (!type) type = py::dtype("uint16");  // the bits
  py::array host(py::reinterpret_borrow<py::dtype>(type), array.shape);
  void* const data = host.mutable_data();
  {
    const GilReleased unlocked;
    cuda::check(*array.library, array.library->copy_to_host(array.device, array.stream, data,
                                                            array.data, array.bytes()));
  }
  return host;
}

std::string representation(const DeviceArray& array) {
  return text("DeviceArray(shape=", python_text(py::tuple(py::cast(array.shape))),
              ", dtype=", kElementTypes[array.element].name, ", device=", array.device, ")");
}

// --- operations -----------------------------------------------------------------------------------

template <std::size_t Rank>
void require_shape(const DeviceArray& array, const char* name,
                   const std::array<int64_t, Rank>& expected) {
  if (std::equal(array.shape.begin(), array.shape.end(), expected.begin(), expected.end())) return;
  throw InvalidArgument(text("`", name, "` must have shape ",
                             python_text(py::tuple(py::cast(expected))), ". Received: ", name,
                             ".shape=", python_text(py::tuple(py::cast(array.shape)))));
}

Shape shape_of(const DeviceArray& array, const char* name) {
  if (array.shape.size() == 4)
    return {array.shape[0], array.shape[1], array.shape[2], array.shape[3]};
  throw InvalidArgument(text("`", name, "` must have 4 dimensions. Received: ", name,
                             ".shape=", python_text(py::tuple(py::cast(array.shape)))));
}

// The arrays of one call, all of one device, on the current stream.
class Arrays {
 public:
  Arrays() { release_held(); }

  // An input of the type of the first one.
  const DeviceArray& floats(const py::object& object, const char* name) {
    const DeviceArray& array = add(object, name);
    const DeviceArray& first = *all_.front();
    if (array.element > kBfloat16) {
      throw py::type_error(text("`", name, "` must have dtype float32, float16 or bfloat16. ",
                                "Received: ", name, ".dtype=", kElementTypes[array.element].name));
    }
    if (array.element != first.element) {
      throw py::type_error(text("All arrays must have the dtype of the first, ",
                                kElementTypes[first.element].name, ". Received: ", name,
                                ".dtype=", kElementTypes[array.element].name));
    }
    return array;
  }
  template <std::size_t Rank>
  const DeviceArray& floats(const py::object& object, const char* name,
                            const std::array<int64_t, Rank>& shape) {
    const DeviceArray& array = floats(object, name);
    require_shape(array, name, shape);
    return array;
  }
  template <std::size_t Rank>
  const void* optional(const py::object& object, const char* name,
                       const std::array<int64_t, Rank>& shape) {
    return object.is_none() ? nullptr : floats(object, name, shape).data;
  }
  const DeviceArray& argmax(const py::object& object, const Pool2dProblem& problem) {
    const DeviceArray& array = add(object, "argmax");
    const Element expected = problem.argmax_fits_byte() ? kUint8 : kInt32;
    if (array.element != expected) {
      throw py::type_error(text("`argmax` must have dtype ", kElementTypes[expected].name,
                                " with a window of ", problem.r, " x ", problem.s,
                                ". Received: argmax.dtype=", kElementTypes[array.element].name));
    }
    require_shape(array, "argmax", problem.y_shape());
    return array;
  }

  // Where a result goes: `out`, checked, or a new array where it is None.
  template <std::size_t Rank>
  ArrayPointer result(const py::object& out, const std::array<int64_t, Rank>& shape) {
    if (out.is_none()) return result(all_.front()->element, shape);
    const std::vector<ArrayPointer> inputs = all_;
    const DeviceArray& array = floats(out, "out", shape);
    if (array.read_only)
      throw InvalidArgument("`out` must be writeable. Received: out that is read-only");
    const auto begin = [](const DeviceArray& a) { return static_cast<const char*>(a.data); };
    for (const ArrayPointer& input : inputs) {
      if (begin(array) < begin(*input) + input->bytes() &&
          begin(*input) < begin(array) + array.bytes()) {
        throw InvalidArgument("`out` must not share memory with an input. Received: out that does");
      }
    }
    readers_.push_back(array.stream);
    if (array.producer) readers_.push_back(*array.producer);
    return all_.back();
  }
  template <std::size_t Rank>
  ArrayPointer result(Element element, const std::array<int64_t, Rank>& shape) {
    const DeviceArray& first = *all_.front();
    results_.push_back(new_array(*first.library, device(), owner_of_stream(), element, shape));
    return results_.back();
  }

  const Library& library() const { return *all_.front()->library; }
  int device() const {
    const auto found = std::find_if(all_.begin(), all_.end(), is_somewhere);
    return found == all_.end() ? 0 : (*found)->device;
  }
  cuda::DataType type() const { return data_type(all_.front()->element); }

  // Runs enqueue() behind what the arrays wait for, without the GIL, and notes what it uses. What reads
  // `out` in its own stream's order finds the result.
  template <class Enqueue>
  void run(const Enqueue& enqueue) {
    try {
      const GilReleased unlocked;
      for (const ArrayPointer& array : all_) {
        cuda::check(library(), library().order(device(), array->stream, stream));
      }
      enqueue();
      for (void* reader : readers_)
        cuda::check(library(), library().order(device(), stream, reader));
    } catch (...) {
      // Some of it may run all the same. The first error is the one to hear of.
      try {
        note_use(all_, device(), stream);
      } catch (...) {  // NOLINT(bugprone-empty-catch)
      }
      throw;
    }
    note_use(all_, device(), stream);
  }

  void* const stream = t_stream;

 private:
  static bool is_somewhere(const ArrayPointer& array) { return !array->anywhere; }

  const DeviceArray& add(const py::object& object, const char* name) {
    ArrayPointer array = import_array(object, name);
    const bool alone = array->anywhere || std::none_of(all_.begin(), all_.end(), is_somewhere);
    if ((!alone && array->device != device()) ||
        (!all_.empty() && array->library != all_.front()->library)) {
      throw InvalidArgument(text("All arrays must be on one device. Received: ", name,
                                 " on device ", array->device, ", the first array on device ",
                                 device()));
    }
    all_.push_back(std::move(array));
    return *all_.back();
  }

  std::vector<ArrayPointer> all_;
  std::vector<ArrayPointer> results_;
  std::vector<void*> readers_;  // streams in whose order `out` is read
};

const void* output_data(Arrays& arrays, const Conv2dProblem& problem, const py::object& output) {
  if (problem.activation == Activation::relu && output.is_none()) {
    throw InvalidArgument(
        "`output`, the result of conv2d, is required with activation='relu'. "
        "Received: output=None");
  }
  return arrays.optional(output, "output", problem.y_shape());
}

cuda::Conv2dCall conv2d_call(const Arrays& arrays, const Conv2dProblem& problem,
                             Direction direction, const Conv2dOptions& options) {
  cuda::Conv2dCall call;
  call.problem = problem;
  call.direction = direction;
  call.type = arrays.type();
  call.math = cuda::float32_math();
  call.algorithm = options.algorithm_name();
  return call;
}

void enqueue(Arrays& arrays, const cuda::Conv2dCall& call) {
  arrays.run([&] { cuda::conv2d(arrays.library(), arrays.device(), arrays.stream, call); });
}

void enqueue(Arrays& arrays, cuda::Pool2dCall& call) {
  call.type = arrays.type();
  arrays.run([&] {
    cuda::check(arrays.library(), arrays.library().pool2d(arrays.device(), arrays.stream, &call));
  });
}

void enqueue(Arrays& arrays, const cuda::Conv2dPoolCall& call) {
  arrays.run([&] { cuda::conv2d_pool(arrays.library(), arrays.device(), arrays.stream, call); });
}

cuda::Conv2dPoolCall conv2d_pool_call(const Arrays& arrays, const Conv2dProblem& problem,
                                      const Conv2dOptions& options) {
  cuda::Conv2dPoolCall call;
  call.problem = problem;
  call.type = arrays.type();
  call.math = cuda::float32_math();
  call.algorithm = options.algorithm_name();
  return call;
}

struct OnDevice {
  static ArrayPointer conv2d(const py::object& x_object, const py::object& w_object,
                             const py::object& bias, const Conv2dOptions& options,
                             const py::object& out) {
    Arrays arrays;
    const DeviceArray& x = arrays.floats(x_object, "x");
    const DeviceArray& w = arrays.floats(w_object, "w");
    const Conv2dProblem problem = options.problem(shape_of(x, "x"), shape_of(w, "w"));
    cuda::Conv2dCall call = conv2d_call(arrays, problem, Direction::fprop, options);
    call.x = x.data;
    call.filter = w.data;
    call.bias = arrays.optional(bias, "bias", std::array{problem.k});
    const ArrayPointer y = arrays.result(out, problem.y_shape());
    call.out = y->data;
    enqueue(arrays, call);
    return y;
  }

  static ArrayPointer conv2d_grad_input(const py::object& dy, const py::object& w_object,
                                        const Shape& input_shape, const py::object& output,
                                        const Conv2dOptions& options, const py::object& out) {
    Arrays arrays;
    const DeviceArray& gradient = arrays.floats(dy, "dy");
    const DeviceArray& w = arrays.floats(w_object, "w");
    const Conv2dProblem problem = options.problem(input_shape, shape_of(w, "w"), "input_shape");
    require_shape(gradient, "dy", problem.y_shape());
    cuda::Conv2dCall call = conv2d_call(arrays, problem, Direction::dgrad, options);
    call.dy = gradient.data;
    call.filter = w.data;
    call.y = output_data(arrays, problem, output);
    const ArrayPointer dx = arrays.result(out, problem.x_shape());
    call.out = dx->data;
    enqueue(arrays, call);
    return dx;
  }

  static py::object conv2d_grad_filter(const py::object& x_object, const py::object& dy,
                                       const Shape& filter_shape, const py::object& output,
                                       bool return_bias_grad, const Conv2dOptions& options,
                                       const py::object& out) {
    Arrays arrays;
    const DeviceArray& x = arrays.floats(x_object, "x");
    const Conv2dProblem problem =
        options.problem(shape_of(x, "x"), filter_shape, "x.shape", "filter_shape");
    cuda::Conv2dCall call = conv2d_call(arrays, problem, Direction::wgrad, options);
    call.x = x.data;
    call.dy = arrays.floats(dy, "dy", problem.y_shape()).data;
    call.y = output_data(arrays, problem, output);
    const ArrayPointer dw = arrays.result(out, problem.filter_shape());
    call.out = dw->data;
    ArrayPointer dbias;
    if (return_bias_grad) {
      dbias = arrays.result(dw->element, std::array{problem.k});
      call.dbias = dbias->data;
    }
    enqueue(arrays, call);
    if (!dbias) return py::cast(dw);
    return py::make_tuple(dw, dbias);
  }

  static py::object max_pool2d(const py::object& x_object, bool return_argmax,
                               const Pool2dOptions& options, const py::object& out) {
    Arrays arrays;
    const DeviceArray& x = arrays.floats(x_object, "x");
    cuda::Pool2dCall call;
    call.problem = options.problem(shape_of(x, "x"));
    call.in = x.data;
    const ArrayPointer y = arrays.result(out, call.problem.y_shape());
    call.out = y->data;
    ArrayPointer argmax;
    if (return_argmax) {
      argmax =
          arrays.result(call.problem.argmax_fits_byte() ? kUint8 : kInt32, call.problem.y_shape());
      call.argmax = argmax->data;
    }
    enqueue(arrays, call);
    if (!argmax) return py::cast(y);
    return py::make_tuple(y, argmax);
  }

  static ArrayPointer max_pool2d_grad(const py::object& dy, const py::object& argmax,
                                      const Shape& input_shape, const Pool2dOptions& options,
                                      const py::object& out) {
    Arrays arrays;
    cuda::Pool2dCall call;
    call.problem = options.problem(input_shape, "input_shape");
    call.backward = true;
    call.in = arrays.floats(dy, "dy", call.problem.y_shape()).data;
    call.argmax = arrays.argmax(argmax, call.problem).data;
    const ArrayPointer dx = arrays.result(out, call.problem.x_shape());
    call.out = dx->data;
    enqueue(arrays, call);
    return dx;
  }

  static ArrayPointer avg_pool2d(const py::object& x_object, const Pool2dOptions& options,
                                 const py::object& out) {
    Arrays arrays;
    const DeviceArray& x = arrays.floats(x_object, "x");
    cuda::Pool2dCall call;
    call.problem = options.problem(shape_of(x, "x"));
    call.pooling = cuda::Pooling::average;
    call.in = x.data;
    const ArrayPointer y = arrays.result(out, call.problem.y_shape());
    call.out = y->data;
    enqueue(arrays, call);
    return y;
  }

  static ArrayPointer avg_pool2d_grad(const py::object& dy, const Shape& input_shape,
                                      const Pool2dOptions& options, const py::object& out) {
    Arrays arrays;
    cuda::Pool2dCall call;
    call.problem = options.problem(input_shape, "input_shape");
    call.pooling = cuda::Pooling::average;
    call.backward = true;
    call.in = arrays.floats(dy, "dy", call.problem.y_shape()).data;
    const ArrayPointer dx = arrays.result(out, call.problem.x_shape());
    call.out = dx->data;
    enqueue(arrays, call);
    return dx;
  }

  static py::object conv2d_max_pool2d(const py::object& x_object, const py::object& w_object,
                                      const py::object& bias, bool return_argmax,
                                      const Conv2dOptions& options, const py::object& out) {
    Arrays arrays;
    const DeviceArray& x = arrays.floats(x_object, "x");
    const DeviceArray& w = arrays.floats(w_object, "w");
    const Conv2dProblem problem = options.problem(shape_of(x, "x"), shape_of(w, "w"));
    const Pool2dProblem pool = pool_behind(problem);
    cuda::Conv2dPoolCall call = conv2d_pool_call(arrays, problem, options);
    call.x = x.data;
    call.filter = w.data;
    call.bias = arrays.optional(bias, "bias", std::array{problem.k});
    const ArrayPointer y = arrays.result(out, pool.y_shape());
    call.y = y->data;
    ArrayPointer argmax;
    if (return_argmax) {
      argmax = arrays.result(kUint8, pool.y_shape());
      call.argmax = argmax->data;
    }
    enqueue(arrays, call);
    if (!argmax) return py::cast(y);
    return py::make_tuple(y, argmax);
  }

  static py::tuple conv2d_max_pool2d_grad(const py::object& x_object, const py::object& w_object,
                                          const py::object& dy, const py::object& output,
                                          const py::object& argmax, bool with_input_grad,
                                          const Conv2dOptions& options) {
    Arrays arrays;
    const DeviceArray& x = arrays.floats(x_object, "x");
    const DeviceArray& w = arrays.floats(w_object, "w");
    const Conv2dProblem problem = options.problem(shape_of(x, "x"), shape_of(w, "w"));
    const Pool2dProblem pool = pool_behind(problem);
    cuda::Conv2dPoolCall call = conv2d_pool_call(arrays, problem, options);
    call.backward = true;
    call.x = x.data;
    call.filter = w.data;
    call.dy = arrays.floats(dy, "dy", pool.y_shape()).data;
    call.y = arrays.floats(output, "output", pool.y_shape()).data;
    call.argmax = arrays.argmax(argmax, pool).data;
    ArrayPointer dx;
    if (with_input_grad) {
      dx = arrays.result(x.element, problem.x_shape());
      call.dx = dx->data;
    }
    const ArrayPointer dw = arrays.result(x.element, problem.filter_shape());
    const ArrayPointer dbias = arrays.result(x.element, std::array{problem.k});
    call.dfilter = dw->data;
    call.dbias = dbias->data;
    enqueue(arrays, call);
    return py::make_tuple(dx ? py::cast(dx) : py::object(py::none()), dw, dbias);
  }
};

// --- module ---------------------------------------------------------------------------------------

std::string version_text(int version) {
  return version == 0 ? "" : text(version / 1000, ".", version % 1000 / 10);
}

py::dict availability() {
  const cuda::Availability facts = [] {
    const GilReleased unlocked;
    return cuda::availability();
  }();
  py::list devices;
  for (const cuda::DeviceDescription& device : facts.devices) {
    devices.append(
        py::dict(py::arg("name") = device.name,
                 py::arg("compute_capability") =
                     text(device.compute_capability / 10, ".", device.compute_capability % 10),
                 py::arg("multiprocessors") = device.multiprocessors,
                 py::arg("memory_bytes") = device.memory_bytes));
  }
  py::dict answer(py::arg("available") = facts.available);
  if (!facts.available) answer["reason"] = facts.reason;
  if (!facts.library.empty()) {
    answer["library"] = facts.library;
    answer["runtime"] = version_text(facts.runtime_version);
    answer["driver"] = version_text(facts.driver_version);
    answer["devices"] = devices;
  }
  return answer;
}

// What explain() of fastconv.cuda returns: the algorithms that serve the problem, the chosen first.
py::list candidates(const Shape& input_shape, const Shape& filter_shape,
                    const std::string& direction, const std::string& type, int device, Pair strides,
                    PaddingOption padding, Pair dilation_rate, int64_t groups,
                    std::string activation, std::string data_format,
                    std::optional<std::string> algorithm) {
  const Conv2dOptions options{strides,
                              std::move(padding),
                              dilation_rate,
                              groups,
                              std::move(activation),
                              std::move(data_format),
                              std::move(algorithm)};
  cuda::Conv2dCall call;
  call.problem = options.problem(input_shape, filter_shape, "input_shape", "filter_shape");
  call.direction = parse_direction(direction);
  const Element element = element_named(type);
  if (element > kBfloat16)
    throw py::type_error("`dtype` must be float32, float16 or bfloat16. Received: dtype=" + type);
  call.type = data_type(element);
  call.math = cuda::float32_math();
  call.algorithm = options.algorithm_name();
  py::list all;
  const Library& library = cuda::library();
  cuda::check(library, library.conv2d_candidates(
                           device, &call,
                           [](void* context, const char* name, const char* blocking,
                              std::uint64_t workspace, double seconds) {
                             static_cast<py::list*>(context)->append(py::dict(
                                 py::arg("algorithm") = name, py::arg("blocking") = blocking,
                                 py::arg("workspace_bytes") = workspace,
                                 py::arg("predicted_seconds") = seconds));
                           },
                           &all));
  return all;
}

// Returns what was set before: the handle and the object, or None.
py::tuple set_stream(std::uintptr_t handle, const py::object& object) {
  py::object before = py::none();
  if (t_stream_object != nullptr) before = py::reinterpret_borrow<py::object>(t_stream_object);
  py::tuple answer = py::make_tuple(handle_of_stream(t_stream), std::move(before));
  t_stream = stream_of_handle(handle);
  t_stream_object = object.is_none() ? nullptr : object.ptr();
  return answer;
}

std::uintptr_t create_stream(int device) {
  void* stream = nullptr;
  cuda::check(cuda::library(), cuda::library().create_stream(device, &stream));
  return handle_of_stream(stream);
}

void destroy_stream(int device, std::uintptr_t handle) {
  const GilReleased unlocked;
  cuda::check(cuda::library(), cuda::library().destroy_stream(device, stream_of_handle(handle)));
}

void wait(int device, std::uintptr_t handle) {
  {
    const GilReleased unlocked;
    cuda::check(cuda::library(), cuda::library().wait(device, stream_of_handle(handle)));
  }
  release_held();
}

}  // namespace

void define_cuda(py::module_& m) {
  py::register_exception<cuda::CudaError>(m, "CudaError", PyExc_RuntimeError);

  py::class_<DeviceArray, ArrayPointer>(
      m, "DeviceArray",
      "A dense array in the memory of a GPU: what the functions of fastconv.cuda return. Other\n"
      "libraries take it by DLPack (``torch.from_dlpack``, ``cupy.from_dlpack``,\n"
      "``jax.dlpack.from_dlpack``) or ``__cuda_array_interface__``, without a copy. A stream that\n"
      "``__dlpack__`` is given must be there as long as what has been made of the array.")
      .def_property_readonly(
          "shape", [](const DeviceArray& a) { return py::tuple(py::cast(a.shape)); },
          "Extent of each dimension.")
      .def_property_readonly(
          "ndim", [](const DeviceArray& a) { return a.shape.size(); }, "Number of dimensions.")
      .def_property_readonly("size", &DeviceArray::size, "Number of elements.")
      .def_property_readonly("nbytes", &DeviceArray::bytes, "Bytes of memory.")
      .def_property_readonly(
          "dtype", &dtype_of,
          "NumPy's dtype; that of ml_dtypes for bfloat16, or its name where that is not installed.")
      .def_readonly("device", &DeviceArray::device, "Number of the device.")
      .def_property_readonly(
          "stream", [](const DeviceArray& a) { return handle_of_stream(a.stream); },
          "Handle of the stream in whose order the array is written.")
      .def_property_readonly(
          "pointer", [](const DeviceArray& a) { return reinterpret_cast<std::uintptr_t>(a.data); },
          "Address on the device.")
      .def("numpy", &to_numpy,
           "A copy as a NumPy array, when what computes it is done. bfloat16 becomes ml_dtypes'\n"
           "type, or uint16 that holds the bits where ml_dtypes is not installed.")
      .def("__array__",
           [](const py::args&, const py::kwargs&) -> py::object {
             throw py::type_error("An array on a GPU is copied to the host by its method numpy()");
           })
      .def("__dlpack__", &to_dlpack, py::kw_only(), py::arg("stream") = py::none(),
           py::arg("max_version") = py::none(), py::arg("dl_device") = py::none(),
           py::arg("copy") = py::none())
      .def("__dlpack_device__",
           [](const DeviceArray& a) { return py::make_tuple(int{dlpack::kCuda}, a.device); })
      .def_property_readonly("__cuda_array_interface__", &to_interface)
      .def("__repr__", &representation);

  define_operations<OnDevice>(m);
  m.def("is_device_array", &is_device_array, py::arg("object"));
  m.def("import_array", &import_to_stay, py::arg("object"), py::arg("name"));
  m.def("from_numpy", &from_numpy, py::arg("array"), py::arg("type"), py::arg("device"));
  m.def("availability", &availability);
  m.def("use_library", &cuda::use_library, py::arg("path"));
  m.def("candidates", &candidates, py::arg("input_shape"), py::arg("filter_shape"),
        py::arg("direction"), py::arg("type"), py::arg("device"), py::arg("strides"),
        py::arg("padding"), py::arg("dilation_rate"), py::arg("groups"), py::arg("activation"),
        py::arg("data_format"), py::arg("algorithm"));
  m.def(
      "set_float32_math",
      [](const std::string& math) {
        using cuda::Float32Math;
        cuda::set_float32_math(parse<Float32Math, 2>(
            "math", math, {{{"ieee", Float32Math::ieee}, {"tf32", Float32Math::tf32}}}));
      },
      py::arg("math"));
  m.def("float32_math",
        [] { return cuda::float32_math() == cuda::Float32Math::ieee ? "ieee" : "tf32"; });
  m.def("set_stream", &set_stream, py::arg("handle"), py::arg("object"));
  m.def("stream", [] { return handle_of_stream(t_stream); });
  m.def("create_stream", &create_stream, py::arg("device"));
  m.def("destroy_stream", &destroy_stream, py::arg("device"), py::arg("handle"));
  m.def("wait", &wait, py::arg("device"), py::arg("handle"));
}

}  // namespace fastconv::python
