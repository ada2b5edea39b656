/* The compiled form of lengthwise.py: what is taken over the length of attention's operands. Sums of two tensors and of
 * the products of their elements, in one pass over both; sums of one with its squares; the smallest and the largest.
 *
 * Tensors and threads come to it as to _sweep.c. A unit is some columns of one matrix, over its whole length:
 * the bits of a sum depend on the length and the instruction set, not on the number of threads.
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "_tensors.h"
#include "_threads.h"

#if !defined(__GNUC__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "vector extensions of GCC and Clang are used, on little-endian machines; elsewhere the package falls back to torch"
#endif

enum {
    LANES = 16,           /* of a vector; the compiler cuts it into what the processor has */
    VECTORS = 4,          /* weight vectors */
    KINDS = 3,            /* of sums: of one tensor, of the other, of their products */
    MOMENTS = VECTORS + 1, /* weighted sums, and that of squares */
    EXTREMES = 2,
    ROWS = 4,             /* read together */
    PANEL = 128,          /* rows after which sums are added to their totals: round-off grows with the root of that */
    WIDTH = 256,          /* columns of a unit; less where there would be few units */
    LEAST_WIDTH = 64,     /* four lines of the cache */
    ENOUGH_UNITS = 16,
    SMALL = 1 << 15,      /* elements up to which threads and releasing the GIL cost more than they bring */
};

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 4")

typedef float floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

/* (outer, inner, length, width), the last one contiguous; strides in bytes. */
typedef struct {
    const char *data;
    ptrdiff_t outer, inner, row;
} operand;

typedef struct {
    operand of[2];        /* the second one for sums only */
    ptrdiff_t outer, inner, length, width;
    const float *weights; /* VECTORS of `length`, one after the other */
    float *out;           /* (KINDS, VECTORS, outer, inner, width); of one, (MOMENTS, …) or (EXTREMES, …) */
    ptrdiff_t unit_width, next_unit;
    int is_bfloat16;
    void (*run)(const void *, ptrdiff_t);
} job;

/* Where a unit lies. */
typedef struct {
    const char *start[2];
    ptrdiff_t matrix, begin, width;
} place;

/* The next LANES numbers of `count`, zeros after them. */
INLINE void load(floats *to, const char *from, ptrdiff_t count, int is_bfloat16)
{
    if (is_bfloat16) {
        halves loaded = {0};
        if (count >= LANES)
            loaded = *(const halves *)from;
        else
            memcpy(&loaded, from, (size_t)count * 2);
        *to = (floats)(__builtin_convertvector(loaded, words) << 16);
    } else if (count >= LANES) {
        *to = *(const floats *)from;
    } else {
        *to = (floats){0};
        memcpy(to, from, (size_t)count * 4);
    }
}

/* At most ROWS rows, added to the sums of a panel. Where there are fewer, the first one counts again, zero times. */
INLINE void add_rows(const job *work, const char *const start[2], ptrdiff_t row, ptrdiff_t width,
                     float sums[KINDS * VECTORS][WIDTH], int is_bfloat16)
{
    const ptrdiff_t size = is_bfloat16 ? 2 : 4, count = work->length - row;
    const char *from[2][ROWS];
    float weight[ROWS][VECTORS];
    UNROLL for (int i = 0; i < ROWS; i++)
    {
        for (int side = 0; side < 2; side++)
            from[side][i] = start[side] + (row + (i < count ? i : 0)) * work->of[side].row;
        UNROLL for (int c = 0; c < VECTORS; c++) weight[i][c] = i < count ? work->weights[c * work->length + row + i] : 0;
    }
    for (ptrdiff_t at = 0; at < width; at += LANES) {
        floats one[ROWS], other[ROWS];
        UNROLL for (int i = 0; i < ROWS; i++)
        {
            load(&one[i], from[0][i] + at * size, width - at, is_bfloat16);
            load(&other[i], from[1][i] + at * size, width - at, is_bfloat16);
            /* Rows may lie far apart: the processor itself sees no further than a page. */
            for (int side = 0; side < 2; side++)
                __builtin_prefetch(
                    (const char *)((uintptr_t)from[side][i] + (uintptr_t)(ROWS * work->of[side].row + at * size)));
        }
        UNROLL for (int c = 0; c < VECTORS; c++)
        {
            floats of_one = weight[0][c] * one[0], of_other = weight[0][c] * other[0];
            floats of_both = of_one * other[0];
            UNROLL for (int i = 1; i < ROWS; i++)
            {
                floats weighted = weight[i][c] * one[i];
                of_one += weighted;
                of_both += weighted * other[i];
                of_other += weight[i][c] * other[i];
            }
            *(floats *)&sums[c][at] += of_one;
            *(floats *)&sums[VECTORS + c][at] += of_other;
            *(floats *)&sums[2 * VECTORS + c][at] += of_both;
        }
    }
}

