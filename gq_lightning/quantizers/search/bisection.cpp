// The sorted search of one dimension. A grid of equal cells over the codebook's range says where to begin; posteriors are taken in
// blocks, so that their arithmetic fills vectors and their ways through memory overlap.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int64_t BLOCK = 64;
constexpr int64_t SHARE = 4096;  // posteriors that a thread takes at a time
constexpr int64_t AHEAD = 8;  // values of a cell that are compared at once; the caller pads as many infinities

template <typename V>  // single precision where the codebook is: half the memory, and all of it in the second cache
struct Sorted {
    const V* values;         // ascending, distinct; the lowest twice more before them, infinities behind
    const int32_t* indices;  // lowest of each
    const int32_t* starts;   // (cells + 1,) first value of each cell
    int64_t size, cells;
    double low, per_unit;
};

int32_t cell(double value, double low, double per_unit, double last) {
    double place = (value - low) * per_unit;
    place = place > 0 ? place : 0;  // not a number: 0
    return int32_t(place < last ? place : last);
}

double score(double value, double mean, double precision, double prior_weight) {
    const double away = value - mean;
    return prior_weight * (value * value) - away * away * precision;
}

// Neighbours of place, and the ends, ties to the lowest index
template <typename V>
int64_t with_care(const Sorted<V>& book, int64_t place, double mean, double precision, double prior_weight) {
    double best = -INFINITY;
    int64_t token = INT64_MAX;
    for (int64_t candidate : {place - 2, place - 1, place, place + 1, int64_t(0), book.size - 1}) {
        candidate = std::max<int64_t>(0, std::min(candidate, book.size - 1));
        const double found = score(book.values[candidate], mean, precision, prior_weight);
        const int64_t index = book.indices[candidate];
        if (found > best || (found == best && index < token)) best = found, token = index;
    }
    return token;
}

template <typename V, typename T>
bool search(const Sorted<V>& book, const T* mean, const T* variance, double prior_weight, int64_t begin, int64_t end, int64_t* tokens) {
    double mu[BLOCK], precision[BLOCK], vertex[BLOCK];
    int32_t cells[BLOCK], starts[BLOCK], counts[BLOCK];
    int64_t places[BLOCK];
    const double last = double(book.cells - 1);
    bool valid = true;
    for (int64_t first = begin; first < end; first += BLOCK) {
        const int64_t count = std::min(BLOCK, end - first);
        for (int64_t i = 0; i < count; i++) {
            mu[i] = double(mean[first + i]);
            precision[i] = 1.0 / double(variance[first + i]);
            valid &= (mu[i] - mu[i] == 0) & (precision[i] > 0) & (precision[i] < INFINITY);
            vertex[i] = mu[i] * precision[i] / (precision[i] - prior_weight);
            cells[i] = cell(vertex[i], book.low, book.per_unit, last);
        }
        for (int64_t i = 0; i < count; i++) __builtin_prefetch(book.starts + cells[i]);
        for (int64_t i = 0; i < count; i++) {
            starts[i] = book.starts[cells[i]];
            counts[i] = book.starts[cells[i] + 1] - starts[i];
            __builtin_prefetch(book.values + starts[i]);
        }
        for (int64_t i = 0; i < count; i++) {
            const V* from = book.values + starts[i];
            int64_t place = 0;
            if (counts[i] <= AHEAD)
                for (int64_t j = 0; j < AHEAD; j++) place += double(from[j]) < vertex[i];
            else
                place = std::lower_bound(from, from + counts[i], vertex[i]) - from;
            places[i] = starts[i] + place;
            __builtin_prefetch(book.indices + places[i]);
        }
        for (int64_t i = 0; i < count; i++) {
            const int64_t place = places[i];
            double best = score(book.values[place - 2], mu[i], precision[i], prior_weight);
            int64_t winner = place - 2;
            bool tie = false;
            for (int64_t candidate = place - 1; candidate <= place + 1; candidate++) {
                const double found = score(book.values[candidate], mu[i], precision[i], prior_weight);
                tie |= found == best;
                winner = found > best ? candidate : winner;
                best = found > best ? found : best;
            }
            const bool simple = !tie & (winner >= 0) & (precision[i] > prior_weight);
            tokens[first + i] = simple ? book.indices[winner] : with_care(book, place, mu[i], precision[i], prior_weight);
        }
    }
    return valid;
}

template <typename V, typename T>
bool in_threads(const Sorted<V>& book, const T* mean, const T* variance, double prior_weight, int64_t count, int64_t* tokens, int64_t threads) {
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

template <typename V>
bool bisect(const void* padded, const int32_t* indices, const int32_t* starts, int64_t size, int64_t cells, double low, double per_unit,
            const void* mean, const void* variance, bool wide, double prior_weight, int64_t count, int64_t* tokens, int64_t threads) {
    const Sorted<V> book{static_cast<const V*>(padded) + 2, indices, starts, size, cells, low, per_unit};
    if (wide)
        return in_threads(book, static_cast<const double*>(mean), static_cast<const double*>(variance), prior_weight, count, tokens, threads);
    return in_threads(book, static_cast<const float*>(mean), static_cast<const float*>(variance), prior_weight, count, tokens, threads);
}

}  // namespace

extern "C" {

// values (size,) ascending -> starts (cells + 1,)
void gq_cells(const double* values, int64_t size, int64_t cells, double low, double per_unit, int32_t* starts) {
    int64_t next = 0;
    for (int64_t i = 0; i < size; i++)
        for (const int64_t c = cell(values[i], low, per_unit, double(cells - 1)); next <= c; next++) starts[next] = int32_t(i);
    for (; next <= cells; next++) starts[next] = int32_t(size);
}

// padded (2 + size + AHEAD,), mean and variance (count,), each in double precision where its `wide` says so -> tokens (count,), and
// valid (1,): whether all posteriors are; the tokens of others mean nothing
void gq_bisect(const void* padded, int64_t wide_values, const int32_t* indices, const int32_t* starts, int64_t size, int64_t cells, double low,
               double per_unit, const void* mean, const void* variance, int64_t wide, double prior_weight, int64_t count, int64_t* tokens,
               int64_t* valid, int64_t threads) {
    const auto search = wide_values ? bisect<double> : bisect<float>;
    *valid = search(padded, indices, starts, size, cells, low, per_unit, mean, variance, wide != 0, prior_weight, count, tokens, threads);
}
}
