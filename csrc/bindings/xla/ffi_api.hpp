// The part of XLA's foreign function interface (FFI) that we use, declared here so that building
// needs no XLA. Its C structs begin with their size, and fields are only ever added at their ends,
// so minor version 1, which is declared here, can be read in every later one of major version 0.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastconv::xla {

struct Api;
struct Error;  // opaque

enum class ExtensionType : int { metadata = 1 };
struct Extension {
  std::size_t struct_size;
  ExtensionType type;
  Extension* next;
};

struct Version {
  std::size_t struct_size;
  Extension* extensions;
  int major_version;
  int minor_version;
};
inline constexpr int kMajorVersion = 0, kMinorVersion = 1;

// XLA asks a handler for it before the first execution, through an extension of the call frame.
struct Metadata {
  std::size_t struct_size;
  Version version;
  std::uint32_t traits;
};
struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

enum class ErrorCode : int { invalid_argument = 3, resource_exhausted = 8, internal = 13 };
struct ErrorCreateArguments {
  std::size_t struct_size;
  Extension* extensions;
  const char* message;
  ErrorCode code;
};
struct ErrorMessageArguments {
  std::size_t struct_size;
  Extension* extensions;
  Error* error;
  const char* message;  // out
};
struct ErrorDestroyArguments {
  std::size_t struct_size;
  Extension* extensions;
  Error* error;
};

enum class DataType : int {
  int8 = 2,
  int32 = 4,
  int64 = 5,
  uint8 = 6,
  float16 = 10,
  float32 = 11,
  bfloat16 = 16
};
struct Buffer {
  std::size_t struct_size;
  Extension* extensions;
  DataType type;
  void* data;
  std::int64_t rank;
  std::int64_t* dims;
};

struct Text {
  const char* data;  // not null-terminated
  std::size_t size;
};
struct Array {
  DataType type;
  std::size_t size;
  void* data;
};

enum class ArgumentType : int { buffer = 1 };  // of arguments and results
enum class AttributeType : int { array = 1, dictionary = 2, scalar = 3, string = 4 };
struct Buffers {
  std::size_t struct_size;
  Extension* extensions;
  std::int64_t size;
  ArgumentType* types;
  void** items;
};
struct AttributeList {
  std::size_t struct_size;
  Extension* extensions;
  std::int64_t size;
  AttributeType* types;
  Text** names;
  void** items;
};

struct CallFrame {
  std::size_t struct_size;
  Extension* extensions;
  const Api* api;
  void* context;
  int stage;
  Buffers arguments;
  Buffers results;
  AttributeList attributes;
};

using Handler = Error*(CallFrame*);
struct RegisterArguments {
  std::size_t struct_size;
  Extension* extensions;
  Text name;
  Text platform;
  struct {
    Handler *instantiate, *prepare, *initialize, *execute;
  } stages;
  std::uint32_t traits;
};

// The stream that a handler on a GPU is to work on.
struct StreamArguments {
  std::size_t struct_size;
  Extension* extensions;
  void* context;
  void* stream;  // out: a cudaStream_t
};

struct Api {
  std::size_t struct_size;
  Extension* extensions;
  Version version;
  const void* internal;
  Error* (*create_error)(ErrorCreateArguments*);
  void (*get_error_message)(ErrorMessageArguments*);
  void (*destroy_error)(ErrorDestroyArguments*);
  Error* (*register_handler)(RegisterArguments*);
  Error* (*get_stream)(StreamArguments*);
};

}  // namespace fastconv::xla
