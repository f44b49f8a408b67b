// Merging of tokens on the CPU (VisionZip): each source goes to the target whose key has the largest cosine with its
// own, and a target's row becomes its features and the mean of those of its sources.
//
// Almost all the time goes into reading the sources' features, each once: a target's sources are added up, in order,
// in a buffer that stays in the L1 cache. Threads share out sources and then channels, never a sum: the result does
// not depend on their number, nor on other images.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "instruction_sets.h"
#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kSourcesPerTask = 64, kChannelsPerTask = 256;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Target {
  int64_t token, position;                // in the image, and in the list of all targets
  int64_t first_member = 0, members = 0;  // in Image::members
  void* out = nullptr;                    // its row, or null where nothing is to be written
};

// Strides count elements; tokens are counted in the image.
struct Image {
  const void *features, *keys;
  int64_t row_stride, key_stride, depth;
  std::vector<Target> targets;      // those that are tokens of the image
  std::vector<int64_t> sources;     // ascending
  std::vector<int32_t> chosen;      // of each source, which of the targets
  std::vector<int64_t> members;     // the sources, target by target, ascending in each
  std::unique_ptr<float[]> panels;  // see pack_targets
};

struct Assigning {
  int64_t lanes, tile;
  void (*pack_targets)(const Image&, float* panels, float* row);
  void (*assign)(const Image&, const float* panels, float* rows, int64_t begin, int64_t end, int32_t* chosen);
};
using Merge = void(const Image&, size_t target, int64_t begin, int64_t end, float* sum);

namespace base {
#define HP_LANES 4
#define HP_F16C 0
#include "merge_tiles.inc"
}  // namespace base

#undef HP_LANES
#undef HP_F16C
#if defined(__x86_64__)
#define HP_F16C 1

HP_TARGET_BEGIN("avx2,fma,f16c")
namespace avx2 {
#define HP_LANES 8
#include "merge_tiles.inc"
}  // namespace avx2
HP_TARGET_END

#undef HP_LANES
#define HP_LANES 16

HP_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {
#include "merge_tiles.inc"
}  // namespace avx512
HP_TARGET_END
#endif

template <class T>
Assigning assigning_for(int64_t set) {
#if defined(__x86_64__)
  if (set >= kAvx512) return avx512::assigning<T>();
  if (set == kAvx2) return avx2::assigning<T>();
#endif
  return base::assigning<T>();
}

template <class T>
Merge* merge_for(int64_t set) {
#if defined(__x86_64__)
  if (set >= kAvx512) return &avx512::merge_target<T>;
  if (set == kAvx2) return &avx2::merge_target<T>;
#endif
  return &base::merge_target<T>;
}

// The best instruction set that this processor has, up to `most`.
int64_t best_set(int64_t most) {
  const int64_t sets = instruction_sets();
  int64_t set = std::clamp<int64_t>(most, kBase, kAvx512);
  while (!(sets >> set & 1)) --set;
  return set;
}

void check_dtype(const Tensor& t, const char* name) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
                  ": expected float32, bfloat16 or float16");
}

Assigning choose_assigning(ScalarType dtype, int64_t set) {
  if (dtype == ScalarType::Float) return assigning_for<float>(set);
  return dtype == ScalarType::BFloat16 ? assigning_for<BFloat16>(set) : assigning_for<Half>(set);
}

Merge* choose_merge(ScalarType dtype, int64_t set) {
  if (dtype == ScalarType::Float) return merge_for<float>(set);
  return dtype == ScalarType::BFloat16 ? merge_for<BFloat16>(set) : merge_for<Half>(set);
}

// ------------------------------------------------------------------------------------------------------------ the
// images

