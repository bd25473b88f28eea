"""What the user brings: records of feedback, their readers and writers, and what can be wrong with them."""
