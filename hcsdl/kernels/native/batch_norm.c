/* Batch norm in training mode with what follows it: ReLU, or the sum with a residual and ReLU; forward and backward.
 *
 * Activations are matrices of `rows` pixels by `channels`, dense (channels_last), float or bf16; arithmetic, parameters and statistics are float, sums over
 * more than CHUNK rows double. The forward pass reads x twice and writes y once; the backward pass reads x and dy twice and writes dx once (with a residual:
 * x twice, dy and y once; it writes the residual's gradient, which is dy where the ReLU let it through, and reads that again). Without a residual the ReLU's
 * mask is computed again from x, in the very same arithmetic. With one, dy may come in two parts: their sum is rounded as if it had been stored.
 *
 * Sums are taken over chunks of rows and then over chunks in their order, so results do not depend on the number of threads. The second pass goes backwards
 * through the rows: the last ones are still in the cache. Variance is taken about a pixel's value, not about zero, so a large mean costs no digits.
 * Functions return 0, or 1 where memory for the sums could not be had.
 */
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FLOAT = 0, BF16 = 1 };                     /* what activations are */
enum { PLAIN = 0, RELU = 1, ADD_RELU = 2 };       /* what follows batch norm */
enum { CHUNK = 128, GROUP = 4, STREAMED = 1 << 24 }; /* rows; rows; bytes above which an output goes past the caches (measured) */
#define INLINE static inline __attribute__((always_inline))

