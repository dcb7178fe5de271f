// The sorted search of one dimension. A grid of equal cells over the codebook's range says where to begin; of the middles between
// neighbouring codewords eight are compared at once with the posterior's vertex. Posteriors are taken in blocks, so that their
// arithmetic fills vectors and their ways through memory overlap.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#include <immintrin.h>

namespace {

constexpr int64_t BLOCK = 64;
constexpr int64_t SHARE = 4096;  // posteriors that a thread takes at a time
constexpr int64_t AHEAD = 8;     // middles that are compared at once; as many infinities stand behind the last
// Nearer to a middle than this, or with a codeword that has a neighbour nearer than this (in units of the codeword where that is above 1),
// two scores may differ by less than their rounding. It also covers that middles and vertices are compared in single precision.
constexpr double NEAR = 5e-7;
constexpr double FLAT = 1.0 / 16;  // of the precision: a parabola with less curvature may be lost in rounding too

struct Sorted {
    const double* values;    // (size,) ascending, distinct
    const int32_t* indices;  // (size,) the lowest of each, its complement where a neighbour is near
    const float* middles;    // (size + 8,) -infinity, the middles between neighbours, infinities
    const int32_t* starts;   // (cells + 1,) how many middles lie before each cell
    int64_t size, cells;
    double low, per_unit;
};

int32_t cell(double value, double low, double per_unit, double last) {
    double place = (value - low) * per_unit;
    place = place > 0 ? place : 0;  // not a number: 0
    return int32_t(place < last ? place : last);
}

// Scores the neighbours of the vertex, and the ends; ties to the lowest index. It is probably near `guess`.
int64_t with_care(const Sorted& book, double mean, double precision, double prior_weight, int64_t guess) {
    const double vertex = mean * precision / (precision - prior_weight);
    const int64_t from = std::max<int64_t>(0, guess - 4), to = std::min(book.size, guess + 4);
    const bool near = book.values[from] < vertex && vertex <= book.values[to - 1];
    const int64_t place = std::lower_bound(book.values + (near ? from : 0), book.values + (near ? to : book.size), vertex) - book.values;
    double best = -INFINITY;
    int64_t token = INT64_MAX;
    for (int64_t candidate : {place - 2, place - 1, place, place + 1, int64_t(0), book.size - 1}) {
        candidate = std::max<int64_t>(0, std::min(candidate, book.size - 1));
        const double value = book.values[candidate], away = value - mean;
        const double found = prior_weight * (value * value) - away * away * precision;
        const int64_t index = book.indices[candidate] < 0 ? ~book.indices[candidate] : book.indices[candidate];
        if (found > best || (found == best && index < token)) best = found, token = index;
    }
    return token;
}

template <typename T>
bool search(const Sorted& book, const T* mean, const T* variance, double prior_weight, int64_t begin, int64_t end, int64_t* tokens) {
    double precision[BLOCK];
    float vertex[BLOCK];
    int32_t cells[BLOCK], starts[BLOCK], places[BLOCK], simple[BLOCK];
    const double last = double(book.cells - 1), lowest = book.low - 1, highest = book.values[book.size - 1] + 1;
    int32_t valid = 1;
    for (int64_t first = begin; first < end; first += BLOCK) {
        const int64_t count = std::min(BLOCK, end - first);
        for (int64_t i = 0; i < count; i++) {
            const double mu = double(mean[first + i]), p = precision[i] = 1.0 / double(variance[first + i]);
            const double curve = p - prior_weight, v = mu * p / curve;
            valid &= int32_t(mu - mu == 0) & int32_t(p > 0) & int32_t(p < INFINITY);
            simple[i] = int32_t(curve > FLAT * p) & int32_t(v > lowest) & int32_t(v < highest);
            vertex[i] = float(v);
            cells[i] = cell(v, book.low, book.per_unit, last);
        }
        for (int64_t i = 0; i < count; i++) {
            starts[i] = book.starts[cells[i]];
            __builtin_prefetch(book.middles + starts[i]);
        }
        for (int64_t i = 0; i < count; i++) {
            const __m256 middles = _mm256_loadu_ps(book.middles + starts[i]);
            const float near = float(NEAR) * std::max(1.0f, std::abs(vertex[i]));
            const int32_t less = __builtin_popcount(_mm256_movemask_ps(_mm256_cmp_ps(middles, _mm256_set1_ps(vertex[i] - near), _CMP_LT_OQ)));
            const int32_t more = __builtin_popcount(_mm256_movemask_ps(_mm256_cmp_ps(middles, _mm256_set1_ps(vertex[i] + near), _CMP_LE_OQ)));
            simple[i] &= int32_t(less == more) & int32_t(less > 0) & int32_t(less < AHEAD);
            places[i] = std::max(0, starts[i] + less - 1);
            __builtin_prefetch(book.indices + places[i]);
        }
        for (int64_t i = 0; i < count; i++) {
            const int64_t token = book.indices[places[i]];
            tokens[first + i] = simple[i] & int32_t(token >= 0) ? token : with_care(book, double(mean[first + i]), precision[i], prior_weight, places[i]);
        }
    }
    return valid;
}

template <typename T>
bool in_threads(const Sorted& book, const T* mean, const T* variance, double prior_weight, int64_t count, int64_t* tokens, int64_t threads) {
    threads = std::max<int64_t>(1, std::min(threads, count / (2 * SHARE)));
    std::vector<std::thread> others;
    std::atomic<int64_t> next{0};
    std::atomic<bool> valid{true};
    // a thread takes as long to wake as it has work to do: whoever is awake takes the next share
    const auto work = [&] {
        for (int64_t begin; (begin = next.fetch_add(SHARE)) < count;)
            if (!search(book, mean, variance, prior_weight, begin, std::min(begin + SHARE, count), tokens)) valid = false;
    };
    for (int64_t t = 1; t < threads; t++) others.emplace_back(work);
    work();
    for (auto& other : others) other.join();
    return valid;
}

}  // namespace

