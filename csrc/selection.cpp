// Token selection on the CPU: anchors, buffers, registers (Algorithm 1 of the HiPrune paper), and the gather of their
// rows.
//
// Images are independent and each is one task, so the result does not depend on the number of threads. How the best
// scores are found: top_k.h.
//
// All this takes a microsecond for 576 tokens, so what surrounds it counts as well: new tensors come from the C shim
// (through the dispatcher each costs half a microsecond more).

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "instruction_sets.h"
#include "parallel.h"
#include "top_k.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

enum Role : uint8_t { kAnchor = 1, kBuffer, kRegister };          // kDropped is 0
enum Rule : int64_t { kPaper, kOfficial, kOfficialQwen, kGrid };  // the order of budget.RULES

// (row, column) steps to a neighbour
constexpr int64_t kSteps[8][2] = {{0, -1}, {0, 1}, {-1, 0}, {1, 0}, {-1, -1}, {-1, 1}, {1, -1}, {1, 1}};
constexpr int64_t kNeighbors[4] = {4, 8, 2, 0};  // how many of kSteps; the order of budget.CLUSTER_SIZES

struct Image {
  int64_t frames, height, width, budget, anchors;
  int64_t first_token, first_row;  // where it starts among packed tokens, and among packed kept rows
  int64_t count() const { return frames * height * width; }
};

// budget.SelectionPlan, decoded from its flat form.
struct SelectionPlan {
  int64_t num_prefix_tokens, rule, neighbors;
  bool buffers, registers;
  std::vector<Image> images;
  int64_t tokens = 0, rows = 0;  // of all images

  explicit SelectionPlan(const std::vector<int64_t>& flat) {
    STD_TORCH_CHECK(flat.size() >= 5 && flat.size() % 5 == 0, "plan: expected 5 numbers and 5 for each image, got ",
                    flat.size());
    STD_TORCH_CHECK(flat[0] >= 0 && flat[1] >= kPaper && flat[1] <= kGrid && flat[2] >= 0 && flat[2] < 4,
                    "plan: no such prefix, rule or neighborhood");
    num_prefix_tokens = flat[0], rule = flat[1], neighbors = kNeighbors[flat[2]];
    buffers = flat[3] != 0, registers = flat[4] != 0;
    images.reserve(flat.size() / 5 - 1);
    for (size_t i = 5; i < flat.size(); i += 5) {
      const Image image{flat[i], flat[i + 1], flat[i + 2], flat[i + 3], flat[i + 4], tokens, rows};
      STD_TORCH_CHECK(image.frames > 0 && image.height > 0 && image.width > 0 && image.budget > 0 &&
                          image.budget <= image.count() && image.anchors >= 0 && image.anchors <= image.budget,
                      "plan: expected a budget of 1..", image.count(), " and 0 to that many anchors, got ",
                      image.budget, " and ", image.anchors);
      STD_TORCH_CHECK(image.count() <= std::numeric_limits<int32_t>::max(),  // keys are counted in their own type
                      "plan: expected fewer than 2**31 tokens an image, got ", image.count());
      tokens += image.count(), rows += image.budget;
      images.push_back(image);
    }
  }
  bool official() const { return rule == kOfficial || rule == kOfficialQwen; }
};

// ------------------------------------------------------------------------------------------------------ one image

// Makes the neighbours of token i, within its frame, buffers where they are free. Returns how many.
HP_INLINE int64_t surround(const Image& image, const SelectionPlan& plan, int64_t i, Row<bool> mask, uint8_t* roles) {
  const int64_t frame = image.height * image.width, first = i - i % frame, last = first + frame - 1;
  const int64_t row = (i - first) / image.width, column = (i - first) % image.width;
  int64_t taken = 0;
  for (int64_t step = 0; step < plan.neighbors; ++step) {
    const int64_t dy = kSteps[step][0], dx = kSteps[step][1];
    int64_t index = i + dy * image.width + dx;
    if (plan.official()) {
      index = std::clamp(index, first, last);
    } else if (plan.rule == kPaper) {
      if (index < first || index > last) continue;
    } else if (row + dy < 0 || row + dy >= image.height || column + dx < 0 || column + dx >= image.width) {
      continue;
    }
    if (roles[index] == kDropped && (!mask.data || mask[index])) roles[index] = kBuffer, ++taken;
  }
  return taken;
}

