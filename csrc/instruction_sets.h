// The instruction sets that kernels are compiled for; the best one that the processor has is chosen at run time.

#pragma once

#include <cstdint>

// Inlined into a function for each instruction set, so that each gets vector code of its own.
#define HP_INLINE __attribute__((always_inline)) inline
// HP_TARGET_BEGIN(set) ... HP_TARGET_END: what is between them is compiled for that instruction set.
#define HP_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define HP_TARGET_BEGIN(set) HP_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define HP_TARGET_END HP_PRAGMA(clang attribute pop)
#else
#define HP_TARGET_BEGIN(set) HP_PRAGMA(GCC push_options) HP_PRAGMA(GCC target(set))
#define HP_TARGET_END HP_PRAGMA(GCC pop_options)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
#endif

enum InstructionSet : int64_t { kBase, kAvx2, kAvx512, kAvx512Bf16, kInstructionSets };

// Bit i is set where instruction set i was compiled in and this processor has it.
inline int64_t instruction_sets() {
  int64_t sets = 1 << kBase;
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return sets;
  sets |= 1 << kAvx2;  // every processor with AVX2 converts float16
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return sets;
  sets |= 1 << kAvx512;
  if (__builtin_cpu_supports("avx512bf16")) sets |= 1 << kAvx512Bf16;
#endif
  return sets;
}
