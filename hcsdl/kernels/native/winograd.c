/* 3x3 convolutions with stride 1 and padding 1 by Winograd's F(2x2, 3x3), bf16 in and out, sums float: 16 products where the plain sum takes 36.
 *
 * An image is cut into tiles of 2 x 2 output pixels, each of which needs 4 x 4 of the input (Lavin and Gray 2016, arXiv:1509.09308):
 *     y = A' [sum over channels of (G w G') * (B' x B)] A
 * The 16 values of a transformed tile are 16 matrix products, tiles by channels by channels. Adjoint of that is the weight's gradient:
 *     dw = G' [sum over tiles of (A dy A') * (B' x B)] G
 * and the input's is the same convolution of dy by the weight turned round. Transforms are float; what they give is rounded to bf16 once, weights from float.
 *
 * Tensors are channels_last, channels are a multiple of 16. Every sum runs in one order: the same bits with any number of threads and any mini-batch.
 * A value that is not finite spoils the outputs of its tiles, which are one pixel more than the plain sum's. Needs AVX512_BF16; else `supported` is 0.
 */
#include <stdint.h>

enum { LANES = 16, FOUR = 4, PLACES = 16 };  /* of a transformed tile */
enum { TALL = 6, WIDE = 64, MOST_TILES = 96, NEAR = 1 << 19 }; /* a product's tiles and channels; bytes that a thread keeps in its second cache */
enum { LINE = 64 };
enum { OUT = 8, IN = 32, CHUNK = 1 << 22 };  /* the gradient's product; bytes of both copies of a chunk of tiles */

#ifdef __AVX512BF16__
#include <immintrin.h>
int supported(void) { return 1; }

typedef struct {
    int64_t images, height, width, in_channels, out_channels, across, down, tiles;
} Convolution;

