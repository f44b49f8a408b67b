// Attention on the CPU together with its column scores: O = softmax(scale Q K^T) V, and for every key the sum of the
// softmax probabilities over the queries (Eq. 2 of the HiPrune paper), without ever holding the matrix of
// probabilities.
//
// Work. A *segment* is one image of a batch or one sequence of a packed ("varlen") batch; a *unit* is one key head
// of a segment with the query heads that share it. Units are taken in groups whose buffers fit 1 MiB (or one by
// one), which bounds memory however many heads there are. For a group, threads first pack keys and values into
// panels (see attention_tiles.inc), then take chunks of some 96 query rows of one head, then sum up columns: even a
// single head gives many threads work. A chunk is walked in strips of rows: a strip of S = Q K^T stays in the L2
// cache while it is exponentiated (each exponential is taken once), added to the columns and multiplied by V.
//
// Keys hidden by key_mask are left out when packing. So every query row sees a prefix of the packed keys, causal or
// not, and what a hidden key holds is never read.
//
// Determinism. Each chunk adds its rows in ascending order into a slot of its own, and the slots of a segment are
// summed in ascending order. Chunks depend on nothing but the segment's number of queries; threads decide only who
// does what. So the result is the same bit for bit whatever the number of threads and whatever else is in the batch.
//
// One source serves every instruction set: attention_tiles.inc is compiled once for each, and the processor decides
// at the call. It must not be compiled with -ffast-math, which breaks the rounding trick of its exponential.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <thread>
#include <tuple>
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

constexpr int64_t kMinStrip = 8, kMaxStrip = 24;     // rows of a strip
constexpr int64_t kStripFloats = 400 * 1024 / 4;     // of S in a strip, which should stay in the L2 cache
constexpr int64_t kChunkRows = 96, kMaxChunks = 64;  // query rows of a task, and tasks of a head at most
constexpr int64_t kSumColumns = 512;                 // columns of a task that sums up slots
constexpr int64_t kGroupFloats = 1024 * 1024 / 4;    // of the buffers of a group of several units
constexpr int64_t kMaxDepth = 256;                   // the largest head dimension
constexpr int64_t kLine = 16;                        // floats in a cache line; every buffer starts on one

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Columns cut into vectors, and the vectors into panels of at most `widest`, as equal as can be.
struct Panels {
  int64_t vectors, count;
  Panels(int64_t columns, int64_t lanes, int64_t widest)
      : vectors(ceil_div(columns, lanes)), count(ceil_div(vectors, widest)) {}
  int64_t begin(int64_t panel) const { return panel * vectors / count; }
  int64_t width(int64_t panel) const { return begin(panel + 1) - begin(panel); }
};

// The buffers of a thread, one after the other: strips of Q, S and O, and of P where it is not S rewritten in place.
struct Strip {
  int64_t rows, stride, p_stride, row_floats;  // row_floats: of Q and O
  // An odd number of cache lines keeps the rows of S out of one another's cache sets.
  Strip(int64_t keys, int64_t depth, int64_t packing)
      : stride((ceil_div(keys, kLine) | 1) * kLine), p_stride(stride / packing), row_floats(round_up(depth, kLine)) {
    rows = std::clamp(kStripFloats / stride, kMinStrip, kMaxStrip);
  }
  int64_t floats() const { return rows * (2 * row_floats + stride + (p_stride < stride ? p_stride : 0)); }
};

// What all segments share. Strides count elements.
struct Problem {
  int64_t query_heads, key_heads, depth, element_size;
  int64_t query_head, query_row, key_head, key_row, value_head, value_row, output_head, output_row;
  float scale_power;  // |scale| rounded down to a power of two: products with it are exact
  float scale_rest;   // |scale| * log2(e) / scale_power
  bool negate;        // scale < 0: the queries change sign instead
  bool causal, want_scores, per_head;
  double score_scale;

  int64_t group() const { return query_heads / key_heads; }  // query heads that share a key head
};

struct Segment {
  const char *query, *key, *value;
  char* output;   // null where only scores are asked for
  float* scores;  // of head 0, the next head's `score_head` floats further
  int64_t score_head;
  const bool* query_mask;  // may be null
  int64_t query_mask_stride;
  bool masked;
  int64_t queries, keys, visible;
  std::vector<int64_t> positions;  // where masked: those of the visible keys, ascending