INLINE place place_of(const job *work, ptrdiff_t unit)
{
    const ptrdiff_t groups = (work->width + work->unit_width - 1) / work->unit_width;
    place found = {.matrix = unit / groups, .begin = unit % groups * work->unit_width};
    const ptrdiff_t rest = work->width - found.begin;
    found.width = rest < work->unit_width ? rest : work->unit_width;
    for (int side = 0; side < 2; side++) {
        const operand *of = &work->of[side];
        found.start[side] = (const char *)((uintptr_t)of->data + (uintptr_t)(found.matrix / work->inner * of->outer +
                                                                           found.matrix % work->inner * of->inner +
                                                                           found.begin * (work->is_bfloat16 ? 2 : 4)));
    }
    return found;
}

/* Writes `count` results of a unit. */
INLINE void write_out(const job *work, const place *at, float results[][WIDTH], int count)
{
    const ptrdiff_t block = work->outer * work->inner * work->width;
    for (int number = 0; number < count; number++)
        memcpy(work->out + number * block + at->matrix * work->width + at->begin, results[number],
               (size_t)at->width * sizeof(float));
}

INLINE void sum_unit(const job *work, ptrdiff_t unit, int is_bfloat16)
{
    const place here = place_of(work, unit);
    float totals[KINDS * VECTORS][WIDTH] = {0};
    for (ptrdiff_t row = 0; row < work->length;) {
        float sums[KINDS * VECTORS][WIDTH] = {0};
        const ptrdiff_t stop = row + PANEL < work->length ? row + PANEL : work->length;
        for (; row < stop; row += ROWS)
            add_rows(work, here.start, row, here.width, sums, is_bfloat16);
        for (int number = 0; number < KINDS * VECTORS; number++)
            for (ptrdiff_t at = 0; at < here.width; at += LANES)
                *(floats *)&totals[number][at] += *(floats *)&sums[number][at];
    }
    write_out(work, &here, totals, KINDS * VECTORS);
}

/* Rows are added up one after the other within a panel: it is short, and nothing else is read. */
INLINE void moment_unit(const job *work, ptrdiff_t unit, int is_bfloat16)
{
    const place here = place_of(work, unit);
    const ptrdiff_t size = is_bfloat16 ? 2 : 4, row_bytes = work->of[0].row;
    float totals[MOMENTS][WIDTH] = {0};
    for (ptrdiff_t row = 0; row < work->length; row += PANEL) {
        const ptrdiff_t rest = work->length - row, rows = rest < PANEL ? rest : PANEL;
        for (ptrdiff_t at = 0; at < here.width; at += LANES) {
            floats sums[MOMENTS] = {0};
            const char *from = here.start[0] + row * row_bytes + at * size;
            for (ptrdiff_t i = 0; i < rows; i++, from += row_bytes) {
                floats value;
                load(&value, from, here.width - at, is_bfloat16);
                UNROLL for (int c = 0; c < VECTORS; c++) sums[c] += work->weights[c * work->length + row + i] * value;
                sums[VECTORS] += value * value;
            }
            for (int number = 0; number < MOMENTS; number++)
                *(floats *)&totals[number][at] += sums[number];
        }
    }
    write_out(work, &here, totals, MOMENTS);
}

/* The smaller ones of two; of NaN, it does not matter which. */
INLINE void keep(floats *kept, const floats *offered, int largest)
{
    words better = (words)(largest ? *offered > *kept : *offered < *kept);
    *kept = (floats)(((words)*offered & better) | ((words)*kept & ~better));
}

