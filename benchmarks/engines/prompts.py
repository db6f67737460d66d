"""What engines are asked, each beside its own cache."""

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "The three primary colors are",
    "A short poem about the sea:",
    "To bake bread, you need",
    "The largest planet of the solar system is",
    "In the year 1969, two astronauts",
    "The difference between a violin and a viola is",
)
