"""Models of other packages, unmodified, with their cache quantized: the cases, and what is measured on them."""