extern "C" {

// values (size,) ascending, distinct -> indices (size,) marked where a neighbour is near; middles (size + 8,); starts (cells + 1,)
void gq_cells(const double* values, int64_t size, int64_t cells, double low, double per_unit, int32_t* indices, float* middles,
              int32_t* starts) {
    int64_t next = 0;
    std::fill(middles, middles + size + AHEAD, INFINITY);
    middles[0] = -INFINITY;
    for (int64_t i = 0; i + 1 < size; i++) {
        const double middle = values[i] + (values[i + 1] - values[i]) / 2;
        middles[i + 1] = float(middle);
        for (const int64_t c = cell(middle, low, per_unit, double(cells - 1)); next <= c; next++) starts[next] = int32_t(i);
        if (values[i + 1] - values[i] < NEAR * std::max(1.0, std::abs(values[i])))
            for (int64_t j = i; j <= i + 1; j++) indices[j] = std::min(indices[j], ~indices[j]);
    }
    for (; next <= cells; next++) starts[next] = int32_t(size - 1);
}

// mean and variance (count,), in double precision where `wide` -> tokens (count,), and valid (1,): whether all posteriors are; the
// tokens of others mean nothing
void gq_bisect(const double* values, const int32_t* indices, const float* middles, const int32_t* starts, int64_t size, int64_t cells,
               double low, double per_unit, const void* mean, const void* variance, int64_t wide, double prior_weight, int64_t count,
               int64_t* tokens, int64_t* valid, int64_t threads) {
    const Sorted book{values, indices, middles, starts, size, cells, low, per_unit};
    const auto search = [&](auto type) {
        using T = decltype(type);
        return in_threads(book, static_cast<const T*>(mean), static_cast<const T*>(variance), prior_weight, count, tokens, threads);
    };
    *valid = wide ? search(double()) : search(float());
}
}
