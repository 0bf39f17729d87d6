// SPDX-License-Identifier: MIT
/*
 * kern: numbers in, numbers out.
 *
 * A back end ("ref", "cpu", "cuda") is a table of ops over buffers. Opening one fills the table with the plain C reference
 * (kernels/ref), then one short function per back end replaces the entries that it beats: a missing fast kernel is slow, never
 * absent. The reference is the specification: naive, one loop nest an op, kept for ever.
 *
 * Names of sizes: R rows (one row = one network evaluation's input), T tokens a row, C width, H heads, D head dim (C = H*D),
 * P patch side, I input side (T = (I/P)^2), ld = leading dimension in elements.
 *
 * Buffers come from k->alloc (zeroed, 64-byte aligned). They are device pointers: the host may add offsets to them, only k->upload
 * and k->download may move their contents (on the CPU back ends they happen to be host memory). "act" buffers hold
 * elements of k->act (KERN_F32 or KERN_BF16), the residual stream's elements of k->stream, the pictures that convolutions take and give
 * elements of k->picture; everything else is float32: conditioning, modulation, images.
 *
 * Invariance (the rule that makes "same seed, same bytes" true): an op's result for a row depends on that row's inputs, never on
 * R, on the row's place, on the thread count or on other rows. Matrix products therefore run in units of a fixed number of lines that
 * was given when the layer was made, whatever the number of rows.
 *
 * Forward ops take nullable `save_*` outputs (what a backward pass will want); NULL costs nothing.
 *
 * Errors: 0, or a negative KERN_E*, with a text in k->why. Ops do not allocate (linear_new, alloc and kern_open do).
 * Thread: one thread at a time per struct kern; the lanes that k->rows passes to its callback are struct kern of their own.
 */
#ifndef KERN_H
#define KERN_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KERN_MAX_TOKENS 4096 // attention: T is 1 .. this
enum kern_status { KERN_OK = 0, KERN_ENOMEM = -1, KERN_EUNSUPPORTED = -7, KERN_EDEVICE = -9, KERN_ETHREAD = -14 };
enum kern_dtype { KERN_F32, KERN_BF16, KERN_F16, KERN_F8 }; // F8 (e4m3) only inside back ends
enum kern_act { KERN_NONE, KERN_GELU_TANH, KERN_SILU };

// Vectors (one line a row: timestep, conditioning, modulation) are multiplied in units of KERN_VEC lines: buffers of such layers hold
// a multiple of KERN_VEC lines, the padding is computed and ignored.
#define KERN_VEC 8
#define KERN_ROUND_UP(n, m) (((n) + (m) - 1) / (m) * (m))

#define KERN_COMM_ID 128   // bytes
#define KERN_CROSS_KEYS 16 // keys a row that cross_attention takes

struct kern;
struct kern_linear; // a linear layer ready to run: weights reordered, primitives made
struct kern_graph;  // recorded work

struct kern_linear_spec {
    int out, in;              // y[unit, out] = act(x[unit, in] w^T + b)
    int unit;                 // lines a unit: T for token matrices, KERN_VEC for vectors
    enum kern_act act;
    enum kern_dtype w_store;  // element type of the w that is given
    bool x_f32, y_f32;        // x (y) is float32 even when k->act is not. Both true: the product itself runs in float32
    bool y_stream;            // with y_f32: y is the residual stream, elements of k->stream
    bool x_fp8;               // where the back end has gate_norm_fp8: x comes from it, from norm_modulate_fp8, from attention_fp8 or from a layer with y_for
    const struct kern_linear *y_for; // NULL, or where the back end has gate_norm_fp8: y in the form that this layer with x_fp8 reads
};

