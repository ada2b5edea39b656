/* The compiled form of sweep.py: weighted sums of a matrix's rows and columns in one pass over its memory.
 *
 * Neither torch's headers nor an OpenMP library are needed to build it, and one build serves every Python from 3.11 on.
 * Tensors are read as `_tensors.h` says. Threads are torch's own: sweep.py passes the address of GOMP_parallel in the
 * library that torch loaded.
 *
 * The matrix is cut into units by its shape alone: chunks of rows by groups of columns, for every matrix of a batch.
 * Units are independent; whoever finishes the last unit of a chunk (or group) adds up its partial sums in their order.
 * So the bits of the result depend on shape, strides and instruction set, not on the number of threads.
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "_residual.h"
#include "_tensors.h"
#include "_threads.h"

#if !defined(__GNUC__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "vector extensions of GCC and Clang are used, on little-endian machines; elsewhere the package falls back to torch"
#endif

enum {
    ROWS = 4,            /* read together; every weight loaded serves them all */
    TILE = 1024,         /* columns whose weights and sums stay in the first-level cache */
    PANEL = 128,         /* rows after which sums of columns are added to their totals */
    MAX_CHAIN = 64,      /* vectors that are added up one after the other */
    LONG = 8192,         /* columns from which on rows are swept in strips */
    STRIP = 16,          /* long rows that are swept over all tiles of a group before the next ones */
    AHEAD = 1024,        /* bytes between what is read and what is fetched into the cache, within long rows */
    BLOCK_BYTES = 16384, /* of the matrix that are read again from the cache for more weights */
    MAX_COLUMNS = 8,     /* weight vectors a side */
    MAX_WIDE = 4,        /* of them in one pass over a block */
    MAX_WHOLE = 16384,   /* columns that make one group; wider matrices are cut */
    GROUP_WIDTH = 16384, /* columns of a group of a wide matrix, whole tiles */
    ENOUGH_UNITS = 64,   /* a matrix is cut into no more than about so many */
    SMALL = 1 << 16,     /* elements up to which threads and releasing the GIL cost more than they bring */
    MAX_KEPT = 1 << 24,  /* bytes of scratch memory that are kept for the next call */
    MAX_STEP = 32,       /* columns of the widest step */
};

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 4")
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAVE_SHUFFLES 1
#define SHUFFLE __builtin_shufflevector
#endif
#endif

typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));

/* groups·ROWS rows by `width` columns, a multiple of the step, and where their sums go. */
typedef struct {
    const char *start;
    ptrdiff_t row_bytes, groups, width, ahead;
    const float *right; /* packed, TILE apart */
    const float *left;
    ptrdiff_t left_element, left_vector;
    float *row_sums; /* `row_vector` apart */
    ptrdiff_t row_vector;
    int first;          /* row sums are set, not added to */
    float *column_sums; /* added to; packed, TILE apart */
} block;

typedef void pass_function(const block *);

/* What an instruction set has: passes by dtype (float32, bfloat16), weight vectors on the right, and on the left. */
typedef struct {
    int lanes;
    void (*pack)(float *, const float *, ptrdiff_t, ptrdiff_t, int);
    void (*unpack)(float *, const float *, ptrdiff_t, int, int);
    pass_function *passes[2][MAX_WIDE + 1][MAX_WIDE + 1];
} instructions;

INLINE ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
INLINE ptrdiff_t ceiling(ptrdiff_t a, ptrdiff_t b) { return (a + b - 1) / b; }

/* The sum of each quad: a transposition and three additions. */
INLINE quad totals(quad a, quad b, quad c, quad d)
{
#if HAVE_SHUFFLES
    quad ab = SHUFFLE(a, b, 0, 4, 1, 5) + SHUFFLE(a, b, 2, 6, 3, 7);
    quad cd = SHUFFLE(c, d, 0, 4, 1, 5) + SHUFFLE(c, d, 2, 6, 3, 7);
    return SHUFFLE(ab, cd, 0, 1, 4, 5) + SHUFFLE(ab, cd, 2, 3, 6, 7);
#else
    return (quad){(a[0] + a[2]) + (a[1] + a[3]), (b[0] + b[2]) + (b[1] + b[3]), (c[0] + c[2]) + (c[1] + c[3]),
                  (d[0] + d[2]) + (d[1] + d[3])};
#endif
}

