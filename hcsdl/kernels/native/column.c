/* The gradients of one M-CNN column: three 5x5 convolutions with ReLU between them, a max-pool by `window`, and a ReLU.
 *
 * In: the column's input and its two inner activations (channels_last, bf16 or fp32), per pooled value its position in the window and its gradient.
 * Out: the gradients of the three weights and biases, in fp32, as sums over the mini-batch. The input's gradient is not computed.
 * A pooled value is one pixel's, so of the last convolution's output only one value in window * window has a gradient; the two layers before it
 * have one within 2 and 4 pixels of those. Only these are visited: the same sums as the dense ones, without their zeros, in fp32 throughout.
 * Windows are shared out over threads in fixed blocks and the threads' sums added in their order: equal for equal numbers of threads.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SIDE 5                     /* of the convolutions' kernels */
#define REACH 2                    /* pixels a kernel sees to each side */
#define LANES 16                   /* channels of a vector; the column's channels must be a multiple of it */
#define ROW_TAPS 15                /* 5 taps of 3 image channels: registers that sum a row of the first weight's gradient */

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2), may_alias));

static inline float widen(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline __attribute__((always_inline)) v16 load(const void *data, int64_t at, int bf16)
{
    if (!bf16) return *(const v16 *)((const float *)data + at);
    return (v16)(__builtin_convertvector(*(const h16 *)((const uint16_t *)data + at), i16) << 16);
}

static inline __attribute__((always_inline)) v16 where_positive(v16 gradient, v16 activation)
{
    /* Not "activation > 0": as in torch, a gradient passes where the activation is not a number. */
    return (v16)((i16)gradient & ~(i16)(activation <= 0.0f));
}

typedef struct {
    const void *image, *first, *second; /* (N, H, W, in_channels), (N, H, W, C) and again */
    const void *index;                  /* (N, OH, OW, C) uint16: row * window + column */
    const float *gradient;              /* (N, OH, OW, C) */
    const float *weight2, *weight3;     /* (25, C out, C in) */
    int64_t height, width, in_channels, channels, window, out_height, out_width;
} Column;

/* Pixels of a square around a window: `side` a row, the first one at (top, left) of the image, which it may overhang. */
typedef struct { int64_t side, top, left; } Square;
typedef struct { int32_t y, x; } Place; /* in a square */

typedef struct {
    float *dw1, *dw2, *dw3, *db1, *db2, *db3; /* this thread's sums */
    float *image;                             /* the square of the image, zero outside it */
    float *sum2, *sum1;                       /* gradients with respect to the inner activations, by pixel of their squares */
    float *packed;                            /* those that are not zero, one after the other */
    Place *list2, *list1;                     /* their places in the squares */
    uint8_t *mark;
} Scratch;

/* The place's pixel, dy rows and dx columns on; -1 outside the image. */
static inline int64_t pixel(const Column *c, const Square *s, Place place, int64_t dy, int64_t dx)
{
    int64_t y = s->top + place.y + dy, x = s->left + place.x + dx;
    return y < 0 || y >= c->height || x < 0 || x >= c->width ? -1 : y * c->width + x;
}

/* Mark the 5 x 5 places that start at (y, x). */
static inline void mark(uint8_t *marks, int64_t side, int64_t y, int64_t x)
{
    for (int64_t row = y; row < y + SIDE; row++) memset(marks + row * side + x, 1, SIDE);
}

/* List the marked places that are inside the image, zero their sums, and take the marks away. */
static int64_t listed(const Column *c, const Square *s, uint8_t *marks, Place *list, float *sums)
{
    int64_t count = 0;
    for (int64_t y = 0; y < s->side; y++) {
        if (s->top + y < 0 || s->top + y >= c->height || !memchr(marks + y * s->side, 1, s->side)) continue;
        for (int64_t x = 0; x < s->side; x++) {
            if (!marks[y * s->side + x] || s->left + x < 0 || s->left + x >= c->width) continue;
            list[count++] = (Place){(int32_t)y, (int32_t)x};
            memset(sums + (y * s->side + x) * c->channels, 0, c->channels * sizeof(float));
        }
    }
    memset(marks, 0, s->side * s->side);
    return count;
}

/* ReLU's mask and the bias' gradient: pack the sums of the listed places that have a gradient, and shorten the list to them. */
static inline __attribute__((always_inline)) int64_t pack(
    const Column *c, const Square *s, const void *activation, Place *list, int64_t count, const float *sums, float *packed, float *db, int bf16)
{
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t at = pixel(c, s, list[i], 0, 0) * c->channels;
        i16 any = {0};
        for (int64_t k = 0; k < c->channels; k += LANES) {
            v16 g = where_positive(*(const v16 *)(sums + (list[i].y * s->side + list[i].x) * c->channels + k), load(activation, at + k, bf16));
            *(v16 *)(packed + kept * c->channels + k) = g;
            *(v16 *)(db + k) += g;
            any |= (i16)(g != 0.0f);
        }
        int32_t some = 0;
        for (int j = 0; j < LANES; j++) some |= any[j];
        list[kept] = list[i];
        kept += some != 0;
    }
    return kept;
}