// Where the images lie: a batch [B, N], or packed [T], cut by sizes and counts.
class Layout {
 public:
  Layout(const Tensor& features, const Tensor& targets, const std::vector<int64_t>& sizes,
         const std::vector<int64_t>& counts)
      : dense_(features.dim() == 3) {
    STD_TORCH_CHECK(dense_ || features.dim() == 2, "features: expected [B N C] or [T C]");
    STD_TORCH_CHECK(targets.dim() == features.dim() - 1, "targets: expected [B c] or [M]");
    STD_TORCH_CHECK(sizes.size() == counts.size(), "counts: expected ", sizes.size(), ", one an image");
    images = dense_ ? features.size(0) : int64_t(sizes.size());
    first_token.assign(images + 1, 0), first_target.assign(images + 1, 0);
    for (int64_t b = 0; b < images; ++b) {
      const int64_t size = dense_ ? features.size(1) : sizes[b], count = dense_ ? targets.size(1) : counts[b];
      STD_TORCH_CHECK(size >= 0 && size <= std::numeric_limits<int32_t>::max() && count >= 0 &&
                          count <= std::numeric_limits<int32_t>::max(),
                      "sizes, counts: expected 0 to 2**31 - 1 an image, got ", size, " and ", count);
      first_token[b + 1] = first_token[b] + size, first_target[b + 1] = first_target[b] + count;
    }
    STD_TORCH_CHECK(dense_ || (features.size(0) == tokens() && targets.size(0) == first_target[images]),
                    "sizes, counts: expected sums of ", features.size(0), " and ", targets.size(0), ", got ", tokens(),
                    " and ", first_target[images]);
    STD_TORCH_CHECK(!dense_ || targets.size(0) == images, "targets: expected ", images, " rows");
  }

  int64_t tokens() const { return first_token[images]; }
  int64_t size(int64_t b) const { return first_token[b + 1] - first_token[b]; }
  int64_t base(int64_t b) const { return dense_ ? 0 : first_token[b]; }            // what indices count from
  int64_t position_base(int64_t b) const { return dense_ ? 0 : first_target[b]; }  // and positions of targets

  // Element (token or target i, channel 0) of image b.
  const char* at(const Tensor& t, int64_t b, int64_t first, int64_t i = 0) const {
    const int64_t element = dense_ ? b * t.stride(0) + i * t.stride(1) : (first + i) * t.stride(0);
    return static_cast<const char*>(t.data_ptr()) + element * static_cast<int64_t>(t.element_size());
  }
  int64_t stride(const Tensor& t) const { return t.stride(dense_ ? 1 : 0); }

  // A new tensor [B, each] or [all], with `channels` [.., channels].
  Tensor allocate(int64_t all, int32_t dtype, std::optional<int64_t> channels = {}) const {
    const int64_t each = images ? all / images : 0, width = channels.value_or(1), step = std::max<int64_t>(width, 1);
    const int64_t rows = dense_ ? each : all, skip = dense_ ? 0 : 1, dims = 2 - skip + (channels ? 1 : 0);
    const int64_t sizes[3] = {images, rows, width}, strides[3] = {std::max<int64_t>(rows, 1) * step, step, 1};
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dims, sizes + skip, strides + skip, dtype, aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
  }

  int64_t images;
  std::vector<int64_t> first_token, first_target;  // of each image, and the number of all

 private:
  bool dense_;
};

// Which of an image's tokens are targets, and which sources: an index outside the image is none, and a target no
// source.
void read_roles(const Layout& layout, int64_t b, const Tensor& targets, const Tensor& sources, Image& image) {
  const int64_t size = layout.size(b), count = layout.first_target[b + 1] - layout.first_target[b];
  std::vector<uint8_t> free(size, 1);
  for (int64_t j = 0; j < count; ++j) {
    const int64_t given = *reinterpret_cast<const int64_t*>(layout.at(targets, b, layout.first_target[b], j));
    if (given < layout.base(b) || given - layout.base(b) >= size) continue;
    image.targets.push_back({given - layout.base(b), j});
    free[given - layout.base(b)] = 0;
  }
  if (image.targets.empty()) return;
  const auto* source = reinterpret_cast<const bool*>(layout.at(sources, b, layout.first_token[b]));
  const int64_t stride = layout.stride(sources);
  for (int64_t i = 0; i < size; ++i)
    if (free[i] && source[i * stride]) image.sources.push_back(i);
  image.chosen.resize(image.sources.size());
}

