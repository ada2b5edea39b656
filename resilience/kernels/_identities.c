/* The compiled form of identities.py: what some sixty small operations of torch would take longer to start than to do.
 *
 * In float32, as these: squares that overflow there make a ratio NaN, which is how values near the largest number are
 * seen. One thread, and no vectors of its own: a table has some thousand elements.
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <math.h>
#include <stddef.h>

#include "_tensors.h"

enum {
    VECTORS = 4, /* weight vectors of a table of sums: ones, and three of random signs */
    EXTREMES = 2,
    MAX_WIDTH = 1024, /* components of a head */
};

/* Contiguous, (front, b, h, d). */
typedef struct {
    const float *data;
    ptrdiff_t front, batches, heads, width, block; /* block: elements from one of `front` to the next */
} table;

static int read_table(PyObject *object, ptrdiff_t front, table *found)
{
    dl_tensor tensor;
    if (!read_tensor(object, &tensor) || !is_float32(&tensor) || tensor.ndim != 4 || tensor.shape[0] != front)
        return 0;
    int64_t block = 1;
    for (int i = 3; i >= 0; i--) {
        if (tensor.shape[i] < 1 || (tensor.strides[i] != block && tensor.shape[i] > 1))
            return 0;
        if (i > 0)
            block *= tensor.shape[i];
    }
    *found = (table){tensor.data, front, tensor.shape[1], tensor.shape[2], tensor.shape[3], block};
    return found->width <= MAX_WIDTH;
}

/* Whether the heads of `many` are those of `few`, or several to each of them. */
static int shares(const table *many, const table *few)
{
    return many->batches == few->batches && many->width == few->width && many->heads % few->heads == 0;
}

static const float *head_of(const table *of, ptrdiff_t batch, ptrdiff_t head)
{
    return of->data + (batch * of->heads + head) * of->width;
}

/* Estimated sum of squares of each component's terms: half its own, half the mean of the head's. Returns that mean. */
static float estimate(const table *of, const float *sums, float *squares)
{
    float mean = 0.0f;
    for (ptrdiff_t i = 0; i < of->width; i++) {
        const float *at = sums + i;
        squares[i] = (at[of->block] * at[of->block] + at[2 * of->block] * at[2 * of->block] +
                      at[3 * of->block] * at[3 * of->block]) / 3.0f;
        mean += squares[i];
    }
    mean /= (float)of->width;
    for (ptrdiff_t i = 0; i < of->width; i++)
        squares[i] = 0.5f * (squares[i] + mean);
    return mean;
}

/* What the terms of an identity are held with. */
typedef struct {
    table one, other, rows, beside; /* no data: there is none */
    float row_weight, random, coherent, tiny;
} identity;

/* Adds head `head` of the other side to the totals and squares of the key head that it shares. */
static void add_other(const identity *of, ptrdiff_t batch, ptrdiff_t head, float *totals, float *squares)
{
    float own[MAX_WIDTH];
    const float *sums = head_of(&of->other, batch, head);
    float weight = 1.0f;
    if (of->rows.data != NULL) {
        float unused[MAX_WIDTH];
        weight = of->row_weight * (float)of->rows.width * estimate(&of->rows, head_of(&of->rows, batch, head), unused);
    }
    estimate(&of->other, sums, own);
    for (ptrdiff_t i = 0; i < of->other.width; i++) {
        squares[i] += weight * own[i];
        totals[i] += of->rows.data == NULL ? sums[i] : 0.0f;
    }
}

/* The worst ratio of a key head; NaN if one is. */
static float head_ratio(const identity *of, ptrdiff_t batch, ptrdiff_t head)
{
    float own[MAX_WIDTH], totals[MAX_WIDTH] = {0}, squares[MAX_WIDTH] = {0}, worst = 0.0f;
    const float *sums = head_of(&of->one, batch, head);
    const ptrdiff_t shared = of->other.heads / of->one.heads;
    estimate(&of->one, sums, own);
    for (ptrdiff_t number = 0; number < shared; number++)
        add_other(of, batch, head * shared + number, totals, squares);
    for (ptrdiff_t i = 0; i < of->one.width; i++) {
        float energy = own[i] + squares[i], residual = fabsf(sums[i] - totals[i]);
        float tolerance = of->random * sqrtf(energy) + of->coherent * fminf(fabsf(sums[i]), fabsf(totals[i]));
        float ratio = residual / (tolerance + of->tiny) + energy * 0.0f;
        if (ratio != ratio)
            return ratio;
        worst = ratio > worst ? ratio : worst;
    }
    return worst;
}

/* 0, or NaN where an element is not finite or its square is not. */
static float nothing_of(const table *of)
{
    float squares = 0.0f;
    for (ptrdiff_t i = 0; of->data != NULL && i < of->front * of->block; i++)
        squares += of->data[i] * of->data[i];
    return squares * 0.0f;
}

