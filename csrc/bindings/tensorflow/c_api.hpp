// The part of TensorFlow's C API that the op library calls, declared here so that building needs no
// TensorFlow, and resolved from the TensorFlow that this process has loaded. The C API's ABI is
// stable, so one binary serves every version of TensorFlow 2.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastconv::tensorflow {

// Opaque to us, as they are to every user of the C API.
struct TF_Status;
struct TF_Tensor;
struct TF_OpDefinitionBuilder;
struct TF_ShapeInferenceContext;
struct TF_ShapeHandle;
struct TF_KernelBuilder;
struct TF_OpKernelConstruction;
struct TF_OpKernelContext;

// Values of TF_DataType and TF_Code.
enum DataType : int { kFloat = 1, kInt32 = 3, kUint8 = 4, kInt8 = 6, kBfloat16 = 14, kHalf = 19 };
enum Code : int { kOk = 0, kInvalidArgument = 3, kResourceExhausted = 8, kInternal = 13 };

using ShapeFunction = void (*)(TF_ShapeInferenceContext*, TF_Status*);
using CreateFunction = void* (*)(TF_OpKernelConstruction*);
using ComputeFunction = void (*)(void*, TF_OpKernelContext*);
using DeleteFunction = void (*)(void*);

// FUNCTION(return type, name, parameters): read more than once below, which is why it is a macro.
#define FASTCONV_TENSORFLOW_C_API(FUNCTION)                                                        \
  FUNCTION(TF_Status*, TF_NewStatus, ())                                                           \
  FUNCTION(void, TF_DeleteStatus, (TF_Status*))                                                    \
  FUNCTION(void, TF_SetStatus, (TF_Status*, int code, const char* message))                        \
  FUNCTION(int, TF_GetCode, (const TF_Status*))                                                    \
  FUNCTION(const char*, TF_Message, (const TF_Status*))                                            \
  FUNCTION(void, TF_DeleteTensor, (TF_Tensor*))                                                    \
  FUNCTION(int, TF_TensorType, (const TF_Tensor*))                                                 \
  FUNCTION(int, TF_NumDims, (const TF_Tensor*))                                                    \
  FUNCTION(std::int64_t, TF_Dim, (const TF_Tensor*, int axis))                                     \
  FUNCTION(void*, TF_TensorData, (const TF_Tensor*))                                               \
  FUNCTION(TF_OpDefinitionBuilder*, TF_NewOpDefinitionBuilder, (const char* op_name))              \
  FUNCTION(void, TF_OpDefinitionBuilderAddAttr, (TF_OpDefinitionBuilder*, const char* spec))       \
  FUNCTION(void, TF_OpDefinitionBuilderAddInput, (TF_OpDefinitionBuilder*, const char* spec))      \
  FUNCTION(void, TF_OpDefinitionBuilderAddOutput, (TF_OpDefinitionBuilder*, const char* spec))     \
  FUNCTION(void, TF_OpDefinitionBuilderSetShapeInferenceFunction,                                  \
           (TF_OpDefinitionBuilder*, ShapeFunction))                                               \
  FUNCTION(void, TF_RegisterOpDefinition, (TF_OpDefinitionBuilder*, TF_Status*))                   \
  FUNCTION(TF_ShapeHandle*, TF_NewShapeHandle, ())                                                 \
  FUNCTION(void, TF_DeleteShapeHandle, (TF_ShapeHandle*))                                          \
  FUNCTION(void, TF_ShapeInferenceContextGetInput,                                                 \
           (TF_ShapeInferenceContext*, int index, TF_ShapeHandle*, TF_Status*))                    \
  FUNCTION(void, TF_ShapeInferenceContextSetOutput,                                                \
           (TF_ShapeInferenceContext*, int index, TF_ShapeHandle*, TF_Status*))                    \
  FUNCTION(void, TF_ShapeInferenceContextSetUnknownShape, (TF_ShapeInferenceContext*, TF_Status*)) \
  FUNCTION(                                                                                        \
      TF_KernelBuilder*, TF_NewKernelBuilder,                                                      \
      (const char* op_name, const char* device, CreateFunction, ComputeFunction, DeleteFunction))  \
  FUNCTION(void, TF_RegisterKernelBuilder, (const char* name, TF_KernelBuilder*, TF_Status*))      \
  FUNCTION(int, TF_NumInputs, (TF_OpKernelContext*))                                               \
  FUNCTION(int, TF_NumOutputs, (TF_OpKernelContext*))                                              \
  FUNCTION(void, TF_GetInput, (TF_OpKernelContext*, int index, TF_Tensor**, TF_Status*))           \
  FUNCTION(int, TF_ExpectedOutputDataType, (TF_OpKernelContext*, int index))                       \
  FUNCTION(TF_Tensor*, TF_AllocateOutput,                                                          \
           (TF_OpKernelContext*, int index, int type, const std::int64_t* dims, int rank,          \
            std::size_t bytes, TF_Status*))                                                        \
  FUNCTION(void, TF_OpKernelContext_Failure, (TF_OpKernelContext*, TF_Status*))                    \
  FUNCTION(void, TF_OpKernelConstruction_Failure, (TF_OpKernelConstruction*, TF_Status*))          \
  FUNCTION(void, TF_OpKernelConstruction_GetAttrSize,                                              \
           (TF_OpKernelConstruction*, const char* name, std::int32_t* list_size,                   \
            std::int32_t* total_size, TF_Status*))                                                 \
  FUNCTION(                                                                                        \
      void, TF_OpKernelConstruction_GetAttrInt64List,                                              \
      (TF_OpKernelConstruction*, const char* name, std::int64_t* values, int most, TF_Status*))    \
  FUNCTION(void, TF_OpKernelConstruction_GetAttrInt64,                                             \
           (TF_OpKernelConstruction*, const char* name, std::int64_t* value, TF_Status*))          \
  FUNCTION(void, TF_OpKernelConstruction_GetAttrBool,                                              \
           (TF_OpKernelConstruction*, const char* name, unsigned char* value, TF_Status*))         \
  FUNCTION(void, TF_OpKernelConstruction_GetAttrFloat,                                             \
           (TF_OpKernelConstruction*, const char* name, float* value, TF_Status*))                 \
  FUNCTION(                                                                                        \
      void, TF_OpKernelConstruction_GetAttrString,                                                 \
      (TF_OpKernelConstruction*, const char* name, char* value, std::size_t most, TF_Status*))

