"""Models of other packages, unmodified, with a quantized cache: the cases, and what is measured on them."""