/* As read_table; None stands for no table. */
static int read_optional(PyObject *object, table *found)
{
    return object == Py_None || read_table(object, VECTORS, found);
}

PyDoc_STRVAR(identity_doc,
             "identity(one, other, random, coherent, tiny, rows, row_weight, beside) -> float | None\n\n"
             "The worst ratio between two tables of sums, (4, b, h, d); rows and beside may be None. None for what it does\n"
             "not know.");

static PyObject *identity_ratio(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    (void)module;
    if (count != 8)
        return PyErr_Format(PyExc_TypeError, "identity takes 8 arguments, %zd were given", count);
    identity of = {
        .random = (float)PyFloat_AsDouble(arguments[2]),
        .coherent = (float)PyFloat_AsDouble(arguments[3]),
        .tiny = (float)PyFloat_AsDouble(arguments[4]),
        .row_weight = (float)PyFloat_AsDouble(arguments[6]),
    };
    if (PyErr_Occurred())
        return NULL;
    if (!read_table(arguments[0], VECTORS, &of.one) || !read_table(arguments[1], VECTORS, &of.other) ||
        !shares(&of.other, &of.one) || !read_optional(arguments[5], &of.rows) || !read_optional(arguments[7], &of.beside))
        Py_RETURN_NONE;
    if (of.rows.data != NULL && (of.rows.heads != of.other.heads || of.rows.batches != of.other.batches))
        Py_RETURN_NONE;
    float worst = nothing_of(&of.beside);
    for (ptrdiff_t unit = 0; unit < of.one.batches * of.one.heads && worst == worst; unit++) {
        float ratio = head_ratio(&of, unit / of.one.heads, unit % of.one.heads);
        worst = ratio <= worst ? worst : ratio;
    }
    return PyFloat_FromDouble(worst);
}

/* The worst excess of a head's components over those of its key head ÷ tolerance; NaN if one is. */
static float excess_of(const table *inner, const table *outer, ptrdiff_t batch, ptrdiff_t head, float factor, float tiny,
                       int with_zero)
{
    const float *within = head_of(inner, batch, head);
    const float *around = head_of(outer, batch, head / (inner->heads / outer->heads));
    float worst = 0.0f;
    for (ptrdiff_t i = 0; i < inner->width; i++) {
        float low = around[i], high = around[outer->block + i];
        if (with_zero) {
            low = low > 0.0f ? 0.0f : low;
            high = high < 0.0f ? 0.0f : high;
        }
        float below = low - within[i], above = within[inner->block + i] - high;
        float ratio = (below > above ? below : above) / (fmaxf(fabsf(low), fabsf(high)) * factor + tiny);
        if (below != below || above != above || ratio != ratio)
            return NAN;
        worst = ratio > worst ? ratio : worst;
    }
    return worst;
}

PyDoc_STRVAR(excess_doc, "excess(inner, outer, factor, tiny, with_zero) -> float | None\n\n"
                         "How far extremes (2, b, h, d) lie beyond others. None for what it does not know.");

static PyObject *excess(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    (void)module;
    if (count != 5)
        return PyErr_Format(PyExc_TypeError, "excess takes 5 arguments, %zd were given", count);
    const float factor = (float)PyFloat_AsDouble(arguments[2]), tiny = (float)PyFloat_AsDouble(arguments[3]);
    const int with_zero = PyObject_IsTrue(arguments[4]);
    if (PyErr_Occurred())
        return NULL;
    table inner, outer;
    if (!read_table(arguments[0], EXTREMES, &inner) || !read_table(arguments[1], EXTREMES, &outer) ||
        !shares(&inner, &outer))
        Py_RETURN_NONE;
    float worst = 0.0f;
    for (ptrdiff_t unit = 0; unit < inner.batches * inner.heads && worst == worst; unit++) {
        float ratio = excess_of(&inner, &outer, unit / inner.heads, unit % inner.heads, factor, tiny, with_zero);
        worst = ratio <= worst ? worst : ratio;
    }
    return PyFloat_FromDouble(worst);
}

static PyMethodDef METHODS[] = {
    {"identity", (PyCFunction)(void (*)(void))identity_ratio, METH_FASTCALL, identity_doc},
    {"excess", (PyCFunction)(void (*)(void))excess, METH_FASTCALL, excess_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT,
    .m_name = "resilience.kernels._identities",
    .m_doc = "Comparison of sums and extremes per component; see identities.py.",
    .m_size = -1,
    .m_methods = METHODS,
};

PyMODINIT_FUNC PyInit__identities(void) { return PyModule_Create(&MODULE); }
