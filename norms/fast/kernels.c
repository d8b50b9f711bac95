/* The norms' training steps on a CPU, one function for the forward and one for the backward pass of each.

   At batch size 2 the time of a norm is that of the calls it makes, some twenty of torch's for running batch norm.
   Here it is one each way. The formulas are those of the norms' definitions one folder up, and of their derivatives in
   `channels.py`, `images.py`, `pairs.py` and `weights.py`; the tests hold them together. Everything is contiguous; sums
   are of double precision, and means are taken about a first value, so that they are exact where all are equal. The file
   includes itself, once for each of the two types, and needs no header but C's own. */

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

/* --- weights: N filters of P values each; kept is (3, N): s, 1 / (s + eps), and 1 / s, or 0 where s is 0 ------------- */

/* y = (w - m) / (s + eps) */
KERNEL NAME(standardize)(const REAL *w, REAL *y, REAL *kept, int64_t N, int64_t P, double eps) {
    for (int64_t k = 0; k < N; k++, w += P, y += P) {
        double m = w[0] + NAME(sum)(w, P, w[0]) / (double)P, s = sqrt(NAME(squares)(w, P, m) / (double)P);
        REAL mean = (REAL)m, r = (REAL)(1 / (s + eps));
        kept[k] = (REAL)s;
        kept[N + k] = r;
        kept[2 * N + k] = s == 0 ? 0 : (REAL)(1 / s);
        for (int64_t j = 0; j < P; j++) y[j] = (w[j] - mean) * r;
    }
}

