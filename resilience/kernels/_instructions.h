/* Which instruction set does the arithmetic. Included once, below a module's INSTRUCTION_SETS: an array of structures
 * that begin with a `name`: plain, and on x86-64 avx2 and avx512.
 */

static int instruction_set;

/* Number of the best instruction set that this processor and its operating system have. */
static int best_instruction_set(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return 1;
#endif
    return 0;
}

PyDoc_STRVAR(use_doc, "use(name) -> bool\n\nLet `name` (plain, avx2, avx512) do the arithmetic, if this processor can.");

static PyObject *use(PyObject *module, PyObject *name)
{
    (void)module;
    for (int number = 0; number <= best_instruction_set(); number++)
        if (PyUnicode_CompareWithASCIIString(name, INSTRUCTION_SETS[number].name) == 0) {
            instruction_set = number;
            return PyBool_FromLong(1);
        }
    return PyBool_FromLong(0);
}

PyDoc_STRVAR(instructions_doc, "instructions() -> str\n\nName of the instruction set in use.");

static PyObject *instructions_in_use(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyUnicode_FromString(INSTRUCTION_SETS[instruction_set].name);
}

/* Of the module's methods. */
#define INSTRUCTION_METHODS \
    {"use", use, METH_O, use_doc}, {"instructions", instructions_in_use, METH_NOARGS, instructions_doc}
