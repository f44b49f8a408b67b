// Greedy diverse selection on the CPU: farthest points (DivPrune), and the greedy MAP of a DPP (CDPruner).
//
// Both choose token by token, and each choice needs one row of the cosines between tokens: the distances to the tokens
// chosen so far, or what they leave of a token's gain, are brought up to date in a pass or a few, and the largest is
// next. For 64 of 576 tokens that takes some 10 us (farthest points) or 40 (DPP). The rows take a hundred times as
// long, so:
//
// - Where all are needed, as for the first of the farthest points, half of the symmetric matrix is computed, in
//   register tiles, and mirrored. Where few are, each is computed as its token is chosen, which takes a pass over
//   all the features (kWhole). A cosine has the same bits either way.
// - Tokens that are no candidates are left out as the features are packed.
//
// An image's work is cut by its size alone, every number is the result of one chain of operations, and a largest value
// does not depend on the order in which it is found: results are the same for any number of threads.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "instruction_sets.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kRowStep = 32;                   // two of the widest vectors of the narrowest numbers
constexpr int64_t kWhole = 8;                      // one choice in so many tokens, and the whole matrix is faster
constexpr int64_t kCacheBytes = int64_t{1} << 24;  // twice as many where the features come from memory each time
constexpr int64_t kMostBytes = int64_t{1} << 28;   // of a matrix of cosines that is kept
constexpr int64_t kTaskBytes = int64_t{1} << 19;   // of packed features that a thread reads for one row

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The candidates among an image's tokens, and their rows: of features, or of a matrix of cosines.
struct Source {
  const void* data;
  int64_t row_stride, depth;
  int64_t count;             // of candidates
  const int64_t* positions;  // of the candidates, ascending, or null where all tokens are
  int64_t position(int64_t n) const { return positions ? positions[n] : n; }
};

// The functions of diverse_loops.inc.
template <class T>
struct Loops {
  int64_t width;
  std::array<void (*)(const Source&, int64_t panel, T* packed, T* squares, T* rows), 3> pack;
  void (*panel_rows)(const T* packed, int64_t depth, int64_t count, int64_t panel, T* rows, int64_t stride, T* nearest);
  void (*mirror)(T* gram, int64_t stride, int64_t panel);
  T (*largest_other)(const T* row, int64_t count, int64_t own);
  void (*cosines)(const T* token, const T* packed, int64_t depth, int64_t panel, T* row);
  int64_t (*best)(const T* values, int64_t count, T least);
  void (*approach)(const T* row, int64_t count, T* distance);
  void (*cover)(const T* row, const T* quality, T own_quality, T own_gain, const T* own, int64_t step, int64_t steps,
                int64_t panels, T* covered, T* gain);
};

#define HP_INLINE __attribute__((always_inline)) inline
#define HP_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define HP_TARGET_BEGIN(set) HP_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define HP_TARGET_END HP_PRAGMA(clang attribute pop)
#else
#define HP_TARGET_BEGIN(set) HP_PRAGMA(GCC push_options) HP_PRAGMA(GCC target(set))
#define HP_TARGET_END HP_PRAGMA(GCC pop_options)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
#endif

namespace base {
#define HP_BYTES 16
#define HP_ROWS 4
#if defined(__aarch64__)
#define HP_VECTORS 4
#else
#define HP_VECTORS 2
#endif
#define HP_F16C 0
#include "diverse_loops.inc"
}  // namespace base

#undef HP_BYTES
#undef HP_VECTORS
#undef HP_F16C
#if defined(__x86_64__)
#define HP_F16C 1
#define HP_VECTORS 3

HP_TARGET_BEGIN("avx2,fma,f16c")
namespace avx2 {
#define HP_BYTES 32
#include "diverse_loops.inc"
}  // namespace avx2
HP_TARGET_END

#undef HP_BYTES
#undef HP_ROWS
#define HP_BYTES 64
#define HP_ROWS 8

