// Token selection on the CPU: anchors, buffers, registers (Algorithm 1 of the HiPrune paper) and the gather of their rows.
//
// Scores become unsigned keys that order like them (0 for tokens that are out of the race). Top-k finds the k-th largest
// key (a histogram, then a quick select within one bin), takes everything above it, and of those that equal it the first
// few in index order: among equal scores the lowest index wins, without sorting. Images are independent and each is one
// task, so the result does not depend on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

enum Role : uint8_t { kDropped, kAnchor, kBuffer, kRegister };
enum Rule : int64_t { kPaper, kOfficial, kOfficialQwen, kGrid };  // the order of budget.RULES

constexpr int64_t kSteps[8][2] = {{0, -1}, {0, 1}, {-1, 0}, {1, 0}, {-1, -1}, {-1, 1}, {1, -1}, {1, 1}};  // (row, column)
constexpr int64_t kNeighbors[4] = {4, 8, 2, 0};  // how many of kSteps; the order of budget.CLUSTER_SIZES

struct Image {
  int64_t frames, height, width, budget, anchors;
  int64_t count() const { return frames * height * width; }
};

// hiprune_kernels.budget.SelectionPlan, from its flat form.
struct Plan {
  int64_t num_prefix_tokens, rule, neighbors;
  bool buffers, registers;
  std::vector<Image> images;

  explicit Plan(const std::vector<int64_t>& flat) {
    STD_TORCH_CHECK(flat.size() >= 5 && flat.size() % 5 == 0, "plan: expected 5 numbers and 5 for each image, got ",
                    flat.size());
    STD_TORCH_CHECK(flat[0] >= 0 && flat[1] >= kPaper && flat[1] <= kGrid && flat[2] >= 0 && flat[2] < 4,
                    "plan: no such prefix, rule or neighborhood");
    num_prefix_tokens = flat[0], rule = flat[1], neighbors = kNeighbors[flat[2]];
    buffers = flat[3] != 0, registers = flat[4] != 0;
    for (size_t i = 5; i < flat.size(); i += 5) {
      const Image image{flat[i], flat[i + 1], flat[i + 2], flat[i + 3], flat[i + 4]};
      STD_TORCH_CHECK(image.frames > 0 && image.height > 0 && image.width > 0 && image.budget > 0 &&
                          image.budget <= image.count() && image.anchors <= image.budget,
                      "plan: expected a budget of 1..", image.count(), " and no more anchors, got ", image.budget,
                      " and ", image.anchors);
      images.push_back(image);
    }
  }
  bool official() const { return rule == kOfficial || rule == kOfficialQwen; }
};

// Keys in the order of the scores. NaN is 1, behind -inf; adding 0 turns -0 into +0, which must tie.
template <class Score, class Key = std::conditional_t<sizeof(Score) == 8, uint64_t, uint32_t>>
inline Key key_of(Score score) {
  constexpr Key kSign = Key{1} << (8 * sizeof(Key) - 1);
  Key bits;
  score += Score{0};
  std::memcpy(&bits, &score, sizeof bits);
  bits ^= (bits & kSign) ? ~Key{0} : kSign;
  return score == score ? bits : Key{1};
}

// The keys of an image, 0 where a token is out of the race, and the top-k over them.
template <class Key>
class Ranking {
 public:
  explicit Ranking(int64_t n) : keys_(n), scratch_(n) {}

  // Sets the key of every token i to key_at(i).
  template <class KeyAt>
  void assign(KeyAt key_at) {
    low_ = ~Key{0}, high_ = 0;
    for (int64_t i = 0; i < int64_t(keys_.size()); ++i) {
      const Key key = keys_[i] = key_at(i);
      low_ = std::min<Key>(low_, key - 1), high_ = std::max(high_, key);  // 0 - 1 wraps: never the minimum
    }
  }