#define LANES 4
#define TARGET
#define NAME(x) x##_plain
#include "_sweep_lanes.h"
#undef LANES
#undef TARGET
#undef NAME

#if defined(__x86_64__)
#define LANES 8
#define TARGET __attribute__((target("avx2,fma")))
#define NAME(x) x##_avx2
#include "_sweep_lanes.h"
#undef LANES
#undef TARGET
#undef NAME

#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define NAME(x) x##_avx512
#include "_sweep_lanes.h"
#undef LANES
#undef TARGET
#undef NAME
#endif

static const struct {
    const char *name;
    const instructions *what;
} INSTRUCTION_SETS[] = {
    {"plain", &instructions_plain},
#if defined(__x86_64__)
    {"avx2", &instructions_avx2},
    {"avx512", &instructions_avx512},
#endif
};
#include "_instructions.h"

/* Weights of one side: any strides, in elements. */
typedef struct {
    const float *data;
    ptrdiff_t batch, element, vector;
    int count;
} weights;

/* Sums of one side: `count` contiguous vectors of `length` for every matrix. `parts` such blocks stand in scratch memory
 * until they are added up; one part is written in place. */
typedef struct {
    float *out, *scratch;
    ptrdiff_t length, parts;
    int count;
    int *open; /* for every matrix and piece of `length`: parts that are not there yet */
} sums;

typedef struct {
    const char *data;
    ptrdiff_t batches, num_rows, num_columns, batch_bytes, row_bytes;
    int size;      /* bytes of an element: 4 for float32, 2 for bfloat16 */
    int is_turned; /* rows and columns of the matrix are those of its transpose, which lies by rows */
    weights right, left;
    sums rows, columns;
    ptrdiff_t chunk, chunks, width, groups, padded_width;
    ptrdiff_t next_unit, next_thread;
    float *buffers;
    const instructions *by;
} job;

/* Where part `part` of the sums of matrix `batch` stands. */
static float *place(const sums *side, ptrdiff_t batch, ptrdiff_t part)
{
    ptrdiff_t block = side->length * side->count;
    return side->parts == 1 ? side->out + batch * block : side->scratch + (batch * side->parts + part) * block;
}

/* Adds up all parts of elements [begin, end) in their order, if this was the last part. */
static void finish(const sums *side, ptrdiff_t batch, ptrdiff_t piece, ptrdiff_t pieces, ptrdiff_t begin, ptrdiff_t end)
{
    if (side->count == 0 || side->parts == 1 ||
        __atomic_sub_fetch(&side->open[batch * pieces + piece], 1, __ATOMIC_ACQ_REL) > 0)
        return;
    for (int c = 0; c < side->count; c++) {
        float *out = side->out + (batch * side->count + c) * side->length;
        const float *part = place(side, batch, 0) + c * side->length;
        memcpy(out + begin, part + begin, (end - begin) * sizeof *out);
        for (ptrdiff_t number = 1; number < side->parts; number++) {
            part += side->length * side->count;
            for (ptrdiff_t i = begin; i < end; i++)
                out[i] += part[i];
        }
    }
}

/* One block by all weight vectors, a few at a time. */
static void sweep_block(const job *work, block part)
{
    int rights = work->right.count, lefts = work->left.count;
    while (rights > 0 || lefts > 0) {
        int most = rights > 0 && lefts > 0 ? MAX_WIDE / 2 : MAX_WIDE;
        int r = rights < most ? rights : most, l = lefts < most ? lefts : most;
        work->by->passes[work->size == 2][r][l](&part);
        rights -= r;
        lefts -= l;
        part.right += r * TILE;
        part.row_sums += r * part.row_vector;
        part.left += l * part.left_vector;
        part.column_sums += l * TILE;
    }
}

/* Rows that are no whole group, or columns that are no whole step: a copy with zeros around it. `part` is as for
 * sweep_block, with row sums as they were before; at most PANEL rows by one step, or ROWS rows by TILE columns. */
