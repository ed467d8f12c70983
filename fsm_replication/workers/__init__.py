"""The workers: each does one job, reports facts, and knows no machine."""