// The sources, target by target: each has its own, in ascending order.
void list_members(Image& image) {
  for (const int32_t j : image.chosen) ++image.targets[j].members;
  int64_t first = 0;
  std::vector<int64_t> next;
  for (Target& target : image.targets) {
    target.first_member = first, first += target.members;
    next.push_back(target.first_member);
  }
  image.members.resize(first);
  for (size_t i = 0; i < image.sources.size(); ++i) image.members[next[image.chosen[i]]++] = image.sources[i];
}

void copy_rows(const Layout& layout, const Tensor& features, int64_t row_bytes, char* out) {
  const int64_t stride = layout.stride(features) * static_cast<int64_t>(features.element_size());
  for (int64_t b = 0; b < layout.images; ++b) {
    const char* const from = layout.at(features, b, layout.first_token[b]);
    char* const to = out + layout.first_token[b] * row_bytes;
    const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 18) / row_bytes);  // 256 KiB a task
    parallel_over(layout.size(b), grain, [&](int64_t begin, int64_t end) {
      if (stride == row_bytes) {
        std::memcpy(to + begin * row_bytes, from + begin * row_bytes, (end - begin) * row_bytes);
        return;
      }
      for (int64_t i = begin; i < end; ++i) std::memcpy(to + i * row_bytes, from + i * stride, row_bytes);
    });
  }
}

