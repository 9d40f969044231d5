"""Named arrays, their canonical bytes, and the fixed-point numbers that sums are made of."""
