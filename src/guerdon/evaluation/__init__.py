"""How good a policy is, how sure that is, and which method did it best."""