  // Sets roles[i] = role for the k best tokens in the race, the lowest index first among equals.
  void take_best(int64_t k, uint8_t role, uint8_t* roles) {
    if (k <= 0) return;
    // Spread the keys that are present over 256 bins, and find the bin that holds the k-th largest.
    const Key low = low_;
    const int shift = std::max(0, int(std::bit_width(Key(high_ - low))) - 8);
    const auto bin_of = [=](Key key) { return key ? 1 + ((key - 1 - low) >> shift) : 0; };
    std::array<uint32_t, 257> histogram{};
    for (Key key : keys_) ++histogram[bin_of(key)];
    Key bin = 256;
    for (; bin > 0 && histogram[bin] < k; --bin) k -= histogram[bin];

    Key threshold = 0;
    int64_t equal = 0;  // how many of those that equal the threshold belong to the best k
    if (bin > 0) {      // else fewer than k are in the race: all of them win
      int64_t count = 0;
      for (Key key : keys_) {
        scratch_[count] = key;
        count += bin_of(key) == bin;
      }
      const auto first = scratch_.begin(), last = first + count;
      std::nth_element(first, first + (k - 1), last, std::greater<>());
      threshold = scratch_[k - 1];
      equal = k - std::count_if(first, last, [=](Key key) { return key > threshold; });
    }
    const int64_t n = static_cast<int64_t>(keys_.size());
    for (int64_t i = 0; i < n; ++i) roles[i] = keys_[i] > threshold ? role : roles[i];
    for (int64_t i = 0; equal > 0; ++i)
      if (keys_[i] == threshold) roles[i] = role, --equal;
  }

 private:
  std::vector<Key> keys_, scratch_;
  Key low_ = 0, high_ = 0;  // one below the smallest key in the race, and the largest
};

// Calls visit(neighbour) for every neighbour of token i within its frame.
template <class Visit>
void for_each_neighbor(const Image& image, const Plan& plan, int64_t i, Visit visit) {
  const int64_t frame = image.height * image.width, first = i - i % frame, last = first + frame - 1;
  const int64_t row = (i - first) / image.width, column = (i - first) % image.width;
  for (int64_t step = 0; step < plan.neighbors; ++step) {
    const int64_t dy = kSteps[step][0], dx = kSteps[step][1], index = i + dy * image.width + dx;
    if (plan.official()) {
      visit(std::clamp(index, first, last));
    } else if (plan.rule == kPaper) {
      if (index >= first && index <= last) visit(index);
    } else if (row + dy >= 0 && row + dy < image.height && column + dx >= 0 && column + dx < image.width) {
      visit(index);
    }
  }
}

// A row of scores or mask entries: element i at data[i * stride].
template <class T>
struct Row {
  const T* data;
  int64_t stride;
  T operator[](int64_t i) const { return data[i * stride]; }
};

template <class Score>
void select_image(const Image& image, const Plan& plan, Row<Score> object, Row<Score> deep, Row<bool> mask,
                  uint8_t* roles) {
  const int64_t n = image.count();
  const auto eligible = [&](int64_t i) { return !mask.data || mask[i]; };
  const auto open = [&](int64_t i) { return eligible(i) && roles[i] == kDropped; };
  const auto kept = [&] { return n - std::count(roles, roles + n, uint8_t{kDropped}); };
  Ranking<decltype(key_of(Score{}))> ranking(n);
  std::fill(roles, roles + n, kDropped);

  ranking.assign([&](int64_t i) { return eligible(i) ? key_of(object[i]) : 0; });
  ranking.take_best(image.anchors, kAnchor, roles);
  if (plan.buffers) {
    for (int64_t i = 0; i < n; ++i)
      if (roles[i] == kAnchor)
        for_each_neighbor(image, plan, i, [&](int64_t j) {
          if (open(j)) roles[j] = kBuffer;
        });
    int64_t excess = kept() - image.budget;  // too many (official rule): the highest indices go
    for (int64_t i = n - 1; excess > 0; --i)
      if (roles[i] == kBuffer) roles[i] = kDropped, --excess;
  }

  const int64_t rest = image.budget - kept();
  if (!plan.registers) {
    ranking.assign([&](int64_t i) { return open(i) ? key_of(object[i]) : 0; });
    ranking.take_best(rest, kAnchor, roles);
  } else if (plan.official()) {  // taken tokens lose 1 but stay in the race, as in the released code
    ranking.assign([&](int64_t i) {
      return eligible(i) ? key_of<Score>(deep[i] - (roles[i] == kDropped ? Score{0} : Score{1})) : 0;
    });
    std::vector<uint8_t> winners(n, kDropped);
    ranking.take_best(rest, kRegister, winners.data());
    for (int64_t i = 0; i < n; ++i) roles[i] = roles[i] == kDropped ? winners[i] : roles[i];
  } else {
    ranking.assign([&](int64_t i) { return open(i) ? key_of(deep[i]) : 0; });
    ranking.take_best(rest, kRegister, roles);
  }
}

