// Exact search by byte tables (a "fast scan", arXiv 1512.06500, with bounds in place of distances).
//
// Along every dimension the codewords fall into 16 bins. A posterior's score is a sum over dimensions, so that for each dimension and bin
// there is a least loss against the best value of that dimension; rounded down to bytes, 16 of them fit one shuffle instruction. 64
// codewords are then bounded by m shuffles and additions (twice as many without AVX-512), and only those whose bound is below the loss to
// beat are scored, in double: that of the best codeword known, or of the k-th best where k are wanted. They are scored when the tile has
// passed all tokens of a batch, by when the codewords have come from memory: waiting for each took a third of the time.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#include <immintrin.h>

namespace {

constexpr int64_t BINS = 16;
// A vector of bytes, one for each of 64 codewords; a row of a table, repeated for each of its lanes of 16. AVX-512 also has registers for
// the rows of 16 dimensions, which AVX2 must load again and again.
#ifdef __AVX512BW__
using Bytes = __m512i;
using Row = __m512i;
Row row(const uint8_t* table) { return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))); }
Bytes same(int value) { return _mm512_set1_epi8(char(value)); }
Bytes add(Bytes sum, Row row, const uint8_t* bins) { return _mm512_adds_epu8(sum, _mm512_shuffle_epi8(row, _mm512_loadu_si512(bins))); }
uint64_t within(Bytes bound, Bytes limit) { return _mm512_cmple_epu8_mask(bound, limit); }
#else
struct Bytes {
    __m256i low, high;
};
using Row = __m256i;
Row row(const uint8_t* table) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))); }
Bytes same(int value) { return {_mm256_set1_epi8(char(value)), _mm256_set1_epi8(char(value))}; }
__m256i add(__m256i sum, Row row, const uint8_t* bins) {
    return _mm256_adds_epu8(sum, _mm256_shuffle_epi8(row, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bins))));
}
Bytes add(Bytes sum, Row row, const uint8_t* bins) { return {add(sum.low, row, bins), add(sum.high, row, bins + 32)}; }
uint32_t within(__m256i bound, __m256i limit) { return uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_min_epu8(bound, limit), bound))); }
uint64_t within(Bytes bound, Bytes limit) { return within(bound.low, limit.low) | uint64_t(within(bound.high, limit.high)) << 32; }
#endif

constexpr int64_t LANES = 64;       // codewords per vector of bytes
constexpr int64_t TILE = 1024;      // codewords whose bins stay in the L1 cache while the tokens of a batch pass
constexpr int64_t FIRST_TILE = 128; // tiles grow from this: a search knows little at first, and would leave half of all that it scores there
constexpr int64_t BATCH = 32;       // tokens whose tables stay in the L2 cache
constexpr double STEPS = 250.0;     // of the byte scale, up to the loss to beat when the table was made
constexpr int64_t FIRST_GUESS = 32; // codewords scored to start with, or k if that is more

struct Codebook {
    const double* codewords;  // (K, m)
    const uint8_t* bins;      // (K / 64, m, 64)
    const double* low;        // (m, 16), smallest and largest codeword of each bin; low > high where it is empty
    const double* high;
    int64_t size, padded, m;
};

struct Token {
    const double *mean, *precision;
    double* values;     // (k,) the best scores known, in descending order, ties by index
    int64_t* indices;   // (k,) whose they are
    double top = 0;     // sum of the best values of each dimension; no codeword scores higher
    double slack = 0;   // what rounding may add to a bound
    double worst = -INFINITY; // the k-th best score, which is to be beaten
    double inverse = 0; // steps of the byte scale per unit of loss
    int limit = 0;      // bounds above it are out

    // into the list, if it belongs there
    bool insert(double value, int64_t index, int64_t k) {
        const auto before = [&](int64_t place) { return value > values[place] || (value == values[place] && index < indices[place]); };
        int64_t place = k - 1;
        if (!before(place)) return false;
        for (; place > 0 && before(place - 1); place--) values[place] = values[place - 1], indices[place] = indices[place - 1];
        values[place] = value, indices[place] = index;
        worst = values[k - 1];
        return true;
    }
};

double score(const double* codeword, const Token& token, double prior_weight, int64_t m) {
    double sum = 0;
    for (int64_t d = 0; d < m; d++) {
        const double c = codeword[d], away = c - token.mean[d];
        sum += prior_weight * (c * c) - away * away * token.precision[d];
    }
    return sum;
}

