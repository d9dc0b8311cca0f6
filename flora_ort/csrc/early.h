// Launches that begin while the one ahead still runs (programmatic dependent launch, compute capability 9 on).
//
// Until `wait_for_inputs` a kernel may read only what no kernel writes: weights.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace flora {

// Lets what comes after be launched, and waits until what was launched before has ended and its results can be read.
// What comes after waits for this one, and so for all before it: it may begin before they have ended.
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Whether this device can, and FLORA_ORT_EARLY is not 0.
inline bool launches_early() {
  static const bool found = [] {
    const char* told = std::getenv("FLORA_ORT_EARLY");
    int device = 0, major = 0;
    return (told == nullptr || std::strcmp(told, "0") != 0) && cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
  }();
  return found;
}

// Of this device.
inline int32_t processors() {
  static const int32_t found = [] {
    int device = 0, count = 0;
    const bool told = cudaGetDevice(&device) == cudaSuccess &&
                      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
    return told ? count : 1;
  }();
  return found;
}

// Null, or what CUDA says against it.
template <typename... Arguments>
const char* launch(void (*kernel)(Arguments...), dim3 grid, dim3 block, void* stream, Arguments... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early;
  config.numAttrs = launches_early() ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace flora