HP_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {
#include "diverse_loops.inc"
}  // namespace avx512
HP_TARGET_END
#endif

// For the best instruction set that this processor has, up to `most`.
template <class T>
Loops<T> loops_for(int64_t most) {
#if defined(__x86_64__)
  const int64_t sets = instruction_sets();
  if (most >= kAvx512 && sets >> kAvx512 & 1) return avx512::make_loops<T>();
  if (most >= kAvx2 && sets >> kAvx2 & 1) return avx2::make_loops<T>();
#endif
  return base::make_loops<T>();
}

// at::parallel_for, without its cost where there is nothing to share out. Within one it does not share out again.
template <class Body>
void parallel_over(int64_t count, int64_t grain, const Body& body) {
  if (count <= grain || torch::stable::get_num_threads() == 1) return body(0, count);
  torch::stable::parallel_for(0, count, grain, body);
}

// Uninitialised numbers on a cache line of their own.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0)
      : data_(count ? static_cast<T*>(operator new(count * sizeof(T), kLine)) : nullptr) {}
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Delete {
    void operator()(T* data) const { operator delete(data, kLine); }
  };
  std::unique_ptr<T, Delete> data_;
};

// ---------------------------------------------------------------------------------------------------- rows of cosines

// The cosines between an image's candidates. What is beyond them, up to whole panels, are zeros.
template <class T>
class Cosines {
 public:
  // `picks`: how many rows will be asked for. With `nearest`, which holds -inf, each token's largest cosine with
  // another one is found, for which all are computed.
  Cosines(const Loops<T>& loops, const Source& source, size_t dtype, int64_t picks, T* nearest)
      : loops_(loops),
        source_(source),
        panels_(ceil_div(source.count, loops.width)),
        stride_(panels_ * loops.width),
        squares_(stride_),
        row_(stride_),
        packed_(stride_ * source.depth),
        token_(source.depth) {
    const int64_t width = loops.width, depth = source.depth;
    parallel_over(panels_, 1, [&](int64_t begin, int64_t end) {
      const Buffer<T> rows(4 * round_up(depth, kRowStep));
      for (int64_t p = begin; p < end; ++p) loops.pack[dtype](source, p, packed_.get(), squares_.get(), rows.get());
    });
    const bool kept =
        (nearest || picks * kWhole > source.count) && stride_ * stride_ <= kMostBytes / static_cast<int64_t>(sizeof(T));
    if (kept) gram_ = Buffer<T>(stride_ * stride_);
    if (!kept && !nearest) return;

    std::mutex merging;
    // The p-th panel meets p others: a task has one from either end, so that all are as long.
    parallel_over(ceil_div(panels_, 2), 1, [&](int64_t begin, int64_t end) {
      const Buffer<T> own(nearest ? stride_ : 0), rows(kept ? 0 : width * stride_);
      if (nearest) std::fill(own.get(), own.get() + stride_, -std::numeric_limits<T>::infinity());
      const auto compute = [&](int64_t p) {
        T* const target = kept ? gram_.get() + p * width * stride_ : rows.get();
        loops.panel_rows(packed_.get(), depth, source.count, p, target, stride_, own.get());
      };
      for (int64_t p = begin; p < end; ++p) {
        compute(p);
        if (panels_ - 1 - p != p) compute(panels_ - 1 - p);
      }
      if (!nearest) return;
      const std::lock_guard<std::mutex> lock(merging);
      for (int64_t i = 0; i < source.count; ++i) nearest[i] = std::max(nearest[i], own[i]);
    });
    if (!kept) return;
    parallel_over(panels_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) loops.mirror(gram_.get(), stride_, p);
    });
  }

  // Those of a given matrix.
  Cosines(const Loops<T>& loops, const Source& source, T* nearest)
      : loops_(loops),
        source_(source),
        panels_(ceil_div(source.count, loops.width)),
        stride_(panels_ * loops.width),
        squares_(stride_),
        row_(stride_),
        given_(true) {
    std::fill(squares_.get() + source.count, squares_.get() + stride_, T{0});
    for (int64_t i = 0; i < source.count; ++i) squares_[i] = given(i)[source.position(i)];
    for (int64_t i = 0; nearest && i < source.count; ++i)
      nearest[i] = loops.largest_other(source.positions ? row(i) : given(i), source.count, i);
  }

  int64_t panels() const { return panels_; }
  int64_t padded() const { return stride_; }
  const T* squares() const { return squares_.get(); }

  // Token i's, until the next call.
  const T* row(int64_t i) {
    if (gram_.get()) return gram_.get() + i * stride_;
    if (given_) {
      const T* const row = given(i);
      for (int64_t j = 0; j < source_.count; ++j) row_[j] = row[source_.position(j)];
      std::fill(row_.get() + source_.count, row_.get() + stride_, T{0});
      return row_.get();
    }
    const int64_t width = loops_.width, depth = source_.depth;
    const T* const channels = packed_.get() + i / width * width * depth + i % width;
    for (int64_t c = 0; c < depth; ++c) token_[c] = channels[c * width];
    const int64_t panel_bytes = std::max<int64_t>(1, width * depth * sizeof(T));
    parallel_over(panels_, ceil_div(kTaskBytes, panel_bytes), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) loops_.cosines(token_.get(), packed_.get(), depth, p, row_.get());
    });
    return row_.get();
  }

 private:
  const T* given(int64_t i) const {
    return static_cast<const T*>(source_.data) + source_.position(i) * source_.row_stride;
  }

  const Loops<T>& loops_;
  const Source& source_;
  int64_t panels_, stride_;
  Buffer<T> squares_, row_, packed_, token_, gram_;
  bool given_ = false;
};

