/* GGML blocks into MLX's affine containers: what repack.py does in NumPy, bit for bit.
 *
 * A function a type: blocks of the file become codes, MLX's bit stream, and a scale and a bias for
 * every 32 weights; 0 at a scale that is no finite number. Layouts are those of ggml-common.h; the
 * host is little-endian. Plain C99 without Python's headers, called through ctypes: kernels.py.
 */

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if FLT_EVAL_METHOD == 1 || FLT_EVAL_METHOD == 2 || FLT_EVAL_METHOD < 0
#error "float is not computed in float here; NumPy does it right"
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#define EACH 0x0101010101010101ULL
#define PART 1024 /* groups worked on at a time */

/* kernels.py takes a library with its own number alone: an editable install may have an old one. */
EXPORT const int32_t kernels_version = 2;

/* Whether the float16 at `from` is finite; its value. */
static int half(const uint8_t *from, float *value) {
    const uint32_t bits = from[0] | (uint32_t)from[1] << 8;
    const uint32_t size = bits & 0x7FFF;
    const uint32_t wide = ((bits & 0x8000) << 16) | ((size << 13) + (112u << 23));
    if (size < 0x400) { /* subnormal */
        *value = (float)size * (bits & 0x8000 ? -0x1p-24f : 0x1p-24f);
        return 1;
    }
    memcpy(value, &wide, 4);
    return size < 0x7C00;
}

/* Nibbles of `run` bytes, the low ones first, two to a byte in order: `run` bytes. */
static inline void pair_nibbles(const uint8_t *from, int run, uint8_t *out) {
    uint16_t two[16];
    memcpy(two, from, run);
    for (int i = 0; i < run / 2; i++) {
        out[i] = (uint8_t)((two[i] & 0x0F) | (two[i] >> 4 & 0xF0));
        out[run / 2 + i] = (uint8_t)((two[i] >> 4 & 0x0F) | (two[i] >> 8 & 0xF0));
    }
}

/* 5-bit codes, a byte each, as a bit stream. */
static inline void pack_fives(const uint8_t *codes, int count, uint8_t *out) {
    for (int i = 0; i < count / 8; i++) {
        uint64_t it;
        memcpy(&it, codes + 8 * i, 8);
        it = (it & 0x001F001F001F001FULL) | (it & 0x1F001F001F001F00ULL) >> 3;
        it = (it & 0x000003FF000003FFULL) | (it & 0x03FF000003FF0000ULL) >> 6;
        it = (it & 0x00000000000FFFFFULL) | (it & 0x000FFFFF00000000ULL) >> 12;
        memcpy(out + 5 * i, &it, 5);
    }
}

/* Scales `d * sc` and biases `-dmin * m` of the 8 groups of Q4_K and Q5_K. */
static inline int scales_k(const uint8_t *block, float *scale, float *bias) {
    const uint8_t *p = block + 4;
    float d, dmin;
    if (!(half(block, &d) & half(block + 2, &dmin))) return 0;
    for (int i = 0; i < 4; i++) {
        scale[i] = d * (float)(p[i] & 63);
        bias[i] = -dmin * (float)(p[4 + i] & 63);
        scale[4 + i] = d * (float)((p[8 + i] & 15) | (p[i] >> 2 & 48));
        bias[4 + i] = -dmin * (float)(p[8 + i] >> 4 | (p[4 + i] >> 2 & 48));
    }
    return 1;
}

static int Q4_0(const uint8_t *block, size_t count, uint8_t *out, float *scale, float *bias) {
    for (; count--; block += 18, out += 16, scale++, bias++) {
        if (!half(block, scale)) return 0;
        *bias = *scale * -8.0f;
        pair_nibbles(block + 2, 16, out);
    }
    return 1;
}

static int Q4_1(const uint8_t *block, size_t count, uint8_t *out, float *scale, float *bias) {
    for (; count--; block += 20, out += 16, scale++, bias++) {
        if (!(half(block, scale) & half(block + 2, bias))) return 0;
        pair_nibbles(block + 4, 16, out);
    }
    return 1;
}