/*
 * row_update: the one op behind every sampler.
 *
 * A slot is one image in the making: KERN_COLS columns of `numel` floats, column j of slot s at cols + (s*KERN_COLS + j)*numel.
 * After an evaluation each slot's columns move by a small matrix: dst_a <- sum_j c[a][j]*col_j + c_out[a]*F + c_clip[a]*D +
 * c_noise[a]*Z, all assignments reading the OLD columns. Terms whose coefficient is exactly 0 are not read (0 x NaN does not
 * happen). Terms are added in index order (columns, F, D, Z) with fmaf, starting from 0.
 * F is the guided network output of element e in channel ch = e / (I*I):
 *   F = out[u] + scale*(out[c] - out[u])   for ch < guided and row u >= 0,   else out[rest]
 * where out[r] is row r of the network's output (first `numel` floats of each row used, rows `out_ld` floats apart).
 * D is a clipped estimate of the data, clamp(sum_j clip.c[j]*col_j + clip.c_out*F, -1, 1), a NaN staying one.
 * Z is a standard normal: noise != NULL reads noise[slot*numel + e], else philox_normal(seed, image, draw, e) (kernels/philox.h).
 * learned: Z is first multiplied by kern_expf(log_lo + f*log_span) (kernels/exp.h), f = (v + 1)/2, v the guided output of element
 * numel + e, in the second half of the network's channels (`guided` counts output channels and may reach there); out_ld >= 2*numel.
 */
#define KERN_COLS 12
#define KERN_ASSIGN 3
struct kern_assign {
    int dst;            // column
    float c[KERN_COLS], c_out, c_clip, c_noise;
};
struct kern_clip { float c[KERN_COLS], c_out; };
struct kern_row_update {
    int slot;
    int row_c, row_u, row_rest; // rows of the network's output; -1: none (row_u -1: no guidance; all -1: c_out must be 0)
    float scale;
    int guided;                 // leading channels that are guided
    uint64_t seed;
    uint32_t image, draw;       // Philox stream: seed_index + image index, and the solver's draw number
    int learned;                // 1: the network's second half of channels scales the noise
    float log_lo, log_span;     // of the standard deviation, for learned
    struct kern_clip clip;      // of D
    int n;
    struct kern_assign assign[KERN_ASSIGN];
};
struct kern_gather { int slot, col; float scale; };     // network input row = scale * column
struct kern_norm {  // one slot's error norm: sqrt(mean_e((sum_j c[j]*col_j / (atol + rtol*max(|col_a|, |col_b|)))^2)), summed in double
    int slot, a, b;  // b may equal a
    float c[KERN_COLS];
    double atol, rtol;
};

/*
 * Convolutions of pictures [H, W, in], channels last, elements of k->picture. Zero padding throughout:
 *   KERN_CONV       side 1 or 3, stride 1, `side/2` zeros all round                         -> [H, W, out]
 *   KERN_CONV_DOWN  side 3, stride 2, one row of zeros below and one column to the right    -> [H/2, W/2, out]   (H and W even)
 *   KERN_CONV_UP    every pixel twice in both directions, then KERN_CONV with side 3         -> [2H, 2W, out]
 * The input may be normalised on the way in (see group_norm): v = x*scale[c] + shift[c], then act; the zeros are put around v, not x.
 * The output comes in strips of whole lines, each of which can be computed at any time and in any order: a large picture
 * may be spread over several calls. How lines are cut into strips depends on the layer only. A call takes several pictures, one behind
 * the other, and the same strips of each; a picture's bytes depend neither on the others nor on their number.
 */
enum kern_conv_kind { KERN_CONV, KERN_CONV_DOWN, KERN_CONV_UP };
struct kern_conv;
struct kern_conv_spec {
    enum kern_conv_kind kind;
    int out, in, side, height, width; // height and width of the input
    bool norm;               // multiply and shift the input
    enum kern_act act;       // of the input: KERN_NONE or KERN_SILU
    bool add;                // add to what y holds
    bool x_f32, y_f32;       // x (y) is float32 even where k->picture is not
};
#define KERN_NORM_PARTS 64   // parts of a picture whose sums group_norm adds up
struct kern_wide;            // attention of one wide head over a picture's pixels, ready to run

