"""What a job needs before it runs: legality, memory, bytes between GPUs, time. Numbers from flags alone, no torch."""
