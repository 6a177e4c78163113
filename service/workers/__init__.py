"""Several processes that serve on one socket and act as one."""
