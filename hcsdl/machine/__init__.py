"""What we run on: cores, instruction sets, memory, threads, allocator, processes. Linux; no torch."""
