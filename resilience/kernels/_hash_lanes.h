/* The innermost loop of the hash, for one instruction set. `_hash.c` includes this file once for each, with
 *   LANES                      words in a vector
 *   TARGET                     the attribute that lets the compiler use that instruction set in a function
 *   NAME(x)                    the name of x for that instruction set
 *   MULTIPLY_LOW_HALVES(a, b)  products of the lower 32 bits of every 64
 */

typedef uint32_t NAME(words) __attribute__((vector_size(LANES * 4), aligned(1), may_alias));
typedef uint64_t NAME(pairs) __attribute__((vector_size(LANES * 4), aligned(8), may_alias));

/* Words whose positions share all but their low 16 bits, h. Then x ^ (x >> 16) only swaps lanes of aligned vectors and
 * vectors among each other: the definition's first product is one scalar product a vector plus the same lane numbers
 * throughout. */
TARGET static uint64_t NAME(hash)(const char *words, uint64_t position, ptrdiff_t count)
{
    ptrdiff_t head = (ptrdiff_t)(-position % LANES);
    if (head > count)
        head = count;
    uint64_t sum = hash_plainly(words, position, head);
    words += 4 * head;
    position += (uint64_t)head;
    count -= head;

    const uint32_t low = (uint32_t)position & MASK, h = low >> 16;
    const uint32_t high = (uint32_t)(position >> 31) * FOURTH & MASK;
    NAME(words) lanes, product = {0};
    for (uint32_t lane = 0; lane < LANES; lane++)
        lanes[lane] = (lane ^ (h % LANES)) * FIRST;
    NAME(pairs) both = {0}, odd = {0}, even_products = {0}, odd_products = {0};
    ptrdiff_t at = 0;
    for (; at + LANES <= count; at += LANES) {
        /* The processor itself sees no further than a page. */
        __builtin_prefetch((const char *)((uintptr_t)words + 4 * (uintptr_t)at + AHEAD));
        NAME(words) word = *(const NAME(words) *)(words + 4 * at);
        uint32_t vector = (low + (uint32_t)at) ^ (h & ~(uint32_t)(LANES - 1));
        NAME(words) p = (lanes + vector * FIRST) & MASK;
        p ^= p >> 15;
        p = p * SECOND & MASK;
        p ^= p >> 16;
        NAME(words) q = p * THIRD & MASK;
        q ^= q >> 14;
        q ^= high;
        product += word * (q * FOURTH);
        NAME(pairs) word_pairs = (NAME(pairs))word, p_pairs = (NAME(pairs))p;
        both += word_pairs;
        odd += word_pairs >> 32;
        even_products += MULTIPLY_LOW_HALVES(word_pairs, p_pairs);
        odd_products += MULTIPLY_LOW_HALVES(word_pairs >> 32, p_pairs >> 32);
    }
    uint64_t words_sum = 0, p_sum = 0;
    uint32_t q_sum = 0;
    for (int i = 0; i < LANES / 2; i++) {
        /* `both` holds the even words plus 2^32 times the odd ones. */
        words_sum += both[i] - (odd[i] << 32) + odd[i];
        p_sum += even_products[i] + odd_products[i];
    }
    for (int i = 0; i < LANES; i++)
        q_sum += product[i];
    sum += words_sum + 4 * p_sum + ((uint64_t)q_sum << 33);
    return sum + hash_plainly(words + 4 * at, position + (uint64_t)at, count - at);
}