/* The third convolution, from the pooled gradients of one window: one value a channel. */
static inline __attribute__((always_inline)) int64_t third(const Column *c, Scratch *w, const Square *s, const void *second, const uint16_t *index, const float *gradient, int bf16)
{
    int64_t channels = c->channels;
    int any = 0;
    for (int64_t o = 0; o < channels; o++)
        if (gradient[o] != 0.0f) mark(w->mark, s->side, index[o] / c->window, index[o] % c->window), any = 1;
    if (!any) return 0;
    int64_t count = listed(c, s, w->mark, w->list2, w->sum2);
    for (int64_t o = 0; o < channels; o++) {
        float g = gradient[o];
        if (g == 0.0f) continue;
        w->db3[o] += g;
        Place corner = {index[o] / c->window, index[o] % c->window};
        for (int64_t k = 0; k < SIDE * SIDE; k++) {
            int64_t at = pixel(c, s, corner, k / SIDE, k % SIDE);
            if (at < 0) continue;
            int64_t place = (corner.y + k / SIDE) * s->side + corner.x + k % SIDE, weight = (k * channels + o) * channels;
            for (int64_t i = 0; i < channels; i += LANES) {
                *(v16 *)(w->sum2 + place * channels + i) += *(const v16 *)(c->weight3 + weight + i) * g;
                *(v16 *)(w->dw3 + weight + i) += load(second, at * channels + i, bf16) * g;
            }
        }
    }
    return count;
}

/* The second convolution: the weight's gradient, and the gradients handed on, one tap and one 16 x 16 block of channels at a time. */
static inline __attribute__((always_inline)) void second_tap(
    const Column *c, Scratch *w, const Square *s2, const Square *s1, const void *first, int64_t count, int64_t k, int64_t o, int64_t i, int bf16)
{
    int64_t channels = c->channels, dy = k / SIDE - REACH, dx = k % SIDE - REACH;
    const float *weight = c->weight2 + (k * channels + o) * channels + i;
    float *dw = w->dw2 + (k * channels + o) * channels + i;
    v16 sums[LANES];
    for (int j = 0; j < LANES; j++) sums[j] = *(const v16 *)(dw + j * channels);
    for (int64_t n = 0; n < count; n++) {
        int64_t at = pixel(c, s2, w->list2[n], dy, dx);
        if (at < 0) continue;
        const float *g = w->packed + n * channels + o;
        v16 a = load(first, at * channels + i, bf16);
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) sums[j] += a * g[j];
    }
    for (int j = 0; j < LANES; j++) *(v16 *)(dw + j * channels) = sums[j];

    v16 rows[LANES];
    for (int j = 0; j < LANES; j++) rows[j] = *(const v16 *)(weight + j * channels);
    for (int64_t n = 0; n < count; n++) {
        if (pixel(c, s2, w->list2[n], dy, dx) < 0) continue;
        const float *g = w->packed + n * channels + o;
        int64_t y = w->list2[n].y + k / SIDE, x = w->list2[n].x + k % SIDE;
        v16 even = rows[0] * g[0], odd = rows[1] * g[1];
#pragma GCC unroll 8
        for (int j = 2; j < LANES; j += 2) even += rows[j] * g[j], odd += rows[j + 1] * g[j + 1];
        *(v16 *)(w->sum1 + (y * s1->side + x) * channels + i) += even + odd;
    }
}