static Convolution convolution(const int64_t *shape)
{
    Convolution c = {shape[0], shape[1], shape[2], shape[3], shape[4]};
    c.across = (c.width + 1) / 2, c.down = (c.height + 1) / 2, c.tiles = c.images * c.across * c.down;
    return c;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Sixteen channels of the tile that begins at output pixel (y, x), B' x B. */
static inline __attribute__((always_inline)) void transform_input(const Convolution *c, const uint16_t *image, int64_t y, int64_t x, int64_t channels, __m512 v[PLACES])
{
    __m512 d[FOUR][FOUR];
    int inside = y > 0 && x > 0 && y + 2 < c->height && x + 2 < c->width;
    const uint16_t *corner = image + ((y - 1) * c->width + x - 1) * channels;
#pragma GCC unroll 4
    for (int i = 0; i < FOUR; i++)
#pragma GCC unroll 4
        for (int j = 0; j < FOUR; j++) {
            __m256i values = _mm256_setzero_si256();
            if (inside || (y + i > 0 && y + i <= c->height && x + j > 0 && x + j <= c->width))
                values = _mm256_loadu_si256((const __m256i *)(corner + (i * c->width + j) * channels));
            d[i][j] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
        }
#pragma GCC unroll 4
    for (int j = 0; j < FOUR; j++) {
        __m512 a = d[0][j] - d[2][j], b = d[1][j] + d[2][j], e = d[2][j] - d[1][j], f = d[1][j] - d[3][j];
        d[0][j] = a, d[1][j] = b, d[2][j] = e, d[3][j] = f;
    }
#pragma GCC unroll 4
    for (int i = 0; i < FOUR; i++) {
        v[4 * i] = d[i][0] - d[i][2], v[4 * i + 1] = d[i][1] + d[i][2];
        v[4 * i + 2] = d[i][2] - d[i][1], v[4 * i + 3] = d[i][1] - d[i][3];
    }
}

/* G w G' of sixteen filters whose taps are `step` apart; turned round if `turned`. */
static inline __attribute__((always_inline)) void transform_weight(const float *w, int64_t step, int turned, __m512 u[PLACES])
{
    __m512 half = _mm512_set1_ps(0.5f), g[3][3], t[FOUR][3];
    for (int k = 0; k < 9; k++) g[k / 3][k % 3] = _mm512_loadu_ps(w + (turned ? 8 - k : k) * step);
    for (int j = 0; j < 3; j++) {
        __m512 outer = g[0][j] + g[2][j];
        t[0][j] = g[0][j], t[1][j] = (outer + g[1][j]) * half, t[2][j] = (outer - g[1][j]) * half, t[3][j] = g[2][j];
    }
    for (int i = 0; i < FOUR; i++) {
        __m512 outer = t[i][0] + t[i][2];
        u[4 * i] = t[i][0], u[4 * i + 1] = (outer + t[i][1]) * half, u[4 * i + 2] = (outer - t[i][1]) * half, u[4 * i + 3] = t[i][2];
    }
}

static inline __m512i in_turn(__m512 even, __m512 odd) /* bf16 of one beside the other's */
{
    static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(order), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

/* Transformed weights: [block of 64 lanes][place][pair of summed channels][lane][2]. Weight is (out, 3, 3, in); the convolution of dy sums over its first. */
static void copy_weights(int64_t summed, int64_t lanes, const float *weight, int turned, uint32_t *copy)
{
    int64_t in = turned ? lanes : summed;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < lanes / LANES * (summed / LANES); n++) {
        int64_t lane = n / (summed / LANES) * LANES, channel = n % (summed / LANES) * LANES;
        int64_t start = lane / WIDE * WIDE, wide = least(WIDE, lanes - start);
        uint32_t *to = copy + start * PLACES * (summed / 2) + channel / 2 * wide + lane - start;
        __m512 even[PLACES], odd[PLACES];
        if (turned)
            for (int k = 0; k < LANES; k += 2) {
                transform_weight(weight + (channel + k) * 9 * in + lane, in, 1, even);
                transform_weight(weight + (channel + k + 1) * 9 * in + lane, in, 1, odd);
                for (int p = 0; p < PLACES; p++) _mm512_storeu_si512(to + p * (summed / 2) * wide + k / 2 * wide, in_turn(even[p], odd[p]));
            }
        else {
            uint32_t block[PLACES][LANES / 2][LANES]; /* written line by line: its rows lie pages apart in the copy */
            for (int k = 0; k < LANES; k++) {
                transform_weight(weight + (lane + k) * 9 * in + channel, in, 0, even);
                for (int p = 0; p < PLACES; p++) {
                    uint32_t pairs[LANES / 2];
                    _mm256_storeu_si256((__m256i *)pairs, (__m256i)_mm512_cvtneps_pbh(even[p]));
                    for (int j = 0; j < LANES / 2; j++) block[p][j][k] = pairs[j];
                }
            }
            for (int p = 0; p < PLACES; p++)
                for (int j = 0; j < LANES / 2; j++)
                    _mm512_storeu_si512(to + p * (summed / 2) * wide + j * wide, _mm512_loadu_si512(block[p][j]));
        }
    }
}

/* Six tiles by `vectors` times 16 channels. */
static inline __attribute__((always_inline)) void product(const uint32_t *v, const uint32_t *u, float *m, int64_t pairs, int vectors)
{
    __m512 sums[TALL][4];
    for (int t = 0; t < TALL; t++)
        for (int k = 0; k < vectors; k++) sums[t][k] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; pair++, u += vectors * LANES) {
        __m512bh weights[4];
        for (int k = 0; k < vectors; k++) weights[k] = (__m512bh)_mm512_loadu_si512(u + k * LANES);
#pragma GCC unroll 6
        for (int t = 0; t < TALL; t++) {
            __m512bh one = (__m512bh)_mm512_set1_epi32(v[t * pairs + pair]);
            for (int k = 0; k < vectors; k++) sums[t][k] = _mm512_dpbf16_ps(sums[t][k], one, weights[k]);
        }
    }
    for (int t = 0; t < TALL; t++)
        for (int k = 0; k < vectors; k++) _mm512_storeu_ps(m + t * WIDE + k * LANES, sums[t][k]);
}

static inline __attribute__((always_inline)) void store(uint16_t *y, __m512 value)
{
    _mm256_storeu_si256((__m256i *)y, (__m256i)_mm512_cvtneps_pbh(value));
}

