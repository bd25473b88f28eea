"""Rewards: verifiers by name, functions of the user, and their weighted sum."""
