// The best tokens of segments (an image's tiles) whose budgets are data, and budgets shared out by weights.
//
// What a segment may keep depends on the segments of its image before it, so that is settled first, in order; the
// search for the best (top_k.h) is then a task of its own for each segment. Neither depends on the number of threads.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "instruction_sets.h"
#include "parallel.h"
#include "top_k.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

Tensor new_tensor(int64_t size, int32_t dtype) {
  const int64_t stride = 1;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &size, &stride, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Element i of a vector of int64 or int32.
class Integers {
 public:
  Integers(const Tensor& t, const char* name, int64_t size)
      : data_(static_cast<const char*>(t.data_ptr())), wide_(t.scalar_type() == ScalarType::Long) {
    STD_TORCH_CHECK(wide_ || t.scalar_type() == ScalarType::Int, name, ": expected int64 or int32");
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size, name, ": expected ", size, " numbers");
    step_ = t.stride(0) * (wide_ ? 8 : 4);
  }
  int64_t operator[](int64_t i) const {
    const char* at = data_ + i * step_;
    return wide_ ? *reinterpret_cast<const int64_t*>(at) : *reinterpret_cast<const int32_t*>(at);
  }

 private:
  const char* data_;
  int64_t step_;
  bool wide_;
};

void check_tiles(const std::vector<int64_t>& tiles, const std::vector<int64_t>& totals, int64_t segments) {
  STD_TORCH_CHECK(tiles.size() == totals.size(), "totals: expected ", tiles.size(), ", one an image, got ",
                  totals.size());
  int64_t sum = 0;
  for (size_t i = 0; i < tiles.size(); ++i) {
    STD_TORCH_CHECK(tiles[i] > 0 && totals[i] >= 0, "tiles, totals: expected at least 1 and 0, got ", tiles[i], " and ",
                    totals[i]);
    sum += tiles[i];
  }
  STD_TORCH_CHECK(sum == segments, "tiles: expected a sum of ", segments, ", got ", sum);
}

// ------------------------------------------------------------------------------------------------- segments' best
// tokens

// A segment, how many tokens it keeps, and what is written, all of it: its roles, and as many indices.
template <class Score>
struct Task {
  Row<Score> scores;
  Row<bool> mask;
  int64_t first, count, kept;
  KeyOf<Score>* keys;  // room for one of each token
  uint8_t* roles;
  int64_t* index;
};

template <class Score>
HP_INLINE void select_segment(const Task<Score>& task) {
  std::memset(task.roles, kDropped, task.count);
  if (task.kept == 0) return;
  rank(task.scores, task.mask, task.roles, Score{0}, task.count, task.keys);
  take_best(task.keys, task.count, task.kept, 1, task.roles);
  list_kept(task.roles, task.count, task.first, task.kept, task.index);
}

template <class Score>
void segment_base(const Task<Score>& task) {
  select_segment(task);
}
#if defined(__x86_64__)
template <class Score>
__attribute__((target("avx2"))) void segment_avx2(const Task<Score>& task) {
  select_segment(task);
}
template <class Score>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) void segment_avx512(const Task<Score>& task) {
  select_segment(task);
}
#endif

// The function for the best instruction set that this processor has, up to `most`.
template <class Score>
auto kernel_for(int64_t most) {
#if defined(__x86_64__)
  const int64_t sets = instruction_sets();
  if (most >= kAvx512 && sets >> kAvx512 & 1) return &segment_avx512<Score>;
  if (most >= kAvx2 && sets >> kAvx2 & 1) return &segment_avx2<Score>;
#endif
  return &segment_base<Score>;
}

struct Segment {
  int64_t first, count;  // tokens
  int64_t kept, row;     // how many of them it keeps, and where their indices begin
};