  int64_t chunk_rows() const { return ceil_div(queries, std::min(ceil_div(queries, kChunkRows), kMaxChunks)); }
  int64_t chunks() const { return ceil_div(queries, chunk_rows()); }
  int64_t slot_floats() const { return round_up(visible, kLine); }
  int64_t position(int64_t n) const { return masked ? positions[n] : n; }
  bool counts(int64_t query) const { return !query_mask || query_mask[query * query_mask_stride]; }

  // How many of the packed keys a query sees: always the first ones.
  int64_t limit(bool causal, int64_t query) const {
    if (!causal) return visible;
    const int64_t end = std::clamp<int64_t>(query + 1 + keys - queries, 0, keys);
    return masked ? std::lower_bound(positions.begin(), positions.end(), end) - positions.begin() : end;
  }
};

// One key head of a segment, and the query heads that share it. The slots hold [query head, chunk, column].
struct Unit {
  const Segment* segment;
  int64_t head;                     // its first query head
  const void *query, *key, *value;  // of that head, and of the key head
  void* output;
  float *packed_key, *packed_value, *slots;
};

struct Kernels {
  int64_t lanes, vectors, packing;
  void (*pack)(const Problem&, const Unit&, int64_t panel);
  void (*attend)(const Problem&, const Unit&, int64_t head, int64_t begin, int64_t end, float* column, float* scratch);
};

namespace base {
#define HP_LANES 4
#define HP_ROWS 6
#if defined(__aarch64__)
#define HP_VECTORS 3
#else
#define HP_VECTORS 2
#endif
#define HP_F16C 0
#define HP_PAIRS 0
#include "attention_tiles.inc"
}  // namespace base

#undef HP_LANES
#undef HP_F16C
#if defined(__x86_64__)
#define HP_F16C 1

HP_TARGET_BEGIN("avx2,fma,f16c")
namespace avx2 {
#define HP_LANES 8
#include "attention_tiles.inc"
}  // namespace avx2
HP_TARGET_END

#undef HP_LANES
#undef HP_ROWS
#undef HP_VECTORS
#define HP_LANES 16
#define HP_ROWS 8
#define HP_VECTORS 3

HP_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {
#include "attention_tiles.inc"
}  // namespace avx512
HP_TARGET_END

#undef HP_PAIRS
#define HP_PAIRS 1

HP_TARGET_BEGIN("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512_bf16 {
#include "attention_tiles.inc"
}  // namespace avx512_bf16
HP_TARGET_END
#endif

template <class T>
Kernels kernels_for(int64_t set) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, BFloat16>)
    if (set == kAvx512Bf16) return avx512_bf16::make_kernels<T>();
  if (set >= kAvx512) return avx512::make_kernels<T>();
  if (set == kAvx2) return avx2::make_kernels<T>();
#endif
  return base::make_kernels<T>();
}

Kernels choose_kernels(ScalarType dtype, int64_t isa) {
  const int64_t sets = instruction_sets();
  STD_TORCH_CHECK(isa >= -1 && isa < kInstructionSets && (isa == -1 || sets >> isa & 1),
                  "isa: expected -1 (the best one) or an instruction set of mask ", sets, ", got ", isa);
  if (isa == -1)
    for (isa = kAvx512Bf16; !(sets >> isa & 1);) --isa;
  if (dtype == ScalarType::Float) return kernels_for<float>(isa);
  if (dtype == ScalarType::BFloat16) return kernels_for<BFloat16>(isa);
  STD_TORCH_CHECK(dtype == ScalarType::Half, "query: expected float32, bfloat16 or float16");
  return kernels_for<Half>(isa);
}

// --------------------------------------------------------------------------------------------------------- scheduling

// Adds columns [begin, end) of the slots of the units [first, last), all of one segment, to its scores.
void sum_slots(const Problem& problem, const Unit* first, const Unit* last, int64_t begin, int64_t end) {
  const Segment& segment = *first->segment;
  const int64_t chunks = segment.chunks(), stride = segment.slot_floats();
  double sum[kSumColumns];
  for (const Unit* unit = first; unit < last; ++unit)
    for (int64_t head = 0; head < problem.group(); ++head) {
      std::fill(sum, sum + (end - begin), 0.);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const float* slot = unit->slots + (head * chunks + chunk) * stride;
        for (int64_t n = begin; n < end; ++n) sum[n - begin] += slot[n];
      }
      float* scores = segment.scores + (problem.per_head ? (unit->head + head) * segment.score_head : 0);
      for (int64_t n = begin; n < end; ++n)
        scores[segment.position(n)] += static_cast<float>(sum[n - begin] * problem.score_scale);
    }
}