// One image: its scores and mask, room for a key per token, and what is written, all of it: roles and indices.
template <class Score>
struct Task {
  const Image& image;
  Row<Score> object, deep;
  Row<bool> mask;
  int64_t base;  // added to the indices
  KeyOf<Score>* keys;
  uint8_t* roles;
  int64_t* index;
};

// Algorithm 1.
template <class Score>
HP_INLINE void select_image(const SelectionPlan& plan, const Task<Score>& task) {
  const Image& image = task.image;
  const int64_t n = image.count();
  std::memset(task.roles, kDropped, n);
  rank(task.object, task.mask, task.roles, Score{0}, n, task.keys);
  take_best(task.keys, n, image.anchors, kAnchor, task.roles);
  int64_t rest = image.budget - image.anchors;  // if there are fewer anchors, nobody is left for the rest
  if (plan.buffers) {
    const uint8_t *at = task.roles, *const end = at + n;
    while ((at = static_cast<const uint8_t*>(std::memchr(at, kAnchor, end - at))))
      rest -= surround(image, plan, at++ - task.roles, task.mask, task.roles);
    for (int64_t i = n - 1; rest < 0; --i)  // too many (official rule): the highest indices go
      if (task.roles[i] == kBuffer) task.roles[i] = kDropped, ++rest;
  }
  // In the released code taken tokens lose 1 but stay in the race.
  const Score penalty = plan.registers && plan.official() ? 1 : 0;
  rank(plan.registers ? task.deep : task.object, task.mask, task.roles, penalty, n, task.keys);
  take_best(task.keys, n, rest, plan.registers ? kRegister : kAnchor, task.roles);
  list_kept(task.roles, n, task.base, image.budget, task.index);
}

template <class Score>
void select_base(const SelectionPlan& plan, const Task<Score>& task) {
  select_image(plan, task);
}
#if defined(__x86_64__)
template <class Score>
__attribute__((target("avx2"))) void select_avx2(const SelectionPlan& plan, const Task<Score>& task) {
  select_image(plan, task);
}
template <class Score>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) void select_avx512(const SelectionPlan& plan,
                                                                                 const Task<Score>& task) {
  select_image(plan, task);
}
#endif

// The function for the best instruction set that this processor has, up to `most`.
template <class Score>
auto kernel_for(int64_t most) {
#if defined(__x86_64__)
  const int64_t sets = instruction_sets();
  if (most >= kAvx512 && sets >> kAvx512 & 1) return &select_avx512<Score>;
  if (most >= kAvx2 && sets >> kAvx2 & 1) return &select_avx2<Score>;
#endif
  return &select_base<Score>;
}

// ------------------------------------------------------------------------------------------------------ all images

// Where the images of a batch, which share one entry of the plan, or of a packed sequence lie.
class Layout {
 public:
  Layout(const Tensor& scores, const SelectionPlan& plan)
      : plan_(plan), dense_(scores.dim() == 2), images_(dense_ ? scores.size(0) : int64_t(plan.images.size())) {
    STD_TORCH_CHECK(!dense_ || plan.images.size() == 1, "plan: expected one image for a batch, got ",
                    plan.images.size());
    const int64_t columns = scores.size(dense_ ? 1 : 0), expected = plan.tokens + prefix();
    STD_TORCH_CHECK(columns == expected, "object_scores: expected ", expected, " columns, got ", columns);
  }

