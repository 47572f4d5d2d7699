"""Memory, buffers and throughput of a deployment, computed before anything is loaded (`farthing plan`)."""
