/* What ggml and numpy take too long for, on processors with AVX-512 VNNI: products of quantized matrices, and the best of many scores.

   There is no Python in here; kernels.py opens it with ctypes. All is thread-safe but the setting of `llmserve_others`. */

#ifndef __OPTIMIZE__
#error "without optimization these are slower than what they replace"
#endif

#include <immintrin.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

bool llmserve_can(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}

#define FAST __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")))
#define INLINE FAST static inline __attribute__((always_inline))

/* ==== Scores: the places of those from `least` on, ascending, and their number; of the first `most` if those are more. */

FAST int64_t llmserve_select(const float *scores, int64_t n, float least, int64_t *places, int64_t most) {
    int64_t found = 0;
    for (int64_t i = 0; i < n; i += 64) {
        uint64_t chosen = 0;
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++) {
            int64_t left = n - i - 16 * part;
            __mmask16 there = left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
            __m512 some = _mm512_maskz_loadu_ps(there, scores + i + 16 * part);
            chosen |= (uint64_t)_mm512_mask_cmp_ps_mask(there, some, _mm512_set1_ps(least), _CMP_GE_OQ) << (16 * part);
        }
        for (; chosen; chosen &= chosen - 1) {
            if (found == most) return found;
            places[found++] = i + __builtin_ctzll(chosen);
        }
    }
    return found;
}

/* ==== Products of matrices in ggml's types Q8_0 and Q4_1 (ggml-common.h: blocks of 32 numbers with one scale)

   ggml multiplies a row with one column at a time. The sum of a block's 32 products takes one instruction; to add up the vector that it
   is, make it a float and scale it takes six more. Here sixteen rows share those: a vector holds a sum of each. For that, a block of sixteen
   rows is transposed in registers, and then multiplied with each column's four bytes at a time, which the instruction spreads itself.

   It multiplies unsigned bytes by signed ones. So 128 is added to each byte of a row in Q8_0, and a sum begins with what that adds, negated.

   An element is the same to the last bit however many columns, rows and threads there are: the sum of a block is a whole number, and one
   block after the other is scaled and added. `type` and numbers of columns are constants to the compiler. */

struct params {  /* the beginning of ggml_compute_params (ggml-cpu-impl.h) */
    int thread, num_threads;
};

/* As of llamafile_sgemm (ggml's llamafile/sgemm.h): c = a * b, of m rows, n columns and k blocks in each row and column. Rows and columns
   begin every lda and ldb blocks and ldc floats. Each of the threads that call it does its share. False if nothing was done. */
typedef bool product(const struct params *, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda, const void *b, int64_t ldb,
                     void *c, int64_t ldc, int type_a, int type_b, int type_c);

product *llmserve_others;  /* does what is not done here; NULL: nobody */
product llmserve_product;

enum { F32 = 0, Q4_1 = 3, Q8_0 = 8, Q8_1 = 9 };  /* of ggml_type (ggml.h); columns are in Q8_0 for rows in Q8_0, in Q8_1 for rows in Q4_1 */
enum { SIZE = 32, ROWS = 16, BLOCKS = 16, TILE = 8, MOST_COLUMNS = 64 };
enum { MOST_BLOCKS = 1 << 13 };  /* of all columns together: what is kept of each is on the stack, 12 bytes */

struct q8_0 {
    uint16_t scale;  /* a float of 16 bits, as all of these */
    int8_t values[SIZE];
};

struct q8_1 {
    uint16_t scale, sum;  /* of the scaled values */
    int8_t values[SIZE];
};

struct q4_1 {
    uint16_t scale, least;  /* a number is scale * nibble + least */
    uint8_t nibbles[SIZE / 2];  /* low ones first */
};

static inline int size_of_row_block(int type) {
    return type == Q8_0 ? sizeof(struct q8_0) : sizeof(struct q4_1);
}

static inline int size_of_column_block(int type) {
    return type == Q8_0 ? sizeof(struct q8_0) : sizeof(struct q8_1);
}