  bool dense() const { return dense_; }
  int64_t images() const { return images_; }
  int64_t prefix() const { return dense_ ? plan_.num_prefix_tokens : 0; }
  const Image& image(int64_t b) const { return plan_.images[dense_ ? 0 : b]; }
  int64_t first_token(int64_t b) const { return dense_ ? b * plan_.tokens : image(b).first_token; }  // in roles
  int64_t first_row(int64_t b) const { return dense_ ? b * plan_.rows : image(b).first_row; }        // in indices, kept
  int64_t rows() const { return dense_ ? images_ * plan_.rows : plan_.rows; }
  int64_t index_base(int64_t b) const { return dense_ ? 0 : image(b).first_token; }

  // The scores (with prefix columns to skip) or mask of image b.
  template <class T>
  Row<T> row(const Tensor& t, int64_t b, int64_t prefix) const {
    const auto* data = static_cast<const T*>(t.data_ptr());
    if (dense_) return {data + b * t.stride(0) + prefix * t.stride(1), t.stride(1)};
    return {data + image(b).first_token * t.stride(0), t.stride(0)};
  }

  // A new tensor [B, size] or [size], where there are channels with a last dimension of them.
  Tensor allocate(int64_t size, int32_t dtype, std::optional<int64_t> channels = {}) const {
    const int64_t width = channels.value_or(1), step = std::max<int64_t>(width, 1);
    const int64_t sizes[3] = {images_, size, width}, strides[3] = {size * step, step, 1};
    const int64_t skip = dense_ ? 0 : 1, dims = 2 - skip + (channels ? 1 : 0);
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dims, sizes + skip, strides + skip, dtype, aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
  }

 private:
  const SelectionPlan& plan_;
  bool dense_;
  int64_t images_;
};

template <class Score>
void select_images(const Layout& layout, const SelectionPlan& plan, const Tensor& object_scores,
                   const Tensor& deep_scores, const std::optional<Tensor>& candidate_mask, int64_t isa, Tensor& indices,
                   Tensor& roles) {
  const auto select_one = kernel_for<Score>(isa);
  int64_t most = 0;
  for (const Image& image : plan.images) most = std::max(most, image.count());
  parallel_over(layout.images(), 1, [&](int64_t begin, int64_t end) {
    const auto keys = std::make_unique_for_overwrite<KeyOf<Score>[]>(most);
    for (int64_t b = begin; b < end; ++b)
      select_one(
          plan, {layout.image(b), layout.row<Score>(object_scores, b, layout.prefix()),
                 layout.row<Score>(deep_scores, b, layout.prefix()),
                 candidate_mask ? layout.row<bool>(*candidate_mask, b, 0) : Row<bool>{nullptr, 0}, layout.index_base(b),
                 keys.get(), static_cast<uint8_t*>(roles.data_ptr()) + layout.first_token(b),
                 static_cast<int64_t*>(indices.data_ptr()) + layout.first_row(b)});
  });
}

Tensor gather_rows(const Layout& layout, const SelectionPlan& plan, const Tensor& features, const Tensor& indices) {
  const int64_t channels = features.size(features.dim() - 1);
  const bool contiguous = features.stride(features.dim() - 1) == 1 || channels <= 1;
  const Tensor source = contiguous ? features : torch::stable::contiguous(features);
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(features.get(), &dtype));
  Tensor kept = layout.allocate(plan.rows, dtype, channels);
  if (channels == 0) return kept;  // the pointers below would be null, and memcpy takes none even for no bytes
  const int64_t element = static_cast<int64_t>(features.element_size()), bytes = channels * element;
  const int64_t batch_bytes = layout.dense() ? source.stride(0) * element : 0;
  const int64_t row_bytes = source.stride(layout.dense() ? 1 : 0) * element;
  const int64_t rows_per_image = layout.dense() ? plan.rows : std::max<int64_t>(layout.rows(), 1);
  const int64_t prefix = layout.prefix();
  const auto* index = static_cast<const int64_t*>(indices.data_ptr());
  const auto* from = static_cast<const char*>(source.data_ptr());
  auto* to = static_cast<char*>(kept.data_ptr());
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 18) / bytes);  // 256 KiB a task
  parallel_over(layout.rows(), grain, [&](int64_t begin, int64_t end) {
    int64_t b = begin / rows_per_image;
    for (int64_t r = begin; r < end; ++r) {
      b += r == (b + 1) * rows_per_image;
      if (index[r] < 0)
        std::memset(to + r * bytes, 0, bytes);
      else
        std::memcpy(to + r * bytes, from + b * batch_bytes + (index[r] + prefix) * row_bytes, bytes);
    }
  });
  return kept;
}