/* The first convolution's weight gradient, one row of taps and 16 output channels at a time: (5, 5 * in_channels, C). */
static void first_row(const Column *c, Scratch *w, const Square *s0, int64_t count, int64_t ky, int64_t o)
{
    int64_t taps = SIDE * c->in_channels, channels = c->channels;
    for (int64_t t = 0; t < taps; t += ROW_TAPS) {
        float *dw = w->dw1 + (ky * taps + t) * channels + o;
        int64_t here = taps - t < ROW_TAPS ? taps - t : ROW_TAPS;
        v16 sums[ROW_TAPS];
        for (int j = 0; j < ROW_TAPS; j++) sums[j] = j < here ? *(const v16 *)(dw + j * channels) : (v16){0};
        for (int64_t n = 0; n < count; n++) {
            int64_t y = w->list1[n].y + ky, x = w->list1[n].x;
            const float *values = w->image + (y * s0->side + x) * c->in_channels + t; /* the image's square ends with ROW_TAPS spare values */
            v16 g = *(const v16 *)(w->packed + n * channels + o);
#pragma GCC unroll 15
            for (int j = 0; j < ROW_TAPS; j++) sums[j] += g * values[j];
        }
        for (int j = 0; j < here; j++) *(v16 *)(dw + j * channels) = sums[j];
    }
}

static inline __attribute__((always_inline)) void copy_image(const Column *c, Scratch *w, const Square *s0, const void *image, int bf16)
{
    int64_t n = c->in_channels;
    memset(w->image, 0, s0->side * s0->side * n * sizeof(float));
    int64_t left = s0->left < 0 ? 0 : s0->left, right = s0->left + s0->side < c->width ? s0->left + s0->side : c->width;
    for (int64_t y = 0; y < s0->side; y++) {
        if (s0->top + y < 0 || s0->top + y >= c->height) continue;
        float *to = w->image + (y * s0->side + left - s0->left) * n;
        int64_t from = ((s0->top + y) * c->width + left) * n;
        for (int64_t i = 0; i < (right - left) * n; i++) to[i] = bf16 ? widen(((const uint16_t *)image)[from + i]) : ((const float *)image)[from + i];
    }
}