/* A' m A of sixteen channels into the 2 x 2 pixels of a tile, those of them that the image has. */
static inline __attribute__((always_inline)) void transform_output(const float *m, int64_t step, __m512 bias, uint16_t *y, int64_t right, int64_t below, int has_right, int has_below)
{
    __m512 t[2][FOUR];
#pragma GCC unroll 4
    for (int j = 0; j < FOUR; j++) {
        __m512 a = _mm512_loadu_ps(m + j * step), b = _mm512_loadu_ps(m + (4 + j) * step), c = _mm512_loadu_ps(m + (8 + j) * step), d = _mm512_loadu_ps(m + (12 + j) * step);
        t[0][j] = a + b + c, t[1][j] = b - c - d;
    }
    store(y, t[0][0] + t[0][1] + t[0][2] + bias);
    if (has_right) store(y + right, t[0][1] - t[0][2] - t[0][3] + bias);
    if (has_below) store(y + below, t[1][0] + t[1][1] + t[1][2] + bias);
    if (has_right && has_below) store(y + right + below, t[1][1] - t[1][2] - t[1][3] + bias);
}

static int64_t tiles_at_once(const Convolution *c)
{
    int64_t tiles = NEAR / (PLACES * (c->in_channels * (int64_t)sizeof(uint16_t) + WIDE * (int64_t)sizeof(float))) / TALL * TALL;
    return tiles < 2 * TALL ? 2 * TALL : least(tiles, MOST_TILES);
}

static int64_t place_v(const Convolution *c) { return tiles_at_once(c) * c->in_channels / 2 + LINE / sizeof(uint32_t); } /* not in one set of the cache */
static int64_t place_m(const Convolution *c) { return tiles_at_once(c) * WIDE + LINE / sizeof(float); }

/* Bytes that `convolve` needs beside its tensors. */
int64_t convolve_bytes(const int64_t *shape, int64_t threads)
{
    Convolution c = convolution(shape);
    return PLACES * sizeof(uint32_t) * (c.in_channels / 2 * c.out_channels + threads * (place_v(&c) + place_m(&c)));
}

/* y (images, height, width, out_channels) of x (images, height, width, in_channels). Where `turned` is not 0, x is dy and y dx: in_channels are the
 * weight's out. bias may be NULL; scratch begins at a multiple of 64 bytes. */
void convolve(const int64_t *shape, const uint16_t *x, const float *weight, const float *bias, uint16_t *y, int64_t turned, uint32_t *scratch, int64_t threads)
{
    Convolution c = convolution(shape);
    int64_t most = tiles_at_once(&c), pairs = c.in_channels / 2, v_step = place_v(&c), m_step = place_m(&c), sixes = (c.tiles + TALL - 1) / TALL;
    uint32_t *weights = scratch, *rest = weights + PLACES * pairs * c.out_channels;
#pragma omp parallel num_threads(threads)
    {
        copy_weights(c.in_channels, c.out_channels, weight, turned != 0, weights);
#pragma omp for schedule(static)
        for (int64_t thread = 0; thread < threads; thread++) {
            uint32_t *v = rest + thread * PLACES * (v_step + m_step);
            float *m = (float *)(v + PLACES * v_step);
            int64_t end = least(c.tiles, sixes * (thread + 1) / threads * TALL);
            for (int64_t first = sixes * thread / threads * TALL; first < end; first += most) {
                int64_t here = least(most, end - first);
                for (int64_t t = 0; t < here; t++) {
                    int64_t column = (first + t) % c.across, row = (first + t) / c.across % c.down, image = (first + t) / c.across / c.down;
                    const uint16_t *of = x + image * c.height * c.width * c.in_channels;
                    for (int64_t channel = 0; channel < c.in_channels; channel += LANES) {
                        __m512 values[PLACES];
                        transform_input(&c, of + channel, 2 * row, 2 * column, c.in_channels, values);
                        uint16_t *to = (uint16_t *)(v + t * pairs) + channel;
#pragma GCC unroll 16
                        for (int p = 0; p < PLACES; p++) store(to + p * v_step * 2, values[p]);
                    }
                }
                for (int64_t start = 0; start < c.out_channels; start += WIDE) {
                    int64_t wide = least(WIDE, c.out_channels - start);
                    const uint32_t *block = weights + start * PLACES * pairs;
                    for (int p = 0; p < PLACES; p++)
                        for (int64_t t = 0; t < here; t += TALL) {
                            const uint32_t *a = v + p * v_step + t * pairs, *b = block + p * pairs * wide;
                            float *to = m + p * m_step + t * WIDE;
                            if (wide == 64) product(a, b, to, pairs, 4);
                            else if (wide == 48) product(a, b, to, pairs, 3);
                            else if (wide == 32) product(a, b, to, pairs, 2);
                            else product(a, b, to, pairs, 1);
                        }
                    for (int64_t t = 0; t < here; t++) {
                        int64_t column = (first + t) % c.across, row = (first + t) / c.across % c.down, image = (first + t) / c.across / c.down;
                        uint16_t *to = y + ((image * c.height + 2 * row) * c.width + 2 * column) * c.out_channels + start;
                        for (int64_t k = 0; k < wide; k += LANES)
                            transform_output(m + t * WIDE + k, m_step, bias ? _mm512_loadu_ps(bias + start + k) : _mm512_setzero_ps(), to + k, c.out_channels,
                                             c.width * c.out_channels, 2 * column + 1 < c.width, 2 * row + 1 < c.height);
                    }
                }
            }
        }
    }
}

