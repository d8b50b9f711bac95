/* The norms' training steps on a CPU, one function for the forward and one for the backward pass of each.

   At batch size 2 the time of a norm is that of the calls it makes, some twenty of torch's for running batch norm.
   Here it is one each way. The formulas are those of `norms/channel.py`, `norms/images.py` and `norms/running.py`,
   where they stand in Python; the tests hold the two together. Everything is contiguous; sums are of double
   precision. The file includes itself, once for each of the two types, and needs no header but C's own. */

#ifndef REAL

#include <math.h>
#include <stdint.h>

/* One build for every processor of a kind: the widest form that this one has is chosen when the library is loaded. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define KERNEL __attribute__((target_clones("default", "avx2", "avx512f"))) void
#else
#define KERNEL void
#endif

#define BLOCK 64                        /* channels at a time */

#define REAL float
#define NAME(f) f##_float
#include "kernels.c"
#undef REAL
#undef NAME
#define REAL double
#define NAME(f) f##_double
#include "kernels.c"

#else

/* Sums over a row of p values: of x, of (x - m)^2, of g (x - m). */
static inline double NAME(sum)(const REAL *x, int64_t p) {
    double s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t j = 0; j < p; j++) s += x[j];
    return s;
}

static inline double NAME(squares)(const REAL *x, int64_t p, double m) {
    double s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t j = 0; j < p; j++) s += (x[j] - m) * (x[j] - m);
    return s;
}

static inline double NAME(product)(const REAL *g, const REAL *x, int64_t p, double m) {
    double s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t j = 0; j < p; j++) s += g[j] * (x[j] - m);
    return s;
}

/* --- statistics over the images: x is (N, C, P), row (i, c) begins at x + (i C + c) P -----------------------------

   A block of channels at a time, image by image: memory is read in its order, and where a row is a single value
   (P = 1) the loop over the channels is the one that the processor can widen. What is laid out channels last is this
   with N counting images and positions alike. */

static inline void NAME(channel_moments)(const REAL *x, int64_t N, int64_t C, int64_t P, int64_t b, double *mean,
                                         double *var) {
    double n = (double)(N * P);
    for (int64_t c = 0; c < b; c++) mean[c] = var[c] = 0;
    for (int64_t i = 0; i < N; i++) {
        const REAL *xi = x + i * C * P;
        if (P == 1) for (int64_t c = 0; c < b; c++) mean[c] += xi[c];
        else for (int64_t c = 0; c < b; c++) mean[c] += NAME(sum)(xi + c * P, P);
    }
    for (int64_t c = 0; c < b; c++) mean[c] /= n;
    for (int64_t i = 0; i < N; i++) {
        const REAL *xi = x + i * C * P;
        if (P == 1) for (int64_t c = 0; c < b; c++) var[c] += (xi[c] - mean[c]) * (xi[c] - mean[c]);
        else for (int64_t c = 0; c < b; c++) var[c] += NAME(squares)(xi + c * P, P, mean[c]);
    }
    for (int64_t c = 0; c < b; c++) var[c] /= n;
}

/* y = (x - mean) / sqrt(max(var, floor) + eps) weight + bias */
static inline void NAME(channel_normalise)(const REAL *x, REAL *y, int64_t N, int64_t C, int64_t P, int64_t b,
                                           const REAL *mean, const REAL *var, REAL floor, double eps,
                                           const REAL *weight, const REAL *bias) {
    REAL scale[BLOCK];
    for (int64_t c = 0; c < b; c++) scale[c] = (REAL)(weight[c] / sqrt((var[c] < floor ? floor : var[c]) + eps));
    for (int64_t i = 0; i < N; i++) {
        const REAL *xi = x + i * C * P;
        REAL *yi = y + i * C * P;
        if (P == 1) for (int64_t c = 0; c < b; c++) yi[c] = (xi[c] - mean[c]) * scale[c] + bias[c];
        else for (int64_t c = 0; c < b; c++)
            for (int64_t j = c * P; j < (c + 1) * P; j++) yi[j] = (xi[j] - mean[c]) * scale[c] + bias[c];
    }
}