INLINE void bound_unit(const job *work, ptrdiff_t unit, int is_bfloat16)
{
    const place here = place_of(work, unit);
    const ptrdiff_t size = is_bfloat16 ? 2 : 4, row_bytes = work->of[0].row;
    /* Smallest, largest, and NaN where anything is not finite: comparisons drop it. */
    float found[EXTREMES + 1][WIDTH];
    for (ptrdiff_t at = 0; at < here.width; at += LANES) {
        floats first;
        load(&first, here.start[0] + at * size, here.width - at, is_bfloat16);
        *(floats *)&found[0][at] = *(floats *)&found[1][at] = first;
        *(floats *)&found[2][at] = (floats){0};
    }
    for (ptrdiff_t row = 0; row < work->length; row += ROWS) {
        const ptrdiff_t count = work->length - row;
        for (ptrdiff_t at = 0; at < here.width; at += LANES) {
            floats low, high, bad = *(floats *)&found[2][at];
            low = *(floats *)&found[0][at], high = *(floats *)&found[1][at];
            UNROLL for (int i = 0; i < ROWS; i++)
            {
                const char *from = here.start[0] + (row + (i < count ? i : 0)) * row_bytes + at * size;
                floats value;
                load(&value, from, here.width - at, is_bfloat16);
                __builtin_prefetch((const char *)((uintptr_t)from + (uintptr_t)(ROWS * row_bytes)));
                keep(&low, &value, 0);
                keep(&high, &value, 1);
                bad += value * 0.0f;
            }
            *(floats *)&found[0][at] = low, *(floats *)&found[1][at] = high, *(floats *)&found[2][at] = bad;
        }
    }
    for (int number = 0; number < EXTREMES; number++)
        for (ptrdiff_t at = 0; at < here.width; at += LANES)
            *(floats *)&found[number][at] += *(floats *)&found[2][at];
    write_out(work, &here, found, EXTREMES);
}

#define RUN(what, name, target)                                                                                        \
    target static void what##_##name(const void *work, ptrdiff_t unit)                                                 \
    {                                                                                                                  \
        if (((const job *)work)->is_bfloat16)                                                                          \
            what##_unit(work, unit, 1);                                                                                \
        else                                                                                                           \
            what##_unit(work, unit, 0);                                                                                \
    }
#define RUNS(name, target) RUN(sum, name, target) RUN(moment, name, target) RUN(bound, name, target)
RUNS(plain, )
#if defined(__x86_64__)
RUNS(avx2, __attribute__((target("avx2,fma"))))
RUNS(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))))
#endif

typedef void unit_function(const void *, ptrdiff_t);

static const struct {
    const char *name;
    unit_function *sum, *moment, *bound;
} INSTRUCTION_SETS[] = {
    {"plain", sum_plain, moment_plain, bound_plain},
#if defined(__x86_64__)
    {"avx2", sum_avx2, moment_avx2, bound_avx2},
    {"avx512", sum_avx512, moment_avx512, bound_avx512},
#endif
};
#include "_instructions.h"

static ptrdiff_t num_units(const job *work)
{
    return work->outer * work->inner * ((work->width + work->unit_width - 1) / work->unit_width);
}

/* What every thread runs: units, until none is left. */
static void run(void *data)
{
    job *work = data;
    for (;;) {
        ptrdiff_t unit = __atomic_fetch_add(&work->next_unit, 1, __ATOMIC_RELAXED);
        if (unit >= num_units(work))
            return;
        work->run(work, unit);
    }
}

/* Runs the job; called with the GIL held. */
static void execute(job *work, const team *available)
{
    for (work->unit_width = WIDTH; work->unit_width > LEAST_WIDTH && num_units(work) < ENOUGH_UNITS;)
        work->unit_width /= 2;
    if (work->outer * work->inner * work->length * work->width <= SMALL) {
        run(work);
        return;
    }
    Py_BEGIN_ALLOW_THREADS;
    if (available->parallel != NULL && available->most > 1)
        available->parallel(run, work, available->most, 0);
    else
        run(work);
    Py_END_ALLOW_THREADS;
}

/* --- what Python calls ---------------------------------------------------------------------------------------------- */

/* Reads `count` operands (b, h, t, d) of one shape and dtype; heads that lie side by side in all of them are read as whole
 * rows. 0 for what is not known. */
