// The best scores of an image or a segment.
//
// Scores become integer keys that order like them. Top-k bisects the range of the keys for the k-th largest, counting
// the keys above the middle: a loop without branches, which becomes vector code, so that all the counts together cost
// less than a histogram. It takes everything above that key, and of those that equal it the first few in index order:
// among equal scores the lowest index wins.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "instruction_sets.h"

constexpr uint8_t kDropped = 0;  // the role of a token that has none

// A row of scores or mask entries: element i at data[i * stride].
template <class T>
struct Row {
  const T* data;
  int64_t stride;
  T operator[](int64_t i) const { return data[i * stride]; }
};

template <class Score>
using KeyOf = std::conditional_t<sizeof(Score) == 8, int64_t, int32_t>;
template <class Key>
constexpr Key kOut = std::numeric_limits<Key>::min();  // of a token that is not in the race

// Keys in the order of the scores. NaN comes behind -inf; adding 0 turns -0 into +0, which must tie.
template <class Score, class Key = KeyOf<Score>>
HP_INLINE Key key_of(Score score) {
  Key bits;
  score += Score{0};
  std::memcpy(&bits, &score, sizeof bits);
  bits ^= bits >> (8 * sizeof(Key) - 1) & std::numeric_limits<Key>::max();
  return score == score ? bits : kOut<Key> + 1;
}

// The keys of an image. Tokens with a role are out of the race or, with a `penalty`, lose that much and stay in it.
template <class Score, class Key = KeyOf<Score>>
HP_INLINE void rank(Row<Score> scores, Row<bool> mask, const uint8_t* __restrict roles, Score penalty, int64_t n,
                    Key* __restrict keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = key_of(scores[i] - (roles[i] == kDropped ? Score{0} : penalty));
  if (penalty == 0)
    for (int64_t i = 0; i < n; ++i) keys[i] = roles[i] == kDropped ? keys[i] : kOut<Key>;
  if (mask.data)
    for (int64_t i = 0; i < n; ++i) keys[i] = mask[i] ? keys[i] : kOut<Key>;
}

template <class Key>
HP_INLINE int64_t count_from(Key low, const Key* keys, int64_t n) {
  Key count = 0;
  for (int64_t i = 0; i < n; ++i) count += keys[i] >= low;
  return count;
}

// Gives the role to the k best tokens in the race, the lowest index first among equals; those that have one already
// keep it. Where fewer than k are in the race, all of them win.
template <class Key>
HP_INLINE void take_best(const Key* __restrict keys, int64_t n, int64_t k, uint8_t role, uint8_t* __restrict roles) {
  using Unsigned = std::make_unsigned_t<Key>;
  constexpr Unsigned kFirst = Unsigned(kOut<Key>) + 1;  // of the race
  Unsigned smallest = ~Unsigned{0};
  Key high = kOut<Key>;
  for (int64_t i = 0; i < n; ++i) {
    smallest = std::min(smallest, Unsigned(Unsigned(keys[i]) - kFirst));  // wraps for kOut: never the smallest
    high = std::max(high, keys[i]);
  }
  if (high == kOut<Key>) return;
  // From `low` on there are at least k keys (if there are so many), from `high` on fewer.
  Key low = static_cast<Key>(smallest + kFirst);
  ++high;
  int64_t from_low = count_from(low, keys, n), from_high = 0;
  while (from_low > k) {
    const Key middle = static_cast<Key>(low + static_cast<Key>((Unsigned(high) - Unsigned(low)) / 2));
    if (middle == low) break;
    const int64_t count = count_from(middle, keys, n);
    (count >= k ? low : high) = middle;
    (count >= k ? from_low : from_high) = count;
  }
  const bool tie = from_low > k;  // more than k from `low` on, and all that are not above it equal it
  const Key least = tie ? high : low;
  for (int64_t i = 0; i < n; ++i) roles[i] = keys[i] >= least && roles[i] == kDropped ? role : roles[i];
  int64_t equal = tie ? k - from_high : 0;
  for (int64_t i = 0; equal > 0; ++i)
    if (keys[i] == low) roles[i] = roles[i] == kDropped ? role : roles[i], --equal;
}

// Writes the indices of the tokens with a role, ascending, from `base` on, and -1 behind them up to `budget`.
HP_INLINE void list_kept(const uint8_t* roles, int64_t n, int64_t base, int64_t budget, int64_t* index) {
  int64_t j = 0;
  for (int64_t i = 0; i < n && j < budget; ++i) {  // write, then advance if it was kept: no branch to mispredict
    index[j] = base + i;
    j += roles[i] != kDropped;
  }
  std::fill(index + j, index + budget, int64_t{-1});
}