static inline int offset_of_values(int type) {
    return type == Q8_0 ? offsetof(struct q8_0, values) : offsetof(struct q8_1, values);
}

INLINE __m256i values_of(int type, const char *block) {
    return _mm256_loadu_si256((const void *)(block + offset_of_values(type)));
}

/* 0: the scale, with which every block begins; 1: what comes next, if that is one as well. */
INLINE uint16_t half_at(const char *block, int place) {
    uint16_t half;
    memcpy(&half, block + 2 * place, 2);
    return half;
}

/* Where the sum of a column's block begins. */
INLINE int32_t start_of(int type, const char *block) {
    if (type != Q8_0) return 0;
    __m256i dwords = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), values_of(type, block));
    __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(dwords), _mm256_extracti128_si256(dwords, 1));
    sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0x4e));
    return -128 * _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0xb1)));
}

/* ---- A block of sixteen rows */

struct panel {
    __m512i bytes[SIZE / 4];  /* unsigned, four of each row */
    __m256i scales, least;
};

/* In: vector i has sixteen bytes of each of the rows i, i + 4, i + 8 and i + 12. Out: it has bytes 4 i to 4 i + 3 of all rows in order. */
INLINE void transpose(__m512i s[4]) {
    __m512i low01 = _mm512_unpacklo_epi32(s[0], s[1]), high01 = _mm512_unpackhi_epi32(s[0], s[1]);
    __m512i low23 = _mm512_unpacklo_epi32(s[2], s[3]), high23 = _mm512_unpackhi_epi32(s[2], s[3]);
    s[0] = _mm512_unpacklo_epi64(low01, low23), s[1] = _mm512_unpackhi_epi64(low01, low23);
    s[2] = _mm512_unpacklo_epi64(high01, high23), s[3] = _mm512_unpackhi_epi64(high01, high23);
}

/* Sixteen bytes of each row, so far behind its beginning, as that. */
INLINE void gather(const char *const rows[ROWS], int64_t offset, __m512i out[4]) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m256i low = _mm256_castsi128_si256(_mm_loadu_si128((const void *)(rows[i] + offset)));
        __m256i high = _mm256_castsi128_si256(_mm_loadu_si128((const void *)(rows[i + 8] + offset)));
        low = _mm256_inserti128_si256(low, _mm_loadu_si128((const void *)(rows[i + 4] + offset)), 1);
        high = _mm256_inserti128_si256(high, _mm_loadu_si128((const void *)(rows[i + 12] + offset)), 1);
        out[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    transpose(out);
}

INLINE __m256i halves_of(const char *const rows[ROWS], int64_t offset, int place) {
#define HALF(i) (short)half_at(rows[i] + offset, place)
    return _mm256_setr_epi16(HALF(0), HALF(1), HALF(2), HALF(3), HALF(4), HALF(5), HALF(6), HALF(7), HALF(8), HALF(9), HALF(10), HALF(11), HALF(12),
                             HALF(13), HALF(14), HALF(15));
}

INLINE void unpack(int type, struct panel *panel, const char *const rows[ROWS], int64_t block) {
    int64_t offset = block * size_of_row_block(type);
    if (type == Q8_0) {
        gather(rows, offset + offsetof(struct q8_0, values), panel->bytes);
        gather(rows, offset + offsetof(struct q8_0, values) + SIZE / 2, panel->bytes + 4);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) panel->bytes[i] = _mm512_xor_si512(panel->bytes[i], _mm512_set1_epi8(-128));
    } else {
        gather(rows, offset + offsetof(struct q4_1, nibbles), panel->bytes);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            panel->bytes[i + 4] = _mm512_and_si512(_mm512_srli_epi16(panel->bytes[i], 4), _mm512_set1_epi8(15));
            panel->bytes[i] = _mm512_and_si512(panel->bytes[i], _mm512_set1_epi8(15));
        }
    }
    panel->scales = halves_of(rows, offset, 0);
    if (type == Q4_1) panel->least = halves_of(rows, offset, 1);
}