static void sweep_edge(const job *work, block part, ptrdiff_t num_rows, ptrdiff_t num_columns)
{
    char copy[BLOCK_BYTES] __attribute__((aligned(64)));
    float left[PANEL][MAX_COLUMNS], found[MAX_COLUMNS][PANEL];
    ptrdiff_t step_bytes = work->by->lanes * 4, bytes = num_columns * work->size;
    ptrdiff_t padded_bytes = ceiling(bytes, step_bytes) * step_bytes, padded_rows = ceiling(num_rows, ROWS) * ROWS;
    for (ptrdiff_t i = 0; i < padded_rows; i++) {
        ptrdiff_t here = i < num_rows ? bytes : 0;
        memcpy(copy + i * padded_bytes, part.start + i * part.row_bytes, here);
        memset(copy + i * padded_bytes + here, 0, padded_bytes - here);
        for (int c = 0; c < work->left.count; c++)
            left[i][c] = i < num_rows ? part.left[i * part.left_element + c * part.left_vector] : 0.0f;
    }
    block padded = part;
    padded.start = copy;
    padded.row_bytes = padded_bytes;
    padded.groups = padded_rows / ROWS;
    padded.width = padded_bytes / work->size;
    padded.left = left[0];
    padded.left_element = MAX_COLUMNS;
    padded.left_vector = 1;
    padded.row_sums = found[0];
    padded.row_vector = PANEL;
    padded.first = 1;
    sweep_block(work, padded);
    for (int c = 0; c < work->right.count; c++)
        for (ptrdiff_t i = 0; i < num_rows; i++) {
            float *sum = part.row_sums + c * part.row_vector + i;
            *sum = part.first ? found[c][i] : *sum + found[c][i];
        }
}

/* At most PANEL rows by at most TILE columns; of `part`, groups and width are found here. */
static void sweep_panel(const job *work, block part, ptrdiff_t num_rows, ptrdiff_t num_columns)
{
    ptrdiff_t step = work->by->lanes * 4 / work->size;
    ptrdiff_t width = num_columns / step * step, whole_rows = num_rows / ROWS * ROWS;
    ptrdiff_t most = width ? BLOCK_BYTES / (width * work->size) / ROWS * ROWS : PANEL;
    most = most < ROWS ? ROWS : most;
    for (ptrdiff_t row = 0, rows; row < num_rows; row += rows) {
        block here = part;
        rows = row < whole_rows ? least(most, whole_rows - row) : num_rows - row;
        here.start += row * part.row_bytes;
        here.left += row * part.left_element;
        here.row_sums += row;
        if (row >= whole_rows) {
            sweep_edge(work, here, rows, num_columns);
            continue;
        }
        if (width) {
            here.groups = rows / ROWS;
            here.width = width;
            sweep_block(work, here);
        }
        if (width < num_columns) {
            here.start += width * work->size;
            here.right += width;
            here.column_sums += width;
            here.first = part.first && width == 0;
            sweep_edge(work, here, rows, num_columns - width);
        }
    }
}

/* At most PANEL rows by one group of columns, whose weights are packed in `right`, tile by tile. Long rows
 * come fastest from memory a few at a time, others by panels of one tile, whose weights stay in the first-level cache. */
static void sweep_strips(const job *work, block part, ptrdiff_t num_rows, ptrdiff_t num_columns)
{
    const ptrdiff_t strip = num_columns >= LONG ? STRIP : PANEL;
    for (ptrdiff_t row = 0; row < num_rows; row += strip) {
        block here = part;
        here.start += row * part.row_bytes;
        here.left += row * part.left_element;
        here.row_sums += row;
        for (ptrdiff_t from = 0; from < num_columns; from += TILE) {
            sweep_panel(work, here, least(strip, num_rows - row), least(TILE, num_columns - from));
            here.start += TILE * work->size;
            here.right += TILE * work->right.count;
            here.column_sums += TILE * work->left.count;
            here.first = 0;
        }
    }
}

