/* Max-pool over channels_last tensors, with the place of each maximum kept as its number in the window.
 *
 * In: (N, H, W, C) bf16 or fp32. Out: (N, OH, OW, C) and, where asked for, places in one byte (windows of up to 16 x 16) or two. As in torch's
 * max_pool2d the first of equal values wins, row by row, and one that is not a number beats all. The backward pass gathers: every value of the
 * input's gradient is summed in fp32 and written once, whether windows overlap or not.
 */
#include <stdint.h>
#include <string.h>

#define LANES 16

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint8_t b16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t h32 __attribute__((vector_size(64), aligned(2), may_alias));
typedef uint8_t b32 __attribute__((vector_size(32), aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    int64_t height, width, channels, kernel, stride, padding, out_height, out_width;
} Shape;

/* `count` of the 16 values at `at`, the others 0. */
INLINE v16 load(const void *data, int64_t at, int64_t count, int bf16)
{
    if (count < LANES) {
        uint16_t half[LANES] = {0};
        float whole[LANES] = {0};
        if (!bf16) return memcpy(whole, (const float *)data + at, count * sizeof(float)), *(v16 *)whole;
        memcpy(half, (const uint16_t *)data + at, count * sizeof(uint16_t));
        return (v16)(__builtin_convertvector(*(h16 *)half, i16) << 16);
    }
    return bf16 ? (v16)(__builtin_convertvector(*(const h16 *)((const uint16_t *)data + at), i16) << 16) : *(const v16 *)((const float *)data + at);
}

/* To the nearest, ties to even, as torch rounds; what is not a number stays so. */
INLINE void store(void *data, int64_t at, int64_t count, v16 value, int bf16)
{
    if (!bf16) {
        if (count == LANES) *(v16 *)((float *)data + at) = value;
        else memcpy((float *)data + at, &value, count * sizeof(float));
        return;
    }
    u16 bits = (u16)value, nan = (u16)(value != value);
    u16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    h16 half = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), h16);
    if (count == LANES) *(h16 *)((uint16_t *)data + at) = half;
    else memcpy((uint16_t *)data + at, &half, count * sizeof(uint16_t));
}

INLINE void store_places(void *data, int64_t at, int64_t count, i16 places, int wide)
{
    h16 two = __builtin_convertvector(places, h16);
    b16 one = __builtin_convertvector(two, b16); /* in two steps: GCC takes one value at a time in one */
    memcpy((char *)data + at * (wide ? 2 : 1), wide ? (void *)&two : (void *)&one, count * (wide ? 2 : 1));
}

INLINE i16 load_places(const void *data, int64_t at, int64_t count, int wide)
{
    h16 two = {0};
    b16 one = {0};
    memcpy(wide ? (void *)&two : (void *)&one, (const char *)data + at * (wide ? 2 : 1), count * (wide ? 2 : 1));
    return __builtin_convertvector(wide ? two : __builtin_convertvector(one, h16), i16);
}

/* `count` is LANES as a constant for all vectors but the last of a pixel. */
INLINE void forward_vector(
    const Shape *s, const void *in, void *out, void *places, int64_t from, int64_t at, int64_t top, int64_t bottom, int64_t left, int64_t right,
    int64_t count, int bf16, int wide)
{
    v16 best = load(in, from + (top * s->width + left) * s->channels, count, bf16);
    i16 place = (i16){0} + (int32_t)(top * s->kernel + left);
    for (int64_t y = top; y < bottom; y++) {
        for (int64_t x = left; x < right; x++) {
            v16 value = load(in, from + (y * s->width + x) * s->channels, count, bf16);
            i16 take = (i16)(value > best) | (i16)(value != value);
            best = (v16)((take & (i16)value) | (~take & (i16)best));
            place = (take & (int32_t)(y * s->kernel + x)) | (~take & place);
        }
    }
    store(out, at, count, best, bf16);
    if (places) store_places(places, at, count, place, wide);
}

INLINE void forward_pixel(
    const Shape *s, const void *in, void *out, void *places, int64_t from, int64_t at, int64_t top, int64_t bottom, int64_t left, int64_t right,
    int bf16, int wide)
{
    int64_t c = 0;
    for (; c + LANES <= s->channels; c += LANES) forward_vector(s, in, out, places, from + c, at + c, top, bottom, left, right, LANES, bf16, wide);
    if (c < s->channels) forward_vector(s, in, out, places, from + c, at + c, top, bottom, left, right, s->channels - c, bf16, wide);
}