/* Batch norm. `kept`, for the backward pass: C means, C variances, the batch's share (1), the least variance (0). */
KERNEL NAME(batch_norm)(const REAL *x, const REAL *weight, const REAL *bias, REAL *y, REAL *kept, REAL *running_mean,
                        REAL *running_var, int64_t *batches, int64_t N, int64_t C, int64_t P, double mom, double eps) {
    double m[BLOCK], v[BLOCK], n = (double)(N * P);
    for (int64_t at = 0; at < C; at += BLOCK) {
        int64_t b = C - at < BLOCK ? C - at : BLOCK;
        REAL *mean = kept + at, *var = kept + C + at;
        NAME(channel_moments)(x + at * P, N, C, P, b, m, v);
        for (int64_t c = 0; c < b; c++) {
            mean[c] = (REAL)m[c];
            var[c] = (REAL)v[c];
            running_mean[at + c] += (REAL)(mom * (m[c] - running_mean[at + c]));
            if (n > 1) running_var[at + c] += (REAL)(mom * (v[c] * n / (n - 1) - running_var[at + c]));
        }
        NAME(channel_normalise)(x + at * P, y + at * P, N, C, P, b, mean, var, 0, eps, weight + at, bias + at);
    }
    kept[2 * C] = 1;
    kept[2 * C + 1] = 0;
    *batches += 1;
}

/* Running batch norm: `RunningBatchNorm.track` and the normalisation. `kept` as above; `images` are N but where N counts
   their positions too. */
KERNEL NAME(running_batch_norm)(const REAL *x, const REAL *weight, const REAL *bias, REAL *y, REAL *kept,
                                REAL *running_mean, REAL *running_var, REAL *count, int64_t *seen, int64_t N, int64_t C,
                                int64_t P, double images, double alpha, double clamp_images, double clamp_var,
                                double eps) {
    double m[BLOCK], v[BLOCK];
    double values = (1 - alpha) * *count + alpha * (double)(N * P), a = alpha * (double)(N * P) / values;
    *count = (REAL)values;
    *seen += (int64_t)images;
    REAL floor = (REAL)((double)*seen < clamp_images ? clamp_var : 0);
    for (int64_t at = 0; at < C; at += BLOCK) {
        int64_t b = C - at < BLOCK ? C - at : BLOCK;
        REAL *mean = kept + at, *var = kept + C + at;
        NAME(channel_moments)(x + at * P, N, C, P, b, m, v);
        for (int64_t c = 0; c < b; c++) {
            double d = m[c] - running_mean[at + c], old = running_var[at + c];              /* `merge_moments` */
            mean[c] = running_mean[at + c] = (REAL)(running_mean[at + c] + a * d);
            var[c] = running_var[at + c] = (REAL)(old + a * (v[c] - old) + a * (1 - a) * d * d);
        }
        NAME(channel_normalise)(x + at * P, y + at * P, N, C, P, b, mean, var, floor, eps, weight + at, bias + at);
    }
    kept[2 * C] = (REAL)a;
    kept[2 * C + 1] = floor;
}

/* Both backward: gx = weight / s [g - a mean(g) - a xhat mean(g xhat)], the last term only where no floor holds. */
KERNEL NAME(channel_backward)(const REAL *g, const REAL *x, const REAL *weight, const REAL *kept, REAL *gx,
                              REAL *gweight, REAL *gbias, int64_t N, int64_t C, int64_t P, double eps) {
    double total[BLOCK], dot[BLOCK], a = kept[2 * C], n = (double)(N * P);
    REAL scale[BLOCK], shift[BLOCK], through_var[BLOCK], floor = kept[2 * C + 1];
    for (int64_t at = 0; at < C; at += BLOCK) {
        int64_t b = C - at < BLOCK ? C - at : BLOCK;
        const REAL *mean = kept + at, *var = kept + C + at;
        for (int64_t c = 0; c < b; c++) total[c] = dot[c] = 0;
        for (int64_t i = 0; i < N; i++) {
            const REAL *gi = g + (i * C + at) * P, *xi = x + (i * C + at) * P;
            if (P == 1) for (int64_t c = 0; c < b; c++) {
                total[c] += gi[c];
                dot[c] += gi[c] * (double)(xi[c] - mean[c]);
            } else for (int64_t c = 0; c < b; c++) {
                total[c] += NAME(sum)(gi + c * P, P);
                dot[c] += NAME(product)(gi + c * P, xi + c * P, P, mean[c]);
            }
        }
        for (int64_t c = 0; c < b; c++) {
            double rstd = 1 / sqrt((var[c] < floor ? floor : var[c]) + eps);
            gweight[at + c] = (REAL)(dot[c] * rstd);
            gbias[at + c] = (REAL)total[c];
            scale[c] = (REAL)(weight[at + c] * rstd);
            shift[c] = (REAL)(a * total[c] / n);
            through_var[c] = (REAL)(var[c] < floor ? 0 : a * dot[c] * rstd * rstd / n);
        }
        for (int64_t i = 0; i < N; i++) {
            const REAL *gi = g + (i * C + at) * P, *xi = x + (i * C + at) * P;
            REAL *to = gx + (i * C + at) * P;
            if (P == 1) for (int64_t c = 0; c < b; c++)
                to[c] = scale[c] * (gi[c] - shift[c] - (xi[c] - mean[c]) * through_var[c]);
            else for (int64_t c = 0; c < b; c++)
                for (int64_t j = c * P; j < (c + 1) * P; j++)
                    to[j] = scale[c] * (gi[j] - shift[c] - (xi[j] - mean[c]) * through_var[c]);
        }
    }
}