/* One chunk of rows by one group of columns; `right` and `panel_sums` are the thread's own memory for them. */
static void sweep_unit(const job *work, float *right, float *panel_sums, ptrdiff_t batch, ptrdiff_t chunk,
                       ptrdiff_t group)
{
    const int is_bfloat16 = work->size == 2, rights = work->right.count, lefts = work->left.count;
    const ptrdiff_t row_begin = chunk * work->chunk, row_end = least(row_begin + work->chunk, work->num_rows);
    const ptrdiff_t begin = group * work->width, end = least(begin + work->width, work->num_columns);
    float *row_sums = rights ? place(&work->rows, batch, group) : panel_sums;
    float *column_sums = lefts ? place(&work->columns, batch, chunk) : panel_sums;
    const float *left = lefts ? work->left.data + batch * work->left.batch : panel_sums;
    const float *weight = work->right.data + batch * work->right.batch;
    for (ptrdiff_t from = begin; from < end; from += TILE)
        for (int c = 0; c < rights; c++)
            work->by->pack(right + (from - begin) * rights + c * TILE,
                           weight + from * work->right.element + c * work->right.vector, work->right.element,
                           least(TILE, end - from), is_bfloat16);
    for (ptrdiff_t row = row_begin; row < row_end; row += PANEL) {
        block part = {
            .start = work->data + batch * work->batch_bytes + row * work->row_bytes + begin * work->size,
            .row_bytes = work->row_bytes,
            .ahead = end - begin >= LONG ? AHEAD : ROWS * work->row_bytes,
            .right = right,
            .left = left + row * work->left.element,
            .left_element = work->left.element,
            .left_vector = work->left.vector,
            .row_sums = row_sums + row,
            .row_vector = work->rows.length,
            .first = 1,
            .column_sums = panel_sums,
        };
        for (ptrdiff_t from = begin; from < end; from += TILE)
            for (int c = 0; c < lefts; c++)
                memset(panel_sums + (from - begin) * lefts + c * TILE, 0,
                       (size_t)ceiling(least(TILE, end - from), MAX_STEP) * MAX_STEP * sizeof *panel_sums);
        sweep_strips(work, part, least(PANEL, row_end - row), end - begin);
        for (ptrdiff_t from = begin; from < end; from += TILE)
            for (int c = 0; c < lefts; c++)
                work->by->unpack(column_sums + c * work->columns.length + from,
                                 panel_sums + (from - begin) * lefts + c * TILE, least(TILE, end - from), is_bfloat16,
                                 row == row_begin);
    }
    finish(&work->rows, batch, chunk, work->chunks, row_begin, row_end);
    finish(&work->columns, batch, group, work->groups, begin, end);
}

/* Memory of one thread: packed weights, and the sums of columns of a panel. */
static ptrdiff_t buffer_floats(const job *work)
{
    return (work->right.count + work->left.count) * work->padded_width;
}

/* What every thread runs: units, until none is left. */
static void run(void *data)
{
    job *work = data;
    ptrdiff_t units = work->batches * work->chunks * work->groups;
    ptrdiff_t thread = __atomic_fetch_add(&work->next_thread, 1, __ATOMIC_RELAXED);
    float *right = work->buffers + thread * buffer_floats(work);
    float *panel_sums = right + work->right.count * work->padded_width;
    for (;;) {
        ptrdiff_t unit = __atomic_fetch_add(&work->next_unit, 1, __ATOMIC_RELAXED);
        if (unit >= units)
            return;
        sweep_unit(work, right, panel_sums, unit / work->groups / work->chunks, unit / work->groups % work->chunks,
                   unit % work->groups);
    }
}

/* Cuts the matrix into units, by its shape alone. */
static void plan(job *work)
{
    work->width = work->num_columns <= MAX_WHOLE ? work->num_columns : GROUP_WIDTH;
    work->groups = ceiling(work->num_columns, work->width);
    work->padded_width = ceiling(work->width, TILE) * TILE;
    ptrdiff_t wanted = ceiling(ENOUGH_UNITS, work->groups * work->batches);
    work->chunk = ceiling(ceiling(work->num_rows, wanted), PANEL) * PANEL;
    work->chunks = ceiling(work->num_rows, work->chunk);
    work->rows.length = work->num_rows;
    work->rows.parts = work->groups;
    work->rows.count = work->right.count;
    work->columns.length = work->num_columns;
    work->columns.parts = work->chunks;
    work->columns.count = work->left.count;
}