/* 32 codes of Q5_0 and Q5_1: four bytes of fifth bits, then nibbles. */
static inline void fives(const uint8_t *from, uint8_t *out) {
    uint64_t codes[4];
    memcpy(codes, from + 4, 16);
    codes[2] = codes[0] >> 4;
    codes[3] = codes[1] >> 4;
    for (int i = 0; i < 4; i++) {
        const uint64_t set = from[i] * EACH & 0x8040201008040201ULL; /* a bit a byte */
        codes[i] = (codes[i] & 15 * EACH) | ((set + 127 * EACH) >> 3 & 16 * EACH);
    }
    pack_fives((const uint8_t *)codes, 32, out);
}

static int Q5_0(const uint8_t *block, size_t count, uint8_t *out, float *scale, float *bias) {
    for (; count--; block += 22, out += 20, scale++, bias++) {
        if (!half(block, scale)) return 0;
        *bias = *scale * -16.0f;
        fives(block + 2, out);
    }
    return 1;
}

static int Q5_1(const uint8_t *block, size_t count, uint8_t *out, float *scale, float *bias) {
    for (; count--; block += 24, out += 20, scale++, bias++) {
        if (!(half(block, scale) & half(block + 2, bias))) return 0;
        fives(block + 4, out);
    }
    return 1;
}

static int Q8_0(const uint8_t *block, size_t count, uint8_t *out, float *scale, float *bias) {
    for (; count--; block += 34, out += 32, scale++, bias++) {
        if (!half(block, scale)) return 0;
        *bias = *scale * -128.0f;
        for (int i = 0; i < 32; i++) out[i] = block[2 + i] ^ 128;
    }
    return 1;
}

static int Q4_K(const uint8_t *block, size_t count, uint8_t *out, float *scale, float *bias) {
    for (; count--; block += 144, out += 128, scale += 8, bias += 8) {
        if (!scales_k(block, scale, bias)) return 0;
        for (int i = 0; i < 128; i += 32) pair_nibbles(block + 16 + i, 32, out + i);
    }
    return 1;
}

static int Q5_K(const uint8_t *block, size_t count, uint8_t *out, float *scale, float *bias) {
    for (; count--; block += 176, out += 160, scale += 8, bias += 8) {
        uint8_t fifth[32], codes[256];
        if (!scales_k(block, scale, bias)) return 0;
        memcpy(fifth, block + 16, 32);
        for (int two = 0; two < 4; two++) {
            const uint8_t *low = block + 48 + two * 32;
            uint8_t *to = codes + two * 64;
            for (int i = 0; i < 32; i++) {
                to[i] = (low[i] & 15) | (fifth[i] & 1) << 4;
                to[32 + i] = low[i] >> 4 | (fifth[i] & 2) << 3;
                fifth[i] >>= 2;
            }
        }
        pack_fives(codes, 256, out);
    }
    return 1;
}

/* The pairs of scales of Q6_K under one each: the larger, cut in four. A code of 6 bits becomes
 * `(by * code + plus) >> 16`, which is 4 times it for the larger: see _around_zero in lattice.py.
 * All these numbers are integers, of 24 bits where they are sums: float32 has them exactly. */
static inline void merge_scales(const float *two, float *step, float *by, float *plus) {
    for (int i = 0; i < 8; i++) {
        const float first = two[2 * i], second = two[2 * i + 1];
        step[i] = (fabsf(second) > fabsf(first) ? second : first) / 4.0f;
    }
    for (int i = 0; i < 16; i++) {
        const float gain = two[i] / (step[i / 2] == 0 ? 1.0f : step[i / 2]) * 65536.0f;
        by[i] = (gain + 12582912.0f) - 12582912.0f; /* to the nearest, even, integer */
    }
    for (int i = 0; i < 16; i += 2) by[i] = step[i / 2] == 0 ? 262144.0f : by[i];
    for (int i = 0; i < 16; i++) plus[i] = 8421376.0f - by[i] * 32.0f;
}

static inline uint8_t merged(uint8_t code, float by, float plus) {
    const int32_t rounded = (int32_t)((float)code * by + plus) >> 16;
    return (uint8_t)(rounded > 255 ? 255 : rounded);
}

