"""sdfast beside its peers on the CPU: each in an environment and a process of its own, on one checkpoint."""
