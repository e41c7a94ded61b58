"""NT-Xent in blocks with torch, for CPUs and any other device."""
