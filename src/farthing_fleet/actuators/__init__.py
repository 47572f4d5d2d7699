"""Ways to apply a decision: `local` processes on this machine, or a patch of `/scale` in `kubernetes`, there
with leader election. KEDA reads the decision from Prometheus instead.
"""