// ------------------------------------------------------------------------------------------------------ one image

// What gives a token its worth while tokens are chosen one by one: the largest is next.
template <class T>
class FarthestPoints {
 public:
  // `nearest` holds -inf up to whole panels.
  FarthestPoints(const Loops<T>& loops, Cosines<T>& cosines, Buffer<T> nearest, int64_t count)
      : loops_(loops), cosines_(cosines), count_(count), distance_(std::move(nearest)) {
    for (int64_t i = 0; i < count; ++i) distance_[i] = 1 - distance_[i];  // of the nearest other token
  }
  int64_t next() { return loops_.best(distance_.get(), cosines_.padded(), kOut); }
  void take(int64_t i) {
    if (std::exchange(first_, false)) std::fill(distance_.get(), distance_.get() + count_, -kOut);
    distance_[i] = kOut;
  }
  void update(int64_t i) { loops_.approach(cosines_.row(i), cosines_.padded(), distance_.get()); }

 private:
  static constexpr T kOut = -std::numeric_limits<T>::infinity();  // of a token that is out of the race
  const Loops<T>& loops_;
  Cosines<T>& cosines_;
  int64_t count_;
  Buffer<T> distance_;
  bool first_ = true;
};

template <class T>
class Determinant {
 public:
  // `quality` holds zeros up to whole panels.
  Determinant(const Loops<T>& loops, Cosines<T>& cosines, Buffer<T> quality, int64_t count, int64_t steps)
      : loops_(loops),
        cosines_(cosines),
        steps_(steps),
        quality_(std::move(quality)),
        left_(cosines.padded()),
        gain_(cosines.padded()),
        own_(steps),
        covered_(cosines.padded() * steps) {
    T most = 0;
    for (int64_t i = 0; i < cosines.padded(); ++i) {
      left_[i] = i < count ? quality_[i] : kOut;
      gain_[i] = quality_[i] * quality_[i] * cosines.squares()[i];  // 0 beyond `count`, which is never enough
      if (gain_[i] > most) most = gain_[i];
    }
    least_ = static_cast<T>(1e-12) * most;
  }
  int64_t next() {
    if (!spent_) {
      const int64_t i = loops_.best(gain_.get(), cosines_.padded(), least_);
      if (i >= 0) return i;
      spent_ = true;  // what is left is covered, but for rounding: by quality, then
    }
    return loops_.best(left_.get(), cosines_.padded(), kOut);
  }
  void take(int64_t i) {
    own_gain_ = gain_[i];
    gain_[i] = left_[i] = kOut;
  }
  void update(int64_t i) {
    if (spent_) return;
    const int64_t width = loops_.width;
    const T* const covered = covered_.get() + i / width * width * steps_ + i % width;
    for (int64_t s = 0; s < step_; ++s) own_[s] = covered[s * width];
    loops_.cover(cosines_.row(i), quality_.get(), quality_[i], own_gain_, own_.get(), step_++, steps_,
                 cosines_.panels(), covered_.get(), gain_.get());
  }