struct Schedule {
  std::vector<Unit> units;
  std::vector<size_t> groups{0};       // the first unit of every group, and the number of units
  std::vector<int64_t> offsets;        // of every unit's three buffers within the memory of its group, in floats
  int64_t group_floats, strip_floats;  // of the largest group, and of the buffers of one thread
};

Schedule make_schedule(const Problem& problem, const Kernels& kernels, const std::vector<Segment>& segments) {
  Schedule schedule{};
  int64_t used = 0;
  for (const Segment& segment : segments) {
    if (segment.queries == 0) continue;
    const int64_t key_floats = round_up(segment.visible, kLine) * ceil_div(problem.depth, kernels.packing);
    const int64_t value_floats =
        segment.output ? round_up(problem.depth, kLine) * ceil_div(segment.visible, kernels.packing) : 0;
    const int64_t slots_floats = problem.want_scores ? problem.group() * segment.chunks() * segment.slot_floats() : 0;
    const int64_t floats = key_floats + value_floats + slots_floats;
    schedule.strip_floats =
        std::max(schedule.strip_floats, Strip(segment.visible, problem.depth, kernels.packing).floats());
    for (int64_t head = 0; head < problem.key_heads; ++head) {
      if (used > 0 && used + floats > kGroupFloats) {
        schedule.groups.push_back(schedule.units.size());
        used = 0;
      }
      const auto shift = [&](const char* p, int64_t elements) { return p ? p + elements * problem.element_size : p; };
      Unit unit{};
      unit.segment = &segment;
      unit.head = head * problem.group();
      unit.query = shift(segment.query, unit.head * problem.query_head);
      unit.key = shift(segment.key, head * problem.key_head);
      unit.value = shift(segment.value, head * problem.value_head);
      unit.output = const_cast<char*>(shift(segment.output, unit.head * problem.output_head));
      schedule.units.push_back(unit);
      schedule.offsets.insert(schedule.offsets.end(), {used, used + key_floats, used + key_floats + value_floats});
      used += floats;
      schedule.group_floats = std::max(schedule.group_floats, used);
    }
  }
  schedule.groups.push_back(schedule.units.size());
  return schedule;
}

enum class Step { kPack, kAttend, kSum };

struct Task {
  Step step;
  const Unit *unit, *last;  // kSum: the units [unit, last)
  int64_t first;            // panel, query row or column
  int64_t head;             // kAttend: query head within the unit
  int64_t after;            // how many tasks of the list must be finished first: all of the steps before this one
};

// Appends what is to be done for the units [begin, end) of a group.
void add_tasks(const Problem& problem, const Kernels& kernels, const Unit* begin, const Unit* end,
               std::vector<Task>& tasks) {
  int64_t after = static_cast<int64_t>(tasks.size());
  for (const Unit* unit = begin; unit < end; ++unit)
    for (int64_t panel = 0; panel < Panels(unit->segment->visible, kernels.lanes, kernels.vectors).count; ++panel)
      tasks.push_back({Step::kPack, unit, unit + 1, panel, 0, after});
  after = static_cast<int64_t>(tasks.size());
  for (const Unit* unit = begin; unit < end; ++unit)
    for (int64_t head = 0; head < problem.group(); ++head)
      for (int64_t row = 0; row < unit->segment->queries; row += unit->segment->chunk_rows())
        tasks.push_back({Step::kAttend, unit, unit + 1, row, head, after});
  if (!problem.want_scores) return;
  after = static_cast<int64_t>(tasks.size());
  for (const Unit *unit = begin, *last = begin; unit < end; unit = last) {
    while (last < end && last->segment == unit->segment) ++last;
    for (int64_t column = 0; column < unit->segment->visible; column += kSumColumns)
      tasks.push_back({Step::kSum, unit, last, column, 0, after});
  }
}

// `strip`: the buffers of the thread.
void execute(const Problem& problem, const Kernels& kernels, const Task& task, float* strip) {
  const Unit& unit = *task.unit;
  const Segment& segment = *unit.segment;
  if (task.step == Step::kPack) {
    kernels.pack(problem, unit, task.first);
  } else if (task.step == Step::kAttend) {
    const int64_t rows = segment.chunk_rows();
    float* slot = nullptr;
    if (problem.want_scores) {
      slot = unit.slots + (task.head * segment.chunks() + task.first / rows) * segment.slot_floats();
      std::fill(slot, slot + segment.slot_floats(), 0.f);
    }
    kernels.attend(problem, unit, task.head, task.first, std::min(task.first + rows, segment.queries), slot, strip);
  } else {
    sum_slots(problem, task.unit, task.last, task.first, std::min(task.first + kSumColumns, segment.visible));
  }
}

