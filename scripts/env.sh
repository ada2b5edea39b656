# Sourced, not run: the one place that says which Python, which compiled operators and how many threads are used.
# DeepSpeed compiles its shared-memory operator again whenever PATH or this directory differ (half a minute each time).
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PATH="$root/.venv/bin:$PATH"
export TORCH_EXTENSIONS_DIR="$root/.venv/torch_extensions"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the order of floating-point sums depends on it
