"""Element-wise maths over blocks of plain arrays, compiled by numba; independent of files."""
