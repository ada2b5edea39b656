/* Copies bytes past the caches. What is copied into a snapshot is not read again soon, so each line of the target would
 * be fetched from memory only to be overwritten: a third of the traffic. The C library's memcpy avoids that from some
 * size on, which it derives from the size of the cache; a machine with a large one hardly ever gets there.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <emmintrin.h>
#define STREAMS 1
#else
#define STREAMS 0
#endif

#define LINE 64
#define PAGE 4096
#define LINES 4
#define PAGES 4

#if STREAMS
static void stream_line(char *target, const char *source)
{
    __m128i first = _mm_loadu_si128((const __m128i *)source);
    __m128i second = _mm_loadu_si128((const __m128i *)(source + 16));
    __m128i third = _mm_loadu_si128((const __m128i *)(source + 32));
    __m128i fourth = _mm_loadu_si128((const __m128i *)(source + 48));
    _mm_stream_si128((__m128i *)target, first);
    _mm_stream_si128((__m128i *)(target + 16), second);
    _mm_stream_si128((__m128i *)(target + 32), third);
    _mm_stream_si128((__m128i *)(target + 48), fourth);
}

/* A few lines from each of some pages in turn: the look-up of one page, which a file on tmpfs has by the thousand, goes
 * on while another one is copied. A quarter faster than page after page. */
static void stream_pages(char *target, const char *source)
{
    for (size_t at = 0; at < PAGE; at += LINES * LINE)
        for (size_t page = 0; page < PAGES; page++)
            for (size_t line = 0; line < LINES; line++) {
                size_t offset = page * PAGE + at + line * LINE;
                stream_line(target + offset, source + offset);
            }
}
#endif

static void copy_bytes(char *target, const char *source, size_t count)
{
#if STREAMS
    if (count >= 2 * PAGES * PAGE) {
        size_t head = (LINE - (uintptr_t)target % LINE) % LINE;
        memcpy(target, source, head);
        target += head, source += head, count -= head;
        for (; count >= PAGES * PAGE; target += PAGES * PAGE, source += PAGES * PAGE, count -= PAGES * PAGE)
            stream_pages(target, source);
        /* Streamed stores are not ordered: whoever is told that the copy is done must see it. */
        _mm_sfence();
    }
#endif
    memcpy(target, source, count);
}

static PyObject *copy(PyObject *module, PyObject *arguments)
{
    unsigned long long target, source;
    Py_ssize_t count;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "KKn", &target, &source, &count))
        return NULL;
    if (count < 0) {
        PyErr_Format(PyExc_ValueError, "count is %zd; it must not be negative", count);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    copy_bytes((char *)(uintptr_t)target, (const char *)(uintptr_t)source, (size_t)count);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"copy", copy, METH_VARARGS, "copy(target, source, count): bytes from one address to another; they do not overlap"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_copy", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__copy(void)
{
    return PyModule_Create(&definition);
}
