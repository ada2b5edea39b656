/* What Python hands over: addresses as integers, shapes and strides as tuples, and where threads come from. */

typedef void parallel_function(void (*)(void *), void *, unsigned, unsigned);

/* Reads a tuple of `count` integers; 0 if it is not one. */
static int read_tuple(PyObject *tuple, Py_ssize_t count, ptrdiff_t *values)
{
    if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != count)
        return 0;
    for (Py_ssize_t i = 0; i < count; i++)
        values[i] = (ptrdiff_t)PyLong_AsSsize_t(PyTuple_GetItem(tuple, i));
    return !PyErr_Occurred();
}

static void *read_address(PyObject *number) { return (void *)(uintptr_t)PyLong_AsSize_t(number); }