// at::parallel_for, without its cost where there is nothing to share out.
template <class Body>
void parallel_over(int64_t count, int64_t grain, const Body& body) {
  if (count <= grain) return body(0, count);
  torch::stable::parallel_for(0, count, grain, body);
}

// Where the images of a batch or of a packed sequence lie.
class Layout {
 public:
  Layout(const Tensor& scores, const Plan& plan)
      : plan_(plan), dense_(scores.dim() == 2), images_(dense_ ? scores.size(0) : int64_t(plan.images.size())) {
    STD_TORCH_CHECK(!dense_ || plan.images.size() == 1, "plan: expected one image for a batch, got ", plan.images.size());
    for (const Image& image : plan.images) {
      token_start_.push_back(token_start_.back() + image.count());
      row_start_.push_back(row_start_.back() + image.budget);
    }
    const int64_t columns = scores.size(dense_ ? 1 : 0);
    const int64_t expected = token_start_.back() + (dense_ ? plan.num_prefix_tokens : 0);
    STD_TORCH_CHECK(columns == expected, "object_scores: expected ", expected, " columns, got ", columns);
  }

  bool dense() const { return dense_; }
  int64_t images() const { return images_; }
  const Image& image(int64_t b) const { return plan_.images[dense_ ? 0 : b]; }
  int64_t first_token(int64_t b) const { return dense_ ? b * token_start_[1] : token_start_[b]; }  // in roles
  int64_t first_row(int64_t b) const { return dense_ ? b * row_start_[1] : row_start_[b]; }        // in indices, kept
  int64_t rows() const { return dense_ ? images_ * row_start_[1] : row_start_.back(); }
  int64_t index_base(int64_t b) const { return dense_ ? 0 : token_start_[b]; }
  std::vector<int64_t> tokens_shape() const { return shape(token_start_); }
  std::vector<int64_t> rows_shape() const { return shape(row_start_); }

  // The scores (with prefix columns to skip) or mask of image b.
  template <class T>
  Row<T> row(const Tensor& t, int64_t b, int64_t prefix) const {
    const auto* data = static_cast<const T*>(t.data_ptr());
    if (dense_) return {data + b * t.stride(0) + prefix * t.stride(1), t.stride(1)};
    return {data + token_start_[b] * t.stride(0), t.stride(0)};
  }

 private:
  std::vector<int64_t> shape(const std::vector<int64_t>& starts) const {
    return dense_ ? std::vector<int64_t>{images_, starts[1]} : std::vector<int64_t>{starts.back()};
  }

  const Plan& plan_;
  bool dense_;
  int64_t images_;
  std::vector<int64_t> token_start_{0}, row_start_{0};
};

template <class Score>
void select_images(const Layout& layout, const Plan& plan, const Tensor& object_scores, const Tensor& deep_scores,
                   const std::optional<Tensor>& candidate_mask, Tensor& indices, Tensor& roles) {
  const int64_t prefix = plan.num_prefix_tokens;
  parallel_over(layout.images(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t count = layout.image(b).count(), budget = layout.image(b).budget, base = layout.index_base(b);
      auto* role = static_cast<uint8_t*>(roles.data_ptr()) + layout.first_token(b);
      auto* index = static_cast<int64_t*>(indices.data_ptr()) + layout.first_row(b);
      select_image<Score>(layout.image(b), plan, layout.row<Score>(object_scores, b, prefix),
                          layout.row<Score>(deep_scores, b, prefix),
                          candidate_mask ? layout.row<bool>(*candidate_mask, b, 0) : Row<bool>{nullptr, 0}, role);
      int64_t j = 0;
      for (int64_t i = 0; i < count && j < budget; ++i) {  // write, then advance if it was kept: no branch to mispredict
        index[j] = base + i;
        j += role[i] != kDropped;
      }
      std::fill(index + j, index + budget, int64_t{-1});
    }
  });
}

