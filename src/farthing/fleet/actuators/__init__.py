"""Ways to act on a decision.

local             replicas as processes on this machine (the embedded default)
scale             a direct patch of `/scale` of a Deployment, StatefulSet or LeaderWorkerSet
external_metrics  figures for a Kubernetes HPA, which then acts itself
keda              the same for KEDA, over gRPC
lease             leader election, so that of several controllers one acts

`local` and `scale` are asked to `apply` a number of replicas; `external_metrics` and `keda` are asked by
others, and answer from the last decision in a `LastDecision`.
"""
