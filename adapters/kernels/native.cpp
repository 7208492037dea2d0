// The adapter sum row by row, on the CPU; `native.py` says when it is used and fills its state.
//
//     y[t] += B ( gate ⊙ u ) + y[t] ⊙ D gate
//
// u is A x[t] for a set's products and 1 for its constants; D are the columns of B that are its
// diagonals. Columns with a gate of 0 are not computed, so a routed token reads its k members and
// the gates' rows, nothing of the other members. Sums are float32, rounded once with y. A row's
// result does not depend on the other rows, nor on the number of threads. A layer whose input is
// `split` over ranks gives scores of a part, which are summed over the ranks before they choose.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

namespace {

// --- vectors: 32 numbers as two of 16 lanes, which the compiler splits for narrower registers ---

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
constexpr int64_t LANES = 16;

struct Pair {  // of bfloat16: those at even places and those at odd ones; of float32: halves
  Floats first, second;
};

inline Pair load(const float* p) {
  Pair v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Pair load(const c10::BFloat16* p) {
  Words both;
  std::memcpy(&both, p, sizeof both);
  return {(Floats)(both << 16), (Floats)(both & 0xffff0000)};
}

inline void store(float* p, Pair v) { std::memcpy(p, &v, sizeof v); }

inline Words rounded(Floats v) {  // to bfloat16, to nearest, ties to even; in the upper half
  const Words w = (Words)v, nan = (Words)(v != v);
  return ((w + 0x7fff + ((w >> 16) & 1)) & ~nan) | (0x7fc00000 & nan);
}

inline void store(c10::BFloat16* p, Pair v) {
  const Words both = (rounded(v.first) >> 16) | (rounded(v.second) & 0xffff0000);
  std::memcpy(p, &both, sizeof both);
}

// --- what a step adds ---------------------------------------------------------------------------

struct Row {  // a token and its set
  int64_t token, slot;
  int64_t products, sums, columns;  // P, P + C and P + C + D, as in `adapters.sets`
  int64_t gate, first_route, last_route;
};

struct Route {  // learned gates of one artefact in a row
  int64_t row;      // its first gate row
  int64_t members;  // M
  int64_t first_span, last_span;
  int64_t top_k;
  int64_t tally;    // which of the counts, −1 for none
  int64_t offset;   // of the request's counts in them
};

struct Span {  // columns of a member
  int64_t member, start, stop;
};

struct State {
  at::Tensor rows, routes, spans, gates, softmax;
  std::vector<at::Tensor> counts;
  bool others = false;  // groups that `coxswain::adapter_groups` computes
  int64_t widest = 0;   // columns of the widest row

  int64_t size() const { return rows.defined() ? rows.size(0) : 0; }
  const Row& row(int64_t i) const { return reinterpret_cast<const Row*>(rows.const_data_ptr())[i]; }
  const Route& route(int64_t i) const {
    return reinterpret_cast<const Route*>(routes.const_data_ptr())[i];
  }
};

State& state() {
  static State& found = *new State;  // never destroyed: threads may outlive static objects
  return found;
}

// --- one row in one packed layer ----------------------------------------------------------------

// out[i] = x · a[which[i]], four rows of `a` at a time.
template <typename T>
void dots(const T* x, const T* a, int64_t width, const int32_t* which, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += 4) {
    const T* p[4];
    for (int j = 0; j < 4; j++) p[j] = a + which[std::min<int64_t>(i + j, n - 1)] * width;
    Floats s[4] = {};
    int64_t k = 0;
    for (; k + 2 * LANES <= width; k += 2 * LANES) {
      const Pair v = load(x + k);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const Pair w = load(p[j] + k);
        s[j] += v.first * w.first;
        s[j] += v.second * w.second;
      }
    }
    for (int j = 0; j < 4 && i + j < n; j++) {
      float sum = 0;
      for (int lane = 0; lane < LANES; lane++) sum += s[j][lane];
      for (int64_t rest = k; rest < width; rest++)
        sum += static_cast<float>(x[rest]) * static_cast<float>(p[j][rest]);
      out[i + j] = sum;
    }
  }
}