/*
 * Training. dNAME is the gradient of the loss with respect to NAME: of NAME's type and shape, but gradients of the residual stream and of
 * parameters are always float32. "+=" outputs are added to, all others are written. Sums run in an order that depends on sizes only.
 *
 * kern_mix: a noised image. x0 = Z(seed, image, draw) (as row_update's), xt = fmaf(a0, x0, a1*x1).
 * kern_loss: one image's loss over the first `numel` floats of its network output:
 *   residual e = c_out*out + c1*x1 + c0*x0,  loss[0] = weight*mean(e^2),  dout = grad*weight*2*c_out*e/numel
 * hybrid: out holds 2*numel floats; the second half v are the learned-range variance's logits (Nichol and Dhariwal 2021) and
 *   f = (v + 1)/2, lv = log_lo + f*log_span, x1hat = recip*xt - recip_m1*out, d = posterior*(x1 - x1hat)
 *   loss[1] = mean KL(N(., exp(lv_true)) || N(., exp(lv))) in bits, means d apart;   first: instead the decoder's negative log-likelihood in bits of x1
 *   on 256 levels under N(x1 - d, exp(lv)), tanh approximation of the normal CDF as DiT's code. Its gradient reaches v only (x1hat is held).
 * kern_adamw: torch.optim.AdamW's update (Loshchilov and Hutter 2019), element by element as kernels/adamw.h computes it: the same bits everywhere.
 */
struct kern_mix { uint64_t seed; uint32_t image, draw; float a1, a0; };
struct kern_loss {
    float c_out, c1, c0, weight, grad;
    bool hybrid, first;
    float log_lo, log_span, lv_true, recip, recip_m1, posterior;
};
/*
 * kern_norm_back: of gate_norm_backward; what is not set is NULL. Of gate_norm and, with h, dh, gate and dgate NULL, of norm_modulate. dx [R, T, C]: in,
 * the gradient of x as later ops see it; out, plus what comes through y. dh = gate*dx, and dh_sum [C] its sums over all lines (+= where add). At ptr +
 * r*ld: dshift = sum_t dy, dscale = sum_t dy*xhat, dgate = sum_t dx*h (nullable); where ld is 0 these run over all rows and are added to what is there.
 * y, with shift: what the forward op wrote, made again from xhat. dy NULL: y was NULL, and xhat, rstd, dshift and dscale are not used.
 */
struct kern_norm_back {
    float *dx;
    void *dh, *y;
    float *dh_sum, *dshift, *dscale, *dgate;
    const void *dy, *xhat, *h;
    const float *rstd, *gate, *shift, *scale;
    int ld, R, T, C;
    bool add;
};
#define KERN_SUM_LINES 256
#define KERN_MAX_EMA 4
struct kern_adamw { // doubles, as 1 - 0.9999 in float32 is 2e-4 off
    double lr, beta1, beta2, eps, decay;
    double bias1, bias2;         // 1 - beta^step, step counted from 1
    double grad_scale, max_norm; // g is multiplied by grad_scale; then by min(1, max_norm/(norm + 1e-6)) unless max_norm is 0
    int n_ema;
    double ema[KERN_MAX_EMA];    // decays: e = decay*e + (1 - decay)*p, with the new p
};

typedef int kern_rows_fn(struct kern *lane, void *ctx, int r0, int n, int s0);

// in k->act; float32 factors of 10 bits; e4m3 behind norms and in MLPs, with a scale a token and a scale an output, or fixed scales (calibrate)
enum kern_product { KERN_PRODUCT_ACT, KERN_PRODUCT_TF32, KERN_PRODUCT_FP8, KERN_PRODUCT_FP8_STATIC };

struct kern_config {
    const char *backend;        // "ref", "cpu", "cuda", or "auto" (see kern_auto)
    int device;                 // cuda: which GPU, from 0
    bool any_bits;              // cuda: each batch size may sum in an order of its own: faster, but rows then depend on the batch's size
    bool exact_stream;          // keep the residual stream in float32 where the back end would take float16 (see struct kern)
    enum kern_dtype act;        // KERN_F32; KERN_BF16 where the processor multiplies it; KERN_F16 on cuda (and ref): else KERN_EUNSUPPORTED
    enum kern_product product;  // cuda: TF32 goes with KERN_F32, FP8 with KERN_BF16 on Hopper
    int threads;                // 0: what affinity and the cgroup quota allow
    int nice;                   // added to the pool threads' niceness
    const char *cache;          // cuda: folder for what is found out by trying (the fastest products), made when needed; NULL: none. Not kept
};

