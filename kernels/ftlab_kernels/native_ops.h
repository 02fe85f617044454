// The operations for one element type. native.c includes this file once for each: T is the type as stored, FN(name) the
// function's name with the type's suffix, LOAD(pointer) widens to float, STORE(pointer, float) rounds to nearest even.
//
// Letters: M rows, D width of a row, N tokens, H heads, E width of a head, F width inside the MLP, G = ceil(D / 8).
// Every row belongs to one thread and is summed in a fixed order, so results do not depend on the number of threads.

// y = s * rstd * w with s = x + residual rounded to T, rstd = 1 / sqrt(mean(s^2) + eps). residual, sum: NULL for none.
void FN(rms_norm)(const T *x, const T *residual, const float *w, T *sum, T *y, float *rstd, int64_t M, int64_t D,
                  float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < M; m++) {
        const T *s = x + m * D;
        if (residual != NULL) {
            T *out = sum + m * D;
#pragma omp simd
            for (int64_t d = 0; d < D; d++) STORE(out + d, LOAD(x + m * D + d) + LOAD(residual + m * D + d));
            s = out;
        }
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t d = 0; d < D; d++) total += LOAD(s + d) * LOAD(s + d);
        const float scale = 1.0f / sqrtf(total / (float)D + eps);
        rstd[m] = scale;
#pragma omp simd
        for (int64_t d = 0; d < D; d++) STORE(y + m * D + d, LOAD(s + d) * scale * w[d]);
    }
}

// dx = rstd (dy w - s rstd^2 mean(dy w s)) + dsum. dsum: the gradient that reaches the sum directly, NULL for none.
void FN(rms_norm_backward)(const T *dy, const T *dsum, const T *s, const float *w, const float *rstd, T *dx, int64_t M,
                           int64_t D) {
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < M; m++) {
        const int64_t row = m * D;
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t d = 0; d < D; d++) dot += LOAD(dy + row + d) * w[d] * LOAD(s + row + d);
        const float scale = rstd[m], pull = dot * scale * scale / (float)D;
        if (dsum != NULL) {
#pragma omp simd
            for (int64_t d = 0; d < D; d++)
                STORE(dx + row + d, scale * (LOAD(dy + row + d) * w[d] - LOAD(s + row + d) * pull) + LOAD(dsum + row + d));
        } else {
#pragma omp simd
            for (int64_t d = 0; d < D; d++)
                STORE(dx + row + d, scale * (LOAD(dy + row + d) * w[d] - LOAD(s + row + d) * pull));
        }
    }
}

// dw = sum over rows of dy s rstd: each thread owns a range of columns, so the order of the sum is fixed. Rows are summed
// in blocks and then the blocks, so that the error does not grow with M as that of one long sum does.
void FN(rms_norm_weight)(const T *dy, const T *s, const float *rstd, float *dw, int64_t M, int64_t D) {
    enum { COLUMNS = 64, BLOCK = 32 };
#pragma omp parallel for schedule(static)
    for (int64_t start = 0; start < D; start += COLUMNS) {
        const int64_t width = start + COLUMNS < D ? COLUMNS : D - start;
        float total[COLUMNS] = {0};
        for (int64_t first = 0; first < M; first += BLOCK) {
            const int64_t end = first + BLOCK < M ? first + BLOCK : M;
            float part[COLUMNS] = {0};
            for (int64_t m = first; m < end; m++) {
                const int64_t at = m * D + start;
                const float scale = rstd[m];
#pragma omp simd
                for (int64_t d = 0; d < width; d++) part[d] += LOAD(dy + at + d) * LOAD(s + at + d) * scale;
            }
#pragma omp simd
            for (int64_t d = 0; d < width; d++) total[d] += part[d];
        }
        memcpy(dw + start, total, (size_t)width * sizeof(float));
    }
}

// Turn the pairs (i, i + E/2) of each head by the token's angle; sign -1 turns back. cos, sin: [N, E/2]. Heads of token n
// begin at x + n * x_stride.
void FN(rope)(const T *x, const float *cosine, const float *sine, T *y, int64_t N, int64_t H, int64_t E,
              int64_t x_stride, float sign) {
    const int64_t half = E / 2;
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        for (int64_t h = 0; h < H; h++) {
            const T *in = x + n * x_stride + h * E;
            T *out = y + (n * H + h) * E;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                const float c = cosine[n * half + i], s = sign * sine[n * half + i];
                const float first = LOAD(in + i), second = LOAD(in + half + i);
                STORE(out + i, first * c - second * s);
                STORE(out + half + i, second * c + first * s);
            }
        }
    }
}

// y = silu(gate) * up, silu(z) = z / (1 + exp(-z)), over `count` elements.
void FN(swiglu)(const T *gate, const T *up, T *y, int64_t count) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < count; i++) {
        const float z = LOAD(gate + i);
        STORE(y + i, z / (1.0f + exp_(-z)) * LOAD(up + i));
    }
}

// dgate = dy up s (1 + z (1 - s)), dup = dy z s, with s = 1 / (1 + exp(-z)).
void FN(swiglu_backward)(const T *dy, const T *gate, const T *up, T *dgate, T *dup, int64_t count) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < count; i++) {
        const float z = LOAD(gate + i), upstream = LOAD(dy + i), s = 1.0f / (1.0f + exp_(-z));
        const float u = LOAD(up + i);
        STORE(dgate + i, upstream * u * s * (1.0f + z * (1.0f - s)));
        STORE(dup + i, upstream * z * s);
    }
}