 private:
  static constexpr T kOut = -std::numeric_limits<T>::infinity();
  const Loops<T>& loops_;
  Cosines<T>& cosines_;
  int64_t steps_, step_ = 0;
  Buffer<T> quality_, left_, gain_, own_, covered_;
  T least_, own_gain_ = 0;
  bool spent_ = false;
};

struct Result {
  int64_t *indices, *order;  // of one image, `count` each
  int64_t count, base;       // base: added to all
};

template <class Worth>
void choose(Worth worth, const Source& source, const Result& result) {
  const int64_t steps = std::min(result.count, source.count);
  std::vector<uint8_t> chosen(source.count);
  for (int64_t step = 0; step < steps; ++step) {
    int64_t i = worth.next();
    if (i < 0) i = std::find(chosen.begin(), chosen.end(), 0) - chosen.begin();  // NaN has no worth: the first one left
    chosen[i] = 1;
    worth.take(i);
    if (step + 1 < steps) worth.update(i);
    result.order[step] = result.base + source.position(i);
  }
  int64_t* index = result.indices;
  for (int64_t i = 0; i < source.count; ++i)
    if (chosen[i]) *index++ = result.base + source.position(i);
  std::fill(result.order + steps, result.order + result.count, int64_t{-1});
  std::fill(result.indices + steps, result.indices + result.count, int64_t{-1});
}

// A row of quality or mask entries: element i at data[i * stride].
template <class T>
struct Row {
  const T* data;
  int64_t stride;
};

template <class T>
void select_image(const Loops<T>& loops, Source source, std::optional<size_t> dtype, int64_t tokens, Row<T> quality,
                  Row<bool> mask, const Result& result) {
  std::vector<int64_t> candidates;
  source.count = tokens;
  if (mask.data) {
    for (int64_t i = 0; i < tokens; ++i)
      if (mask.data[i * mask.stride]) candidates.push_back(i);
    source.count = static_cast<int64_t>(candidates.size());
    source.positions = candidates.data();
  }
  const int64_t padded = round_up(source.count, loops.width), steps = std::min(result.count, source.count);
  Buffer<T> values(padded);  // of quality, or of each token's largest cosine with another one
  std::fill(values.get(), values.get() + padded, quality.data ? T{0} : -std::numeric_limits<T>::infinity());
  T* const nearest = quality.data ? nullptr : values.get();
  Cosines<T> cosines =
      dtype ? Cosines<T>(loops, source, *dtype, steps - 1, nearest) : Cosines<T>(loops, source, nearest);
  if (!quality.data) return choose(FarthestPoints<T>(loops, cosines, std::move(values), source.count), source, result);
  for (int64_t i = 0; i < source.count; ++i) values[i] = quality.data[source.position(i) * quality.stride];
  choose(Determinant<T>(loops, cosines, std::move(values), source.count, steps), source, result);
}

// ------------------------------------------------------------------------------------------------------ all images

