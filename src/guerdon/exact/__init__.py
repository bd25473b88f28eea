"""Ground truth: exact solutions that learned policies are tested against."""
