// AdamW of fp32 weights with 8-bit moments, a block of 256 at a time. Formats, random bits and the order of operations are
// those of ftlab_kernels.adamw.reference_step; this rounds where that rounds, so both give the same bits.

enum { MOMENTS = 256 };     // BLOCK of adamw_kernels.py
#define M_TINY 1e-30f       // and the others there
#define V_TINY 1e-37f
#define M_LEVELS 16129.0f   // 127^2
#define V_LEVELS 65025.0f   // 255^2

// 16 random bits for each element of a block whose first group of 8 has this counter.
static inline void draw_block(uint32_t *bits, uint64_t key, uint64_t counter) {
    for (int start = 0; start < MOMENTS / 8; start += LANES) {
        uint32_t c[4][LANES];
        philox(c[0], c[1], c[2], c[3], key, counter + (uint64_t)start);
        for (int i = 0; i < LANES; i++) {
            uint32_t *group = bits + 8 * (start + i);
            for (int w = 0; w < 4; w++) {
                group[2 * w] = c[w][i] & 0xFFFF;
                group[2 * w + 1] = c[w][i] >> 16;
            }
        }
    }
}

// The largest of a block's magnitudes; 0 if it is not above `tiny`.
static inline float block_scale(const float *size, float tiny) {
    float largest = 0;
#pragma omp simd reduction(max : largest)
    for (int i = 0; i < MOMENTS; i++) largest = size[i] > largest ? size[i] : largest;
    return largest > tiny ? largest : 0.0f;
}

// Codes and scale of a block of m: m = a q |q| / 127^2.
static inline void encode_m(const float *m, const uint32_t *bits, int8_t *codes, float *scale) {
    float size[MOMENTS];
    int32_t code[MOMENTS];
#pragma omp simd
    for (int i = 0; i < MOMENTS; i++) size[i] = fabsf(m[i]);
    const float largest = block_scale(size, M_TINY);
    const float factor = largest > 0 ? 1.0f / largest * M_LEVELS : 0.0f;
#pragma omp simd
    for (int i = 0; i < MOMENTS; i++) {
        const float x = size[i] * factor, lower = rintf(sqrtf(x) - 0.5f);
        const float chance = (float)(int32_t)(2 * (bits[i] & 0xFF) + 1) / 512.0f;
        const int32_t q = (int32_t)lower + (chance * (2.0f * lower + 1.0f) < x - lower * lower);
        code[i] = m[i] < 0 ? -q : q;
    }
    for (int i = 0; i < MOMENTS; i++) codes[i] = (int8_t)code[i];
    *scale = largest;
}

// Codes and scale of a block of v: v = a (q / 255)^4, and q is above 0 where v is.
static inline void encode_v(const float *v, const uint32_t *bits, uint8_t *codes, float *scale) {
    int32_t code[MOMENTS];
    const float largest = block_scale(v, V_TINY);
    const float factor = largest > 0 ? 1.0f / sqrtf(largest) * V_LEVELS : 0.0f;
#pragma omp simd
    for (int i = 0; i < MOMENTS; i++) {
        const float y = sqrtf(v[i]) * factor, x = y * y, lower = rintf(sqrtf(sqrtf(x)) - 0.5f);
        const float chance = (float)(int32_t)(2 * (bits[i] >> 8) + 1) / 512.0f;
        const float low = lower * lower, high = (lower + 1.0f) * (lower + 1.0f);
        const float base = low * low, width = high * high - base;
        const int32_t q = (int32_t)lower + (chance * width < x - base);
        code[i] = x > 0 && q < 1 ? 1 : q;
    }
    for (int i = 0; i < MOMENTS; i++) codes[i] = (uint8_t)code[i];
    *scale = largest;
}

// One step of `count` weights. key, counter: of the random bits of the tensor's first element. rate = 1 - beta; corrected:
// 1 - beta_2^t; decay: lr * weight_decay; step_size: lr / (1 - beta_1^t).
void adamw_8bit_f32(float *p, const float *g, int8_t *m_codes, uint8_t *v_codes, float *m_scales, float *v_scales,
                    int64_t count, int64_t key, int64_t counter, float beta_1, float rate_1, float beta_2, float rate_2,
                    float corrected, float eps, float decay, float step_size) {
    const int64_t blocks = (count + MOMENTS - 1) / MOMENTS;
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t at = b * MOMENTS, width = count - at < MOMENTS ? count - at : MOMENTS;
        const float m_scale = m_scales[b] / M_LEVELS, v_scale = sqrtf(v_scales[b]) / V_LEVELS;
        float m[MOMENTS] = {0}, v[MOMENTS] = {0};
        uint32_t bits[MOMENTS];
        int8_t m_block[MOMENTS];
        uint8_t v_block[MOMENTS];
        draw_block(bits, (uint64_t)key, (uint64_t)counter + (uint64_t)(at / 8));
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            const float q = (float)m_codes[at + i], r = (float)v_codes[at + i], root = r * r * v_scale;
            m[i] = beta_1 * (q * fabsf(q) * m_scale) + rate_1 * g[at + i];
            v[i] = beta_2 * (root * root) + rate_2 * (g[at + i] * g[at + i]);
            const float size = sqrtf(v[i] / corrected) + eps;
            p[at + i] = p[at + i] - decay * p[at + i] - step_size * m[i] / size;
        }
        encode_m(m, bits, m_block, m_scales + b);
        encode_v(v, bits, v_block, v_scales + b);
        memcpy(m_codes + at, m_block, (size_t)width);
        memcpy(v_codes + at, v_block, (size_t)width);
    }
}
