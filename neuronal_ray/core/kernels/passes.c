/* Masking of weights and sums of squares of activations, each in one pass over memory, for a search on a CPU.
 *
 * Rows of weights and ranks are contiguous. Loops are vectorized by the compiler, for several processors at once where
 * it can. Compile without contraction: each product is rounded before the addition.
 */
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

/* Copy weights whose rank is at least their row's count, and write zeros for the others. Ranks are compared in their own
 * type, which holds the count minus one. There is no branch, so that every processor can vectorize the loop. */
#define ZERO_LOWEST(name, word, rank)                                                                    \
    FOR_EACH_PROCESSOR                                                                                   \
    static void row_##name(const word *weights, const rank *ranks, rank last, word *out, int64_t columns) { \
        for (int64_t c = 0; c < columns; c++) out[c] = weights[c] & (word)-(ranks[c] > last);             \
    }                                                                                                    \
    void name(const word *weights, const rank *ranks, const int32_t *removed, word *out, int64_t rows,   \
              int64_t columns, int threads) {                                                            \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                                \
        for (int64_t r = 0; r < rows; r++)                                                               \
            row_##name(weights + r * columns, ranks + r * columns, (rank)(removed[r] - 1),               \
                       out + r * columns, columns);                                                      \
    }

ZERO_LOWEST(zero_lowest_16_16, uint16_t, int16_t)
ZERO_LOWEST(zero_lowest_16_32, uint16_t, int32_t)
ZERO_LOWEST(zero_lowest_32_16, uint32_t, int16_t)
ZERO_LOWEST(zero_lowest_32_32, uint32_t, int32_t)

/* Sum each column's squares over the rows, in float32 and in the order of torch's sum: a cascade of partial sums with
 * four levels of 2^power rows. */
#define LEVELS 4
#define BLOCK 256 /* columns whose partial sums fit in a core's first-level cache */

static inline float of_f32(float value) { return value; }

static inline float of_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

#define SQUARES(name, number, widened)                                                                   \
    FOR_EACH_PROCESSOR                                                                                   \
    static void block_##name(const number *inputs, int64_t rows, int64_t columns, int64_t width,         \
                             int64_t power, float *out) {                                                \
        float sums[LEVELS][BLOCK] = {{0}};                                                               \
        const int64_t step = (int64_t)1 << power;                                                        \
        int64_t row = 0, begin = 0;                                                                      \
        while (row < rows) {                                                                             \
            int64_t stop = row + step < rows ? row + step : rows;                                        \
            for (begin = row; row < stop; row++) {                                                       \
                const number *values = inputs + row * columns;                                           \
                for (int64_t c = 0; c < width; c++) {                                                    \
                    float value = widened(values[c]);                                                    \
                    sums[0][c] += value * value;                                                         \
                }                                                                                        \
            }                                                                                            \
            if (row - begin < step) break; /* the last rows, too few for a step */                       \
            for (int level = 1; level < LEVELS; level++) {                                               \
                for (int64_t c = 0; c < width; c++) {                                                    \
                    sums[level][c] += sums[level - 1][c];                                                \
                    sums[level - 1][c] = 0;                                                              \
                }                                                                                        \
                if (row & ((step - 1) << (level * power))) break;                                        \
            }                                                                                            \
        }                                                                                                \
        for (int level = 1; level < LEVELS; level++)                                                     \
            for (int64_t c = 0; c < width; c++) sums[0][c] += sums[level][c];                            \
        memcpy(out, sums[0], width * sizeof(float));                                                     \
    }                                                                                                    \
    void name(const number *inputs, int64_t rows, int64_t columns, float *out, int threads) {            \
        int64_t bits = 0;                                                                                \
        while (((int64_t)1 << bits) < rows) bits++;                                                      \
        const int64_t power = bits / LEVELS > 4 ? bits / LEVELS : 4;                                     \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                                \
        for (int64_t begin = 0; begin < columns; begin += BLOCK) {                                       \
            int64_t width = columns - begin < BLOCK ? columns - begin : BLOCK;                           \
            block_##name(inputs + begin, rows, columns, width, power, out + begin);                      \
        }                                                                                                \
    }

SQUARES(squares_f32, float, of_f32)
SQUARES(squares_bf16, uint16_t, of_bf16)
