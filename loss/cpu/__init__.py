"""NT-Xent in blocks of torch operations, for CPUs and every other device."""