static int Q6_K(const uint8_t *block, size_t count, uint8_t *out, float *scale, float *bias) {
    for (; count--; block += 210, out += 256, scale += 8, bias += 8) {
        uint8_t codes[256];
        float d, two[16], by[16], plus[16];
        if (!half(block + 208, &d)) return 0;
        for (int part = 0; part < 2; part++) {
            const uint8_t *low = block + part * 64, *high = block + 128 + part * 32;
            uint8_t *to = codes + part * 128;
            for (int i = 0; i < 32; i++) {
                to[i] = (low[i] & 15) | (high[i] & 3) << 4;
                to[32 + i] = (low[32 + i] & 15) | (high[i] & 12) << 2;
                to[64 + i] = low[i] >> 4 | (high[i] & 48);
                to[96 + i] = low[32 + i] >> 4 | (high[i] >> 2 & 48);
            }
        }
        for (int i = 0; i < 16; i++) two[i] = d * (float)(int8_t)block[192 + i];
        merge_scales(two, scale, by, plus);
        for (int i = 0; i < 8; i++) bias[i] = scale[i] * -128.0f;
        for (int at = 0; at < 256; at += 32) {
            const int group = at / 16;
            for (int i = at; i < at + 16; i++) {
                out[i] = merged(codes[i], by[group], plus[group]);
                out[16 + i] = merged(codes[16 + i], by[group + 1], plus[group + 1]);
            }
        }
    }
    return 1;
}

/* Numbers that are finite, rounded to float16; 0 where one becomes infinite. */
static int to_float16(const uint32_t *restrict values, size_t count, uint16_t *restrict out) {
    uint32_t large = 0;
    for (size_t i = 0; i < count; i++) {
        const uint32_t size = values[i] & 0x7FFFFFFF, subnormal = -(uint32_t)(size < 0x38800000);
        const uint32_t normal = (size + 0xFFF - (112u << 23) + (size >> 13 & 1)) >> 13;
        union { uint32_t bits; float value; } small = {size};
        small.value += 0.5f; /* whose last bit is worth 2**-24, as that of a subnormal float16 */
        large |= -(uint32_t)(size >= 0x477FF000);
        out[i] = (uint16_t)((values[i] >> 16 & 0x8000) | (normal & ~subnormal)
            | ((small.bits - 0x3F000000) & subnormal));
    }
    return !large;
}

static int to_bfloat16(const uint32_t *restrict values, size_t count, uint16_t *restrict out) {
    for (size_t i = 0; i < count; i++)
        out[i] = (uint16_t)((values[i] + 0x7FFF + (values[i] >> 16 & 1)) >> 16);
    return 1;
}

/* `count` numbers to place `at` of an array of float32 (`dtype` 0), float16 (1) or bfloat16 (2). */
static int keep(const float *values, size_t count, int dtype, void *array, size_t at) {
    uint32_t bits[PART];
    memcpy(bits, values, 4 * count);
    if (dtype == 1) return to_float16(bits, count, (uint16_t *)array + at);
    if (dtype == 2) return to_bfloat16(bits, count, (uint16_t *)array + at);
    memcpy((float *)array + at, values, 4 * count);
    return 1;
}

static const struct {
    int type; /* ggml's number */
    int (*move)(const uint8_t *, size_t, uint8_t *, float *, float *);
    size_t block_bytes, out_bytes, groups;
} TYPES[] = {
    {2, Q4_0, 18, 16, 1}, {3, Q4_1, 20, 16, 1}, {6, Q5_0, 22, 20, 1}, {7, Q5_1, 24, 20, 1},
    {8, Q8_0, 34, 32, 1}, {12, Q4_K, 144, 128, 8}, {13, Q5_K, 176, 160, 8}, {14, Q6_K, 210, 256, 8},
};

/* Blocks as codes, scales and biases, the latter two in `dtype`. 0 leaves it to NumPy: at a scale
 * that is no finite number, or is none in `dtype`, and for types that are not here. */
EXPORT int move(int type, int dtype, const uint8_t *blocks, size_t count, uint8_t *out,
                void *scales, void *biases) {
    size_t kind = 0, part;
    while (TYPES[kind].type != type)
        if (++kind == sizeof TYPES / sizeof *TYPES) return 0;
    const size_t groups = TYPES[kind].groups;
    for (size_t done = 0; done < count; done += part) {
        float scale[PART], bias[PART]; /* stay in the cache until they are rounded */
        part = PART / groups < count - done ? PART / groups : count - done;
        if (!TYPES[kind].move(blocks + done * TYPES[kind].block_bytes, part,
                              out + done * TYPES[kind].out_bytes, scale, bias)
            || !keep(scale, part * groups, dtype, scales, done * groups)
            || !keep(bias, part * groups, dtype, biases, done * groups)) return 0;
    }
    return 1;
}