/* For the compiler to make code for each number. */
#define WITH_NUMBER(n, function, ...)              \
    switch (n) {                                   \
        case 1: function(1, __VA_ARGS__); break;   \
        case 2: function(2, __VA_ARGS__); break;   \
        case 3: function(3, __VA_ARGS__); break;   \
        case 4: function(4, __VA_ARGS__); break;   \
        case 5: function(5, __VA_ARGS__); break;   \
        case 6: function(6, __VA_ARGS__); break;   \
        case 7: function(7, __VA_ARGS__); break;   \
        default: function(TILE, __VA_ARGS__);      \
    }

struct columns {
    const char *blocks;
    int64_t ld, k;
    const int32_t *starts;  /* [column][block] */
    const float *scales, *sums;  /* [column][block] */
};

/* Add a block to the products with so many columns from `column` on. */
INLINE void multiply(int num_columns, int type, const struct panel *panel, const struct columns *columns, int64_t column, int64_t block,
                     __m512 out[TILE]) {
    const __m512 scales = _mm512_cvtph_ps(panel->scales), least = type == Q4_1 ? _mm512_cvtph_ps(panel->least) : scales;
#pragma GCC unroll 8
    for (int j = 0; j < num_columns; j++) {
        int64_t place = (column + j) * columns->k + block;
        const char *values = columns->blocks + (column + j) * columns->ld + block * size_of_column_block(type) + offset_of_values(type);
        __m512i sums = _mm512_set1_epi32(columns->starts[place]);
#pragma GCC unroll 8
        for (int i = 0; i < SIZE / 4; i++) {
            int32_t dword;
            memcpy(&dword, values + 4 * i, 4);
            sums = _mm512_dpbusd_epi32(sums, panel->bytes[i], _mm512_set1_epi32(dword));
        }
        out[j] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(columns->scales[place])), scales, out[j]);
        if (type == Q4_1) out[j] = _mm512_fmadd_ps(_mm512_set1_ps(columns->sums[place]), least, out[j]);
    }
}

/* ---- Sixteen rows. Meanwhile memory is fetched from two such strips ahead, where rows lie one behind the other. */

INLINE void fetch(int type, uintptr_t ahead, int64_t block) {
    ahead += (uintptr_t)(block * ROWS * size_of_row_block(type));
#pragma GCC unroll 9
    for (int i = 0; i < ROWS * size_of_row_block(type); i += 64) _mm_prefetch((const char *)(ahead + (uintptr_t)i), _MM_HINT_T1);
}

/* Times a few columns: a block of rows stays in registers. */
INLINE void multiply_few(int num_columns, int type, const char *const rows[ROWS], uintptr_t ahead, const struct columns *columns, __m512 *totals) {
    __m512 out[TILE];
#pragma GCC unroll 8
    for (int j = 0; j < num_columns; j++) out[j] = _mm512_setzero_ps();
    for (int64_t block = 0; block < columns->k; block++) {
        struct panel panel;
        fetch(type, ahead, block);
        unpack(type, &panel, rows, block);
        multiply(num_columns, type, &panel, columns, 0, block, out);
    }
#pragma GCC unroll 8
    for (int j = 0; j < num_columns; j++) totals[j] = out[j];
}

INLINE void multiply_tile(int num_columns, int type, const struct panel *panels, int num_blocks, const struct columns *columns, int64_t column,
                          int64_t first, __m512 *totals) {
    __m512 out[TILE];
#pragma GCC unroll 8
    for (int j = 0; j < num_columns; j++) out[j] = totals[j];
    for (int i = 0; i < num_blocks; i++) multiply(num_columns, type, panels + i, columns, column, first + i, out);
#pragma GCC unroll 8
    for (int j = 0; j < num_columns; j++) totals[j] = out[j];
}

