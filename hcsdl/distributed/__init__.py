"""Many ranks, one model: who am I, starting ranks, process groups, DistributedDataParallel."""
