/* What a search on a CPU does for every weight and activation beside its matrix products, in one pass over memory.
 *
 * Rows of weights and ranks lie one after the other. Loops are left to the compiler's vectors, for several processors
 * at once where it can. To be compiled without contraction: a product is rounded before it is added.
 */
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

/* The weights whose rank is not below its row's count; zeros for the others. A rank is compared as its own type: the
 * count less one fits it. No branch, so that every processor's vectors can do it. */
#define CUT(name, word, rank)                                                                            \
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

CUT(cut_16_16, uint16_t, int16_t)
CUT(cut_16_32, uint16_t, int32_t)
CUT(cut_32_16, uint32_t, int16_t)
CUT(cut_32_32, uint32_t, int32_t)

/* Sums over rows of each column's squares, in float32 and in the order of torch's sum (its cascade of partial sums,
 * four levels of 2^power rows). */
#define LEVELS 4
#define BLOCK 256 /* columns whose partial sums stay in a core's first cache */

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
