"""Index table → mini-batches (N, C, H, W): reading, measuring, scaling, sampling, loading."""
