/* The innermost loops of the sweep, for one instruction set. `_sweep.c` includes this file once for each, with
 *   LANES    float32 numbers in a vector
 *   TARGET   the attribute that lets the compiler use that instruction set in a function
 *   NAME(x)  the name of x for that instruction set
 *
 * A group is ROWS rows of the matrix by one tile of columns. It is read once; every sum of a row is kept in LANES
 * separate numbers until the tile ends, and the groups' sums of columns are added up by panels: round-off grows with
 * the root of a few hundred additions, however large the matrix is. Plain IEEE arithmetic in a fixed order, nothing
 * reordered by the compiler: NaN and INF come through.
 */

typedef float NAME(floats) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t NAME(words) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t NAME(halves) __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

INLINE TARGET NAME(floats) NAME(load)(const void *row, ptrdiff_t at, int is_bfloat16)
{
    if (!is_bfloat16)
        return *(const NAME(floats) *)((const float *)row + at);
    /* A bfloat16 is the upper half of a float32. */
    NAME(halves) upper = *(const NAME(halves) *)((const uint16_t *)row + at);
    return (NAME(floats))(__builtin_convertvector(upper, NAME(words)) << 16);
}

INLINE TARGET float NAME(total)(NAME(floats) lanes)
{
    float part[LANES];
    memcpy(part, &lanes, sizeof part);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++)
            part[lane] += part[lane + half];
    return part[0];
}

/* `rights` and `lefts` are constants where this is inlined, so that all small loops unroll into registers. */
INLINE TARGET void NAME(group)(const void *const *rows, const void *const *later, ptrdiff_t width, int is_bfloat16,
                               const float *right, int rights, const float *left, int lefts, float *row_sums,
                               float *column_sums)
{
    NAME(floats) sums[ROWS][MAX_WIDE] = {0};
    NAME(floats) factors[ROWS][MAX_WIDE];
    const int size = is_bfloat16 ? 2 : 4;
    for (int row = 0; row < ROWS; row++)
        for (int c = 0; c < lefts; c++)
            factors[row][c] = left[row * MAX_COLUMNS + c] - (NAME(floats)){0};
    for (ptrdiff_t at = 0; at < width; at += LANES) {
        NAME(floats) value[ROWS];
        UNROLL for (int row = 0; row < ROWS; row++) {
            value[row] = NAME(load)(rows[row], at, is_bfloat16);
            __builtin_prefetch((const char *)later[row] + at * size);
        }
        UNROLL for (int c = 0; c < rights; c++) {
            NAME(floats) weight = *(const NAME(floats) *)(right + c * TILE + at);
            UNROLL for (int row = 0; row < ROWS; row++) sums[row][c] += weight * value[row];
        }
        UNROLL for (int c = 0; c < lefts; c++) {
            NAME(floats) sum = factors[0][c] * value[0];
            UNROLL for (int row = 1; row < ROWS; row++) sum += factors[row][c] * value[row];
            *(NAME(floats) *)(column_sums + c * TILE + at) += sum;
        }
    }
    UNROLL for (int c = 0; c < rights; c++)
        UNROLL for (int row = 0; row < ROWS; row++) row_sums[row * MAX_COLUMNS + c] += NAME(total)(sums[row][c]);
}

#define GROUP(rights, lefts)                                                                                           \
    TARGET static void NAME(group_f32_##rights##lefts)(GROUP_ARGUMENTS)                                                \
    {                                                                                                                  \
        NAME(group)(rows, later, width, 0, right, rights, left, lefts, row_sums, column_sums);                         \
    }                                                                                                                  \
    TARGET static void NAME(group_bf16_##rights##lefts)(GROUP_ARGUMENTS)                                               \
    {                                                                                                                  \
        NAME(group)(rows, later, width, 1, right, rights, left, lefts, row_sums, column_sums);                         \
    }
GROUP(1, 0) GROUP(2, 0) GROUP(3, 0) GROUP(4, 0)
GROUP(0, 1) GROUP(0, 2) GROUP(0, 3) GROUP(0, 4)
GROUP(1, 1) GROUP(1, 2) GROUP(2, 1) GROUP(2, 2)
#undef GROUP

#define TABLE(dtype)                                                                                                   \
    {                                                                                                                  \
        {0, NAME(group_##dtype##_01), NAME(group_##dtype##_02), NAME(group_##dtype##_03), NAME(group_##dtype##_04)},   \
            {NAME(group_##dtype##_10), NAME(group_##dtype##_11), NAME(group_##dtype##_12)},                            \
            {NAME(group_##dtype##_20), NAME(group_##dtype##_21), NAME(group_##dtype##_22)},                            \
            {NAME(group_##dtype##_30)}, {NAME(group_##dtype##_40)},                                                    \
    }
/* By dtype (float32, bfloat16), weight vectors on the right, and on the left. */
static group_function *const NAME(groups)[2][MAX_WIDE + 1][MAX_WIDE + 1] = {TABLE(f32), TABLE(bf16)};
#undef TABLE