#ifdef __AVX512F__
enum { WIDTH = 16 };
typedef __m512 vec;
INLINE vec fill(float v) { return _mm512_set1_ps(v); }
INLINE vec get(const float *p) { return _mm512_loadu_ps(p); }
INLINE void put(float *p, vec v) { _mm512_storeu_ps(p, v); }
INLINE void put_past_caches(float *p, vec v) { _mm512_stream_ps(p, v); }
INLINE vec positive(vec v) { return _mm512_max_ps(_mm512_setzero_ps(), v); } /* NaN stays NaN */
INLINE vec where_positive(vec v, vec g) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ), g); } /* or NaN */
typedef __m512i words; /* bf16 of a block: even channels in the lower halves, odd ones in the upper */
INLINE words get_words(const void *p) { return _mm512_loadu_si512(p); }
INLINE void put_words(void *p, words v) { _mm512_storeu_si512(p, v); }
INLINE void put_words_past_caches(void *p, words v) { _mm512_stream_si512(p, v); }
INLINE vec evens(words v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
INLINE vec odds(words v) { return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xffff0000))); }
#ifdef __AVX512BF16__
INLINE words join(vec even, vec odd) {
    static const uint16_t zip[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(zip), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}
#else
INLINE words rounded(vec v) { /* to nearest, ties to even */
    words u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    u = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_mov_epi32(u, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}
INLINE words join(vec even, vec odd) { return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(rounded(even), 16), rounded(odd)); }
#endif
#else
enum { WIDTH = 8 };
typedef __m256 vec;
INLINE vec fill(float v) { return _mm256_set1_ps(v); }
INLINE vec get(const float *p) { return _mm256_loadu_ps(p); }
INLINE void put(float *p, vec v) { _mm256_storeu_ps(p, v); }
INLINE void put_past_caches(float *p, vec v) { _mm256_stream_ps(p, v); }
INLINE vec positive(vec v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }
INLINE vec where_positive(vec v, vec g) { return _mm256_and_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ), g); }
typedef __m256i words;
INLINE words get_words(const void *p) { return _mm256_loadu_si256(p); }
INLINE void put_words(void *p, words v) { _mm256_storeu_si256(p, v); }
INLINE void put_words_past_caches(void *p, words v) { _mm256_stream_si256(p, v); }
INLINE vec evens(words v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
INLINE vec odds(words v) { return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(0xffff0000))); }
INLINE words rounded(vec v) { /* to nearest, ties to even */
    words u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    u = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    return _mm256_blendv_epi8(u, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
INLINE words join(vec even, vec odd) { return _mm256_blend_epi16(_mm256_srli_epi32(rounded(even), 16), rounded(odd), 0xaa); }
#endif

/* A block of channels is two vectors: of float the lower and the higher channels, of bf16 the even and the odd ones. Arrays by channel are kept in that
 * order. `n` of a block's channels exist; callers pass n == BLOCK as a constant for all blocks but the last. */
enum { BLOCK = 2 * WIDTH };
typedef struct { vec low, high; } pair;

INLINE long place(long c, int type) { return type == BF16 ? c / BLOCK * BLOCK + c % BLOCK / 2 + c % 2 * WIDTH : c; }

INLINE pair load(const void *base, long at, int n, int type) {
    if (type == BF16) {
        uint16_t part[BLOCK] = {0};
        const uint16_t *p = (const uint16_t *)base + at;
        if (n < BLOCK) p = memcpy(part, p, n * sizeof *p);
        words both = get_words(p);
        return (pair){evens(both), odds(both)};
    }
    float part[BLOCK] = {0};
    const float *p = (const float *)base + at;
    if (n < BLOCK) p = memcpy(part, p, n * sizeof *p);
    return (pair){get(p), get(p + WIDTH)};
}

INLINE void store(void *base, long at, pair v, int n, int type, int stream) {
    if (type == BF16) {
        uint16_t part[BLOCK], *p = (uint16_t *)base + at;
        words both = join(v.low, v.high);
        if (stream && n == BLOCK) put_words_past_caches(p, both);
        else put_words(n < BLOCK ? part : p, both);
        if (n < BLOCK) memcpy(p, part, n * sizeof *p);
        return;
    }
    float part[BLOCK], *p = (float *)base + at, *to = n < BLOCK ? part : p;
    if (stream && n == BLOCK) put_past_caches(to, v.low), put_past_caches(to + WIDTH, v.high);
    else put(to, v.low), put(to + WIDTH, v.high);
    if (n < BLOCK) memcpy(p, part, n * sizeof *p);
}

/* What `store` and `load` would make of it. */
INLINE pair as_stored(pair v, int type) {
    if (type != BF16) return v;
    words both = join(v.low, v.high);
    return (pair){evens(both), odds(both)};
}

INLINE pair constants(const float *p) { return (pair){get(p), get(p + WIDTH)}; }
INLINE void keep(float *p, pair v) { put(p, v.low), put(p + WIDTH, v.high); }
#define EACH(result, expression_low, expression_high) pair result = {expression_low, expression_high}

/* What a call works on. Arrays by channel have room for a whole number of blocks. */
typedef struct {
    const void *x, *residual, *dy, *more_dy, *y;
    void *out, *dresidual;
    const float *mean, *scale, *bias, *mean_dz, *slope; /* z = (x - mean) scale + bias; dx = scale (dz - mean_dz - (x - mean) slope) */
    float *sums;                                        /* by chunk: two sums by channel */
    long rows, channels, padded;
    int stream;
} Work;

/* Values of row `row + r`; and a piece of the next group of rows is fetched, piece after piece in the order they lie in memory: a group's own blocks jump
 * from row to row, which the processor's own fetching takes badly where rows are long. */
INLINE pair load_and_fetch(const Work *w, const void *base, long row, int r, long c, int n, int type) {
    long bytes = type == BF16 ? 2 : 4, piece = ((row + GROUP) * w->channels + GROUP * c + r * BLOCK) * bytes;
    for (long line = 0; line < BLOCK * bytes; line += 64) _mm_prefetch((const char *)base + piece + line, _MM_HINT_T0);
    return load(base, (row + r) * w->channels + c, n, type);
}

/* Sums of x - mean and of its square; here mean is the first pixel. */
INLINE void add_moments(const Work *w, long row, int rows, long c, int n, float *sums, int type) {
    pair s = constants(sums + c), q = constants(sums + w->padded + c), m = constants(w->mean + c);
    for (int r = 0; r < rows; r++) {
        pair v = load_and_fetch(w, w->x, row, r, c, n, type);
        EACH(d, v.low - m.low, v.high - m.high);
        s.low += d.low, s.high += d.high;
        q.low += d.low * d.low, q.high += d.high * d.high;
    }
    keep(sums + c, s), keep(sums + w->padded + c, q);
}

INLINE void apply(const Work *w, long row, int rows, long c, int n, int type, int form) {
    pair m = constants(w->mean + c), a = constants(w->scale + c), b = constants(w->bias + c);
    for (int r = 0; r < rows; r++) {
        long at = (row + r) * w->channels + c;
        pair v = load_and_fetch(w, w->x, row, r, c, n, type);
        EACH(z, (v.low - m.low) * a.low + b.low, (v.high - m.high) * a.high + b.high);
        if (form == ADD_RELU) {
            pair e = load_and_fetch(w, w->residual, row, r, c, n, type);
            z.low += e.low, z.high += e.high;
        }
        if (form != PLAIN) z.low = positive(z.low), z.high = positive(z.high);
        if (w->stream) store(w->out, at, z, n, type, 1);
        else store(w->out, at, z, n, type, 0);
    }
}

/* dz: dy where the ReLU let its input through. */
INLINE pair through_relu(const Work *w, long row, int r, pair d, pair g, long c, int n, int type, int form) {
    if (form == RELU) {
        pair a = constants(w->scale + c), b = constants(w->bias + c);
        EACH(z, d.low * a.low + b.low, d.high * a.high + b.high);
        return (pair){where_positive(z.low, g.low), where_positive(z.high, g.high)};
    }
    if (form == ADD_RELU) {
        pair z = load_and_fetch(w, w->y, row, r, c, n, type);
        return (pair){where_positive(z.low, g.low), where_positive(z.high, g.high)};
    }
    return g;
}

/* Sums of dz and of dz (x - mean). */
INLINE void add_slopes(const Work *w, long row, int rows, long c, int n, float *sums, int type, int form) {
    pair s = constants(sums + c), q = constants(sums + w->padded + c), m = constants(w->mean + c);
    for (int r = 0; r < rows; r++) {
        long at = (row + r) * w->channels + c;
        pair v = load_and_fetch(w, w->x, row, r, c, n, type), g = load_and_fetch(w, w->dy, row, r, c, n, type);
        EACH(d, v.low - m.low, v.high - m.high);
        if (form == ADD_RELU && w->more_dy) {
            pair more = load_and_fetch(w, w->more_dy, row, r, c, n, type);
            g = as_stored((pair){g.low + more.low, g.high + more.high}, type);
        }
        g = through_relu(w, row, r, d, g, c, n, type, form);
        if (form == ADD_RELU) {
            if (w->stream) store(w->dresidual, at, g, n, type, 1);
            else store(w->dresidual, at, g, n, type, 0);
        }
        s.low += g.low, s.high += g.high;
        q.low += g.low * d.low, q.high += g.high * d.high;
    }
    keep(sums + c, s), keep(sums + w->padded + c, q);
}

INLINE void apply_slopes(const Work *w, long row, int rows, long c, int n, int type, int form) {
    pair m = constants(w->mean + c), a = constants(w->scale + c), u = constants(w->mean_dz + c), k = constants(w->slope + c);
    for (int r = 0; r < rows; r++) {
        long at = (row + r) * w->channels + c;
        pair v = load_and_fetch(w, w->x, row, r, c, n, type), g = load_and_fetch(w, form == ADD_RELU ? w->dresidual : w->dy, row, r, c, n, type);
        EACH(d, v.low - m.low, v.high - m.high);
        if (form == RELU) g = through_relu(w, row, r, d, g, c, n, type, form);
        EACH(dx, a.low * (g.low - u.low - d.low * k.low), a.high * (g.high - u.high - d.high * k.high));
        if (w->stream) store(w->out, at, dx, n, type, 1);
        else store(w->out, at, dx, n, type, 0);
    }
}

enum { MOMENTS, APPLY, SLOPES, APPLY_SLOPES };

INLINE void block(const Work *w, long row, int rows, long c, int n, float *sums, int pass, int type, int form) {
    if (pass == MOMENTS) add_moments(w, row, rows, c, n, sums, type);
    if (pass == APPLY) apply(w, row, rows, c, n, type, form);
    if (pass == SLOPES) add_slopes(w, row, rows, c, n, sums, type, form);
    if (pass == APPLY_SLOPES) apply_slopes(w, row, rows, c, n, type, form);
}

INLINE void chunk_of(const Work *w, long number, int pass, int type, int form) {
    long end = (number + 1) * CHUNK < w->rows ? (number + 1) * CHUNK : w->rows, whole = w->channels / BLOCK * BLOCK;
    float *sums = w->sums + number * 2 * w->padded;
    if (pass == MOMENTS || pass == SLOPES) memset(sums, 0, 2 * w->padded * sizeof *sums);
    for (long row = number * CHUNK; row < end; row += GROUP) {
        int rows = end - row < GROUP ? end - row : GROUP;
        if (rows == GROUP) for (long c = 0; c < whole; c += BLOCK) block(w, row, GROUP, c, BLOCK, sums, pass, type, form);
        else for (long c = 0; c < whole; c += BLOCK) block(w, row, rows, c, BLOCK, sums, pass, type, form);
        if (whole < w->channels) block(w, row, rows, whole, w->channels - whole, sums, pass, type, form);
    }
}

/* One pass over this thread's share of the chunks, the same in every pass; from the end where it is the second. */
static void pass_over(const Work *w, int pass, int type, int form) {
    long chunks = (w->rows + CHUNK - 1) / CHUNK, me = omp_get_thread_num(), all = omp_get_num_threads();
    long from = chunks * me / all, to = chunks * (me + 1) / all;
#define CASE(t, f) if (type == t && form == f) {                                                       \
        if (pass == MOMENTS && f == PLAIN) for (long i = from; i < to; i++) chunk_of(w, i, MOMENTS, t, f); \
        if (pass == SLOPES) for (long i = from; i < to; i++) chunk_of(w, i, SLOPES, t, f);             \
        if (pass == APPLY) for (long i = to; i-- > from;) chunk_of(w, i, APPLY, t, f);                 \
        if (pass == APPLY_SLOPES) for (long i = to; i-- > from;) chunk_of(w, i, APPLY_SLOPES, t, f);   \
    }
    CASE(FLOAT, PLAIN) CASE(FLOAT, RELU) CASE(FLOAT, ADD_RELU) CASE(BF16, PLAIN) CASE(BF16, RELU) CASE(BF16, ADD_RELU)
#undef CASE
    if (w->stream) _mm_sfence();
}

/* The two sums over all chunks, of the channels of a block. */
INLINE void total(const Work *w, long c, double *first, double *second) {
    memset(first, 0, BLOCK * sizeof *first), memset(second, 0, BLOCK * sizeof *second);
    for (long i = 0; i * CHUNK < w->rows; i++) {
        const float *sums = w->sums + 2 * i * w->padded + c;
        for (int k = 0; k < BLOCK; k++) first[k] += sums[k];
        for (int k = 0; k < BLOCK; k++) second[k] += sums[w->padded + k];
    }
}

/* Memory for sums and constants; constants are zero behind the last channel. */
static float *begin(Work *w, int arrays, int type) {
    w->padded = (w->channels + BLOCK - 1) / BLOCK * BLOCK;
    long chunks = (w->rows + CHUNK - 1) / CHUNK, bytes = type == BF16 ? 2 : 4;
    float *memory = aligned_alloc(64, (2 * chunks + arrays) * w->padded * sizeof(float));
    if (memory) memset(memory, 0, arrays * w->padded * sizeof(float));
    w->sums = memory + arrays * w->padded;
    w->stream = w->rows * w->channels * bytes > STREAMED && w->channels * bytes % 64 == 0 && (uintptr_t)w->out % 64 == 0 && (uintptr_t)w->dresidual % 64 == 0;
    return memory;
}

/* Statistics (2 x channels: mean, 1 / standard deviation) are written, running ones moved by `factor` where there are any (NULL: none). */
int batch_norm_measure(int type, const void *x, float *running_mean, float *running_var, double factor, double eps, float *statistics, long rows,
                       long channels, int threads) {
    Work w = {.x = x, .rows = rows, .channels = channels};
    float *mean = begin(&w, 1, type);
    if (!mean) return 1;
    w.mean = mean;
    for (long c = 0; c < channels; c++)
        if (type == BF16) memcpy(mean + place(c, type), (uint16_t[2]){0, ((const uint16_t *)x)[c]}, 4);
        else mean[c] = ((const float *)x)[c];
#pragma omp parallel num_threads(threads)
    {
        pass_over(&w, MOMENTS, type, PLAIN);
#pragma omp barrier
#pragma omp for schedule(static)
        for (long start = 0; start < channels; start += BLOCK) {
            double sums[BLOCK], squares[BLOCK];
            total(&w, start, sums, squares);
            for (long c = start; c < channels && c < start + BLOCK; c++) {
                long i = place(c, type);
                double sum = sums[i - start], var = (squares[i - start] - sum * sum / rows) / rows, average = mean[i] + sum / rows;
                var = var < 0 ? 0 : var;
                if (running_mean) {
                    running_mean[c] = factor * average + (1 - factor) * running_mean[c];
                    running_var[c] = factor * (var * rows / (rows - 1)) + (1 - factor) * running_var[c];
                }
                statistics[c] = average;
                statistics[channels + c] = 1 / sqrt(var + eps);
            }
        }
    }
    free(mean);
    return 0;
}

static void set_constants(const Work *w, const float *statistics, const float *weight, const float *bias, float *mean, float *scale, float *shift, int type) {
    for (long c = 0; c < w->channels; c++) {
        long i = place(c, type);
        mean[i] = statistics[c], scale[i] = weight[c] * statistics[w->channels + c], shift[i] = bias[c];
    }
}

int batch_norm_apply(int type, int form, const void *x, const void *residual, const float *weight, const float *bias, const float *statistics, void *y,
                     long rows, long channels, int threads) {
    Work w = {.x = x, .residual = residual, .out = y, .rows = rows, .channels = channels};
    float *mean = begin(&w, 3, type), *scale = mean + w.padded, *shift = scale + w.padded;
    if (!mean) return 1;
    w.mean = mean, w.scale = scale, w.bias = shift;
    set_constants(&w, statistics, weight, bias, mean, scale, shift, type);
#pragma omp parallel num_threads(threads)
    pass_over(&w, APPLY, type, form);
    free(mean);
    return 0;
}

/* `more_dy` (NULL: none), `y` and `dresidual` are used with a residual only. */
int batch_norm_backward(int type, int form, const void *x, const void *dy, const void *more_dy, const void *y, const float *weight, const float *bias,
                        const float *statistics, float *dweight, float *dbias, void *dx, void *dresidual, long rows, long channels, int threads) {
    Work w = {.x = x, .dy = dy, .more_dy = more_dy, .y = y, .out = dx, .dresidual = dresidual, .rows = rows, .channels = channels};
    float *mean = begin(&w, 5, type), *scale = mean + w.padded, *shift = scale + w.padded, *mean_dz = shift + w.padded, *slope = mean_dz + w.padded;
    if (!mean) return 1;
    w.mean = mean, w.scale = scale, w.bias = shift, w.mean_dz = mean_dz, w.slope = slope;
    set_constants(&w, statistics, weight, bias, mean, scale, shift, type);
#pragma omp parallel num_threads(threads)
    {
        pass_over(&w, SLOPES, type, form);
#pragma omp barrier
#pragma omp for schedule(static)
        for (long start = 0; start < channels; start += BLOCK) {
            double sums[BLOCK], products[BLOCK];
            total(&w, start, sums, products);
            for (long c = start; c < channels && c < start + BLOCK; c++) {
                long i = place(c, type);
                double rstd = statistics[channels + c], product = products[i - start] * rstd;
                dbias[c] = sums[i - start];
                dweight[c] = product;
                mean_dz[i] = sums[i - start] / rows;
                slope[i] = product * rstd / rows;
            }
        }
        pass_over(&w, APPLY_SLOPES, type, form);
    }
    free(mean);
    return 0;
}