/* gw = [g - mean(g)] / (s + eps) - y mean(g y) / s */
KERNEL NAME(standardize_backward)(const REAL *g, const REAL *y, const REAL *kept, REAL *gw, int64_t N, int64_t P) {
    for (int64_t k = 0; k < N; k++, g += P, y += P, gw += P) {
        REAL mean = (REAL)(NAME(sum)(g, P, 0) / (double)P), r = kept[N + k];
        REAL slope = (REAL)(NAME(product)(g, y, P, 0) / (double)P * kept[2 * N + k]);
        for (int64_t j = 0; j < P; j++) gw[j] = (g[j] - mean) * r - y[j] * slope;
    }
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

/* --- statistics over the images, then an image's own: the pairs of `norms/rivals/pairs.py` --------------------------

       z = (x - m) s per channel        y = (z - mu) rho weight + bias        mu, rho per image and group

   s is 1 / sqrt(variance + eps), and so is rho. Both rest on the moments of rows, the P values of a channel in an image:
   r their mean and q = sum (x - r)^2. Over N images, and over the C / G channels of a group,

       m = mean(r)             var = sum(q + P (r - m)^2) / (N P)
       mu = mean((r - m) s)    var = sum(s^2 q + P ((r - m) s - mu)^2) / (C / G P)

   All terms are positive: nothing cancels. So x is read once for all statistics and once to be normalised, by

       y = (x - k) s rho weight + bias        k = m + mu / s, the row's value that becomes the bias

   As in the definition m is subtracted first: of the two together nothing but the digits of m is left where |m| s is
   large.

   x is (N, C, P), or where `last` (N, P, C). A step leaves in `kept`, which is of double precision, 6 C values, the first
   five as above and s; the batch's share and the least variance; N G each of mu and rho; N C each of r and q. */

/* k - m; 0 where the variance is infinite, for there z is 0 everywhere */
static inline double NAME(offset)(double mu, double s) { return s > 0 ? mu / s : 0; }

static inline void NAME(row_moments)(const REAL *x, int64_t N, int64_t C, int64_t P, int64_t last, double *r,
                                     double *q) {
    if (P == 1) for (int64_t k = 0; k < N * C; k++) {
        r[k] = x[k];
        q[k] = 0;
    } else if (!last) for (int64_t k = 0; k < N * C; k++) {
        const REAL *row = x + k * P;
        r[k] = row[0] + NAME(sum)(row, P, row[0]) / (double)P;
        q[k] = NAME(squares)(row, P, r[k]);
    } else for (int64_t i = 0; i < N; i++) for (int64_t at = 0; at < C; at += BLOCK) {
        int64_t b = C - at < BLOCK ? C - at : BLOCK;
        const REAL *xi = x + i * P * C + at;
        double first[BLOCK], m[BLOCK], s[BLOCK];
        for (int64_t c = 0; c < b; c++) {
            first[c] = xi[c];
            m[c] = s[c] = 0;
        }
        for (int64_t j = 0; j < P; j++) for (int64_t c = 0; c < b; c++) m[c] += xi[j * C + c] - first[c];
        for (int64_t c = 0; c < b; c++) m[c] = first[c] + m[c] / (double)P;
        for (int64_t j = 0; j < P; j++) for (int64_t c = 0; c < b; c++) {
            double d = xi[j * C + c] - m[c];
            s[c] += d * d;
        }
        for (int64_t c = 0; c < b; c++) {
            r[i * C + at + c] = m[c];
            q[i * C + at + c] = s[c];
        }
    }
}

/* The mean and the variance of each channel, from its rows. */
static inline void NAME(moments_of_rows)(const double *r, const double *q, int64_t N, int64_t C, int64_t P, double *mean,
                                         double *var) {
    for (int64_t c = 0; c < C; c++) mean[c] = var[c] = 0;
    for (int64_t i = 0; i < N; i++) for (int64_t c = 0; c < C; c++) mean[c] += r[i * C + c] - r[c];
    for (int64_t c = 0; c < C; c++) mean[c] = r[c] + mean[c] / (double)N;
    for (int64_t i = 0; i < N; i++) for (int64_t c = 0; c < C; c++) {
        double d = r[i * C + c] - mean[c];
        var[c] += q[i * C + c] + (double)P * d * d;
    }
    for (int64_t c = 0; c < C; c++) var[c] /= (double)(N * P);
}

/* The groups' mu and rho from the rows, and y. */
static inline void NAME(pair_normalise)(const REAL *x, const REAL *weight, const REAL *bias, REAL *y, int64_t N, int64_t C,
                                        int64_t P, int64_t last, int64_t G, const double *m, const double *s,
                                        const double *r, const double *q, double *mu, double *rho, double eps) {
    int64_t D = C / G;
    for (int64_t i = 0; i < N; i++, r += C, q += C, mu += G, rho += G, x += C * P, y += C * P) {
        for (int64_t g = 0; g < G; g++) {
            int64_t from = g * D, to = from + D;
            double first = (r[from] - m[from]) * s[from], mean = 0, var = 0;
            for (int64_t c = from; c < to; c++) mean += (r[c] - m[c]) * s[c] - first;
            mean = first + mean / (double)D;
            for (int64_t c = from; c < to; c++) {
                double d = (r[c] - m[c]) * s[c] - mean;
                var += s[c] * s[c] * q[c] + (double)P * d * d;
            }
            mu[g] = mean;
            rho[g] = D * P == 1 ? 0 : 1 / sqrt(var / (double)(D * P) + eps);    /* a single value becomes the bias */
        }
        for (int64_t at = 0; at < C; at += BLOCK) {
            int64_t b = C - at < BLOCK ? C - at : BLOCK;
            double off[BLOCK], scale[BLOCK];
            REAL mean[BLOCK], rest[BLOCK], slope[BLOCK], shift[BLOCK];
            for (int64_t c = 0; c < b; c++) {
                int64_t of = at + c, g = of / D;
                off[c] = NAME(offset)(mu[g], s[of]);
                scale[c] = s[of] * rho[g] * (weight ? weight[of] : 1);
                mean[c] = (REAL)m[of];
                rest[c] = (REAL)(m[of] - mean[c] + off[c]);
                slope[c] = (REAL)scale[c];
                shift[c] = bias ? bias[of] : 0;
            }
            if (P == 1) for (int64_t c = 0; c < b; c++)
                y[at + c] = (REAL)((x[at + c] - m[at + c] - off[c]) * scale[c] + shift[c]);
            else if (last) for (int64_t j = 0; j < P; j++) {
                const REAL *xj = x + j * C + at;
                REAL *yj = y + j * C + at;
                for (int64_t c = 0; c < b; c++) yj[c] = (xj[c] - mean[c] - rest[c]) * slope[c] + shift[c];
            } else for (int64_t c = 0; c < b; c++) {
                const REAL *xc = x + (at + c) * P;
                REAL *yc = y + (at + c) * P;
                for (int64_t j = 0; j < P; j++) yc[j] = (xc[j] - mean[c] - rest[c]) * slope[c] + shift[c];
            }
        }
    }
}

/* Evaluation; `kept` is of 3 C + 2 N (G + C) values, for what is needed on the way. */
KERNEL NAME(pair_evaluate)(const REAL *x, const REAL *weight, const REAL *bias, REAL *y, double *kept, const REAL *mean,
                           const REAL *var, int64_t N, int64_t C, int64_t P, int64_t last, int64_t G, double eps) {
    double *m = kept, *s = kept + C, *mu = kept + 2 * C, *rho = mu + N * G, *r = rho + N * G, *q = r + N * C;
    NAME(row_moments)(x, N, C, P, last, r, q);
    for (int64_t c = 0; c < C; c++) {
        m[c] = mean[c];
        s[c] = 1 / sqrt(var[c] + eps);
    }
    NAME(pair_normalise)(x, weight, bias, y, N, C, P, last, G, m, s, r, q, mu, rho, eps);
}

KERNEL NAME(batch_pair)(const REAL *x, const REAL *weight, const REAL *bias, REAL *y, double *kept, REAL *running_mean,
                        REAL *running_var, int64_t *batches, int64_t N, int64_t C, int64_t P, int64_t last, int64_t G,
                        double mom, double eps) {
    double *m = kept, *v = kept + C, *s = kept + 5 * C, *mu = kept + 6 * C + 2, *rho = mu + N * G, *r = rho + N * G;
    double *q = r + N * C, n = (double)(N * P);
    NAME(row_moments)(x, N, C, P, last, r, q);
    NAME(moments_of_rows)(r, q, N, C, P, m, v);
    for (int64_t c = 0; c < C; c++) {
        running_mean[c] += (REAL)(mom * (m[c] - running_mean[c]));
        if (n > 1) running_var[c] += (REAL)(mom * (v[c] * n / (n - 1) - running_var[c]));
        kept[2 * C + c] = weight ? weight[c] : 1;
        kept[3 * C + c] = kept[4 * C + c] = 0;
        s[c] = 1 / sqrt(v[c] + eps);
    }
    kept[6 * C] = 1;
    kept[6 * C + 1] = 0;
    *batches += 1;
    NAME(pair_normalise)(x, weight, bias, y, N, C, P, last, G, m, s, r, q, mu, rho, eps);
}

KERNEL NAME(running_pair)(const REAL *x, const REAL *weight, const REAL *bias, REAL *y, double *kept, REAL *running_mean,
                          REAL *running_var, REAL *unclamped_var, REAL *count, int64_t *seen, int64_t N, int64_t C,
                          int64_t P, int64_t last, int64_t G, double images, double alpha, double clamp_images,
                          double clamp_var, double eps) {
    double *m = kept, *v = kept + C, *s = kept + 5 * C, *mu = kept + 6 * C + 2, *rho = mu + N * G, *r = rho + N * G;
    double *q = r + N * C, values = (1 - alpha) * *count + alpha * (double)(N * P), a = alpha * (double)(N * P) / values;
    REAL before = (REAL)((double)*seen < clamp_images ? clamp_var : 0), floor;
    *count = (REAL)values;
    *seen += (int64_t)images;
    floor = (REAL)((double)*seen < clamp_images ? clamp_var : 0);
    NAME(row_moments)(x, N, C, P, last, r, q);
    NAME(moments_of_rows)(r, q, N, C, P, m, v);
    for (int64_t c = 0; c < C; c++) {
        REAL old_mean = running_mean[c], used = running_var[c];
        REAL old = before > 0 && used == before ? unclamped_var[c] : used;
        double d = m[c] - old_mean;                                                         /* `merge_moments` */
        kept[2 * C + c] = weight ? weight[c] : 1;
        kept[3 * C + c] = old_mean;
        kept[4 * C + c] = old;
        m[c] = running_mean[c] = (REAL)(a < 1 ? old_mean + a * d : m[c]);
        v[c] = unclamped_var[c] = (REAL)(a < 1 ? old + a * (v[c] - old) + a * (1 - a) * d * d : v[c]);
        running_var[c] = v[c] < floor ? floor : unclamped_var[c];
        s[c] = 1 / sqrt(running_var[c] + eps);
    }
    kept[6 * C] = a;
    kept[6 * C + 1] = floor;
    NAME(pair_normalise)(x, weight, bias, y, N, C, P, last, G, m, s, r, q, mu, rho, eps);
}

/* The sums over an image's rows of g and of g (x - k). */
static inline void NAME(row_products)(const REAL *g, const REAL *x, const double *k, int64_t C, int64_t P, int64_t last,
                                      double *total, double *dot) {
    if (P == 1) for (int64_t c = 0; c < C; c++) {
        total[c] = g[c];
        dot[c] = g[c] * (x[c] - k[c]);
    } else if (!last) for (int64_t c = 0; c < C; c++) {
        const REAL *gc = g + c * P, *xc = x + c * P;
        double t = 0, d = 0, kc = k[c];
#pragma omp simd reduction(+ : t, d)
        for (int64_t j = 0; j < P; j++) {
            t += gc[j];
            d += gc[j] * (xc[j] - kc);
        }
        total[c] = t;
        dot[c] = d;
    } else for (int64_t at = 0; at < C; at += BLOCK) {
        int64_t b = C - at < BLOCK ? C - at : BLOCK;
        double t[BLOCK] = {0}, d[BLOCK] = {0};
        for (int64_t j = 0; j < P; j++) for (int64_t c = 0; c < b; c++) {
            t[c] += g[j * C + at + c];
            d[c] += g[j * C + at + c] * (x[j * C + at + c] - k[at + c]);
        }
        for (int64_t c = 0; c < b; c++) {
            total[at + c] = t[c];
            dot[at + c] = d[c];
        }
    }
}

/* Both backward. With h = g weight and xi = (x - k) s rho, what the group has made of x, means over the group, and then
   over the channel's images and positions:

       dL/dz = rho [h - mean(h) - xi mean(h xi)]        dL/dx = s [dL/dz - a mean(dL/dz) - a z mean(dL/dz z)]

   The second means' sums follow from those over rows, so that g and x are read once for all sums, and once to be made gx.
   `share` multiplies a: 0 where the channels' statistics are constants. `grad_mean` and `grad_dot` are as in
   `channel_backward`. `work` is of 7 C + 2 N G values. */
KERNEL NAME(pair_backward)(const REAL *g, const REAL *x, const double *kept, double *work, REAL *gx, REAL *gweight,
                           REAL *gbias, REAL *grad_mean, REAL *grad_dot, int64_t N, int64_t C, int64_t P, int64_t last,
                           int64_t G, double share) {
    const double *m = kept, *var = kept + C, *weight = kept + 2 * C, *s = kept + 5 * C, *mu = kept + 6 * C + 2;
    const double *rho = mu + N * G, *r = rho + N * G, *q = r + N * C;
    double *k = work, *total = work + C, *dot = work + 2 * C, *sum = work + 3 * C, *product = work + 4 * C;
    double *all_totals = work + 5 * C, *all_dots = work + 6 * C, *mean_h = work + 7 * C, *mean_h_xi = mean_h + N * G;
    double a = share * kept[6 * C], floor = kept[6 * C + 1], n = (double)(N * P), of_row = (double)P;
    double passes = a == 1 && n == 1 ? 0 : 1;               /* a single value is its mean: exactly nothing is left of it */
    int64_t D = C / G;
    int finite = 1;
    for (int64_t c = 0; c < C; c++) sum[c] = product[c] = all_totals[c] = all_dots[c] = 0;
    for (int64_t i = 0; i < N; i++) {
        for (int64_t h = 0; h < G; h++) for (int64_t c = h * D; c < (h + 1) * D; c++) 
            k[c] = m[c] + NAME(offset)(mu[i * G + h], s[c]);
        NAME(row_products)(g + i * C * P, x + i * C * P, k, C, P, last, total, dot);
        for (int64_t h = 0; h < G; h++) {
            double scale = rho[i * G + h], mean = mu[i * G + h], by_mean = 0, by_xi = 0;
            for (int64_t c = h * D; c < (h + 1) * D; c++) {
                by_mean += weight[c] * total[c];
                by_xi += weight[c] * s[c] * dot[c];
            }
            mean_h[i * G + h] = by_mean = by_mean / ((double)D * of_row);
            mean_h_xi[i * G + h] = by_xi = by_xi * scale / ((double)D * of_row);
            for (int64_t c = h * D; c < (h + 1) * D; c++) {
                double d = r[i * C + c] - k[c], t = s[c] * scale * by_xi, w = weight[c];
                double of_g = scale * (w * total[c] - of_row * (by_mean + t * d));      /* of dL/dz, and with x - k */
                double of_gx = scale * (w * dot[c] - of_row * by_mean * d - t * (q[i * C + c] + of_row * d * d));
                sum[c] += of_g;
                product[c] += s[c] * of_gx + mean * of_g;
                all_totals[c] += total[c];
                all_dots[c] += s[c] * scale * dot[c];
            }
        }
    }
    for (int64_t c = 0; c < C; c++) {
        if (gweight) gweight[c] = (REAL)all_dots[c];
        if (gbias) gbias[c] = (REAL)all_totals[c];
        finite &= sum[c] - sum[c] == 0 && product[c] - product[c] == 0;
    }
    for (int64_t c = 0; c < C; c++) {                               /* from here on what is taken away from dL/dz */
        sum[c] *= a / n;
        product[c] *= a / n;
        if (grad_mean) {
            sum[c] = (REAL)((1 - a) * grad_mean[c] + sum[c]);
            product[c] = (REAL)((1 - a) * grad_dot[c] + product[c]);
            if (finite) {
                grad_mean[c] = (REAL)sum[c];
                grad_dot[c] = (REAL)product[c];
            }
        }
        product[c] = var[c] < floor ? 0 : product[c] * s[c];
    }
    for (int64_t i = 0; i < N; i++) for (int64_t at = 0; at < C; at += BLOCK) {
        int64_t b = C - at < BLOCK ? C - at : BLOCK;
        const REAL *gi = g + i * C * P, *xi = x + i * C * P;
        double off[BLOCK], by_g[BLOCK], by_one[BLOCK], by_x[BLOCK];
        REAL *to = gx + i * C * P, mean[BLOCK], rest[BLOCK], scale[BLOCK], shift[BLOCK], slope[BLOCK];
        for (int64_t c = 0; c < b; c++) {
            int64_t of = at + c, h = i * G + of / D;
            off[c] = NAME(offset)(mu[h], s[of]);
            by_g[c] = passes * s[of] * rho[h] * weight[of];
            by_one[c] = passes * s[of] * (rho[h] * mean_h[h] + sum[of] + off[c] * product[of]);
            by_x[c] = passes * s[of] * (s[of] * rho[h] * rho[h] * mean_h_xi[h] + product[of]);
            mean[c] = (REAL)m[of];
            rest[c] = (REAL)(m[of] - mean[c] + off[c]);
            scale[c] = (REAL)by_g[c];
            shift[c] = (REAL)by_one[c];
            slope[c] = (REAL)by_x[c];
        }
        if (P == 1) for (int64_t c = 0; c < b; c++)
            to[at + c] = (REAL)(gi[at + c] * by_g[c] - by_one[c] - (xi[at + c] - m[at + c] - off[c]) * by_x[c]);
        else if (last) for (int64_t j = 0; j < P; j++) {
            const REAL *gj = gi + j * C + at, *xj = xi + j * C + at;
            REAL *tj = to + j * C + at;
            for (int64_t c = 0; c < b; c++) tj[c] = gj[c] * scale[c] - shift[c] - (xj[c] - mean[c] - rest[c]) * slope[c];
        } else for (int64_t c = 0; c < b; c++) {
            const REAL *gc = gi + (at + c) * P, *xc = xi + (at + c) * P;
            REAL *tc = to + (at + c) * P;
            for (int64_t j = 0; j < P; j++) tc[j] = gc[j] * scale[c] - shift[c] - (xc[j] - mean[c] - rest[c]) * slope[c];
        }
    }
}

#endif