/* A dy A' of sixteen channels of a tile. */
static inline __attribute__((always_inline)) void transform_gradient(const Convolution *c, const uint16_t *image, int64_t y, int64_t x, __m512 w[PLACES])
{
    __m512 d[2][2], t[FOUR][2];
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            __m256i values = _mm256_setzero_si256();
            if (y + i < c->height && x + j < c->width) values = _mm256_loadu_si256((const __m256i *)(image + ((y + i) * c->width + x + j) * c->out_channels));
            d[i][j] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
        }
    for (int j = 0; j < 2; j++) t[0][j] = d[0][j], t[1][j] = d[0][j] + d[1][j], t[2][j] = d[0][j] - d[1][j], t[3][j] = -d[1][j];
    for (int i = 0; i < FOUR; i++) w[4 * i] = t[i][0], w[4 * i + 1] = t[i][0] + t[i][1], w[4 * i + 2] = t[i][0] - t[i][1], w[4 * i + 3] = -t[i][1];
}

static int64_t tiles_of_chunk(const Convolution *c)
{
    int64_t tiles = CHUNK / (PLACES * (c->in_channels + c->out_channels) * (int64_t)sizeof(uint16_t)) / 2 * 2;
    return tiles < 2 ? 2 : least(tiles, (c->tiles + 1) / 2 * 2);
}

static int64_t block_x(const Convolution *c) { return tiles_of_chunk(c) / 2 * IN + LINE / sizeof(uint32_t); }
static int64_t block_dy(const Convolution *c) { return tiles_of_chunk(c) / 2 * OUT + LINE / sizeof(uint32_t); }
static int64_t blocks_in(const Convolution *c) { return (c->in_channels + IN - 1) / IN; }

/* Bytes that `weight_gradient` needs beside its tensors. */
int64_t weight_gradient_bytes(const int64_t *shape)
{
    Convolution c = convolution(shape);
    int64_t x = blocks_in(&c) * block_x(&c), dy = c.out_channels / OUT * block_dy(&c);
    return PLACES * sizeof(uint32_t) * (x + dy + c.out_channels * c.in_channels);
}

static inline __attribute__((always_inline)) void gradient_product(const uint32_t *x, const uint32_t *dy, float *sum, int64_t distance, int64_t pairs, int first, int vectors)
{
    __m512 sums[OUT][2];
    for (int j = 0; j < OUT; j++)
        for (int v = 0; v < vectors; v++) sums[j][v] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sum + j * distance + v * LANES);
    for (int64_t pair = 0; pair < pairs; pair++, x += IN, dy += OUT) {
        __m512bh values[2];
        for (int v = 0; v < vectors; v++) values[v] = (__m512bh)_mm512_loadu_si512(x + v * LANES);
#pragma GCC unroll 8
        for (int j = 0; j < OUT; j++) {
            __m512bh one = (__m512bh)_mm512_set1_epi32(dy[j]);
            for (int v = 0; v < vectors; v++) sums[j][v] = _mm512_dpbf16_ps(sums[j][v], one, values[v]);
        }
    }
    for (int j = 0; j < OUT; j++)
        for (int v = 0; v < vectors; v++) _mm512_storeu_ps(sum + j * distance + v * LANES, sums[j][v]);
}