// Writes the -1 behind an image's indices, too.
std::vector<Segment> settle(const Integers& budgets, Row<bool> mask, const std::vector<int64_t>& sizes,
                            const std::vector<int64_t>& tiles, const std::vector<int64_t>& totals, int64_t* index) {
  std::vector<Segment> segments;
  segments.reserve(sizes.size());
  int64_t token = 0, row = 0;
  for (size_t image = 0; image < tiles.size(); ++image) {
    int64_t left = totals[image];
    for (int64_t tile = 0; tile < tiles[image]; ++tile) {
      const int64_t r = segments.size(), count = sizes[r];
      int64_t most = std::min(left, count);
      if (mask.data) {
        int32_t candidates = 0;
        for (int64_t i = 0; i < count; ++i) candidates += mask[token + i];
        most = std::min<int64_t>(most, candidates);
      }
      segments.push_back({token, count, std::clamp<int64_t>(budgets[r], 0, most), row});
      token += count, row += segments.back().kept, left -= segments.back().kept;
    }
    std::fill(index + row, index + row + left, int64_t{-1});
    row += left;
  }
  return segments;
}

template <class Score>
void select_segments(const std::vector<Segment>& segments, const Tensor& scores, Row<bool> mask, int64_t isa,
                     uint8_t* roles, int64_t* index) {
  const auto select_one = kernel_for<Score>(isa);
  const auto* data = static_cast<const Score*>(scores.data_ptr());
  const int64_t stride = scores.stride(0);
  int64_t most = 0;
  for (const Segment& segment : segments) most = std::max(most, segment.count);
  parallel_over(segments.size(), 1, [&](int64_t begin, int64_t end) {
    const auto keys = std::make_unique_for_overwrite<KeyOf<Score>[]>(most);
    for (int64_t r = begin; r < end; ++r) {
      const Segment& segment = segments[r];
      select_one({{data + segment.first * stride, stride},
                  mask.data ? Row<bool>{mask.data + segment.first * mask.stride, mask.stride} : mask,
                  segment.first,
                  segment.count,
                  segment.kept,
                  keys.get(),
                  roles + segment.first,
                  index + segment.row});
    }
  });
}

// hiprune::_cpu_select_top_segments: indices [sum of totals], roles [T], with an instruction set of choice, for tests.
std::tuple<Tensor, Tensor> select_with(Tensor scores, Tensor budgets, std::optional<Tensor> candidate_mask,
                                       std::vector<int64_t> sizes, std::vector<int64_t> tiles,
                                       std::vector<int64_t> totals, int64_t isa) {
  check_tiles(tiles, totals, sizes.size());
  for (const int64_t size : sizes)
    STD_TORCH_CHECK(size > 0 && size <= std::numeric_limits<int32_t>::max(),  // keys are counted in their own type
                    "sizes: expected 1 to 2**31 - 1 tokens a segment, got ", size);
  const int64_t tokens = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  STD_TORCH_CHECK(scores.dim() == 1 && scores.size(0) == tokens, "scores: expected ", tokens, " of them");
  Row<bool> mask{nullptr, 0};
  if (candidate_mask) {
    STD_TORCH_CHECK(candidate_mask->dim() == 1 && candidate_mask->size(0) == tokens &&
                        candidate_mask->scalar_type() == ScalarType::Bool,
                    "candidate_mask: expected bool [", tokens, "]");
    mask = {static_cast<const bool*>(candidate_mask->data_ptr()), candidate_mask->stride(0)};
  }
  const int64_t rows = std::accumulate(totals.begin(), totals.end(), int64_t{0});
  Tensor indices = new_tensor(rows, aoti_torch_dtype_int64()), roles = new_tensor(tokens, aoti_torch_dtype_uint8());
  auto* const index = static_cast<int64_t*>(indices.data_ptr());
  auto* const role = static_cast<uint8_t*>(roles.data_ptr());
  const Integers wanted(budgets, "budgets", sizes.size());
  const std::vector<Segment> segments = settle(wanted, mask, sizes, tiles, totals, index);
  if (scores.scalar_type() == ScalarType::Double) {
    select_segments<double>(segments, scores, mask, isa, role, index);
  } else if (scores.scalar_type() == ScalarType::Float) {
    select_segments<float>(segments, scores, mask, isa, role, index);
  } else {
    select_segments<float>(segments, torch::stable::to(scores, ScalarType::Float), mask, isa, role, index);
  }
  return {indices, roles};
}