struct kern {
    const char *name;           // "ref", "cpu", "cuda"
    char device[96];            // for people: "AMD EPYC, 2 threads, AVX-512 BF16"
    enum kern_dtype act;
    // The residual stream's type: KERN_F32, or KERN_F16 on a GPU that computes in 16 bits: as small as bfloat16, eight times finer. A value
    // beyond 65504 becomes infinite, hence NaN in that row's whole output, never a wrong number; such a network wants exact_stream.
    enum kern_dtype stream;
    uint64_t (*overflows)(struct kern *); // how many such values there were so far, those of work under way perhaps; NULL: stream is float32
    enum kern_dtype picture;    // of pictures: KERN_F32, or KERN_BF16 on a GPU that computes in bfloat16
    size_t pixels;              // a call wants pictures of so many pixels together; 0: one picture at a time
    // A block's backward ops are best called for about so many lines (tokens of some rows) at a time, which caches hold; 0: for all at once.
    // Not 0: sums over lines are rounded after every KERN_SUM_LINES, so that calls for multiples of so many give the same bits as one for all.
    int back_lines;
    int threads;
    char why[256];              // text of the last failure
    char note[256];             // of something worth a word though nothing failed; "": nothing
    void *impl;                 // the back end's own

    // Before a thread uses a handle that another has used until now
    int (*use)(struct kern *);

    /* memory */
    int (*alloc)(struct kern *, size_t bytes, void **out); // zeroed, 64-byte aligned
    size_t (*device_memory)(struct kern *); // free bytes now; NULL: buffers are host memory (kern_host_memory)
    void (*free)(struct kern *, void *);
    int (*upload)(struct kern *, void *dst, const void *host, size_t bytes);   // complete on return
    int (*download)(struct kern *, void *host, const void *src, size_t bytes); // complete on return, all earlier work done
    // NULL where an op is complete on return. Else waits for all that was queued before the last call of pace: called once a step, it keeps
    // its caller at most one step ahead of the device, which never waits for the next one.
    int (*pace)(struct kern *);

    /*
     * rows: runs fn over the rows [0, n) cut into chunks [r0, r0+n'), each on a lane (perhaps several at once on pool threads). fn's
     * buffers of activations are scratch: it may use scratch rows [s0, s0+n') and nothing else, where s0 + n' <= rows_scratch(k, n, lines).
     * lines: of a row (tokens); rows of few lines are walked several at once, so that they share the way of the weights into the cache.
     * A lane is only valid inside the call; lanes share the table and linear layers of their parent. First failure wins and is returned.
     */
    int (*rows)(struct kern *, int n, int lines, kern_rows_fn *, void *ctx);
    int (*rows_scratch)(struct kern *, int n, int lines); // scratch rows that rows() may use for any count up to n

    /* linear layers. w [out, in] and b [out] (float32, may be NULL) are host memory, not kept. */
    int (*linear_new)(struct kern *, const struct kern_linear_spec *, const void *w, const float *b, struct kern_linear **);
    // NULL, or linear_new where w lies in n pieces, one behind the other, of count[i] elements
    int (*linear_new_pieces)(struct kern *, const struct kern_linear_spec *, const void *const *w, const size_t *count, int n, const float *b,
                             struct kern_linear **);
    void (*linear_free)(struct kern *, struct kern_linear *);
    // y [units*unit, out], x [units*unit, in]; save_pre: the value before the activation, same type and shape as y
    int (*linear)(struct kern *, const struct kern_linear *, void *y, const void *x, int units, void *save_pre);

    /* images and tokens (float32) */
    // tok [R, T, Cin*P*P], element index c*P*P + i*P + j, tokens row-major over patches; img [R, Cin, I, I]      (DiT sec. 3.2)
    int (*patchify)(struct kern *, float *tok, const float *img, int R, int Cin, int I, int P);
    // img [R, keep, I, I] <- tok [R, T, P*P*Cout], element index (i*P + j)*Cout + c; only channels < keep
    int (*unpatchify)(struct kern *, float *img, const float *tok, int R, int Cout, int keep, int I, int P);
    // x (stream) [R, T, C] += table [T, C]
    int (*add_table)(struct kern *, void *x, const float *table, int R, int T, int C);

    /* conditioning (float32) */
    // out [R, F]: cos(t f_i) for i < F/2, then sin(t f_i); f_i = exp(-ln(10000) i/(F/2)), f_i computed as float32
    int (*timestep_embed)(struct kern *, float *out, const float *t, int R, int F);
    // silu_c [R, C] = silu(c), c = temb [R, C] + table[y[r]]; y[r] < 0 adds nothing. t and y are buffers. save_c: c
    int (*condition)(struct kern *, float *silu_c, const float *temb, const float *table, const int32_t *y, int R, int C, float *save_c);

