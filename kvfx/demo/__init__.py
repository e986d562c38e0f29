"""A small model that retrieves, and the comparison of policies on it."""
