"""Methods that plan with a model: best-first search, and the heuristics that guide it."""
