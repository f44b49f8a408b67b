#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

// at::parallel_for, without its cost where there is nothing to share out.
template <class Body>
void parallel_over(int64_t count, int64_t grain, const Body& body) {
  if (count <= grain || torch::stable::get_num_threads() == 1) return body(0, count);
  torch::stable::parallel_for(0, count, grain, body);
}