// the least loss in each bin against the best bin of its dimension: (m, 16)
void losses(const Codebook& book, Token& token, double prior_weight, double* loss) {
    double magnitude = 0;
    for (int64_t d = 0; d < book.m; d++, loss += BINS) {
        const double mean = token.mean[d], precision = token.precision[d], curve = precision - prior_weight;
        const double *low = book.low + d * BINS, *high = book.high + d * BINS;
        const auto value = [=](double c) { return prior_weight * (c * c) - (c - mean) * (c - mean) * precision; };
        const double vertex = curve > 0 ? mean * precision / curve : INFINITY, summit = curve > 0 ? value(vertex) : -INFINITY;
        double most[BINS];
        for (int64_t b = 0; b < BINS; b++) {
            const double ends = std::max(value(low[b]), value(high[b]));
            most[b] = low[b] <= high[b] ? vertex > low[b] && vertex < high[b] ? std::max(ends, summit) : ends : -INFINITY;
        }
        double greatest[BINS / 2];
        for (int64_t b = 0; b < BINS / 2; b++) greatest[b] = std::max(most[b], most[b + BINS / 2]);
        for (int64_t half = BINS / 4; half > 0; half /= 2)
            for (int64_t b = 0; b < half; b++) greatest[b] = std::max(greatest[b], greatest[b + half]);
        const double best = greatest[0];
        for (int64_t b = 0; b < BINS; b++) loss[b] = best - most[b];
        token.top += best;
        // both terms are largest at the ends
        int64_t first = 0, last = BINS - 1;
        while (low[first] > high[first]) first++;
        while (low[last] > high[last]) last--;
        const double smallest = low[first], largest = high[last];
        const double prior = prior_weight * std::max(smallest * smallest, largest * largest);
        const double fit = precision * std::max((smallest - mean) * (smallest - mean), (largest - mean) * (largest - mean));
        magnitude = std::max(magnitude, prior + fit);
    }
    token.slack = 1e-14 * magnitude * double(book.m + 4);  // some 90 roundings of each term
}

// rounded down, so that a sum of entries is no more than the loss; one step is added to the limit for the rounding of the quotients
void scale(const Codebook& book, Token& token, const double* loss, uint8_t* table) {
    token.inverse = STEPS / std::max(token.top - token.worst + token.slack, 1e-290);
    for (int64_t d = 0; d < book.m; d++)
        for (int64_t b = 0; b < BINS; b++) {
            const double steps = loss[d * BINS + b] * token.inverse;
            table[d * BINS + b] = steps < 255 ? uint8_t(steps) : 255;
        }
    token.limit = int(STEPS) + 1;
}

// M > 0 fixes the number of dimensions, for the compiler to keep the tables in registers
template <int64_t M>
int64_t scan(const Codebook& book, const Token& token, const uint8_t* table, int64_t begin, int64_t end, int32_t* left) {
    const int64_t m = M > 0 ? M : book.m;
    Row own[M > 0 ? M : 1];
    for (int64_t d = 0; d < M; d++) own[d] = row(table + d * BINS);
    const Bytes limit = same(token.limit);
    int64_t count = 0;
    for (int64_t first = begin; first < end; first += LANES) {
        const uint8_t* bins = book.bins + first * m;
        Bytes bound = same(0);
        for (int64_t d = 0; d < m; d++) bound = add(bound, M > 0 ? own[M > 0 ? d : 0] : row(table + d * BINS), bins + d * LANES);
        for (uint64_t mask = within(bound, limit); mask; mask &= mask - 1) {
            const int64_t index = first + __builtin_ctzll(mask);
            left[count++] = int32_t(index - begin);
            for (int64_t d = 0; d < m; d += 8) __builtin_prefetch(book.codewords + index * m + d);
        }
    }
    return count;
}

// scores what a scan has left
template <int64_t M>
void settle(const Codebook& book, Token& token, double prior_weight, int64_t k, int64_t known, int64_t begin, const int32_t* left, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const int64_t index = begin + left[i];
        if (index >= book.size) return;
        const double value = score(book.codewords + index * (M > 0 ? M : book.m), token, prior_weight, M > 0 ? M : book.m);
        if (value >= token.worst && index >= known && token.insert(value, index, k))
            token.limit = std::min(token.limit, int((token.top - token.worst + token.slack) * token.inverse) + 1);
    }
}