INLINE void forward_row(const Shape *s, const void *in, void *out, void *places, int64_t row, int bf16, int wide)
{
    int64_t oy = row % s->out_height, plane = row / s->out_height * s->height * s->width;
    int64_t y0 = oy * s->stride - s->padding, top = y0 < 0 ? -y0 : 0, bottom = s->height - y0 < s->kernel ? s->height - y0 : s->kernel;
    for (int64_t ox = 0; ox < s->out_width; ox++) {
        int64_t x0 = ox * s->stride - s->padding, left = x0 < 0 ? -x0 : 0, right = s->width - x0 < s->kernel ? s->width - x0 : s->kernel;
        int64_t from = (plane + y0 * s->width + x0) * s->channels, at = (row * s->out_width + ox) * s->channels;
        forward_pixel(s, in, out, places, from, at, top, bottom, left, right, bf16, wide);
    }
}

/* The sum over the windows first … last by left … right that this pixel, number y, x of the padded image, was the maximum of. */
INLINE void backward_vector(
    const Shape *s, const void *gradient, const void *places, void *out, int64_t from, int64_t at, int64_t y, int64_t x, int64_t first, int64_t last,
    int64_t left, int64_t right, int64_t count, int bf16, int wide)
{
    v16 sum = {0};
    for (int64_t oy = first; oy <= last; oy++) {
        for (int64_t ox = left; ox <= right; ox++) {
            int64_t window = from + (oy * s->out_width + ox) * s->channels;
            i16 here = load_places(places, window, count, wide) == (int32_t)((y - oy * s->stride) * s->kernel + x - ox * s->stride);
            sum += (v16)(here & (i16)load(gradient, window, count, bf16));
        }
    }
    store(out, at, count, sum, bf16);
}

INLINE void backward_row(const Shape *s, const void *gradient, const void *places, void *out, int64_t row, int bf16, int wide)
{
    int64_t y = row % s->height + s->padding, from = row / s->height * s->out_height * s->out_width * s->channels;
    int64_t first = y < s->kernel ? 0 : (y - s->kernel) / s->stride + 1, last = y / s->stride < s->out_height ? y / s->stride : s->out_height - 1;
    for (int64_t column = 0; column < s->width; column++) {
        int64_t x = column + s->padding, at = (row * s->width + column) * s->channels, c = 0;
        int64_t left = x < s->kernel ? 0 : (x - s->kernel) / s->stride + 1, right = x / s->stride < s->out_width ? x / s->stride : s->out_width - 1;
        for (; c + LANES <= s->channels; c += LANES)
            backward_vector(s, gradient, places, out, from + c, at + c, y, x, first, last, left, right, LANES, bf16, wide);
        if (c < s->channels)
            backward_vector(s, gradient, places, out, from + c, at + c, y, x, first, last, left, right, s->channels - c, bf16, wide);
    }
}

/* 32 bf16 gradients of windows whose maximum stands at `place`, the others 0. */
INLINE h32 taken(const uint16_t *gradient, const uint8_t *places, int64_t window, int place)
{
    return (h32)(__builtin_convertvector(*(const b32 *)(places + window), h32) == (uint16_t)place) & *(const h32 *)(gradient + window);
}

INLINE u16 rounded(v16 value)
{
    u16 bits = (u16)value, nan = (u16)(value != value);
    return ((bits + 0x7fff + ((bits >> 16) & 1)) & ~nan) | (nan & 0x7fc00000);
}

/* The sum of 32 bf16 values each, in fp32: those at even places and those at odd ones, which stand in the two halves of 32 bits. */
INLINE h32 summed(const h32 *parts, int count)
{
    v16 even = {0}, odd = {0};
    for (int n = 0; n < count; n++) even += (v16)((u16)parts[n] << 16), odd += (v16)((u16)parts[n] & 0xffff0000);
    return (h32)((rounded(even) >> 16) | (rounded(odd) & 0xffff0000));
}

/* A row of bf16 gradients of ResNet's windows, 3 x 3 by 2 with a padding of 1, of a multiple of 32 channels: an even row lies in one row of windows, an odd
 * one in two, and so do columns. `two`: there is a second row. */
INLINE void backward_row_of_three(
    const Shape *s, const uint16_t *gradient, const uint8_t *places, uint16_t *out, int64_t from, int64_t to, int first_place, int two)
{
    int64_t line = s->out_width * s->channels;
    for (int64_t ox = 0; ox < s->out_width; ox++) {
        int right = 2 * ox + 1 < s->width, next = ox + 1 < s->out_width;
        for (int64_t c = 0; c < s->channels; c += 32) {
            int64_t window = from + ox * s->channels + c;
            uint16_t *at = out + to + 2 * ox * s->channels + c;
            h32 parts[4] = {taken(gradient, places, window, first_place + 1)};
            if (two) parts[1] = taken(gradient, places, window + line, 1);
            *(h32 *)at = two ? summed(parts, 2) : parts[0];
            if (!right) continue;
            int count = 0;
            parts[count++] = taken(gradient, places, window, first_place + 2);
            if (next) parts[count++] = taken(gradient, places, window + s->channels, first_place);
            if (two) parts[count++] = taken(gradient, places, window + line, 2);
            if (two && next) parts[count++] = taken(gradient, places, window + line + s->channels, 0);
            *(h32 *)(at + s->channels) = summed(parts, count);
        }
    }
}

