/* The gradient of a convolution's weight, bf16 in, float out.
 *
 * dw[o, ky, kx, i] is a sum over pixels of dy[pixel, o] x[pixel moved by the tap, i]: a matrix product for each tap. The processor's bf16 instruction adds
 * up products of pairs, so pixels are paired: one of the upper half of the rows of an image with the one that stands as far down in the lower half. Both
 * keep their neighbours that way, and one copy of x serves all taps. The copies are made of some rows at a time (a chunk), in the order the products read them:
 *     x  by blocks of 32 channels, [block][row][column][32 channels][upper, lower], with a border of zeros as wide as the padding
 *     dy by blocks of 8 channels,  [block][row][column][8 channels][upper, lower]
 *
 * Sums run over pixels in one order and are float throughout: the same bits with any number of threads. Tensors are channels_last.
 * A value that is not finite makes sums it has no part in NaN as well, where it meets a zero of the border. Needs AVX512_BF16; else `supported` is 0.
 */
#include <stdint.h>

enum { LANES = 16, WIDE = 2 * LANES, TALL = 8 };
enum { CHUNK = 1 << 23 }; /* bytes of both copies: they stay in the caches (measured) */
enum { AHEAD_X = 8, AHEAD_DY = 64 }; /* columns that are fetched ahead of the products (measured) */

#ifdef __AVX512BF16__
#include <immintrin.h>
int supported(void) { return 1; }

typedef struct {
    int64_t images, height, width, in_channels, out_height, out_width, out_channels, kernel_height, kernel_width, stride, padding;
} Convolution;

/* How the copies are laid out. Of 1x1 kernels with a stride, only the pixels that meet dy are copied. */
typedef struct {
    int64_t keep, step, columns;        /* one of `keep` rows and columns of x is copied; `step` of those are on to the next of dy; copied columns */
    int64_t blocks_x, blocks_dy, half;  /* half: output rows of the upper half */
    int64_t images, rows, rows_x;       /* of a chunk: images; of each, output rows and the rows of x they need */
    int64_t row_x, row_dy;              /* pairs of one row of one block */
    int64_t block_x, block_dy;          /* pairs from one block to the next */
} Plan;

/* At least `pairs`, and so many beyond a page's multiple: a pixel's values go to all blocks at once, which must not meet in one set of the cache. */
static int64_t apart(int64_t pairs, int64_t beyond)
{
    int64_t page = 4096 / sizeof(uint32_t);
    return (pairs + page - 1) / page * page + beyond;
}

static Plan plan_of(const Convolution *c)
{
    Plan p = {0};
    int one = c->kernel_width == 1 && c->kernel_height == 1;
    p.keep = one ? c->stride : 1;
    p.step = one ? 1 : c->stride;
    p.columns = p.step * (c->out_width - 1) + c->kernel_width;
    p.blocks_x = (c->in_channels + WIDE - 1) / WIDE;
    p.blocks_dy = (c->out_channels + TALL - 1) / TALL;
    p.half = (c->out_height + 1) / 2;
    p.row_x = p.columns * WIDE, p.row_dy = c->out_width * TALL;
    int64_t row_x = p.blocks_x * p.row_x * sizeof(uint32_t), row_dy = p.blocks_dy * p.row_dy * sizeof(uint32_t);
    int64_t further = c->kernel_height - p.step > 0 ? c->kernel_height - p.step : 0; /* rows of x beyond `step` for each of dy */
    p.rows = (CHUNK - further * row_x) / (p.step * row_x + row_dy);
    p.rows = p.rows < 1 ? 1 : p.rows > p.half ? p.half : p.rows;
    int64_t chunks = (p.half + p.rows - 1) / p.rows;
    p.rows = (p.half + chunks - 1) / chunks; /* all about equal */
    p.rows_x = p.step * (p.rows - 1) + c->kernel_height;
    p.images = CHUNK / (p.rows_x * row_x + p.rows * row_dy);
    p.images = chunks > 1 || p.images < 1 ? 1 : p.images > c->images ? c->images : p.images;
    p.block_x = apart(p.images * p.rows_x * p.row_x, WIDE), p.block_dy = apart(p.images * p.rows * p.row_dy, LANES);
    return p;
}