// Features [B, N, C] and one count for all images, or packed [T, C] and a size and a count for each.
struct Layout {
  bool dense;
  std::vector<int64_t> sizes, counts, first_token, first_row;  // of each image
  int64_t images, rows = 0;

  Layout(const Tensor& features, const std::vector<int64_t>& given_sizes, const std::vector<int64_t>& given_counts)
      : dense(features.dim() == 3), sizes(given_sizes), counts(given_counts) {
    if (dense) {
      STD_TORCH_CHECK(sizes.empty() && counts.size() == 1, "counts: expected one and no sizes for a batch, got ",
                      counts.size(), " and ", sizes.size());
      sizes.assign(features.size(0), features.size(1));
      counts.assign(features.size(0), given_counts[0]);
    }
    STD_TORCH_CHECK(features.dim() == 2 || dense, "features: expected 2 or 3 dimensions, got ", features.dim());
    STD_TORCH_CHECK(sizes.size() == counts.size(), "counts: expected ", sizes.size(), ", one per size, got ",
                    counts.size());
    images = static_cast<int64_t>(sizes.size());
    int64_t tokens = 0;
    for (int64_t b = 0; b < images; ++b) {
      STD_TORCH_CHECK(counts[b] >= 1 && counts[b] <= sizes[b] && sizes[b] <= std::numeric_limits<int32_t>::max(),
                      "counts: expected 1..", sizes[b], " of fewer than 2**31 tokens, got ", counts[b]);
      first_token.push_back(dense ? 0 : tokens);
      first_row.push_back(rows);
      tokens += sizes[b], rows += counts[b];
    }
    STD_TORCH_CHECK(dense || tokens == features.size(0), "features: expected ", tokens, " rows, got ",
                    features.size(0));
  }

  // Where image b starts in a tensor [B, N, ...] or [T, ...], in elements.
  int64_t start(const Tensor& t, int64_t b) const { return dense ? b * t.stride(0) : first_token[b] * t.stride(0); }
  int64_t token_stride(const Tensor& t) const { return t.stride(dense ? 1 : 0); }

  template <class T>
  Row<T> row(const std::optional<Tensor>& t, int64_t b) const {
    if (!t) return {nullptr, 0};
    return {static_cast<const T*>(t->data_ptr()) + start(*t, b), token_stride(*t)};
  }

  Tensor allocate(int64_t count) const {
    const int64_t sizes[2] = {images, count}, strides[2] = {count, 1};
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dense ? 2 : 1, sizes + !dense, strides + !dense,
                                                           aoti_torch_dtype_int64(), aoti_torch_device_type_cpu(), 0,
                                                           &handle));
    return Tensor(handle);
  }
};

template <class T>
void select_images(const Layout& layout, const Tensor& features, std::optional<size_t> dtype,
                   const std::optional<Tensor>& quality, const std::optional<Tensor>& mask, int64_t isa,
                   int64_t* indices, int64_t* order) {
  const Loops<T> loops = loops_for<T>(isa);
  const int64_t element = static_cast<int64_t>(features.element_size());
  const auto select = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const char* const data = static_cast<const char*>(features.data_ptr()) + layout.start(features, b) * element;
      const Source source{data, layout.token_stride(features), features.size(features.dim() - 1), 0, nullptr};
      const int64_t row = layout.first_row[b];
      select_image<T>(loops, source, dtype, layout.sizes[b], layout.row<T>(quality, b), layout.row<bool>(mask, b),
                      {indices + row, order + row, layout.counts[b], layout.first_token[b]});
    }
  };
  // With fewer images than threads, threads share the work of each.
  if (layout.images < static_cast<int64_t>(torch::stable::get_num_threads()))
    select(0, layout.images);
  else
    parallel_over(layout.images, 1, select);
}