static int read_operands(PyObject *const *arguments, int count, job *work, dl_tensor *first)
{
    int in_rows = 1;
    for (int side = 0; side < count; side++) {
        dl_tensor next;
        if (!read_tensor(arguments[side], &next) || next.ndim != 4 || (!is_float32(&next) && !is_bfloat16(&next)))
            return 0;
        if (side == 0)
            *first = next;
        for (int i = 0; i < 4; i++)
            if (next.shape[i] != first->shape[i] || next.shape[i] < 1)
                return 0;
        if (is_bfloat16(&next) != is_bfloat16(first) || (next.strides[3] != 1 && next.shape[3] > 1))
            return 0;
        ptrdiff_t size = is_float32(&next) ? 4 : 2;
        in_rows = in_rows && next.strides[1] == next.shape[3];
        work->of[side] = (operand){next.data, next.strides[0] * size, next.strides[1] * size, next.strides[2] * size};
    }
    work->is_bfloat16 = is_bfloat16(first);
    work->outer = first->shape[0];
    work->inner = in_rows ? 1 : first->shape[1];
    work->length = first->shape[2];
    work->width = in_rows ? first->shape[1] * first->shape[3] : first->shape[3];
    return 1;
}

/* (t, VECTORS), each vector contiguous. */
static int read_weights(PyObject *argument, job *work)
{
    dl_tensor weights;
    if (!read_tensor(argument, &weights) || !is_float32(&weights) || weights.ndim != 2 ||
        weights.shape[0] != work->length || weights.shape[1] != VECTORS ||
        (weights.strides[0] != 1 && work->length > 1) || weights.strides[1] != work->length)
        return 0;
    work->weights = weights.data;
    return 1;
}

/* Takes the operands, weights if there are any, GOMP_parallel and threads; gives (…, b, h, d) with the dimensions of
 * `kinds` in front. */
static PyObject *run_arguments(PyObject *const *arguments, Py_ssize_t count, job work, int operands, int weighted,
                               int kinds, int vectors)
{
    team available;
    dl_tensor first;
    if (count != operands + weighted + 2)
        return PyErr_Format(PyExc_TypeError, "%zd arguments were given", count);
    if (!read_operands(arguments, operands, &work, &first) || (weighted && !read_weights(arguments[operands], &work)))
        Py_RETURN_NONE;
    if (!read_team(arguments + operands + weighted, &available))
        return NULL;
    int64_t batch = first.shape[0], heads = first.shape[1], width = first.shape[3], each = batch * heads * width;
    const int64_t shape[] = {kinds, vectors, batch, heads, width};
    const int64_t strides[] = {vectors * each, each, heads * width, width, 1};
    int front = kinds == 1;
    PyObject *found = new_tensor(5 - front, shape + front, strides + front, &work.out);
    if (found != NULL)
        execute(&work, &available);
    return found;
}

PyDoc_STRVAR(sums_doc,
             "sums(one, other, weights, GOMP_parallel, threads) -> Tensor | None\n\n"
             "(3, 4, b, h, d) in float32 for operands (b, h, t, d) and weights (t, 4). None for what it does not know.");

static PyObject *sums(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    (void)module;
    job work = {.run = INSTRUCTION_SETS[instruction_set].sum};
    return run_arguments(arguments, count, work, 2, 1, KINDS, VECTORS);
}

PyDoc_STRVAR(moments_doc,
             "moments(operand, weights, GOMP_parallel, threads) -> Tensor | None\n\nAs sums; (5, b, h, d).");

static PyObject *moments(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    (void)module;
    job work = {.run = INSTRUCTION_SETS[instruction_set].moment};
    return run_arguments(arguments, count, work, 1, 1, 1, MOMENTS);
}

PyDoc_STRVAR(extremes_doc, "extremes(operand, GOMP_parallel, threads) -> Tensor | None\n\nAs sums; (2, b, h, d).");

static PyObject *extremes(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    (void)module;
    job work = {.run = INSTRUCTION_SETS[instruction_set].bound};
    return run_arguments(arguments, count, work, 1, 0, 1, EXTREMES);
}

static PyMethodDef METHODS[] = {
    {"sums", (PyCFunction)(void (*)(void))sums, METH_FASTCALL, sums_doc},
    {"moments", (PyCFunction)(void (*)(void))moments, METH_FASTCALL, moments_doc},
    {"extremes", (PyCFunction)(void (*)(void))extremes, METH_FASTCALL, extremes_doc},
    INSTRUCTION_METHODS,
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT,
    .m_name = "resilience.kernels._lengthwise",
    .m_doc = "Sums and extremes over a length; see lengthwise.py.",
    .m_size = -1,
    .m_methods = METHODS,
};

PyMODINIT_FUNC PyInit__lengthwise(void)
{
    instruction_set = best_instruction_set();
    return PyModule_Create(&MODULE);
}
