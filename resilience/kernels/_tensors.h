/* Tensors of torch as C sees them, read and made through DLPack's exchange API: one call instead of one for each
 * attribute, and neither torch's headers nor its library. Names and layout of the structures are those of dlpack.h 1.3
 * (https://dmlc.github.io/dlpack/latest/c_api.html).
 *
 * A lazily negated tensor looks like any other here: resolve_neg() comes first.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    uint32_t major, minor;
} dl_version;

typedef struct {
    uint8_t code, bits;
    uint16_t lanes;
} dl_dtype;

typedef struct {
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    dl_dtype dtype;
    int64_t *shape, *strides; /* in elements */
    uint64_t byte_offset;
} dl_tensor;

typedef struct dl_managed {
    dl_version version;
    void *context;
    void (*deleter)(struct dl_managed *);
    uint64_t flags;
    dl_tensor tensor;
} dl_managed;

typedef struct {
    dl_version version;
    void *previous;
    void *allocate, *managed_from_object;
    int (*object_from_managed)(dl_managed *, void **);
    int (*tensor_from_object)(void *, dl_tensor *);
    void *current_stream;
} dl_exchange;

enum { DL_CPU = 1, DL_FLOAT = 2, DL_BFLOAT = 4, DL_MAJOR = 1 };

/* Of the first tensor's class; torch has one for all. */
static const dl_exchange *exchange;

static int find_exchange(PyObject *tensor)
{
    PyObject *capsule = PyObject_GetAttrString((PyObject *)Py_TYPE(tensor), "__dlpack_c_exchange_api__");
    if (capsule == NULL)
        return 0;
    const dl_exchange *found = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    Py_DECREF(capsule);
    if (found != NULL && found->version.major == DL_MAJOR && found->tensor_from_object != NULL &&
        found->object_from_managed != NULL)
        exchange = found;
    return exchange != NULL;
}

/* 0 where `object` is no tensor with elements in this machine's memory, with no error set. */
static int read_tensor(PyObject *object, dl_tensor *found)
{
    if ((exchange == NULL && !find_exchange(object)) || exchange->tensor_from_object(object, found) != 0) {
        PyErr_Clear();
        return 0;
    }
    if (found->device_type != DL_CPU || found->data == NULL)
        return 0;
    found->data = (char *)found->data + found->byte_offset;
    return 1;
}

static int is_float32(const dl_tensor *tensor)
{
    return tensor->dtype.code == DL_FLOAT && tensor->dtype.bits == 32 && tensor->dtype.lanes == 1;
}

static inline int is_bfloat16(const dl_tensor *tensor)
{
    return tensor->dtype.code == DL_BFLOAT && tensor->dtype.bits == 16 && tensor->dtype.lanes == 1;
}

enum { MAX_DIMENSIONS = 5, ALIGNMENT = 64 };

typedef struct {
    dl_managed managed;
    int64_t shape[MAX_DIMENSIONS], strides[MAX_DIMENSIONS];
} owned;

static void free_owned(dl_managed *managed) { free(managed->context); }

/* A new tensor of float32, its elements not set; NULL with an error set where memory is short. `read_tensor` has been
 * called before. */
static inline PyObject *new_tensor(int dimensions, const int64_t *shape, const int64_t *strides, float **data)
{
    size_t count = 1;
    for (int i = 0; i < dimensions; i++)
        count *= (size_t)shape[i];
    owned *made = malloc(sizeof *made + ALIGNMENT + count * sizeof **data);
    if (made == NULL)
        return PyErr_NoMemory();
    *data = (float *)(((uintptr_t)(made + 1) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    made->managed = (dl_managed){
        .version = exchange->version,
        .context = made,
        .deleter = free_owned,
        .tensor = {.data = *data,
                   .device_type = DL_CPU,
                   .ndim = dimensions,
                   .dtype = {.code = DL_FLOAT, .bits = 32, .lanes = 1},
                   .shape = made->shape,
                   .strides = made->strides},
    };
    memcpy(made->shape, shape, (size_t)dimensions * sizeof *shape);
    memcpy(made->strides, strides, (size_t)dimensions * sizeof *strides);
    void *object; /* takes `made` over, even where it fails */
    return exchange->object_from_managed(&made->managed, &object) == 0 ? object : NULL;
}