    /* blocks. mod vectors (shift, scale, gate) are float32, row r's at ptr + r*ld, C long */
    // y (act) [R, T, C] = LN(x)*(1 + scale) + shift, x (stream); LN without affine, biased variance. save_xhat (act) [R, T, C]: LN(x);
    // save_rstd [R, T]: 1/sqrt(variance + eps)
    int (*norm_modulate)(struct kern *, void *y, const void *x, const float *shift, const float *scale, int ld,
                         int R, int T, int C, float eps, void *save_xhat, float *save_rstd);
    // x += gate*h (h act), then, unless y is NULL, y = LN(x)*(1 + scale) + shift as above
    int (*gate_norm)(struct kern *, void *y, void *x, const void *h, const float *gate, const float *shift, const float *scale, int ld,
                     int R, int T, int C, float eps, void *save_xhat, float *save_rstd);
    // NULL but where products behind norms run in e4m3: the same with y in the form that `reader`, a layer with spec.x_fp8, reads (no larger than
    // act's)
    int (*norm_modulate_fp8)(struct kern *, void *y, const void *x, const float *shift, const float *scale, int ld, int R, int T, int C,
                             float eps, const struct kern_linear *reader);
    int (*gate_norm_fp8)(struct kern *, void *y, void *x, const void *h, const float *gate, const float *shift, const float *scale, int ld,
                         int R, int T, int C, float eps, const struct kern_linear *reader);
    bool fp8_pre; // a layer with spec.y_for wants save_pre's memory as scratch
    // NULL but where e4m3's scales are fixed. Between calibrate(true) and calibrate(false) every layer with x_fp8 widens the scale of its x to what
    // it reads, with room for eight times as much; values beyond a scale become the largest number. Scales begin small, so several passes are needed.
    int (*calibrate)(struct kern *, bool on);
    // o (act) [R, T, H*D] from qkv (act) [R, T, 3*H*D]: q, k, v blocks, each head-major; softmax(q k^T / sqrt(D)) v. save_lse [R, H, T]
    int (*attention)(struct kern *, void *o, const void *qkv, int R, int T, int H, int D, float *save_lse);
    // NULL but where e4m3's scales are fixed: the same with o in the form that `reader`, a layer with spec.x_fp8, reads. KERN_EUNSUPPORTED for a D
    // that it does not serve; R 0 asks just that
    int (*attention_fp8)(struct kern *, void *o, const void *qkv, int R, int T, int H, int D, const struct kern_linear *reader);

    /* pictures (elements of k->picture, channels last, `pictures` of them in a row; see above) */
    // w [out, in, side, side] and b [out] (may be NULL) are host memory, not kept
    int (*conv_new)(struct kern *, const struct kern_conv_spec *, const float *w, const float *b, struct kern_conv **);
    void (*conv_free)(struct kern *, struct kern_conv *);
    int (*conv_strips)(struct kern *, const struct kern_conv *); // how many; at least 1
    // Strips first .. first+n-1 of each y. coef [pictures, 2, in] is scale then shift, NULL without spec.norm. y must not overlap x
    int (*conv)(struct kern *, const struct kern_conv *, void *y, const void *x, const float *coef, int pictures, int first, int n);
    // coef [pictures, 2, C]: x*coef[0] + coef[1] is the group norm of x [pictures, n, C] over groups of C/groups channels and all n pixels of a
    // picture (Wu and He 2018). sums [pictures, KERN_NORM_PARTS, C, 2] is scratch. gamma and beta [C] are buffers
    int (*group_norm)(struct kern *, float *coef, double *sums, const void *x, const float *gamma, const float *beta, int pictures, size_t n,
                      int C, int groups, float eps);
    // o [pictures, T, C] from qkv [pictures, T, 3*C]: softmax(q k^T / sqrt(C)) v, one head. In strips of tokens, as conv.
    // wide_new: `pictures` at most
    int (*wide_new)(struct kern *, int T, int C, int pictures, struct kern_wide **);
    void (*wide_free)(struct kern *, struct kern_wide *);
    int (*wide_strips)(struct kern *, const struct kern_wide *);
    int (*wide)(struct kern *, const struct kern_wide *, void *o, const void *qkv, int pictures, int first, int n);

