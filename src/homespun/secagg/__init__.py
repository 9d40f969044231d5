"""Secure aggregation: the server learns the sum of a group's vectors and nothing else. See README.md here."""