static inline __attribute__((always_inline)) void window(const Column *c, Scratch *w, int64_t number, int bf16)
{
    int64_t per_image = c->out_height * c->out_width, n = number / per_image, channels = c->channels, bytes = bf16 ? 2 : 4;
    int64_t top = number % per_image / c->out_width * c->window, left = number % c->out_width * c->window;
    int64_t pixels = n * c->height * c->width;
    const char *first = (const char *)c->first + pixels * channels * bytes, *second = (const char *)c->second + pixels * channels * bytes;
    Square s2 = {c->window + 2 * REACH, top - REACH, left - REACH}, s1 = {c->window + 4 * REACH, top - 2 * REACH, left - 2 * REACH};
    Square s0 = {c->window + 6 * REACH, top - 3 * REACH, left - 3 * REACH};

    int64_t count = third(c, w, &s2, second, (const uint16_t *)c->index + number * channels, c->gradient + number * channels, bf16);
    count = pack(c, &s2, second, w->list2, count, w->sum2, w->packed, w->db2, bf16);
    if (!count) return;
    for (int64_t i = 0; i < count; i++) mark(w->mark, s1.side, w->list2[i].y, w->list2[i].x);
    int64_t count1 = listed(c, &s1, w->mark, w->list1, w->sum1);
    for (int64_t k = 0; k < SIDE * SIDE; k++)
        for (int64_t o = 0; o < channels; o += LANES)
            for (int64_t i = 0; i < channels; i += LANES) second_tap(c, w, &s2, &s1, first, count, k, o, i, bf16);
    count1 = pack(c, &s1, first, w->list1, count1, w->sum1, w->packed, w->db1, bf16);
    if (!count1) return;
    copy_image(c, w, &s0, (const char *)c->image + pixels * c->in_channels * bytes, bf16);
    for (int64_t ky = 0; ky < SIDE; ky++)
        for (int64_t o = 0; o < channels; o += LANES) first_row(c, w, &s0, count1, ky, o);
}

static int prepare(const Column *c, Scratch *w, float *sums)
{
    int64_t channels = c->channels, side0 = c->window + 6 * REACH, side1 = c->window + 4 * REACH, side2 = c->window + 2 * REACH;
    int64_t taps = SIDE * SIDE;
    w->dw1 = sums;
    w->dw2 = w->dw1 + taps * c->in_channels * channels;
    w->dw3 = w->dw2 + taps * channels * channels;
    w->db1 = w->dw3 + taps * channels * channels;
    w->db2 = w->db1 + channels;
    w->db3 = w->db2 + channels;
    w->image = malloc((side0 * side0 * c->in_channels + ROW_TAPS) * sizeof(float));
    w->sum2 = malloc(side2 * side2 * channels * sizeof(float));
    w->sum1 = malloc(side1 * side1 * channels * sizeof(float));
    w->packed = malloc((side1 * side1 + 1) * channels * sizeof(float));
    w->list2 = malloc(side2 * side2 * sizeof(Place));
    w->list1 = malloc(side1 * side1 * sizeof(Place));
    w->mark = calloc(side1 * side1, 1);
    if (!w->image || !w->sum2 || !w->sum1 || !w->packed || !w->list2 || !w->list1 || !w->mark) return 1;
    memset(w->image + side0 * side0 * c->in_channels, 0, ROW_TAPS * sizeof(float));
    return 0;
}

static void finish(Scratch *w)
{
    free(w->image), free(w->sum2), free(w->sum1), free(w->packed), free(w->list2), free(w->list1), free(w->mark);
}

/* sums: (threads, 25 * in_channels * C + 2 * 25 * C * C + 3 * C) zeros; the first of them is the result. Return 0, or 1 without memory. */
int column_backward(
    const void *image, const void *first, const void *second, const void *index, const float *gradient, const float *weight2, const float *weight3,
    float *sums, int64_t images, int64_t height, int64_t width, int64_t in_channels, int64_t channels, int64_t window_side, int64_t bf16, int64_t threads)
{
    Column c = {image, first, second, index, gradient, weight2, weight3, height, width, in_channels, channels, window_side, height / window_side,
                width / window_side};
    int64_t windows = images * c.out_height * c.out_width, size = SIDE * SIDE * channels * (in_channels + 2 * channels) + 3 * channels;
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(| : failed)
    for (int64_t t = 0; t < threads; t++) {
        Scratch w;
        if (prepare(&c, &w, sums + t * size)) {
            failed = 1;
        } else {
            int64_t from = windows * t / threads, to = windows * (t + 1) / threads;
            for (int64_t n = from; n < to; n++) bf16 ? window(&c, &w, n, 1) : window(&c, &w, n, 0);
        }
        finish(&w);
    }
    for (int64_t t = 1; t < threads; t++)
        for (int64_t i = 0; i < size; i++) sums[i] += sums[t * size + i];
    return failed;
}
