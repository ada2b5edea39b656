/* The threads of torch's OpenMP library, to which nothing is linked: threads.py finds where its GOMP_parallel is. */

#include <stdint.h>

typedef struct {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* NULL: one thread */
    unsigned most;
} team;

/* Reads the address and a number of threads; 0 with an error set if they are none. */
static int read_team(PyObject *const *arguments, team *found)
{
    uintptr_t address = (uintptr_t)PyLong_AsSize_t(arguments[0]);
    found->most = (unsigned)PyLong_AsUnsignedLong(arguments[1]);
    memcpy(&found->parallel, &address, sizeof address);
    return !PyErr_Occurred();
}
