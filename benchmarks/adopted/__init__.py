"""Models of other packages, unmodified, with a quantized cache: the models and their measurement."""