    /* the DiT paper's other conditioning designs (sec. 3.2) */
    // line `at` of every row of x [R, T, C] (elements of type t: KERN_F32 or k->stream) <- v [R, C]
    int (*set_token)(struct kern *, void *x, enum kern_dtype t, const float *v, int R, int T, int C, int at);
    // o (act) [R, T, H*D]: queries q (act) [R, T, H*D] attend to S keys of their row; key j of row r is at kv + (r*S + j)*ld (float32, H*D
    // long, head-major), its value H*D behind it; softmax(q k^T / sqrt(D)) v. S is at most KERN_CROSS_KEYS
    int (*cross_attention)(struct kern *, void *o, const void *q, const float *kv, int ld, int R, int T, int S, int H, int D);

    /* samplers (see above). The descriptor arrays are host memory and free again on return. */
    int (*gather)(struct kern *, float *in, const float *cols, size_t numel, const struct kern_gather *, int n); // in [n, numel]
    int (*row_update)(struct kern *, float *cols, size_t numel, size_t plane, const float *out, size_t out_ld, const float *noise,
                      const struct kern_row_update *, int n); // plane = I*I floats a channel
    int (*row_norm)(struct kern *, double *norms, const float *cols, size_t numel, const struct kern_norm *, int n); // norms: host memory

    /*
     * Training (see above). Backward ops belong to the forward op in front of them, on the values that it saved; they are called on the parent, never on a
     * lane of rows().
     */
    int (*zero)(struct kern *, void *dst, size_t bytes);
    int (*copy)(struct kern *, void *dst, const void *src, size_t bytes); // between buffers; on a lane too
    // A layer whose weights change: w [out, in] and b [out] (may be NULL) are float32 buffers (spec.w_store KERN_F32), the caller's, that outlive
    // the layer. After they changed, and once before the first use, linear_refresh. linear and linear_free serve these layers too.
    int (*linear_wrap)(struct kern *, const struct kern_linear_spec *, const float *w, const float *b, struct kern_linear **);
    int (*linear_refresh)(struct kern *, struct kern_linear *);
    // Of linear_wrap's layers. dy: of the value before the layer's own activation. Padding lines of vectors: dy is 0, x finite. Products take
    // their factors as the forward pass does, rounded to k->act or not. A bias's gradient is the sum of its dy over lines; ops that write such a dy
    // can sum it on the way ("_sum"), += where `add`, which spares linear_gradients from reading it again.
    // dx = dy w, times before'(x_pre) where x = before(x_pre), x_pre of x's type (before KERN_NONE: x_pre is not read); dx_sum [in], nullable
    int (*linear_backward)(struct kern *, const struct kern_linear *, void *dx, float *dx_sum, const void *dy, enum kern_act before,
                           const void *x_pre, int units, bool add);
    // Of outputs [first, first + count), first a multiple of 8, or all: dw [count, in] = dy^T x and db [count] (nullable) = the sums
    // of dy, both += where `add`
    int (*linear_gradients)(struct kern *, const struct kern_linear *, float *dw, float *db, const void *dy, const void *x, int units, int first,
                            int count, bool add);
    int (*gate_norm_backward)(struct kern *, const struct kern_norm_back *);
    // dS = P*(dP - delta) with delta the mean of dP by the weights P, over all keys and from the same P: rowsum(d_o*o) is delta only up to
    // o's rounding, which where a query sees one key is all that dS is. o may serve as a first estimate. dqkv_sum [3*H*D], nullable
    int (*attention_backward)(struct kern *, void *dqkv, float *dqkv_sum, const void *d_o, const void *qkv, const void *o, const float *lse,
                              int R, int T, int H, int D, bool add);
    // dkv lies as kv
    int (*cross_attention_backward)(struct kern *, void *dq, float *dkv, const void *d_o, const void *q, const float *kv, int ld, int R,
                                    int T, int S, int H, int D);
    int (*take_token)(struct kern *, float *v, const float *dx, int R, int T, int C, int at); // v [R, C]: line `at` of each row
    int (*condition_backward)(struct kern *, float *dtable, const float *dc, const int32_t *y, int R, int C); // dtable[y[r]] += dc[r]; y < 0: none
    int (*unpatchify_backward)(struct kern *, float *dtok, const float *dimg, int R, int Cout, int keep, int I, int P); // channels from keep on: 0
    int (*mix)(struct kern *, float *xt, float *x0, const float *x1, size_t numel, const struct kern_mix *, int R);     // descriptors: host memory
    int (*loss)(struct kern *, float *dout, float *loss, const float *out, size_t out_ld, const float *x1, const float *x0, const float *xt,
                size_t numel, const struct kern_loss *, int R); // loss [R, 2] and dout are buffers; lines of dout are out_ld long, 0 behind what counts
    int (*sum_squares)(struct kern *, double *sum, const float *x, size_t n); // added to sum, a buffer of one
    // p, m, v, e[i], g [n]. norm2 (a buffer, nullable without max_norm): the sum of squares of g, so norm = grad_scale*sqrt(norm2). moved2 (a
    // buffer of one, nullable): the sum of squares of p's change is added to it
    int (*adamw)(struct kern *, float *p, float *m, float *v, float *const e[], const float *g, size_t n, const struct kern_adamw *,
                 const double *norm2, double *moved2);