/* dw (out_channels, 3, 3, in_channels) of x and dy; scratch begins at a multiple of 64 bytes. */
void weight_gradient(const int64_t *shape, const uint16_t *x, const uint16_t *dy, float *dw, uint32_t *scratch, int64_t threads)
{
    Convolution c = convolution(shape);
    int64_t most = tiles_of_chunk(&c), in = blocks_in(&c), out = c.out_channels / OUT, step_x = block_x(&c), step_dy = block_dy(&c);
    uint32_t *copy_x = scratch, *copy_dy = copy_x + PLACES * in * step_x;
    float *sums = (float *)(copy_dy + PLACES * out * step_dy);
    int64_t filters = c.out_channels * c.in_channels;
#pragma omp parallel num_threads(threads)
    {
        for (int64_t first = 0; first < c.tiles; first += most) {
            int64_t here = least(most, c.tiles - first), pairs = (here + 1) / 2;
#pragma omp for schedule(static)
            for (int64_t pair = 0; pair < pairs; pair++) {
                int64_t row[2], column[2], image[2], both = 2 * pair + 1 < here;
                for (int k = 0; k < 2; k++) {
                    int64_t tile = first + 2 * pair + k;
                    column[k] = 2 * (tile % c.across), row[k] = 2 * (tile / c.across % c.down), image[k] = tile / c.across / c.down * c.height * c.width;
                }
                __m512 even[PLACES], odd[PLACES];
                for (int p = 0; p < PLACES; p++) odd[p] = _mm512_setzero_ps();
                for (int64_t channel = 0; channel < c.in_channels; channel += LANES) {
                    transform_input(&c, x + image[0] * c.in_channels + channel, row[0], column[0], c.in_channels, even);
                    if (both) transform_input(&c, x + image[1] * c.in_channels + channel, row[1], column[1], c.in_channels, odd);
                    uint32_t *to = copy_x + channel / IN * step_x + pair * IN + channel % IN;
                    for (int p = 0; p < PLACES; p++) _mm512_storeu_si512(to + p * in * step_x, in_turn(even[p], odd[p]));
                }
                for (int p = 0; p < PLACES; p++) odd[p] = _mm512_setzero_ps();
                for (int64_t channel = 0; channel < c.out_channels; channel += LANES) {
                    transform_gradient(&c, dy + image[0] * c.out_channels + channel, row[0], column[0], even);
                    if (both) transform_gradient(&c, dy + image[1] * c.out_channels + channel, row[1], column[1], odd);
                    uint32_t *to = copy_dy + channel / OUT * step_dy + pair * OUT;
                    for (int p = 0; p < PLACES; p++) {
                        __m512i values = in_turn(even[p], odd[p]);
                        _mm256_storeu_si256((__m256i *)(to + p * out * step_dy), _mm512_castsi512_si256(values));
                        _mm256_storeu_si256((__m256i *)(to + p * out * step_dy + step_dy), _mm512_extracti64x4_epi64(values, 1));
                    }
                }
            }
#pragma omp for schedule(static)
            for (int64_t n = 0; n < PLACES * in * out; n++) {
                int64_t o = n % out, i = n / out % in, p = n / out / in;
                const uint32_t *a = copy_x + (p * in + i) * step_x, *b = copy_dy + (p * out + o) * step_dy;
                float *to = sums + p * filters + o * OUT * c.in_channels + i * IN;
                if (c.in_channels - i * IN > LANES) gradient_product(a, b, to, c.in_channels, pairs, first == 0, 2);
                else gradient_product(a, b, to, c.in_channels, pairs, first == 0, 1);
            }
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < filters; n += LANES) { /* G' u G */
            __m512 half = _mm512_set1_ps(0.5f), t[3][FOUR];
            for (int j = 0; j < FOUR; j++) {
                const float *u = sums + j * filters + n;
                __m512 b = _mm512_loadu_ps(u + 4 * filters), d = _mm512_loadu_ps(u + 8 * filters), middle = (b + d) * half;
                t[0][j] = _mm512_loadu_ps(u) + middle, t[1][j] = (b - d) * half, t[2][j] = _mm512_loadu_ps(u + 12 * filters) + middle;
            }
            float *to = dw + n / c.in_channels * 9 * c.in_channels + n % c.in_channels;
            for (int i = 0; i < 3; i++) {
                __m512 middle = (t[i][1] + t[i][2]) * half;
                _mm512_storeu_ps(to + 3 * i * c.in_channels, t[i][0] + middle);
                _mm512_storeu_ps(to + (3 * i + 1) * c.in_channels, (t[i][1] - t[i][2]) * half);
                _mm512_storeu_ps(to + (3 * i + 2) * c.in_channels, t[i][3] + middle);
            }
        }
    }
}
#else
int supported(void) { return 0; }
#endif