Tensor gather_rows(const Layout& layout, const Plan& plan, const Tensor& features, const Tensor& indices) {
  const int64_t channels = features.size(features.dim() - 1);
  const bool contiguous = features.stride(features.dim() - 1) == 1 || channels <= 1;
  const Tensor source = contiguous ? features : torch::stable::contiguous(features);
  std::vector<int64_t> shape = layout.rows_shape();
  shape.push_back(channels);
  Tensor kept = torch::stable::empty(shape, features.scalar_type());
  const int64_t element = static_cast<int64_t>(features.element_size()), bytes = channels * element;
  const int64_t batch_bytes = layout.dense() ? source.stride(0) * element : 0;
  const int64_t row_bytes = source.stride(layout.dense() ? 1 : 0) * element;
  const int64_t rows_per_image = layout.dense() ? plan.images[0].budget : std::max<int64_t>(layout.rows(), 1);
  const int64_t prefix = layout.dense() ? plan.num_prefix_tokens : 0;
  const auto* index = static_cast<const int64_t*>(indices.data_ptr());
  const auto* from = static_cast<const char*>(source.data_ptr());
  auto* to = static_cast<char*>(kept.data_ptr());
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 18) / std::max<int64_t>(bytes, 1));  // 256 KiB a task
  parallel_over(layout.rows(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const char* row = from + r / rows_per_image * batch_bytes + (index[r] + prefix) * row_bytes;
      if (index[r] < 0)
        std::memset(to + r * bytes, 0, bytes);
      else
        std::memcpy(to + r * bytes, row, bytes);
    }
  });
  return kept;
}

std::tuple<Tensor, Tensor> select_in(const Layout& layout, const Plan& plan, const Tensor& object_scores,
                                     const Tensor& deep_scores, const std::optional<Tensor>& candidate_mask) {
  Tensor indices = torch::stable::empty(layout.rows_shape(), ScalarType::Long);
  Tensor roles = torch::stable::empty(layout.tokens_shape(), ScalarType::Byte);
  if (object_scores.scalar_type() == ScalarType::Double) {
    select_images<double>(layout, plan, object_scores, deep_scores, candidate_mask, indices, roles);
  } else {
    const auto as_float = [](const Tensor& t) {
      return t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
    };
    select_images<float>(layout, plan, as_float(object_scores), as_float(deep_scores), candidate_mask, indices, roles);
  }
  return {indices, roles};
}

// hiprune::select_tokens: indices [B, budget] or [sum of budgets], roles [B, N] or [T].
std::tuple<Tensor, Tensor> select_tokens(Tensor object_scores, Tensor deep_scores, std::optional<Tensor> candidate_mask,
                                         std::vector<int64_t> flat_plan) {
  const Plan plan(flat_plan);
  return select_in(Layout(object_scores, plan), plan, object_scores, deep_scores, candidate_mask);
}

// hiprune::prune_tokens: kept rows [B, budget, C] or [sum of budgets, C], then as select_tokens.
std::tuple<Tensor, Tensor, Tensor> prune_tokens(Tensor features, Tensor object_scores, Tensor deep_scores,
                                                std::optional<Tensor> candidate_mask, std::vector<int64_t> flat_plan) {
  const Plan plan(flat_plan);
  const Layout layout(object_scores, plan);
  auto [indices, roles] = select_in(layout, plan, object_scores, deep_scores, candidate_mask);
  return {gather_rows(layout, plan, features, indices), indices, roles};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hiprune, CPU, m) {  // schemas: hiprune_kernels/ops/selection.py
  m.impl("select_tokens", TORCH_BOX(&select_tokens));
  m.impl("prune_tokens", TORCH_BOX(&prune_tokens));
}
