/* The norms' training steps on a CPU, one function for the forward and one for the backward pass of each.

   At batch size 2 the time of a norm is that of the calls it makes, some twenty of torch's for running batch norm.
   Here it is one each way. The formulas are those of the norms' definitions one folder up, and of their derivatives in
   `channels.py` and `images.py`; the tests hold them together. Everything is contiguous; sums are of double precision,
   and means are taken about a first value, so that they are exact where all are equal. The file includes itself, once
   for each of the two types, and needs no header but C's own. */

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

/* What `kernels.py` expects of this file: one more at every change of a function's arguments or of what they mean. */
int64_t norms_kernels_version(void) { return 2; }

#define REAL float
#define NAME(f) f##_float
#include "kernels.c"
#undef REAL
#undef NAME
#define REAL double
#define NAME(f) f##_double
#include "kernels.c"

#else

/* Sums over a row of p values: of x - r, of (x - m)^2, of g (x - m). */
static inline double NAME(sum)(const REAL *x, int64_t p, double r) {
    double s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t j = 0; j < p; j++) s += x[j] - r;
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
    double n = (double)(N * P), r[BLOCK];
    for (int64_t c = 0; c < b; c++) {
        mean[c] = var[c] = 0;
        r[c] = x[c * P];
    }
    for (int64_t i = 0; i < N; i++) {
        const REAL *xi = x + i * C * P;
        if (P == 1) for (int64_t c = 0; c < b; c++) mean[c] += xi[c] - r[c];
        else for (int64_t c = 0; c < b; c++) mean[c] += NAME(sum)(xi + c * P, P, r[c]);
    }
    for (int64_t c = 0; c < b; c++) mean[c] = r[c] + mean[c] / n;
    for (int64_t i = 0; i < N; i++) {
        const REAL *xi = x + i * C * P;
        if (P == 1) for (int64_t c = 0; c < b; c++) var[c] += (xi[c] - mean[c]) * (xi[c] - mean[c]);
        else for (int64_t c = 0; c < b; c++) var[c] += NAME(squares)(xi + c * P, P, mean[c]);
    }
    for (int64_t c = 0; c < b; c++) var[c] /= n;
}

/* y = (x - mean) / sqrt(var + eps) weight + bias; no weight is a null pointer, and then no bias either */
static inline void NAME(channel_normalise)(const REAL *x, REAL *y, int64_t N, int64_t C, int64_t P, int64_t b,
                                           const REAL *mean, const REAL *var, double eps, const REAL *weight,
                                           const REAL *bias) {
    REAL scale[BLOCK], shift[BLOCK];
    for (int64_t c = 0; c < b; c++) {
        scale[c] = (REAL)((weight ? weight[c] : 1) / sqrt(var[c] + eps));
        shift[c] = bias ? bias[c] : 0;
    }
    for (int64_t i = 0; i < N; i++) {
        const REAL *xi = x + i * C * P;
        REAL *yi = y + i * C * P;
        if (P == 1) for (int64_t c = 0; c < b; c++) yi[c] = (xi[c] - mean[c]) * scale[c] + shift[c];
        else for (int64_t c = 0; c < b; c++)
            for (int64_t j = c * P; j < (c + 1) * P; j++) yi[j] = (xi[j] - mean[c]) * scale[c] + shift[c];
    }
}

/* Evaluation, by statistics that don't depend on x. */
KERNEL NAME(evaluate)(const REAL *x, const REAL *weight, const REAL *bias, REAL *y, const REAL *mean, const REAL *var,
                      int64_t N, int64_t C, int64_t P, double eps) {
    for (int64_t at = 0; at < C; at += BLOCK)
        NAME(channel_normalise)(x + at * P, y + at * P, N, C, P, C - at < BLOCK ? C - at : BLOCK, mean + at, var + at, eps,
                                weight ? weight + at : 0, bias ? bias + at : 0);
}

/* What a training step leaves in `kept` for its backward pass: five times C values, the mean and the variance that it
   normalised by, the weight, the running mean and the running variance of before; the batch's share; the least variance.
   The second is without the least variance. */

/* Batch norm: the share is 1, there is no least variance, and what was before plays no part. */
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
            kept[2 * C + at + c] = weight ? weight[at + c] : 1;
            kept[3 * C + at + c] = kept[4 * C + at + c] = 0;
            running_mean[at + c] += (REAL)(mom * (m[c] - running_mean[at + c]));
            if (n > 1) running_var[at + c] += (REAL)(mom * (v[c] * n / (n - 1) - running_var[at + c]));
        }
        NAME(channel_normalise)(x + at * P, y + at * P, N, C, P, b, mean, var, eps, weight ? weight + at : 0,
                                bias ? bias + at : 0);
    }
    kept[5 * C] = 1;
    kept[5 * C + 1] = 0;
    *batches += 1;
}

/* Running batch norm: `RunningBatchNorm.track` and the normalisation. `images` are N but where N counts their positions
   too. */