/* --- an image's own statistics: x is (N, G, C, P), a mean and a variance for each of the N G groups of C P values ---

   The affine map of row (g, c) begins at weight + (g C + c) wc and has one value for the row (wp = 0) or one for each
   of its positions (wp = 1). No weight is a null pointer. */

KERNEL NAME(group_norm)(const REAL *x, const REAL *weight, const REAL *bias, REAL *y, REAL *kept, int64_t N, int64_t G,
                      int64_t C, int64_t P, int64_t wc, int64_t wp, double eps) {
    for (int64_t k = 0; k < N * G; k++, x += C * P, y += C * P) {
        double m = NAME(sum)(x, C * P) / (double)(C * P);
        double rstd = 1 / sqrt(NAME(squares)(x, C * P, m) / (double)(C * P) + eps);
        REAL mean = kept[2 * k] = (REAL)m, r = kept[2 * k + 1] = (REAL)rstd;
        for (int64_t c = 0; c < C; c++) {
            const REAL *from = x + c * P, *w = weight ? weight + (k % G * C + c) * wc : 0;
            const REAL *b = weight ? bias + (k % G * C + c) * wc : 0;
            REAL *to = y + c * P;
            if (w && wp) for (int64_t j = 0; j < P; j++) to[j] = (from[j] - mean) * r * w[j] + b[j];
            else {
                REAL scale = w ? r * *w : r, shift = w ? *b : 0;
                for (int64_t j = 0; j < P; j++) to[j] = (from[j] - mean) * scale + shift;
            }
        }
    }
}

/* gx = 1 / s [h - mean(h) - xhat mean(h xhat)] with h = g weight */
KERNEL NAME(group_backward)(const REAL *g, const REAL *x, const REAL *weight, const REAL *kept, REAL *gx, REAL *gweight,
                          REAL *gbias, int64_t N, int64_t G, int64_t C, int64_t P, int64_t wc, int64_t wp) {
    double n = (double)(C * P), all_dots = 0, all_totals = 0;
    if (weight) for (int64_t j = 0; j < (wc ? G * C * wc : 1); j++) gweight[j] = gbias[j] = 0;
    for (int64_t k = 0; k < N * G; k++, g += C * P, x += C * P, gx += C * P) {
        REAL mean = kept[2 * k], r = kept[2 * k + 1];
        double total = 0, dot = 0;                              /* sums of h and of h (x - mean) */
        for (int64_t c = 0; c < C; c++) {
            const REAL *gc = g + c * P, *xc = x + c * P;
            int64_t at = (k % G * C + c) * wc;
            if (weight && wp) {
                const REAL *w = weight + at;
                REAL *gw = gweight + at, *gb = gbias + at;
                for (int64_t j = 0; j < P; j++) {
                    gw[j] += gc[j] * (xc[j] - mean) * r;
                    gb[j] += gc[j];
                }
#pragma omp simd reduction(+ : total, dot)
                for (int64_t j = 0; j < P; j++) {
                    double h = gc[j] * w[j];
                    total += h;
                    dot += h * (xc[j] - mean);
                }
            } else {
                double t = NAME(sum)(gc, P), d = NAME(product)(gc, xc, P, mean), w = weight ? weight[at] : 1;
                total += w * t;
                dot += w * d;
                if (weight && wc) {
                    gweight[at] += (REAL)(d * r);
                    gbias[at] += (REAL)t;
                }
                all_dots += d * r;
                all_totals += t;
            }
        }
        REAL shift = (REAL)(total / n), through_var = (REAL)(dot * r * r / n);
        for (int64_t c = 0; c < C; c++) {
            const REAL *gc = g + c * P, *xc = x + c * P, *w = weight ? weight + (k % G * C + c) * wc : 0;
            REAL *to = gx + c * P;
            if (w && wp) for (int64_t j = 0; j < P; j++)
                to[j] = r * (gc[j] * w[j] - shift - (xc[j] - mean) * through_var);
            else {
                REAL factor = w ? *w : 1;
                for (int64_t j = 0; j < P; j++) to[j] = r * (gc[j] * factor - shift - (xc[j] - mean) * through_var);
            }
        }
    }
    if (weight && !wc) {                                        /* one weight for everything */
        *gweight = (REAL)all_dots;
        *gbias = (REAL)all_totals;
    }
}

#endif