void run(const Problem& problem, const Kernels& kernels, const std::vector<Segment>& segments) {
  Schedule schedule = make_schedule(problem, kernels, segments);
  const int64_t threads = torch::stable::get_num_threads();
  const Tensor scratch =
      torch::stable::empty({schedule.group_floats + threads * schedule.strip_floats}, ScalarType::Float);
  float* const memory = static_cast<float*>(scratch.data_ptr());
  float* const strips = memory + schedule.group_floats;
  for (size_t i = 0; i < schedule.units.size(); ++i) {
    schedule.units[i].packed_key = memory + schedule.offsets[3 * i];
    schedule.units[i].packed_value = memory + schedule.offsets[3 * i + 1];
    schedule.units[i].slots = memory + schedule.offsets[3 * i + 2];
  }
  std::vector<Task> tasks;
  for (size_t g = 0; g + 1 < schedule.groups.size(); ++g)
    add_tasks(problem, kernels, schedule.units.data() + schedule.groups[g],
              schedule.units.data() + schedule.groups[g + 1], tasks);

  // All steps share one parallel region: a fork and a barrier for each would cost more than the waiting below, and many
  // times more where other processes compete for the cores. A thread takes the next task and waits until those before
  // its step are finished. They were taken before, by threads that wait for nothing later, so somebody always moves on.
  const int64_t count = static_cast<int64_t>(tasks.size());
  std::atomic<int64_t> next{0}, finished{0};
  torch::stable::parallel_for(0, std::min(count, threads), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        while (finished.load(std::memory_order_acquire) < tasks[t].after) std::this_thread::yield();
        execute(problem, kernels, tasks[t], strips + thread * schedule.strip_floats);
        finished.fetch_add(1, std::memory_order_release);
      }
  });
}

// ------------------------------------------------------------------------------------------------------------- checks

void check(const Tensor& tensor, const char* name, int64_t dim, const Tensor& query) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a tensor on the CPU");
  STD_TORCH_CHECK(tensor.dim() == dim, name, ": expected ", dim, " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == query.scalar_type(), name, ": expected the dtype of query");
  STD_TORCH_CHECK(tensor.stride(dim - 1) == 1 || tensor.size(dim - 1) == 1, name,
                  ": expected a contiguous last dimension, got stride ", tensor.stride(dim - 1));
}

void check_size(const Tensor& tensor, const char* name, int64_t dim, int64_t expected) {
  STD_TORCH_CHECK(tensor.size(dim) == expected, name, ": expected size ", expected, " in dimension ", dim, ", got ",
                  tensor.size(dim));
}

void check_mask(const std::optional<Tensor>& mask, const char* name, std::initializer_list<int64_t> sizes) {
  if (!mask) return;
  STD_TORCH_CHECK(mask->is_cpu() && mask->scalar_type() == ScalarType::Bool, name,
                  ": expected a bool tensor on the CPU");
  STD_TORCH_CHECK(mask->dim() == static_cast<int64_t>(sizes.size()), name, ": expected ", sizes.size(),
                  " dimensions, got ", mask->dim());
  int64_t dim = 0;
  for (const int64_t size : sizes) check_size(*mask, name, dim++, size);
}

