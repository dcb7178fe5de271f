// The sorted search of one dimension, posterior by posterior. A grid of equal cells over the codebook's range says where to begin.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

int64_t cell(double value, double low, double per_unit, int64_t cells) {
    const double place = (value - low) * per_unit;
    return place > 0 ? int64_t(std::min(place, double(cells - 1))) : 0;  // not a number: 0
}

struct Sorted {
    const double* values;    // ascending, distinct
    const int64_t* indices;  // lowest of each
    const int64_t* starts;   // (cells + 1,) first value of each cell
    int64_t size, cells;
    double low, per_unit;
};

void search(const Sorted& book, const double* mean, const double* precision, double prior_weight, int64_t begin, int64_t end, int64_t* tokens) {
    for (int64_t n = begin; n < end; n++) {
        const double vertex = mean[n] * precision[n] / (precision[n] - prior_weight);
        const int64_t c = cell(vertex, book.low, book.per_unit, book.cells);
        const double* place = std::lower_bound(book.values + book.starts[c], book.values + book.starts[c + 1], vertex);
        const int64_t p = place - book.values;
        double best = -INFINITY;
        int64_t token = INT64_MAX;
        const auto consider = [&](int64_t candidate) {
            candidate = std::max<int64_t>(0, std::min(candidate, book.size - 1));
            const double value = book.values[candidate], away = value - mean[n];
            const double score = prior_weight * (value * value) - away * away * precision[n];
            const int64_t index = book.indices[candidate];
            if (score > best || (score == best && index < token)) best = score, token = index;
        };
        for (int64_t candidate = p - 2; candidate <= p + 1; candidate++) consider(candidate);
        if (!(precision[n] > prior_weight)) consider(0), consider(book.size - 1);
        tokens[n] = token;
    }
}

}  // namespace

extern "C" {

// values (size,) ascending -> starts (cells + 1,)
void gq_cells(const double* values, int64_t size, int64_t cells, double low, double per_unit, int64_t* starts) {
    int64_t next = 0;
    for (int64_t i = 0; i < size; i++)
        for (const int64_t c = cell(values[i], low, per_unit, cells); next <= c; next++) starts[next] = i;
    for (; next <= cells; next++) starts[next] = size;
}

// mean, precision (count,) -> tokens (count,)
void gq_bisect(const double* values, const int64_t* indices, const int64_t* starts, int64_t size, int64_t cells, double low, double per_unit,
               const double* mean, const double* precision, double prior_weight, int64_t count, int64_t* tokens, int64_t threads) {
    const Sorted book{values, indices, starts, size, cells, low, per_unit};
    threads = std::max<int64_t>(1, std::min(threads, count / 2048));
    std::vector<std::thread> others;
    for (int64_t t = 1; t < threads; t++)
        others.emplace_back(search, book, mean, precision, prior_weight, count * t / threads, count * (t + 1) / threads, tokens);
    search(book, mean, precision, prior_weight, 0, count / threads, tokens);
    for (auto& other : others) other.join();
}
}
