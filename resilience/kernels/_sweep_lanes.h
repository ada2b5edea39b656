/* The innermost loops of the sweep, for one instruction set. `_sweep.c` includes this file once for each, with
 *   LANES    float32 numbers in a vector
 *   TARGET   the attribute that lets the compiler use that instruction set in a function
 *   NAME(x)  the name of x for that instruction set
 *
 * ROWS rows are read together, by one tile of columns. Every sum of a row is kept in LANES separate numbers for
 * MAX_CHAIN steps, and sums of columns are added up by panels: round-off grows with the root of a few hundred
 * additions, however large the matrix is. Plain IEEE arithmetic in a fixed order, nothing that the compiler may reorder: NaN and
 * INF come through.
 *
 * Two bfloat16 lie in the word of one float32: a shift and a mask widen them. So 2·LANES columns make a step, those at
 * even places before those at odd ones; weights are packed and sums of columns unpacked accordingly.
 */

typedef float NAME(floats) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t NAME(words) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef float NAME(halves) __attribute__((vector_size(LANES * 2), aligned(4), may_alias));

INLINE TARGET NAME(floats) NAME(widen)(NAME(words) loaded, int is_bfloat16, int odd)
{
    if (!is_bfloat16)
        return (NAME(floats))loaded;
    if (odd)
        return (NAME(floats))(loaded & 0xffff0000u);
    return (NAME(floats))(loaded << 16);
}