// `heads` and `rows` are dimensions: 1 and 2 of dense tensors, 1 and 0 of packed ones.
Problem check_problem(const Tensor& query, const Tensor& key, const std::optional<Tensor>& value, int64_t rows,
                      double scale, bool causal, bool want_scores, bool per_head, double score_scale) {
  const int64_t dim = query.dim(), heads = 1, last = dim - 1;
  check(query, "query", dim, query);
  check(key, "key", dim, query);
  Problem problem{};
  problem.query_heads = query.size(heads);
  problem.key_heads = key.size(heads);
  problem.depth = query.size(last);
  problem.element_size = query.element_size();
  STD_TORCH_CHECK(problem.key_heads > 0 && problem.query_heads % problem.key_heads == 0,
                  "query: expected a multiple of key's ", problem.key_heads, " heads, got ", problem.query_heads);
  STD_TORCH_CHECK(problem.depth >= 1 && problem.depth <= kMaxDepth, "query: expected a head dimension of 1 to ",
                  kMaxDepth, ", got ", problem.depth);
  check_size(key, "key", last, problem.depth);
  if (dim == 4) check_size(key, "key", 0, query.size(0));
  if (value) {
    check(*value, "value", dim, query);
    for (int64_t d = 0; d < dim; ++d) check_size(*value, "value", d, key.size(d));
    problem.value_head = value->stride(heads);
    problem.value_row = value->stride(rows);
  }
  problem.query_head = query.stride(heads);
  problem.query_row = query.stride(rows);
  problem.key_head = key.stride(heads);
  problem.key_row = key.stride(rows);
  problem.output_head = problem.depth;
  problem.output_row = problem.query_heads * problem.depth;
  // Neither is ever 0 or infinite: a padded column's logit is -inf and must stay that, the largest one becomes 0.
  problem.scale_power = std::ldexp(1.f, std::clamp(std::ilogb(scale), -126, 127));
  const double rest = std::fabs(scale) * 1.4426950408889634 / problem.scale_power;
  problem.scale_rest = static_cast<float>(std::clamp<double>(rest, FLT_MIN, FLT_MAX));
  problem.negate = scale < 0;
  problem.causal = causal;
  problem.want_scores = want_scores;
  problem.per_head = per_head;
  problem.score_scale = score_scale;
  return problem;
}

std::vector<int64_t> check_cu_seqlens(const Tensor& tensor, const char* name, int64_t total) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 1 && tensor.size(0) >= 1 &&
                      (tensor.scalar_type() == ScalarType::Int || tensor.scalar_type() == ScalarType::Long),
                  name, ": expected an int32 or int64 tensor [S + 1] on the CPU");
  std::vector<int64_t> bounds(tensor.size(0));
  for (size_t i = 0; i < bounds.size(); ++i) {
    const int64_t at = static_cast<int64_t>(i) * tensor.stride(0);
    bounds[i] = tensor.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(tensor.data_ptr())[at]
                                                        : static_cast<const int64_t*>(tensor.data_ptr())[at];
    if (i > 0)
      STD_TORCH_CHECK(bounds[i] >= bounds[i - 1], name, ": expected values that never decrease, got ", bounds[i - 1],
                      " and then ", bounds[i]);
  }
  STD_TORCH_CHECK(bounds.front() == 0, name, ": expected the first value to be 0, got ", bounds.front());
  STD_TORCH_CHECK(bounds.back() == total, name, ": expected the last value to be ", total, ", the number of rows, got ",
                  bounds.back());
  return bounds;
}

// ---------------------------------------------------------------------------------------------------------- operators

Tensor zeros(std::initializer_list<int64_t> sizes) {
  Tensor tensor = torch::stable::empty(sizes, ScalarType::Float);
  return torch::stable::zero_(tensor);
}

struct Call {
  const Tensor &query, &key;
  const std::optional<Tensor>&value, &key_mask, &query_mask;
  Tensor output, scores;

  // The segment whose data begin at index q of the query's first dimension and k of the key's.
  Segment segment(int64_t q, int64_t k, int64_t queries, int64_t keys, int64_t first_score, int64_t score_head) const {
    const auto at = [](const Tensor& tensor, int64_t index) {
      const int64_t bytes = static_cast<int64_t>(tensor.element_size());
      return static_cast<char*>(tensor.data_ptr()) + index * tensor.stride(0) * bytes;
    };
    Segment segment{};
    segment.query = at(query, q);
    segment.key = at(key, k);
    if (value) {
      segment.value = at(*value, k);
      segment.output = at(output, q);
    }
    segment.scores = static_cast<float*>(scores.data_ptr()) + first_score;
    segment.score_head = score_head;
    segment.queries = queries;
    segment.keys = segment.visible = keys;
    if (query_mask) {
      segment.query_mask = reinterpret_cast<const bool*>(at(*query_mask, q));
      segment.query_mask_stride = query_mask->stride(query_mask->dim() - 1);
    }
    if (key_mask) {
      const bool* mask = reinterpret_cast<const bool*>(at(*key_mask, k));
      const int64_t stride = key_mask->stride(key_mask->dim() - 1);
      segment.masked = true;
      for (int64_t n = 0; n < keys; ++n)
        if (mask[n * stride]) segment.positions.push_back(n);
      segment.visible = static_cast<int64_t>(segment.positions.size());
    }
    return segment;
  }
};