template <int64_t M>
void search(const Codebook& book, const double* mean, const double* precision, double prior_weight, int64_t begin, int64_t end, int64_t k,
            int64_t* tokens) {
    const int64_t m = book.m, known = std::min(book.size, std::max(FIRST_GUESS, k));
    std::vector<double> values(BATCH * k);
    std::vector<double> loss(BATCH * m * BINS);
    std::vector<uint8_t> table(BATCH * m * BINS);
    std::vector<Token> batch(BATCH);
    std::vector<int32_t> left(BATCH * TILE);
    int64_t counts[BATCH];
    for (int64_t start = begin; start < end; start += BATCH) {
        const int64_t count = std::min(BATCH, end - start);
        for (int64_t i = 0; i < count; i++) {
            Token& token = batch[i] = Token{mean + (start + i) * m, precision + (start + i) * m, values.data() + i * k, tokens + (start + i) * k};
            losses(book, token, prior_weight, loss.data() + i * m * BINS);
            std::fill(token.values, token.values + k, -INFINITY);
            std::fill(token.indices, token.indices + k, book.size);
            for (int64_t index = 0; index < known; index++)
                token.insert(score(book.codewords + index * m, token, prior_weight, m), index, k);
            scale(book, token, loss.data() + i * m * BINS, table.data() + i * m * BINS);
        }
        for (int64_t tile = 0, width = FIRST_TILE; tile < book.padded; tile += width, width = std::min(TILE, 2 * width)) {
            for (int64_t i = 0; i < count; i++) {
                Token& token = batch[i];
                // a better codeword has made half of the scale useless
                if (token.limit < STEPS / 2) scale(book, token, loss.data() + i * m * BINS, table.data() + i * m * BINS);
                counts[i] = scan<M>(book, token, table.data() + i * m * BINS, tile, std::min(book.padded, tile + width), left.data() + i * TILE);
            }
            for (int64_t i = 0; i < count; i++)
                settle<M>(book, batch[i], prior_weight, k, known, tile, left.data() + i * TILE, counts[i]);
        }
    }
}

}  // namespace

extern "C" {

// codewords (K, m), edges (m, 15) ascending -> bins (padded / 64, m, 64), low and high (m, 16)
void gq_prepare(const double* codewords, int64_t size, int64_t padded, int64_t m, const double* edges, uint8_t* bins, double* low, double* high) {
    std::fill(low, low + m * BINS, INFINITY);
    std::fill(high, high + m * BINS, -INFINITY);
    for (int64_t first = 0; first < padded; first += LANES) {
        const int64_t count = std::min(LANES, size - first);
        for (int64_t d = 0; d < m; d++) {
            const double* edge = edges + d * (BINS - 1);
            double column[LANES];
            int64_t bin[LANES] = {};
            for (int64_t i = 0; i < LANES; i++) column[i] = codewords[(first + std::min(i, count - 1)) * m + d];
            for (int64_t b = 0; b < BINS - 1; b++)
                for (int64_t i = 0; i < LANES; i++) bin[i] += column[i] > edge[b];
            for (int64_t i = 0; i < LANES; i++) {
                double &smallest = low[d * BINS + bin[i]], &largest = high[d * BINS + bin[i]];
                smallest = std::min(smallest, column[i]);
                largest = std::max(largest, column[i]);
                bins[first * m + d * LANES + i] = uint8_t(bin[i]);
            }
        }
    }
}

// mean, precision (N, m) -> tokens (N, k), best first; k is at most the codebook's size
void gq_search(const double* codewords, int64_t size, int64_t padded, int64_t m, const uint8_t* bins, const double* low, const double* high,
               const double* mean, const double* precision, double prior_weight, int64_t count, int64_t k, int64_t* tokens, int64_t threads) {
    const Codebook book{codewords, bins, low, high, size, padded, m};
    const auto work = m == 4 ? search<4> : m == 8 ? search<8> : m == 16 ? search<16> : search<0>;
    threads = std::max<int64_t>(1, std::min(threads, count / 4));
    std::vector<std::thread> others;
    for (int64_t t = 1; t < threads; t++)
        others.emplace_back(work, book, mean, precision, prior_weight, count * t / threads, count * (t + 1) / threads, k, tokens);
    work(book, mean, precision, prior_weight, 0, count / threads, k, tokens);
    for (auto& other : others) other.join();
}
}
