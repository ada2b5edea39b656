/* The comparison of expected with observed sums: what a dozen small operations of torch would take longer to start than
 * to do. residual.py says what it computes; limits and meaning of the factor are not known here.
 */

#include <math.h>

/* Sums of matrices: element (b, row, column) lies at data[b·batch + row·row + column·column]. */
typedef struct {
    const float *data;
    ptrdiff_t batch, row, column;
} table;

/* alpha·sums + beta·addend; the addend may be missing. */
typedef struct {
    table sums, addend;
    double alpha, beta;
} expectation;

static double element(const table *of, ptrdiff_t batch, ptrdiff_t row, ptrdiff_t column)
{
    return (double)of->data[batch * of->batch + row * of->row + column * of->column];
}

static double expected_at(const expectation *of, ptrdiff_t batch, ptrdiff_t row, ptrdiff_t column)
{
    double value = of->alpha * element(&of->sums, batch, row, column);
    return of->addend.data == NULL ? value : value + of->beta * element(&of->addend, batch, row, column);
}

/* In double: the square of a large float is no longer one. */
static double energy_at(const expectation *of, ptrdiff_t batch, ptrdiff_t row, ptrdiff_t columns)
{
    double energy = 0.0;
    for (ptrdiff_t column = 0; column < columns; column++) {
        double value = expected_at(of, batch, row, column);
        energy += value * value;
    }
    return energy;
}

static double usual_energy(const expectation *of, ptrdiff_t batches, ptrdiff_t rows, ptrdiff_t columns)
{
    double total = 0.0;
    for (ptrdiff_t batch = 0; batch < batches; batch++)
        for (ptrdiff_t row = 0; row < rows; row++)
            total += energy_at(of, batch, row, columns);
    return total / (double)(batches * rows);
}

/* The largest ratio; NaN as soon as one is. */
static double worst_ratio(const expectation *expected, const table *observed, ptrdiff_t batches, ptrdiff_t rows,
                          ptrdiff_t columns, double factor, double tiny)
{
    double usual = usual_energy(expected, batches, rows, columns), worst = 0.0;
    for (ptrdiff_t batch = 0; batch < batches; batch++)
        for (ptrdiff_t row = 0; row < rows; row++) {
            double residual = 0.0;
            for (ptrdiff_t column = 0; column < columns; column++) {
                double difference = expected_at(expected, batch, row, column) - element(observed, batch, row, column);
                residual += difference * difference;
            }
            double ratio = residual / ((energy_at(expected, batch, row, columns) + usual) * factor * factor + tiny);
            if (!(ratio <= worst)) {
                if (isnan(ratio))
                    return ratio;
                worst = ratio;
            }
        }
    return sqrt(worst);
}