std::tuple<Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const std::optional<Tensor>& value,
                                     const std::optional<Tensor>& key_mask, const std::optional<Tensor>& query_mask,
                                     double scale, bool causal, bool want_scores, bool per_head, double score_scale,
                                     int64_t isa) {
  STD_TORCH_CHECK(query.dim() == 4, "query: expected 4 dimensions [B, Hq, M, D], got ", query.dim());
  const Problem problem = check_problem(query, key, value, 2, scale, causal, want_scores, per_head, score_scale);
  const int64_t B = query.size(0), H = problem.query_heads, M = query.size(2), N = key.size(2), D = problem.depth;
  check_mask(key_mask, "key_mask", {B, N});
  check_mask(query_mask, "query_mask", {B, M});
  const Kernels kernels = choose_kernels(query.scalar_type(), isa);

  Call call{query, key, value, key_mask, query_mask, {}, {}};
  const auto dtype = query.scalar_type();
  call.output = value ? torch::stable::empty({B, M, H, D}, dtype) : torch::stable::empty({0}, dtype);
  call.scores = !want_scores ? zeros({0}) : per_head ? zeros({B, H, N}) : zeros({B, N});
  std::vector<Segment> segments;
  for (int64_t b = 0; b < B; ++b) segments.push_back(call.segment(b, b, M, N, b * N * (per_head ? H : 1), N));
  run(problem, kernels, segments);
  return {value ? torch::stable::transpose(call.output, 1, 2) : call.output, call.scores};
}

std::tuple<Tensor, Tensor> attention_varlen(const Tensor& query, const Tensor& key, const std::optional<Tensor>& value,
                                            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                            const std::optional<Tensor>& key_mask,
                                            const std::optional<Tensor>& query_mask, double scale, bool causal,
                                            bool want_scores, bool per_head, double score_scale, int64_t isa) {
  STD_TORCH_CHECK(query.dim() == 3, "query: expected 3 dimensions [Tq, Hq, D], got ", query.dim());
  const Problem problem = check_problem(query, key, value, 0, scale, causal, want_scores, per_head, score_scale);
  const int64_t Tq = query.size(0), Tk = key.size(0), H = problem.query_heads, D = problem.depth;
  check_mask(key_mask, "key_mask", {Tk});
  check_mask(query_mask, "query_mask", {Tq});
  const std::vector<int64_t> q = check_cu_seqlens(cu_seqlens_q, "cu_seqlens_q", Tq);
  const std::vector<int64_t> k = check_cu_seqlens(cu_seqlens_k, "cu_seqlens_k", Tk);
  STD_TORCH_CHECK(q.size() == k.size(), "cu_seqlens_k: expected ", q.size(),
                  " values, as many as cu_seqlens_q has, got ", k.size());
  const Kernels kernels = choose_kernels(query.scalar_type(), isa);

  Call call{query, key, value, key_mask, query_mask, {}, {}};
  const auto dtype = query.scalar_type();
  call.output = value ? torch::stable::empty({Tq, H, D}, dtype) : torch::stable::empty({0}, dtype);
  call.scores = !want_scores ? zeros({0}) : per_head ? zeros({H, Tk}) : zeros({Tk});
  std::vector<Segment> segments;
  for (size_t i = 0; i + 1 < q.size(); ++i)
    segments.push_back(call.segment(q[i], k[i], q[i + 1] - q[i], k[i + 1] - k[i], k[i], Tk));
  run(problem, kernels, segments);
  return {call.output, call.scores};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hiprune, m) {
  m.def(
      "_cpu_attention(Tensor query, Tensor key, Tensor? value, Tensor? key_mask, Tensor? query_mask, float scale, "
      "bool causal, bool want_scores, bool per_head, float score_scale, int isa=-1) -> (Tensor output, Tensor scores)");
  m.def(
      "_cpu_attention_varlen(Tensor query, Tensor key, Tensor? value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "Tensor? key_mask, Tensor? query_mask, float scale, bool causal, bool want_scores, bool per_head, "
      "float score_scale, int isa=-1) -> (Tensor output, Tensor scores)");
  m.def("_cpu_instruction_sets() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(hiprune, CPU, m) {
  m.impl("_cpu_attention", TORCH_BOX(&attention));
  m.impl("_cpu_attention_varlen", TORCH_BOX(&attention_varlen));
}

// Takes no tensor, so that there is no backend to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(hiprune, CompositeExplicitAutograd, m) {
  m.impl("_cpu_instruction_sets", TORCH_BOX(&instruction_sets));
}