// The functions, null until resolve_c_api() has run.
// NOLINTBEGIN(bugprone-macro-parentheses): of types and declarators
#define FASTCONV_DEFINE(result, name, parameters) inline result(*name) parameters = nullptr;
FASTCONV_TENSORFLOW_C_API(FASTCONV_DEFINE)
#undef FASTCONV_DEFINE

#if defined(__APPLE__)
inline constexpr const char* kFrameworkLibrary = "libtensorflow_framework.2.dylib";
#else
inline constexpr const char* kFrameworkLibrary = "libtensorflow_framework.so.2";
#endif

// Finds every function in the TensorFlow of this process. Throws std::runtime_error where there is
// no TensorFlow, or one without a function we need.
inline void resolve_c_api() {
  // NOLOAD: a second TensorFlow loaded by us would have op registries of its own.
  void* library = dlopen(kFrameworkLibrary, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) {
    throw std::runtime_error(std::string("TensorFlow must be imported before fastconv's ops are "
                                         "loaded, but this process has no ") +
                             kFrameworkLibrary);
  }
#define FASTCONV_RESOLVE(result, name, parameters)                                        \
  name = reinterpret_cast<result(*) parameters>(dlsym(library, #name));                   \
  if (!name) {                                                                            \
    throw std::runtime_error("This version of TensorFlow lacks the C API function " #name \
                             ", which fastconv's ops need");                              \
  }
  FASTCONV_TENSORFLOW_C_API(FASTCONV_RESOLVE)
#undef FASTCONV_RESOLVE
  // NOLINTEND(bugprone-macro-parentheses)
}

}  // namespace fastconv::tensorflow
