"""Ways to apply a decision.

local             replicas as processes on this machine (the default)
scale             patch `/scale` of a Deployment, StatefulSet or LeaderWorkerSet
external_metrics  serve metrics to a Kubernetes HPA, which then scales
lease             leader election, so that only one of several controllers acts

`local` and `scale` `apply` a number of replicas. `external_metrics` is polled and answers from a
`LastDecision`.
"""
