// What one operator is asked to compute, without types: the same for the CPU and the GPU.
//
//     y = p + z B      where z is a range of p's columns, and B's columns are scattered over others by blocks
//
//     LoraAdd           some ranges of y, one after the other
//     LoraSwiGLU        act(y at gate) * (y at up)
//     LoraSkipRMSNorm   s = a range of y + skip, and s / rms(s) * gamma, in groups of columns
//
// Where rows choose among several adapters, a row has the rows of B that its own has in each block, and no others.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FLORA_BOTH __host__ __device__ __forceinline__  // for the GPU's kernels and what plans them
#else
#define FLORA_BOTH inline
#endif

namespace flora {

enum class Element : int32_t { kFloat = 0, kHalf = 1, kBFloat = 2 };
enum class Operator : int32_t { kAdd = 0, kSwiGLU = 1, kNorm = 2 };
enum class Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

// To columns begin..end of p come z[first..last] times rows first..last of B, in its columns from..
struct Block {
  int32_t begin, end, first, last, from;
};

// Columns start.. of p, which are columns at.. of the output.
struct Part {
  int32_t start, width, at;
};

constexpr int kBlocks = 16;
constexpr int kParts = 8;
constexpr int kEdges = 256;

struct Call {
  Operator op;
  Element element;

  const void* p;       // [rows, stride]
  const void* z;       // [rows, z_stride]: within p, or apart
  const void* b;       // [rank, columns]
  const void* bias;    // of p, or null
  const void* z_bias;  // of z, or null
  int64_t rows, stride, z_stride;
  int32_t columns;  // of B
  int32_t blocks;
  Block block[kBlocks];

  const int64_t* ids;     // of the adapter of each `share` rows, or null: one adapter for all; others than 0.. are none
  int32_t share;
  int32_t adapters;
  uint16_t edge[kEdges];  // adapters + 1 for each block: where the rows of B begin that an adapter has, and the last end

  int32_t parts;
  Part part[kParts];  // of LoraSwiGLU and LoraSkipRMSNorm one: the gate, and what is normalised
  int32_t width;      // of the output
  int32_t up;         // of LoraSwiGLU: where the other half starts
  Activation activation;

  const void* skip;   // [rows, width], or null
  const void* gamma;  // [group]
  int32_t group;      // columns that are normalised together
  float epsilon;

  void* out;  // [rows, width]
  void* sum;  // [rows, width], or null
};

}  // namespace flora