    /*
     * Several processes that train one network, a GPU each; all are NULL on back ends without. One of them makes the id, comm_join returns when
     * all have joined. Every process asks for the same exchanges of the same sizes in the same order; they run behind the work queued so far
     * and beside what is queued later. comm_sum, comm_sum_double: p [n] becomes the sum of all processes' p. comm_scatter: of p [size, n] the
     * line `rank` becomes the sum of all processes' such lines, the others stay. comm_gather: of p [size, n] line r becomes that of
     * process r. Work queued after comm_wait comes after all of them. If a process dies, the others' exchanges wait for ever until comm_abort:
     * watching over them is the caller's.
     */
    int (*comm_id)(struct kern *, char id[KERN_COMM_ID]);
    int (*comm_join)(struct kern *, const char id[KERN_COMM_ID], int rank, int size);
    int (*comm_sum)(struct kern *, float *p, size_t n);
    int (*comm_sum_double)(struct kern *, double *p, size_t n);
    int (*comm_scatter)(struct kern *, float *p, size_t n);
    int (*comm_gather)(struct kern *, float *p, size_t n);
    int (*comm_wait)(struct kern *);
    void (*comm_abort)(struct kern *); // any thread: exchanges under way end with nothing of worth, later ones fail

    /*
     * Recorded work; all four are NULL on back ends that gain nothing by it. Between graph_begin and graph_end ops are recorded instead of run;
     * graph_launch runs them all, on the same buffers, as if called again. Every op must have run once with the same sizes before it is recorded;
     * ops that take host memory (upload, gather, ...) cannot be. After a failure between the two, graph_end must still be called.
     */
    int (*graph_begin)(struct kern *);
    int (*graph_end)(struct kern *, struct kern_graph **);
    int (*graph_launch)(struct kern *, struct kern_graph *);
    void (*graph_free)(struct kern *, struct kern_graph *); // NULL is fine

    void (*close)(struct kern *);
};

// Opens a back end. On failure *out is NULL and why (may be NULL) has the text. Caller closes with kern_close.
int kern_open(struct kern **out, const struct kern_config *, char *why, size_t why_size);
// The names of precisions (KERN_PRECISIONS) to act and product. False: no such name
bool kern_precision(struct kern_config *, const char *name);
#define KERN_PRECISIONS "f32|tf32|bf16|f16|fp8|fp8-static"
void kern_close(struct kern *); // NULL is fine; all its buffers and layers must have been freed
int kern_devices(const char *backend, char *why, size_t why_size); // how many there are; none: why says what is missing
// "cuda" where there is a GPU that it can use, else "cpu", and why has what is missing
const char *kern_auto(char *why, size_t why_size);
int kern_threads_allowed(void); // from affinity and the cgroup quota (v1 and v2), at least 1
size_t kern_host_memory(void);  // bytes that this process can still have, from the kernel and the cgroup (v1 and v2)
bool kern_cpu_has_bf16(void);   // whether the cpu back end runs KERN_BF16 here

size_t kern_dtype_size(enum kern_dtype);

#ifdef __cplusplus
}
#endif
#endif
