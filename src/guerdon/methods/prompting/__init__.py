"""Methods whose policy is a fixed language model with a learned prompt."""