Tensor with_dense_channels(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

// hiprune::_cpu_merge_tokens, with the best instruction set up to `isa` (tests choose): features [B, N, C] or [T, C]
// with the targets' rows replaced, or these rows alone, [B, c, C] or [M, C]; and for each token the position of its
// target, or -1.
std::tuple<Tensor, Tensor> merge_with(Tensor given_features, Tensor given_keys, Tensor targets, Tensor sources,
                                      std::vector<int64_t> sizes, std::vector<int64_t> counts, bool rows_only,
                                      int64_t isa) {
  check_dtype(given_features, "features");
  check_dtype(given_keys, "keys");
  const Layout layout(given_features, targets, sizes, counts);
  const int64_t dims = given_features.dim(), channels = given_features.size(dims - 1);
  STD_TORCH_CHECK(given_keys.dim() == dims && sources.dim() == dims - 1, "keys, sources: expected as features");
  for (int64_t d = 0; d < dims - 1; ++d)
    STD_TORCH_CHECK(given_keys.size(d) == given_features.size(d) && sources.size(d) == given_features.size(d),
                    "keys, sources: expected as many tokens as features");
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long, "targets: expected int64");
  STD_TORCH_CHECK(sources.scalar_type() == ScalarType::Bool, "sources: expected bool");
  const Tensor features = with_dense_channels(given_features), keys = with_dense_channels(given_keys);
  const int64_t set = best_set(isa), depth = keys.size(dims - 1);
  const Assigning assigning = choose_assigning(keys.scalar_type(), set);
  Merge* const merge_target = choose_merge(features.scalar_type(), set);

  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(features.get(), &dtype));
  const int64_t all_targets = layout.first_target[layout.images];
  Tensor merged = layout.allocate(rows_only ? all_targets : layout.tokens(), dtype, channels);
  Tensor assigned = layout.allocate(layout.tokens(), aoti_torch_dtype_int64());
  auto* const position = static_cast<int64_t*>(assigned.data_ptr());
  std::fill(position, position + layout.tokens(), int64_t{-1});
  const int64_t row_bytes = channels * static_cast<int64_t>(features.element_size());
  auto* const out = static_cast<char*>(merged.data_ptr());

  std::vector<Image> images(layout.images);
  std::vector<std::array<int64_t, 2>> tasks;  // image and first source
  for (int64_t b = 0; b < layout.images; ++b) {
    Image& image = images[b];
    image.features = layout.at(features, b, layout.first_token[b]);
    image.keys = layout.at(keys, b, layout.first_token[b]);
    image.row_stride = layout.stride(features), image.key_stride = layout.stride(keys), image.depth = depth;
    read_roles(layout, b, targets, sources, image);
    for (int64_t first = 0; first < int64_t(image.sources.size()); first += kSourcesPerTask)
      tasks.push_back({b, first});
  }
  parallel_over(layout.images, 1, [&](int64_t begin, int64_t end) {
    const auto row = std::make_unique_for_overwrite<float[]>(depth);
    for (int64_t b = begin; b < end; ++b) {
      Image& image = images[b];
      if (image.sources.empty()) continue;
      const int64_t columns = round_up(image.targets.size(), assigning.lanes);
      image.panels = std::make_unique_for_overwrite<float[]>(columns * (depth + 1));
      assigning.pack_targets(image, image.panels.get(), row.get());
    }
  });
  parallel_over(tasks.size(), 1, [&](int64_t begin, int64_t end) {
    const auto rows = std::make_unique_for_overwrite<float[]>(assigning.tile * depth);
    for (int64_t t = begin; t < end; ++t) {
      const auto [b, first] = tasks[t];
      const int64_t last = std::min<int64_t>(first + kSourcesPerTask, images[b].sources.size());
      assigning.assign(images[b], images[b].panels.get(), rows.get(), first, last, images[b].chosen.data());
    }
  });
  for (int64_t b = 0; b < layout.images; ++b) {
    Image& image = images[b];
    list_members(image);
    for (size_t i = 0; i < image.sources.size(); ++i)
      position[layout.first_token[b] + image.sources[i]] =
          layout.position_base(b) + image.targets[image.chosen[i]].position;
    for (Target& target : image.targets) {
      // Behind a target that is in the list twice there is a row that must not be overwritten with its own features.
      const int64_t row = rows_only ? layout.first_target[b] + target.position : layout.first_token[b] + target.token;
      target.out = rows_only || target.members ? out + row * row_bytes : nullptr;
    }
  }
  if (channels == 0) return {merged, assigned};
  if (!rows_only) {
    copy_rows(layout, features, row_bytes, out);
  } else {
    int64_t found = 0;
    for (const Image& image : images) found += image.targets.size();
    if (found < all_targets) std::memset(out, 0, all_targets * row_bytes);
  }
  const int64_t blocks = ceil_div(channels, kChannelsPerTask);
  parallel_over(layout.images * blocks, 1, [&](int64_t begin, int64_t end) {
    const auto sum = std::make_unique_for_overwrite<float[]>(channels);
    for (int64_t unit = begin; unit < end;) {
      const int64_t b = unit / blocks, upto = std::min(end, (b + 1) * blocks);
      const int64_t first = (unit - b * blocks) * kChannelsPerTask;
      const int64_t last = std::min(channels, (upto - b * blocks) * kChannelsPerTask);
      for (size_t j = 0; j < images[b].targets.size(); ++j)
        if (images[b].targets[j].out) merge_target(images[b], j, first, last, sum.get());
      unit = upto;
    }
  });
  return {merged, assigned};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hiprune, m) {
  m.def(
      "_cpu_merge_tokens(Tensor features, Tensor keys, Tensor targets, Tensor sources, int[] sizes, int[] counts, "
      "bool rows_only, int isa) -> (Tensor merged, Tensor assigned)");
}

STABLE_TORCH_LIBRARY_IMPL(hiprune, CPU, m) { m.impl("_cpu_merge_tokens", TORCH_BOX(&merge_with)); }
