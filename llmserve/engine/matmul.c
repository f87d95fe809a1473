/* Products of matrices in ggml's type Q8_0 (ggml-common.h: blocks of 32 bytes with one scale), for processors with AVX-512 VNNI.

   ggml multiplies a row with one column at a time. The sum of a block's 32 products takes one instruction; to add up that vector, make
   it a float and scale it takes six more. Here those are shared: a vector holds the sums of eight rows where there are few columns,
   and of 8 or 16 columns where there are more.

   The instruction multiplies unsigned bytes by signed ones. So 128 is added to each byte of a row, and sums begin at what that adds.

   An element is the same to the last bit in all of these forms, and however many columns are asked for: the sum of a block is a whole
   number, and one block after the other is scaled and added.

   There is no Python in here; matmul.py opens it with ctypes. Everything is thread-safe but the setting of `llmserve_others`. */

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* As of ggml's own (llamafile/sgemm.h): c = a * b, of m rows, n columns and k blocks in each row and column. Rows and columns begin every
   lda, ldb blocks and ldc floats. Of all threads that call it, each does its share. False if nothing was done. */
struct params {  /* the beginning of ggml_compute_params (ggml-cpu-impl.h) */
    int thread, num_threads;
};
typedef bool product(const struct params *, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda, const void *b, int64_t ldb,
                     void *c, int64_t ldc, int type_a, int type_b, int type_c);

product *llmserve_others;  /* does what is not done here; NULL: nobody */
product llmserve_product;
bool llmserve_can(void);

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

enum { F32 = 0, Q8_0 = 8 };  /* of ggml_type (ggml.h) */
enum { SIZE = 32, ROWS = 8, FEW = 5, MOST_COLUMNS = 64, MOST_BYTES = 1 << 19 };

typedef struct {
    uint16_t scale;  /* a float of 16 bits */
    int8_t values[SIZE];
} Block;

#define FAST __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,f16c,fma")))
#define INLINE FAST static inline __attribute__((always_inline))

INLINE __m256i values_of(const Block *block) {
    return _mm256_loadu_si256((const void *)block->values);
}

/* For each of the eight dwords of a block of a column: what adding 128 to a row's bytes takes away from its products. */
INLINE __m256i start_of(const Block *block) {
    return _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(-128), values_of(block)));
}

INLINE __m256i unsigned_of(const Block *block) {
    return _mm256_xor_si256(values_of(block), _mm256_set1_epi8(-128));
}

INLINE int32_t sum_of(__m256i dwords) {
    __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(dwords), _mm256_extracti128_si256(dwords, 1));
    sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0xb1)));
}

/* ---- Few columns: a vector holds the sums of eight rows */

struct few {
    const __m256i *starts;  /* [column][block] */
    const float *scales;  /* [column][block] */
    const Block *columns;
    int64_t ld, k;
};

INLINE __m256 scales_of(const Block *const rows[ROWS], int64_t block) {
    __m128i scales = _mm_cvtsi32_si128(rows[0][block].scale);
    scales = _mm_insert_epi16(scales, rows[1][block].scale, 1);
    scales = _mm_insert_epi16(scales, rows[2][block].scale, 2);
    scales = _mm_insert_epi16(scales, rows[3][block].scale, 3);
    scales = _mm_insert_epi16(scales, rows[4][block].scale, 4);
    scales = _mm_insert_epi16(scales, rows[5][block].scale, 5);
    scales = _mm_insert_epi16(scales, rows[6][block].scale, 6);
    scales = _mm_insert_epi16(scales, rows[7][block].scale, 7);
    return _mm256_cvtph_ps(scales);
}

/* The sum of each of eight vectors. */
INLINE __m256i sums_of(__m256i s[ROWS]) {
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i += 2) s[i] = _mm256_add_epi32(_mm256_unpacklo_epi32(s[i], s[i + 1]), _mm256_unpackhi_epi32(s[i], s[i + 1]));
#pragma GCC unroll 2
    for (int i = 0; i < ROWS; i += 4) s[i] = _mm256_add_epi32(_mm256_unpacklo_epi64(s[i], s[i + 2]), _mm256_unpackhi_epi64(s[i], s[i + 2]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(s[0], s[4], 0x20), _mm256_permute2x128_si256(s[0], s[4], 0x31));
}