std::tuple<Tensor, Tensor> select_in(const Layout& layout, const SelectionPlan& plan, const Tensor& object_scores,
                                     const Tensor& deep_scores, const std::optional<Tensor>& candidate_mask,
                                     int64_t isa = kAvx512) {
  Tensor indices = layout.allocate(plan.rows, aoti_torch_dtype_int64());
  Tensor roles = layout.allocate(plan.tokens, aoti_torch_dtype_uint8());
  if (object_scores.scalar_type() == ScalarType::Double) {
    select_images<double>(layout, plan, object_scores, deep_scores, candidate_mask, isa, indices, roles);
  } else if (object_scores.scalar_type() == ScalarType::Float) {
    select_images<float>(layout, plan, object_scores, deep_scores, candidate_mask, isa, indices, roles);
  } else {
    const Tensor objects = torch::stable::to(object_scores, ScalarType::Float);
    const Tensor deeps = torch::stable::to(deep_scores, ScalarType::Float);
    select_images<float>(layout, plan, objects, deeps, candidate_mask, isa, indices, roles);
  }
  return {indices, roles};
}

// hiprune::select_tokens: indices [B, budget] or [sum of budgets], roles [B, N] or [T].
std::tuple<Tensor, Tensor> select_tokens(Tensor object_scores, Tensor deep_scores, std::optional<Tensor> candidate_mask,
                                         std::vector<int64_t> flat_plan) {
  const SelectionPlan plan(flat_plan);
  return select_in(Layout(object_scores, plan), plan, object_scores, deep_scores, candidate_mask);
}

// hiprune::_cpu_select_tokens: the same with an instruction set of choice, for tests.
std::tuple<Tensor, Tensor> select_tokens_with(Tensor object_scores, Tensor deep_scores,
                                              std::optional<Tensor> candidate_mask, std::vector<int64_t> flat_plan,
                                              int64_t isa) {
  const SelectionPlan plan(flat_plan);
  return select_in(Layout(object_scores, plan), plan, object_scores, deep_scores, candidate_mask, isa);
}

// hiprune::prune_tokens: kept rows [B, budget, C] or [sum of budgets, C], then as select_tokens.
std::tuple<Tensor, Tensor, Tensor> prune_tokens(Tensor features, Tensor object_scores, Tensor deep_scores,
                                                std::optional<Tensor> candidate_mask, std::vector<int64_t> flat_plan) {
  const SelectionPlan plan(flat_plan);
  const Layout layout(object_scores, plan);
  auto [indices, roles] = select_in(layout, plan, object_scores, deep_scores, candidate_mask);
  return {gather_rows(layout, plan, features, indices), indices, roles};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hiprune, m) {
  m.def(
      "_cpu_select_tokens(Tensor object_scores, Tensor deep_scores, Tensor? candidate_mask, int[] plan, int isa) -> "
      "(Tensor indices, Tensor roles)");
}

STABLE_TORCH_LIBRARY_IMPL(hiprune, CPU, m) {  // the other schemas: hiprune_kernels/ops/selection.py
  m.impl("select_tokens", TORCH_BOX(&select_tokens));
  m.impl("_cpu_select_tokens", TORCH_BOX(&select_tokens_with));
  m.impl("prune_tokens", TORCH_BOX(&prune_tokens));
}