// y = x * keep * scale for one row, 16 elements at a time: a vector of the widest processors.
static inline void FN(masked_row)(const T *x, T *y, const uint8_t *bits, float scale, int64_t D) {
    for (int64_t h = 0; h < D / 16; h++) {
        const uint32_t pair = bits[2 * h] | (uint32_t)bits[2 * h + 1] << 8;
#pragma omp simd
        for (int j = 0; j < 16; j++) STORE(y + 16 * h + j, pair >> j & 1 ? scale * LOAD(x + 16 * h + j) : 0.0f);
    }
    for (int64_t d = D / 16 * 16; d < D; d++) STORE(y + d, bits[d / 8] >> d % 8 & 1 ? scale * LOAD(x + d) : 0.0f);
}

// Draw the packed mask of ftlab_kernels.random into bits [M, G] and write y = x * keep * scale.
void FN(dropout)(const T *x, T *y, uint8_t *bits, int64_t seed, int64_t drop_below, float scale, int64_t M, int64_t D) {
    const int64_t G = (D + 7) / 8;
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < M; m++) {
        draw_row(bits + m * G, seed, (uint64_t)(m * G), G, (uint32_t)drop_below);
        if (D % 8) bits[m * G + G - 1] &= (uint8_t)((1 << D % 8) - 1);
        FN(masked_row)(x + m * D, y + m * D, bits + m * G, scale, D);
    }
}

// y = x * keep * scale with a mask drawn before.
void FN(masked)(const T *x, T *y, const uint8_t *bits, float scale, int64_t M, int64_t D) {
    const int64_t G = (D + 7) / 8;
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < M; m++) FN(masked_row)(x + m * D, y + m * D, bits + m * G, scale, D);
}

// y += x * keep * scale.
void FN(masked_add)(const T *x, T *y, const uint8_t *bits, float scale, int64_t M, int64_t D) {
    const int64_t G = (D + 7) / 8;
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < M; m++) {
        const T *in = x + m * D;
        T *out = y + m * D;
        const uint8_t *byte = bits + m * G;
        for (int64_t h = 0; h < D / 16; h++) {
            const uint32_t pair = byte[2 * h] | (uint32_t)byte[2 * h + 1] << 8;
#pragma omp simd
            for (int j = 0; j < 16; j++) {
                const float kept = pair >> j & 1 ? scale * LOAD(in + 16 * h + j) : 0.0f;
                STORE(out + 16 * h + j, LOAD(out + 16 * h + j) + kept);
            }
        }
        for (int64_t d = D / 16 * 16; d < D; d++)
            if (byte[d / 8] >> d % 8 & 1) STORE(out + d, LOAD(out + d) + scale * LOAD(in + d));
    }
}

// Softmax of fp32 scores [rows, S] where row t of every T_rows sees its first offset + t + 1 columns; zeros behind them.
// The scores are overwritten.
void FN(causal_softmax)(float *scores, T *weights, int64_t rows, int64_t T_rows, int64_t S, int64_t offset) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float *in = scores + row * S;
        T *out = weights + row * S;
        const int64_t seen = offset + row % T_rows + 1;
        float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
        for (int64_t j = 0; j < seen; j++) largest = in[j] > largest ? in[j] : largest;
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t j = 0; j < seen; j++) {
            in[j] = exp_(in[j] - largest);
            total += in[j];
        }
        const float scale = 1.0f / total;
#pragma omp simd
        for (int64_t j = 0; j < seen; j++) STORE(out + j, in[j] * scale);
        memset(out + seen, 0, (size_t)(S - seen) * sizeof(T));
    }
}

// dscores = factor * weights (dweights - sum(weights dweights)), zeros where nothing was seen.
void FN(causal_softmax_backward)(const T *dweights, const T *weights, T *dscores, int64_t rows, int64_t T_rows,
                                 int64_t S, int64_t offset, float factor) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = row * S, seen = offset + row % T_rows + 1;
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < seen; j++) dot += LOAD(weights + at + j) * LOAD(dweights + at + j);
#pragma omp simd
        for (int64_t j = 0; j < seen; j++)
            STORE(dscores + at + j, factor * LOAD(weights + at + j) * (LOAD(dweights + at + j) - dot));
        memset(dscores + at + seen, 0, (size_t)(S - seen) * sizeof(T));
    }
}

// losses[c] = logsumexp(logits[c]) - logits[c, label]; with `gradient`, logits become softmax - onehot. The label's entry
// is lowered by 1 before it is rounded.
void FN(cross_entropy)(T *logits, const int64_t *labels, float *losses, int64_t C, int64_t V, int64_t gradient) {
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < C; c++) {
        T *row = logits + c * V;
        float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
        for (int64_t v = 0; v < V; v++) {
            const float z = LOAD(row + v);
            largest = z > largest ? z : largest;
        }
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t v = 0; v < V; v++) total += exp_(LOAD(row + v) - largest);
        const float shifted = LOAD(row + labels[c]) - largest;
        losses[c] = logf(total) - shifted;
        if (gradient) {
            const float scale = 1.0f / total;
#pragma omp simd
            for (int64_t v = 0; v < V; v++) STORE(row + v, exp_(LOAD(row + v) - largest) * scale);
            STORE(row + labels[c], exp_(shifted) * scale - 1.0f);
        }
    }
}

// y[64 b + 2 i], y[64 b + 2 i + 1] = the levels of the upper and the lower half of codes[32 b + i], times magnitudes[b].
void FN(nf4_dequantise)(const uint8_t *codes, const float *magnitudes, const float *levels, T *y, int64_t blocks) {
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        T table[16];
        for (int k = 0; k < 16; k++) STORE(table + k, levels[k] * magnitudes[b]);
        for (int64_t i = 0; i < 32; i++) {
            const uint8_t code = codes[32 * b + i];
            y[64 * b + 2 * i] = table[code >> 4];
            y[64 * b + 2 * i + 1] = table[code & 15];
        }
    }
}
