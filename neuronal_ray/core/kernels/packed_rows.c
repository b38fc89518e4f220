/* Product of a matrix of bits and non-zero values with a few vectors, and its unpacking.
 *
 * A row has `words` 32-bit words of bits (column c is bit c % 32 of word c / 32; the last word is padded with zeros). Its
 * values, those of the set bits in the order of the columns, begin at values[starts[row]]. The 64 bytes after the last
 * value are read, but not used. Inputs are [batch, 32 * words], padded with zeros after the last column.
 * Products are summed in float32; the sum of a row does not depend on the number of threads.
 */
#include <immintrin.h>
#include <stdint.h>

#define MOST 8     /* most vectors at a time */
#define AHEAD 2048 /* prefetch distance of the values in bytes; bits take a few times fewer */

/* Load into a register first: expanding 32 values from memory takes several times as long. */
static inline __attribute__((always_inline)) __m512i load(const void *place) {
    __m512i loaded = _mm512_loadu_si512(place);
    __asm__("" : "+v"(loaded));
    return loaded;
}

static inline __attribute__((always_inline)) void fetch(const void *values, const void *bits) {
    _mm_prefetch((const char *)values + AHEAD, _MM_HINT_T0);
    _mm_prefetch((const char *)bits + AHEAD / 4, _MM_HINT_T0);
}

int packed_supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16");
}

static inline __attribute__((always_inline)) void rows_bf16(
    const uint32_t *bits, const uint16_t *values, const int64_t *starts, const uint16_t *inputs, float *outputs,
    int64_t row, int64_t rows, int64_t words, const int batch) {
    const uint32_t *mask = bits + row * words;
    const uint16_t *next = values + starts[row];
    __m512 sums[MOST], others[MOST];
    for (int i = 0; i < batch; i++) sums[i] = others[i] = _mm512_setzero_ps();
    int64_t word = 0;
    for (; word + 2 <= words; word += 2) {
        fetch(next, mask + word);
        __m512i one = _mm512_maskz_expand_epi16(mask[word], load(next));
        next += __builtin_popcount(mask[word]);
        __m512i two = _mm512_maskz_expand_epi16(mask[word + 1], load(next));
        next += __builtin_popcount(mask[word + 1]);
        for (int i = 0; i < batch; i++) {
            const uint16_t *input = inputs + (i * words + word) * 32;
            sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)one, (__m512bh)_mm512_loadu_si512(input));
            others[i] = _mm512_dpbf16_ps(others[i], (__m512bh)two, (__m512bh)_mm512_loadu_si512(input + 32));
        }
    }
    if (word < words) {
        __m512i one = _mm512_maskz_expand_epi16(mask[word], load(next));
        for (int i = 0; i < batch; i++) {
            const uint16_t *input = inputs + (i * words + word) * 32;
            sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)one, (__m512bh)_mm512_loadu_si512(input));
        }
    }
    for (int i = 0; i < batch; i++)
        outputs[i * rows + row] = _mm512_reduce_add_ps(_mm512_add_ps(sums[i], others[i]));
}

static inline __attribute__((always_inline)) void rows_f32(
    const uint32_t *bits, const float *values, const int64_t *starts, const float *inputs, float *outputs,
    int64_t row, int64_t rows, int64_t words, const int batch) {
    const uint32_t *mask = bits + row * words;
    const float *next = values + starts[row];
    __m512 sums[MOST], others[MOST];
    for (int i = 0; i < batch; i++) sums[i] = others[i] = _mm512_setzero_ps();
    for (int64_t word = 0; word < words; word++) {
        uint32_t low = mask[word] & 0xffff, high = mask[word] >> 16;
        fetch(next, mask + word);
        __m512 one = _mm512_maskz_expand_ps(low, _mm512_castsi512_ps(load(next)));
        next += __builtin_popcount(low);
        __m512 two = _mm512_maskz_expand_ps(high, _mm512_castsi512_ps(load(next)));
        next += __builtin_popcount(high);
        for (int i = 0; i < batch; i++) {
            const float *input = inputs + (i * words + word) * 32;
            sums[i] = _mm512_fmadd_ps(one, _mm512_loadu_ps(input), sums[i]);
            others[i] = _mm512_fmadd_ps(two, _mm512_loadu_ps(input + 16), others[i]);
        }
    }
    for (int i = 0; i < batch; i++)
        outputs[i * rows + row] = _mm512_reduce_add_ps(_mm512_add_ps(sums[i], others[i]));
}

#define BATCHES(kernel) \
    switch (batch) { \
    case 1: kernel(bits, values, starts, inputs, outputs, row, rows, words, 1); break; \
    case 2: kernel(bits, values, starts, inputs, outputs, row, rows, words, 2); break; \
    case 3: kernel(bits, values, starts, inputs, outputs, row, rows, words, 3); break; \
    case 4: kernel(bits, values, starts, inputs, outputs, row, rows, words, 4); break; \
    case 5: kernel(bits, values, starts, inputs, outputs, row, rows, words, 5); break; \
    case 6: kernel(bits, values, starts, inputs, outputs, row, rows, words, 6); break; \
    case 7: kernel(bits, values, starts, inputs, outputs, row, rows, words, 7); break; \
    case 8: kernel(bits, values, starts, inputs, outputs, row, rows, words, 8); break; \
    }

/* outputs [batch, rows] = inputs [batch, 32 * words] times the matrix's transpose; batch is 1 to 8. */
void packed_linear_bf16(const uint32_t *bits, const uint16_t *values, const int64_t *starts, const uint16_t *inputs,
                        float *outputs, int64_t rows, int64_t words, int batch, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) BATCHES(rows_bf16)
}

void packed_linear_f32(const uint32_t *bits, const float *values, const int64_t *starts, const float *inputs,
                       float *outputs, int64_t rows, int64_t words, int batch, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) BATCHES(rows_f32)
}

/* outputs [rows, 32 * words]: the dense matrix. */
void packed_unpack_bf16(const uint32_t *bits, const uint16_t *values, const int64_t *starts, uint16_t *outputs,
                        int64_t rows, int64_t words, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const uint16_t *next = values + starts[row];
        for (int64_t word = row * words; word < (row + 1) * words; word++) {
            fetch(next, bits + word);
            _mm512_storeu_si512(outputs + word * 32, _mm512_maskz_expand_epi16(bits[word], load(next)));
            next += __builtin_popcount(bits[word]);
        }
    }
}

void packed_unpack_f32(const uint32_t *bits, const float *values, const int64_t *starts, float *outputs, int64_t rows,
                       int64_t words, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const float *next = values + starts[row];
        for (int64_t half = row * words * 2; half < (row + 1) * words * 2; half++) {
            uint32_t mask = bits[half / 2] >> (half % 2 * 16) & 0xffff;
            fetch(next, bits + half / 2);
            _mm512_storeu_si512(outputs + half * 16, _mm512_maskz_expand_epi32(mask, load(next)));
            next += __builtin_popcount(mask);
        }
    }
}
