"""Many volumes at once: cases, worker processes, quality sheets."""