INLINE void multiply_many(int type, int64_t n, const char *const rows[ROWS], uintptr_t ahead, const struct columns *columns, __m512 *totals) {
    for (int64_t j = 0; j < n; j++) totals[j] = _mm512_setzero_ps();
    for (int64_t first = 0; first < columns->k; first += BLOCKS) {
        int num_blocks = columns->k - first < BLOCKS ? (int)(columns->k - first) : BLOCKS;
        struct panel panels[BLOCKS];
        for (int i = 0; i < num_blocks; i++) {
            fetch(type, ahead, first + i);
            unpack(type, panels + i, rows, first + i);
        }
        for (int64_t j = 0; j < n; j += TILE) WITH_NUMBER(n - j, multiply_tile, type, panels, num_blocks, columns, j, first, totals + j)
    }
}

INLINE void product_of(int type, int64_t first, int64_t last, int64_t n, int64_t k, const char *a, int64_t lda, const char *b, int64_t ldb,
                       float *c, int64_t ldc) {
    int32_t starts[n * k];
    float scales[n * k], sums[n * k];
    for (int64_t j = 0; j < n; j++)
        for (int64_t block = 0; block < k; block++) {
            const char *from = b + j * ldb + block * size_of_column_block(type);
            starts[j * k + block] = start_of(type, from);
            scales[j * k + block] = _cvtsh_ss(half_at(from, 0));
            sums[j * k + block] = _cvtsh_ss(half_at(from, 1));
        }
    struct columns columns = {b, ldb, k, starts, scales, sums};
    for (int64_t row = first; row < last; row += ROWS) {
        int num_rows = last - row < ROWS ? (int)(last - row) : ROWS;
        const char *rows[ROWS];
        uintptr_t ahead = (uintptr_t)a + (uintptr_t)((row + 2 * ROWS) * lda);
        for (int i = 0; i < ROWS; i++) rows[i] = a + (row + (i < num_rows ? i : 0)) * lda;
        __m512 totals[MOST_COLUMNS];
        if (n > TILE) multiply_many(type, n, rows, ahead, &columns, totals);
        else WITH_NUMBER(n, multiply_few, type, rows, ahead, &columns, totals)
        for (int64_t j = 0; j < n; j++) memcpy(c + j * ldc + row, totals + j, (size_t)num_rows * sizeof(float));
    }
}

/* ---- As ggml calls it */

FAST static void product_of_q8_0(int64_t first, int64_t last, int64_t n, int64_t k, const char *a, int64_t lda, const char *b, int64_t ldb,
                                 float *c, int64_t ldc) {
    product_of(Q8_0, first, last, n, k, a, lda, b, ldb, c, ldc);
}

FAST static void product_of_q4_1(int64_t first, int64_t last, int64_t n, int64_t k, const char *a, int64_t lda, const char *b, int64_t ldb,
                                 float *c, int64_t ldc) {
    product_of(Q4_1, first, last, n, k, a, lda, b, ldb, c, ldc);
}

bool llmserve_product(const struct params *params, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda, const void *b, int64_t ldb,
                      void *c, int64_t ldc, int type_a, int type_b, int type_c) {
    product *others = llmserve_others;
    if ((type_a != Q8_0 && type_a != Q4_1) || type_c != F32 || k < 1 || k > MOST_BLOCKS)
        return others && others(params, m, n, k, a, lda, b, ldb, c, ldc, type_a, type_b, type_c);
    if (type_b != (type_a == Q8_0 ? Q8_0 : Q8_1)) return false;  /* ggml makes columns of that type and asks again */
    int64_t strips = (m + ROWS - 1) / ROWS, share = (strips + params->num_threads - 1) / params->num_threads * ROWS;
    int64_t first = share * params->thread, last = first + share < m ? first + share : m;
    lda *= size_of_row_block(type_a), ldb *= size_of_column_block(type_a);
    for (int64_t column = 0, num; first < last && column < n; column += num) {
        num = n - column < MOST_COLUMNS ? n - column : MOST_COLUMNS;
        while (num * k > MOST_BLOCKS) num /= 2;
        (type_a == Q8_0 ? product_of_q8_0 : product_of_q4_1)(first, last, num, k, a, lda, (const char *)b + column * ldb, ldb,
                                                             (float *)c + column * ldc, ldc);
    }
    return true;
}
