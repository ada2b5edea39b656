"""Everything that touches DeepSpeed's internals: version-checked, reversible, and nowhere else in the package."""