/* Memory stays for the next call: fresh pages would cost more than the sums in them. Guarded by the GIL. */
typedef struct {
    void *memory;
    size_t size;
} kept;

static kept kept_scratch, kept_sums;

static void *take(kept *from, size_t *size)
{
    if (from->memory == NULL || from->size < *size)
        return malloc(*size);
    void *memory = from->memory;
    *size = from->size;
    from->memory = NULL;
    return memory;
}

static void give_back(kept *to, void *memory, size_t size)
{
    if (size > MAX_KEPT || (to->memory != NULL && to->size >= size)) {
        free(memory);
        return;
    }
    free(to->memory);
    to->memory = memory;
    to->size = size;
}

static size_t scratch_size(const sums *side, ptrdiff_t batches)
{
    return side->parts > 1 ? (size_t)(batches * side->parts * side->count * side->length) * sizeof(float) : 0;
}

static void set_counters(int *counters, ptrdiff_t count, ptrdiff_t value)
{
    for (ptrdiff_t i = 0; i < count; i++)
        counters[i] = (int)value;
}

/* Runs the job; called with the GIL held. Returns -1 where memory is short. */
static int execute(job *work, const team *available)
{
    unsigned threads = available->most;
    if (available->parallel == NULL || work->batches * work->num_rows * work->num_columns <= SMALL)
        threads = 1;
    size_t buffer_bytes = threads * (size_t)buffer_floats(work) * sizeof(float);
    size_t row_bytes = scratch_size(&work->rows, work->batches);
    size_t column_bytes = scratch_size(&work->columns, work->batches);
    ptrdiff_t row_counters = work->batches * work->chunks, column_counters = work->batches * work->groups;
    size_t size = buffer_bytes + row_bytes + column_bytes + (size_t)(row_counters + column_counters) * sizeof(int);
    char *memory = take(&kept_scratch, &size);
    if (memory == NULL)
        return -1;
    work->buffers = (float *)memory;
    work->rows.scratch = (float *)(memory + buffer_bytes);
    work->columns.scratch = (float *)(memory + buffer_bytes + row_bytes);
    work->rows.open = (int *)(memory + buffer_bytes + row_bytes + column_bytes);
    work->columns.open = work->rows.open + row_counters;
    set_counters(work->rows.open, row_counters, work->groups);
    set_counters(work->columns.open, column_counters, work->chunks);
    if (work->batches * work->num_rows * work->num_columns <= SMALL) {
        run(work);
    } else {
        Py_BEGIN_ALLOW_THREADS;
        if (threads > 1)
            available->parallel(run, work, threads, 0);
        else
            run(work);
        Py_END_ALLOW_THREADS;
    }
    give_back(&kept_scratch, memory, size);
    return 0;
}

/* --- what Python calls ---------------------------------------------------------------------------------------------- */

/* Reads a matrix, or a batch of them, and turns it so that its rows lie contiguous; 0 if it does not fit. */
static int read_matrix(PyObject *object, job *work, dl_tensor *matrix)
{
    if (!read_tensor(object, matrix) || (matrix->ndim != 2 && matrix->ndim != 3) ||
        (!is_float32(matrix) && !is_bfloat16(matrix)))
        return 0;
    const int64_t *shape = matrix->shape + matrix->ndim - 2, *strides = matrix->strides + matrix->ndim - 2;
    work->size = is_float32(matrix) ? 4 : 2;
    work->data = matrix->data;
    work->batches = matrix->ndim == 3 ? matrix->shape[0] : 1;
    work->batch_bytes = matrix->ndim == 3 ? matrix->strides[0] * work->size : 0;
    work->num_rows = shape[0];
    work->num_columns = shape[1];
    work->row_bytes = strides[0] * work->size;
    int by_rows = strides[1] == 1 || shape[1] == 1, by_columns = strides[0] == 1 || shape[0] == 1;
    if (work->batches < 1 || shape[0] < 1 || shape[1] < 1 || (!by_rows && !by_columns))
        return 0;
    work->is_turned = by_columns && (!by_rows || shape[0] > shape[1]);
    if (work->is_turned) {
        work->num_rows = shape[1];
        work->num_columns = shape[0];
        work->row_bytes = strides[1] * work->size;
    }
    return 1;
}