KERNEL NAME(running_batch_norm)(const REAL *x, const REAL *weight, const REAL *bias, REAL *y, REAL *kept,
                                REAL *running_mean, REAL *running_var, REAL *unclamped_var, REAL *count, int64_t *seen,
                                int64_t N, int64_t C, int64_t P, double images, double alpha, double clamp_images,
                                double clamp_var, double eps) {
    double m[BLOCK], v[BLOCK];
    double values = (1 - alpha) * *count + alpha * (double)(N * P), a = alpha * (double)(N * P) / values;
    REAL before = (REAL)((double)*seen < clamp_images ? clamp_var : 0), floor;
    *count = (REAL)values;
    *seen += (int64_t)images;
    floor = (REAL)((double)*seen < clamp_images ? clamp_var : 0);
    for (int64_t at = 0; at < C; at += BLOCK) {
        int64_t b = C - at < BLOCK ? C - at : BLOCK;
        REAL *mean = kept + at, *var = kept + C + at, *used = running_var + at;
        NAME(channel_moments)(x + at * P, N, C, P, b, m, v);
        for (int64_t c = 0; c < b; c++) {
            REAL old_mean = running_mean[at + c], old = before > 0 && used[c] == before ? unclamped_var[at + c] : used[c];
            double d = m[c] - old_mean;                                                     /* `merge_moments` */
            kept[2 * C + at + c] = weight ? weight[at + c] : 1;
            kept[3 * C + at + c] = old_mean;
            kept[4 * C + at + c] = old;
            mean[c] = running_mean[at + c] = (REAL)(a < 1 ? old_mean + a * d : m[c]);
            var[c] = unclamped_var[at + c] = (REAL)(a < 1 ? old + a * (v[c] - old) + a * (1 - a) * d * d : v[c]);
            used[c] = var[c] < floor ? floor : var[c];
        }
        NAME(channel_normalise)(x + at * P, y + at * P, N, C, P, b, mean, used, eps, weight ? weight + at : 0,
                                bias ? bias + at : 0);
    }
    kept[5 * C] = (REAL)a;
    kept[5 * C + 1] = floor;
}

/* The sums of g and of g (x - mean) over a block of channels. */
static inline void NAME(channel_sums)(const REAL *g, const REAL *x, const REAL *mean, int64_t N, int64_t C, int64_t P,
                                      int64_t b, double *total, double *dot) {
    for (int64_t c = 0; c < b; c++) total[c] = dot[c] = 0;
    for (int64_t i = 0; i < N; i++) {
        const REAL *gi = g + i * C * P, *xi = x + i * C * P;
        if (P == 1) for (int64_t c = 0; c < b; c++) {
            total[c] += gi[c];
            dot[c] += gi[c] * (double)(xi[c] - mean[c]);
        } else for (int64_t c = 0; c < b; c++) {
            total[c] += NAME(sum)(gi + c * P, P, 0);
            dot[c] += NAME(product)(gi + c * P, xi + c * P, P, mean[c]);
        }
    }
}

/* Both backward: gx = weight / s [g - a mean(g) - a xhat mean(g xhat)], the last term only where no least variance holds.

   With `grad_mean` and `grad_dot`, of C values each and otherwise null, gx = weight / s [g - G - xhat D]: the means are
   averaged over steps (`norms/averaged.py`), but where a gradient is not finite the averages stay. */
KERNEL NAME(channel_backward)(const REAL *g, const REAL *x, const REAL *kept, REAL *gx, REAL *gweight, REAL *gbias,
                              REAL *grad_mean, REAL *grad_dot, int64_t N, int64_t C, int64_t P, double eps) {
    double total[BLOCK], dot[BLOCK], a = kept[5 * C], n = (double)(N * P);
    REAL scale[BLOCK], shift[BLOCK], through_var[BLOCK], floor = kept[5 * C + 1];
    int finite = 1;
    if (grad_mean) for (int64_t at = 0; at < C && finite; at += BLOCK) {
        int64_t b = C - at < BLOCK ? C - at : BLOCK;
        NAME(channel_sums)(g + at * P, x + at * P, kept + at, N, C, P, b, total, dot);
        for (int64_t c = 0; c < b; c++) finite &= total[c] - total[c] == 0 && dot[c] - dot[c] == 0;
    }
    for (int64_t at = 0; at < C; at += BLOCK) {
        int64_t b = C - at < BLOCK ? C - at : BLOCK;
        const REAL *mean = kept + at, *var = kept + C + at, *weight = kept + 2 * C + at;
        if (!grad_mean || C > BLOCK || !finite)                                     /* else they are there already */
            NAME(channel_sums)(g + at * P, x + at * P, mean, N, C, P, b, total, dot);
        for (int64_t c = 0; c < b; c++) {
            double rstd = 1 / sqrt((var[c] < floor ? floor : var[c]) + eps), by_mean = a * total[c] / n;
            double by_var = a * dot[c] * rstd / n;
            if (gweight) gweight[at + c] = (REAL)(dot[c] * rstd);
            if (gbias) gbias[at + c] = (REAL)total[c];
            if (grad_mean) {
                by_mean = (REAL)((1 - a) * grad_mean[at + c] + by_mean);
                by_var = (REAL)((1 - a) * grad_dot[at + c] + by_var);
                if (finite) {
                    grad_mean[at + c] = (REAL)by_mean;
                    grad_dot[at + c] = (REAL)by_var;
                }
            }
            scale[c] = (REAL)(weight[c] * rstd);
            shift[c] = (REAL)by_mean;
            through_var[c] = (REAL)(var[c] < floor ? 0 : by_var * rstd);
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
        double m = x[0] + NAME(sum)(x, C * P, x[0]) / (double)(C * P);
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
                double t = NAME(sum)(gc, P, 0), d = NAME(product)(gc, xc, P, mean), w = weight ? weight[at] : 1;
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