static inline void zip(__m512i upper, __m512i lower, __m512i *first, __m512i *second)
{
    static const uint16_t order[2][32] = {
        {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    *first = _mm512_permutex2var_epi16(upper, _mm512_loadu_si512(order[0]), lower);
    *second = _mm512_permutex2var_epi16(upper, _mm512_loadu_si512(order[1]), lower);
}

static inline __mmask32 first_of(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (1u << n) - 1; }

/* One row of x into its blocks. `upper` and `lower` are rows of the image, or outside it. */
static void copy_x(const Convolution *c, const Plan *p, const uint16_t *image, int64_t upper, int64_t lower, uint32_t *copy)
{
    int64_t length = c->width * c->in_channels;
    int above = upper >= 0 && upper < c->height, below = lower >= 0 && lower < c->height;
    for (int64_t column = 0; column < p->columns; column++) {
        int64_t at = column * p->keep - c->padding;
        int inside = at >= 0 && at < c->width;
        const uint16_t *a = image + upper * length + at * c->in_channels, *b = image + lower * length + at * c->in_channels;
        for (int64_t block = 0; block < p->blocks_x; block++) {
            __mmask32 mask = first_of(c->in_channels - block * WIDE);
            __m512i first, second;
            zip(inside && above ? _mm512_maskz_loadu_epi16(mask, a + block * WIDE) : _mm512_setzero_si512(),
                inside && below ? _mm512_maskz_loadu_epi16(mask, b + block * WIDE) : _mm512_setzero_si512(), &first, &second);
            uint32_t *to = copy + block * p->block_x + column * WIDE;
            _mm512_store_si512(to, first), _mm512_store_si512(to + LANES, second);
        }
    }
}

/* One row of dy into its blocks. A lower row below the image is zeros. */
static void copy_dy(const Convolution *c, const Plan *p, const uint16_t *image, int64_t upper, int64_t lower, uint32_t *copy)
{
    int64_t length = c->out_width * c->out_channels;
    for (int64_t column = 0; column < c->out_width; column++) {
        const uint16_t *a = image + upper * length + column * c->out_channels, *b = image + lower * length + column * c->out_channels;
        for (int64_t channel = 0; channel < c->out_channels; channel += WIDE) {
            __mmask32 mask = first_of(c->out_channels - channel);
            __m512i part[2];
            zip(_mm512_maskz_loadu_epi16(mask, a + channel), lower < c->out_height ? _mm512_maskz_loadu_epi16(mask, b + channel) : _mm512_setzero_si512(), &part[0], &part[1]);
            for (int k = 0; k < 4; k++) {
                int64_t block = channel / TALL + k;
                if (block >= p->blocks_dy) break;
                __m512i both = part[k / 2];
                __m256i eight = k % 2 ? _mm512_extracti64x4_epi64(both, 1) : _mm512_castsi512_si256(both);
                _mm256_store_si256((__m256i *)(copy + block * p->block_dy + column * TALL), eight);
            }
        }
    }
}

typedef struct {
    const uint32_t *x, *dy;                 /* of this block, at the tap */
    int64_t images, rows, columns;          /* of dy */
    int64_t image_x, row_x, step, image_dy; /* distances in pairs */
} Panels;

/* Eight channels of dy by `vectors` times 16 values of x, added to dw but for the first chunk. */
static inline __attribute__((always_inline)) void product(const Panels *p, float *dw, int64_t distance, int64_t tall, int64_t wide, int first, int vectors)
{
    __m512 sums[TALL][2];
    __mmask16 masks[2] = {(__mmask16)first_of(wide < LANES ? wide : LANES), (__mmask16)first_of(wide - LANES < LANES ? wide - LANES : LANES)};
    for (int j = 0; j < TALL; j++)
        for (int v = 0; v < vectors; v++) {
            sums[j][v] = _mm512_setzero_ps();
            if (!first && j < tall) _mm_prefetch(dw + j * distance + v * LANES, _MM_HINT_T0);
        }
    for (int64_t image = 0; image < p->images; image++)
        for (int64_t row = 0; row < p->rows; row++) {
            const uint32_t *x = p->x + image * p->image_x + row * p->row_x, *dy = p->dy + image * p->image_dy + row * p->columns * TALL;
#pragma GCC unroll 2
            for (int64_t column = 0; column < p->columns; column++, x += p->step, dy += TALL) {
                __m512bh values[2];
                for (int v = 0; v < vectors; v++) _mm_prefetch(x + AHEAD_X * WIDE + v * LANES, _MM_HINT_T0);
                _mm_prefetch(dy + AHEAD_DY * TALL, _MM_HINT_T0);
                for (int v = 0; v < vectors; v++) values[v] = (__m512bh)_mm512_load_si512(x + v * LANES);
#pragma GCC unroll 8
                for (int j = 0; j < TALL; j++) {
                    __m512bh one = (__m512bh)_mm512_set1_epi32(dy[j]);
                    for (int v = 0; v < vectors; v++) sums[j][v] = _mm512_dpbf16_ps(sums[j][v], one, values[v]);
                }
            }
        }
    for (int j = 0; j < TALL && j < tall; j++)
        for (int v = 0; v < vectors; v++) {
            float *to = dw + j * distance + v * LANES;
            _mm512_mask_storeu_ps(to, masks[v], first ? sums[j][v] : _mm512_add_ps(sums[j][v], _mm512_maskz_loadu_ps(masks[v], to)));
        }
}

static Convolution convolution(const int64_t *shape)
{
    return (Convolution){shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6], shape[7], shape[8], shape[9], shape[10]};
}

/* Bytes of the copies, which the caller provides. */
int64_t scratch_bytes(const int64_t *shape)
{
    Convolution c = convolution(shape);
    Plan p = plan_of(&c);
    return (p.blocks_x * p.block_x + p.blocks_dy * p.block_dy) * sizeof(uint32_t);
}

/* dw is (out_channels, kernel_height, kernel_width, in_channels); scratch begins at a multiple of 64 bytes. There is at least one image. */
void weight_gradient(const int64_t *shape, const uint16_t *x, const uint16_t *dy, float *dw, uint32_t *scratch, int64_t threads)
{
    Convolution c = convolution(shape);
    Plan p = plan_of(&c);
    uint32_t *copy_of_dy = scratch + p.blocks_x * p.block_x;
    int64_t filter = c.kernel_height * c.kernel_width * c.in_channels;
#pragma omp parallel num_threads(threads)
    for (int64_t image = 0; image < c.images; image += p.images)
        for (int64_t row = 0; row < p.half; row += p.rows) {
            int64_t here = c.images - image < p.images ? c.images - image : p.images, rows = p.half - row < p.rows ? p.half - row : p.rows;
            int64_t rows_x = p.step * (rows - 1) + c.kernel_height;
#pragma omp for schedule(static) nowait
            for (int64_t n = 0; n < here * rows_x; n++) {
                int64_t r = n % rows_x, k = n / rows_x, upper = (p.step * row + r) * p.keep - c.padding;
                copy_x(&c, &p, x + (image + k) * c.height * c.width * c.in_channels, upper, upper + c.stride * p.half, scratch + (k * p.rows_x + r) * p.row_x);
            }
#pragma omp for schedule(static)
            for (int64_t n = 0; n < here * rows; n++) {
                int64_t r = n % rows, k = n / rows;
                copy_dy(&c, &p, dy + (image + k) * c.out_height * c.out_width * c.out_channels, row + r, row + r + p.half, copy_of_dy + (k * p.rows + r) * p.row_dy);
            }
#pragma omp for schedule(static)
            for (int64_t n = 0; n < p.blocks_x * p.blocks_dy * c.kernel_height; n++) {
                int64_t ky = n % c.kernel_height, o = n / c.kernel_height % p.blocks_dy, i = n / c.kernel_height / p.blocks_dy;
                int64_t tall = c.out_channels - o * TALL, wide = c.in_channels - i * WIDE;
                for (int64_t kx = 0; kx < c.kernel_width; kx++) {
                    Panels panels = {scratch + i * p.block_x + ky * p.row_x + kx * WIDE, copy_of_dy + o * p.block_dy, here, rows, c.out_width,
                                     p.rows_x * p.row_x, p.step * p.row_x, p.step * WIDE, p.rows * p.row_dy};
                    float *to = dw + o * TALL * filter + (ky * c.kernel_width + kx) * c.in_channels + i * WIDE;
                    if (wide > LANES) product(&panels, to, filter, tall, wide, image == 0 && row == 0, 2);
                    else product(&panels, to, filter, tall, wide, image == 0 && row == 0, 1);
                }
            }
        }
}
#else
int supported(void) { return 0; }
#endif