/* Reads (length, c) or (b, length, c) weights for `matrix`; 0 if they do not fit. None stands for no weights. */
static int read_weights(PyObject *object, const dl_tensor *matrix, ptrdiff_t length, weights *found)
{
    dl_tensor tensor;
    *found = (weights){0};
    if (object == Py_None)
        return 1;
    if (!read_tensor(object, &tensor) || !is_float32(&tensor) || (tensor.ndim != 2 && tensor.ndim != matrix->ndim))
        return 0;
    const int64_t *shape = tensor.shape + tensor.ndim - 2, *strides = tensor.strides + tensor.ndim - 2;
    if (shape[0] != length || shape[1] < 1 || shape[1] > MAX_COLUMNS ||
        (tensor.ndim == 3 && tensor.shape[0] != matrix->shape[0]))
        return 0;
    found->data = tensor.data;
    found->batch = tensor.ndim == 3 ? tensor.strides[0] : 0;
    found->element = strides[0];
    found->vector = strides[1];
    found->count = (int)shape[1];
    return 1;
}

/* A tensor for `count` vectors of `length`, or what was given to be used again; a new reference. None for no weights.
 * NULL with no error set where what was given does not fit. */
static PyObject *make_room(PyObject *given, const dl_tensor *matrix, ptrdiff_t length, int count, float **data)
{
    dl_tensor tensor;
    if (count == 0) {
        Py_INCREF(Py_None);
        return Py_None;
    }
    if (given == Py_None) {
        int first = 3 - matrix->ndim;
        const int64_t shape[] = {matrix->shape[0], length, count}, strides[] = {length * count, 1, length};
        return new_tensor(matrix->ndim, shape + first, strides + first, data);
    }
    if (!read_tensor(given, &tensor) || !is_float32(&tensor) || tensor.ndim != 2 || matrix->ndim != 2 ||
        tensor.shape[0] != length || tensor.shape[1] != count || (length > 1 && tensor.strides[0] != 1) ||
        (count > 1 && tensor.strides[1] != length))
        return NULL;
    *data = tensor.data;
    Py_INCREF(given);
    return given;
}

/* Runs the job on what was read; called with the GIL held. -1 with an error set where memory is short. */
static int run_job(job *work, PyObject *const *arguments)
{
    team available;
    if (!read_team(arguments, &available))
        return -1;
    if (work->is_turned) {
        weights side = work->right;
        work->right = work->left, work->left = side;
        float *out = work->rows.out;
        work->rows.out = work->columns.out, work->columns.out = out;
    }
    work->by = INSTRUCTION_SETS[instruction_set].what;
    plan(work);
    if (execute(work, &available) == 0)
        return 0;
    PyErr_NoMemory();
    return -1;
}

PyDoc_STRVAR(sweep_doc,
             "sweep(matrix, right, left, rows, columns, GOMP_parallel, threads) -> (rows, columns) | None\n\n"
             "Tensors, or None for none; rows and columns may be an earlier result of a single matrix, to be overwritten.\n"
             "Sums in float32, each vector contiguous. None, and nothing is done, for what it does not know.");

static PyObject *sweep(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    (void)module;
    if (count != 7)
        return PyErr_Format(PyExc_TypeError, "sweep takes 7 arguments, %zd were given", count);
    dl_tensor matrix;
    job work = {0};
    if (!read_matrix(arguments[0], &work, &matrix) ||
        !read_weights(arguments[1], &matrix, matrix.shape[matrix.ndim - 1], &work.right) ||
        !read_weights(arguments[2], &matrix, matrix.shape[matrix.ndim - 2], &work.left) ||
        (work.right.count == 0 && work.left.count == 0))
        Py_RETURN_NONE;
    PyObject *rows = make_room(arguments[3], &matrix, matrix.shape[matrix.ndim - 2], work.right.count, &work.rows.out);
    PyObject *columns = rows == NULL ? NULL
                                     : make_room(arguments[4], &matrix, matrix.shape[matrix.ndim - 1], work.left.count,
                                                 &work.columns.out);
    PyObject *result = NULL;
    if (rows != NULL && columns != NULL && run_job(&work, arguments + 5) == 0)
        result = PyTuple_Pack(2, rows, columns);
    Py_XDECREF(rows);
    Py_XDECREF(columns);
    if (result == NULL && !PyErr_Occurred())
        Py_RETURN_NONE;
    return result;
}