/* Four partial sums of all lanes. */
INLINE TARGET quad NAME(fold)(NAME(floats) lanes)
{
#if LANES == 4
    return lanes;
#elif HAVE_SHUFFLES && LANES == 8
    return SHUFFLE(lanes, lanes, 0, 1, 2, 3) + SHUFFLE(lanes, lanes, 4, 5, 6, 7);
#elif HAVE_SHUFFLES && LANES == 16
    NAME(halves) sums = SHUFFLE(lanes, lanes, 0, 1, 2, 3, 4, 5, 6, 7) + SHUFFLE(lanes, lanes, 8, 9, 10, 11, 12, 13, 14, 15);
    return SHUFFLE(sums, sums, 0, 1, 2, 3) + SHUFFLE(sums, sums, 4, 5, 6, 7);
#else
    quad part[LANES / 4];
    memcpy(part, &lanes, sizeof part);
    for (int half = LANES / 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            part[i] += part[i + half];
    return part[0];
#endif
}

/* `rights` and `lefts` are constants where this is inlined, so that all small loops unroll into registers. */
INLINE TARGET void NAME(pass)(const block *work, int is_bfloat16, int rights, int lefts)
{
    const int halves = is_bfloat16 ? 2 : 1;
    const char *row[ROWS];
    for (int i = 0; i < ROWS; i++)
        row[i] = work->start + i * work->row_bytes;
    const ptrdiff_t group_bytes = ROWS * work->row_bytes, bytes = work->width * (is_bfloat16 ? 2 : 4);
    for (ptrdiff_t group = 0; group < work->groups; group++) {
        NAME(floats) factor[ROWS][MAX_WIDE];
        quad found[MAX_WIDE] = {0};
        for (int i = 0; i < ROWS; i++)
            for (int c = 0; c < lefts; c++)
                factor[i][c] =
                    work->left[(group * ROWS + i) * work->left_element + c * work->left_vector] - (NAME(floats)){0};
        const float *right = work->right;
        float *columns = work->column_sums;
        for (ptrdiff_t at = 0, stop; at < bytes;) {
            NAME(floats) sums[ROWS][MAX_WIDE] = {0};
            stop = least(bytes, at + LANES * 4 * MAX_CHAIN);
            for (; at < stop; at += LANES * 4, right += halves * LANES, columns += halves * LANES) {
                NAME(words) loaded[ROWS];
                UNROLL for (int i = 0; i < ROWS; i++)
                {
                    loaded[i] = *(const NAME(words) *)(row[i] + at);
                    /* The processor itself sees no further than a page. */
                    __builtin_prefetch((const char *)((uintptr_t)row[i] + (uintptr_t)(work->ahead + at)));
                }
                UNROLL for (int odd = 0; odd < halves; odd++)
                {
                    NAME(floats) value[ROWS];
                    UNROLL for (int i = 0; i < ROWS; i++) value[i] = NAME(widen)(loaded[i], is_bfloat16, odd);
                    UNROLL for (int c = 0; c < rights; c++)
                    {
                        NAME(floats) weight = *(const NAME(floats) *)(right + c * TILE + odd * LANES);
                        UNROLL for (int i = 0; i < ROWS; i++) sums[i][c] += weight * value[i];
                    }
                    UNROLL for (int c = 0; c < lefts; c++)
                    {
                        NAME(floats) sum = factor[0][c] * value[0];
                        UNROLL for (int i = 1; i < ROWS; i++) sum += factor[i][c] * value[i];
                        *(NAME(floats) *)(columns + c * TILE + odd * LANES) += sum;
                    }
                }
            }
            UNROLL for (int c = 0; c < rights; c++) found[c] +=
                totals(NAME(fold)(sums[0][c]), NAME(fold)(sums[1][c]), NAME(fold)(sums[2][c]), NAME(fold)(sums[3][c]));
        }
        UNROLL for (int c = 0; c < rights; c++)
        {
            quad *out = (quad *)(work->row_sums + c * work->row_vector + group * ROWS);
            if (!work->first)
                found[c] += *out;
            *out = found[c];
        }
        UNROLL for (int i = 0; i < ROWS; i++) row[i] += group_bytes;
    }
}

#define PASS(rights, lefts)                                                                                            \
    TARGET static void NAME(pass_f32_##rights##lefts)(const block *work) { NAME(pass)(work, 0, rights, lefts); }       \
    TARGET static void NAME(pass_bf16_##rights##lefts)(const block *work) { NAME(pass)(work, 1, rights, lefts); }
PASS(1, 0) PASS(2, 0) PASS(3, 0) PASS(4, 0)
PASS(0, 1) PASS(0, 2) PASS(0, 3) PASS(0, 4)
PASS(1, 1) PASS(1, 2) PASS(2, 1) PASS(2, 2)
#undef PASS

/* Weights of a tile as they are read, filled up with zeros to whole steps. `element` is the stride in memory. */
TARGET static void NAME(pack)(float *packed, const float *source, ptrdiff_t element, ptrdiff_t width, int is_bfloat16)
{
    ptrdiff_t step = is_bfloat16 ? 2 * LANES : LANES, at = 0;
    for (; element == 1 && at + step <= width; at += step) {
        if (!is_bfloat16)
            memcpy(packed + at, source + at, LANES * sizeof *packed);
        for (int i = 0; is_bfloat16 && i < LANES; i++) {
            packed[at + i] = source[at + 2 * i];
            packed[at + LANES + i] = source[at + 2 * i + 1];
        }
    }
    for (; at < width; at += step)
        for (ptrdiff_t i = 0; i < step; i++)
            packed[at + (is_bfloat16 ? i % 2 * LANES + i / 2 : i)] = at + i < width ? source[(at + i) * element] : 0.0f;
}

/* Adds sums of columns, ordered as the weights are, to their totals; `first` sets these. */
TARGET static void NAME(unpack)(float *total, const float *added, ptrdiff_t width, int is_bfloat16, int first)
{
    ptrdiff_t step = is_bfloat16 ? 2 * LANES : LANES, at = 0;
    if (first)
        memset(total, 0, width * sizeof *total);
    for (; at + step <= width; at += step) {
        for (int i = 0; i < LANES && !is_bfloat16; i++)
            total[at + i] += added[at + i];
        for (int i = 0; i < LANES && is_bfloat16; i++) {
            total[at + 2 * i] += added[at + i];
            total[at + 2 * i + 1] += added[at + LANES + i];
        }
    }
    for (ptrdiff_t i = 0; at + i < width; i++)
        total[at + i] += added[at + (is_bfloat16 ? i % 2 * LANES + i / 2 : i)];
}

#define TABLE(dtype)                                                                                                   \
    {                                                                                                                  \
        {0, NAME(pass_##dtype##_01), NAME(pass_##dtype##_02), NAME(pass_##dtype##_03), NAME(pass_##dtype##_04)},       \
            {NAME(pass_##dtype##_10), NAME(pass_##dtype##_11), NAME(pass_##dtype##_12)},                               \
            {NAME(pass_##dtype##_20), NAME(pass_##dtype##_21), NAME(pass_##dtype##_22)},                               \
            {NAME(pass_##dtype##_30)}, {NAME(pass_##dtype##_40)},                                                      \
    }
static const instructions NAME(instructions) = {LANES, NAME(pack), NAME(unpack), {TABLE(f32), TABLE(bf16)}};
#undef TABLE