// Multiplies a routed artefact's part of `gate` by the softmax of its k highest scores over T.
void choose(const State& s, int64_t route, const float* scores, float* gate) {
  const Route& r = s.route(route);
  const Span* spans = reinterpret_cast<const Span*>(s.spans.const_data_ptr());
  const float* softmax = s.softmax.const_data_ptr<float>() + 2 * route;  // weight, T
  std::vector<float> weight(r.members, 0.0f);
  std::vector<int64_t> chosen;
  float sum = 0;
  for (int64_t k = 0; k < r.top_k; k++) {
    int64_t best = -1;
    for (int64_t j = 0; j < r.members; j++)
      if (weight[j] == 0.0f && (best < 0 || scores[j] > scores[best])) best = j;
    chosen.push_back(best);
    weight[best] = 1.0f;
  }
  for (int64_t j : chosen) sum += weight[j] = std::exp((scores[j] - scores[chosen[0]]) / softmax[1]);
  for (int64_t i = r.first_span; i < r.last_span; i++)
    for (int64_t c = spans[i].start; c < spans[i].stop; c++)
      gate[c] *= weight[spans[i].member] / sum * softmax[0];
  if (r.tally < 0) return;
  int64_t* counts = s.counts[r.tally].mutable_data_ptr<int64_t>() + r.offset;
  for (int64_t j : chosen) __atomic_fetch_add(counts + j, 1, __ATOMIC_RELAXED);
}

struct Shrunk {  // [row, packed layer]: columns that count, and their gated activations
  int64_t width;
  std::unique_ptr<int32_t[]> sums, count, column;  // diagonals lie from `sums` to `count`
  std::unique_ptr<float[]> value;

  Shrunk(int64_t items, int64_t widest)
      : width(widest),
        sums(new int32_t[items]),
        count(new int32_t[items]),
        column(new int32_t[items * widest]),
        value(new float[items * widest]) {}
};

// W_gate x of one route, [members].
template <typename T>
void score(const Route& route, const T* x, const T* a, int64_t width, float* scores) {
  std::vector<int32_t> which(route.members);
  for (int64_t j = 0; j < route.members; j++) which[j] = route.row + j;
  dots(x, a, width, which.data(), route.members, scores);
}

// What a slot has for the output of a decoder layer. No pack is routed there.
constexpr int8_t NOTHING = 0, CONSTANTS = 1, LINEAR = 3;

// `scores`: of the routes, where they are known already, those of route i from `places[i]` on.
// `filled`: of the row's slot, `LINEAR` for a linear layer.
template <typename T>
void shrink(const State& s, const Row& row, const T* x, const T* a, int64_t width, int64_t item,
            const float* scores, const std::vector<int64_t>& places, int8_t filled, Shrunk& out) {
  out.sums[item] = out.count[item] = 0;
  if (filled == NOTHING) return;
  std::vector<float> gate(row.columns), own;
  std::copy_n(s.gates.const_data_ptr<float>() + row.gate, row.columns, gate.begin());
  for (int64_t i = row.first_route; filled == LINEAR && i < row.last_route; i++) {
    if (scores) {
      choose(s, i, scores + places[i], gate.data());
      continue;
    }
    own.resize(s.route(i).members);
    score(s.route(i), x, a, width, own.data());
    choose(s, i, own.data(), gate.data());
  }
  int32_t n = 0, *column = out.column.get() + item * out.width;
  float* value = out.value.get() + item * out.width;
  const auto choose_from = [&](int64_t start, int64_t stop) {
    for (int32_t c = start; c < stop; c++)
      if (gate[c] != 0.0f) column[n++] = c;
    return n;
  };
  const int32_t products = filled == CONSTANTS ? 0 : choose_from(0, row.products);
  dots(x, a, width, column, products, value);
  out.sums[item] = choose_from(row.products, row.sums);
  out.count[item] = choose_from(row.sums, row.columns);
  for (int32_t i = 0; i < n; i++) value[i] = i < products ? value[i] * gate[column[i]] : gate[column[i]];
}