INLINE void multiply_few(const Block *const rows[ROWS], const char *ahead, const struct few *few, int num_columns, __m256 out[FEW]) {
#pragma GCC unroll 5
    for (int column = 0; column < num_columns; column++) out[column] = _mm256_setzero_ps();
    for (int64_t block = 0; block < few->k; block++, ahead += ROWS * sizeof(Block)) {
#pragma GCC unroll 5
        for (int i = 0; i < 5; i++) _mm_prefetch(ahead + 64 * i, _MM_HINT_T0);
        __m256i weights[ROWS];
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++) weights[row] = unsigned_of(rows[row] + block);
        __m256 scales = scales_of(rows, block);
#pragma GCC unroll 5
        for (int column = 0; column < num_columns; column++) {
            int64_t place = column * few->k + block;
            __m256i values = values_of(few->columns + column * few->ld + block), start = few->starts[place], sums[ROWS];
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; row++) sums[row] = _mm256_dpbusd_epi32(start, weights[row], values);
            __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sums_of(sums)), _mm256_set1_ps(few->scales[place]));
            out[column] = _mm256_fmadd_ps(scaled, scales, out[column]);
        }
    }
}

/* A switch, so that the compiler makes a loop for each number of columns. */
FAST static void multiply_few_by(int num_columns, const Block *const rows[ROWS], const char *ahead, const struct few *few, __m256 out[FEW]) {
    switch (num_columns) {
        case 1: multiply_few(rows, ahead, few, 1, out); break;
        case 2: multiply_few(rows, ahead, few, 2, out); break;
        case 3: multiply_few(rows, ahead, few, 3, out); break;
        case 4: multiply_few(rows, ahead, few, 4, out); break;
        default: multiply_few(rows, ahead, few, FEW, out);
    }
}

FAST static void product_of_few(int64_t first, int64_t last, int64_t n, int64_t k, const Block *a, int64_t lda, const Block *b, int64_t ldb,
                                float *c, int64_t ldc) {
    __m256i starts[n * k];
    float scales[n * k];
    for (int column = 0; column < n; column++)
        for (int64_t block = 0; block < k; block++) {
            starts[column * k + block] = start_of(b + column * ldb + block);
            scales[column * k + block] = _cvtsh_ss(b[column * ldb + block].scale);
        }
    struct few few = {starts, scales, b, ldb, k};
    for (int64_t row = first; row < last; row += ROWS) {
        int num_rows = last - row < ROWS ? (int)(last - row) : ROWS;
        const Block *rows[ROWS];
        for (int i = 0; i < ROWS; i++) rows[i] = a + (row + (i < num_rows ? i : 0)) * lda;
        __m256 out[FEW];
        multiply_few_by((int)n, rows, (const char *)(a + (row + 2 * ROWS) * lda), &few, out);
        for (int column = 0; column < n; column++) memcpy(c + column * ldc + row, out + column, (size_t)num_rows * sizeof(float));
    }
}

/* ---- More columns: a vector holds the sums of as many of them as it has lanes */

struct group {
    int lanes, num_columns;
    int32_t *values;  /* [block][dword][lane] */
    int32_t *starts;  /* [block][lane] */
    float *scales;  /* [block][lane] */
};
enum { BYTES_OF_LANE = SIZE + sizeof(int32_t) + sizeof(float) };  /* for each block */

FAST static struct group interleave(char *buffer, int lanes, int num_columns, int64_t k, const Block *b, int64_t ldb) {
    struct group group = {lanes, num_columns, (int32_t *)buffer, (int32_t *)(buffer + k * SIZE * lanes), NULL};
    group.scales = (float *)(group.starts + k * lanes);
    for (int64_t block = 0; block < k; block++)
        for (int lane = 0; lane < lanes; lane++) {
            const Block *column = b + (lane < num_columns ? lane : 0) * ldb + block;
            int32_t dwords[SIZE / 4];
            memcpy(dwords, column->values, SIZE);
            for (int i = 0; i < SIZE / 4; i++) group.values[(block * (SIZE / 4) + i) * lanes + lane] = dwords[i];
            group.starts[block * lanes + lane] = sum_of(start_of(column));
            group.scales[block * lanes + lane] = _cvtsh_ss(column->scale);
        }
    return group;
}

