"""Element-wise maths over blocks of plain arrays, compiled by numba; knows nothing of files."""
