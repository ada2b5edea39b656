/* The compiled form of hashing.py: the exact hash of the bits in a stretch of memory, at about its speed.
 *
 * Knows an address and a size only. The definition is in kernels/hash/README.md: H = sum of w·K modulo 2^64 with
 * K = 1 + 4·p + 2^33·q, so the sums of w, w·p and w·q are taken apart and put together at the end. Integers modulo a power
 * of two: no order of additions matters, neither lanes nor threads change the result.
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "_threads.h"

#if !defined(__GNUC__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "vector extensions of GCC and Clang are used, on little-endian machines; elsewhere the package falls back to torch"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MASK 0x7FFFFFFFu
#define FIRST 0x45D9F3B1u
#define SECOND 0x2C1B3C6Du
#define THIRD 0x297A2D39u
#define FOURTH 0x1B56C4E9u

enum {
    SPAN = 1 << 16,  /* words whose positions share all but their low 16 bits */
    AHEAD = 8192,    /* bytes between what is read and what is fetched into the cache */
    SMALL = 1 << 15, /* words up to which threads and releasing the GIL cost more than they bring */
};

/* One word at a time, by the definition. */
static uint64_t hash_plainly(const char *words, uint64_t position, ptrdiff_t count)
{
    uint64_t sum = 0;
    for (ptrdiff_t i = 0; i < count; i++, position++) {
        uint32_t word, p = (uint32_t)position & MASK, high = (uint32_t)(position >> 31);
        memcpy(&word, words + 4 * i, 4);
        p ^= p >> 16;
        p = p * FIRST & MASK;
        p ^= p >> 15;
        p = p * SECOND & MASK;
        p ^= p >> 16;
        uint32_t q = p * THIRD & MASK;
        q ^= q >> 14;
        q ^= high * FOURTH & MASK;
        q = q * FOURTH & MASK;
        sum += word * (1 + 4 * (uint64_t)p + ((uint64_t)q << 33));
    }
    return sum;
}

#if defined(__x86_64__)
#define LANES 8
#define TARGET __attribute__((target("avx2")))
#define NAME(x) x##_avx2
#define MULTIPLY_LOW_HALVES(a, b) ((NAME(pairs))_mm256_mul_epu32((__m256i)(a), (__m256i)(b)))
#include "_hash_lanes.h"
#undef LANES
#undef TARGET
#undef NAME
#undef MULTIPLY_LOW_HALVES

#define LANES 16
#define TARGET __attribute__((target("avx512f,avx2")))
#define NAME(x) x##_avx512
#define MULTIPLY_LOW_HALVES(a, b) ((NAME(pairs))_mm512_mul_epu32((__m512i)(a), (__m512i)(b)))
#include "_hash_lanes.h"
#undef LANES
#undef TARGET
#undef NAME
#undef MULTIPLY_LOW_HALVES
#endif

typedef uint64_t hash_function(const char *, uint64_t, ptrdiff_t);

static const struct {
    const char *name;
    hash_function *hash; /* of words whose positions lie within one span */
} INSTRUCTION_SETS[] = {
    {"plain", hash_plainly},
#if defined(__x86_64__)
    {"avx2", hash_avx2},
    {"avx512", hash_avx512},
#endif
};
#include "_instructions.h"

typedef struct {
    const char *data;
    uint64_t offset;
    ptrdiff_t num_words;
    hash_function *hash;
    ptrdiff_t next;
    uint64_t sum;
} job;

/* What every thread runs: spans, until none is left. */
static void run(void *data)
{
    job *work = data;
    const uint64_t first = work->offset / SPAN, end = work->offset + (uint64_t)work->num_words;
    uint64_t sum = 0;
    for (;;) {
        uint64_t begin = (first + (uint64_t)__atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) * SPAN;
        if (begin >= end)
            break;
        uint64_t stop = begin + SPAN < end ? begin + SPAN : end;
        begin = begin > work->offset ? begin : work->offset;
        sum += work->hash(work->data + 4 * (begin - work->offset), begin, (ptrdiff_t)(stop - begin));
    }
    __atomic_fetch_add(&work->sum, sum, __ATOMIC_RELAXED);
}

PyDoc_STRVAR(hash_doc, "hash(address, num_bytes, offset, GOMP_parallel, threads) -> int\n\n"
                       "Hash of the bytes at `address`, the first word at position `offset`; signed, as int64 is.");

static PyObject *hash(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    (void)module;
    if (count != 5)
        return PyErr_Format(PyExc_TypeError, "hash takes 5 arguments, %zd were given", count);
    job work = {.data = (const char *)(uintptr_t)PyLong_AsSize_t(arguments[0])};
    Py_ssize_t num_bytes = PyLong_AsSsize_t(arguments[1]);
    work.offset = PyLong_AsUnsignedLongLong(arguments[2]);
    team available;
    if (PyErr_Occurred() || !read_team(arguments + 3, &available))
        return NULL;
    work.num_words = num_bytes / 4;
    work.hash = INSTRUCTION_SETS[instruction_set].hash;
    if (work.num_words <= SMALL) {
        run(&work);
    } else {
        Py_BEGIN_ALLOW_THREADS;
        if (available.parallel != NULL && available.most > 1)
            available.parallel(run, &work, available.most, 0);
        else
            run(&work);
        Py_END_ALLOW_THREADS;
    }
    if (num_bytes % 4) { /* the last word, filled up with zeros */
        char last[4] = {0};
        memcpy(last, work.data + 4 * work.num_words, (size_t)(num_bytes % 4));
        work.sum += hash_plainly(last, work.offset + (uint64_t)work.num_words, 1);
    }
    return PyLong_FromLongLong((long long)work.sum);
}

static PyMethodDef METHODS[] = {
    {"hash", (PyCFunction)(void (*)(void))hash, METH_FASTCALL, hash_doc},
    INSTRUCTION_METHODS,
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT,
    .m_name = "resilience.kernels._hash",
    .m_doc = "Hashes of stretches of memory; see hashing.py.",
    .m_size = -1,
    .m_methods = METHODS,
};

PyMODINIT_FUNC PyInit__hash(void)
{
    instruction_set = best_instruction_set();
    return PyModule_Create(&MODULE);
}