/* Reads (…, m, c) sums that a matrix's rows are to have, or, broadcast, what is to be added to them. */
static int read_table(PyObject *object, const job *work, ptrdiff_t rows, table *found, int64_t *count)
{
    dl_tensor tensor;
    if (!read_tensor(object, &tensor) || !is_float32(&tensor) || (tensor.ndim != 2 && tensor.ndim != 3))
        return 0;
    const int64_t *shape = tensor.shape + tensor.ndim - 2, *strides = tensor.strides + tensor.ndim - 2;
    int64_t batches = tensor.ndim == 3 ? tensor.shape[0] : 1;
    if ((batches != 1 && batches != work->batches) || (shape[0] != 1 && shape[0] != rows))
        return 0;
    *found = (table){tensor.data, batches == 1 ? 0 : tensor.strides[0], shape[0] == 1 ? 0 : strides[0], strides[1]};
    *count = shape[1];
    return 1;
}

PyDoc_STRVAR(worst_doc,
             "worst(matrix, right, sums, alpha, addend, beta, factor, tiny, GOMP_parallel, threads) -> float | None\n\n"
             "The largest ratio of the rows of matrix · right, where alpha · sums + beta · addend are expected: of the\n"
             "sums as many columns as `right` has, the addend None or broadcast. None for what it does not know.");

static PyObject *worst(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    (void)module;
    if (count != 10)
        return PyErr_Format(PyExc_TypeError, "worst takes 10 arguments, %zd were given", count);
    dl_tensor matrix;
    job work = {0};
    expectation expected = {.alpha = PyFloat_AsDouble(arguments[3]), .beta = PyFloat_AsDouble(arguments[5])};
    double factor = PyFloat_AsDouble(arguments[6]), tiny = PyFloat_AsDouble(arguments[7]);
    if (PyErr_Occurred())
        return NULL;
    int64_t num_sums, num_added;
    if (!read_matrix(arguments[0], &work, &matrix) ||
        !read_weights(arguments[1], &matrix, matrix.shape[matrix.ndim - 1], &work.right) || work.right.count == 0)
        Py_RETURN_NONE;
    ptrdiff_t batches = work.batches, rows = matrix.shape[matrix.ndim - 2], columns = work.right.count;
    if (!read_table(arguments[2], &work, rows, &expected.sums, &num_sums) || num_sums < columns)
        Py_RETURN_NONE;
    if (arguments[4] != Py_None &&
        (!read_table(arguments[4], &work, rows, &expected.addend, &num_added) || num_added != columns))
        Py_RETURN_NONE;
    size_t size = (size_t)(batches * rows * columns) * sizeof(float);
    float *found = work.rows.out = take(&kept_sums, &size);
    if (found == NULL)
        return PyErr_NoMemory();
    PyObject *result = NULL;
    if (run_job(&work, arguments + 8) == 0) {
        table observed = {found, rows * columns, 1, rows};
        double ratio;
        Py_BEGIN_ALLOW_THREADS;
        ratio = worst_ratio(&expected, &observed, batches, rows, columns, factor, tiny);
        Py_END_ALLOW_THREADS;
        result = PyFloat_FromDouble(ratio);
    }
    give_back(&kept_sums, found, size);
    return result;
}

static PyMethodDef METHODS[] = {
    {"sweep", (PyCFunction)(void (*)(void))sweep, METH_FASTCALL, sweep_doc},
    {"worst", (PyCFunction)(void (*)(void))worst, METH_FASTCALL, worst_doc},
    INSTRUCTION_METHODS,
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT,
    .m_name = "resilience.kernels._sweep",
    .m_doc = "Weighted sums of matrices in memory; see sweep.py.",
    .m_size = -1,
    .m_methods = METHODS,
};

PyMODINIT_FUNC PyInit__sweep(void)
{
    instruction_set = best_instruction_set();
    return PyModule_Create(&MODULE);
}