/* A row by the code made for its types, and for ResNet's windows of 3 x 3 by 2 made with these as constants. */
#define BY_TYPE(row_of, s, first, second, third)                       \
    do {                                                               \
        if (bf16 && wide) row_of(s, first, second, third, row, 1, 1);  \
        else if (bf16) row_of(s, first, second, third, row, 1, 0);     \
        else if (wide) row_of(s, first, second, third, row, 0, 1);     \
        else row_of(s, first, second, third, row, 0, 0);               \
    } while (0)

/* `places` may be null; `wide`: two bytes each. */
void max_pool_forward(
    const void *in, void *out, void *places, int64_t images, int64_t height, int64_t width, int64_t channels, int64_t kernel, int64_t stride,
    int64_t padding, int64_t out_height, int64_t out_width, int64_t bf16, int64_t wide, int64_t threads)
{
    Shape any = {height, width, channels, kernel, stride, padding, out_height, out_width};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < images * out_height; row++) {
        Shape three = {height, width, channels, 3, 2, padding, out_height, out_width};
        if (kernel == 3 && stride == 2) BY_TYPE(forward_row, &three, in, out, places);
        else BY_TYPE(forward_row, &any, in, out, places);
    }
}

void max_pool_backward(
    const void *gradient, const void *places, void *out, int64_t images, int64_t height, int64_t width, int64_t channels, int64_t kernel,
    int64_t stride, int64_t padding, int64_t out_height, int64_t out_width, int64_t bf16, int64_t wide, int64_t threads)
{
    Shape any = {height, width, channels, kernel, stride, padding, out_height, out_width};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < images * height; row++) {
        Shape three = {height, width, channels, 3, 2, padding, out_height, out_width};
        if (kernel == 3 && stride == 2 && padding == 1 && bf16 && !wide && channels % 32 == 0) {
            int64_t y = row % height, from = (row / height * out_height + y / 2) * out_width * channels, to = row * width * channels;
            if (y % 2 == 0) backward_row_of_three(&three, gradient, places, out, from, to, 3, 0);
            else if (y / 2 + 1 < out_height) backward_row_of_three(&three, gradient, places, out, from, to, 6, 1);
            else backward_row_of_three(&three, gradient, places, out, from, to, 6, 0);
        } else if (kernel == 3 && stride == 2) BY_TYPE(backward_row, &three, gradient, places, out);
        else BY_TYPE(backward_row, &any, gradient, places, out);
    }
}

/* The maximum of two values as torch's max-pool takes it, `second` coming later. */
INLINE float larger(float first, float second) { return second > first || second != second ? second : first; }

/* 2 x 2 windows, no places: an image of few channels, whose vectors run along the row instead of the channels. `two_rows`: width * channels floats a thread. */
INLINE void halve_row(const void *in, void *out, float *rows, int64_t from, int64_t to, int64_t width, int64_t channels, int bf16)
{
    int64_t line = width * channels, c = 0;
    for (; c < line; c += LANES) {
        int64_t count = line - c < LANES ? line - c : LANES;
        v16 a = load(in, from + c, count, bf16), b = load(in, from + line + c, count, bf16);
        i16 take = (i16)(b > a) | (i16)(b != b);
        v16 best = (v16)((take & (i16)b) | (~take & (i16)a));
        memcpy(rows + c, &best, count * sizeof(float));
    }
    for (int64_t x = 0; x < width / 2; x++) {
        for (c = 0; c < channels; c++) {
            float best = larger(rows[2 * x * channels + c], rows[(2 * x + 1) * channels + c]);
            uint32_t bits;
            memcpy(&bits, &best, 4);
            if (bf16) ((uint16_t *)out)[to + x * channels + c] = (uint16_t)(bits >> 16);
            else ((float *)out)[to + x * channels + c] = best;
        }
    }
}

void halve(const void *in, void *out, float *two_rows, int64_t images, int64_t height, int64_t width, int64_t channels, int64_t bf16, int64_t threads)
{
    int64_t out_height = height / 2, line = width * channels;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t t = 0; t < threads; t++) {
        for (int64_t row = images * out_height * t / threads; row < images * out_height * (t + 1) / threads; row++) {
            int64_t from = (row / out_height * height + row % out_height * 2) * line, to = row * (width / 2) * channels;
            if (bf16) halve_row(in, out, two_rows + t * line, from, to, width, channels, 1);
            else halve_row(in, out, two_rows + t * line, from, to, width, channels, 0);
        }
    }
}