// y[from:to] += Σ_i value[i] · b[:, column[i]], b with strides (out, columns); with `DIAGONALS`,
// those from `sums` on are multiplied by y.
template <bool DIAGONALS, typename T>
void expand(T* y, const T* b, int64_t by_out, int64_t by_column, const int32_t* column,
            const float* value, int64_t sums, int64_t n, int64_t from, int64_t to) {
  constexpr int TILE = 4;
  constexpr int64_t STEP = 2 * LANES;
  int64_t o = from;
  for (; by_out == 1 && o + TILE * STEP <= to; o += TILE * STEP) {
    Pair sum[TILE];
#pragma GCC unroll 4
    for (int j = 0; j < TILE; j++) sum[j] = load(y + o + j * STEP);
    const auto add = [&](int64_t i, Pair* to) {
      const T* p = b + column[i] * by_column + o;
#pragma GCC unroll 4
      for (int j = 0; j < TILE; j++) {
        const Pair w = load(p + j * STEP);
        to[j].first += value[i] * w.first;
        to[j].second += value[i] * w.second;
      }
    };
    for (int64_t i = 0; i < sums; i++) add(i, sum);
    if constexpr (DIAGONALS) {
      Pair factor[TILE] = {};
      for (int64_t i = sums; i < n; i++) add(i, factor);
#pragma GCC unroll 4
      for (int j = 0; j < TILE; j++) {
        const Pair layer = load(y + o + j * STEP);
        sum[j].first += layer.first * factor[j].first;
        sum[j].second += layer.second * factor[j].second;
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < TILE; j++) store(y + o + j * STEP, sum[j]);
  }
  for (; o < to; o++) {
    const float layer = static_cast<float>(y[o]);
    float sum = layer, factor = 0;
    for (int64_t i = 0; i < n; i++)
      (i < sums ? sum : factor) +=
          value[i] * static_cast<float>(b[o * by_out + column[i] * by_column]);
    y[o] = static_cast<T>(DIAGONALS ? sum + layer * factor : sum);
  }
}

// --- a whole layer ------------------------------------------------------------------------------

constexpr int64_t WORTHWHILE = 1 << 17;  // multiplications per thread below which one does all
constexpr int64_t BLOCK = 512;           // outputs that one piece of work adds to

// Where x is a part of the input: the scores of all routes, [layers, members], over all ranks.
template <typename T>
at::Tensor scores_over_ranks(const State& s, const at::Tensor& x, at::TensorList a,
                             const std::vector<int64_t>& places) {
  const int64_t n = s.size(), layers = a.size(), width = x.size(1), members = places.back();
  at::Tensor scores = at::empty({layers, members}, x.options().dtype(at::kFloat));
  float* found = scores.mutable_data_ptr<float>();
  at::parallel_for(0, n * layers, 1, [&](int64_t i, int64_t end) {
    for (; i < end; i++) {
      const Row& row = s.row(i % n);
      const at::Tensor& own = a[i / n];
      const T* slot = own.const_data_ptr<T>() + row.slot * own.stride(0);
      for (int64_t r = row.first_route; r < row.last_route; r++)
        score(s.route(r), x.const_data_ptr<T>() + row.token * x.stride(0), slot, width,
              found + i / n * members + places[r]);
    }
  });
  static auto sum = c10::Dispatcher::singleton()
                        .findSchemaOrThrow("coxswain::sum_over_ranks", "")
                        .typed<void(at::Tensor)>();
  sum.call(scores);
  return scores;
}

template <typename T>
void add_rows(const State& s, at::Tensor& y, const at::Tensor& x, at::TensorList a, at::TensorList b,
              at::IntArrayRef sizes, bool split, const int8_t* filled = nullptr) {
  const int64_t n = s.size(), layers = a.size(), width = x.size(1);
  const T* xs = x.const_data_ptr<T>();
  T* ys = y.mutable_data_ptr<T>();
  at::Tensor scores;
  std::vector<int64_t> places;
  if (split && s.routes.size(0)) {
    places.push_back(0);
    for (int64_t i = 0; i < s.routes.size(0); i++) places.push_back(places[i] + s.route(i).members);
    scores = scores_over_ranks<T>(s, x, a, places);
  }
  const float* known = scores.defined() ? scores.const_data_ptr<float>() : nullptr;
  Shrunk shrunk(n * layers, s.widest);
  int64_t work = std::max<int64_t>(1, s.widest * width);
  at::parallel_for(0, n * layers, std::max<int64_t>(1, WORTHWHILE / work), [&](int64_t i, int64_t end) {
    for (; i < end; i++) {
      const Row& row = s.row(i % n);
      const at::Tensor& own = a[i / n];
      const T* slot = own.const_data_ptr<T>() + row.slot * own.stride(0);
      shrink(s, row, xs + row.token * x.stride(0), slot, width, i,
             known ? known + i / n * places.back() : nullptr, places,
             filled ? filled[row.slot] : LINEAR, shrunk);
    }
  });
  struct Piece { int64_t layer, start, from, to; };
  std::vector<Piece> pieces;
  for (int64_t layer = 0, start = 0; layer < layers; start += sizes[layer++])
    for (int64_t from = 0; from < sizes[layer]; from += BLOCK)
      pieces.push_back({layer, start, from, std::min(from + BLOCK, sizes[layer])});
  const int64_t total = pieces.size() * n;
  work = std::max<int64_t>(1, s.widest * BLOCK);
  at::parallel_for(0, total, std::max<int64_t>(1, WORTHWHILE / work), [&](int64_t i, int64_t end) {
    for (; i < end; i++) {
      const Piece& p = pieces[i / n];
      const Row& row = s.row(i % n);
      const at::Tensor& own = b[p.layer];
      const int64_t item = p.layer * n + i % n;
      const int64_t sums = shrunk.sums[item], count = shrunk.count[item];
      if (!count) continue;
      (sums < count ? expand<true, T> : expand<false, T>)(
          ys + row.token * y.stride(0) + p.start,
          own.const_data_ptr<T>() + row.slot * own.stride(0), own.stride(2), own.stride(3),
          shrunk.column.get() + item * shrunk.width, shrunk.value.get() + item * shrunk.width,
          sums, count, p.from, p.to);
    }
  });
}

template <typename... Arguments>
void add_rows_of(at::Tensor& y, Arguments&&... rest) {
  if (y.scalar_type() == at::kBFloat16)
    add_rows<c10::BFloat16>(state(), y, rest...);
  else
    add_rows<float>(state(), y, rest...);
}

void adapter_sum(at::Tensor y, const at::Tensor& x, at::TensorList a, at::TensorList b,
                 at::IntArrayRef sizes, bool split) {
  State& s = state();
  if (s.size()) {
    const at::Tensor xs = x.stride(-1) == 1 ? x : x.contiguous();
    TORCH_CHECK(y.stride(-1) == 1 && a[0].stride(-1) == 1 && a[0].stride(-2) == x.size(-1));
    add_rows_of(y, xs, a, b, sizes, split);
  }
  if (s.others) {
    static auto groups = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("coxswain::adapter_groups", "")
                             .typed<void(at::Tensor, const at::Tensor&, at::TensorList,
                                         at::TensorList, at::IntArrayRef, bool)>();
    groups.call(y, x, a, b, sizes, split);
  }
}

// As `adapter_sum`, for the output of a decoder layer, whose state is y, or y + residual. It is
// formed only if some row multiplies it.
void residual_sum(at::Tensor y, const std::optional<at::Tensor>& residual, at::TensorList a,
                  at::TensorList b, const at::Tensor& filled, int64_t layer) {
  State& s = state();
  const int8_t* own = filled.const_data_ptr<int8_t>();
  int8_t most = NOTHING;
  for (int64_t i = 0; i < s.size(); i++) most = std::max(most, own[s.row(i).slot]);
  if (most != NOTHING) {
    const at::Tensor x = most > CONSTANTS && residual ? at::add(y, *residual) : y;
    TORCH_CHECK(y.stride(-1) == 1 && x.stride(-1) == 1);
    add_rows_of(y, x, a, b, at::IntArrayRef({y.size(1)}), false, own);
  }
  if (s.others) {
    static auto groups = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("coxswain::residual_groups", "")
                             .typed<void(at::Tensor, const std::optional<at::Tensor>&,
                                         at::TensorList, at::TensorList, const at::Tensor&,
                                         int64_t)>();
    groups.call(y, residual, a, b, filled, layer);
  }
}

void adapter_rows(at::Tensor rows, at::Tensor routes, at::Tensor spans, at::Tensor gates,
                  at::Tensor softmax, std::vector<at::Tensor> counts, int64_t widest, bool others) {
  state() = {rows, routes, spans, gates, softmax, std::move(counts), others, widest};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(coxswain, m) {
  m.def(
      "adapter_rows(Tensor rows, Tensor routes, Tensor spans, Tensor gates, Tensor softmax, "
      "Tensor[] counts, int widest, bool others) -> ()");
}

TORCH_LIBRARY_IMPL(coxswain, CPU, m) {
  m.impl("adapter_rows", adapter_rows);
  m.impl("adapter_sum", adapter_sum);
  m.impl("residual_sum", residual_sum);
}
