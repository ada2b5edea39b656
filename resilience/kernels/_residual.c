/* The comparison of expected with observed sums, in one call: what a dozen small operations of torch would take longer
 * to start than to do. See residual.py for what it computes; limits and meaning of the factor are not known here.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <math.h>
#include <stdlib.h>

/* Sums of `batches` matrices: element (b, row, column) lies at data[b·by_batch + row + column·by_column]. */
typedef struct {
    const float *data;
    Py_ssize_t by_batch, by_column;
} sums_t;

/* In double: the square of a large float is no longer one. */
static double energy_of(const float *from, Py_ssize_t by_column, Py_ssize_t count)
{
    double energy = 0.0;
    for (Py_ssize_t column = 0; column < count; column++) {
        double value = (double)from[column * by_column];
        energy += value * value;
    }
    return energy;
}

static double usual_energy(sums_t expected, Py_ssize_t batches, Py_ssize_t rows, Py_ssize_t count)
{
    double total = 0.0;
    for (Py_ssize_t batch = 0; batch < batches; batch++)
        for (Py_ssize_t row = 0; row < rows; row++)
            total += energy_of(expected.data + batch * expected.by_batch + row, expected.by_column, count);
    return total / (double)(batches * rows);
}

/* The largest ratio, squared; NaN as soon as one is. */
static double worst_square(sums_t expected, sums_t observed, Py_ssize_t batches, Py_ssize_t rows, Py_ssize_t count,
                           double square_factor, double tiny)
{
    double usual = usual_energy(expected, batches, rows, count), worst = 0.0;
    for (Py_ssize_t batch = 0; batch < batches; batch++) {
        const float *left = expected.data + batch * expected.by_batch;
        const float *right = observed.data + batch * observed.by_batch;
        for (Py_ssize_t row = 0; row < rows; row++) {
            double residual = 0.0;
            for (Py_ssize_t column = 0; column < count; column++) {
                double difference = (double)left[row + column * expected.by_column] -
                                    (double)right[row + column * observed.by_column];
                residual += difference * difference;
            }
            double scale = energy_of(left + row, expected.by_column, count) + usual;
            double ratio = residual / (scale * square_factor + tiny);
            if (!(ratio <= worst)) {
                if (isnan(ratio))
                    return ratio;
                worst = ratio;
            }
        }
    }
    return worst;
}

PyDoc_STRVAR(worst_doc,
             "worst(expected, by_batch, by_column, observed, by_batch, by_column, batches, rows, count, factor, tiny)\n\n"
             "The largest ratio of residual to tolerance.");

static PyObject *worst(PyObject *module, PyObject *const *args, Py_ssize_t num_args)
{
    (void)module;
    if (num_args != 11) {
        PyErr_SetString(PyExc_TypeError, "worst takes 11 arguments");
        return NULL;
    }
    sums_t sums[2];
    for (int side = 0; side < 2; side++) {
        sums[side].data = PyLong_AsVoidPtr(args[3 * side]);
        sums[side].by_batch = PyLong_AsSsize_t(args[3 * side + 1]);
        sums[side].by_column = PyLong_AsSsize_t(args[3 * side + 2]);
    }
    Py_ssize_t batches = PyLong_AsSsize_t(args[6]), rows = PyLong_AsSsize_t(args[7]), count = PyLong_AsSsize_t(args[8]);
    double factor = PyFloat_AsDouble(args[9]), tiny = PyFloat_AsDouble(args[10]);
    if (PyErr_Occurred())
        return NULL;
    double found;
    Py_BEGIN_ALLOW_THREADS;
    found = sqrt(worst_square(sums[0], sums[1], batches, rows, count, factor * factor, tiny));
    Py_END_ALLOW_THREADS;
    return PyFloat_FromDouble(found);
}

static PyMethodDef METHODS[] = {
    {"worst", (PyCFunction)(void (*)(void))worst, METH_FASTCALL, worst_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT,
    .m_name = "resilience.kernels._residual",
    .m_doc = "Comparison of sums; see residual.py.",
    .m_size = -1,
    .m_methods = METHODS,
};

PyMODINIT_FUNC PyInit__residual(void)
{
    return PyModule_Create(&MODULE);
}