/* Four rows, whose bytes and scales are [row][block]. */
#define MULTIPLY(NAME, INTS, FLOATS, _mm)                                                                                          \
    INLINE void NAME(const uint8_t *bytes, const float *scales, int64_t k, const struct group *group, float out[ROWS / 2][16]) {   \
        const INTS *values = (const INTS *)group->values, *starts = (const INTS *)group->starts;                                   \
        const FLOATS *group_scales = (const FLOATS *)group->scales;                                                                \
        FLOATS totals[ROWS / 2] = {_mm##_setzero_ps(), _mm##_setzero_ps(), _mm##_setzero_ps(), _mm##_setzero_ps()};                \
        for (int64_t block = 0; block < k; block++) {                                                                              \
            INTS sums[ROWS / 2] = {starts[block], starts[block], starts[block], starts[block]};                                    \
            _Pragma("GCC unroll 8") for (int i = 0; i < SIZE / 4; i++)                                                             \
                _Pragma("GCC unroll 4") for (int row = 0; row < ROWS / 2; row++) {                                                 \
                    int32_t dword;                                                                                                 \
                    memcpy(&dword, bytes + (row * k + block) * SIZE + 4 * i, 4);                                                   \
                    sums[row] = _mm##_dpbusd_epi32(sums[row], _mm##_set1_epi32(dword), values[block * (SIZE / 4) + i]);            \
                }                                                                                                                  \
            _Pragma("GCC unroll 4") for (int row = 0; row < ROWS / 2; row++) {                                                     \
                FLOATS scaled = _mm##_mul_ps(_mm##_cvtepi32_ps(sums[row]), group_scales[block]);                                   \
                totals[row] = _mm##_fmadd_ps(scaled, _mm##_set1_ps(scales[row * k + block]), totals[row]);                         \
            }                                                                                                                      \
        }                                                                                                                          \
        for (int row = 0; row < ROWS / 2; row++) *(FLOATS *)out[row] = totals[row];                                                \
    }

MULTIPLY(multiply_8, __m256i, __m256, _mm256)
MULTIPLY(multiply_16, __m512i, __m512, _mm512)

FAST static void product_of_groups(int64_t first, int64_t last, int64_t n, int64_t k, const Block *a, int64_t lda, const Block *b, int64_t ldb,
                                   float *c, int64_t ldc) {
    char *place = __builtin_alloca_with_align((size_t)((n + 15) / 8 * 8 * k * BYTES_OF_LANE), 8 * 64);
    struct group groups[MOST_COLUMNS / 16 + 1];
    int num_groups = 0;
    for (int64_t column = 0; column < n; column += groups[num_groups++].num_columns) {
        int lanes = n - column > 8 ? 16 : 8;
        groups[num_groups] = interleave(place, lanes, n - column < lanes ? (int)(n - column) : lanes, k, b + column * ldb, ldb);
        place += lanes * k * BYTES_OF_LANE;
    }
    __m256i bytes[ROWS * k];
    float scales[ROWS * k];
    for (int64_t row = first; row < last; row += ROWS) {
        int num_rows = last - row < ROWS ? (int)(last - row) : ROWS;
        for (int i = 0; i < ROWS; i++) {
            const Block *from = a + (row + (i < num_rows ? i : 0)) * lda;
            for (int64_t block = 0; block < k; block++) {
                _mm_prefetch((const char *)(from + ROWS * lda + block), _MM_HINT_T0);
                bytes[i * k + block] = unsigned_of(from + block);
                scales[i * k + block] = _cvtsh_ss(from[block].scale);
            }
        }
        float *to = c + row;
        for (int i = 0; i < num_groups; to += groups[i++].num_columns * ldc) {
            float out[ROWS][16] __attribute__((aligned(64)));
            for (int half = 0; half < ROWS; half += ROWS / 2) {
                const uint8_t *half_bytes = (const uint8_t *)(bytes + half * k);
                if (groups[i].lanes == 8) multiply_8(half_bytes, scales + half * k, k, groups + i, out + half);
                else multiply_16(half_bytes, scales + half * k, k, groups + i, out + half);
            }
            for (int column = 0; column < groups[i].num_columns; column++)
                for (int j = 0; j < num_rows; j++) to[column * ldc + j] = out[j][column];
        }
    }
}

/* ---- As ggml calls it */

bool llmserve_can(void) {
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
}

bool llmserve_product(const struct params *params, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda, const void *b, int64_t ldb,
                      void *c, int64_t ldc, int type_a, int type_b, int type_c) {
    if (type_a != Q8_0 || type_c != F32 || 16 * k * BYTES_OF_LANE > MOST_BYTES)
        return llmserve_others && llmserve_others(params, m, n, k, a, lda, b, ldb, c, ldc, type_a, type_b, type_c);
    if (type_b != Q8_0) return false;  /* ggml makes it Q8_0 and asks again */
    int64_t panels = (m + ROWS - 1) / ROWS, share = (panels + params->num_threads - 1) / params->num_threads * ROWS;
    int64_t first = share * params->thread, last = first + share < m ? first + share : m;
    for (int64_t column = 0, num; first < last && column < n; column += num) {
        num = n - column < MOST_COLUMNS ? n - column : MOST_COLUMNS;
        while (num > 16 && num * k * BYTES_OF_LANE > MOST_BYTES) num /= 2;
        (num <= FEW ? product_of_few : product_of_groups)(first, last, num, k, a, lda, (const Block *)b + column * ldb, ldb,
                                                           (float *)c + column * ldc, ldc);
    }
    return true;
}

#else

bool llmserve_can(void) {
    return false;
}

bool llmserve_product(const struct params *params, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda, const void *b, int64_t ldb,
                      void *c, int64_t ldc, int type_a, int type_b, int type_c) {
    return llmserve_others && llmserve_others(params, m, n, k, a, lda, b, ldb, c, ldc, type_a, type_b, type_c);
}

#endif