// hiprune::select_top_segments
std::tuple<Tensor, Tensor> select_top_segments(Tensor scores, Tensor budgets, std::optional<Tensor> candidate_mask,
                                               std::vector<int64_t> sizes, std::vector<int64_t> tiles,
                                               std::vector<int64_t> totals) {
  return select_with(scores, budgets, candidate_mask, sizes, tiles, totals, kAvx512);
}

// ---------------------------------------------------------------------------------------------------------------
// shares

// One image: budget.shares, operation by operation, so that host and device agree to the last bit.
void share_out(const double* weights, const Integers& caps, int64_t first, int64_t count, int64_t total,
               int64_t* given) {
  std::vector<double> quotas(count);
  std::vector<int64_t> open(count);  // segments that are not full
  std::iota(open.begin(), open.end(), 0);
  const auto cap = [&](int64_t r) { return std::clamp<int64_t>(caps[first + r], 0, total); };
  int64_t room = 0;
  for (int64_t r = 0; r < count && room < total; ++r) room += std::min(cap(r), total - room);
  int64_t left = room;
  for (bool stable = false; !stable;) {
    double sum = 0;
    for (const int64_t r : open) sum += weights[r];
    const double divisor = sum == 0 ? static_cast<double>(open.size()) : sum;
    for (const int64_t r : open) quotas[r] = static_cast<double>(left) * (sum == 0 ? 1 : weights[r]) / divisor;
    const auto full = [&](int64_t r) { return quotas[r] >= static_cast<double>(cap(r)); };
    for (const int64_t r : open)
      if (full(r)) given[r] = cap(r), left -= cap(r);
    stable = std::erase_if(open, full) == 0;
  }
  for (const int64_t r : open) given[r] = static_cast<int64_t>(quotas[r]), left -= given[r];
  std::stable_sort(open.begin(), open.end(), [&](int64_t a, int64_t b) {
    return quotas[a] - static_cast<double>(given[a]) > quotas[b] - static_cast<double>(given[b]);
  });
  for (int64_t k = 0; k < std::min<int64_t>(left, open.size()); ++k) ++given[open[k]];
}

// hiprune::shares: int64 [R].
Tensor shares(Tensor weights, Tensor caps, std::vector<int64_t> totals, std::vector<int64_t> tiles) {
  const int64_t segments = std::accumulate(tiles.begin(), tiles.end(), int64_t{0});
  check_tiles(tiles, totals, segments);
  STD_TORCH_CHECK(weights.dim() == 1 && weights.size(0) == segments, "weights: expected ", segments, " of them");
  const Integers most(caps, "caps", segments);
  const Tensor wide = torch::stable::to(weights, ScalarType::Double);
  const auto* from = static_cast<const double*>(wide.data_ptr());
  std::vector<double> usable(segments);
  for (int64_t r = 0; r < segments; ++r) {
    const double weight = from[r * wide.stride(0)];
    usable[r] = weight > 0 && weight < 1e280 ? weight : 0;
  }
  Tensor result = new_tensor(segments, aoti_torch_dtype_int64());
  int64_t first = 0;
  for (size_t image = 0; image < tiles.size(); first += tiles[image++])
    share_out(usable.data() + first, most, first, tiles[image], totals[image],
              static_cast<int64_t*>(result.data_ptr()) + first);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hiprune, m) {
  m.def(
      "_cpu_select_top_segments(Tensor scores, Tensor budgets, Tensor? candidate_mask, int[] sizes, int[] tiles, "
      "int[] totals, int isa) -> (Tensor indices, Tensor roles)");
}

STABLE_TORCH_LIBRARY_IMPL(hiprune, CPU, m) {  // the other schemas: hiprune_kernels/ops/segments.py
  m.impl("select_top_segments", TORCH_BOX(&select_top_segments));
  m.impl("_cpu_select_top_segments", TORCH_BOX(&select_with));
  m.impl("shares", TORCH_BOX(&shares));
}
