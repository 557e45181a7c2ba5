// The structs of DLPack, by which array libraries hand memory to one another, as of its versions 0.8
// and 1.0 (https://dmlc.github.io/dlpack): declared here, so that building needs no other headers.
#pragma once

#include <cstdint>

namespace fastconv::python::dlpack {

enum DeviceType : std::int32_t { kCuda = 2, kCudaManaged = 13 };
enum TypeCode : std::uint8_t { kInteger = 0, kUnsigned = 1, kFloat = 2, kBfloat = 4 };

struct Device {
  std::int32_t type;
  std::int32_t id;
};

struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null: dense
  std::uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

struct Version {
  std::uint32_t major, minor;
};

struct VersionedTensor {
  Version version;
  void* context;
  void (*deleter)(VersionedTensor*);
  std::uint64_t flags;  // bit 0: read-only
  Tensor tensor;
};

inline constexpr const char* kName = "dltensor";
inline constexpr const char* kUsedName = "used_dltensor";
inline constexpr const char* kVersionedName = "dltensor_versioned";
inline constexpr const char* kUsedVersionedName = "used_dltensor_versioned";

// The exchange API (DLPack 1.2): C functions of a type, found in an attribute of the type, instead of
// Python methods of its objects. They return 0, or -1 with a Python exception set, and order nothing:
// the consumer asks for the stream on which the producer works.
struct Exchange {
  Version version;
  const Exchange* previous;  // of an older version
  void* allocate;
  int (*managed_from_object)(void* object, VersionedTensor** out);
  void* object_from_managed;
  int (*tensor_from_object)(void* object, Tensor* out);  // borrowed
  int (*current_stream)(std::int32_t device_type, std::int32_t device, void** out);
};
inline constexpr const char* kExchangeName = "dlpack_exchange_api";
inline constexpr const char* kExchangeAttribute = "__dlpack_c_exchange_api__";

}  // namespace fastconv::python::dlpack