std::tuple<Tensor, Tensor> select(const Tensor& features, const std::optional<Tensor>& quality,
                                  const std::optional<Tensor>& candidate_mask, const std::vector<int64_t>& sizes,
                                  const std::vector<int64_t>& counts, bool gram, int64_t isa) {
  const Layout layout(features, sizes, counts);
  const int64_t last = features.dim() - 1, channels = features.size(last);
  const ScalarType dtype = features.scalar_type();
  STD_TORCH_CHECK(!gram || (layout.dense && channels == features.size(1) &&
                            (dtype == ScalarType::Float || dtype == ScalarType::Double)),
                  "features: expected a Gram matrix [B, N, N] of float32 or float64");
  const auto check = [&](const std::optional<Tensor>& t, const char* name) {
    if (!t) return;
    bool fits = t->dim() == last;
    for (int64_t d = 0; fits && d < last; ++d) fits = t->size(d) == features.size(d);
    STD_TORCH_CHECK(fits, name, ": expected the sizes of features but for the channels");
  };
  check(quality, "quality");
  check(candidate_mask, "candidate_mask");
  STD_TORCH_CHECK(!candidate_mask || candidate_mask->scalar_type() == ScalarType::Bool,
                  "candidate_mask: expected bool");
  Tensor indices = layout.allocate(layout.dense ? counts[0] : layout.rows);
  Tensor order = layout.allocate(layout.dense ? counts[0] : layout.rows);
  const Tensor rows = features.stride(last) == 1 || channels <= 1 ? features : torch::stable::contiguous(features);
  const auto run = [&]<class T>(ScalarType own, size_t which) {
    std::optional<Tensor> converted = quality;
    if (quality && quality->scalar_type() != own) converted = torch::stable::to(*quality, own);
    select_images<T>(layout, rows, gram ? std::nullopt : std::optional<size_t>(which), converted, candidate_mask, isa,
                     static_cast<int64_t*>(indices.data_ptr()), static_cast<int64_t*>(order.data_ptr()));
  };
  if (dtype == ScalarType::Double) {
    run.template operator()<double>(ScalarType::Double, 0);
  } else {
    const bool half = dtype == ScalarType::Half, bfloat16 = dtype == ScalarType::BFloat16;
    STD_TORCH_CHECK(half || bfloat16 || dtype == ScalarType::Float,
                    "features: expected float32, bfloat16, float16 or float64");
    run.template operator()<float>(ScalarType::Float, half ? 2 : bfloat16 ? 1 : 0);
  }
  return {indices, order};
}

// hiprune::select_diverse: indices and order, [B, count] or [sum of counts].
std::tuple<Tensor, Tensor> select_diverse(Tensor features, std::optional<Tensor> quality,
                                          std::optional<Tensor> candidate_mask, std::vector<int64_t> sizes,
                                          std::vector<int64_t> counts) {
  return select(features, quality, candidate_mask, sizes, counts, false, kAvx512);
}

// hiprune::_cpu_select_diverse: the same with an instruction set of choice and, with `gram`, of a given matrix of
// cosines [B, N, N] in the place of features: for tests and benchmarks.
std::tuple<Tensor, Tensor> select_diverse_with(Tensor features, std::optional<Tensor> quality,
                                               std::optional<Tensor> candidate_mask, std::vector<int64_t> sizes,
                                               std::vector<int64_t> counts, bool gram, int64_t isa) {
  return select(features, quality, candidate_mask, sizes, counts, gram, isa);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hiprune, m) {
  m.def(
      "_cpu_select_diverse(Tensor features, Tensor? quality, Tensor? candidate_mask, int[] sizes, int[] counts, "
      "bool gram, int isa) -> (Tensor indices, Tensor order)");
}

STABLE_TORCH_LIBRARY_IMPL(hiprune, CPU, m) {  // the other schema: hiprune_kernels/ops/diverse.py
  m.impl("select_diverse", TORCH_BOX(&select_diverse));
  m.impl("_cpu_select_diverse", TORCH_BOX(&select_diverse_with));
}
